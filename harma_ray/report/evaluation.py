"""What an evaluation found, for people: tables for the terminal, and a page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics, Section
from harma_ray.report import page
from harma_ray.report.figures import draw_curves
from harma_ray.settings import flat_settings
from harma_ray.training.health import Finding, standing_findings

PAGE_NAME = "index.html"
_LABELS = {
    **{f"txt_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"img_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    **{f"recall_at{k}": f"R@{k}" for k in (1, 5, 10, 50)},
    **{f"group_recall_at{k}": f"R_subset@{k}" for k in (1, 2, 3)},
    **{f"average_recall_at{k}": f"R@{k}, mean of the categories" for k in (10, 50)},
    "arithmetic_mean": "of the seven",
    "sum_r_mean": "by the sum of both",
    "image_only_r_mean": "by the reference alone",
    "text_only_r_mean": "by the text alone",
}
_R_MEAN_LABELS = {
    "img_r1": "mean of the six",
    "arithmetic_mean": "arithmetic mean of the seven",
    "average_recall": "mean of R@10 and R@50",
}
"""What r_mean is the mean of, by a metric that stands beside it."""
_Groups = list[tuple[str, dict[str, list[str]]]]
"""Title of a group, and its columns by title."""
_VARIANTS = {"": "own pair right", "_text": "equal captions right too"}


@dataclass(frozen=True)
class _Results:
    """The cells of the results table: two columns that name a metric, then groups of columns."""

    names: list[str]
    labels: list[str]
    groups: _Groups

    @staticmethod
    def of(
        metrics: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]] | None,
        chance: Mapping[str, float] | None,
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
            if chance:
                columns["chance"] = [_percent(chance.get(key)) for key in keys]
            groups.append((title, columns))
        if len(groups) == 1:
            groups = [("", groups[0][1])]
        mean = next((label for name, label in _R_MEAN_LABELS.items() if name in metrics), "")
        return _Results(names, [mean if name == "r_mean" else _LABELS.get(name, "") for name in names], groups)


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of a part of a model."""

    module: str
    """Its name, such as ``clip.visual``."""
    total: int
    """Numbers in it."""
    trainable: int
    """Numbers that training changes."""


def results_table(
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
    chance: Mapping[str, float] | None = None,
) -> str:
    """Returns the recalls as a plain table of at most 100 columns, in percent.

    A metric and its duplicate-aware variant ``NAME_text``, for which equal captions are right too, share a row.

    Args:
        metrics: Names and values, as `RetrievalResult.metrics`.
        intervals: 95 % interval of each; None or empty leaves the columns out, as below.
        chance: Expected values of rankings drawn at random.
    """
    results = _Results.of(metrics, intervals, chance)
    return _table({"metric": results.names, "": results.labels}, results.groups)


def comparison_table(
    found: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, tuple[float, float]]]
) -> str:
    """Returns the recalls of several kinds of queries side by side, as a plain table, in percent.

    Args:
        found: Metrics by kind; those that all kinds have are shown.
        intervals: Their 95 % intervals.
    """
    names, groups = _comparison(found, intervals)
    return _table({"metric": names}, groups)


def comparison_section(
    found: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, tuple[float, float]]]
) -> Section:
    """Returns the same as a section of a page."""
    names, groups = _comparison(found, intervals)
    columns = [("metric", names), *((title, cells) for _, group in groups for title, cells in group.items())]
    sizes = [(title, len(group)) for title, group in groups]
    return Section("queries", "Kinds of queries", page.table(columns, num_text_columns=1, groups=sizes))


def _comparison(
    found: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, tuple[float, float]]]
) -> tuple[list[str], _Groups]:
    names = [name for name in next(iter(found.values())) if all(name in metrics for metrics in found.values())]
    return names, [
        (
            kind,
            {
                "%": [_percent(metrics[name]) for name in names],
                "95 % CI": [_interval(intervals[kind].get(name)) for name in names],
            },
        )
        for kind, metrics in found.items()
    ]


def _table(first: Mapping[str, list[str]], groups: _Groups) -> str:
    """Returns columns of text and groups of columns of numbers, each under its title."""
    blocks = [_block("", first, left=True), *(_block(title, columns) for title, columns in groups)]
    lines = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    top = [line for line in lines[:2] if line]  # one group has no title
    return "\n".join([*top, "-" * max(map(len, lines)), *lines[2:]])


