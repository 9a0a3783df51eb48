"""What an evaluation found, for people: tables for the terminal, and a page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tabulate import tabulate

_LABELS = {
    **{f"txt_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"img_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    "r_mean": "mean of the six",
}
_VARIANTS = {"": "own pair right", "_text": "equal captions right too"}


@dataclass(frozen=True)
class _Results:
    """The cells of the results table: two columns that name a metric, then groups of columns."""

    names: list[str]
    labels: list[str]
    groups: list[tuple[str, dict[str, list[str]]]]
    """Title of a group, and its columns by title."""

    @staticmethod
    def of(
        metrics: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]] | None,
        chance: Mapping[str, float] | None,
        start: Mapping[str, float] | None,
    ) -> _Results:
        names = [name for name in metrics if not name.endswith("_text")]
        groups = []
        for suffix, title in _VARIANTS.items():
            keys = [name + suffix for name in names]
            if not any(key in metrics for key in keys):
                continue
            columns = {"%": [_percent(metrics.get(key)) for key in keys]}
            if intervals:
                columns["95 % CI"] = [_interval(intervals.get(key)) for key in keys]
            for kind, values in (("chance", chance), ("start", start)):
                if values:
                    columns[kind] = [_percent(values.get(key)) for key in keys]
            groups.append((title, columns))
        return _Results(names, [_LABELS.get(name, "") for name in names], groups)


def results_table(
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
    chance: Mapping[str, float] | None = None,
    start: Mapping[str, float] | None = None,
) -> str:
    """Returns the recalls as a plain table of less than 100 columns, in percent.

    A metric and its duplicate-aware variant ``NAME_text``, for which equal captions are right too, share a row.

    Args:
        metrics: Names and values, as `RetrievalResult.metrics`.
        intervals: 95 % interval of each; None or empty leaves the columns out, as below.
        chance: Expected values of rankings drawn at random.
        start: Values before training.
    """
    results = _Results.of(metrics, intervals, chance, start)
    blocks = [_block("", {"metric": results.names, "": results.labels}, left=True)]
    blocks += [_block(title, columns) for title, columns in results.groups]
    lines = ["    ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])


def _block(title: str, columns: Mapping[str, list[str]], *, left: bool = False) -> list[str]:
    """Returns lines of equal width: a title over a table of aligned columns."""
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    align = ["left" if left else "right"] * len(columns)
    lines = [title, *tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align).splitlines()]
    width = max(map(len, lines))
    return [lines[0].ljust(width), *(line.ljust(width) if left else line.rjust(width) for line in lines[1:])]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"
