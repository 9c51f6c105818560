"""The benchmarks run end to end, count what they say, and tell a slowdown from noise."""

import gc
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import (
    __main__,
    compare,
    gpu,
    gpu_bound,
    integration,
    likelihood,
    peak,
    problems,
    processes,
    providers,
    report,
    roofline,
    scaling,
    scvi_epoch,
    scvi_step,
    step,
    throughput,
)
from bench.problems import Size
from bench.records import command, environment, read_rows, select, write_rows
from bench.targets import checks
from bench.timing import quantiles, take_turns
from vmm_fast import backends

ALL = ["throughput", "roofline", "scaling", "step", "likelihood", "scvi-step"]
needs_scvi = pytest.mark.skipif(not find_spec("scvi"), reason="scvi-tools is not installed")


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a command here; gives its exit status and what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        return __main__.main(), capsys.readouterr().out

    return run


def timed(provider="vmm_fast", p50=1e-3, spread=0.02, **fields):
    row = {"part": "throughput", "mode": throughput.PARAMETERS, "provider": provider}
    row |= {"B": 256, "J": 100, "D": 10, "threads": 2, "dtype": "float32", "cpu": "a"}
    return row | {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread), **fields}


# --- end to end ---


def throughput_has_every_mode_and_says_who_is_absent(rows):
    found = {(row["mode"], row["provider"]) for row in rows if "p50" in row}
    for mode, *peers in (
        (throughput.FORWARD, "matmul"),
        (throughput.BACKWARD, "matmul"),
        (throughput.BACKWARD_FAR_APART, "matmul"),
        (throughput.PARAMETERS, "torch.distributions"),
        (throughput.COMPONENTS, "torch"),
        (throughput.GRADIENT_STEP, "torch"),
        (throughput.CLOSED_FORM_STEP, "torch"),
        (throughput.EM_STEP, "GaussianMixture", "BayesianGaussianMixture"),
        (throughput.EM_STEP_FAR_APART, "GaussianMixture"),
    ):
        assert {(mode, provider) for provider in ("vmm_fast", *peers)} <= found
    with_points = [row for row in rows if "p50" in row and row["mode"].startswith("forward")]
    assert all(0 < row["share_with_weight"] <= 1 for row in with_points)
    near, far = (
        select(rows, mode=mode, provider="vmm_fast")[0]["share_with_weight"]
        for mode in (throughput.BACKWARD, throughput.BACKWARD_FAR_APART)
    )
    assert near > 0.8 > far
    absent = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    assert absent["KeOps"] == "left out by --quick"
    assert absent["TensorFlow Probability"] == absent["torchgmm"] == "not installed"


def memory_is_of_the_call_alone(rows):
    """It counts neither interpreter and libraries nor a number for each (point, component, D)."""
    (row,) = select(rows, mode=scaling.MEMORY)
    assert 0 < row["peak_bytes"] < 4 * row["B"] * row["J"] * row["D"] / 2


def likelihoods_have_a_target_beside_scvi_tools(rows):
    assert len(rows) == len(likelihood.MODELS) * 2 * 2 + 3 * 2
    for row in rows:
        (theirs,) = select(rows, mode=row["mode"], provider=likelihood.THEIRS)
        assert row["times as fast"] == pytest.approx(theirs["p50"] / row["p50"], abs=0.01)
    (check,) = checks([{**row, "B": 512, "genes": 2000, "density": 0.1} for row in rows])
    assert check.value > 0
    assert check.limit == 8


def steps_and_epochs_of_scvi_have_a_target_and_phases(rows):
    steps, epochs = (select(rows, mode=mode) for mode in (scvi_step.MODE, scvi_epoch.MODE))
    assert {row["provider"] for row in steps} == {scvi_step.STOCK, *scvi_step.PRIORS}
    (stock,) = select(steps, provider=scvi_step.STOCK)
    for row in steps:
        assert row["times stock"] == pytest.approx(row["p50"] / stock["p50"], abs=1e-3)
    (check,) = checks(rows)  # of steps, not of epochs
    assert check.value > 0
    assert check.limit == 0.75
    found = {row["provider"]: row["phases"] for row in epochs}
    learnt = {scvi_epoch.BEFORE, scvi_epoch.VMM}
    assert set(found) == {*learnt, scvi_epoch.STOCK, scvi_epoch.NORMAL}
    for name, phases in found.items():
        without = set() if name in learnt else {scvi_epoch.PRIOR}
        taken = {phase for phase, seconds in phases.items() if seconds > 0}
        assert taken == set(scvi_epoch.PHASES) - without


