"""Tables, pictures and the page speed.md, all from the JSON lines of the measured parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from bench import (
    atlas,
    likelihood,
    out_of_core,
    processes,
    roofline,
    scaling,
    scvi_epoch,
    scvi_step,
    step,
    throughput,
)
from bench.records import Row, read_rows, select
from bench.targets import Check, checks, fraction_of_peak
from vmm_fast._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = (
    *("throughput", "roofline", "scaling", "step"),
    *("likelihood", "scvi-step", "atlas", "processes"),
)
HEADINGS = {  # of the others, their names
    "likelihood": "Likelihood of counts",
    "scvi-step": "scVI step",
    "processes": "Several processes",
}

# Why a target is missed and what to try next, by how its name begins.
REASONS: dict[str, str] = {
    "log_prob: share": "At D = 10 a pair's 65 multiply-adds come with some 20 cycles a vector that "
    "are not counted: subtracting the center, the exponential, the maximum. The start of threads, "
    "packing and Python take a tenth of a call. Next: A z - A m for A (z - m) where centers are so "
    "near that it is as precise.",
    "log_prob, backward: share": "As above. Besides, at D = 10 the sums are over so few products "
    "that storing d, w d and the sums' lanes takes as long as they do. Next: a body for each small "
    "dimension that keeps d and y in registers, as the forward pass has.",
    "forward + backward from (m, S, L, pi)": "At B = 256 a third of the time at D = 10 is Python "
    "and autograd around four calls of the core; at D = 30 half of it is building the components "
    "and their gradients, in float64. Next: autograd functions in C++; float32 where the condition "
    "of a component allows it.",
    "forward + backward from A": "At B = 256 the [B, J] matrices of the others stay in the cache, "
    "and at D = 30 theirs is one matrix product at the peak's rate; it does not subtract first and "
    "loses digits as centers move away from the origin. Next: y kept from the forward pass while "
    "it fits the cache, which saves a quarter of the operations.",
    "empirical-Bayes step": "At D = 10 half of the time is Python: gradients go on through the "
    "encoder by torch.autograd.grad, and checks and views are taken anew in each step. At D = 30 "
    "the float64 arithmetic on components counts as much as the points do. Next: views kept from "
    "step to step; float32 where the condition of a component allows it.",
    "E- and M-step": "Storing d, w d and the sums' lanes for every tile keeps the sums at half of "
    "the peak. Next: tiles by the size of the first-level cache.",
    "training step": "Matrix products of the encoder on the pseudo-inputs: J rows pass it forward "
    "and back beside the batch's in `kl`, and once more in `update`, which at J = 100 and B = 256 "
    "is a third of all products of the step with N(0, I). Next: fewer pseudo-inputs a step.",
    "scVI training, 2 processes": "Pseudo-cells, Adam and the average of 4 MB of gradients cost a "
    "process the same for half of the cells. Next: pseudo-cells shared out among the processes.",
    "scVI training": "What the prior adds is mostly two encodings of the pseudo-cells a step, "
    "which do not grow with the batch. Next: fewer pseudo-cells a step.",
    "call overhead": "More than half of it is a torch.autograd.Function that does nothing; the "
    "rest is checks and allocations. Next: a C++ autograd function.",
}

COLORS = {
    "vmm_fast": "C0",
    "matmul": "C1",
    "torch.compile": "C2",
    "KeOps": "C3",
    "torch.distributions": "C4",
    "TensorFlow Probability": "C5",
    "torch": "C1",
    "GaussianMixture": "C6",
    "BayesianGaussianMixture": "C8",
    "torchgmm": "C9",
}
KERNEL_COLORS = {kernel: f"C{i}" for i, kernel in enumerate(roofline.KERNELS)}
SIZE_MARKERS = "os^Dv*"
# Forward and backward of a part share a hue.
PHASE_COLORS = {
    scvi_epoch.READING: "0.45",
    scvi_epoch.ENCODER: "#9ecae1",
    scvi_epoch.DECODER: "#4292c6",
    scvi_epoch.NETWORK_BACKWARD: "#084594",
    scvi_epoch.LIKELIHOOD: "#fdae6b",
    scvi_epoch.LIKELIHOOD_BACKWARD: "#e6550d",
    scvi_epoch.KL: "#a1d99b",
    scvi_epoch.KL_BACKWARD: "#31a354",
    scvi_epoch.PRIOR: "#54278f",
    scvi_epoch.OPTIMIZER: "#9e9ac8",
    scvi_epoch.LOGGING: "#e7ba52",
    scvi_epoch.REST: "0.8",
}


# --- tables ---


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            value = seconds / scale
            return (f"{value:.0f}" if value >= 99.5 else f"{value:.3g}") + f" {unit}"
    raise AssertionError


def target_table(found: Sequence[Check]) -> str:
    """Each target with what was measured and the verdict."""
    lines = []
    for check in found:
        verdict = check.verdict if check.met else f"**{check.verdict}**"
        lines.append((check.target, check.case, check.measured, check.asked, verdict))
    return table(("work", "(B, J, D)", "measured", "asked", ""), lines)


def missed(found: Sequence[Check]) -> str:
    """Reason and next step of the targets that are missed; those of one reason together."""
    unknown = "The reason is not known yet. Next: a profile of these cases."
    targets: dict[str, dict[str, None]] = {}
    for check in found:
        if not check.met:
            known = (text for start, text in REASONS.items() if check.target.startswith(start))
            targets.setdefault(next(known, unknown), {})[check.target] = None
    return "".join(f"- *{'; '.join(names)}.* {reason}\n" for reason, names in targets.items())


def _size(row: Row) -> tuple[int, int, int]:
    return row["B"], row["J"], row["D"]


def throughput_tables(rows: Sequence[Row]) -> str:
    """Median time of every provider and, in brackets, how many times vmm_fast's that is."""
    text = ""
    modes = (
        throughput.FORWARD,
        throughput.BACKWARD,
        throughput.BACKWARD_FAR_APART,
        throughput.PARAMETERS,
        throughput.COMPONENTS,
        throughput.GRADIENT_STEP,
        throughput.CLOSED_FORM_STEP,
        throughput.EM_STEP,
        throughput.EM_STEP_FAR_APART,
        throughput.OVERHEAD,
    )
    for mode in modes:
        found = select(rows, mode=mode)
        providers = list(dict.fromkeys(row["provider"] for row in found))
        providers.sort(key=list(COLORS).index)
        absent = {row["provider"]: row["absent"] for row in found if "absent" in row}
        lines = []
        for size in dict.fromkeys(_size(row) for row in found if "p50" in row):
            here = {row["provider"]: row for row in found if "p50" in row and _size(row) == size}
            share = next(iter(here.values())).get("share_with_weight")
            cells = [str(size), "-" if share is None else f"{100 * share:.0f} %"]
            for provider in providers:
                if provider not in here:
                    cells.append(absent.get(provider, "-"))
                    continue
                seconds = here[provider]["p50"]
                cell = duration(seconds)
                if provider != "vmm_fast":
                    cell += f" ({seconds / here['vmm_fast']['p50']:.3g}x)"
                cells.append(cell)
            lines.append(cells)
        head = ("(B, J, D)", "pairs with weight", *providers)
        text += f"{mode[0].upper()}{mode[1:]}:\n\n{table(head, lines)}\n"
    lines = [
        (row["inference"], row["call"], str(row["operators"]), str(row["operators_top_level"]))
        for row in select(rows, mode=throughput.OPERATORS)
    ]
    head = ("inference", "call", "torch operators", "of these not called by another")
    return f"{text}Torch operators, encoder excluded:\n\n{table(head, lines)}"


