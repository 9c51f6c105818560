"""The operations on a mixture in every backend: values, gradients, hard inputs, memory, errors."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    all_outputs,
    assert_all_close,
    assert_equals_reference,
    assert_within_budget,
    composed_kl,
    everything,
    gradients,
    kl_with_gradients,
    on,
    on_backends,
    random_mixture,
    random_scale,
    threads,
)

from vmm_fast import _core, backends, ops, reference

# numpy, which Triton's interpreter computes with, warns of an overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

transposes = pytest.mark.parametrize("transpose", [False, True])
once_each, checked = on_backends("core", "triton"), on_backends("core", "plain")
large = pytest.mark.slow("large tiles, or many, in Triton's interpreter")

# --- values and gradients ---


@pytest.mark.parametrize(
    ("shape", "transpose", "group"),
    [
        ((0, 3, 2), False, 3),
        ((1, 1, 1), True, 1),
        ((20, 18, 2), True, 3),  # of tiles and of components more than one program takes
        ((5, 4, 17), False, 2),
        ((5, 2, 33), True, 2),  # dimensions in blocks
        pytest.param((5, 2, 65), False, 2, marks=large),
        pytest.param((5, 2, 65), True, 1, marks=large),
        pytest.param((3, 2, 128), False, 1, marks=large),
        pytest.param((40, 2, 128), True, 2, marks=large),
        pytest.param((300, 20, 5), False, 4, marks=large),
        pytest.param((100, 20, 30), True, 1, marks=large),
    ],
)
def test_values_and_gradients_equal_the_reference(backend, shape, transpose, group):
    assert_equals_reference(on(backend, random_mixture(*shape)), transpose, group)


shapes = st.tuples(st.integers(0, 140), st.integers(1, 9), st.integers(1, 17))


@settings(max_examples=40)
@given(shape=shapes, transpose=st.booleans(), seed=st.integers(0, 10**6))
def test_any_shape(shape, transpose, seed):
    assert_equals_reference(random_mixture(*shape, seed=seed), transpose, tolerance=1e-10)


ACCURACY = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.mark.parametrize(
    ("shape", "group", "transpose"),
    [
        ((300, 12, 10), 2, False),
        ((150, 12, 4), 12, True),
        ((65, 6, 33), 3, False),
        ((65, 6, 33), 3, True),
        ((1, 3, 1), 1, False),
        ((2, 1, 130), 1, True),
    ],
)
def test_every_instruction_set(isa, shape, group, transpose):
    for dtype, tolerance in ACCURACY.items():
        mixture = random_mixture(*shape, dtype=dtype)
        assert_equals_reference(mixture, transpose, group, tolerance)


@pytest.mark.parametrize("dtype", ACCURACY)
def test_small_dimensions_each_of_which_has_code_of_its_own(isa, dtype):
    for dim in range(1, 23):
        mixture = random_mixture(21, 3, dim, dtype=dtype, spread=0.5)
        assert_equals_reference(mixture, dim % 2 == 0, tolerance=ACCURACY[dtype])


@pytest.mark.parametrize(
    ("shape", "transpose"),
    [((900, 7, 10), False), ((900, 7, 10), True), ((400, 5, 33), False), ((300, 4, 130), True)],
)
def test_few_samples_with_a_weight(isa, shape, transpose):
    """Some components have few and scattered samples, others have many together."""
    for dtype, tolerance in ACCURACY.items():
        z, centers, whitening, offsets = random_mixture(*shape, dtype=dtype)
        centers = 200 * centers
        of = torch.arange(len(z)) % 3
        of[len(z) // 2 :] = 3
        mixture = (centers[of] + z, centers, whitening, offsets)
        weighty = ops.mixture_responsibilities(*mixture, transpose) > 0
        assert weighty[: len(z) // 2].double().mean() < 0.4
        assert weighty[len(z) // 2 :, 3].all()
        assert_equals_reference(mixture, transpose, tolerance=tolerance)


@pytest.mark.parametrize(
    ("shape", "count", "transpose"),
    [
        ((2500, 20, 5), 1, False),
        ((2500, 20, 5), 2, True),
        ((1100, 40, 21), 2, False),
        ((2100, 3, 33), 2, True),
    ],
)
def test_many_tiles_on_one_thread_and_on_two(shape, count, transpose):
    with threads(count):
        assert_equals_reference(random_mixture(*shape), transpose)


@pytest.mark.parametrize(
    ("shape", "full", "transpose"),
    [
        ((0, 2, 2), False, False),
        ((40, 5, 18), False, True),
        ((7, 2, 33), True, True),
    ],
)
def test_kl_equals_its_parts(backend, shape, full, transpose):
    inputs = (*random_mixture(*shape, spread=0.5), random_scale(shape[0], shape[2], full))
    inputs = on(backend, inputs)
    found = kl_with_gradients(ops.mixture_kl, inputs, transpose)
    assert_all_close(found, kl_with_gradients(composed_kl, inputs, transpose), 1e-9)


# --- float32 ---


@transposes
@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 1e4), (1.0, 0.0), (1e3, 1e4)])
def test_float32_error_budget(isa, scale, offset, transpose):
    z, centers, whitening, offsets = random_mixture(200, 20, 10, dtype=torch.float32, seed=3)
    mixture = (z * scale + offset, centers * scale + offset, whitening / scale, offsets)
    assert_within_budget(mixture, transpose)


@transposes
def test_float32_error_budget_of_unlike_components(isa, transpose):
    """Centers 1e4 apart, standard deviations from 1e-3 to 1e3, some points far out."""
    z, centers, whitening, offsets = random_mixture(240, 12, 10, dtype=torch.float32, seed=3)
    deviation = torch.logspace(-3, 3, 12)
    whitening = whitening / deviation[:, None, None]
    offsets = offsets - 10 * deviation.log()
    centers = 1e4 * centers
    of = torch.arange(len(z)) % 12
    z = centers[of] + deviation[of, None] * z
    z[::8] = centers[0] + 1e-3 * 500 * torch.nn.functional.normalize(z[::8])  # out in a tail
    mixture = (z, centers, whitening, offsets)
    lowest = reference.mixture_log_joint(*(x.double() for x in mixture), transpose).amax(1).min()
    assert lowest < -1e3
    assert_within_budget(mixture, transpose)


@pytest.mark.parametrize(
    ("shape", "transpose"),
    [((3, 20_000, 2), False), ((29, 7, 128), True), ((130, 33, 129), False), ((300, 40, 17), True)],
)
def test_many_components_and_dimensions(shape, transpose):
    """At one thread and at two: the same bits on every run, and errors within the budget."""
    # Near enough for soft assignments: else the largest error is that of one lone tie.
    mixture = random_mixture(*shape, dtype=torch.float32, spread=min(2.0, 20 / shape[2]))
    for count in (1, 2):
        with threads(count):
            assert_same_bits(mixture, transpose)
            assert_within_budget(mixture, transpose)
    label = ops.mixture_assign(*mixture, transpose)[0]
    double = (x.double() for x in mixture)
    assert torch.equal(label, reference.mixture_assign(*double, transpose)[0])


@once_each
def test_sums_keep_terms_that_are_below_their_rounding(backend):
    """Two hundred components of a weight of 2e-8; 3,000 points with a responsibility of 1.5e-8."""
    offsets = torch.full((201,), 2e-8).log()
    offsets[0] = 0
    mixture = (torch.zeros(1, 1), torch.zeros(201, 1), torch.ones(201, 1, 1), offsets)
    lse, _ = ops.mixture_log_prob(*on(backend, mixture))
    assert lse.item() == pytest.approx(4e-6, abs=1e-6)
    z = torch.full((3072, 1), 6.0)
    z[:64] = 0
    mixture = (z, torch.tensor([[6.0], [0.0]]), torch.ones(2, 1, 1), torch.zeros(2))
    found, _, _ = ops.mixture_statistics(*on(backend, mixture))
    true, _, _ = reference.mixture_statistics(*(x.double() for x in mixture))
    assert true[1] - 64 > 4e-5 and abs(found[1].item() - true[1]) < 2e-5


# --- hard inputs ---


def test_far_tails(backend):
    """Log-densities down to -1e6: finite, relative accuracy of the dtype, exact assignment."""
    z, *mixture = on(backend, random_mixture(50, 8, 5, dtype=torch.float32))
    mixture = (z * 500, *mixture)
    found = all_outputs(ops, mixture)
    true = all_outputs(reference, [x.double() for x in mixture])
    assert true["lse"].min() < -1e6
    for name in ("lse", "expected"):
        torch.testing.assert_close(found[name].double(), true[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["label"], true["label"])
    one = torch.ones_like(found["lse"])
    torch.testing.assert_close(found["responsibilities"].sum(-1), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("radius", [1e2, 1e4])
def test_far_tails_stay_normalised(isa, radius):
    """Responsibilities sum to 1 and statistics to B however low the float32 densities are."""
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(64, 10)) * radius
    centers = torch.randn(5, 10).repeat(2, 1)  # every component twice
    mixture = (z, centers, torch.eye(10).repeat(10, 1, 1), torch.zeros(10))
    q = ops.mixture_responsibilities(*mixture)
    torch.testing.assert_close(q.sum(-1), torch.ones(64), rtol=1e-5, atol=0)
    torch.testing.assert_close(q[:, :5], q[:, 5:], rtol=1e-6, atol=0)
    n, _, _ = ops.mixture_statistics(*mixture)
    torch.testing.assert_close(n.sum(), torch.tensor(64.0), rtol=1e-5, atol=0)
    (grad_offsets,) = gradients(ops, mixture)[3:]
    total = torch.linspace(-1, 2, 64).sum() * 2  # d/dc of lse and of the expectation, by weights
    torch.testing.assert_close(grad_offsets.sum(), total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["core", "triton", "triton-split"], indirect=True)
@pytest.mark.parametrize(
    ("points", "centers", "factor"),
    [
        ([0.0], [0.0, 3e38], 2.0),
        ([0.0, 0.0, 0.0, 3e38] * 20, [0.0, 3e38], 2.0),
        ([0.0], [0.0], 1e20),
    ],
    ids=["far off", "far apart", "narrow"],
)
def test_what_overflows_in_float32_gives_no_nan(backend, points, centers, factor):
    """Whitened distances of components with a weight of 0, and products of A with itself."""
    count = len(centers)
    mixture = (torch.tensor(points)[:, None], torch.tensor(centers)[:, None])
    mixture = on(backend, (*mixture, torch.full((count, 1, 1), factor), torch.zeros(count)))
    assert all(g.isfinite().all() for g in gradients(ops, mixture))
    assert all(x.isfinite().all() for x in ops.mixture_statistics(*mixture))
    assert (ops.mixture_log_prob(*mixture)[0] == 0).all()


UNLIKE = "unlike dimensions", "unlike components"


@pytest.mark.parametrize(
    ("scale", "dim", "transpose"),
    [
        (1e-30, 3, False),
        (1e-20, 3, True),
        (1e19, 1, False),
        (1e35, 3, True),
        *((unlike, 3, transpose) for unlike in UNLIKE for transpose in (False, True)),
        *(pytest.param(unlike, 40, False, marks=large) for unlike in (1e-30, 1e35, *UNLIKE)),
    ],
)
def test_gradients_at_any_scale(backend, scale, dim, transpose):
    """A gradient may be an ordinary number where squares of distances overflow or vanish."""
    z, centers, whitening, offsets = random_mixture(12, 4, dim, spread=0.5)
    if scale == "unlike components":  # the points of each are its own
        factor = torch.tensor([1.0, 1e22]).double()
        z, centers = z * factor.repeat(6)[:, None], centers * factor.repeat(2)[:, None]
        whitening = whitening / factor.repeat(2)[:, None, None]
        offsets = offsets + torch.tensor([0, -100]).double().repeat(2)
    else:
        most = 1e9 if backends.FORCED == "triton" else 1e22  # one unit for all dimensions
        unlike = torch.tensor([1 / most, 1, most, 1e5]).double().repeat(10)[:dim]
        factor = unlike if scale == "unlike dimensions" else torch.full((dim,), scale).double()
        z, centers = z * factor, centers * factor
        whitening = whitening / (factor[:, None] if transpose else factor)
    mixture = on(backend, (z, centers, whitening, offsets), torch.float32)
    found = gradients(ops, mixture, transpose)
    true = gradients(reference, on("cpu", mixture, torch.float64), transpose)
    for name, x, y in zip(("z", "centers", "whitening", "offsets"), found, true, strict=True):
        x, y = x.cpu().double(), y.cpu()
        others = 0 if scale == "unlike dimensions" or y.ndim == 1 else tuple(range(1, y.ndim))
        unit = y.abs().amax(others, keepdim=True)
        # What is less than float32 holds may be 0.
        assert ((x - y).abs() <= 1e-4 * unit + 1e-37).all(), (name, x, y)


def test_kl_where_the_determinant_of_a_scale_overflows_and_underflows(backend):
    scale = torch.tensor([[1e-37], [1e37]]).expand(2, 100)
    *mixture, scale = on(backend, (*random_mixture(2, 3, 100, dtype=torch.float32), scale))
    expected = composed_kl(*(x.double() for x in mixture), False, scale.double())
    torch.testing.assert_close(ops.mixture_kl(*mixture, False, scale), expected.float())


def test_pruned_components(backend):
    """Offsets of -inf: as if the component were not there, with gradients of zero."""
    mixture = on(backend, random_mixture(20, 7, 4))
    kept, pruned = [0, 2, 3, 6], [1, 4, 5]
    mixture[3][pruned] = -torch.inf
    small = (mixture[0], *(x[kept] for x in mixture[1:]))
    found = all_outputs(ops, mixture)
    assert_all_close(found, all_outputs(reference, mixture), 1e-10)
    torch.testing.assert_close(found["lse"], reference.mixture_log_prob(*small)[0])
    z, *others = gradients(ops, mixture)
    true_z, *true = gradients(reference, small)
    torch.testing.assert_close(z, true_z)
    for g, other in zip(others, true, strict=True):
        torch.testing.assert_close(g[kept], other)
        assert (g[pruned] == 0).all()


def test_equal_components_share_the_weight_and_the_first_is_assigned(backend):
    z, *components = on(backend, random_mixture(40, 3, 3))
    components = [x.repeat(4, *[1] * (x.ndim - 1)) for x in components]
    components[2][:3] = -torch.inf  # the first of the four
    q = ops.mixture_responsibilities(z, *components).unflatten(1, (4, 3))
    assert (q[:, 0] == 0).all()
    torch.testing.assert_close(q[:, 1:], q[:, 1:2].expand(-1, 3, -1))
    label, probability, _ = ops.mixture_assign(z, *components)
    assert torch.equal(label, 3 + q[:, 1].argmax(-1)) and len(label.unique()) > 1
    torch.testing.assert_close(probability, q[:, 1].amax(-1))


# --- the same bits, and memory ---


def assert_same_bits(mixture, transpose=False):
    first, second = (everything(ops, mixture, transpose) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("shape", [(3000, 40, 10), (3, 3000, 6)])
def test_the_number_of_threads_changes_rounding_alone(shape):
    """Also where threads share out the components instead of the samples (the second shape)."""
    mixture = random_mixture(*shape)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            assert_same_bits(tuple(x.float() for x in mixture))
            found.append(everything(ops, mixture))
    for other in found[1:]:
        assert_all_close(other, found[0], 1e-12)


@pytest.mark.parametrize(
    "size",
    [  # l is kept between the passes, and is not
        3,
        pytest.param(980, marks=pytest.mark.slow("980 points in 270 components of 128 dimensions")),
    ],
)
def test_statistics_of_more_threads_than_memory_for_copies(size):
    """Where a copy of the sums for every thread would be too large, components are shared out."""
    mixture = random_mixture(size, 270, 128, spread=0.2)
    with threads(16):
        first, second = (ops.mixture_statistics(*mixture) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    expected = reference.mixture_statistics(*mixture)
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)


def rise_of_memory(function):
    """Return by how many MiB the process's memory rises at most during a call."""

    def memory(kind):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError as error:
        pytest.skip(f"cannot measure the peak of memory: {error}")
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def test_nothing_of_size_b_times_j_is_stored():
    points, components = 12_000, 4_000
    mixture = (torch.randn(points, 2), torch.randn(components, 2))
    mixture = (*mixture, torch.eye(2).repeat(components, 1, 1), torch.zeros(components))

    def compute():
        lse, expected = ops.mixture_log_prob(*[x.requires_grad_() for x in mixture])
        (lse + expected).sum().backward()
        ops.mixture_statistics(*mixture)
        ops.mixture_assign(*mixture)

    matrix = points * components * 4 / 2**20  # 183 MiB
    assert rise_of_memory(lambda: torch.ones(points, components)) > 0.9 * matrix
    with threads(2):
        assert rise_of_memory(compute) < 0.3 * matrix


