"""A user's own data: .npz, .npy and .csv files, and the scaling that a VAE needs.

    images     x' = (x - offset) / scale with one offset and scale for all pixels: into [-1, 1]
    vectors    x' = (x - mean) / standard deviation, column by column; a constant column becomes 0

A file is only ever read, and nothing in it is executed: pickled objects are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vmm_fast._errors import InputError
from vmm_fast._text import counted
from vmm_fast.arrays.reading_csv import EXACT, inexact, label_position, plain, read_table

IMAGE_NAME = "images"
ARRAY_NAMES = (IMAGE_NAME, "x", "X")
CHUNK = 4096  # rows that are checked together
# An array is refused if it unpacks to more bytes than the first, and to more than the second times
# its size in the file.
PACKED_BYTES, MOST_PACKED = 2**28, 500


@dataclass(frozen=True)
class Data:
    """Rows to cluster.

    Attributes
    ----------
    values : Tensor [N, *shape]
        uint8, float32 or float64, all finite.
    labels : array [N] or None
        True labels of any sortable kind, for scores alone.
    images : bool
        Whether a row is an image (scaled by one minimum and maximum) or a vector (by column).
    notes : list of str
        What a reader should know about how the file was understood.
    """

    values: Tensor
    labels: np.ndarray | None
    images: bool
    notes: list[str] = field(default_factory=list)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width of the pictures; None for rows that are not pictures."""
        pictures = self.pictures(self.values[:1].float())
        return None if pictures is None else (pictures.shape[-2], pictures.shape[-1])

    def pictures(self, x: Tensor) -> Tensor | None:
        """Return rows [.., *shape] as pictures [.., H, W] or [.., 3, H, W].

        Return None if rows do not have two dimensions.
        """
        lead, shape = x.shape[: x.ndim - self.values.ndim + 1], tuple(self.values.shape[1:])
        if not self.images:
            return None
        if len(shape) == 1:
            side = round(shape[0] ** 0.5)
            return x.reshape(*lead, side, side) if side * side == shape[0] and side > 1 else None
        if len(shape) == 3:
            x = x.movedim(-1, -3) if shape[2] < shape[0] else x
            if x.shape[-3] != 3:
                x = x.mean(-3)
        return x

    def describe(self) -> str:
        """Return one line that describes the data."""
        shape = " x ".join(map(str, self.values.shape[1:]))
        if self.images:
            text = f"{counted(len(self.values), 'image')} of {shape} values"
        else:
            columns = counted(self.values.shape[1], "column")
            text = f"{counted(len(self.values), 'row')} of {columns}"
        if self.labels is not None:
            labels = counted(len(np.unique(self.labels)), "true label")
            text += f", with {labels} (used for scores alone)"
        return text