def roofline_table(rows: Sequence[Row]) -> str:
    """Operations a second of every kernel and the share of the peak."""
    lines = []
    for row in rows:
        rate = row["operations"] / row["p50"] / 1e9 if "operations" in row else None
        cells = [str(row["threads"]), str(_size(row)), row["mode"]]
        if row["provider"] == "machine":
            limit = f"{rate:.0f} GFLOP/s" if rate else f"{row['bytes'] / row['p50'] / 1e9:.1f} GB/s"
            lines.append([*cells, limit, "", ""])
        else:
            intensity = row["operations"] / row["bytes"]
            share = f"{100 * fraction_of_peak(row, rows):.0f} %"
            lines.append([*cells, f"{rate:.0f} GFLOP/s", f"{intensity:.0f}", share])
    head = ("threads", "(B, J, D)", "kernel", "reached", "operations a byte", "of the FMA peak")
    return table(head, lines)


def scaling_tables(rows: Sequence[Row]) -> str:
    """Fitted exponents, and memory."""
    lines = []
    for thread_count in sorted({row["threads"] for row in rows if "axis" in row}):
        for mode in (scaling.FORWARD, scaling.BACKWARD):
            fits = [
                f"{scaling.exponent(line, axis):.2f}"
                for axis in ("B", "J", "D")
                if (line := select(rows, mode=mode, axis=axis, threads=thread_count))
            ]
            lines.append((mode, str(thread_count), *fits))
    exponents = table(("time of", "threads", "in B", "in J", "in D"), lines)
    lines = [
        (row["provider"], str(_size(row)), f"{row['peak_bytes'] / 2**20:.1f}", duration(row["p50"]))
        for row in select(rows, mode=scaling.MEMORY)
    ]
    head = ("provider", "(B, J, D)", "peak extra memory, MiB", "forward + backward")
    return f"{exponents}\n{table(head, lines)}"


