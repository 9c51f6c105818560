"""The benchmarks run end to end, count what they say, and tell a slowdown from noise."""

import gc
import json
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import (
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
    throughput,
)
from bench.__main__ import ALL
from bench.eager_prior import EagerVMM
from bench.problems import Size
from bench.records import command, environment, read_rows, select, write_rows
from bench.targets import checks
from bench.timing import quantiles, take_turns
from vmm_fast import backends

ROOT = Path(__file__).parents[1]
# By ``bench all``; two parts need scvi-tools.
LEFT_OUT = () if find_spec("scvi") else ("likelihood", "scvi-step")
MEASURED = [part for part in report.PARTS if part in ALL and part not in LEFT_OUT]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


# --- end to end ---


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    done = bench("all", "--quick", "--threads", 1, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_every_part_writes_rows_that_can_be_repeated(results):
    folder, _ = results
    for part in MEASURED:
        rows = read_rows(folder / f"{part}.jsonl")
        for row in rows:
            assert row["part"] == part
            assert row["command"] == "python -m bench all --quick --threads 1"
            for key in ("revision", "date", "torch", "cpu", "instruction_set", "threads", "dtype"):
                assert row[key]
            assert "omp" in row["openmp"]
        timed = [row for row in rows if "p50" in row]
        assert timed
        for row in timed:
            assert 0 < row["min"] <= row["p20"] <= row["p50"] <= row["p80"]
            assert row["repeats"] >= 1
            assert row.get("error", 0) < throughput.TOLERANCE


def test_throughput_has_every_mode_and_says_who_is_absent(results):
    rows = read_rows(results[0] / "throughput.jsonl")
    found = {(row["mode"], row["provider"]) for row in rows if "p50" in row}
    for mode, provider in (
        (throughput.FORWARD, "matmul"),
        (throughput.BACKWARD, "matmul"),
        (throughput.BACKWARD_FAR_APART, "matmul"),
        (throughput.PARAMETERS, "torch.distributions"),
        (throughput.COMPONENTS, "torch"),
        (throughput.GRADIENT_STEP, "torch"),
        (throughput.CLOSED_FORM_STEP, "torch"),
        (throughput.EM_STEP, "GaussianMixture"),
        (throughput.EM_STEP, "BayesianGaussianMixture"),
        (throughput.EM_STEP_FAR_APART, "GaussianMixture"),
    ):
        assert {(mode, provider), (mode, "vmm_fast")} <= found
    for mode in (
        throughput.FORWARD,
        throughput.BACKWARD,
        throughput.PARAMETERS,
        throughput.EM_STEP,
    ):
        for row in select(rows, mode=mode):
            assert "absent" in row or 0 < row["share_with_weight"] <= 1
    absent = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    assert absent["KeOps"] == "left out by --quick"
    assert absent["TensorFlow Probability"] == "not installed"


def test_page_has_pictures_and_targets(results):
    folder, printed = results
    page = (folder / "speed.md").read_text()
    for part in MEASURED:
        assert (f"![]({part}.png)" in page) == (part in report.PLOTS)
    for part in report.PLOTS.keys() & set(MEASURED):
        assert (folder / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    assert "not installed" in page
    for target in checks([row for part in MEASURED for row in read_rows(folder / f"{part}.jsonl")]):
        assert f"| {target.target} | {target.case} | {target.measured} | {target.asked} |" in page
        assert f"{target.verdict:6}  {target.target}, {target.case}" in printed


def test_compare_of_a_run_with_itself_finds_nothing(results):
    path = results[0] / "throughput.jsonl"
    done = bench("compare", path, path)
    assert done.returncode == 0
    assert done.stdout.startswith("0 slower, 0 faster")


def test_command_line_fails_where_something_became_slower(tmp_path):
    path, slower = tmp_path / "before.jsonl", tmp_path / "slower.jsonl"
    write_rows(path, [timed()])
    write_rows(slower, [timed(p50=9e-3)])
    assert bench("compare", path, slower).returncode == 1


# --- providers ---


def test_missing_provider_is_reported(monkeypatch):
    monkeypatch.setitem(providers.MODULES, "torchgmm", "no_such_module")
    rows = list(throughput.em(throughput.QUICK))
    assert select(rows, provider="torchgmm") == [
        {"mode": throughput.EM_STEP, "provider": "torchgmm", "absent": "not installed"}
    ]
    assert "not installed" in report.throughput_tables(rows)


def test_wrong_provider_is_an_error(monkeypatch):
    def wrong(p):
        return 1.01 * providers.torch_distributions(p)

    monkeypatch.setitem(providers.PARAMETER_DENSITIES, "wrong", wrong)
    with pytest.raises(RuntimeError, match=r"wrong, .* error 0\.01"):
        list(throughput.from_parameters(throughput.QUICK, 1, None))


@pytest.mark.parametrize("inference", ["gradient", "closed-form"])
def test_eager_prior_is_the_same_model(inference):
    prior, encoder = throughput.vmm_prior(Size(20, 4, 3), inference)
    prior = prior.double()
    eager = EagerVMM(prior).double()
    z = problems.parameters(Size(20, 4, 3), torch.float64).z
    q = torch.distributions.MultivariateNormal(
        z, torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    )
    torch.testing.assert_close(eager.kl(q, encoder, z=z), prior.kl(q, encoder, z=z))
    for _ in range(3):
        torch.testing.assert_close(eager.map_loss(z, encoder), prior.map_loss(z, encoder))
        for either in (eager, prior):
            either.update(z, encoder)
    for name, value in prior.named_parameters():
        torch.testing.assert_close(getattr(eager, name), value, msg=name)


@pytest.mark.parametrize("dim", [4, 10, 30, 64])
def test_clusters_overlap_alike_at_every_dimension(dim):
    size = Size(256, 100, dim)
    assert throughput.share_with_weight(problems.whitened(size)) > 0.8
    if dim >= 30:
        far_apart = problems.whitened(size, far_apart=True)
        assert throughput.share_with_weight(far_apart) < 0.3


def test_pairs_with_weight_in_chunks(monkeypatch):
    inputs = problems.whitened(Size(20, 5, 30), far_apart=True)
    whole = problems.pairs_with_weight(inputs)
    monkeypatch.setattr(problems, "WEIGHTS", 15)  # three points at a time
    assert 20 <= problems.pairs_with_weight(inputs) == whole < 100


def test_reference_in_chunks(monkeypatch):
    inputs = problems.parameters(Size(10, 3, 2))
    whole = problems.reference_log_prob(inputs, problems.whiten)
    monkeypatch.setattr(problems, "REFERENCE_NUMBERS", 18)  # three points at a time
    for a, b in zip(problems.reference_log_prob(inputs, problems.whiten), whole, strict=True):
        torch.testing.assert_close(a, b)


# --- counting ---


def test_operations_of_a_pair_counted_by_hand():
    # D = 2: A d takes 3 multiply-adds, its squares 2; M takes 2 products w d and 3 multiply-adds.
    size = Size(1, 1, 2)
    assert roofline.operations(roofline.LOG_PROB, size, 1) == 2 * 5
    assert roofline.operations(roofline.LOG_PROB_BACKWARD, size, 1) == 2 * (5 + 5 + 3 + 5 + 3)
    assert roofline.operations(roofline.STATISTICS, size, 1) == 2 * (5 + 5 + 3)
    assert roofline.operations(roofline.STATISTICS, size, 0) == 2 * 5
    assert roofline.operations(roofline.LOG_PROB, Size(7, 3, 2), 4) == 21 * 2 * 5


def test_fma_loop_computes_what_it_counts():
    # s = 0.999 s + 0.001 in each chain goes to 1; the sum of one lane over all 12 is returned.
    assert peak._library().fma_float64(100_000) == pytest.approx(12)
    call, operations = peak.fma("float32", 2)
    assert call() == pytest.approx([12, 12], rel=1e-3)
    assert operations % (2 * 2 * peak.ROUNDS * 12) == 0


def test_torch_operators_nested_and_at_the_top():
    x = torch.ones(2, 2)
    assert throughput.count_operators(lambda: torch.add(x, x)) == (1, 1)
    nested, top_level = throughput.count_operators(lambda: torch.nn.functional.linear(x, x))
    assert top_level == 1
    assert nested > 1


def test_memory_of_a_points_by_components_matrix_is_seen():
    size = Size(2048, 100, 32)
    values = 4 * size.B * size.J * size.D
    assert scaling.peak_memory("matmul", size, 1)["peak_bytes"] > values
    assert scaling.peak_memory("vmm_fast", size, 1)["peak_bytes"] < values / 2


def test_exponent_of_a_power():
    rows = [{"D": d, "p50": 3e-6 * d**1.7} for d in (2, 5, 11)]
    assert scaling.exponent(rows, "D") == pytest.approx(1.7)


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


def test_quantiles():
    found = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"min": 1.0, "p20": 2.0, "p50": 3.5, "p80": 5.0, "repeats": 6}


def test_time_beside_a_part():
    sample = throughput.less(lambda calls: 5.0 * calls, lambda calls: 2.0 * calls)
    assert sample(4) == pytest.approx(12.0)
    disturbed = throughput.less(lambda calls: 5.0 * calls, lambda calls: 7.0 * calls)
    assert disturbed(4) == pytest.approx(2.0)


# --- rows, targets, comparison ---


def timed(provider="vmm_fast", p50=1e-3, spread=0.02, **fields):
    row = {"part": "throughput", "mode": throughput.PARAMETERS, "provider": provider}
    row |= {"B": 256, "J": 100, "D": 10, "threads": 2, "dtype": "float32", "cpu": "a"}
    return row | {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread), **fields}


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


