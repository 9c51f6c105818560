"""The benchmarks run end to end and compute what they claim."""

import gc
import math
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from support import separated_cells

from bench import (
    __main__,
    alone,
    doublets,
    estimators,
    gpu,
    gpu_bound,
    integration,
    likelihood,
    novelty,
    peak,
    peers,
    providers,
    records,
    report,
    runner,
    settings,
    throughput,
)
from bench.measurement import TOLERANCE, Check, Less, Run, relative
from bench.problems import Size, whitened
from bench.records import RESULTS, command, read_rows, select
from bench.registry import ALL, MEASUREMENTS
from bench.timing import quantiles, take_turns
from vmm_fast import _core

BACKWARD, PARAMETERS = "forward + backward", "forward + backward from (m, S, L, pi)"


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a command in this process; return its exit status and output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        return __main__.main(), capsys.readouterr().out

    return run


def measured(bench, folder, part, targets):
    """Run a part with --quick; return its rows, after checking that all are there."""
    status, printed = bench(part, "--quick", "--threads", 1, "--out", folder)
    assert status == 0
    rows = read_rows(folder / f"{part}.jsonl")
    for row in rows:
        assert row["command"] == f"python -m bench {part} --quick --threads 1"
        assert all(row[key] for key in ("revision", "torch", "cpu", "openmp", "threads"))
        if "p50" in row:
            assert 0 < row["min"] <= row["p20"] <= row["p50"] <= row["p80"] < math.inf
            assert row.get("error", 0) < TOLERANCE
    checks = list(MEASUREMENTS[part].checks(rows))
    assert len(checks) == targets
    for check in checks:
        assert math.isfinite(check.value)
        assert f"{check.verdict:6}  {check.target}, {check.case}: {check.measured}" in printed
    return rows


@pytest.fixture
def in_this_process(monkeypatch):
    """Let measurements that take a process of their own take this one."""

    def here(function, threads, **arguments):
        return function(**arguments)

    monkeypatch.setattr(alone, "run", here)


@pytest.mark.usefixtures("in_this_process")
def test_throughput_limits_and_training_steps(bench, tmp_path):
    rows = measured(bench, tmp_path, "throughput", targets=8)
    modes = {row["mode"]: [] for row in rows}
    for row in rows:
        modes[row["mode"]].append(row["provider"])
    without_peer = [mode for mode, found in modes.items() if set(found) == {"vmm_fast"}]
    assert len(modes) == 9 and without_peer == ["memory"]
    bounds = [check for check in MEASUREMENTS["throughput"].checks(rows) if check.bound]
    assert [check.case for check in bounds] == ["(32, 5, 3)", "geometric mean", "(1, 1, 1)"]
    (row,) = select(rows, mode="memory")
    # Neither interpreter and libraries nor a number for each (point, component, D).
    assert 0 < row["peak_bytes"] < 4 * row["B"] * row["J"] * row["D"] / 2
    rows = measured(bench, tmp_path, "limits", targets=8)
    assert len(select(rows, axis=None)) == 6 and len(rows) == 6 + 12  # kernels and the peak; axes
    assert len(measured(bench, tmp_path, "step", targets=0)) == 7  # priors


@pytest.mark.usefixtures("in_this_process")
def test_estimators(bench, tmp_path, monkeypatch):
    own = {name: module for name, module in estimators.PROVIDERS.items() if module == "sklearn"}
    monkeypatch.setattr(estimators, "PROVIDERS", own)
    rows = measured(bench, tmp_path, "estimators", targets=2)
    few, many = rows[:3], rows[3:]
    assert [row["provider"] for row in few] == [row["provider"] for row in many] == list(own)
    assert [row["scaled"] for row in rows] == [False] * 4 + [True] * 2
    for row, whole in zip(many[1:], few[1:], strict=True):
        assert row["iterations"] == whole["iterations"] and "log_likelihood" not in row
        parts = row["start_seconds"] + row["iterations"] * row["iteration_seconds"]
        assert row["seconds"] == pytest.approx(parts)
    # Likelihoods are those of the estimators themselves.
    x, _, held_out, _ = estimators.points(estimators.SYNTHETIC, 400)
    for name in own:
        found = estimators.ESTIMATES.get(name, partial(estimators.sklearn, name))(x, 3, 200)
        own_score = found.assign.__self__.score(held_out)
        close = 1e-4 if name != estimators.BAYESIAN else 0.05  # which scores with expectations
        assert estimators.log_likelihood(found, held_out) == pytest.approx(own_score, rel=close)