def step_table(rows: Sequence[Row]) -> str:
    """Median time of a training step and, in brackets, how many times N(0, I)'s that is."""
    priors = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for size in dict.fromkeys(row["B"] for row in rows):
        here = {row["provider"]: row["p50"] for row in select(rows, B=size)}
        cells = [f"{duration(here[p])} ({here[p] / here[step.NORMAL]:.2f}x)" for p in priors]
        lines.append((str(size), *cells))
    return table(("B", *priors), lines)


def likelihood_table(rows: Sequence[Row]) -> str:
    """Times of log-likelihood and gradients, with how many times as fast as scvi-tools' it is."""
    found = [row for row in rows if row["mode"].endswith(likelihood.BACKWARD)]
    providers = (likelihood.OURS, likelihood.SOFTMAX_BEFORE, likelihood.THEIRS)
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found:
        model = row["mode"].removesuffix(likelihood.BACKWARD).strip()
        case = (model, f"({row['B']}, {row['genes']:,})", f"{row['density']:.0%}")
        shown = f"{duration(row['p50'])} ({row['times as fast']:.3g}x)"
        cases.setdefault(case, {})[row["provider"]] = shown
    lines = [
        (*case, *(times.get(name, "-") for name in providers)) for case, times in cases.items()
    ]
    return table(("model", "(B, G)", "above 0", *providers), lines)


def processes_table(rows: Sequence[Row]) -> str:
    """Wall and CPU time of a step in several processes."""
    lines = [
        (
            str(row["B"]),
            row["provider"],
            duration(row["p50"]),
            f"{row['times as fast']:.2f}",
            duration(row["cpu_seconds"]),
            f"{row['times as fast, by CPU']:.2f}",
            f"{row['load']:.1f}",
        )
        for row in select(rows, mode=processes.MODE)
    ]
    head = ("cells a step", "in", "time", "times as fast", "CPU time of one", "by CPU", "load")
    return table(head, lines)


def scvi_step_tables(rows: Sequence[Row]) -> str:
    """Median time of a step of scVI, over stock SCVI's in brackets; of an epoch's, every phase."""
    found = select(rows, mode=scvi_step.MODE)
    priors = list(dict.fromkeys(row["provider"] for row in found))
    lines = []
    for size in dict.fromkeys(row["B"] for row in found):
        here = {row["provider"]: row for row in select(found, B=size)}
        cells = [f"{duration(here[p]['p50'])} ({here[p]['times stock']:.2f}x)" for p in priors]
        lines.append((str(size), *cells))
    text = table(("B", *priors), lines)
    found = select(rows, mode=scvi_epoch.MODE)
    for size in dict.fromkeys(row["B"] for row in found):
        here = {row["provider"]: row for row in select(found, B=size)}
        milliseconds = [
            (phase, *(_milliseconds(row["phases"][phase]) for row in here.values()))
            for phase in scvi_epoch.PHASES
        ]
        sums = (sum(row["phases"].values()) for row in here.values())
        plain = [f"{_milliseconds(r['p50'])} ({r['times stock']:.2f}x)" for r in here.values()]
        milliseconds += [
            ("**sum**", *(f"**{_milliseconds(seconds)}**" for seconds in sums)),
            ("the same epoch without phases", *plain),
        ]
        text += f"\nB = {size}, an epoch through Lightning, CPU time in ms a step on 1 thread:\n\n"
        text += table(("phase", *here), milliseconds)
    return text


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds else "-"


