"""Rules for the content of the files that are read back, such as checkpoints.

A digest detects damage, not wrong content: a file of another version, or one that somebody changed
together with its digest, may hold a text where a number is expected. The code that reads a file
states its rule and checks it,

    RUN = table({"input": text, "settings": table({"epochs": whole(1)})})
    check("run.json of out", content, RUN)

and code after the check may trust the values. A rule is called with the name and the value of an
entry, and raises ValueError if the value breaks it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import get_annotations
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Rule = Callable[[str, Any], None]
MOST = 2**63 - 1  # largest integer of torch and numpy
LONGEST = 60  # characters of a value that a message shows


def check(what: str, value: Any, rule: Rule) -> None:
    """Raise ValueError that says what is damaged and why, if a value breaks a rule."""
    try:
        rule("", value)
    except ValueError as error:
        raise ValueError(f"{what} is damaged: {error}") from None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    found = repr(value)
    return found if len(found) <= LONGEST else found[:LONGEST] + ".."


def _refuse(name: str, what: str, value: Any) -> None:
    raise ValueError(f"{name or 'its content'} must be {what}, but is {_shown(value)}")


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def anything(name: str, value: Any) -> None:
    """Accept every value."""


def text(name: str, value: Any) -> None:
    """Accept only a text."""
    if not isinstance(value, str):
        _refuse(name, "a text", value)


def flag(name: str, value: Any) -> None:
    """Accept only True and False."""
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)


def none(name: str, value: Any) -> None:
    """Accept only None."""
    if value is not None:
        _refuse(name, "absent", value)


def plain(name: str, value: Any) -> None:
    """Accept only a text, a number, True, False or None."""
    if not isinstance(value, str | int | float | None):
        _refuse(name, "a text or a number", value)


def one_of(*choices: str) -> Rule:
    """Return a rule that accepts only these texts."""

    def rule(name: str, value: Any) -> None:
        if value not in choices:
            _refuse(name, f"one of {', '.join(choices)}", value)

    return rule


def whole(least: int = 0, most: int = MOST) -> Rule:
    """Return a rule that accepts whole numbers from ``least`` to ``most``, both included."""
    bounds = f"of at least {least}" if most == MOST else f"from {least} to {most}"

    def rule(name: str, value: Any) -> None:
        if not _is_number(value, (int,)) or not least <= value <= most:
            _refuse(name, f"a whole number {bounds}", value)

    return rule


def number(bounds: str = "", fits: Callable[[float], bool] = lambda x: True) -> Rule:
    """Return a rule for finite numbers within bounds: ``number("above 0", lambda x: x > 0)``."""

    def rule(name: str, value: Any) -> None:
        finite = _is_number(value, (int, float)) and abs(value) <= sys.float_info.max
        if not finite or not fits(value):
            _refuse(name, f"a finite number {bounds}".rstrip(), value)

    return rule


RATE = number("above 0", lambda x: x > 0)
AT_LEAST_0 = number("of at least 0", lambda x: x >= 0)
SHARE = number("between 0 and 1", lambda x: 0 < x < 1)


def optional(inner: Rule) -> Rule:
    """Return a rule that accepts None and whatever ``inner`` accepts."""

    def rule(name: str, value: Any) -> None:
        if value is not None:
            inner(name, value)

    return rule


def list_of(inner: Rule, length: int | None = None, least: int = 0) -> Rule:
    """Return a rule that accepts a list or tuple whose values all keep ``inner``.

    It must have ``length`` values if that is given, else at least ``least``.
    """

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            _refuse(name, "a list", value)
        if (length is not None and len(value) != length) or len(value) < least:
            wanted = f"at least {least}" if length is None else str(length)
            raise ValueError(f"{name} must have {wanted} values, but has {len(value)}")
        for index, one in enumerate(value):
            inner(f"{name}[{index}]", one)

    return rule


def table(entries: dict[str, Rule], others: Rule | None = anything) -> Rule:
    """Return a rule that accepts a dict with these entries.

    Other entries must keep the rule ``others``; None allows no others.
    """

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(name, "a table", value)
        for key in entries.keys() - value.keys():
            raise ValueError(f"{name or 'it'} must have {key!r}, but has not")
        for key, one in value.items():
            inner = entries.get(key, others)
            if inner is None:
                raise ValueError(f"{name or 'it'} must not have {key!r}, but has")
            inner(f"{name}.{key}" if name else str(key), one)

    return rule


def tensor(
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    *,
    finite: bool = True,
    pruned: bool = False,
) -> Rule:
    """Return a rule that accepts a finite tensor, of this dtype and shape if they are given.

    With ``pruned`` some values, but not all, may be -inf. With ``finite=False`` values are not
    checked.
    """
    what = "a tensor"
    what += "" if dtype is None else f" of {dtype}"
    what += "" if shape is None else f" {list(shape)}"

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            _refuse(name, what, value)
        if value.dtype != (dtype or value.dtype) or (
            shape is not None and value.shape != torch.Size(shape)
        ):
            _refuse(name, what, value)
        sound = value.isfinite()
        if pruned and sound.any():
            sound |= value == -torch.inf
        if finite and not sound.all():
            raise ValueError(f"{name} must be finite{' or -inf' if pruned else ''}, but is not")

    return rule


def weights_of(state: dict[str, Any]) -> Rule:
    """Return a rule that accepts the ``state_dict`` of a module of the same shapes as `state`.

    The logits of pruned components may be -inf. A tensor that is not finite in `state` may hold
    anything. Entries that are not tensors are checked by the module itself.
    """

    def of(name: str, value: Any) -> Rule:
        if not isinstance(value, Tensor):
            return anything
        finite = value.is_meta or bool(value.isfinite().all())
        return tensor(value.dtype, value.shape, finite=finite, pruned=name.endswith("prior.logits"))

    return table({name: of(name, value) for name, value in state.items()}, None)


def generator_state(name: str, value: Any) -> None:
    """Accept only the state of a CPU random number generator."""
    try:
        torch.Generator().set_state(value)
    except (TypeError, RuntimeError):
        _refuse(name, "the state of a generator of random numbers", value)


def like(example: Any) -> Rule:
    """Return a rule that accepts values with the keys, lengths and types of an example.

    Numbers must be finite, and whole ones not negative.
    """
    if isinstance(example, dict):
        return table({key: like(value) for key, value in example.items()}, None)
    if isinstance(example, list | tuple):
        inner = [like(value) for value in example]

        def rule(name: str, value: Any) -> None:
            list_of(anything, len(inner))(name, value)
            for index, (one, each) in enumerate(zip(inner, value, strict=True)):
                one(f"{name}[{index}]", each)

        return rule
    if isinstance(example, Tensor):
        return tensor(example.dtype, example.shape)
    for kind, found in ((bool, flag), (int, whole()), (float, number()), (str, text)):
        if isinstance(example, kind):
            return found
    return anything


def rules_of(settings: type) -> dict[str, Rule]:
    """Return the rule of each field of a dataclass, from its ``Annotated`` type."""
    hints = get_type_hints(settings, include_extras=True)
    return {name: getattr(hint, "__metadata__", [anything])[0] for name, hint in hints.items()}


class Option(NamedTuple):
    """A setting on the command line: one value of a kind, or several."""

    rule: Rule
    kind: type
    several: bool
    symbol: str
    help: str


def options_of(settings: type) -> dict[str, Option]:
    """Return the fields of a dataclass that are options, those of its base classes last.

    Their types are ``Annotated[kind, rule, symbol, help]``, where the kind may be None or a list.
    """
    hints = get_type_hints(settings, include_extras=True)
    own = [get_annotations(base) for base in settings.__mro__]
    found = {}
    for name in dict.fromkeys(name for names in own for name in names):
        rule, *described = hints[name].__metadata__
        kind = hints[name].__origin__
        if isinstance(kind, UnionType):
            kind = next(one for one in get_args(kind) if one is not NoneType)
        several = get_origin(kind) is list
        if described:
            found[name] = Option(rule, get_args(kind)[0] if several else kind, several, *described)
    return found
