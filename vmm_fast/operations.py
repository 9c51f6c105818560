"""The table of operations: the only place that lists their arguments, results and shapes.

The schemas and fakes of torch's ops, the checks of arguments, dispatch and autograd follow from it
(:mod:`vmm_fast.dispatch`, :mod:`vmm_fast.backends`), as does the order in which the compiled core
takes arguments: addresses of the tensors, the sizes in the order in which their letters first
occur, flags, the number of threads, addresses of the results. :mod:`vmm_fast.reference` defines
what an operation of the same name computes.

Shapes are written in letters: B points or cells, J centers, C components of K = J / C centers each,
D dimensions, G genes. ``"J D | J D D"`` allows two shapes, and a flag tells the core whether it is
the second; ``"B ?"`` may be None, ``"..."`` has any shape, and ``"B :int64"`` has that dtype in
place of the one that all others share.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COUNT_LOG_PROB",
    "LARGEST_COMPONENT_DIM",
    "MIXTURE_ASSIGN",
    "MIXTURE_KL",
    "MIXTURE_LOG_JOINT",
    "MIXTURE_LOG_PROB",
    "MIXTURE_RESPONSIBILITIES",
    "MIXTURE_STATISTICS",
    "OPERATIONS",
    "STORED_COMPONENTS",
    "WHITENED_COMPONENTS",
    "Argument",
    "Operation",
]


@dataclass(frozen=True)
class Argument:
    """Shapes and dtype of a tensor that an operation takes or returns.

    Attributes
    ----------
    shapes : tuple of tuple of str or int
        The letters, or numbers, of each allowed shape; empty if any shape is allowed.
    optional : bool
        Whether the tensor may be None.
    dtype : torch.dtype or None
        None for the dtype that all others share.
    """

    shapes: tuple[tuple[Any, ...], ...]
    optional: bool
    dtype: torch.dtype | None

    @classmethod
    def parse(cls, text: str) -> Argument:
        """Return the argument that a text of the table describes, such as ``"J D | J D D ?"``."""
        text, _, dtype = text.partition(":")
        optional = "?" in text
        text = text.replace("?", "").strip()
        forms = [] if text == "..." else [form.split() for form in text.split("|")]
        shapes = tuple(tuple(int(x) if x.isdigit() else x for x in form) for form in forms)
        return cls(shapes, optional, getattr(torch, dtype) if dtype else None)


@dataclass(frozen=True, eq=False)
class Operation:
    """A function of tensors and a few numbers that every backend computes.

    Attributes
    ----------
    name : str
    tensors : dict of str to str
        Names and shapes of the arguments.
    constants : dict of str to str
        Names of flags ("bool") and of numbers (the letter that they stand for), after the tensors.
    results : dict of str to str
        Names and shapes.
    extras : dict of str to str
        Further results, which the backward reads.
    differentiable : tuple of str
        Arguments that have a gradient in compiled code.
    kept : tuple of str
        Results that the backward reads, besides arguments and extras.
    constant_results : tuple of str
        Results that have no gradient.
    reference_gradient : bool
        Whether plain torch computes the operation if a gradient is needed.
    missing_gradients : bool
        Whether the backward takes None as the gradient of a result that was not used.
    all_gradients : bool
        Whether the backward always computes all gradients, wanted or not.
    largest_dim : int or None
        The largest D in kernels for GPUs; beyond it plain torch computes the operation there.
    forward : Operation or None
        For a backward, the operation whose gradients it computes.
    """

    name: str
    tensors: dict[str, str]
    constants: dict[str, str]
    results: dict[str, str]
    extras: dict[str, str] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    constant_results: tuple[str, ...] = ()
    reference_gradient: bool = False
    missing_gradients: bool = False
    all_gradients: bool = False
    largest_dim: int | None = None
    forward: Operation | None = None

    @functools.cached_property
    def arguments(self) -> dict[str, Argument]:
        """Return the allowed shapes and dtype of each tensor, by name."""
        return {name: Argument.parse(text) for name, text in self.tensors.items()}

    @functools.cached_property
    def checked(self) -> tuple[tuple[int, str, Argument], ...]:
        """Return position, name and description of the arguments that share one dtype."""
        arguments = enumerate(self.arguments.items())
        return tuple((i, name, x) for i, (name, x) in arguments if x.dtype is None)

    @functools.cached_property
    def outputs(self) -> dict[str, Argument]:
        """Return the shape and dtype of each result and each extra, by name."""
        return {name: Argument.parse(x) for name, x in (self.results | self.extras).items()}

    @functools.cached_property
    def backward(self) -> Operation:
        """Return the operation that computes the gradients of ``differentiable``, in their order.

        It takes the gradients of the results, the tensors, the kept results, the extras, the
        constants, and one flag for each gradient that says whether it is wanted.
        """
        upstream = {f"grad_{n}": x for n, x in self.results.items() if n in self.with_gradient}
        if self.missing_gradients:
            upstream = {name: f"{text} ?" for name, text in upstream.items()}
        kept = {name: self.results[name] for name in self.kept} | self.extras
        return Operation(
            f"{self.name}_backward",
            upstream | self.tensors | kept,
            self.constants,
            {f"grad_{name}": self.tensors[name] for name in self.differentiable},
            all_gradients=self.all_gradients,
            largest_dim=self.largest_dim,
            forward=self,
        )

    @functools.cached_property
    def with_gradient(self) -> tuple[str, ...]:
        """Return the names of the results that have a gradient."""
        return tuple(name for name in self.results if name not in self.constant_results)

    @functools.cached_property
    def lead(self) -> int:
        """Return the position of the tensor whose dtype and device all others share."""
        return len(self.forward.with_gradient) if self.forward else 0

    @functools.cached_property
    def differentiable_positions(self) -> tuple[int, ...]:
        """Return the positions of the differentiable arguments among the tensors."""
        names = list(self.tensors)
        return tuple(names.index(name) for name in self.differentiable)

    @functools.cached_property
    def _differentiated(self) -> tuple[int, ...]:
        """Return the positions, in a backward, of the arguments that it computes gradients of."""
        positions = self.forward.differentiable_positions if self.forward else ()
        return tuple(self.lead + i for i in positions)

    @functools.cached_property
    def gradient_positions(self) -> tuple[int, ...]:
        """Return the positions of the results that have a gradient."""
        names = list(self.results)
        return tuple(names.index(name) for name in self.with_gradient)

    @functools.cached_property
    def kept_positions(self) -> tuple[int, ...]:
        """Return the positions of the results and extras that the backward reads."""
        names = list(self.outputs)
        return tuple(names.index(name) for name in (*self.kept, *self.extras))

    @functools.cached_property
    def num_tensors(self) -> int:
        """Return the number of tensor arguments."""
        return len(self.tensors)

    @functools.cached_property
    def num_told(self) -> int:
        """Return the number of sizes that the arguments determine; the core takes these."""
        return len(self._places)

    @functools.cached_property
    def two_forms(self) -> tuple[tuple[int, int], ...]:
        """Return the position and the second shape's length of arguments with two shapes.

        The last argument comes first.
        """
        arguments = enumerate(self.arguments.values())
        found = [(i, len(x.shapes[1])) for i, x in arguments if len(x.shapes) > 1]
        return tuple(reversed(found))

    @functools.cached_property
    def flag_positions(self) -> tuple[int, ...]:
        """Return the positions of the flags among the tensors and constants."""
        constants = enumerate(self.constants.values(), len(self.tensors))
        return tuple(i for i, kind in constants if kind == "bool")

    @functools.cached_property
    def constant_kinds(self) -> tuple[tuple[int, str, type], ...]:
        """Return position, name and type of the constants."""
        constants = enumerate(self.constants.items(), len(self.tensors))
        return tuple((i, name, bool if kind == "bool" else int) for i, (name, kind) in constants)

    @functools.cached_property
    def _places(self) -> tuple[tuple[str, tuple[tuple[int, int | None], ...]], ...]:
        """Return for each size its letter and where to read it: arguments' positions and axes.

        The axis is None if the argument is the number itself.
        """
        tensors = (self.forward or self).arguments.values()
        places: dict[str, list[tuple[int, int | None]]] = {}
        for i, argument in enumerate(tensors, self.lead):
            for axis, letter in enumerate(argument.shapes[0] if argument.shapes else ()):
                if isinstance(letter, str):
                    places.setdefault(letter, []).append((i, axis))
        for i, kind in enumerate(self.constants.values(), len(self.tensors)):
            if kind != "bool":
                places.setdefault(kind, []).insert(0, (i, None))
        return tuple((letter, tuple(found)) for letter, found in places.items())

    @functools.cached_property
    def letters(self) -> tuple[Any, ...]:
        """Return the letters that :meth:`sizes` returns numbers for: arguments', then results'."""
        given = tuple(letter for letter, _ in self._places)
        # C of a grouped result is J / K.
        results = (x for output in self.outputs.values() for x in output.shapes[0])
        return given + tuple(dict.fromkeys(x for x in results if x not in given))

    @functools.cached_property
    def _dimensions(self) -> tuple[tuple[tuple[int, ...], torch.dtype | None], ...]:
        """Return positions of the sizes among :attr:`letters`, and dtype, of each output.

        A backward has none: its results are like the arguments in :meth:`differentiated`.
        """
        outputs = () if self.forward else self.outputs.values()
        return tuple((tuple(map(self.letters.index, x.shapes[0])), x.dtype) for x in outputs)

    def described(self, inputs: Sequence[Any]) -> list[Any]:
        """Return tensors' shapes, None where there is no tensor, and the constants."""
        tensors, constants = inputs[: self.num_tensors], inputs[self.num_tensors :]
        return [*[None if x is None else x.shape for x in tensors], *constants]

    def sizes(self, given: Sequence[Any]) -> list[int]:
        """Return the numbers that :attr:`letters` stand for in what :meth:`described` returns."""
        found = []
        for _, places in self._places:
            for i, axis in places:
                x = given[i]
                if x is not None:
                    found.append(x if axis is None else x[axis])
                    break
        for letter in self.letters[len(found) :]:
            if letter == "C":
                letter = found[self.letters.index("J")] // found[self.letters.index("K")]
            found.append(letter)
        return found

    def size(self, letter: str, inputs: Sequence[Any]) -> int:
        """Return the number that one letter stands for; 1 if the operation has no such letter."""
        sizes = self.sizes(self.described(inputs))
        return sizes[self.letters.index(letter)] if letter in self.letters else 1

    def shapes(self, sizes: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Return the shapes and dtypes of results and extras; None is the dtype of all tensors."""
        return [(tuple([sizes[k] for k in places]), dtype) for places, dtype in self._dimensions]

    def differentiated(self, inputs: Sequence[Any]) -> list[Tensor | None]:
        """Return the arguments that a backward computes the gradients of, from its inputs."""
        return [inputs[i] for i in self._differentiated]


# --- what several operations share ---

# With more dimensions plain torch builds components on GPUs and moves their parameters: whole
# matrices would not fit into a GPU's registers, and few latent spaces are larger.
LARGEST_COMPONENT_DIM = 32

# Points, and the tensors of :class:`vmm_fast.mixture.WhitenedMixture`.
_MIXTURE = {"z": "B D", "centers": "J D", "whitening": "J D D", "offsets": "J"}
_TRANSPOSE = {"transpose": "bool"}
_GROUPED = {"transpose": "bool", "pseudo_inputs_per_component": "K"}
# Rows: max_j l_ij, lse - max and expected - max. In float32 these are far more exact than the sums.
_SOFTMAX = {"softmax": "3 B"}
_COMPONENTS = {
    "log_weights": "C",
    "precision_cholesky": "C D D ?",
    "scale": "J D | J D D ?",
}
# Sparse counts come as values, row starts [B + 1] and gene indices; with a library size, the mean
# holds logits.
_COUNTS = {
    "counts": "...",
    "row_starts": "... ? :int64",
    "gene_indices": "... ? :int64",
    "mean": "B G",
    "inverse_dispersion": "G | B G ?",
    "dropout_logits": "B G ?",
    "library_size": "B ?",
}

# --- the table ---

MIXTURE_LOG_PROB = Operation(
    "mixture_log_prob",
    _MIXTURE,
    _TRANSPOSE,
    {"lse": "B", "expected": "B"},
    _SOFTMAX,
    differentiable=tuple(_MIXTURE),
    missing_gradients=True,
    all_gradients=True,
)
MIXTURE_KL = Operation(
    "mixture_kl",
    {**_MIXTURE, "scale": "B D | B D D"},
    _TRANSPOSE,
    {"kl": "B"},
    _SOFTMAX,
    differentiable=(*_MIXTURE, "scale"),
    all_gradients=True,
)
MIXTURE_STATISTICS = Operation(
    "mixture_statistics", _MIXTURE, _TRANSPOSE, {"N": "J", "s": "J D", "M": "J D D"}
)
MIXTURE_LOG_JOINT = Operation(
    "mixture_log_joint", _MIXTURE, _GROUPED, {"log_joint": "B C"}, reference_gradient=True
)
MIXTURE_RESPONSIBILITIES = Operation(
    "mixture_responsibilities",
    _MIXTURE,
    _GROUPED,
    {"responsibilities": "B C"},
    reference_gradient=True,
)
MIXTURE_ASSIGN = Operation(
    "mixture_assign",
    _MIXTURE,
    _GROUPED,
    {"label": "B :int64", "probability": "B", "entropy": "B"},
)
WHITENED_COMPONENTS = Operation(
    "whitened_components",
    _COMPONENTS,
    {"num_centers": "J", "expected": "bool"},
    {"whitening": "J D D", "offsets": "J"},
    differentiable=tuple(_COMPONENTS),
    kept=("whitening",),
    largest_dim=LARGEST_COMPONENT_DIM,
)
STORED_COMPONENTS = Operation(
    "stored_components",
    {"logits": "C", "raw_precision": "C D D", "scale": "J D | J D D ?"},
    {"num_centers": "J"},
    {"whitening": "J D D", "offsets": "J", "log_weights": "C", "precision_cholesky": "C D D"},
    differentiable=("scale",),
    kept=("whitening", "log_weights", "precision_cholesky"),
    constant_results=("log_weights", "precision_cholesky"),
    largest_dim=LARGEST_COMPONENT_DIM,
)
COUNT_LOG_PROB = Operation(
    "count_log_prob",
    _COUNTS,
    {},
    {"log_prob": "B"},
    differentiable=("mean", "inverse_dispersion", "dropout_logits", "library_size"),
)
OPERATIONS = (
    MIXTURE_LOG_PROB,
    MIXTURE_KL,
    MIXTURE_STATISTICS,
    MIXTURE_LOG_JOINT,
    MIXTURE_RESPONSIBILITIES,
    MIXTURE_ASSIGN,
    WHITENED_COMPONENTS,
    STORED_COMPONENTS,
    COUNT_LOG_PROB,
)

# All is computed here and not at the first call, which torch.compile may trace: before Python 3.12
# a cached property takes a lock, which cannot be traced.
for _operation in OPERATIONS:
    for _name, _value in vars(Operation).items():
        if isinstance(_value, functools.cached_property):
            getattr(_operation, _name)