def test_statistics_of_scikit_learn_are_scaled_linearly():
    ours, theirs = timed(p50=2.0, B=1_000_000), timed("GaussianMixture", 1.2, B=50_000)
    rows = [row | {"mode": throughput.EM_STEP} for row in (timed(B=50_000), ours, theirs)]
    (check,) = checks(rows)
    assert check.value == pytest.approx(12)
    assert "scaled linearly" in check.case


@pytest.fixture
def compared(tmp_path, capsys):
    """The exit status of comparing two lists of rows, and what is printed."""

    def run(before, after):
        paths = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
        for path, rows in zip(paths, (before, after), strict=True):
            write_rows(path, rows)
        status = compare.main(Namespace(before=paths[0], after=paths[1]))
        return status, capsys.readouterr().out

    return run


def test_compare_flags_a_planted_slowdown(compared):
    status, printed = compared([timed(), timed("matmul")], [timed(p50=1.2e-3), timed("matmul")])
    assert status == 1
    assert "slower: throughput" in printed
    assert "vmm_fast, B = 256, J = 100, D = 10, threads = 2" in printed
    assert "(1.20x)" in printed
    assert "1 slower, 0 faster, 1 same, 0 in one file alone" in printed


@pytest.mark.parametrize(
    "after",
    [
        timed(p50=1.04e-3, spread=0.001),  # within what the machine drifts
        timed(p50=1.2e-3, spread=0.3),  # within the noise of the rows
        timed(p50=0.8e-3),  # faster
    ],
)
def test_compare_lets_noise_pass(compared, after):
    status, printed = compared([timed()], [after])
    assert status == 0
    assert "0 slower" in printed
    assert ("1 faster" in printed) == (after["p50"] < 1e-3)


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