def _block(title: str, columns: Mapping[str, list[str]], *, left: bool = False) -> list[str]:
    """Returns lines of equal width: a title over a table of aligned columns."""
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    align = ["left" if left else "right"] * len(columns)
    lines = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align).splitlines()
    table_width = max(map(len, lines))  # a line that ends in empty cells is shorter
    width = max(len(title), table_width)
    lines = [line.ljust(table_width) for line in lines]
    return [title.ljust(width), *(line.ljust(width) if left else line.rjust(width) for line in lines)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"


def parameter_table(model: nn.Module) -> list[ParameterRow]:
    """Counts the parameters of a model by the first two levels of its modules, adapters apart; in the model's order.

    A parameter that several modules share counts once, where it is first met.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        count = counts.setdefault(".".join(parts[:2]) + (" adapters" if "adapter" in parts else ""), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return [ParameterRow(module, total, trainable) for module, (total, trainable) in counts.items()]


def write_report(
    folder: Path,
    *,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None,
    chance: Mapping[str, float] | None,
    model: nn.Module,
    settings: Mapping[str, Any],
    compared: Metrics,
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes a page of results, of what the task shows, of parameters, training curves and settings.

    The page holds its pictures and style itself and opens without a network; the larger pictures lie beside it too.

    Args:
        folder: Where to write; made if missing.
        title: Heading of the page.
        subtitle: What was evaluated.
        sections: What the task shows; see `Task.sections`.
        metrics: In percent.
        intervals: 95 % interval of each metric, if known.
        chance: Expected values of rankings drawn at random, if known.
        model: The evaluated model, for its parameters alone.
        settings: Settings of the run, nested.
        compared: The task's metrics; their objective is drawn over the epochs.
        records: Lines of the run's ``metrics.jsonl``, if it has any.

    Returns:
        Path of ``index.html``.

    Raises:
        UserError: If the folder cannot be written.
    """
    sections = [
        _results_section(_Results.of(metrics, intervals, chance)),
        *sections,
        _parameters_section(parameter_table(model)),
        _curves_section(draw_curves(records, compared), standing_findings(records)),
        _settings_section(settings),
    ]
    top = page.heading(title, subtitle, [(section.name, section.title) for section in sections])
    parts = [page.section(section.name, section.title, section.html) for section in sections]
    pictures = {name: data for section in sections for name, data in section.pictures.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
        (folder / PAGE_NAME).write_text(page.document(title, [top, *parts]), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder} ({error.strerror}); choose another folder") from error
    return folder / PAGE_NAME


def _results_section(results: _Results) -> Section:
    columns = [("metric", results.names), ("", results.labels)]
    columns += [(title, cells) for _, group in results.groups for title, cells in group.items()]
    note = (
        "Recalls in percent: how often a right answer is among the first. A confidence interval (CI) tells the spread "
        "over test queries (bootstrap), not over training seeds. Chance: rankings drawn at random."
    )
    groups = [(title, len(group)) for title, group in results.groups if title]
    table = page.table(columns, num_text_columns=2, groups=groups)
    return Section("results", "Results", table + page.paragraph(note))


def _parameters_section(rows: Sequence[ParameterRow]) -> Section:
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    rows = [*rows, ParameterRow("all", total, trainable)]
    columns = [
        ("module", [row.module for row in rows]),
        ("parameters", [f"{row.total:,}" for row in rows]),
        ("trainable", [f"{row.trainable:,}" for row in rows]),
        ("share", [f"{100 * row.trainable / max(1, row.total):.1f} %" for row in rows]),
    ]
    return Section("parameters", "Parameters", page.table(columns, num_text_columns=1, sum_row=True))


def _curves_section(png: bytes | None, findings: Sequence[Finding]) -> Section:
    if png is None:
        return Section("training", "Training", page.paragraph("No training is on record here."))
    told = [f"Warning: {finding.message}." for finding in findings]
    told += dict.fromkeys(f"Try {text}." for finding in findings for text in finding.advice)
    html = "".join([*map(page.paragraph, told), page.picture(png, "training curves")])
    return Section("training", "Training", html, {"curves.png": png})


def _settings_section(settings: Mapping[str, Any]) -> Section:
    flat = flat_settings(settings)
    columns = [("setting", list(flat)), ("value", [str(value) for value in flat.values()])]
    table = page.folded(f"{len(flat)} settings", page.table(columns, num_text_columns=2))
    return Section("settings", "Settings", table)
