"""Data of a person's own: reading .npz, .npy and .csv files, and the scaling that a VAE needs.

    images     x' = (x - offset) / scale with one offset and scale for all pixels: into [-1, 1]
    vectors    x' = (x - mean) / standard deviation, column by column; a constant column becomes 0

A file is only ever read, and nothing in it is executed: pickled objects are refused.
"""

from __future__ import annotations

import array
import csv
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "InputError", "Scaling", "make_data", "read"]

IMAGE_NAME = "images"
ARRAY_NAMES = (IMAGE_NAME, "x", "X")
LABEL_NAMES = ("label", "labels", "y")
CHUNK = 4096  # rows that are looked at together


class InputError(ValueError):
    """Input that cannot be used; the message is one line that says what it was and the cure."""


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
        """Height and width; None for rows that are no pictures."""
        pictures = self.pictures(self.values[:1].float())
        return None if pictures is None else (pictures.shape[-2], pictures.shape[-1])

    def pictures(self, x: Tensor) -> Tensor | None:
        """Rows [.., *shape] as [.., H, W] or [.., 3, H, W]; None for what has no two dimensions."""
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
        """One line on what was read."""
        shape = " x ".join(map(str, self.values.shape[1:]))
        kind = f"images of {shape} values" if self.images else f"rows of {shape} columns"
        text = f"{len(self.values):,} {kind}"
        if self.labels is not None:
            count = len(np.unique(self.labels))
            text += f", with {count} true label{'s' * (count != 1)} (used for scores alone)"
        return text


@dataclass(frozen=True)
class Scaling:
    """x' = (x - offset) / scale.

    Attributes
    ----------
    offset, scale : Tensor [] or [V] float64
        Of all pixels, or of each column.
    constant : list of int
        Columns that hold one value alone, which tells nothing.
    """

    offset: Tensor
    scale: Tensor
    constant: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, data: Data) -> Scaling:
        """Find the scaling of these rows.

        Raises
        ------
        InputError
            If all rows are the same, or values lie too far apart for float32.
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
        """Scale rows [B, *shape] of any dtype, into float32."""
        return ((x.double() - self.offset.to(x.device)) / self.scale.to(x.device)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors by name; ``Scaling(**state)`` restores them."""
        return {"offset": self.offset, "scale": self.scale}


def _mean(x: Tensor, center: Tensor | None = None) -> Tensor:
    """Column means in float64, of x or of (x - center)^2, without a float64 copy of x."""
    total = torch.zeros(x.shape[1:], dtype=torch.float64)
    for rows in x.split(CHUNK):
        total += (rows.double() if center is None else (rows.double() - center).square()).sum(0)
    return total / len(x)


