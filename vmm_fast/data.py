"""Data of a person's own: reading .npz, .npy and .csv files, and the scaling that a VAE needs.

    images     x' = (x - offset) / scale with one offset and scale for all pixels: into [-1, 1]
    vectors    x' = (x - mean) / standard deviation, column by column; a constant column becomes 0

A file is only ever read, and nothing in it is executed: pickled objects are refused.
"""

from __future__ import annotations

import array
import csv
import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

from vmm_fast._text import counted

__all__ = ["Data", "InputError", "Scaling", "make_data", "read"]

IMAGE_NAME = "images"
ARRAY_NAMES = (IMAGE_NAME, "x", "X")
# As :func:`_plain` gives them; the first that is there is taken.
LABEL_NAMES = (
    *("label", "labels", "y", "target", "targets", "class", "classes", "truth", "groundtruth"),
    *("truelabel", "truelabels", "classlabel", "ytrue", "species", "category", "celltype"),
    *("cluster", "clusters", "group"),
)
CHUNK = 4096  # rows that are looked at together
EXACT = 2**53  # float64 holds every whole number up to this
MOST_CHARACTERS = 2**24  # of a line: a million columns
# An array that unpacks to more bytes, and to so many times what it is in the file, is not unpacked.
PACKED_BYTES, MOST_PACKED = 2**28, 500


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
        labels, ``label``, ``labels``, ``y``, ``target`` or ``class``, or what else labels are
        usually called. A .csv has numeric columns, an optional header, and with a header an
        optional column of one of these names (but x and y are a point). Columns that name or
        number the rows are left out. A first line of numbers is a row unless it is quoted and the
        next is not, counts the columns from 0 or 1, or has an empty first cell. Whatever is left
        out or guessed is told in the notes.

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
    columns: Sequence[str] | None = None,
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
    columns : sequence of str, optional
        Names of the columns in messages.
    notes : list of str, optional
        The first of the notes.

    Raises
    ------
    InputError
        If a shape or dtype is another, there is no row, or a value is NaN, infinite, or a whole
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
        raise InputError(f"{name} must not be empty, has shape {list(values.shape)}")
    whole = values.dtype.kind in "iu"
    for start in range(0, len(values), CHUNK):
        block = values[start : start + CHUNK]
        wrong = (block > EXACT) | (block < -EXACT) if whole else ~np.isfinite(block)
        bad = np.argwhere(wrong)
        if len(bad):
            row, *place = (int(i) for i in bad[0])
            value = block[row][tuple(place)]
            where = f"row {start + row}, {_place(place, columns)}"
            if whole:
                raise InputError(_inexact(f"{name}, {where},", value))
            raise InputError(
                f"{name} must be finite, has {value} in {where}; mend or leave out such rows"
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
    """Tell of columns [N, V] that a few values stretch so far that all others become alike.

    Scaled to a standard deviation of 1, nine tenths of the rows lie within a tenth there.
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
    """Check that an array of numpy's format is no larger than the file that has it, and memory.

    ``size`` is the number of bytes of the file, which is left behind the header. What numpy itself
    refuses, it refuses later.
    """
    try:
        newer = np.lib.format.read_magic(file) != (1, 0)
        read_header = getattr(np.lib.format, f"read_array_header_{1 + newer}_0")
        shape, _, dtype = read_header(file)
    except Exception:  # as _load says
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
        label_at = _label_position([_plain(n) for n in archive.files])
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
    except Exception as error:  # as above
        raise InputError(_damaged(what, error)) from None
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name!r} is no array that numpy wrote")
    return value


# --- tables ---


def _read_csv(file: BinaryIO) -> Data:
    try:
        # A byte-order mark, as spreadsheets write it, would otherwise be part of the first name.
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            return _parse_csv(text)
    except UnicodeDecodeError:
        raise InputError("must be text in UTF-8, is something else") from None
    except (csv.Error, OSError) as error:
        raise InputError(f"cannot be read as a table: {error}") from None


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of a file, none of which is taken into memory where it has no end."""
    for number in itertools.count(1):
        line = file.readline(MOST_CHARACTERS + 1)
        if not line:
            return
        if len(line) > MOST_CHARACTERS:
            raise InputError(
                f"line {number} must have at most {MOST_CHARACTERS:,} characters, but has more; "
                "write each row in a line of its own"
            )
        yield line


def _parse_csv(file: TextIO) -> Data:
    start = list(itertools.islice((line for line in _lines(file) if line.strip()), 2))
    file.seek(0)
    delimiter = _delimiter(start)
    lines = _lines(file) if delimiter != " " else (line.strip() for line in _lines(file))
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    first = next((row for row in table if not _is_blank(row)), [])
    header, notes = _look_at_first(first, start, delimiter)
    names = [n.strip() if header else str(i + 1) for i, n in enumerate(first)]
    used, label_at, more_notes = _choose_columns(names)
    if not used:
        raise InputError("must have a numeric column, has none")

    values, labels, count = array.array("d"), [], 0
    for row in table if header else itertools.chain([first], table):
        if _is_blank(row) and (not row or len(names) > 1):
            continue
        if len(row) != len(names):
            raise InputError(
                f"line {table.line_num} has {counted(len(row), 'column')}, the first line has "
                f"{len(names)}"
            )
        try:
            numbers = _numbers([row[i] for i in used])
        except ValueError:
            raise InputError(_bad_cell(row, used, names, header, table.line_num)) from None
        if max(numbers) > EXACT or min(numbers) < -EXACT:
            for i, number in zip(used, numbers, strict=True):
                if _is_rounded(row[i], number):
                    column = repr(names[i]) if header else names[i]
                    where = f"line {table.line_num}, column {column},"
                    raise InputError(_inexact(where, row[i].strip()))
        values.extend(numbers)
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
    kept, row_numbers = _without_row_numbers(matrix, [names[i] for i in used], used)
    return make_data(
        matrix if len(kept) == len(used) else matrix[:, kept],
        np.array(labels) if labels else None,
        name="the table",
        columns=[names[used[k]] for k in kept] if header else None,
        notes=notes + more_notes + row_numbers,
    )


def _choose_columns(names: Sequence[str]) -> tuple[list[int], int | None, list[str]]:
    """Return the columns to use and that of the labels, by name, and what to tell of the others."""
    used, notes = list(range(len(names))), []
    for i in [i for i in used if len(names) > 1 and _is_nameless(names[i], i)]:
        used.remove(i)
        what = f"column {names[i]!r}" if names[i] else "the first column"
        notes.append(f"{what} has no name: taken for the rows' names and left out")
    plain = [_plain(name) for name in names]
    if point := _point(names):
        notes.append(f"columns {' and '.join(point)}: taken for a point, {point[1]} is no label")
        plain[names.index(point[1])] = ""
    label_at = _label_position(plain)
    if label_at is not None:
        used.remove(label_at)
        if plain[label_at] not in LABEL_NAMES[:3]:
            notes.append(f"column {names[label_at]!r}: taken for the true labels")
    # Truth must never reach the training unseen, whatever further name it goes by.
    for i in [i for i in used if plain[i] in LABEL_NAMES]:
        used.remove(i)
        notes.append(f"column {names[i]!r} is named like a label too: left out")
    return used, label_at, notes


def _without_row_numbers(
    matrix: np.ndarray, names: Sequence[str], places: Sequence[int]
) -> tuple[list[int], list[str]]:
    """Return the columns [N, V] that have more than the numbers of the rows, and what to tell."""
    kept, notes, point = [], [], _point(names)
    for k, (name, place) in enumerate(zip(names, places, strict=True)):
        if len(names) == 1 or name in point or not _numbers_rows(name, place, matrix[:, k]):
            kept.append(k)
            continue
        cure = "" if _is_id(name) else "; to train on it, put it behind another column"
        notes.append(f"column {name!r} numbers the rows: left out{cure}")
    if not kept:
        raise InputError("must have a column besides the numbers of its rows, has none")
    return kept, notes


def _point(names: Sequence[str]) -> Sequence[str]:
    """Return the names of two columns that are a point in the plane, if there are such."""
    return next((pair for pair in ("xy", "XY") if set(pair) <= set(names)), "")


def _delimiter(start: Sequence[str]) -> str:
    """Return what separates the cells, from the first lines."""
    bare = [re.sub(r'"[^"]*"', "", line).strip(" \r\n") for line in start]
    # A comma may be a decimal one, and a space may follow any other.
    for delimiter in "\t;|,":
        counts = {line.count(delimiter) for line in bare}
        if len(counts) == 1 and counts != {0}:
            return delimiter
    usual = max(",;\t", key=bare[0].count) if bare else ","
    words = [line.split() for line in bare]
    if usual not in "".join(bare) and words and any(map(_is_number, words[-1])):
        return " " if len({len(cells) for cells in words}) == 1 else usual
    return usual


def _numbers(cells: Iterable[str]) -> list[float]:
    """Values of numbers; ValueError for anything else, also for 1_2 and for other digits than 0-9.

    Python takes those, but no other reader of tables does.
    """
    text = "".join(cells)
    if "_" in text or not text.isascii():
        raise ValueError
    return [float(cell) for cell in cells]


def _is_number(text: str) -> bool:
    try:
        _numbers([text])
    except ValueError:
        return False
    return True


def _is_rounded(cell: str, number: float) -> bool:
    """Return whether a text is a whole number beyond what float64 holds exactly."""
    digits = re.fullmatch(r"\s*[+-]?\d+\s*", cell)
    return digits is not None and math.isfinite(number) and abs(number) > EXACT


def _inexact(where: str, value: object) -> str:
    return (
        f"{where} must hold whole numbers up to 2^53, beyond which float64 rounds them, but has "
        f"{value}; subtract the smallest from its column"
    )


def _look_at_first(
    cells: Sequence[str], start: Sequence[str], delimiter: str
) -> tuple[bool, list[str]]:
    """Return whether a first line is a header, and a note where that is a guess."""
    words = [cell.strip() for cell in cells if cell.strip() and not _is_number(cell)]
    if words and not any(map(_is_number, cells)):
        return True, []
    as_written = csv.reader(
        start, delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True
    )
    quoted = [
        [cell.startswith('"') for cell in row if cell not in ("", '""')] for row in as_written
    ]
    named = cells[1:] if cells and not cells[0].strip() else cells
    numbers = _numbers(named) if not words and all(cell.strip() for cell in named) else []
    counted = [named == [str(i + k) for i in range(len(named))] for k in (0, 1)]
    reason = None
    if words:
        reason = f"it holds {words[0]!r}, which is no number"
    elif len(quoted) == 2 and quoted[0] and all(quoted[0]) and not all(quoted[1]):
        reason = "its numbers are quoted, those of the next are not"
    # 1, 2 may well be a row, if others are whole numbers too.
    elif len(named) > 1 and (counted[0] or (counted[1] and (len(named) > 2 or "." in start[-1]))):
        reason = f"its numbers count the columns from {named[0]}"
    elif numbers and len(named) < len(cells):
        reason = "its first cell is empty"
    if reason is not None:
        return True, [f"the first line is taken for a header: {reason}"]
    if len(numbers) > 2 and all(a < b for a, b in itertools.pairwise(numbers)):
        risen = "the numbers of the first line rise, but it is taken for a row"
        return False, [f"{risen}; if it is a header, quote them"]
    return False, []


def _is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _plain(name: str) -> str:
    """Return a name without all but letters and digits, in lower case."""
    return "".join(c for c in name.lower() if c.isalnum())


def _is_nameless(name: str, position: int) -> bool:
    """Whether a column holds the rows' names: pandas writes them without a name, and reads that.

    ``Unnamed: 0`` is a first column that had no name; ``Unnamed: 0.1`` the same once more.
    """
    return (not name and position == 0) or re.fullmatch(r"Unnamed: 0(\.\d+)*", name) is not None


def _numbers_rows(name: str, position: int, column: np.ndarray) -> bool:
    """Whether a column has but the numbers of the rows.

    The first column does if it counts them, any id or index if its whole numbers are distinct.
    """
    if len(column) < 3 or (column != np.floor(column)).any():
        return False
    if position == 0 and column[0] in (0, 1) and (np.diff(column) == 1).all():
        return True
    return _is_id(name) and len(np.unique(column)) == len(column)


def _is_id(name: str) -> bool:
    """Return whether a name is an id's or an index': ``patient_id``, ``patientId``, ``index``."""
    words = re.findall(r"[^\W_\d]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    # A body-mass index is none.
    return words[-1:] == ["id"] or words in (["index"], ["idx"], ["row", "index"])


def _label_position(plain: Sequence[str]) -> int | None:
    """Return where the labels are among names that :func:`_plain` gave."""
    return next((plain.index(name) for name in LABEL_NAMES if name in plain), None)


def _bad_cell(row: list[str], used: list[int], names: list[str], header: bool, line: int) -> str:
    at = next(i for i in used if not _is_number(row[i]))
    column = f"column {names[at]!r}" if header else f"column {names[at]}"
    value = f"is {row[at]!r}" if row[at].strip() else "is empty"
    cure = "leave the column out"
    if re.fullmatch(r"[+-]?[\d,]+,\d+", row[at].strip()):
        cure = "write numbers as 1234.5, without commas"
    elif header:
        cure += ", or call it 'label' if it holds true labels"
    return f"line {line}, {column} must be a number, {value}; {cure}"