SHOWN = {
    "throughput": throughput_has_every_mode_and_says_who_is_absent,
    "scaling": memory_is_of_the_call_alone,
    "likelihood": likelihoods_have_a_target_beside_scvi_tools,
    "scvi-step": steps_and_epochs_of_scvi_have_a_target_and_phases,
}


@pytest.fixture
def tiny(monkeypatch):
    """Plans that are smaller yet, and a provider that is not installed."""
    monkeypatch.setitem(providers.MODULES, "torchgmm", "no_such_module")
    less_memory = {"vmm_fast": (Size(2048, 100, 32),)}
    monkeypatch.setattr(scaling, "QUICK", scaling.QUICK._replace(memory=less_memory))
    monkeypatch.setattr(scvi_step, "QUICK", scvi_step.QUICK._replace(batches=(128,)))
    monkeypatch.setattr(peak, "ROUNDS", 400_000)
    monkeypatch.setattr(peak, "COPIED_BYTES", 2**24)


@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
@pytest.mark.parametrize(
    "part",
    [pytest.param(p, marks=[needs_scvi] * (p in ("likelihood", "scvi-step"))) for p in ALL],
)
def test_every_part_writes_rows_that_can_be_repeated_and_a_page(
    part, tiny, bench, tmp_path, monkeypatch
):
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    if part == "scvi-step":
        import scvi

        monkeypatch.setattr(scvi.settings, "verbosity", scvi.settings.verbosity)
    before = torch.distributions.kl_divergence, _BaseDataLoaderIter.__next__
    status, printed = bench(part, "--quick", "--threads", 1, "--out", tmp_path)
    assert not status
    assert (torch.distributions.kl_divergence, _BaseDataLoaderIter.__next__) == before
    rows = read_rows(tmp_path / f"{part}.jsonl")
    for row in rows:
        assert row["part"] == part
        assert row["command"] == f"python -m bench {part} --quick --threads 1"
        for key in ("revision", "date", "torch", "cpu", "instruction_set", "threads", "dtype"):
            assert row[key]
        assert "omp" in row["openmp"]
    found = [row for row in rows if "p50" in row]
    assert found
    for row in found:
        assert 0 < row["min"] <= row["p20"] <= row["p50"] <= row["p80"]
        assert row["repeats"] >= 1
        assert row.get("error", 0) < throughput.TOLERANCE
    if part in SHOWN:
        SHOWN[part](rows)

    page = (tmp_path / "speed.md").read_text()
    assert (f"![]({part}.png)" in page) == (part in report.PLOTS)
    if part in report.PLOTS:
        assert (tmp_path / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    assert ("not installed" in page) == (part == "throughput")
    for target in checks(rows):
        assert f"| {target.target} | {target.case} | {target.measured} | {target.asked} |" in page
        assert f"{target.verdict:6}  {target.target}, {target.case}" in printed


def test_all_is_every_part_but_the_longest(bench, monkeypatch):
    done = []
    monkeypatch.setattr(__main__, "measure", lambda name, args: done.append(name))
    bench("all", "--quick")
    assert done == ALL


def test_command_line_fails_where_something_became_slower(bench, tmp_path):
    before, slower = tmp_path / "before.jsonl", tmp_path / "slower.jsonl"
    write_rows(before, [timed()])
    write_rows(slower, [timed(p50=9e-3)])
    status, printed = bench("compare", before, before)
    assert status == 0 and printed.startswith("0 slower, 0 faster")
    root = Path(__file__).parents[1]
    arguments = [sys.executable, "-m", "bench", "compare", before, slower]
    assert subprocess.run(arguments, cwd=root, capture_output=True).returncode == 1


# --- providers ---


def test_wrong_provider_is_an_error(monkeypatch):
    def wrong(p):
        return 1.01 * providers.torch_distributions(p)

    monkeypatch.setitem(providers.PARAMETER_DENSITIES, "wrong", wrong)
    with pytest.raises(RuntimeError, match=r"wrong, .* error 0\.01"):
        list(throughput.from_parameters(throughput.QUICK, 1, None))


# --- counting ---


def test_operations_of_a_pair_counted_by_hand():
    # D = 2: A d takes 3 multiply-adds, its squares 2; M takes 2 products w d and 3 multiply-adds.
    size = Size(1, 1, 2)
    assert roofline.operations(roofline.LOG_PROB, size, 1) == 2 * 5
    assert roofline.operations(roofline.LOG_PROB_BACKWARD, size, 1) == 2 * (5 + 5 + 3 + 5 + 3)
    assert roofline.operations(roofline.STATISTICS, size, 1) == 2 * (5 + 5 + 3)
    assert roofline.operations(roofline.STATISTICS, size, 0) == 2 * 5
    assert roofline.operations(roofline.LOG_PROB, Size(7, 3, 2), 4) == 21 * 2 * 5


def test_torch_operators_nested_and_at_the_top():
    x = torch.ones(2, 2)
    assert throughput.count_operators(lambda: torch.add(x, x)) == (1, 1)
    nested, top_level = throughput.count_operators(lambda: torch.nn.functional.linear(x, x))
    assert top_level == 1
    assert nested > 1


# --- timing ---


def test_providers_take_turns_without_garbage_collection():
    turns = []

    def fake(name, seconds):
        def sample(calls):
            turns.append((name, calls, gc.isenabled()))
            return seconds * calls

        return sample

    timings = take_turns({"a": fake("a", 1e-4), "b": fake("b", 2.0)}, repeats=3, seconds=0)
    assert gc.isenabled()
    # An untimed call before each batch of a cheap provider, none before an expensive one.
    assert [turn[:2] for turn in turns[-9:]] == 3 * [("a", 1), ("a", 10), ("b", 1)]
    assert not any(enabled for _, _, enabled in turns[-9:])
    assert timings["a"]["p50"] == pytest.approx(1e-4)
    assert timings["b"] == {"min": 2.0, "p20": 2.0, "p50": 2.0, "p80": 2.0, "repeats": 3}


def test_quantiles_and_time_beside_a_part():
    found = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"min": 1.0, "p20": 2.0, "p50": 3.5, "p80": 5.0, "repeats": 6}
    for part, left in ((2.0, 12.0), (7.0, 2.0)):  # a disturbed part leaves a tenth
        sample = throughput.less(lambda calls: 5.0 * calls, lambda calls, part=part: part * calls)
        assert sample(4) == pytest.approx(left)