def read(path: str | os.PathLike[str]) -> Data:
    """Read a .npz, .npy or .csv file.

    Parameters
    ----------
    path : str or os.PathLike
        In a .npz the array is called ``images``, ``x`` or ``X``, or is the only one but for the
        labels, ``label``, ``labels`` or ``y``. A .csv has numeric columns, an optional header, and
        with a header an optional column of one of these names (but x and y are a point); a first
        column without a name holds the rows' names, as pandas and R write them, and is left out.

    Returns
    -------
    Data

    Raises
    ------
    InputError
        If the file is missing, unreadable, damaged or empty, or holds something else.
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
        raise InputError(f"{path}: must be a file, is a folder") from None
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
    notes: list[str] | None = None,
) -> Data:
    """Check arrays and bring them into the form that training takes.

    Parameters
    ----------
    values : array [N, V], [N, H, W] or [N, H, W, channels]; numbers
    labels : array [N], optional
    images : bool
        Take [N, V] for flattened images. It is so in any case for uint8, for more dimensions, and
        for squares of at least 8 x 8 whole numbers from 0 to 255.
    name : str
        Of the values in messages.

    Raises
    ------
    InputError
        If a shape or dtype is another, there is no row, or a value is NaN or infinite.
    """
    if values.dtype.kind not in "buif":
        raise InputError(f"{name} must hold numbers, holds {values.dtype}")
    if values.ndim not in (2, 3, 4):
        raise InputError(
            f"{name} must have shape [rows, columns] or [images, height, width], with channels or "
            f"not, has {list(values.shape)}"
        )
    if 0 in values.shape:
        raise InputError(f"{name} must not be empty, has shape {list(values.shape)}")
    for start in range(0, len(values), CHUNK):
        bad = np.argwhere(~np.isfinite(values[start : start + CHUNK]))
        if len(bad):
            row, *place = (int(i) for i in bad[0])
            at = ", ".join(map(str, place))
            raise InputError(
                f"{name} must be finite, has {values[start + row][tuple(place)]} in row "
                f"{start + row}, column {at} (counted from 0); mend or leave out such rows"
            )
    notes = list(notes or [])
    images = images or values.ndim > 2 or values.dtype == np.uint8
    if not images and _looks_like_pixels(values):
        images = True
        notes.append("square rows of whole numbers from 0 to 255: taken for flattened images")
    return Data(
        torch.from_numpy(_as_torch_takes_it(values)),
        None if labels is None else _check_labels(labels, len(values)),
        images,
        notes,
    )


def _looks_like_pixels(values: np.ndarray) -> bool:
    """Whether rows [N, V] are images of at least 8 x 8 whole numbers from 0 to 255."""
    side = round(values.shape[1] ** 0.5)
    if side < 8 or side * side != values.shape[1]:
        return False
    blocks = (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))
    return all(((b >= 0) & (b <= 255) & (b == np.floor(b))).all() for b in blocks)


def _as_torch_takes_it(values: np.ndarray) -> np.ndarray:
    """Native, contiguous, and uint8, float32 or float64, whichever holds every value."""
    dtype: type = np.float32 if np.can_cast(values.dtype, np.float32) else np.float64
    if values.dtype == np.uint8:
        dtype = np.uint8
    return np.ascontiguousarray(values, dtype=dtype)


def _check_labels(labels: np.ndarray, rows: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (rows,):
        raise InputError(
            f"labels must have one entry for each of the {rows} rows, have shape "
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


def _read_npy(file: BinaryIO) -> Data:
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
        label_name = next((n for n in LABEL_NAMES if n in archive.files), None)
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
    try:
        value = archive[name]
    except Exception as error:  # as above
        raise InputError(_damaged(f"array {name!r}", error)) from None
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name!r} is no array that numpy wrote")
    return value


def _read_csv(file: BinaryIO) -> Data:
    try:
        # A byte-order mark, as spreadsheets write it, would otherwise be part of the first name.
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            return _parse_csv(text)
    except UnicodeDecodeError:
        raise InputError("must be text in UTF-8, is something else") from None
    except (csv.Error, OSError) as error:
        raise InputError(f"cannot be read as a table: {error}") from None


def _parse_csv(file: TextIO) -> Data:
    start = file.readline()
    file.seek(0)
    delimiter = max(",;\t", key=start.count)
    table = csv.reader(file, delimiter=delimiter)
    first = next((row for row in table if row), [])
    header = _is_header(first)
    names = [n.strip() for n in first] if header else [str(i + 1) for i in range(len(first))]
    notes = []

    used = list(range(len(names)))
    if header and len(names) > 1 and not names[0]:
        used.remove(0)
        notes.append("the first column has no name: taken for the rows' names and left out")
    label_at = _label_column(names) if header else None
    if label_at is not None:
        used.remove(label_at)
    # Truth must never reach the training unseen, whatever further name it goes by.
    for i in [i for i in used if header and names[i].lower() in LABEL_NAMES]:
        if names[i].lower() == "y" and "x" in [name.lower() for name in names]:
            notes.append("columns x and y: taken for a point's coordinates, y is no label")
        else:
            used.remove(i)
            notes.append(f"column {names[i]!r} is named like a label too: left out")
    if not used:
        raise InputError("must have a numeric column, has none")

    values, labels, count = array.array("d"), [], 0
    for row in table if header else _chain(first, table):
        if not row:
            continue
        if len(row) != len(names):
            raise InputError(
                f"line {table.line_num} has {len(row)} columns, the first line has {len(names)}"
            )
        try:
            values.extend([float(row[i]) for i in used])
        except ValueError:
            raise InputError(_bad_cell(row, used, names, header, table.line_num)) from None
        if label_at is not None:
            if not row[label_at].strip():
                raise InputError(
                    f"line {table.line_num} has no {names[label_at]!r}; fill it in or leave the "
                    "column out"
                )
            labels.append(row[label_at].strip())
        count += 1
    if count == 0:
        held = "a header alone" if header else "none"
        raise InputError(f"must have rows of numbers, has {held}")
    matrix = np.frombuffer(values, dtype=np.float64).reshape(count, len(used))
    return make_data(matrix, np.array(labels) if labels else None, name="the table", notes=notes)


def _chain(first: list[str], rest: Any) -> Any:
    yield first
    yield from rest


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_header(cells: list[str]) -> bool:
    """Whether a first line is no data: it holds words, or counts the columns as pandas does."""
    if any(cell.strip() and not _is_number(cell) for cell in cells):
        return True
    named = cells[1:] if cells and not cells[0].strip() else cells
    return len(named) > 1 and named == [str(i) for i in range(len(named))]


def _label_column(names: list[str]) -> int | None:
    lower = [name.lower() for name in names]
    for name in LABEL_NAMES:
        # Columns x and y are a point in the plane.
        if name in lower and not (name == "y" and "x" in lower):
            return lower.index(name)
    return None


def _bad_cell(row: list[str], used: list[int], names: list[str], header: bool, line: int) -> str:
    at = next(i for i in used if not _is_number(row[i]))
    column = f"column {names[at]!r}" if header else f"column {at + 1}"
    value = f"is {row[at]!r}" if row[at].strip() else "is empty"
    cure = "leave the column out"
    if header:
        cure += ", or call it 'label' if it holds true labels"
    return f"line {line}, {column} must be a number, {value}; {cure}"