@pytest.mark.filterwarnings("ignore")  # scvi-tools' own
@pytest.mark.usefixtures("in_this_process")
def test_abundance(bench, tmp_path):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    rows = measured(bench, tmp_path, "abundance", targets=3)
    assert [(row["provider"], row["J"]) for row in rows] == [
        *(("scvi-tools", 1_000), ("vmm_fast", 1_000), ("vmm_fast", 10_000), ("vmm_fast", 20_000))
    ]
    assert [row.get("difference", 1) < 1e-5 for row in rows] == [False, True, False, False]
    assert "| 1,000 | vmm_fast | " in (tmp_path / "speed.md").read_text()


@pytest.mark.slow("trains seven models of scVI")
@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
def test_likelihoods_and_steps_of_scvi(bench, tmp_path, monkeypatch):
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    rows = measured(bench, tmp_path, "likelihood", targets=0)
    assert {row["provider"] for row in rows} == {
        *("vmm_fast", "scvi-tools"),
        "vmm_fast, softmax before",
    }
    monkeypatch.setattr(scvi.settings, "verbosity", scvi.settings.verbosity)
    stock, *others = measured(bench, tmp_path, "scvi-step", targets=0)
    assert stock["provider"] == "SCVI" and len(others) == 7


@pytest.mark.skipif(not (RESULTS / "speed.md").exists(), reason="bench/results is not there")
def test_published_pages_are_those_of_the_published_rows(bench, tmp_path, monkeypatch):
    pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")
    # Of the pictures, whose pixels differ between versions, the names alone are compared.
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)
    for path in RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert bench("report", "--out", tmp_path)[0] == 0
    assert bench("gpu", "--on-paper", "--out", tmp_path)[0] == 0
    for name in ("speed", "gpu-roofline", "integration", "settings", "clusters"):
        assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in RESULTS.glob("*.png")}


