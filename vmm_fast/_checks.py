"""Checks of arguments, and of packages' versions, that many modules share."""

from __future__ import annotations

import math
import operator
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import numpy as np

__all__ = [
    "MOST",
    "check_choice",
    "check_integer",
    "check_positive",
    "check_version",
    "not_counts",
    "number_of",
]

MOST = 2**31 - 1  # largest count, since counts are stored as int32
SINGLE = 2**24  # float32 holds every whole number up to this


def check_version(package: str, found: str | None = None) -> None:
    """Raise ImportError unless a package has a version that the metadata of vmm_fast asks for.

    The version is that of the installed package, unless one is given. The bounds of
    ``pyproject.toml`` are thereby those of every install, also of one whose packages were changed
    later.
    """
    try:
        stated = requires("vmm-fast") or ()
    except PackageNotFoundError:
        message = "vmm_fast must be installed, but only its source is there: pip install ."
        raise ImportError(message) from None
    requirement = next(x for x in stated if re.match(rf"{package}\b[^-]", x))
    bounds = sorted(re.findall(r"(>=|<)([\d.]+)", requirement.split(";")[0]), reverse=True)
    needed = f"vmm_fast needs {package} {', '.join(f'{sign} {x}' for sign, x in bounds)}"
    try:
        found = found or version(package)
    except PackageNotFoundError:
        python = " (for Python 3.11 or newer)" if sys.version_info < (3, 11) else ""
        raise ImportError(f"{needed}{python}, but none is installed") from None
    numbers = _release(str(found))  # which is None where its metadata are damaged
    if not all((numbers < _release(x)) == (sign == "<") for sign, x in bounds):
        raise ImportError(f"{needed}, but {found} is installed")


def _release(text: str) -> list[int]:
    """Return the first three numbers of a version, such as [2, 6, 0] of "2.6.0+cpu"."""
    return [*map(int, re.findall(r"\d+", text)), 0, 0][:3]


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


def not_counts(values: np.ndarray, dtype: Any = None) -> tuple[int, str] | None:
    """Return the position and description of the first value that is not a count, or None.

    With a dtype, such as the float32 of models, that dtype must hold every value exactly.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize < 4:
        return None
    if values.dtype == np.float16:  # in which the bounds below would be infinite
        values = values.astype(np.float32)
    with np.errstate(invalid="ignore"):
        right = (values >= 0) & (values <= MOST)  # False for NaN
        if values.dtype.kind == "f":
            right &= values == np.floor(values)
    if right.all() and dtype is not None and values.max(initial=0) > SINGLE:
        right = values.astype(dtype) == values
    if right.all():
        return None
    at = int(right.argmin())
    value = float(values[at])
    if SINGLE < value <= MOST and value.is_integer():
        rounded = int(np.asarray(value, dtype))
        return at, f"has {int(value):,} (of which {np.dtype(dtype)} would make {rounded:,})"
    text = f"{value:.6g}"
    if float(text).is_integer() and not value.is_integer():  # 1.9999999 must not appear as 2
        text = str(values[at])
    beyond = f" (beyond {MOST:,})" if MOST < value < np.inf else ""
    return at, f"has {text}{beyond}"
