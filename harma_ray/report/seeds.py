"""Runs of one setting with several seeds as a table to paste (Markdown): mean, deviation, and what was published."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from harma_ray.evaluation import Metrics, PublishedFigures

_TABLE_1 = {
    "txt_r1": "I2T R@1",
    "txt_r5": "R@5",
    "txt_r10": "R@10",
    "img_r1": "T2I R@1",
    "img_r5": "R@5",
    "img_r10": "R@10",
    "r_mean": "r_mean",
    "r_mean_text": "r_mean, equal captions right",
}
"""Metrics that fit into a row, as in HarMA's Table 1, and their titles."""


@dataclass(frozen=True)
class SeedRuns:
    """What several seeds of one setting have come to."""

    recipe: str
    data: str
    """Name of the data set."""
    seeds: Sequence[int]
    reports: Sequence[Mapping[str, Any]]
    """The runs' final reports."""
    metrics: Metrics
    """The task's."""
    num_texts: Mapping[str, int]
    """Captions, or queries, of each split."""
    changed: Sequence[str] = ()
    """Settings that are not the recipe's, as text."""
    published: Sequence[PublishedFigures] = ()
    """What the recipe's paper says."""

    def values(self, split: str) -> dict[str, list[float]]:
        """Returns the values of each metric of a split, one a seed."""
        of_all = [report["metrics"][split] for report in self.reports]
        return {name: [found[name] for found in of_all] for name in of_all[0] if all(name in found for found in of_all)}

    def quoted(self, split: str) -> PublishedFigures | None:
        """Returns the published figures of a split, if it is the one that they were measured on."""
        fitting = (p for p in self.published if p.split == split and p.num_texts == self.num_texts.get(split))
        return next(fitting, None)


def seeds_markdown(runs: SeedRuns) -> str:
    """Returns the table, and below it what must be known to read it."""
    first = runs.reports[0]
    seeds = ", ".join(map(str, runs.seeds))
    title = (
        f"{runs.recipe} on {runs.data}: mean ± standard deviation over {len(runs.seeds)} seeds ({seeds}); in percent "
        f"unless it is a loss; best epoch by {first['selected_on']} {first['objective']}"
    )
    splits = list(first["metrics"])
    fits = all(name in first["metrics"][split] for split in splits for name in _TABLE_1)
    tables = [_in_rows(runs, splits)] if fits else [_in_columns(runs, split) for split in splits]
    return "\n\n".join([title, *tables, *_notes(runs, splits)]) + "\n"


def _in_rows(runs: SeedRuns, splits: Sequence[str]) -> str:
    """Returns a table with a row for each split, and below it what was published and how far that is."""
    rows = []
    for split in splits:
        values, quoted = runs.values(split), runs.quoted(split)
        rows.append([runs.recipe, f"{runs.data} {split}", *(_spread(runs.metrics, n, values[n]) for n in _TABLE_1)])
        if quoted:
            figures = [quoted.figures.get(name) for name in _TABLE_1]
            rows.append(["published", f"{quoted.data} {split}", *map(_shown, figures)])
            rows.append(["difference", "", *(_difference(values[n], quoted.figures.get(n)) for n in _TABLE_1)])
    return _markdown(["", "data", *_TABLE_1.values()], rows)


def _in_columns(runs: SeedRuns, split: str) -> str:
    """Returns a table with a row for each metric of a split."""
    quoted, values = runs.quoted(split), runs.values(split)
    rows = [[name, runs.metrics.labels.get(name, ""), _spread(runs.metrics, name, values[name])] for name in values]
    headers = [f"{runs.data} {split}", "", runs.recipe]
    if quoted:
        headers += [f"published ({quoted.data} {split})", "difference"]
        for row, (name, found) in zip(rows, values.items(), strict=True):
            row += [_shown(quoted.figures.get(name)), _difference(found, quoted.figures.get(name))]
    return _markdown(headers, rows)


def _notes(runs: SeedRuns, splits: Sequence[str]) -> list[str]:
    notes = [f"Settings that are not the recipe's: {', '.join(runs.changed)}."] if runs.changed else []
    for quoted in runs.published:
        if quoted in [runs.quoted(split) for split in splits]:
            notes.append(f"Published: {quoted.source}.")
            continue
        figures = ", ".join(f"{name} {value:.2f}" for name, value in quoted.figures.items())
        of = f"{quoted.data}'s {quoted.split}, {quoted.num_texts:,} texts"
        own = runs.num_texts.get(quoted.split)
        here = f"no split {quoted.split} was measured" if own is None else f"the split {quoted.split} here has {own:,}"
        notes.append(f"Published on {of}: {figures} ({quoted.source}). Not compared: {here}.")
    return notes


def _spread(metrics: Metrics, name: str, values: Sequence[float]) -> str:
    return f"{metrics.show(name, statistics.mean(values))} ± {metrics.show(name, statistics.stdev(values))}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _difference(values: Sequence[float], quoted: float | None) -> str:
    return "" if quoted is None else f"{statistics.mean(values) - quoted:+.2f}"


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    texts = 2 if len(headers) > 2 else 1
    align = ["left"] * texts + ["right"] * (len(headers) - texts)
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)