@pytest.mark.parametrize("function", [ops.mixture_responsibilities, ops.mixture_log_joint])
def test_results_too_large_for_memory_are_refused(function):
    """B C = 2^46 overflows 32 bits, and no machine has it: an error comes before any work."""
    z = torch.zeros(1, 1).expand(2**26, 1)
    centers, offsets = torch.zeros(1, 1).expand(2**20, 1), torch.zeros(1).expand(2**20)
    with pytest.raises(RuntimeError, match="allocate"):
        function(z, centers, centers[..., None], offsets)


# --- torch ---


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux has")
def test_one_openmp_runtime():
    """The compiled core uses the OpenMP runtime that torch brought, and brings none of its own."""
    if b"libomp.so" in Path(_core.__file__).read_bytes():
        pytest.skip("the core was built by clang, which has no code for torch's runtime, libgomp")
    code = """
import re, torch, vmm_fast
from vmm_fast import ops
torch.set_num_threads(2)
z = torch.zeros(4000, 10)
ops.mixture_log_prob(z, z[:50], torch.eye(10).repeat(50, 1, 1), z[:50, 0])  # enough for threads
with open("/proc/self/maps") as maps:
    mapped = {line.split()[-1] for line in maps}
print(sum(bool(re.search("lib(gomp|omp|iomp5?)\\\\b", path)) for path in mapped))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"


@pytest.mark.parametrize("kernels", ["mixture", "components", "empirical_bayes"])
def test_kernels_are_of_no_one_processor(kernels):
    """The baseline also compiles for NEON, whose vectors are as wide."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    source = Path(__file__).parents[1] / "csrc" / f"{kernels}_kernels.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs aarch64-linux-gnu-g++ and the core's source")
    options = "-std=c++17 -fsyntax-only -Wall -Wextra -Werror -Wno-psabi -DVMM_ISA=baseline"
    subprocess.run([compiler, *options.split(), "-DVMM_VECTOR_BYTES=16", source], check=True)


