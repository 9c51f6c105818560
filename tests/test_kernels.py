"""What is particular to the Triton kernels: tiles, matrix units, launches, and compiling them.

What they compute is checked with the other backends, in the tests of the operations.
"""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ON_GPU
from support import (
    Computations,
    assert_within_budget,
    counted_launches,
    gradients,
    on,
    random_gaussians,
    random_mixture,
    random_scale,
)
from torch.distributions import MultivariateNormal, Normal

from vmm_fast import VMMPrior, backends, ops
from vmm_fast.operations import LARGEST_COMPONENT_DIM

triton = pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")

# Where Triton is missing, this cannot be imported.
from vmm_fast.kernels import aot, launch  # noqa: E402

# numpy, which the interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

in_kernels = pytest.mark.parametrize("backend", ["triton", "triton-split"], indirect=True)
interpreted = pytest.mark.skipif(ON_GPU, reason="patches Triton's interpreter")

# --- tiles and programs ---


def test_a_gpu_is_asked_once_for_its_kind(monkeypatch):
    asked = []

    def get_device_capability(device):
        asked.append(device)
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    launch.capability.cache_clear()
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    try:
        for _ in range(2):
            assert [launch.capability(device) for device in devices] == [9, 9, 0]
        assert asked == devices[:2]
    finally:
        launch.capability.cache_clear()


@pytest.mark.parametrize("tiles", [0, 1, 7, 300, 10_000])
def test_splits_share_all_the_work(tiles):
    for work in (0, 1, 15, 16, 17, 1000):
        splits, each = launch.splits(tiles, work)
        assert (splits - 1) * each < max(work, 1) <= splits * each
        assert splits <= launch.MOST_SPLITS and splits * tiles <= max(launch.PROGRAMS, tiles)
    assert launch.splits(1, 1000)[0] > launch.MOST_SPLITS / 2  # a small problem is shared


@pytest.mark.parametrize(
    ("backend", "transpose"), [("triton", False), ("triton-split", True)], indirect=["backend"]
)
def test_the_larger_tile_of_some_gpus(monkeypatch, backend, transpose):
    assert launch.tile(torch.float32, 30, 9) != launch.tile(torch.float32, 30, 0)
    mixture = on(backend, random_mixture(70, 2, 30, dtype=torch.float32, spread=0.5))
    monkeypatch.setattr(launch, "capability", lambda device: 9)
    assert_within_budget(mixture, transpose)


# --- precision ---


def tf32(x):
    """Round to 10 binary places, as ``cvt.rna.tf32.f32`` does."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Compute products in three passes of TF32, which the interpreter computes exactly."""
    if ON_GPU:
        yield  # this GPU's own
        return
    from triton.runtime.interpreter import InterpreterBuilder

    exact = InterpreterBuilder.create_dot
    counted = []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if "TF32x3" not in str(input_precision):
            return exact(self, a, b, d, input_precision, max_num_imprecise_acc)
        counted.append(1)
        handle = type(a)
        high = [tf32(x.data) for x in (a, b)]
        low = [tf32(x.data - h) for x, h in zip((a, b), high, strict=True)]
        for left, right in ((low[0], high[1]), (high[0], low[1]), (high[0], high[1])):
            left, right = handle(left, a.dtype), handle(right, b.dtype)
            d = exact(self, left, right, d, input_precision, max_num_imprecise_acc)
        return d

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield
    assert counted


LARGE = [((4096, 100, 10), 1e3, 1e4, True), ((500, 20, 50), 1.0, 0.0, False)] if ON_GPU else []
many = pytest.mark.slow("large tiles, or many, in Triton's interpreter")