# --- rows, targets, comparison ---


def test_targets_compare_rows_of_one_case():
    rows = [timed(), timed("torch.distributions", 9.9e-3)]
    rows += [timed(B=4096, J=500, D=30), timed("torch.distributions", 25e-3, B=4096, J=500, D=30)]
    small, large = checks(rows)
    assert (small.case, small.verdict, small.asked) == ("(256, 100, 10)", "MISSED", "at least 10x")
    assert (large.case, large.verdict, large.asked) == ("(4096, 500, 30)", "met", "at least 25x")
    assert small.value == pytest.approx(9.9)


def test_page_has_verdicts_and_reasons():
    common = {"command": "python -m bench throughput", **environment()}
    overhead = {"mode": throughput.OVERHEAD, "B": 1, "J": 1, "D": 1}
    rows = [{**common, **timed(p50=70e-6), **overhead}]
    rows += [{**common, **timed()}, {**common, **timed("torch.distributions", 20e-3)}]
    page = report.page({"throughput": rows})
    assert "| (1, 1, 1) | 70 us | at most 55 us | **MISSED** |" in page
    assert "| (256, 100, 10) | 20x | at least 10x | met |" in page
    assert page.count("| **MISSED** |") == page.count("| met |") == 1
    missed = page.partition("## What is missed")[2].partition("## Throughput")[0]
    assert missed.count("\n- ") == 1
    assert "call overhead" in missed
    assert "| (256, 100, 10) | - | 1 ms | 20 ms (20x) |" in page


def roofline_row(mode, operations, p50, **fields):
    return timed(p50=p50, part="roofline", mode=mode, operations=operations, **fields)