# --- errors ---

UNGROUPED = [ops.mixture_log_prob, ops.mixture_statistics]
GROUPED = [ops.mixture_responsibilities, ops.mixture_log_joint, ops.mixture_assign]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 0), r"z must have shape \[B, D\] with D >= 1, but has \[3, 0\]"),
        (1, torch.zeros(0, 2), r"centers must have shape \[J, D\] with J >= 1, D = 2, but"),
        (2, torch.zeros(4, 2), r"whitening must have shape \[J, D, D\] with J = 4, D = 2, but"),
        (3, torch.zeros(3), r"offsets must have shape \[J\] with J = 4, but has \[3\]"),
    ],
)
def test_errors_name_the_argument(position, value, message):
    mixture = list(random_mixture(3, 4, 2, dtype=torch.float32))
    mixture[position] = value
    for function in UNGROUPED + GROUPED:
        with pytest.raises(ValueError, match=message):
            function(*mixture)
    with pytest.raises(ValueError, match=message):
        ops.mixture_kl(*mixture, False, torch.ones(3, 2))


@checked
@pytest.mark.parametrize(
    ("argument", "row", "bad", "message"),
    [
        (0, 0, torch.nan, "z must be finite, but row 0 has a NaN or infinite value"),
        (0, 2, torch.inf, "z must be finite, but row 2 has a NaN or infinite value"),
        (1, 1, torch.inf, "centers must be finite, but row 1 has a NaN or infinite value"),
        (2, 3, torch.nan, "whitening must be finite, but row 3 has a NaN or infinite value"),
        (3, 2, torch.nan, "offsets must be finite or -inf, but row 2 has a NaN or infinite value"),
        (3, 2, torch.inf, "offsets must be finite or -inf, but row 2 has a NaN or infinite value"),
        (
            3,
            slice(None),
            -torch.inf,
            "offsets must be finite for at least one component, but are all -inf",
        ),
    ],
)
def test_errors_name_the_bad_value(backend, argument, row, bad, message):
    """Errors have the same words in every backend."""
    mixture = random_mixture(3, 4, 2, dtype=torch.float32)
    mixture[argument][row] = bad
    for function in UNGROUPED + GROUPED + [lambda *m: ops.mixture_kl(*m, False, torch.ones(3, 2))]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(*mixture)