def test_rows_survive_a_file(tmp_path):
    rows = [{"a": 1.5, "b": None}, {"c": [1, 2]}]
    write_rows(tmp_path / "x.jsonl", rows)
    assert read_rows(tmp_path / "x.jsonl") == rows
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0]) == rows[0]
    assert select(rows, b=None, a=1.5) == rows[:1]


# --- on a GPU ---


def test_gpu_says_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("gpu", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stdout == "no GPU was found: torch.cuda.is_available() is False\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch.compile
def test_gpu_measures_every_part(tmp_path, monkeypatch, capsys):
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
    arguments = Namespace(quick=True, on_paper=False, out=str(tmp_path))
    assert gpu.main(arguments, ["gpu", "--quick"]) == 0
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
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_gpu_bound_counts_products():
    """At sizes that fill their tiles: J B products of [1, 32] and [32, 32]."""
    pytest.importorskip("triton", reason="Triton is not installed")
    size = Size(2**20, 10_000, 32)
    pairs = size.B * size.J
    forward, backward = (
        count(size, gpu_bound.H100) for count in (gpu_bound.log_prob, gpu_bound.backward)
    )
    assert forward.matrix == pairs * 2 * 32 * 32
    assert backward.matrix == 4 * forward.matrix + size.J * 2 * 32**3
    assert forward.launches == backward.launches == 1
    seconds = gpu_bound.times(forward, gpu_bound.H100)
    assert max(seconds, key=seconds.__getitem__) == "matrix units"


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of numpy, which the interpreter computes with
def test_gpu_bound_counts_what_the_kernels_multiply(monkeypatch):
    """Beyond 32 dimensions, in Triton's interpreter, which takes no product twice for once."""
    pytest.importorskip("triton", reason="Triton is not installed")
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


def test_gpu_bound_page(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    text = gpu_bound.write(tmp_path).read_text()
    assert all(device.name in text for device in gpu_bound.DEVICES)


# --- single cells ---


def integration_row(method, seed, **scores):
    batches = {"dataset": "pbmc3k_kang_3batch", "cells": 500, "types": 5, "batches": 3}
    metrics = ("isolated_labels", "silhouette_label", "clisi_knn")
    kinds = [f"{by}_{score}" for by in ("kmeans", "leiden") for score in ("nmi", "ari")]
    bio = dict.fromkeys(
        (*metrics, *(f"nmi_ari_cluster_labels_{kind}" for kind in kinds)), scores["bio"]
    )
    clusters = {"nmi": 0.5, "used": 7, "over_0.2_percent": 6, "rare_types": 2}
    row = {
        **{name: "1" for name in ("revision", "date", "python", "torch", "cpu")},
        **{name: "1" for name in ("scvi-tools", "scib-metrics", "scanpy")},
        **batches,
        "method": method,
        "seed": seed,
        "epochs": 1,
        "scib": {"Bio conservation": scores["bio"], "Batch correction": 0.7, **bio},
        "leiden": {"ari": scores["leiden"], "rare_types_kept": 1, **clusters},
        "pcr": {"before": 0.2, "after": 0.1},
    }
    if "own" in scores:
        row["own"] = {"ari": scores["own"], "rare_types_kept": 2, "nmi_batch": 0.1, **clusters}
    return row


def test_integration_page(tmp_path):
    rows = [integration_row("vmm", seed, bio=0.6 + seed / 10, leiden=0.5, own=0.55)
            for seed in range(3)]  # fmt: skip
    rows += [integration_row("normal", seed, bio=0.71, leiden=0.5) for seed in range(3)]
    rows += [integration_row("scvi", seed, bio=0.65, leiden=0.54) for seed in range(3)]
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


def test_steps_of_scvi_have_targets_beside_stock():
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    plan = scvi_step.QUICK._replace(batches=(128,))
    rows = list(scvi_step.rows(plan, 1))
    assert {row["provider"] for row in rows} == {scvi_step.STOCK, *scvi_step.PRIORS}
    (check,) = checks(rows)
    assert check.value > 0
    assert check.limit == 0.75


class Work(torch.autograd.Function):
    """Identity that takes so long forward and back, by a clock that nothing else moves."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.seconds = clock, backward
        clock["now"] += forward
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock["now"] += ctx.seconds
        return gradient, None, None, None


def test_clock_counts_each_phase_forward_and_back(monkeypatch):
    work = {"now": 0.0}
    monkeypatch.setattr(scvi_epoch.time, "process_time", lambda: work["now"])
    clock = scvi_epoch.Clock()

    def part(phase, forward, backward):
        return clock.within(phase, lambda x: Work.apply(x, work, forward, backward))

    encode = part(scvi_epoch.ENCODER, 1, 100)
    decode = part(scvi_epoch.DECODER, 2, 200)
    divergence = part(scvi_epoch.KL, 3, 300)

    def loss(z, decoded):
        # The second use of z comes after the decoder: its gradient is found before the decoder's.
        kl = divergence(z)
        return (kl * Work.apply(decoded, work, 4, 400)).sum()

    def step():
        work["now"] += 5
        z = encode(weight * 2)
        found = clock.within(scvi_epoch.LIKELIHOOD, loss)(z, decode(z))
        work["now"] += 6
        clock.backward(torch.Tensor.backward)(found)
        work["now"] += 7
        return found

    weight = torch.ones(3, requires_grad=True)

    def optimizer_step(closure):
        work["now"] += 8
        closure()

    for _ in range(2):
        clock.step(optimizer_step)(step)
    expected = {
        scvi_epoch.ENCODER: 1,
        scvi_epoch.DECODER: 2,
        scvi_epoch.KL: 3,
        scvi_epoch.LIKELIHOOD: 4,
        scvi_epoch.NETWORK_BACKWARD: 300,
        scvi_epoch.KL_BACKWARD: 300,
        scvi_epoch.LIKELIHOOD_BACKWARD: 400,
        scvi_epoch.OPTIMIZER: 8,
        scvi_epoch.REST: 5 + 6 + 7,
    }
    found = {phase: seconds for phase, seconds in clock.stop().items() if seconds}
    assert found == {phase: 2 * seconds for phase, seconds in expected.items()}
    assert sum(found.values()) == work["now"]


@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
def test_epoch_of_scvi_by_phase(monkeypatch):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    replaced = torch.distributions.kl_divergence, _BaseDataLoaderIter.__next__
    rows = list(scvi_epoch.rows(scvi_epoch.QUICK))
    assert (torch.distributions.kl_divergence, _BaseDataLoaderIter.__next__) == replaced
    found = {row["provider"]: row["phases"] for row in rows}
    learnt = {scvi_epoch.BEFORE, scvi_epoch.VMM}
    assert set(found) == {*learnt, scvi_epoch.STOCK, scvi_epoch.NORMAL}
    for name, phases in found.items():
        without = set() if name in learnt else {scvi_epoch.PRIOR}
        assert {phase for phase, seconds in phases.items() if seconds > 0} == (
            set(scvi_epoch.PHASES) - without
        )
    assert not list(checks(rows))  # the target is of steps


def test_before_has_neither_our_likelihood_nor_our_adam():
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    from vmm_fast.scvi.integration import quiet

    with quiet():
        models = scvi_epoch.models(scvi_epoch.QUICK)
    plans = {name: model._training_plan_cls(model.module) for name, model in models.items()}
    fused = {
        name: plan.configure_optimizers()["optimizer"].param_groups[0]["fused"]
        for name, plan in plans.items()
    }
    ours = {scvi_epoch.VMM: True, scvi_epoch.NORMAL: True}
    assert fused == {scvi_epoch.STOCK: None, scvi_epoch.BEFORE: None, **ours}
    likelihoods = {name: getattr(m.module, "fused_likelihood", None) for name, m in models.items()}
    assert likelihoods == {scvi_epoch.STOCK: None, scvi_epoch.BEFORE: False, **ours}


def test_two_processes_have_a_target_beside_one():
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    (size,) = processes.QUICK.batches
    one, two = processes.rows(processes.QUICK, 2)
    assert (one["provider"], two["provider"]) == (processes.ONE, "2 processes")
    assert two["cells/s"] == pytest.approx(size / two["p50"], rel=0.01)
    (check,) = checks([one, two])
    assert check.value == two["times as fast"] == pytest.approx(one["p50"] / two["p50"], rel=0.01)


def test_likelihoods_have_a_target_beside_scvi_tools():
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    (case,) = likelihood.QUICK.densities
    x, *_ = likelihood.problem(200, 100, case)
    assert float((x > 0).float().mean()) == pytest.approx(case, abs=0.02)
    rows = list(likelihood.rows(likelihood.QUICK, 1))
    assert len(rows) == len(likelihood.MODELS) * 2 * 2 + 3 * 2
    assert not list(checks(rows))
    (check,) = checks([{**row, "B": 512, "genes": 2000, "density": 0.1} for row in rows])
    assert check.value > 0
    assert check.limit == 8


def test_a_wrong_likelihood_is_not_timed(monkeypatch):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    wrong = {"Poisson": (lambda x, mean: mean.sum(-1), 1)}
    monkeypatch.setattr(likelihood, "MODELS", wrong)
    with pytest.raises(ValueError, match="vmm_fast gives"):
        list(likelihood.rows(likelihood.QUICK, 1))