def scaling_rows():
    def row(b, j, p50, mib):
        peak_bytes = mib * 2**20
        return timed(p50=p50, part="scaling", mode=scaling.MEMORY, B=b, J=j, peak_bytes=peak_bytes)

    rows = [row(100, 10, p50, 1) for p50 in (1e-3, 3e-3)] + [row(1000, 50, 0.12, 2048)]
    for axis, power in (("B", 1.0), ("J", 1.2), ("D", 2.0)):
        for mode in (scaling.FORWARD, scaling.BACKWARD):
            line = [{axis: n, "p50": 1e-6 * n**power} for n in (2, 5, 11)]
            rows += [timed(part="scaling", mode=mode, axis=axis) | point for point in line]
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (  # the fastest of the others counts, and the geometric mean of all sizes
            [
                timed(p50=p50, mode=throughput.BACKWARD, provider=provider, B=size)
                for size, times in ((256, (1.0, 9.0, 6.0)), (512, (2.0, 48.0, 60.0)))
                for provider, p50 in zip(("vmm_fast", "KeOps", "matmul"), times, strict=True)
            ],
            [(6, "met"), (24, "met"), (12, "met")],
        ),
        (  # scikit-learn is scaled linearly to the size that we ran
            [
                row | {"mode": throughput.EM_STEP}
                for row in (
                    timed(B=50_000),
                    timed(p50=2.0, B=1_000_000),
                    timed("GaussianMixture", 1.2, B=50_000),
                )
            ],
            [(12, "met")],
        ),
        (
            [
                timed(provider, p50, mode=throughput.GRADIENT_STEP)
                for provider, p50 in (("vmm_fast", 1.0), ("torch", 8.0))
            ],
            [(8, "MISSED")],
        ),
        (  # small batches have no target
            [
                timed(provider, p50, part="step", B=size)
                for size in (128, 256)
                for provider, p50 in ((step.NORMAL, 1.0), (step.GRADIENT, 1.05))
            ],
            [(1.05, "met")],
        ),
        (  # the share of the peak that was measured at the same size, on most threads
            [
                roofline_row(mode, operations, 2.0, B=512, threads=threads)
                for threads in (1, 2)
                for mode, operations in (
                    (roofline.PEAK, 100.0),
                    (roofline.LOG_PROB, 80.0 - threads),
                )
            ],
            [(78, "met")],
        ),
        (
            [
                timed(mode=throughput.OPERATORS, call=call, inference="gradient", operators=count)
                | {"operators_top_level": 3}
                for call, count in (("prior.kl", 15), ("prior.update", 16), ("other", 99))
            ],
            [(15, "met"), (16, "MISSED")],
        ),
        (  # the largest by memory and by time a pair, against the smallest's mean; then exponents
            scaling_rows(),
            [(2048, "MISSED"), (1.2, "met"), *[(1.0, "met"), (1.2, "MISSED"), (2.0, "met")] * 2],
        ),
    ],
)
def test_targets_of_rows_by_hand(rows, expected):
    found = [(check.value, check.verdict) for check in checks(rows)]
    assert [verdict for _, verdict in found] == [verdict for _, verdict in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])


@pytest.mark.parametrize(
    ("after", "status", "found"),
    [
        (timed(p50=1.2e-3), 1, "1 slower, 0 faster, 1 same"),
        (timed(p50=1.04e-3, spread=0.001), 0, "0 slower, 0 faster, 2 same"),  # the machine drifts
        (timed(p50=1.2e-3, spread=0.3), 0, "0 slower, 0 faster, 2 same"),  # within the rows' noise
        (timed(p50=0.8e-3), 0, "0 slower, 1 faster, 1 same"),
    ],
)
def test_compare_flags_a_slowdown_and_lets_noise_pass(bench, tmp_path, after, status, found):
    paths = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    for path, row in zip(paths, (timed(), after), strict=True):
        write_rows(path, [row, timed("matmul")])
    returned, printed = bench("compare", *paths)
    assert returned == status
    assert f"{found}, 0 in one file alone" in printed
    if status:
        assert "slower: throughput" in printed
        assert "vmm_fast, B = 256, J = 100, D = 10, threads = 2" in printed
        assert "(1.20x)" in printed


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "b"},
        {"torch": "2.9"},
        {"python": "3.13"},
        {"numpy": "2.4"},
        {"provider_version": {"tensorflow": "2.20", "tensorflow_probability": "0.26"}},
    ],
)
def test_compare_knows_other_machines_and_versions(other):
    versions = {"tensorflow": "2.19", "tensorflow_probability": "0.25"}
    before = timed(torch="2.8", python="3.12", numpy="2.3", provider_version=versions)
    after = before | {"p50": 1.0}
    assert len(compare.compare([before], [after])) == 1
    assert compare.compare([before], [after | other]) == []


