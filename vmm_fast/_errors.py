"""The error for input that cannot be used."""

from __future__ import annotations


class InputError(ValueError):
    """Raised for input that cannot be used; the message is one line: what it is, and the cure."""