@checked
@pytest.mark.parametrize("differentiated", [False, True])
def test_z_too_far_off_is_an_error(backend, differentiated):
    """Check that points of density 0 raise, instead of NaN for responsibilities."""
    z, *components = random_mixture(3, 4, 2, dtype=torch.float32)
    z[1] = 1e30
    z.requires_grad_(differentiated)
    scale = torch.ones(3, 2)
    for function in UNGROUPED + GROUPED + [lambda *m: ops.mixture_kl(*m, False, scale)]:
        with pytest.raises(ValueError, match=r"z must be near enough .* but row 1 is too far"):
            function(z, *components)


@checked
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("full", [False, True])
def test_kl_refuses_a_scale_that_is_not_positive(backend, bad, full):
    mixture, scale = random_mixture(4, 3, 2), random_scale(4, 2, full)
    scale[(2, 1, 1) if full else (2, 1)] = bad
    with pytest.raises(ValueError, match="q must be finite with a positive scale, but row 2 is"):
        ops.mixture_kl(*mixture, False, scale)


@pytest.mark.parametrize("function", GROUPED)
@pytest.mark.parametrize("group", [0, 3])
def test_group_must_divide(function, group):
    with pytest.raises(ValueError, match="pseudo_inputs_per_component must divide J = 4"):
        function(*random_mixture(3, 4, 2), False, group)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("VMM_FAST_ISA", "quantum")
    known = "VMM_FAST_ISA is 'quantum'.* must be one of baseline, avx2, avx512"
    with pytest.raises(ValueError, match=known):
        ops.mixture_log_prob(*random_mixture(3, 4, 2))