@in_kernels
@pytest.mark.parametrize(
    ("shape", "scale", "offset", "transpose"),
    [
        ((20, 6, 10), 1e-3, 1e4, True),
        ((5, 3, 33), 1.0, 0.0, False),
        pytest.param((20, 4, 30), 1.0, 0.0, True, marks=many),
        pytest.param((50, 20, 10), 1.0, 0.0, False, marks=many),
        pytest.param((40, 60, 2), 1.0, 0.0, False, marks=many),
        pytest.param((40, 33, 30), 1.0, 0.0, False, marks=many),
        pytest.param((70, 5, 50), 1.0, 0.0, True, marks=many),
        pytest.param((16, 4, 128), 1.0, 0.0, False, marks=many),
        pytest.param((150, 20, 10), 1e3, 1e4, False, marks=many),
        *LARGE,
    ],
)
def test_float32_error_budget(backend, tensor_cores, shape, scale, offset, transpose):
    # Near enough for soft assignments: else the largest error is that of one lone tie.
    mixture = random_mixture(*shape, dtype=torch.float32, seed=3, spread=min(2.0, 20 / shape[2]))
    z, centers, whitening, offsets = on(backend, mixture)
    mixture = (z * scale + offset, centers * scale + offset, whitening / scale, offsets)
    assert_within_budget(mixture, transpose)


# --- values that the kernels do not check ---


@pytest.mark.parametrize(
    ("backend", "argument"),
    [("triton", 0), ("triton-split", 1), ("triton", 2), ("triton-split", 3)],
    indirect=["backend"],
)
def test_nan_gives_nan(backend, argument):
    mixture = on(backend, random_mixture(20, 5, 3))
    mixture[argument].view(-1)[0] = torch.nan
    lse, expected = ops.mixture_log_prob(*mixture)
    assert lse[0].isnan() and expected[0].isnan()
    assert ops.mixture_responsibilities(*mixture)[0].isnan().any()
    assert ops.mixture_assign(*mixture)[1][0].isnan()
    assert all(x.isnan().any() for x in ops.mixture_statistics(*mixture))
    assert all(g.isnan().any() for g in gradients(ops, mixture))


@in_kernels
def test_all_components_pruned(backend):
    *mixture, offsets = on(backend, random_mixture(5, 3, 2))
    offsets = torch.full_like(offsets, -torch.inf)
    assert (ops.mixture_log_prob(*mixture, offsets)[0] == -torch.inf).all()
    assert (ops.mixture_log_joint(*mixture, offsets) == -torch.inf).all()
    assert (ops.mixture_responsibilities(*mixture, offsets) == 0).all()
    assert all((g == 0).all() for g in gradients(ops, (*mixture, offsets)))


@in_kernels
@pytest.mark.parametrize("full", [False, True])
def test_a_scale_that_is_not_positive_gives_no_finite_kl(backend, full):
    *mixture, scale = on(backend, (*random_mixture(4, 3, 2), random_scale(4, 2, full)))
    for row, bad in enumerate((0.0, -1.0, torch.nan)):
        scale[(row, 1, 1) if full else (row, 1)] = bad
    found = ops.mixture_kl(*mixture, False, scale)
    assert found.isfinite().tolist() == [False, False, False, True]


# --- launches ---


@interpreted
@in_kernels
@pytest.mark.parametrize("full", [False, True])
def test_launches_of_a_variational_step(monkeypatch, backend, full):
    """Build, forward, backward, the build's backward, and a second pass of what was split."""
    # What kl keeps is a copy: four operators more, in one step of a cycle.
    prior = VMMPrior(torch.zeros(10, 5), 3, pseudo_inputs_per_component=2, update_every=1).double()
    prior.logits = random_gaussians(5, 10, 3, "precision+full")[0]
    scale = random_scale(10, 3, full)
    leaves = [*random_mixture(40, 10, 3)[:2], scale, random_scale(40, 3, False)]
    z, mean, scale, deviation = leaves = [x.requires_grad_() for x in leaves]
    at_pseudo_inputs = (
        MultivariateNormal(mean, scale_tril=scale, validate_args=False)
        if full
        else Normal(mean, scale, validate_args=False)
    )
    q = Normal(z, deviation, validate_args=False)

    def step():
        kl = prior.kl(q, lambda _: at_pseudo_inputs, z)
        return kl, *torch.autograd.grad(kl, leaves, torch.ones_like(kl))

    with counted_launches() as launched, Computations() as computed:
        found = step()
    merged = [name for name in launched if "merge" in name]
    assert len(merged) == (2 if launch.PROGRAMS > 1 else 0)
    assert len(launched) == 4 + len(merged)
    assert computed.names == ["ones_like.default"]
    monkeypatch.setattr(backends, "FORCED", "reference")
    torch.testing.assert_close(found, step(), rtol=1e-10, atol=1e-10)


