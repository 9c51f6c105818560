"""Text for messages and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 cell", "2,000 cells", "3 batches"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def joined(names: Sequence[Any], most: int = 20) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(str(name)[:100] for name in names[:most]) + more
