"""Shared by all tests: what runs when, each backend and each instruction set in turn."""

import contextlib
import os
import signal
import warnings

# Before vmm_fast is imported, which reads these: each test is of all backends and instruction sets,
# whatever the shell exports.
os.environ.pop("VMM_FAST_BACKEND", None)
os.environ.pop("VMM_FAST_ISA", None)
# Before Triton is imported: its kernels run in its interpreter, which needs no GPU. A process that
# test_gpu.py starts is told otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

from vmm_fast import _core, backends

pytest.register_assert_rewrite("support")

# A shell lets what it starts in the background ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run; how long one takes depends on the machine.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """Make a slow test that gives no reason an error of its file."""
    found = yield
    for item in found if isinstance(found, list) else []:
        for mark in item.iter_markers("slow"):
            if not (mark.args and isinstance(mark.args[0], str)):
                raise pytest.Collector.CollectError(
                    f"{item.nodeid} must say why it is slow: slow('...')"
                )
    return found


OURS = r"(bench|support|test_\w+|vmm_fast)(\.|$)"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Give torch one thread, and refuse what is deprecated, before a test and fixtures it shares.

    Problems are small: threads would cost more than they give, most of all on a busy machine. Code
    that numba compiles changes the number, which changes the last bits of results.

    Tests ignore warnings of other packages' own calls. Those of our calls name our modules.
    """
    torch.set_num_threads(1)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("error", category=category, module=OURS)  # pytest undoes it
    # Advice, not a deprecation: how cells with proteins are registered is the user's choice.
    warnings.filterwarnings("ignore", message="We recommend using setup_mudata")
    # Tests write the second format of zarr on purpose, as long as anndata can.
    warnings.filterwarnings("ignore", message="zarr v3 will become the only option")


@pytest.fixture(autouse=True)
def torch_seed():
    """Seed torch before each test, so that its draws do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quick_interpreter():
    """Let Triton's interpreter wrap the language only once for each launch.

    It does so again at every call of a device function, around what it has wrapped before, so that
    a launch of many calls slows down without bound.
    """
    triton = pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")
    from triton.runtime import interpreter

    language = (triton.language, triton.language.core)
    wrap = interpreter._patch_lang
    wrapped = set()

    def wrap_once(function):
        seen = tuple(x in function.__globals__.values() for x in language)
        if seen in wrapped:
            return None
        wrapped.add(seen)
        scope = wrap(function)
        restore = scope.restore

        def restore_all():
            wrapped.remove(seen)
            restore()

        scope.restore = restore_all
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", wrap_once)
        yield


@pytest.fixture
def h5ad(tmp_path):
    """A file of cells of two types, in two batches."""
    from support import written

    return written(tmp_path)


@contextlib.contextmanager
def without_report():
    from vmm_fast.cells import report

    write_report = report.write_report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda path, *rest: path.touch())
        yield write_report


@pytest.fixture(scope="module")
def no_report():
    """Skip the report of `integrate`, which takes most of a small run's time."""
    with without_report() as write_report:
        yield write_report


@pytest.fixture
def with_report(monkeypatch, no_report):
    """Write the report, but without UMAP, whose first call compiles for ten seconds."""
    from vmm_fast.cells import report

    monkeypatch.setattr(report, "write_report", no_report)
    monkeypatch.setattr(report, "_plane", lambda z, seed: (z[:, :2].astype(float), "Plot"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the results of `integrate` on three batches, whose counts are in a layer."""
    from support import integrated, make_cells, written

    folder = tmp_path_factory.mktemp("trained")
    adata = make_cells(batches=3)
    adata.layers["counts"] = adata.X.copy()
    options = ["--batch-key", "batch", "--layer", "counts", "--genes", 18, "--components", 8]
    options += ["--epochs", 15, "--learning-rate", 0.03, "--clusters", 3]
    with without_report():
        assert integrated(written(folder, adata), folder / "out", *options) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Return the results of `integrate` on the cells of the fixture h5ad, without options."""
    from support import integrated, written

    folder = tmp_path_factory.mktemp("plain")
    with without_report():
        assert integrated(written(folder), folder / "out") == 0
    return folder / "out"


# A GPU's tensors, where test_gpu.py starts the tests without the interpreter.
ON_GPU = os.environ["TRITON_INTERPRET"].lower() not in ("1", "true", "on", "yes", "y")
BACKENDS = ["core", "plain", "triton", "triton-split"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Compute every operation in each backend in turn; return the device of its tensors.

    "triton-split" has more programs than there are points and components, so that their sums are
    merged in a second launch; "triton" has one that takes all.
    """
    kind = request.param
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0, but there is no GPU")
    if ON_GPU and not kind.startswith("triton"):
        pytest.skip("this run is of the kernels on a GPU")
    forced = {"core": "core", "plain": "reference"}.get(kind, "triton")
    monkeypatch.setattr(backends, "FORCED", forced)
    if forced == "triton":
        pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")
        from vmm_fast.kernels import launch

        monkeypatch.setattr(launch, "PROGRAMS", 512 if kind == "triton-split" else 1)
        request.getfixturevalue("quick_interpreter")
        # numpy, which the interpreter computes with, warns of an overflow; a GPU does not.
        warnings.simplefilter("ignore", RuntimeWarning)  # pytest undoes it after the test
    return torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


ISAS = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Force each instruction set in turn."""
    monkeypatch.setenv("VMM_FAST_ISA", request.param)
    try:
        assert _core.instruction_set() == request.param
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    return request.param
