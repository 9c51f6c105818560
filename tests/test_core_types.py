"""The signatures in ``_core.pyi`` are those of the compiled core and of the table of operations."""

import ast
import re
from pathlib import Path

import pytest

from vmm_fast import _core
from vmm_fast.operations import OPERATIONS

STUB = ast.parse((Path(__file__).parents[1] / "vmm_fast" / "_core.pyi").read_text()).body
FUNCTIONS = {node.name: node for node in STUB if isinstance(node, ast.FunctionDef)}
# The other dtype of the same signature.
ALIASES = {
    node.targets[0].id: FUNCTIONS[node.value.id] for node in STUB if isinstance(node, ast.Assign)
}
CLASSES = {node.name: node for node in STUB if isinstance(node, ast.ClassDef)}
COMPUTED = [
    computed
    for operation in OPERATIONS
    for computed in ([operation, operation.backward] if operation.differentiable else [operation])
    if hasattr(_core, f"{operation.name}_float32")
]


def stated(function):
    """Return the types of the arguments and of the result that a stub states."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    types = [ast.unparse(x.annotation) for x in arguments if x.arg != "self"]
    return [*types, ast.unparse(function.returns)]


def compiled(function):
    """Return the same from the docstring that pybind11 writes, in the wording of any version."""
    arguments, result = re.search(r"\((.*)\) -> (.*)", function.__doc__).groups()
    inner = "Sequence[int]"
    many = (
        f"Sequence[tuple[float, {inner}]]"
        if "tuple[" in arguments.lower()
        else f"Sequence[{inner}]"
    )
    arguments = re.sub(r"\w+\[\w.*FixedSize.*\]|[\w.]+\[typing.Annotated.*\]", "Many", arguments)
    types = []
    for argument in filter(None, arguments.split(", ")):
        kind = argument.split(": ")[1].split(" | ")[0].split(".")[-1]
        types.append({"SupportsInt": "int", "SupportsFloat": "float"}.get(kind, kind))
    return [*(many if kind == "Many" else kind for kind in types), result]


def parameters(operation):
    """Return the names that the table gives to the core's arguments, in its order."""
    for name, argument in operation.arguments.items():
        yield name
        if len(argument.shapes) > 1:
            yield f"full_{name}"
    yield from operation.letters[: operation.num_told]
    yield from (name for name, kind in operation.constants.items() if kind == "bool")
    yield "num_threads"
    yield from operation.outputs


def test_the_stub_names_what_the_core_has():
    public = {name for name in vars(_core) if not name.startswith("__")}
    assert public == FUNCTIONS.keys() | ALIASES.keys() | CLASSES.keys()


@pytest.mark.parametrize("name", FUNCTIONS | ALIASES)
def test_functions_have_the_types_of_the_core(name):
    assert stated((FUNCTIONS | ALIASES)[name]) == compiled(getattr(_core, name))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_arguments_or_values_of_the_core(name):
    made, body = getattr(_core, name), CLASSES[name].body
    if isinstance(body[0], ast.AnnAssign):
        assert {node.target.id for node in body} == made.__members__.keys()
    else:
        assert stated(body[0]) == compiled(made.__init__)[1:]


@pytest.mark.parametrize("operation", COMPUTED, ids=lambda x: x.name)
def test_operations_have_the_arguments_of_the_table(operation):
    arguments = FUNCTIONS[f"{operation.name}_float32"].args.posonlyargs
    assert [x.arg for x in arguments] == [*parameters(operation)]
