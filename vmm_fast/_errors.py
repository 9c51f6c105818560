"""Errors that the command tells in one line."""

from __future__ import annotations


class InputError(ValueError):
    """Raised for input that cannot be used; the message is one line: what it is, and the cure."""


class LostProcessError(RuntimeError):
    """Raised in one of several processes if another has ended, or hangs."""