def test_command_names_no_place():
    expected = "python -m bench throughput --threads 2 --tfp-environment FOLDER"
    arguments = ["throughput", "--out", "somewhere", "--threads", "2", "--tfp-environment", "there"]
    assert command(arguments) == expected
    arguments = ["throughput", "--out=somewhere", "--threads", "2", "--tfp-environment=there"]
    assert command(arguments) == expected


# --- on a GPU ---


def test_gpu_says_where_there_is_none(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nothing = 1, "no GPU was found: torch.cuda.is_available() is False\n"
    assert bench("gpu", "--out", tmp_path) == nothing
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch.compile
def test_gpu_measures_every_part(bench, tmp_path, monkeypatch):
    """With the CPU in the GPU's place: all but the device's own calls."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    answers = {
        "is_available": True,
        "get_device_name": "none",
        "synchronize": None,
        "memory_allocated": 0,
        "max_memory_allocated": 2**20,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    once = partial(take_turns, repeats=1, seconds=0.0)
    monkeypatch.setattr(gpu, "take_turns", lambda samplers, **_: once(samplers))
    status, printed = bench("gpu", "--quick", "--out", tmp_path)
    assert status == 0
    rows = read_rows(tmp_path / "gpu.jsonl")
    steps = [gpu.KL, throughput.COMPONENTS, throughput.GRADIENT_STEP, throughput.CLOSED_FORM_STEP]
    modes = ["error", throughput.BACKWARD, throughput.PARAMETERS, *steps, "rates", "kernel"]
    assert list(dict.fromkeys(row["mode"] for row in rows)) == [*modes, "training step", "memory"]
    for mode in steps:
        ours, theirs = select(rows, mode=mode)
        assert (ours["provider"], theirs["provider"][:5]) == ("vmm_fast", "torch")
        for row in (ours, theirs):
            assert row["error"] < throughput.TOLERANCE
            assert row["launches"] > 0 < row["p50"]
    assert {row["kernel"] for row in select(rows, mode="kernel")} == set(roofline.KERNELS)
    for row in select(rows, mode="kernel"):
        assert row["fraction"] == row["bound"] / row["p50"]
    assert len(printed.splitlines()) == len(rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_gpu_bound_counts_what_the_kernels_multiply(
    quick_interpreter, monkeypatch, bench, tmp_path
):
    """Beyond 32 dimensions, in Triton's interpreter, which takes no product twice for once."""
    from triton.runtime.interpreter import InterpreterBuilder

    multiply, counted = InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, *rest):
        counted.append(2 * a.data.size * b.data.shape[1])
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(backends, "FORCED", "triton")
    size = Size(5, 2, 70)
    inputs = problems.whitened(size)
    device = gpu_bound.DEVICES[-1]  # of the interpreter's tiles
    for name, call in roofline.kernels(inputs).items():
        names = [roofline.LOG_PROB, name] if name == roofline.LOG_PROB_BACKWARD else [name]
        counted.clear()
        call()
        assert sum(counted) == sum(gpu_bound.KERNELS[n](size, device).matrix for n in names), name
    bench("gpu", "--on-paper", "--out", tmp_path)
    (page,) = tmp_path.iterdir()
    assert all(device.name in page.read_text() for device in gpu_bound.DEVICES)


# --- single cells ---


