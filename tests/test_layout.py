"""Imports run one way between the package's parts and need no POSIX; calls are not deprecated."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vmm_fast"
# From the applications down to what computes. A part imports from those after it, not from its
# neighbours in one row and not from those before it.
ROWS = [
    ("cli",),
    ("cells", "arrays"),
    ("plots",),
    ("metrics",),
    ("scvi", "models", "estimators"),
    ("schedules",),
    ("priors",),
    ("clusters",),
    ("inference",),
    ("mixture",),
    ("ops", "counts"),
    ("dispatch",),
    ("backends",),
    ("operations", "reference", "kernels"),
    ("_core", "_cuda"),
]
# ``Components.clusters`` is where users look for them.
EXCEPTIONS = {("mixture", "clusters")}
RANKS = {part: rank for rank, row in enumerate(ROWS) for part in row}
NAMES = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py", ".pyi")}
SHARED = {name for name in NAMES if name.startswith("_") and name not in RANKS}


def part_of(name):
    """Return a module's part, or None if every part may import it: files, errors, texts."""
    parts = name.split(".")
    return parts[1] if parts[0] == "vmm_fast" and len(parts) > 1 and parts[1] in RANKS else None


def imports_of(source):
    """Yield the modules that a source imports, at the top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "a relative import"
            elif node.module == "vmm_fast":
                yield from (f"vmm_fast.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_part_has_its_place():
    assert set(RANKS) - {"kernels"} == NAMES - SHARED


def of_no_part(module):
    """Return whether an import hides the part: what the root exports stands in a part, too."""
    parts = module.split(".")
    at_root = parts[0] == "vmm_fast" and (len(parts) == 1 or parts[1] not in SHARED | set(RANKS))
    return at_root or module == "a relative import"


@pytest.mark.parametrize(
    "line",
    ["import vmm_fast", "from vmm_fast import VMMPrior", "from . import ops", "from .ops import x"],
)
def test_an_import_that_hides_its_part_is_found(line):
    assert list(map(of_no_part, imports_of(line))) == [True]
    assert not any(map(of_no_part, imports_of("from vmm_fast import ops, _core; import os")))


@pytest.mark.parametrize("part", [x for x in RANKS if not x.startswith("_")])
def test_a_part_imports_from_those_below(part):
    """Nor from its neighbours in a row."""
    folder = PACKAGE.parent / part if part == "kernels" else PACKAGE / part
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    for path in paths:
        if path.name == "aot.py":  # a tool that compiles what the package launches
            continue
        modules = list(imports_of(path.read_text()))
        assert not list(filter(of_no_part, modules)), path.name
        for other in map(part_of, modules):
            below = other in (None, part) or RANKS[other] > RANKS[part]
            assert below or (part, other) in EXCEPTIONS, f"{path.name} imports from {other}"


@pytest.mark.parametrize(
    ("parts", "after"),
    [("vmm_fast.cli, vmm_fast.arrays", "torch"), ("vmm_fast.cells.integration", "scvi")],
)
def test_what_windows_lacks_is_not_needed(parts, after, tmp_path):
    """Models train, and write checkpoints, whatever other packages import for themselves."""
    pytest.importorskip(after)
    code = f"""
import signal, sys, {after}
del signal.SIGHUP
sys.modules.update(dict.fromkeys(["fcntl", "resource"]))
import torch, vmm_fast, {parts}
from vmm_fast.models import VAE, fit
x = torch.randn(60, 3)
def elbos(epochs, resume=False):
    torch.manual_seed(0)
    model = VAE(3, 2, vmm_fast.VMMPrior(x[:4], latent_dim=2, data_size=50))
    history = fit(model, x[10:], x[:10], epochs=epochs, checkpoint="run.pt", resume=resume)
    return [epoch["validation_elbo"] for epoch in history]
straight, first, resumed = elbos(2), elbos(1), elbos(2, resume=True)
print(resumed == straight and first == straight[:1])
"""
    run = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout == "True\n", out.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_is_an_error_though_others_are_ignored(category):
    with pytest.raises(category):
        warnings.warn("named here", category, stacklevel=1)
    warnings.warn_explicit("named elsewhere", category, "scvi/model.py", 1, "scvi.model")
