"""Checks of arguments, and of packages' versions, that many modules share."""

from __future__ import annotations

import math
import operator
import re
from importlib.metadata import version
from typing import Any

__all__ = ["check_choice", "check_integer", "check_positive", "check_version", "number_of"]


def check_version(package: str, least: str) -> None:
    """Raise ImportError unless an installed package has at least this version, such as "2.6"."""
    found = version(package)
    numbers, needed = ([*map(int, re.findall(r"\d+", x)), 0, 0][:3] for x in (found, least))
    if numbers < needed:
        raise ImportError(f"vmm_fast needs {package} >= {least}, but {found} is installed")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}")


def number_of(value: Any) -> float:
    """Return a value as a float, NaN if it is no number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def check_positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is a finite number above zero."""
    number = number_of(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, but is {value!r}")
    return number


def check_integer(name: str, value: int) -> int:
    """Return ``value`` as an int, or raise ValueError unless it is an integer of at least 1."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")
    return number
