"""Compares tuners on real learning curves: what a search has found after so many epochs.

The curves are those of benchmarks/curves.py: trainings happened once, a search walks along them and counts epochs, so
twenty repetitions of a tuner take minutes. Every tuner has the same space, one trial at a time, the published setting
first, and pays for what it trains, for a setting like an earlier one too. What they find is compared with the best of
the grid: the setting whose best epoch is highest on average over the seeds of the table, for the highest single
value is partly luck.

SMAC3 and Syne Tune: `pip install 'harma-ray[benchmarks]'`.

Run: python benchmarks/tuners.py [--repetitions 20] [--methods ours ...] [--keep FOLDER] [--plot FILE]
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from curve_table import BudgetSpent, CurveTable, Trainings
from curves import TABLE
from tabulate import tabulate
from tuner_methods import METHODS, Search

SHARES = (0.02, 0.05, 0.1, 0.25)
"""Of the grid's epochs, after which the best value is compared."""
NEAR = 0.5
"""So much below the grid's best is near it: r_mean of 100 images moves as much by a caption or two."""
OURS = "ours"
"""The tuner that the others are compared with."""
Trace = list[tuple[int, float, int]]
"""Epochs spent, best value, its setting, whenever there was a better one."""


def repeat(name: str, table: CurveTable, repetitions: int, budget: int, keep: Path | None) -> list[Trace]:
    """Runs a tuner so many times, in turns on the table's seeds; what an earlier call has kept is not run again."""
    path = keep / f"{name}.json" if keep else None
    traces: list[Trace] = json.loads(path.read_text()) if path and path.exists() else []
    started, before = time.perf_counter(), len(traces)
    for repetition in range(before, repetitions):
        trainings = Trainings(table, repetition % table.seeds, budget)
        try:
            METHODS[name](Search(table, trainings, repetition + 1))
        except BudgetSpent:
            traces.append(trainings.trace)
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"{name} needs {error.name}: pip install 'harma-ray[benchmarks]', or leave it out with --methods"
            ) from error
        else:
            raise RuntimeError(f"{name} gave up after {trainings.spent} of {budget} epochs")
        if path:
            path.write_text(json.dumps(traces))
    if repetitions > before:
        seconds = (time.perf_counter() - started) / (repetitions - before)
        print(f"{name}: {repetitions - before} searches, {seconds:.1f} s each", flush=True)
    return traces[:repetitions]


def best_after(trace: Trace, epochs: float) -> float:
    """Returns the best value after so many epochs."""
    return max(value for spent, value, _ in trace if spent <= max(epochs, 1))


def average(trace: Trace, budget: int) -> float:
    """Returns the best value after so many epochs, averaged over all numbers of epochs up to the budget."""
    return float(np.mean([best_after(trace, epochs) for epochs in range(1, budget + 1)]))


def reached_after(trace: Trace, value: float) -> float:
    """Returns the epochs after which a value is reached; infinity if it is not."""
    return next((spent for spent, best, _ in trace if best >= value), math.inf)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean and the 95 % interval of its bootstrap."""
    array = np.asarray(values)
    means = np.random.default_rng(0).choice(array, (4000, len(array))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def elsewhere(table: CurveTable, repetition: int, trace: Trace) -> float:
    """Returns what the setting that a search found reaches with the other seeds; NaN if there are none."""
    others = [seed for seed in range(table.seeds) if seed != repetition % table.seeds]
    return float(np.mean([table.reached[seed, trace[-1][2]] for seed in others])) if others else math.nan


def targets(table: CurveTable) -> np.ndarray:
    """Returns the grid's best for each seed: what the setting that is best on average over the seeds reaches there."""
    return table.reached[:, table.reached.mean(axis=0).argmax()]


def summarise(table: CurveTable, found: Mapping[str, list[Trace]], budget: int) -> str:
    """Returns the table: a row for each tuner."""
    rows = []
    for name, traces in found.items():
        wanted = [float(targets(table)[repetition % table.seeds]) for repetition in range(len(traces))]
        pairs = list(zip(traces, wanted, strict=True))
        spent = [[reached_after(trace, value - below) for trace, value in pairs] for below in (0, NEAR)]
        shares = [float(np.median(epochs)) / table.total for epochs in spent]
        never = sum(map(math.isinf, spent[0]))
        cells = ["not" if math.isinf(share) else f"{share:.3f}" for share in shares]
        for share in SHARES:
            mean, low, high = interval([best_after(trace, share * table.total) for trace in traces])
            cells.append(f"{mean:.2f} ({low:.2f}-{high:.2f})")
        mean, low, high = interval([value - average(trace, budget) for trace, value in pairs])
        others = [elsewhere(table, number, trace) for number, trace in enumerate(traces)]
        rows.append([name, cells[0], never, *cells[1:], f"{mean:.2f} ({low:.2f}-{high:.2f})", f"{np.mean(others):.2f}"])
    headers = [
        "", "share to the best", "not within", f"to {NEAR:g} less", *(f"best at {share:.0%}" for share in SHARES),
        "mean gap", "other seeds",
    ]  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