def integration_row(method, seed, bio, leiden, own=None):
    kinds = [f"{by}_{score}" for by in ("kmeans", "leiden") for score in ("nmi", "ari")]
    scores = ["Bio conservation", "isolated_labels", "silhouette_label", "clisi_knn"]
    scores += [f"nmi_ari_cluster_labels_{kind}" for kind in kinds]
    clusters = {"nmi": 0.5, "used": 7, "over_0.2_percent": 6, "rare_types": 2}
    versions = (
        "revision",
        "date",
        "python",
        "torch",
        "cpu",
        "scvi-tools",
        "scib-metrics",
        "scanpy",
    )
    row = {
        **dict.fromkeys(versions, "1"),
        **{"dataset": "pbmc3k_kang_3batch", "cells": 500, "types": 5, "batches": 3},
        **{"method": method, "seed": seed, "epochs": 1, "pcr": {"before": 0.2, "after": 0.1}},
        "scib": {"Batch correction": 0.7, **dict.fromkeys(scores, bio)},
        "leiden": {"ari": leiden, "rare_types_kept": 1, **clusters},
    }
    if own:
        row["own"] = {"ari": own, "rare_types_kept": 2, "nmi_batch": 0.1, **clusters}
    return row


def test_integration_page(tmp_path):
    rows = [
        integration_row(method, seed, bio + slope * seed, leiden, own)
        for method, bio, slope, leiden, own in (
            ("vmm", 0.6, 0.1, 0.5, 0.55),
            ("normal", 0.71, 0, 0.5, None),
            ("scvi", 0.65, 0, 0.54, None),
        )
        for seed in range(3)
    ]
    write_rows(tmp_path / "integration.jsonl", rows)
    integration.write_page(tmp_path)
    page = (tmp_path / "integration.md").read_text()
    assert "| VMM | 3 | 0.700 ± 0.060 |" in page
    assert "PCR before 0.200" in page
    verdicts = [line.split(":")[0] for line in integration.targets(rows)]
    assert verdicts == ["MISSED", "MISSED", "met", "met", "met"]
    assert all(line.startswith("open") for line in integration.targets(rows[1:]))
    assert (tmp_path / "integration.png").stat().st_size > 10_000


def test_a_rare_type_is_kept_where_a_cluster_is_its_own():
    labels = np.array(["common"] * 990 + ["rare"] * 10)
    kept, lost = np.zeros(1000, int), np.zeros(1000, int)
    kept[990:] = 1
    lost[800:] = 1
    found = [integration._clusters(labels, c)["rare_types_kept"] for c in (kept, lost)]
    assert found == [1, 0]
    assert integration._best_f1(labels == "rare", kept) == 1


def test_two_processes_are_compared_by_medians(monkeypatch):
    """Epochs have wall and CPU seconds; a row's own seconds are those of a step."""
    epochs = {1: [[9.0, 6.0], [8.0, 8.0], [4.0, 4.0]], 2: [[4.0, 2.0], [5.0, 3.0], [5.0, 1.0]]}
    monkeypatch.setattr(processes, "seconds", lambda count, size, plan: epochs[count])
    one, two = processes.rows(processes.QUICK, 2)  # 64 cells, 16 a step
    assert (one["provider"], two["provider"]) == (processes.ONE, "2 processes")
    assert (one["cells/s"], two["cells/s"]) == (8, 13)
    assert (two["times as fast"], two["times as fast, by CPU"]) == (1.6, 3.0)
    assert (one["p50"], two["p50"], two["cpu_seconds"]) == (2.0, 1.25, 0.5)
    (check,) = checks([one, two])
    assert (check.value, check.verdict) == (1.6, "met")


@needs_scvi
@pytest.mark.slow("starts three processes, which import scvi-tools and train a model")
def test_two_processes_have_a_target_beside_one():
    (size,) = processes.QUICK.batches
    one, two = processes.rows(processes.QUICK, 2)
    assert two["cells/s"] == pytest.approx(size / two["p50"], rel=0.01)
    (check,) = checks([one, two])
    assert check.value == two["times as fast"] == pytest.approx(one["p50"] / two["p50"], rel=0.01)


@needs_scvi
def test_counts_are_as_sparse_as_asked_and_a_wrong_likelihood_is_not_timed(monkeypatch):
    (case,) = likelihood.QUICK.densities
    x, *_ = likelihood.problem(200, 100, case)
    assert float((x > 0).float().mean()) == pytest.approx(case, abs=0.02)
    wrong = {"Poisson": (lambda x, mean: mean.sum(-1), 1)}
    monkeypatch.setattr(likelihood, "MODELS", wrong)
    with pytest.raises(ValueError, match="vmm_fast gives"):
        list(likelihood.rows(likelihood.QUICK, 1))