# --- compiled ahead of time ---


def run_compiler(tmp_path, *arguments, code=0):
    """Run Python without the interpreter and with an empty cache of kernels; return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout


def test_kernels_compile(tmp_path):
    """Each kernel once, in float32, within its bounds."""
    code = """
from vmm_fast.kernels import aot
first = {}
for note in aot.launches(aot.TARGETS["sm_90"], [3], ["float32"]):
    first.setdefault(note.kernel, note)
assert set(first) == set(aot._KERNELS)
for note in first.values():
    print(note.kernel, aot.compiled(note, "sm_90").faults())
"""
    rows = run_compiler(tmp_path, "-c", code).splitlines()
    assert len(rows) >= 15 and all(row.endswith(" []") for row in rows), rows


ROW = ("backward_kernel", "float32 D=3", "sm_90", 255, 0, 227 * 1024, True, False)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"registers": 256}, ["256 registers, at most 255"]),
        ({"registers": 256, "target": "gfx942", "shared_memory": 0}, []),
        ({"spilled_bytes": 4}, ["4 bytes spilled, at most 0"]),
        ({"shared_memory": 232449}, ["232449 bytes shared, at most 232448"]),
        ({"atomics": True}, ["atomic operations, whose order is not determined"]),
        ({"matrix_instructions": False}, ["no matrix instructions"]),
        ({"matrix_instructions": False, "configuration": "float64 D=3"}, []),
        ({"matrix_instructions": False, "kernel": "sums_merge_kernel"}, []),
    ],
)
def test_a_broken_bound_is_a_fault(change, faults):
    row = aot.Row(*ROW)._replace(**change)
    assert row.faults() == faults
    assert aot.table([row]).splitlines()[1].endswith("; ".join(faults) or "hold")


def test_the_worst_row_of_each_kernel_and_target_is_kept():
    heavy = aot.Row(*ROW)
    light, broken = heavy._replace(registers=40), heavy._replace(registers=40, atomics=True)
    elsewhere = light._replace(target="sm_80")
    assert aot.worst([light, broken, heavy, elsewhere]) == [broken, heavy, elsewhere]


@interpreted
def test_the_interpreter_compiles_nothing_ahead_of_time(capsys):
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err


# Bytes that components_backward_kernel spills for sm_100 with Triton 3.7.1, by FORM, SCALE,
# WANT_WEIGHTS, WANT_PRECISION and WANT_SCALE: no other bound may break, and these no longer once
# they hold.
SPILLED = {
    "marginal full True True True": 400,
    "marginal full False False True": 168,
    "expected full True True True": 504,
    "marginal diagonal True True True": 24,
}


@pytest.mark.slow("compiles a hundred configurations in a process of its own")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("target", "dim"),
    [("sm_80", 10), ("sm_90", 10), ("sm_100", 10), ("gfx942", 10), ("sm_90", 50)],
)
def test_kernels_compile_within_their_bounds(tmp_path, target, dim):
    """In float32 and one dimension; the command by itself does all, in longer."""
    known = SPILLED if target == "sm_100" and triton.__version__ == "3.7.1" else {}
    options = ("--dtype", "float32", "--dim", str(dim), "--target", target)
    arguments = ("-m", "vmm_fast.kernels.aot", *options)
    printed = run_compiler(tmp_path, *arguments, code=1 if known else 0)
    rows = [re.split("  +", row) for row in printed.splitlines() if f" {target} " in row]
    broken = {}
    for kernel, configuration, *_, bounds in rows:
        if bounds != "hold":
            constants = " ".join(re.findall(r"=(\w+)", configuration)[1:6])
            broken[kernel, constants] = bounds
    assert broken == {
        ("components_backward_kernel", constants): f"{spilled} bytes spilled, at most 0"
        for constants, spilled in known.items()
    }
    # Beyond these dimensions plain torch builds components.
    kernels = 105 if dim <= LARGEST_COMPONENT_DIM else 46
    of_cuda = target != "gfx942" and "the CUDA kernels of csrc/ are left out" not in printed
    assert re.search(r"(\d+) compilations", printed)[1] == str(kernels + of_cuda)
