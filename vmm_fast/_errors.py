"""The error that users see."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used; the message is one line that says what it was and the cure."""
