"""What an evaluation found, for people: tables for the terminal, and a page that opens without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from harma_ray.config import StartConfig
from harma_ray.evaluation import Metrics, Section
from harma_ray.report import page
from harma_ray.report.figures import draw_curves
from harma_ray.settings import flat_settings
from harma_ray.training.health import Finding, standing_findings

PAGE_NAME = "index.html"
_VARIANTS = {"": "own pair right", "_text": "equal captions right too"}
_Bounds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class FiguresTable:
    """Figures of evaluations, for the terminal (``str``) and for a page."""

    names: Mapping[str, list[str]]
    """Columns of text by title."""
    groups: Sequence[tuple[str, Mapping[str, list[str]]]]
    """Groups of columns of numbers, each under its title, which may be empty."""

    def __str__(self) -> str:
        """Returns a plain table."""
        blocks = [_block("", self.names, left=True), *(_block(title, columns) for title, columns in self.groups)]
        lines = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
        top = [line for line in lines[:2] if line]  # one group has no title
        return "\n".join([*top, "-" * max(map(len, lines)), *lines[2:]])

    def to_html(self) -> str:
        """Returns a table of a page."""
        columns = [*self.names.items(), *(column for _, group in self.groups for column in group.items())]
        sizes = [(title, len(group)) for title, group in self.groups if title]
        return page.table(columns, num_text_columns=len(self.names), groups=sizes)


def _block(title: str, columns: Mapping[str, list[str]], *, left: bool = False) -> list[str]:
    """Returns lines of equal width: a title over a table of aligned columns."""
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    align = ["left" if left else "right"] * len(columns)
    lines = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align).splitlines()
    table_width = max(map(len, lines))  # a line that ends in empty cells is shorter
    width = max(len(title), table_width)
    lines = [line.ljust(table_width) for line in lines]
    return [title.ljust(width), *(line.ljust(width) if left else line.rjust(width) for line in lines)]


def results_table(
    metrics: Metrics,
    found: Mapping[str, float],
    intervals: _Bounds | None = None,
    chance: Mapping[str, float] | None = None,
    ceiling: Mapping[str, float] | None = None,
) -> FiguresTable:
    """Returns the figures of an evaluation as a table of at most 100 columns on a terminal.

    A metric and its duplicate-aware variant ``NAME_text``, for which equal captions are right too, share a row.

    Args:
        metrics: The task's.
        found: Names and values, as `Evaluation.metrics`.
        intervals: 95 % interval of each; None or empty leaves the columns out, as below.
        chance: Expected values of rankings drawn at random.
        ceiling: Expected values of rankings without a mistake, see `Evaluation.ceiling`.
    """
    names = [name for name in found if name.removesuffix("_text") not in found.keys() - {name}]
    variants = {title: [name + suffix for name in names] for suffix, title in _VARIANTS.items()}
    groups = [
        (title, _columns(metrics, keys, found, intervals, chance, ceiling))
        for title, keys in variants.items()
        if not found.keys().isdisjoint(keys)
    ]
    if len(groups) == 1:
        groups = [("", groups[0][1])]
    return FiguresTable({"metric": names, "": [metrics.labels.get(name, "") for name in names]}, groups)


def comparison_table(
    metrics: Metrics, found: Mapping[str, Mapping[str, float]], intervals: Mapping[str, _Bounds]
) -> FiguresTable:
    """Returns the figures of several kinds of queries side by side.

    Args:
        metrics: The task's.
        found: Names and values by kind; those that all kinds have are shown.
        intervals: Their 95 % intervals by kind.
    """
    names = [name for name in next(iter(found.values())) if all(name in other for other in found.values())]
    groups = [(kind, _columns(metrics, names, figures, intervals[kind])) for kind, figures in found.items()]
    return FiguresTable({"metric": names}, groups)


def _columns(
    metrics: Metrics,
    names: Sequence[str],
    found: Mapping[str, float],
    intervals: _Bounds | None,
    chance: Mapping[str, float] | None = None,
    ceiling: Mapping[str, float] | None = None,
) -> dict[str, list[str]]:
    """Returns the cells of some metrics by the titles of their columns; what a metric lacks stays empty."""

    def cells(values: Mapping[str, Sequence[float]]) -> list[str]:
        return ["-".join(metrics.show(name, value, 1) for value in values.get(name, ())) for name in names]

    columns = {"figure" if metrics.lower_is_better else "%": cells({name: [value] for name, value in found.items()})}
    if intervals:
        columns["95 % CI"] = cells(intervals)
    for title, expected in (("chance", chance), ("ceiling", ceiling)):
        if expected and not expected.keys().isdisjoint(names):
            columns[title] = cells({name: [value] for name, value in expected.items()})
    return columns


def parameter_table(model: nn.Module) -> dict[str, list[int]]:
    """Counts the parameters, all and the trainable ones, of a model by the first two levels of its modules.

    Adapters are counted apart; the order is the model's.

    A parameter that several modules share counts once, where it is first met.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        count = counts.setdefault(".".join(parts[:2]) + (" adapters" if "adapter" in parts else ""), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return counts


def write_report(
    folder: Path,
    *,
    title: str,
    subtitle: str,
    results: FiguresTable,
    sections: Sequence[Section],
    model: nn.Module,
    settings: Mapping[str, Any],
    metrics: Metrics,
    records: Sequence[Mapping[str, Any]] = (),
    about: Section | None = None,
) -> Path:
    """Writes a page of results, of what the task shows, of parameters, training curves and settings.

    The page holds its pictures and style itself and opens without a network; the larger pictures lie beside it too.

    Args:
        folder: Where to write; made if missing.
        title: Heading of the page.
        subtitle: What was evaluated.
        results: What it found.
        sections: What the task shows; see `Evaluation.sections`.
        model: The evaluated model, for its parameters alone.
        settings: Settings of the run, nested.
        metrics: The task's metrics; their objective is drawn over the epochs.
        records: Lines of the run's ``metrics.jsonl``, if it has any.
        about: What was evaluated in full; stands before the results.

    Returns:
        Path of ``index.html``.

    Raises:
        UserError: If the folder cannot be written.
    """
    sections = [
        *([about] if about else []),
        _results_section(results),
        *sections,
        _parameters_section(parameter_table(model)),
        _curves_section(draw_curves(records, metrics, _start_title(settings)), standing_findings(records)),
        _settings_section(settings),
    ]
    return page.write_page(folder, PAGE_NAME, title, subtitle, sections)


def _start_title(settings: Mapping[str, Any]) -> str:
    """Returns what the model of step 0 is called, by the settings of a run; empty: they do not tell."""
    return StartConfig(**settings["started_from"]).title if "started_from" in settings else ""


def _results_section(results: FiguresTable) -> Section:
    note = (
        "Recalls in percent: how often a right answer is among the first. A confidence interval (CI) tells the spread "
        "over test queries (bootstrap), not over training seeds. Chance: rankings drawn at random."
    )
    if any("ceiling" in columns for _, columns in results.groups):
        note += " Ceiling: a model that makes no mistake, and tells equal captions of different images apart by chance."
    return Section("results", "Results", results.to_html() + page.paragraph(note))


def _parameters_section(counts: Mapping[str, Sequence[int]]) -> Section:
    counts = {**counts, "all": [sum(column) for column in zip(*counts.values(), strict=True)]}
    columns = [
        ("module", list(counts)),
        ("parameters", [f"{total:,}" for total, _ in counts.values()]),
        ("trainable", [f"{trainable:,}" for _, trainable in counts.values()]),
        ("share", [f"{100 * trainable / max(1, total):.1f} %" for total, trainable in counts.values()]),
    ]
    return Section("parameters", "Parameters", page.table(columns, num_text_columns=1, sum_row=True))


def _curves_section(png: bytes | None, findings: Sequence[Finding]) -> Section:
    if png is None:
        return Section("training", "Training", page.paragraph("No training is on record here."))
    texts = [f"Warning: {finding.message}." for finding in findings]
    texts += dict.fromkeys(f"Try {text}." for finding in findings for text in finding.advice)
    html = "".join([*map(page.paragraph, texts), page.picture(png, "training curves")])
    return Section("training", "Training", html, {"curves.png": png})


def _settings_section(settings: Mapping[str, Any]) -> Section:
    flat = flat_settings(settings)
    columns = [("setting", list(flat)), ("value", [str(value) for value in flat.values()])]
    table = page.folded(f"{len(flat)} settings", page.table(columns, num_text_columns=2))
    return Section("settings", "Settings", table)
