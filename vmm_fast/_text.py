"""Text for messages and reports."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 cell", "2,000 cells", "3 batches"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
