"""Text for messages and reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 cell", "2,000 cells", "3 batches"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def joined(names: Sequence[Any], most: int = 20) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(str(name)[:100] for name in names[:most]) + more


def print_progress(done: int, epochs: int, seconds: float, text: str) -> None:
    """Print a line on stderr if an epoch completes another tenth of all: progress for a log."""
    if 10 * done // epochs > 10 * (done - 1) // epochs:
        left = round(seconds / done * (epochs - done))
        line = f"epoch {done}/{epochs}, {text}, {left // 60}:{left % 60:02d} min left"
        print(line, file=sys.stderr, flush=True)


def print_step(text: str) -> None:
    """Print on stderr, if there is one, what is done next."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


# What files begin with that are no text in UTF-8, what they are, and what to do.
_NOT_UTF8 = (
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"PK", "a zip archive, as .xlsx is: unpack it, or save the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "a file of Excel: save the table as CSV"),
    (b"\xff\xfe", "in UTF-16: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "in UTF-16: iconv -f UTF-16 -t UTF-8"),
    (b"", "in another encoding: iconv -f LATIN1 -t UTF-8, if Latin-1 it is"),
)


def not_utf8(start: bytes) -> str:
    """Return the message for a file that is no text in UTF-8, given how it begins."""
    return "must be text in UTF-8, but is " + next(
        what for mark, what in _NOT_UTF8 if start.startswith(mark)
    )