def test_command_line(bench, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(runner, "run", lambda of, args: done.append(of.name) or len(done) == 2)
    assert bench("all", "--quick") == (1, "")
    assert tuple(done) == ALL
    nothing = f"no results in {tmp_path}: run python -m bench throughput first\n"
    assert bench("report", "--out", tmp_path) == (1, nothing)
    given = "step --out=here --data there --threads 2 --resume"
    assert command(given.split()) == "python -m bench step --threads 2"


def test_what_is_missing_is_told(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU was found"):
        bench("gpu", "--out", tmp_path)
    needs = MEASUREMENTS["step"]._replace(needs=("no_such_module",))
    monkeypatch.setitem(MEASUREMENTS, "step", needs)
    left_out = 'step is left out: pip install "vmm-fast[bench]"\n'
    assert bench("step", "--out", tmp_path) == (0, left_out)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_kept_where_a_later_one_fails(bench, tmp_path, monkeypatch):
    def rows(run):
        yield {"mode": "one", "provider": "vmm_fast"}
        raise RuntimeError("two")

    monkeypatch.setitem(MEASUREMENTS, "step", MEASUREMENTS["step"]._replace(rows=rows))
    with pytest.raises(RuntimeError, match="two"):
        bench("step", "--out", tmp_path)
    (row,) = read_rows(tmp_path / "step-unfinished.jsonl")
    assert not (tmp_path / "step.jsonl").exists()
    assert (row["part"], row["mode"], row["threads"]) == ("step", "one", 2)


def test_rows_of_other_machines_stay_and_have_tables_of_their_own(bench, tmp_path, monkeypatch):
    def rows(run):
        times = {"N(0, I)": 1.0, "VMM, gradient": runs.pop(0)}
        for provider, time in times.items():
            yield {"mode": "step", "provider": provider, "B": 256, "p50": time}

    monkeypatch.setitem(MEASUREMENTS, "step", MEASUREMENTS["step"]._replace(rows=rows))
    runs = [1.5, 1.25, 1.0]
    for cpu in ("old", "new", "new"):
        monkeypatch.setattr(records, "_cpu_name", lambda cpu=cpu: cpu)
        assert bench("step", "--out", tmp_path, "--threads", 1)[0] == 0
    page = (tmp_path / "speed.md").read_text()
    _, old, new = page.split("## Targets on ")
    for text, cpu, measured in ((old, "old", "**1.5x** (1x)"), (new, "new", "1x (1x)")):
        assert text.startswith(f"{cpu}, {_core.instruction_set()}, 1 thread\n")
        assert f"| B = 256 | at most 1.1x | {measured} |" in text
    assert page.count("`python -m bench step --threads 1`") == 2


def test_wrong_results_are_not_timed(monkeypatch):
    run = Run(Namespace(quick=True, threads=1))
    wrong = {"wrong": lambda p: 1.01 * providers.torch_distributions(p)}
    monkeypatch.setattr(providers, "PARAMETER_DENSITIES", wrong)
    with pytest.raises(RuntimeError, match=r"wrong, .* error 0\.01"):
        list(throughput.density_rows(run, PARAMETERS, Size(32, 5, 3)))
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    monkeypatch.setattr(likelihood, "MODELS", {"Poisson": (lambda x, mean: mean.sum(-1), 1)})
    with pytest.raises(RuntimeError, match="vmm_fast, Poisson"):
        list(likelihood.rows(run))


def test_providers_take_turns_without_garbage_collection():
    turns = []

    def sample(name, seconds, calls):
        turns.append((name, calls, gc.isenabled()))
        return seconds * calls

    samplers = {"a": partial(sample, "a", 1e-4), "b": partial(sample, "b", 2.0)}
    timings = take_turns(samplers, repeats=3, seconds=0)
    assert gc.isenabled()
    # An untimed call before each batch of a cheap provider, none before an expensive one.
    assert turns[-9:] == 3 * [("a", 1, False), ("a", 10, False), ("b", 1, False)]
    assert timings["a"]["p50"] == pytest.approx(1e-4)
    assert timings["b"] == {"min": 2.0, "p20": 2.0, "p50": 2.0, "p80": 2.0, "repeats": 3}
    found = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"min": 1.0, "p20": 2.0, "p50": 3.5, "p80": 5.0, "repeats": 6}


def test_time_beside_a_part_operations_and_density_of_counts_by_hand(monkeypatch):
    monkeypatch.setattr("bench.measurement.sampler", lambda seconds: lambda calls: seconds * calls)
    for part, left in ((2.0, 12.0), (7.0, 2.0)):  # a disturbed part leaves a tenth
        assert Less(5.0, part).sample(4) == pytest.approx(left)
    # D = 2: A d takes 3 multiply-adds, its squares 2; M takes 2 products w d and 3 multiply-adds.
    assert peak.operations("log_prob", Size(1, 1, 2), 1) == 2 * 5
    assert peak.operations("log_prob, backward", Size(1, 1, 2), 1) == 2 * (5 + 5 + 3 + 5 + 3)
    assert peak.operations("statistics", Size(7, 3, 2), 4) == 2 * (21 * 5 + 4 * (5 + 3))
    counts, *_ = likelihood.problem(200, 100, 0.1)
    assert float((counts > 0).float().mean()) == pytest.approx(0.1, abs=0.02)


def timed(part, mode, times, **fields):
    """Return one row for each provider, with this median."""
    row = {"part": part, "mode": mode, "dtype": "float32", "threads": 2}
    row |= {"B": 256, "J": 100, "D": 10}
    return [
        {**row, "provider": provider, "p20": 0.98 * p50, "p50": p50, "p80": 1.02 * p50, **fields}
        for provider, p50 in times.items()
    ]


def test_ratios_are_of_the_same_case():
    times = {"SCVI": 2.0, "VMM": 1.0}
    rows = timed("scvi-step", "one", times) + timed("scvi-step", "one", {"VMM": 6.0}, genes=9)
    rows += timed("scvi-step", "one", {"SCVI": 3.0, "VMM": 6.0}, B=512)
    found = relative(rows, "SCVI", provider="VMM")
    assert [(row["B"], row["ratio"]) for row in relative(rows, "SCVI")][1::2] == [
        *((256, 0.5), (512, 2.0))
    ]
    assert found == []  # selected before they are compared
    met = [check.met for check in MEASUREMENTS["scvi-step"].checks(rows)]
    assert met == [False]  # at 512; no limit at 256


def test_targets_of_rows_by_hand():
    rows, throughput = [], partial(timed, "throughput")
    # Rows of one size are compared; more is asked at large ones.
    for size, times in ({}, 11.0), ({"B": 4096, "J": 500}, 24.0):
        rows += throughput(PARAMETERS, {"vmm_fast": 1.0, "torch.distributions": times}, **size)
    # The fastest of the others counts, and the geometric mean over sizes.
    rows += throughput(BACKWARD, {"vmm_fast": 1.0, "KeOps": 9.0, "matmul": 6.0})
    rows += throughput(BACKWARD, {"vmm_fast": 2.0, "KeOps": 48.0, "matmul": 60.0}, B=512)
    # scikit-learn is scaled linearly to the size that we ran.
    rows += throughput("E- and M-step", {"vmm_fast": 1e-3, "GaussianMixture": 1.2}, B=50_000)
    rows += throughput("E- and M-step", {"vmm_fast": 2.0}, B=1_000_000)
    # An empty call takes 1 s, what a pair needs at D = 10 two at the peak's rate.
    needed = 2 * 256 * 100 * (65 + 65 + 55 + 65 + 11)
    bound = throughput("FMA peak", {"machine": 4.0}, operations=2 * needed)
    bound += throughput("call overhead", {"empty autograd function": 1.0})
    bounded = MEASUREMENTS["throughput"].checks([*rows[4:7], *bound])
    assert [check.at_best for check in bounded] == 2 * [" (2x)"]  # 6 s of 1 + 2
    # The memory of the largest size, in MiB.
    for size, mib in ((9, 9), (900, 2048)):
        rows += throughput("memory", {"vmm_fast": 1.0}, B=size, peak_bytes=mib * 2**20)
    # The share of the peak that was measured at the same size, on most threads.
    for count, share in ((1, 94), (2, 78)):
        for mode, number in (("FMA peak", 100), ("log_prob", share)):
            one = {"threads": count, "operations": number}
            rows += timed("limits", mode, {"vmm_fast": 2.0}, **one)
    # Exponents may be a tenth over the limit.
    for axis, power in (("B", 1.0), ("J", 1.2), ("D", 2.0)):
        for n in (2, 5, 11):
            time = {"vmm_fast": 1e-6 * n**power}
            rows += timed("limits", "forward", time, **{"axis": axis, axis: n})
    # Memory of the largest atlas, in GiB and against that of 100,000 cells; loader and training.
    atlas = partial(timed, "atlas", times={"VMM": 1.0}, cells=1_000_000)
    rows += atlas("integrate", cells=100_000, peak_bytes=2**30)
    rows += atlas("integrate", peak_bytes=2**30 * 5 // 4)
    rows += atlas("loader", **{"cells/s": 30.0}) + atlas("training from disk", **{"cells/s": 20.0})
    values = {"throughput": [11, -24, 6, 24, 12, 12, -2048], "atlas": [1.25, -1.25, -1.5]}
    values["limits"] = [78, 1.0, -1.2, 2.0]
    for name, expected in values.items():  # those below 0 are missed
        checks = list(MEASUREMENTS[name].checks(select(rows, part=name)))
        assert [check.value for check in checks] == pytest.approx(np.abs(expected))
        assert [check.met for check in checks] == [value > 0 for value in expected]


def test_targets_have_a_table_for_each_machine():
    slow, fast = Check("a step", "B = 1", 2.0, 1.5, at_least=False, bound=1.0), Check("x", "", 9, 8)
    head = "| work | case | asked | measured |\n| --- | --- | --- | --- |\n"
    assert report.target_tables([("one", slow), ("two", fast), ("one", fast)]) == (
        f"## Targets on one\n\n{head}| a step | B = 1 | at most 1.5x | **2x** (1x) |\n"
        f"| x |  | at least 8x | 9x |\n\n## Targets on two\n\n{head}| x |  | at least 8x | 9x |\n"
    )


def test_gpu_measures_every_part(bench, tmp_path, monkeypatch):
    """With the CPU in the GPU's place: all but the device's own calls."""
    pytest.importorskip("triton", "3.5", reason="needs Triton 3.5")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    calls = ("is_available", "get_device_name", "synchronize", "reset_peak_memory_stats")
    for name in (*calls, "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    once = partial(take_turns, repeats=1, seconds=0.0)
    monkeypatch.setattr(gpu, "take_turns", lambda samplers, **_: once(samplers))
    assert bench("gpu", "--quick", "--out", tmp_path)[0] == 0
    rows = read_rows(tmp_path / "gpu.jsonl")
    assert len({row["mode"] for row in rows}) == 8
    assert all("error" in row for row in select(rows, mode="kernel"))
    for row in rows:
        assert row.get("error", 0) < TOLERANCE and row["gpu"] == 1
    for row in select(rows, mode="kernel"):
        assert row["fraction"] == row["bound"] / row["p50"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_gpu_bound_counts_what_the_kernels_multiply(quick_interpreter, monkeypatch):
    """Beyond 32 dimensions, in Triton's interpreter, which takes no product twice for once."""
    from triton.runtime.interpreter import InterpreterBuilder

    multiply, counted = InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, *rest):
        counted.append(2 * a.data.size * b.data.shape[1])
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr("vmm_fast.backends.FORCED", "triton")
    size = Size(5, 2, 70)
    device = gpu_bound.DEVICES[-1]  # of the interpreter's tiles
    for name, call in gpu.kernels(whitened(size)).items():
        names = ["log_prob", name] if name == "log_prob, backward" else [name]
        counted.clear()
        call()
        assert sum(counted) == sum(gpu_bound.work(n, size, device).matrix for n in names), name


def test_integration_compares_means_over_all_seeds():
    scores = ["isolated_labels", "silhouette_label", "clisi_knn"]
    scores += ["nmi_ari_cluster_labels_kmeans_nmi", "nmi_ari_cluster_labels_kmeans_ari"]
    rows = []
    for seed in range(5):
        for method, bio in (("vmm", 0.6 + 0.05 * seed), ("normal", 0.69), ("scvi", 0.71)):
            row = {"dataset": integration.DATASETS[0], "method": method, "seed": seed}
            row["scib"] = {"Batch correction": 0.7, **dict.fromkeys(scores, bio)}
            for clusters, ari, rare in (("own", 0.55, 1), ("leiden", 0.5, 1), ("matched", 0.6, 2)):
                row[clusters] = {"ari": ari, "rare_types_kept": rare}
            rows.append(row)
    lines = integration.targets(rows)
    assert [line.split(":")[0] for line in lines] == ["met", "MISSED", "met", "MISSED"]
    assert "scib total of VMM 0.700 ± 0.047 above" in lines[0]  # 0.6 bio + 0.4 batch
    assert "ARI of VMM's clusters 0.550, above on 1, Leiden's at resolution 1 0.500" in lines[2]
    assert "rare types kept 1.0 and 2.0" in lines[3]
    assert all(line.startswith("open") for line in integration.targets(rows[3:])[:2])
    labels = np.array(["common"] * 990 + ["rare"] * 10)
    for start, kept in ((990, 1), (975, 1), (965, 0)):  # F1 of 1, 4 / 7 and 4 / 9
        assert integration._clusters(labels, np.arange(1000) >= start)["rare_types_kept"] == kept


def test_a_comparison_keeps_its_rows_and_has_a_line_for_each_method(bench, tmp_path, monkeypatch):
    scored = []

    def score(dataset, method, seed, args):
        scored.append((dataset, method, seed))
        found = {"number": "found", "scored": "test", "clusters": 12 + seed, "clusters_active": 10}
        found |= {"accuracy_one_to_one": 0.9, "nmi": 0.8, "ari": 0.7 + 0.1 * seed}
        return {**found, "seconds": 60}

    of = peers.PEERS._replace(score=score)
    monkeypatch.setitem(MEASUREMENTS, "peers", peers.measurement(of, ""))
    folders = ("--kept", tmp_path / "kept", "--out", tmp_path)
    for methods, seeds in ((["leiden"], [0]), (["vmm"], [0, 1]), (["vmm"], [1])):
        options = ("--methods", *methods, "--seeds", *seeds, *folders)
        assert bench("peers", "--dataset", "mnist", *options)[0] == 0
    assert scored == [("mnist", "leiden", 0), ("mnist", "vmm", 0), ("mnist", "vmm", 1)]
    rows = read_rows(tmp_path / "peers.jsonl")
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("vmm", 0), ("vmm", 1), ("leiden", 0))
    ]
    repeat = "python -m bench peers --dataset mnist --methods leiden --seeds 0"
    assert (rows[-1]["command"], rows[-1]["part"], rows[-1]["threads"]) == (repeat, "peers", 1)
    page = (tmp_path / "peers.md").read_text()
    vmm = "| VMM, as `vmm-fast cluster` | 2 | found | test | 12.5 ± 0.7 | 10.0 ± 0.0 | "
    vmm += "0.900 ± 0.000 | 0.800 ± 0.000 | 0.750 ± 0.071 | 60 ± 0 |\n"
    leiden = "| N(0, I), same network, Leiden | 1 | found | test | 12.0 | 10.0 | 0.900 | 0.800 | "
    assert vmm + leiden in page
    assert peers.DATASETS["mnist"] in page and peers.DATASETS["demo"] not in page


@pytest.fixture
def cells_of_equal_size(tmp_path):
    """Write cells with 200 counts each under the name of a data set; return their counts."""
    pytest.importorskip("anndata", reason="anndata is not installed")
    cells = separated_cells(300, genes=300)
    cells.obs["cell_type"] = cells.obs["cluster"]
    rates = cells.X.toarray().astype(float)
    counts = np.random.default_rng(0).multinomial(200, rates / rates.sum(1, keepdims=True))
    cells.X = csr_matrix(counts.astype(np.float32))
    cells.write_h5ad(tmp_path / "pbmc3k.h5ad")
    return counts


@pytest.mark.filterwarnings("ignore")  # scvi-tools' own
def test_doublets_are_sums_of_two_cells(cells_of_equal_size, tmp_path, monkeypatch):
    batches = np.array(["a"] * 40 + ["b"] * 60)
    first, second = doublets.pairs(batches, 0.5, seed=0)
    assert (batches[first] == batches[second]).all() and (first != second).all()
    assert np.bincount(batches[first] == "b").tolist() == [20, 30]
    monkeypatch.setattr(novelty, "trained", lambda *_: model)
    model = Namespace(_latents=lambda cells: torch.from_numpy(cells.X.toarray()).log1p())
    on = doublets.problem("pbmc3k", 0, str(tmp_path), 1)
    counts = on.query.X.toarray()
    assert np.array_equal(counts[:300], cells_of_equal_size)
    assert (counts.sum(1) == [200] * 300 + [400] * 30).all()
    kinds = (doublets.DIFFERENT, doublets.SAME)
    assert (on.types[:300] == "").all() and np.isin(on.types[300:], kinds).all()
    size = doublets.size(on.query)
    assert novelty.area(size, on.types, *kinds) == 0.5
    assert [novelty.area(size, on.types, kind) for kind in kinds] == [1, 1]
    # Where nothing is lost in the latent space, simulated doublets lie about the others.
    assert novelty.area(doublets.near(on, on.query.X), on.types, doublets.DIFFERENT) > 0.95


@pytest.mark.slow("trains a model of scVI")
@pytest.mark.filterwarnings("ignore")  # scvi-tools' and Lightning's own
def test_doublets_by_every_method(bench, cells_of_equal_size, tmp_path):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    options = ("--dataset", "pbmc3k", "--seeds", 0, "--epochs", 30, "--data", tmp_path)
    assert bench("doublets", *options, "--kept", tmp_path / "kept", "--out", tmp_path)[0] == 0
    rows = read_rows(tmp_path / "doublets.jsonl")
    found = {row["method"]: row["auroc"] for row in rows}
    assert list(found) == list(doublets.METHODS)
    assert found["size"]["different"] == 1 and found["decoded"]["different"] > 0.7
    assert (
        "\n| number of counts | 1 | 1.000 | 1.000 | 0.500 |\n"
        in (tmp_path / "doublets.md").read_text()
    )


def test_doublets_say_what_is_better_than_size():
    areas = {"decoded": 0.8, "size": 0.9, "scrublet": 0.7, "sums": 0.8}
    rows = [
        {"method": name, "dataset": dataset, "seed": seed, "auroc": {"different": area}}
        for name, area in areas.items()
        for dataset in novelty.LEFT_OUT
        for seed in range(3)
    ]
    assert doublets.COMPARISON.verdicts(rows) == [
        "MISSED: AUROC of decoded pairs 0.800 above that of the number of counts, 0.900",
        "met: AUROC of decoded pairs 0.800 above that of the score of Scrublet, 0.700",
        "MISSED: AUROC of decoded pairs 0.800 above that of the pairs of cells' own counts, 0.800",
    ]


def test_means_under_the_normal_prior_are_kept(tmp_path, monkeypatch):
    trained = []

    def train_with(prior, problem):
        trained.append(problem)
        return [Namespace(z=torch.arange(3.0))]

    monkeypatch.setattr(peers, "train_with", train_with)
    for problem in ("one", "other"):
        (means,), seconds = peers.normal_means(problem, tmp_path / "kept.pt")
        assert means.tolist() == [0.0, 1.0, 2.0] and seconds >= 0
    assert trained == ["one"]


@pytest.mark.parametrize(
    ("clusters", "nmi", "verdict"),
    [(12, 0.82, "met"), (16, 0.8, "MISSED"), (10, 0.84, "MISSED")],
)
def test_settings_say_how_much_clusters_depend_on_them(clusters, nmi, verdict):
    found = {"components-50": (10, 0.8), "components-200": (clusters, nmi)}
    found |= {"components-10": (2, 0.1)}  # too few to be free
    found |= {"epochs-50": (99, 0.0)}
    rows = [
        {"dataset": "demo", "method": name, "clusters": number, "nmi": score}
        for name, (number, score) in found.items()
    ]
    (said,) = settings.verdicts([*rows, rows[1]])
    assert f"demo, components: {verdict}, clusters" in said and f"NMI 0.800 to {nmi:.3f}" in said


@pytest.mark.slow("kills processes and runs them again")
def test_kills_lose_nothing(tmp_path):
    options = ["--number", "4", "--commands", "cluster", "prepare", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench", "kills", *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    rows = read_rows(tmp_path / "kills.jsonl")
    assert [row["name"] for row in rows] == ["cluster", "prepare"]
    assert all(sum(row["kills"].values()) == 2 and row["lost"] == [] for row in rows)