@dataclass(frozen=True)
class Scaling:
    """The scaling of rows: x' = (x - offset) / scale.

    Attributes
    ----------
    offset, scale : Tensor [] or [V] float64
        One for all pixels, or one for each column.
    constant : list of int
        Columns that hold only one value, and so no information.
    """

    offset: Tensor
    scale: Tensor
    constant: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, data: Data) -> Scaling:
        """Return the scaling for these rows.

        Raises InputError if all rows are the same, or values lie too far apart for float32.
        """
        low, high = data.values.amin(0).double(), data.values.amax(0).double()
        if bool((low == high).all()):
            raise InputError("all rows are the same, so there is nothing to cluster")
        if data.images:
            low, high = low.min(), high.max()
            offset, scale, constant = low / 2 + high / 2, high / 2 - low / 2, []
        else:
            offset = _mean(data.values)
            scale = _mean(data.values, offset).sqrt()
            same = low == high
            offset, scale = torch.where(same, low, offset), torch.where(same, 1.0, scale)
            constant = same.nonzero()[:, 0].tolist()
        if not (offset.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise InputError(
                "values lie too far apart, or too near each other, to be scaled; check for wrong "
                "entries"
            )
        return cls(offset, scale, constant)

    def apply(self, x: Tensor) -> Tensor:
        """Return scaled rows [B, *shape] as float32, given rows of any dtype."""
        return ((x.double() - self.offset.to(x.device)) / self.scale.to(x.device)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name; ``Scaling(**state)`` restores the scaling."""
        return {"offset": self.offset, "scale": self.scale}


def _mean(x: Tensor, center: Tensor | None = None) -> Tensor:
    """Return column means in float64, of x or of (x - center)^2, without a float64 copy of x."""
    total = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for rows in x.split(CHUNK):
        total += (rows.double() if center is None else (rows.double() - center).square()).sum(0)
    return total / len(x)


def read(path: str | os.PathLike[str]) -> Data:
    """Read a .npz, .npy or .csv file.

    In a .npz the array is called ``images``, ``x`` or ``X``, or is the only one but for the labels,
    ``label``, ``labels``, ``y``, ``target`` or ``class``, or what else labels are usually called. A
    .csv has numeric columns, an optional header, and with a header an optional column of one of
    these names (but x and y are a point). Columns that name or number the rows are left out. A
    first line of numbers is a row unless it is quoted and the next is not, counts the columns from
    0 or 1, or has an empty first cell. The notes say what was left out or guessed.

    Raises InputError if the file is missing, unreadable, damaged or empty, or holds something else.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        kind = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise InputError(f"{path}: must be a .npz, .npy or .csv file, {kind}")
    try:
        # An open file: numpy forgets to close the one that it opens itself when that is damaged.
        file = open(path, "rb")  # noqa: SIM115  closed below
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: must be a file, but is a folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        try:
            if not file.peek(1):
                raise InputError("is empty, must hold data")
            return reader(file)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def make_data(
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    images: bool = False,
    name: str = "array",
    columns: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> Data:
    """Return the data for training from arrays, after checking them.

    Parameters
    ----------
    values : array [N, V], [N, H, W] or [N, H, W, channels]; numbers
    labels : array [N], optional
    images : bool
        Whether rows [N, V] are flattened images. Arrays of uint8 or of more dimensions always are
        images, and so are squares of at least 8 x 8 whole numbers from 0 to 255.
    name, columns : str, sequence of str
        Names of the values and their columns in messages.
    notes : list of str, optional
        Notes to put first.

    Raises
    ------
    InputError
        If a shape or dtype is wrong, there is no row, or a value is NaN, infinite, or a whole
        number that float64 rounds.
    """
    if values.dtype.kind not in "buif":
        raise InputError(f"{name} must hold numbers, holds {values.dtype}")
    if values.ndim not in (2, 3, 4):
        raise InputError(
            f"{name} must have shape [rows, columns] or [images, height, width], with channels or "
            f"not, has {list(values.shape)}"
        )
    if 0 in values.shape:
        raise InputError(f"{name} must not be empty, but has shape {list(values.shape)}")
    whole = values.dtype.kind in "iu"
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # what float64 does not hold becomes infinite: refused
            values = values.astype(np.float64)
    for start in range(0, len(values), CHUNK):
        block = values[start : start + CHUNK]
        wrong = (block > EXACT) | (block < -EXACT) if whole else ~np.isfinite(block)
        bad = np.argwhere(wrong)
        if len(bad):
            row, *place = (int(i) for i in bad[0])
            value = block[row][tuple(place)]
            where = f"row {start + row}, {_place(place, columns)}"
            if whole:
                raise InputError(inexact(f"{name}, {where},", value))
            raise InputError(
                f"{name} must be finite, but has {value} in {where}; mend or leave out such rows"
            )
    notes = list(notes or [])
    images = images or values.ndim > 2 or values.dtype == np.uint8
    if not images and _looks_like_pixels(values):
        images = True
        notes.append("square rows of whole numbers from 0 to 255: taken for flattened images")
    found = _as_torch_takes_it(values)
    if not images:
        notes += _outliers(found, columns)
    return Data(
        torch.from_numpy(found),
        None if labels is None else _check_labels(labels, len(values)),
        images,
        notes,
    )


def _place(place: Sequence[int], columns: Sequence[str] | None) -> str:
    if columns is None:
        return f"column {', '.join(map(str, place))} (counted from 0)"
    return f"column {columns[place[0]]!r} (rows are counted from 0)"


def _outliers(values: np.ndarray, columns: Sequence[str] | None) -> list[str]:
    """Return notes on columns of values [N, V] with outliers that make all other rows alike.

    In such a column, scaled to a standard deviation of 1, nine tenths of the rows lie within an
    interval of length 0.1.
    """
    some = values[:: -(-len(values) // 20_000)].astype(np.float64)
    beyond = max(1, len(some) // 20)
    if len(some) <= 2 * beyond:
        return []
    ends = np.partition(some, (beyond, len(some) - 1 - beyond), axis=0)
    low, high = ends[beyond], ends[-1 - beyond]
    rows = torch.from_numpy(values)
    scale = _mean(rows, _mean(rows)).sqrt().numpy()
    stretched = np.flatnonzero((high > low) & (scale > 10 * (high / 2 - low / 2) * 2))
    notes = []
    for column in map(int, stretched[:2]):
        row = int(np.abs(values[:, column].astype(np.float64) - low[column]).argmax())
        notes.append(
            f"row {row}, {_place([column], columns)}, has {values[row, column]:g}, so far out that "
            "nearly all others are the same once they are scaled; look for wrong entries"
        )
    if len(stretched) > 2:
        notes.append(f"{len(stretched) - 2} more columns have such values")
    return notes


def _looks_like_pixels(values: np.ndarray) -> bool:
    """Return whether rows [N, V] are squares of at least 8 x 8 whole numbers from 0 to 255."""
    side = round(values.shape[1] ** 0.5)
    if side < 8 or side * side != values.shape[1]:
        return False
    blocks = (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))
    return all(((b >= 0) & (b <= 255) & (b == np.floor(b))).all() for b in blocks)


def _as_torch_takes_it(values: np.ndarray) -> np.ndarray:
    """Return a contiguous array in native byte order, of uint8, float32 or float64.

    The dtype is the smallest of these that holds every value of the given dtype.
    """
    dtype: type = np.float32 if np.can_cast(values.dtype, np.float32) else np.float64
    if values.dtype == np.uint8:
        dtype = np.uint8
    return np.ascontiguousarray(values, dtype=dtype)


def _check_labels(labels: np.ndarray, rows: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (rows,):
        raise InputError(
            f"labels must have one entry for each of the {counted(rows, 'row')}, have shape "
            f"{list(labels.shape)}"
        )
    missing = labels != labels
    if missing.any():
        raise InputError(f"labels must be complete, row {int(missing.argmax())} has NaN")
    return labels


def _load(file: BinaryIO) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
        raise InputError(_damaged("the file", error)) from None


def _damaged(what: str, error: Exception) -> str:
    if "allow_pickle" in str(error) or "pickled" in str(error):
        return (
            f"{what} is damaged or holds Python objects; save it with a plain dtype: numbers, or "
            "for labels also text by .astype(str)"
        )
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{what} cannot be read, is damaged or of another format ({detail})"


def _check_header(file: Any, size: int, what: str) -> None:
    """Raise InputError if an array in numpy's format is larger than its file, or than memory.

    ``size`` is the number of bytes of the file. The file is left just behind the header. A header
    that numpy cannot read passes here: numpy refuses it later.
    """
    try:
        newer = np.lib.format.read_magic(file) != (1, 0)
        read_header = getattr(np.lib.format, f"read_array_header_{1 + newer}_0")
        shape, _, dtype = read_header(file)
    except Exception:  # of many kinds; loading, which comes next, says that the file is damaged
        return
    declared, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if declared > held and not dtype.hasobject:
        raise InputError(
            f"{what} is damaged or cut off: {list(shape)} of {dtype} must be {_bytes(declared)}, "
            f"but {_bytes(held)} are there"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if declared > memory:
        raise InputError(
            f"{what} must fit in memory, {_bytes(memory)}, but {list(shape)} of {dtype} takes "
            f"{_bytes(declared)}; cut it"
        )


def _bytes(number: int) -> str:
    power = min(4, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _read_npy(file: BinaryIO) -> Data:
    _check_header(file, os.fstat(file.fileno()).st_size, "the file")
    file.seek(0)
    values = _load(file)
    if not isinstance(values, np.ndarray):
        values.close()
        raise InputError("is a .npz archive, must be called so")
    return make_data(values, name="the array")


def _read_npz(file: BinaryIO) -> Data:
    archive = _load(file)
    if isinstance(archive, np.ndarray):
        raise InputError("is a single .npy array, must be called so")
    with archive:
        label_at = label_position([plain(n) for n in archive.files])
        label_name = None if label_at is None else archive.files[label_at]
        candidates = [n for n in ARRAY_NAMES if n in archive.files]
        others = [n for n in archive.files if n != label_name]
        if candidates:
            name = candidates[0]
        elif len(others) == 1:
            name = others[0]
        else:
            held = ", ".join(archive.files) or "none"
            raise InputError(f"must hold one array, or one called images, x or X; holds {held}")
        values = _member(archive, name)
        labels = None if label_name is None else _member(archive, label_name)
        ignored = [n for n in others if n != name]
    notes = [f"arrays left out: {', '.join(ignored)}"] if ignored else []
    return make_data(values, labels, images=name == IMAGE_NAME, name=f"array {name!r}", notes=notes)


def _member(archive: Any, name: str) -> np.ndarray:
    what = f"array {name!r}"
    try:
        stored = {n.removesuffix(".npy"): n for n in archive.zip.namelist()}[name]
        info = archive.zip.getinfo(stored)
        if info.file_size > max(PACKED_BYTES, MOST_PACKED * info.compress_size):
            raise InputError(
                f"{what} must not take over {MOST_PACKED} times its bytes in the file, but takes "
                f"{_bytes(info.file_size)} from {_bytes(info.compress_size)}; if it is right, save "
                "it by np.save"
            )
        with archive.zip.open(info) as member:
            _check_header(member, info.file_size, what)
        value = archive[name]
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
        raise InputError(_damaged(what, error)) from None
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name!r} is no array that numpy wrote")
    return value


def _read_csv(file: BinaryIO) -> Data:
    table = read_table(file)
    return make_data(
        table.values, table.labels, name="the table", columns=table.columns, notes=table.notes
    )
