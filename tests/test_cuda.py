"""The CUDA kernels: what the compiler says of them anywhere, and what they compute on a GPU."""

from subprocess import CompletedProcess

import pytest
import torch

from vmm_fast.inference.stick_breaking import posterior_without_checks, stick_breaking_posterior
from vmm_fast.kernels import nvcc


@pytest.fixture
def kernels():
    return pytest.importorskip("vmm_fast._cuda", reason="built without a CUDA toolkit")


@pytest.fixture
def gpu(kernels):
    if not torch.cuda.is_available() or not kernels.is_served(0):
        pytest.skip("no GPU that the kernels serve")
    return torch.device("cuda", 0)


@pytest.mark.slow("compiles the CUDA sources for every target")
def test_resources():
    """Nothing spills; a block fits into registers and the shared memory that every GPU has."""
    report = nvcc.resource_report()
    if report is None:
        pytest.skip("no nvcc, or no CUDA sources")
    kernels = ["stick_breaking_posterior"]
    assert sorted((row.kernel, row.target) for row in report) == sorted(
        (kernel, f"sm_{target}") for kernel in kernels for target in nvcc.TARGETS
    )
    for row in report:
        assert row.spill_bytes == 0
        assert row.registers <= 65536 // 512
        assert 0 < row.shared_bytes <= 48 * 1024


REPORT = """ptxas info    : Compiling entry function 'sums' for 'sm_80'
ptxas info    : Function properties for sums
    16 bytes stack frame, {spilled} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers{shared}
"""


def test_the_compilers_report_is_read(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "sums.cu").touch()
    monkeypatch.setattr(nvcc, "__file__", str(tmp_path / "kernels" / "nvcc.py"))
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: "nvcc")
    printed = REPORT.format(spilled=0, shared=", 128 bytes smem, 400 bytes cmem[0]")
    printed += REPORT.replace("sm_80", "sm_90").format(spilled=8, shared="")
    results = [CompletedProcess([], 0, "", printed), CompletedProcess([], 1, "", "sums.cu: wrong")]
    commands = []

    def run(command, **_):
        commands.append(command)
        return results.pop(0)

    monkeypatch.setattr(nvcc.subprocess, "run", run)
    first, second = nvcc.resource_report()
    assert first == nvcc.Resources("sums", "sm_80", 40, 4, 128)
    assert second == nvcc.Resources("sums", "sm_90", 40, 12, 0)
    for target in nvcc.TARGETS:
        assert f"-gencode=arch=compute_{target},code=sm_{target}" in commands[0]
    with pytest.raises(RuntimeError, match=r"nvcc .*\nsums.cu: wrong"):
        nvcc.resource_report()


def test_no_report_without_nvcc_or_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "__file__", str(tmp_path / "kernels" / "nvcc.py"))
    assert nvcc.resource_report() is None
    monkeypatch.undo()
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    assert nvcc.resource_report() is None


def test_no_such_device(kernels):
    """The error is CUDA's own, also on a machine without a GPU."""
    device = 1000
    assert not kernels.is_served(device)
    with pytest.raises(RuntimeError, match=r"CUDA: .* \(cudaError\w+\)"):
        kernels.stick_breaking_posterior(0, 1, 0, 0.0, 1.0, 1.0, *[0] * 7, 0, device, 0)


COUNTS = {
    "1": [5.0],
    "3": [0.5, 8.0, 8.0],
    "ties": [3.0, 1.0, 7.0, 1.0] * 400,
    "100000": torch.arange(100_000).remainder(997).square(),
}


@pytest.mark.parametrize("discount", [0.0, 0.3])
@pytest.mark.parametrize("name", COUNTS)
def test_gpu_against_cpu(name, discount, gpu):
    counts = torch.as_tensor(COUNTS[name], dtype=torch.float64)
    expected = stick_breaking_posterior(counts, 2.0, discount)
    got = stick_breaking_posterior(counts.to(gpu), 2.0, discount)
    again = stick_breaking_posterior(counts.to(gpu), 2.0, discount)
    assert got.concentration == again.concentration
    assert got.concentration == pytest.approx(expected.concentration, rel=1e-12)
    assert torch.equal(got.order.cpu(), expected.order)
    for one, two, other in zip(got[1:-1], again[1:-1], expected[1:-1], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-300)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_gpu_is_not_waited_for_and_graphs_capture(gpu):
    counts = torch.tensor([3.0, 1.0, 7.0, 0.0], dtype=torch.float64, device=gpu)
    gamma = torch.tensor(1.5, dtype=torch.float64, device=gpu)
    expected = posterior_without_checks(counts.cpu(), 1.5, 0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        posterior_without_checks(counts, gamma, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = posterior_without_checks(counts, gamma, 0.3)
    graph.replay()
    torch.testing.assert_close(
        tuple(x.cpu() for x in got), tuple(expected), rtol=1e-12, atol=1e-300
    )