def compare(table: CurveTable, found: Mapping[str, list[Trace]], budget: int) -> str:
    """Returns the table of what each tuner finds more than ours, by repetition: both on the same trainings."""
    rows = []
    others = {name: traces for name, traces in found.items() if name != OURS}
    for name, traces in others.items():
        cells = []
        for share in SHARES:
            epochs = share * table.total
            pairs = zip(traces, found[OURS], strict=True)
            cells.append(interval([best_after(own, epochs) - best_after(other, epochs) for own, other in pairs]))
        areas = [[average(trace, budget) for trace in known] for known in (traces, found[OURS])]
        cells.append(interval([own - other for own, other in zip(*areas, strict=True)]))
        rows.append([name, *(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in cells)])
    headers = ["more than ours", *(f"best at {share:.0%}" for share in SHARES), "on average"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def draw(table: CurveTable, found: Mapping[str, list[Trace]], budget: int, path: Path) -> None:
    """Draws the best value against the share of the grid's epochs, with intervals; lines are named at their ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=110)
    epochs = np.unique(np.geomspace(0.015 * table.total, budget, 60).astype(int))
    target = float(targets(table).mean())
    ends: list[tuple[float, str, object]] = []
    for name, traces in found.items():
        bands = np.array([interval([best_after(trace, spent) for trace in traces]) for spent in epochs])
        is_ours = name == OURS
        (line,) = axes.plot(epochs / table.total, bands[:, 0], lw=2.6 if is_ours else 1.3, zorder=3 if is_ours else 2)
        axes.fill_between(epochs / table.total, bands[:, 1], bands[:, 2], color=line.get_color(), alpha=0.12, lw=0)
        ends.append((float(bands[-1, 0]), name, line.get_color()))
    axes.axhline(target, color="0.4", lw=0.8, ls="--")
    axes.annotate("the grid's best", (epochs[0] / table.total, target), xytext=(0, 4), textcoords="offset points")
    axes.set_xscale("log")
    ticks = SHARES
    axes.set_xticks(ticks, [f"{100 * share:g} %" for share in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    apart, place = (high - low) / 18, math.inf
    for value, name, colour in sorted(ends, key=lambda end: -end[0]):
        place = min(value, place - apart)
        axes.annotate(
            name, (1.01, place), xycoords=("axes fraction", "data"), color=colour, va="center", annotation_clip=False,
            fontweight="bold" if name == OURS else None,
        )  # fmt: skip
    axes.set_xlabel(f"epochs spent, in parts of all settings' {table.total}")
    axes.set_ylabel("best val r_mean so far, mean and 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Runs, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.25, help="epochs of a search, in parts of the grid's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--keep", type=Path, help="a folder of searches that are not repeated")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = CurveTable(options.table)
    budget = round(options.budget * table.total)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    found = {name: repeat(name, table, options.repetitions, budget, options.keep) for name in options.methods}
    target = ", ".join(f"{value:.2f}" for value in targets(table))
    highest = ", ".join(f"{table.reached[seed].max():.2f}" for seed in range(table.seeds))
    as_good = [int((table.reached[seed] >= value).sum()) for seed, value in enumerate(targets(table))]
    first = table.nearest(Search(table, Trainings(table, 0, 0), 0).first)
    print(
        f"\n{len(table.settings)} settings, {table.total} epochs; by seed: the best on average reaches "
        f"{target}, which {' and '.join(map(str, as_good))} settings do; highest {highest}; the published setting "
        f"{', '.join(f'{value:.2f}' for value in table.reached[:, first])}; "
        f"{options.repetitions} repetitions\n"
    )
    print(summarise(table, found, budget))
    if OURS in found and len(found) > 1:
        print(f"\n{compare(table, found, budget)}")
    if options.plot:
        draw(table, found, budget, options.plot)


if __name__ == "__main__":
    main()