def _growing(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Steps whose time grows with the cells, by rising number of them."""
    ours = select(rows, provider=out_of_core.VMM)
    found = {mode: select(ours, mode=mode) for mode in out_of_core.GROWING}
    return {mode: sorted(r, key=lambda row: row["cells"]) for mode, r in found.items() if r}


def atlas_tables(rows: Sequence[Row]) -> str:
    """Time and memory against cells, with exponents and ten million; the rest, a table each."""
    steps = _growing(rows)
    lines = [
        (
            mode,
            f"{row['cells']:,}",
            duration(row["seconds"]),
            f"{row['cells/s']:,.0f}",
            _gib(row["peak_bytes"]) if "peak_bytes" in row else "",
        )
        for mode, line in steps.items()
        for row in line
    ]
    head = ("step", "cells", "time", "cells/s", "peak memory")
    text = table(head, lines) + "\n"
    if all(len(line) > 1 for line in steps.values()):
        text += f"{_ten_million(steps)}\n\n"
    text += _loaders(rows) + _em(rows)
    epochs = select(rows, mode=out_of_core.EPOCH)
    lines = [
        (str(row["B"]), row["provider"], duration(row["p50"]), f"{row['times stock']:.2f}")
        for row in epochs
    ]
    head = ("B", "model", "CPU time of an epoch, 1 thread", f"over {out_of_core.STOCK}'s")
    text += f"{epochs[0]['cells']:,} cells in memory:\n\n{table(head, lines)}\n"
    for row in select(rows, mode=out_of_core.RESUME):
        text += (
            f"{row['cells']:,} cells, one thread: the parameters of a run that was killed "
            f"{row['kills']} times at random moments differ by at most {row['difference']:g} from "
            "those of one that was left alone.\n\n"
        )
    shuffled = select(rows, mode=out_of_core.SHUFFLING)
    lines = [
        (row["provider"], *(f"{loss:.2f}" for loss in row["losses"]), f"{mean(row['losses']):.2f}")
        for row in shuffled
    ]
    seeds = [f"seed {seed}" for seed in range(len(shuffled[0]["losses"]))]
    text += f"Negative ELBO, nats a cell, of cells not trained on, after {shuffled[0]['epochs']} "
    text += f"epochs of {shuffled[0]['cells']:,} cells:\n\n"
    return text + table(("cells", *seeds, "mean"), lines)


def _loaders(rows: Sequence[Row]) -> str:
    """Our loader next to scDataset."""
    lines = []
    for row in select(rows, mode=out_of_core.LOADER, provider=out_of_core.SCDATASET):
        (ours,) = select(
            rows, mode=out_of_core.LOADER, provider=out_of_core.VMM, cells=row["cells"]
        )
        cells = [row["absent"]] if "absent" in row else [_loaded(row)]
        lines.append((f"{row['cells']:,}", _loaded(ours), *cells))
    if not lines:
        return ""
    head = ("cells", "vmm_fast", out_of_core.SCDATASET)
    return (
        f"Loaders of the same file, batches of {row['B']}, cells/s; in brackets cells a CPU "
        f"second, since ours reads ahead in a thread of its own:\n\n{table(head, lines)}\n"
        "scDataset, too, is faster than training. Ours is there since it goes on amid a pass with "
        "the same cells, checks counts, and takes folders of files with their genes in any order. "
        "annbatch needs Python 3.12 and was not measured.\n\n"
    )


def _loaded(row: Row) -> str:
    return f"{row['cells/s']:,.0f} ({row['cells'] / row['cpu_seconds']:,.0f})"


def _em(rows: Sequence[Row]) -> str:
    """What EM gains, and scikit-learn's time."""
    lines = [
        (
            f"{row['cells']:,}",
            str(row["J"]),
            str(len(row["objective"])),
            f"{row['objective'][0]:.3f}",
            f"{row['objective'][-1]:.3f}",
            f"{out_of_core.least_gain(row):.2g}",
        )
        for row in select(rows, mode=out_of_core.EM, provider=out_of_core.VMM)
    ]
    if not lines:
        return ""
    head = ("points", "components", "iterations", "objective before", "of the last", "least gain")
    text = "EM of the trained prior, nats a point; a gain below 0 would be a fall:\n\n"
    text += table(head, lines) + "\n"
    for row in select(rows, mode=out_of_core.EM, provider=out_of_core.SCIKIT_LEARN):
        text += (
            f"scikit-learn's {row['provider']} takes {duration(row['seconds'])} for an iteration "
            f"over {row['cells']:,} points, {row['times as fast']:.3g} times as long as ours in "
            f"the same turns (measured at {row['measured']:,} points in memory, scaled linearly)."
            "\n\n"
        )
    return text


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def _ten_million(steps: dict[str, list[Row]]) -> str:
    """Exponents, and what they say of ten million cells."""
    times, fits = [], []
    for mode, line in steps.items():
        power = out_of_core.exponent(line)
        fits.append(f"{mode} n^{power:.2f}")
        last = line[-1]
        times.append(f"{mode} {duration(last['seconds'] * (1e7 / last['cells']) ** max(power, 1))}")
    before, last = steps[out_of_core.INTEGRATE][-2:]
    a_cell = (last["peak_bytes"] - before["peak_bytes"]) / (last["cells"] - before["cells"])
    peak = last["peak_bytes"] + max(a_cell, 0) * (1e7 - last["cells"])
    return (
        f"Time grows as {', '.join(fits)}; between the last two sizes, memory of "
        f"{out_of_core.INTEGRATE} by {a_cell:.0f} bytes a cell. So 10,000,000 cells would take: "
        f"{', '.join(times)}; and {out_of_core.INTEGRATE} {_gib(peak)} (from the largest size by "
        "these exponents; one below 1, which comes of what is paid once, as 1)."
    )


# --- pictures ---


def _bare(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.grid(alpha=0.25, which="both", axis="y", lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def _bars(
    ax: Axes,
    groups: Sequence[str],
    bars: dict[str, list[float | None]],
    form: str,
    start: float = 1.0,
) -> None:
    """Ratios side by side for each group, as bars that start at 1 or 0, with their values."""
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        shift = (i - (len(bars) - 1) / 2) * width
        points = [(group + shift, v) for group, v in enumerate(values) if v is not None]
        x, y = zip(*points, strict=True)
        color = COLORS.get(name, f"C{i}")
        ax.bar(x, [v - start for v in y], 0.92 * width, bottom=start, color=color, label=name)
        for at, v in points:
            _label(ax, form.format(v), (at, max(v, start)), (0, 2), ha="center")
    ax.set_xticks(range(len(groups)), groups)
    room = max(0.5, 1.5 - 0.5 * len(groups))  # no giant bars where there are few
    ax.set_xlim(-room, len(groups) - 1 + room)


def _label(
    ax: Axes, text: str, at: tuple[float, float], by: tuple[float, float], **options
) -> None:
    """A small text, ``by`` points away from a place."""
    options = {"fontsize": 7, "textcoords": "offset points", **options}
    ax.annotate(text, at, by, **options)


def _ticks(size: tuple[int, int, int]) -> str:
    """B, J and D below each other; there are no points in the building of components."""
    named = zip("BJD", size, strict=True)
    return "\n".join(f"{name} {number}" for name, number in named if number)


def plot_throughput(figure: Figure, rows: Sequence[Row]) -> None:
    """How many times longer than vmm_fast everybody takes."""
    panels = (
        throughput.FORWARD,
        throughput.BACKWARD,
        throughput.BACKWARD_FAR_APART,
        throughput.PARAMETERS,
        throughput.COMPONENTS,
        throughput.GRADIENT_STEP,
        throughput.CLOSED_FORM_STEP,
        throughput.EM_STEP,
        throughput.EM_STEP_FAR_APART,
    )
    figure.set_size_inches(15, 11)
    for ax, mode in zip(figure.subplots(3, 3, sharey=True).flat, panels, strict=True):
        found = [row for row in select(rows, mode=mode) if "p50" in row]
        ours = {_size(row): row["p50"] for row in select(found, provider="vmm_fast")}
        others = sorted({r["provider"] for r in found} - {"vmm_fast"}, key=list(COLORS).index)
        times = {(row["provider"], _size(row)): row["p50"] for row in found}
        sizes = [size for size in ours if any((name, size) in times for name in others)]
        bars: dict[str, list[float | None]] = {
            name: [
                times[name, size] / ours[size] if (name, size) in times else None for size in sizes
            ]
            for name in others
        }
        _bars(ax, [_ticks(size) for size in sizes], bars, "{:.1f}")
        ax.axhline(1, color=COLORS["vmm_fast"], lw=1.5, label="vmm_fast")
        _bare(ax, f"{mode[0].upper()}{mode[1:]}")
        ax.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}x")
    low, high = ax.get_ylim()
    ax.set_ylim(low, 4 * high)  # room for the legends
    figure.supylabel("time, over that of vmm_fast", fontsize=9)


def plot_roofline(figure: Figure, rows: Sequence[Row]) -> None:
    """Share of the FMA peak against operations a byte, under the machine's two limits.

    Shares, since the peak itself moves where others use the machine: each is of the peak in the
    same turns.
    """
    counts = sorted({row["threads"] for row in rows})
    figure.set_size_inches(1.5 + 5.5 * len(counts), 4.5)
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    axes = figure.subplots(1, len(counts), squeeze=False, sharex=True, sharey=True)[0]
    for ax, count in zip(axes, counts, strict=True):
        here = select(rows, threads=count)
        peak, copied = (
            max(row[work] / row["p50"] / 1e9 for row in select(here, mode=mode))
            for mode, work in ((roofline.PEAK, "operations"), (roofline.COPY, "bytes"))
        )
        ridge = peak / copied
        points = select(here, provider="vmm_fast")
        intensities = [row["operations"] / row["bytes"] for row in points]
        high = 3 * max(ridge, *intensities)
        ax.plot([ridge / 10, ridge, high], [10, 100, 100], color="0.3", lw=1.2)
        _label(ax, f"FMA peak, {peak:.0f} GFLOP/s", (ridge, 100), (4, 4))
        _label(ax, f"copy, {copied:.1f} GB/s", (ridge / 10, 10), (14, 6))
        for row, intensity in zip(points, intensities, strict=True):
            ax.scatter(
                intensity,
                100 * fraction_of_peak(row, rows),
                s=36,
                color=KERNEL_COLORS[row["mode"]],
                marker=SIZE_MARKERS[sizes.index(_size(row)) % len(SIZE_MARKERS)],
                edgecolor="white",
                lw=0.5,
                zorder=3,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("floating-point operations a byte of input and output", fontsize=9)
        _bare(ax, f"{count} thread{'s' if count > 1 else ''}, float32")
    axes[0].yaxis.set_major_formatter("{x:g} %")
    axes[0].yaxis.set_minor_formatter(
        lambda share, _: f"{share:g} %" if f"{share:.0e}"[0] in "25" else ""
    )
    axes[0].tick_params(which="minor", labelsize=8)
    axes[0].set_ylabel("operations a second, of the FMA peak", fontsize=9)
    for kernel, color in KERNEL_COLORS.items():
        axes[-1].scatter([], [], color=color, label=kernel)
    for size, marker in zip(sizes, SIZE_MARKERS, strict=False):
        axes[-1].scatter([], [], color="0.5", marker=marker, label=f"(B, J, D) = {size}")
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")


def plot_scaling(figure: Figure, rows: Sequence[Row]) -> None:
    """Time along each axis with its fitted exponent, and memory against B J."""
    figure.set_size_inches(15, 4.2)
    *axes, memory = figure.subplots(1, 4)
    timed = [row for row in rows if "axis" in row]
    for ax, axis in zip(axes, ("B", "J", "D"), strict=True):
        for count in sorted({row["threads"] for row in timed}):
            for color, mode in enumerate((scaling.FORWARD, scaling.BACKWARD)):
                line = select(timed, mode=mode, axis=axis, threads=count)
                if not line:
                    continue
                x, y = ([row[key] for row in line] for key in (axis, "p50"))
                label = f"{mode}, {count} thread{'s' if count > 1 else ''}: "
                label += f"{axis}^{scaling.exponent(line, axis):.2f}"
                style = "--" if count == 1 else "-"
                ax.plot(x, y, style, color=f"C{color}", marker="o", ms=3.5, lw=1.3, label=label)
        if line := select(timed, axis=axis):
            others = [f"{k} = {line[0][k]}" for k in ("B", "J", "D") if k != axis]
            _bare(ax, f"Time against {axis} ({', '.join(others)})")
        ax.set_xscale("log")
        ax.set_xticks([], minor=True)
        at = sorted({row[axis] for row in select(timed, axis=axis)})
        ax.set_xticks(at, map(str, at))
        ax.set_xlabel(axis, fontsize=9)
        ax.set_ylabel("seconds", fontsize=9)
        ax.set_yscale("log")
        ax.set_ylim(top=8 * ax.get_ylim()[1])  # room for the legend
        ax.legend(fontsize=7, frameon=False, loc="upper left")
    for provider in ("vmm_fast", "matmul"):
        line = select(rows, mode=scaling.MEMORY, provider=provider)
        line.sort(key=lambda row: row["B"] * row["J"])
        x = [row["B"] * row["J"] for row in line]
        y = [max(row["peak_bytes"], 4096) / 2**20 for row in line]
        memory.plot(x, y, marker="o", ms=3.5, lw=1.3, color=COLORS[provider], label=provider)
    x = sorted({row["B"] * row["J"] for row in select(rows, mode=scaling.MEMORY)})
    if x:
        memory.plot(
            x, [4 * pairs / 2**20 for pairs in x], ":", color="0.4", label="a [B, J] matrix"
        )
    memory.axhline(1024, color="0.4", lw=0.8)
    _label(memory, "1 GiB", (1, 1024), (-2, 3), xycoords=("axes fraction", "data"), ha="right")
    memory.set_xlabel("B J", fontsize=9)
    memory.set_ylabel("peak extra memory, MiB", fontsize=9)
    _bare(memory, "Memory of forward + backward (D = 32)")
    memory.legend(fontsize=7, frameon=False)
    memory.set_xscale("log")
    memory.set_yscale("log")


def plot_step(figure: Figure, rows: Sequence[Row]) -> None:
    """Time of a training step next to that under N(0, I)."""
    figure.set_size_inches(10, 4.2)
    ax = figure.subplots()
    sizes = list(dict.fromkeys(row["B"] for row in rows))
    normal = {row["B"]: row["p50"] for row in select(rows, provider=step.NORMAL)}
    bars: dict[str, list[float | None]] = {
        name: [row["p50"] / normal[row["B"]] for row in select(rows, provider=name)]
        for name in dict.fromkeys(row["provider"] for row in rows)
        if name != step.NORMAL
    }
    _bars(ax, [f"B = {b}\nN(0, I): {duration(normal[b])}" for b in sizes], bars, "{:.2f}")
    ax.axhline(1, color="0.3", lw=1)
    ax.axhline(1.10, color="0.3", lw=0.8, ls="--")
    _label(ax, "1.10", (1, 1.10), (2, -2), xycoords=("axes fraction", "data"))
    ax.margins(y=0.15)
    _bare(ax, "Training step of the image VAE, time / that under N(0, I)")
    ax.legend(fontsize=8, frameon=False, ncols=len(bars), loc="upper left")


def plot_scvi_step(figure: Figure, rows: Sequence[Row]) -> None:
    """Time of a step of scVI next to stock SCVI's, and of a step in an epoch, by phase."""
    epochs = select(rows, mode=scvi_epoch.MODE)
    sizes = list(dict.fromkeys(row["B"] for row in epochs))
    figure.set_size_inches(7 + 4 * len(sizes), 4.6)
    steps, *axes = figure.subplots(1, 1 + len(sizes), width_ratios=[1.6] + [1] * len(sizes))
    found = select(rows, mode=scvi_step.MODE)
    stock = {row["B"]: row["p50"] for row in select(found, provider=scvi_step.STOCK)}
    bars: dict[str, list[float | None]] = {
        name: [row["times stock"] for row in select(found, provider=name)]
        for name in scvi_step.PRIORS
    }
    _bars(
        steps,
        [f"B = {b}\n{scvi_step.STOCK}: {duration(seconds)}" for b, seconds in stock.items()],
        bars,
        "{:.2f}",
        start=0.0,
    )
    steps.axhline(1, color="0.3", lw=0.8, ls="--", zorder=0)
    steps.margins(y=0.3)
    _bare(steps, "Training step, time / that of SCVI")
    steps.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    for ax, size in zip(axes, sizes, strict=True):
        here = select(epochs, B=size)
        bottom = [0.0] * len(here)
        for phase, color in PHASE_COLORS.items():
            height = [1e3 * row["phases"][phase] for row in here]
            ax.bar(range(len(here)), height, 0.7, bottom, color=color, label=phase)
            bottom = [low + more for low, more in zip(bottom, height, strict=True)]
        for place, top in enumerate(bottom):
            _label(ax, f"{top:.3g}", (place, top), (0, 2), ha="center")
        names = [row["provider"].replace(", ", ",\n", 1) for row in here]
        ax.set_xticks(range(len(here)), names)
        ax.set_ylabel("ms of CPU time", fontsize=9)
        _bare(ax, f"Step in an epoch, B = {size}")
    if axes:
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="outside right center"
        )


def plot_atlas(figure: Figure, rows: Sequence[Row]) -> None:
    """Time and memory against cells, epochs next to stock SCVI, and what shuffling costs."""
    figure.set_size_inches(15, 4.2)
    times, memory, epochs, shuffling = figure.subplots(1, 4)
    for i, (mode, line) in enumerate(_growing(rows).items()):
        cells = [row["cells"] for row in line]
        power = f": n^{out_of_core.exponent(line):.2f}" if len(line) > 1 else ""
        style = {"marker": "o", "ms": 3.5, "lw": 1.3, "color": f"C{i}"}
        times.plot(cells, [row["seconds"] for row in line], label=mode + power, **style)
        if "peak_bytes" in line[0]:
            peaks = [row["peak_bytes"] / 2**30 for row in line]
            memory.plot(cells, peaks, label=mode, **style)
    in_memory = [8 * n * atlas.GENES * atlas.DENSITY / 2**30 for n in cells]
    memory.plot(cells, in_memory, ":", color="0.4", label="the counts, if they were in memory")
    memory.axhline(3, color="0.4", lw=0.8)
    _label(memory, "3 GiB", (1, 3), (-2, 3), xycoords=("axes fraction", "data"), ha="right")
    for ax, room in ((times, 8), (memory, 20)):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(top=room * ax.get_ylim()[1])  # for the legend
        ax.set_xlabel("cells, n", fontsize=9)
        ax.legend(fontsize=7, frameon=False, loc="upper left")
    times.set_ylabel("seconds", fontsize=9)
    memory.set_ylabel("peak resident memory, GiB", fontsize=9)
    memory.yaxis.set_major_formatter("{x:g}")
    _bare(times, "Time against cells")
    _bare(memory, "Memory against cells")
    found = select(rows, mode=out_of_core.EPOCH)
    sizes = list(dict.fromkeys(row["B"] for row in found))
    providers = list(dict.fromkeys(row["provider"] for row in found))
    for i, name in enumerate(providers):
        at = [place + 0.27 * (i - 1) for place in range(len(sizes))]
        ratios = [row["times stock"] for row in select(found, provider=name)]
        color = "0.6" if name == out_of_core.STOCK else f"C{i - 1}"
        epochs.bar(at, ratios, 0.25, color=color, label=name)
        for x, ratio in zip(at, ratios, strict=True):
            _label(epochs, f"{ratio:.2f}", (x, ratio), (0, 2), ha="center")
    epochs.set_xticks(range(len(sizes)), [f"B = {size}" for size in sizes])
    epochs.set_ylim(0, 1.3)
    epochs.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
    _bare(epochs, "CPU time of a training epoch, over SCVI's")
    found = select(rows, mode=out_of_core.SHUFFLING)
    reference = found[0]["losses"]
    for place, row in enumerate(found):
        gaps = [a - b for a, b in zip(row["losses"], reference, strict=True)]
        shuffling.scatter([place] * len(gaps), gaps, s=20, color=f"C{place}")
    shuffling.set_xticks(range(len(found)), [row["provider"].replace(", ", ",\n") for row in found])
    shuffling.set_xlim(-0.5, len(found) - 0.5)
    shuffling.axhline(0, color="0.3", lw=0.8)
    shuffling.set_ylabel("nats a cell, over in memory", fontsize=9)
    _bare(shuffling, "Loss of cells not trained on")


# --- the page ---

TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "throughput": throughput_tables,
    "roofline": roofline_table,
    "scaling": scaling_tables,
    "step": step_table,
    "likelihood": likelihood_table,
    "scvi-step": scvi_step_tables,
    "atlas": atlas_tables,
    "processes": processes_table,
}
PLOTS: dict[str, Callable[[Figure, Sequence[Row]], None]] = {
    "throughput": plot_throughput,
    "roofline": plot_roofline,
    "scaling": plot_scaling,
    "step": plot_step,
    "scvi-step": plot_scvi_step,
    "atlas": plot_atlas,
}
INTRODUCTIONS = {
    "throughput": "Medians of interleaved repeats, float32; in brackets the time over vmm_fast's. "
    "Every result was compared with float64 before it was timed. Pairs of a point and a component "
    "have a weight where the responsibility is above 0 in float32; the core skips sums over the "
    "others, which are few unless clusters lie far apart.",
    "roofline": "Peak and bandwidth are measured in the same turns as the kernels. How operations "
    "and bytes are counted is said at the top of `bench/roofline.py`.",
    "scaling": "Least-squares fits of log time along one axis, the other two held.",
    "step": "784 inputs, hidden layers of 500, 500 and 2000, D = 10, 100 components; in brackets "
    "the time over that of N(0, I).",
    "likelihood": "Log-likelihood and gradients of B cells with G genes; in brackets how many "
    "times as fast as scvi-tools'. *ZINB of a softmax* has the mean as scVI's decoder makes it, a "
    "library size times a softmax, whose time counts: within the likelihood, or before it.",
    "processes": "Processes of one thread each, cells in memory, the same number of cells a step "
    "in all together. *By CPU* is what it would be if each had a core to itself.",
    "scvi-step": "First, steps without Lightning on random counts of 2,000 genes; in brackets the "
    "time over that of SCVI. Then epochs with everything that `train` does, on cells of "
    "`bench/atlas.py`: what the phases are and how they are told apart is said at the top of "
    "`bench/scvi_epoch.py`. *VMM, before* has scvi-tools' likelihood and "
    "logging, and Adam as it comes.",
    "atlas": "Cells of `bench/atlas.py`, 2,000 genes, 15 % of the counts above 0; the top of "
    "`bench/out_of_core.py` says what each step is. Each ran in a process of its own, whose memory "
    "counts with the interpreter and its libraries.",
}


def page(parts: dict[str, list[Row]]) -> str:
    """The text of speed.md."""
    found = checks([row for rows in parts.values() for row in rows])
    text = "# Speed\n\n"
    text += "Only ratios within one table mean anything: the machine is shared.\n\n"
    text += target_table(found)
    if not all(check.met for check in found):
        text += f"\n## What is missed\n\n{missed(found)}"
    for name, rows in parts.items():
        first = rows[0]
        heading = HEADINGS.get(name, name.capitalize())
        text += f"\n## {heading}\n\n{INTRODUCTIONS[name]}\n\n"
        text += f"![]({name}.png)\n\n" * (name in PLOTS)
        text += TABLES[name](rows)
        keys = ("date", "revision", "cpu", "instruction_set", "openmp", "python", "torch", "numpy")
        text += f"\n`{first['command']}`: {', '.join(str(first[key]) for key in keys)}.\n"
    return text


def write(folder: Path) -> list[Check]:
    """Write pictures and speed.md from the JSON lines in a folder; gives the targets' checks."""
    from matplotlib.figure import Figure

    parts = {
        name: read_rows(folder / f"{name}.jsonl")
        for name in PARTS
        if (folder / f"{name}.jsonl").exists()
    }
    if not parts:
        raise FileNotFoundError(f"no results in {folder}: run python -m bench throughput first")
    for name in PLOTS.keys() & parts.keys():
        figure = Figure(layout="constrained", dpi=110)
        PLOTS[name](figure, parts[name])
        write_atomically(
            folder / f"{name}.png",
            lambda file, figure=figure: figure.savefig(file, format="png"),
        )
    text = page(parts)
    write_atomically(folder / "speed.md", lambda file: file.write(text), text=True)
    return checks([row for rows in parts.values() for row in rows])
