"""Reading tables of numbers from .csv text: separators, headers, row numbers and names, labels.

A note says what is guessed or left out; what cannot be guessed is an error.
"""

from __future__ import annotations

import array
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np

from vmm_fast._errors import InputError
from vmm_fast._text import counted, not_utf8

# Names of label columns, as :func:`plain` returns them; the first that a table has is taken.
LABEL_NAMES = (
    *("label", "labels", "y", "target", "targets", "class", "classes", "truth", "groundtruth"),
    *("truelabel", "truelabels", "classlabel", "ytrue", "species", "category", "celltype"),
    *("cluster", "clusters", "group"),
)
EXACT = 2**53  # float64 holds every whole number up to this
MOST_CHARACTERS = 2**24  # in a line: enough for a million columns
# What pandas and R write in place of a missing label.
MISSING = ("", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")
_NO_COMMAS = "; write numbers as 1234.5, without commas"


class Table(NamedTuple):
    """A table as read: numbers [N, V], labels [N] or None, names of columns if any, and notes."""

    values: np.ndarray
    labels: np.ndarray | None
    columns: list[str] | None
    notes: list[str]


def read_table(file: BinaryIO) -> Table:
    """Read a table, as :func:`vmm_fast.arrays.data.read` says.

    Raises InputError if the file is not text or not a table, or a cell is not a number.
    """
    start = file.read(8)
    file.seek(0)
    try:
        # A byte-order mark, as spreadsheets write it, would otherwise be part of the first name.
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            return _parse(text)
    except UnicodeDecodeError:
        raise InputError(not_utf8(start)) from None
    except (csv.Error, OSError) as error:
        raise InputError(f"cannot be read as a table: {error}") from None


def plain(name: str) -> str:
    """Return a name in lower case, with letters and digits only."""
    return "".join(c for c in name.lower() if c.isalnum())


def label_position(plain: Sequence[str]) -> int | None:
    """Return the position of the labels among names from :func:`plain`, or None."""
    return next((plain.index(name) for name in LABEL_NAMES if name in plain), None)


def inexact(where: str, value: object) -> str:
    """Return the error message for a whole number that float64 cannot hold."""
    return (
        f"{where} must hold whole numbers up to 2^53, beyond which float64 rounds them, but has "
        f"{value}; subtract the smallest from its column"
    )


def _rows(table: Any) -> Iterator[list[str]]:
    """Yield the rows of a csv.reader; a cell that is too long becomes an InputError."""
    try:
        yield from table
    except csv.Error as error:
        if "field larger" not in str(error):
            raise
        raise InputError(
            f"line {table.line_num} must end a cell of at most {csv.field_size_limit():,} "
            "characters, but it goes on; look for a quote that is not closed"
        ) from None


def _short(text: str) -> str:
    """Return a text in quotes, cut if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file; refuse a line that is too long to read into memory."""
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


def _parse(file: TextIO) -> Table:
    start = list(itertools.islice((line for line in _lines(file) if line.strip()), 3))
    file.seek(0)
    said = re.fullmatch(r'"?sep=(.)"?[\r\n]*', start[0]) if start else None
    start = start[1:] if said else start[:2]
    delimiter = said[1] if said else _delimiter(start)
    lines = _lines(file) if delimiter != " " else (line.strip() for line in _lines(file))
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    rows = (row for row in _rows(table) if not _is_blank(row))
    if said:
        next(rows)
    first = next(rows, [])
    header, notes = _look_at_first(first, start, delimiter)
    if said:
        notes = [f"the first line says what separates the cells, {delimiter!r}", *notes]
    names = [n.strip() if header else str(i + 1) for i, n in enumerate(first)]
    used, label_at, more_notes = _choose_columns(names)
    if not used:
        raise InputError("must have a numeric column, but has none")

    values, labels, count = array.array("d"), [], 0
    fractions = set[int]()  # lengths of the second of two cells of digits: decimals, perhaps
    for row in _rows(table) if header else itertools.chain([first], _rows(table)):
        if _is_blank(row) and (not row or len(names) > 1):
            continue
        if len(row) != len(names):
            comma = len(names) == 1 and delimiter == "," and all(map(_is_number, row))
            raise InputError(
                f"line {table.line_num} has {counted(len(row), 'column')}, the first line has "
                f"{len(names)}{_NO_COMMAS if comma else ''}"
            )
        try:
            numbers = _numbers([row[i] for i in used])
        except ValueError:
            raise InputError(_bad_cell(row, used, names, header, table.line_num)) from None
        if max(numbers) >= EXACT or min(numbers) <= -EXACT:
            for i in used:
                if _is_rounded(row[i]):
                    column = repr(names[i]) if header else names[i]
                    where = f"line {table.line_num}, column {column},"
                    raise InputError(inexact(where, row[i].strip()))
        values.extend(numbers)
        if label_at is not None:
            if (label := row[label_at].strip()) in MISSING:
                raise InputError(
                    f"line {table.line_num} must have a label, but {names[label_at]!r} is "
                    f"{label or 'empty'}; fill it in, or leave the column out"
                )
            labels.append(label)
        if len(row) == 2 and not header:
            fractions.add(len(row[1]) if (row[0] + row[1]).strip("+-").isdigit() else 0)
        count += 1
    if count == 0:
        held = "a header alone" if header else "none"
        raise InputError(f"must have rows of numbers, but has {held}")
    if delimiter == "," and len(fractions) == 1 and min(fractions) > 1:
        notes.append(
            f"every line is two whole numbers, the second of {min(fractions)} digits: they are two "
            f"columns; if the comma is a decimal one{_NO_COMMAS.replace(';', ',')}"
        )
    matrix = np.frombuffer(values, dtype=np.float64).reshape(count, len(used))
    kept, row_numbers = _without_row_numbers(matrix, [names[i] for i in used], used)
    return Table(
        matrix if len(kept) == len(used) else matrix[:, kept],
        np.array(labels) if labels else None,
        [names[used[k]] for k in kept] if header else None,
        notes + more_notes + row_numbers,
    )


def _choose_columns(names: Sequence[str]) -> tuple[list[int], int | None, list[str]]:
    """Return the columns of numbers, the column of labels, and notes on the other columns."""
    used, notes = list(range(len(names))), []
    for i in [i for i in used if len(names) > 1 and _is_nameless(names[i], i)]:
        used.remove(i)
        what = f"column {names[i]!r}" if names[i] else "the first column"
        notes.append(f"{what} has no name: taken for the rows' names and left out")
    spelt = [plain(name) for name in names]
    if point := _point(names):
        notes.append(f"columns {' and '.join(point)}: taken for a point, {point[1]} is no label")
        spelt[names.index(point[1])] = ""
    label_at = label_position(spelt)
    if label_at is not None:
        used.remove(label_at)
        if spelt[label_at] not in LABEL_NAMES[:3]:
            notes.append(f"column {names[label_at]!r}: taken for the true labels")
    # True labels must never get into the training unnoticed, under whatever name.
    for i in [i for i in used if spelt[i] in LABEL_NAMES]:
        used.remove(i)
        notes.append(f"column {names[i]!r} is named like a label too: left out")
    return used, label_at, notes


def _without_row_numbers(
    matrix: np.ndarray, names: Sequence[str], places: Sequence[int]
) -> tuple[list[int], list[str]]:
    """Return the columns of a matrix [N, V] that do not just number the rows, and notes."""
    kept, notes, point = [], [], _point(names)
    for k, (name, place) in enumerate(zip(names, places, strict=True)):
        if len(names) == 1 or name in point or not _numbers_rows(name, place, matrix[:, k]):
            kept.append(k)
            continue
        cure = "" if _is_id(name) else "; to train on it, put it behind another column"
        notes.append(f"column {name!r} numbers the rows: left out{cure}")
    if not kept:
        raise InputError("must have a column besides the numbers of its rows, but has none")
    return kept, notes


def _point(names: Sequence[str]) -> Sequence[str]:
    """Return the names of two columns that are a point in the plane; empty if there are none."""
    return next((pair for pair in ("xy", "XY") if set(pair) <= set(names)), "")


def _delimiter(start: Sequence[str]) -> str:
    """Return the character that separates the cells, given the first lines."""
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
    """Return cells as numbers; raise ValueError if one is not, or has ``_`` or digits beyond 0-9.

    Python accepts 1_2 and other digits, but no other reader of tables does.
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


def _is_rounded(cell: str) -> bool:
    """Return whether a text is a whole number beyond what float64 holds exactly."""
    number = re.fullmatch(r"\s*([+-]?\d{1,400})(\.0*)?\s*", cell)
    return number is not None and abs(int(number[1])) > EXACT


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
    decimals = len(start) > 1 and "." in start[1]
    counts = [named != [] and named == [str(i + k) for i in range(len(named))] for k in (0, 1)]
    reason = None
    if words:
        reason = f"it holds {_short(words[0])}, which is no number"
    elif len(quoted) == 2 and quoted[0] and all(quoted[0]) and not all(quoted[1]):
        reason = "its numbers are quoted, those of the next are not"
    # 1, 2 may well be a row if the next line has whole numbers, too.
    elif any(counts) and (decimals or len(named) > 1 + counts[1]):
        reason = f"its numbers count the columns from {named[0]}"
    elif numbers and len(named) < len(cells):
        reason = "its first cell is empty"
    if reason is not None:
        return True, [f"the first line is taken for a header: {reason}"]
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    guess = None
    if any(counts):
        guess = "the first line may count the columns"
    # Of two numbers the second is the larger one in half of all tables.
    elif steps == [1] or (len(steps) > 1 and min(steps) > 0):
        guess = "the numbers of the first line rise"
    elif len(steps) > 1 and max(steps) < 0:  # as wave numbers of infrared spectra do
        guess = "the numbers of the first line fall"
    if guess is None:
        return False, []
    return False, [f"{guess}, but it is taken for a row; if it is a header, quote its numbers"]


def _is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _is_nameless(name: str, position: int) -> bool:
    """Return whether a column holds the names of the rows, which pandas writes without a header.

    pandas calls such a column ``Unnamed: 0`` when it reads it, and ``Unnamed: 0.1`` the next time.
    """
    return (not name and position == 0) or re.fullmatch(r"Unnamed: 0(\.\d+)*", name) is not None


def _numbers_rows(name: str, position: int, column: np.ndarray) -> bool:
    """Return whether a column only numbers the rows.

    The first column does if it counts the rows. Any column called an id or index does if it holds
    distinct whole numbers.
    """
    if len(column) < 3 or (column != np.floor(column)).any():
        return False
    if position == 0 and column[0] in (0, 1) and (np.diff(column) == 1).all():
        return True
    return _is_id(name) and len(np.unique(column)) == len(column)


def _is_id(name: str) -> bool:
    """Return whether a name is that of an id or index: ``patient_id``, ``patientId``, ``index``."""
    words = re.findall(r"[^\W_\d]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    # A body-mass index is not an index of rows.
    return words[-1:] == ["id"] or words in (["index"], ["idx"], ["row", "index"])


def _bad_cell(row: list[str], used: list[int], names: list[str], header: bool, line: int) -> str:
    at = next(i for i in used if not _is_number(row[i]))
    column = f"column {names[at]!r}" if header else f"column {names[at]}"
    value = f"but is {_short(row[at])}" if row[at].strip() else "but is empty"
    cure = "leave the column out"
    if re.fullmatch(r"[+-]?[\d,]+,\d+", row[at].strip()):
        return f"line {line}, {column} must be a number, {value}{_NO_COMMAS}"
    if header:
        cure += ", or call it 'label' if it holds true labels"
    return f"line {line}, {column} must be a number, {value}; {cure}"
