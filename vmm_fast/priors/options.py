"""Options of priors that learn, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vmm_fast._checks import check_choice, check_integer, check_positive, number_of

__all__ = ["LearntOptions", "MixtureOptions", "VampOptions"]

_Options = TypeVar("_Options", bound="LearntOptions")


class LearntOptions:
    """Options of every prior that learns; each prior's own are a dataclass."""

    learning_rate: float
    update_every: int
    joint: bool

    def __post_init__(self) -> None:
        """Raise ValueError for a bad value of those that all have, of flags and of choices."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                check_choice(name, value, get_args(kind))
                self._keep(name, str(value))
            elif kind is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, but is {value!r}")
        self._keep("learning_rate", check_positive("learning_rate", self.learning_rate))
        self._keep("update_every", check_integer("update_every", self.update_every))

    def _keep(self, name: str, value: Any) -> None:
        """Set an option to a plain value, which checkpoints can hold: no number of numpy's."""
        object.__setattr__(self, name, value)

    @classmethod
    def of_arguments(cls: type[_Options], given: dict[str, Any]) -> _Options:
        """Return the options among a constructor's arguments, its ``locals()``."""
        return cls(**{name: given[name] for name in get_type_hints(cls)})

    @classmethod
    def of_state(cls: type[_Options], state: Any) -> _Options:
        """Return the options that a state of a prior holds, or raise ValueError."""
        names = get_type_hints(cls)
        if not isinstance(state, dict) or set(state) | {"update_every"} != set(names):
            raise ValueError(f"options must be a dict of {', '.join(names)}, but are {state!r}")
        return cls(**{"update_every": 1, **state})  # as in versions without this option


@dataclass(frozen=True)
class MixtureOptions(LearntOptions):
    """Options with the meaning of :class:`vmm_fast.VMMPrior`; only here are their defaults.

    Raises
    ------
    ValueError
        Naming the option, what it must be and what it is.
    """

    weights: Literal["dirichlet", "stick-breaking"] = "dirichlet"
    inference: Literal["gradient", "closed-form"] = "gradient"
    responsibility_gradient: bool = True
    data_size: int | None = None
    learning_rate: float = 1e-3
    update_every: int = 8
    joint: bool = False
    map_prior: Literal["none", "fixed", "learnt"] = "learnt"
    concentration: float = 1.0
    discount: float = 0.0
    statistics_rate: float = 0.003

    def __post_init__(self) -> None:
        """Check all values and those that exclude each other."""
        super().__post_init__()
        if self.data_size is not None:
            self._keep("data_size", check_integer("data_size", self.data_size))
        self._keep("concentration", check_positive("concentration", self.concentration))
        if not 0 < number_of(self.statistics_rate) <= 1:
            raise ValueError(f"statistics_rate must be in (0, 1], but is {self.statistics_rate!r}")
        if not 0 <= number_of(self.discount) < 1 or (self.discount and self.weights == "dirichlet"):
            raise ValueError(
                "discount must be in [0, 1), and 0 unless weights='stick-breaking', "
                f"but is {self.discount!r}"
            )
        if self.joint and self.inference == "closed-form":
            raise ValueError("joint must be False with inference='closed-form', but is True")
        self._keep("statistics_rate", float(self.statistics_rate))
        self._keep("discount", float(self.discount))


@dataclass(frozen=True)
class VampOptions(LearntOptions):
    """Options with the meaning and the defaults of :class:`vmm_fast.VampPrior`."""

    learning_rate: float = MixtureOptions.learning_rate
    update_every: int = MixtureOptions.update_every
    joint: bool = MixtureOptions.joint
