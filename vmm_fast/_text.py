"""Text for people."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number of things: "1 cell", "2,000 cells", "3 batches"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
