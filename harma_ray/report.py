"""What an evaluation found, for people: tables for the terminal, and a page that opens without a network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from harma_ray import page
from harma_ray.config import flat_settings
from harma_ray.data.schema import Split
from harma_ray.errors import UserError
from harma_ray.figures import MAX_POINTS, draw_curves, draw_embeddings
from harma_ray.pictures import RetrievalDetails, retrieval_sheet

FIRST = 10
"""A query fails if its right answer is not among the first this many."""
PAGE_NAME = "index.html"
_MAX_FAILURES = 30
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
        return _Results(names, [_LABELS.get(name, "") for name in names], groups)


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
    blocks = [_block("", {"metric": results.names, "": results.labels}, left=True)]
    blocks += [_block(title, columns) for title, columns in results.groups]
    lines = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
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


def find_failures(ranks: Tensor) -> list[int]:
    """Returns the queries whose 0-based rank, int64[Q], is `FIRST` or worse; the worst first, equal ones in order."""
    order = torch.argsort(ranks, descending=True, stable=True)
    return order[ranks[order] >= FIRST].tolist()


def write_report(
    folder: Path,
    *,
    title: str,
    split: Split,
    details: RetrievalDetails,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None,
    chance: Mapping[str, float] | None,
    model: nn.Module,
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes a page of results, pictures, failures, a map of the embeddings, parameters and settings.

    The page holds its pictures and style itself and opens without a network; the larger pictures lie beside it too.

    Args:
        folder: Where to write; made if missing.
        title: Heading of the page.
        split: What was evaluated.
        details: Embeddings and ranks.
        metrics: As `RetrievalResult.metrics`, in percent.
        intervals: 95 % interval of each metric, if known.
        chance: Expected values of rankings drawn at random, if known.
        model: The evaluated model, for its parameters alone.
        settings: Settings of the run, nested.
        records: Lines of the run's ``metrics.jsonl``, if it has any.

    Returns:
        Path of ``index.html``.

    Raises:
        UserError: If the folder cannot be written or an image cannot be read.
    """
    labels = split.read(["label_name"]).column("label_name").to_pylist()
    sheet = io.BytesIO()
    retrieval_sheet(details, split).save(sheet, "PNG")
    points = draw_embeddings(details.image_embeddings, details.text_embeddings, details.image_of_text, labels)
    pictures = {"retrievals.png": sheet.getvalue(), "embeddings.png": points, "curves.png": draw_curves(records)}
    pictures = {name: data for name, data in pictures.items() if data is not None}
    sections = [
        _results_section(_Results.of(metrics, intervals, chance)),
        ("pictures", "Some queries", page.picture(pictures["retrievals.png"], "queries with what was found for them")),
        _failures_section(details, split),
        _embeddings_section(pictures.get("embeddings.png")),
        _parameters_section(parameter_table(model)),
        _curves_section(pictures.get("curves.png")),
        _settings_section(settings),
    ]
    sizes = f"{len(details.image_embeddings):,} images, {len(details.texts):,} captions"
    subtitle = f"{split.path.parent.name}/{split.name}: {sizes}"
    top = page.heading(title, subtitle, [(name, text) for name, text, _ in sections])
    text = page.document(title, [top, *(page.section(*parts) for parts in sections)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
        (folder / PAGE_NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder} ({error.strerror}); choose another folder") from error
    return folder / PAGE_NAME


def _results_section(results: _Results) -> tuple[str, str, str]:
    columns = [("metric", results.names), ("", results.labels)]
    columns += [(title, cells) for _, group in results.groups for title, cells in group.items()]
    note = (
        "Recalls in percent: how often a right answer is among the first 1, 5 or 10. A confidence interval (CI) tells "
        "the spread over test images (bootstrap), not over training seeds. Chance: rankings drawn at random."
    )
    groups = [(title, len(group)) for title, group in results.groups]
    return "results", "Results", page.table(columns, num_text_columns=2, groups=groups) + page.paragraph(note)


def _failures_section(details: RetrievalDetails, split: Split) -> tuple[str, str, str]:
    failed_texts = find_failures(details.result.text_to_image_ranks)
    failed_images = find_failures(details.result.image_to_text_ranks)
    parts = [
        page.paragraph(
            f"Queries whose right answer is not among the first {FIRST}, the worst first. Green: right; blue: another "
            "image's, with an equal caption; red: wrong. The number is the cosine."
        ),
        page.subsection(f"Text to image: {_count(failed_texts, details.texts, 'captions')}"),
        page.failed_texts(details, split, failed_texts[:_MAX_FAILURES]),
        page.subsection(f"Image to text: {_count(failed_images, details.image_embeddings, 'images')}"),
        page.failed_images(details, split, failed_images[:_MAX_FAILURES]),
    ]
    return "failures", "Failures", "\n".join(parts)


def _count(failed: Sequence[int], queries: Sized, kind: str) -> str:
    shown = f"; the worst {_MAX_FAILURES} are shown" if len(failed) > _MAX_FAILURES else ""
    return f"{len(failed):,} of {len(queries):,} {kind}{shown}"


def _embeddings_section(png: bytes | None) -> tuple[str, str, str]:
    if png is None:
        return "embeddings", "Embeddings", page.paragraph("Too few different images and captions for a map.")
    note = (
        f"A t-SNE map of up to {MAX_POINTS:,} points, images and captions together: near points are alike, the "
        "distances between groups mean little. Two clouds apart are the usual gap between images and text."
    )
    return "embeddings", "Embeddings", page.picture(png, "t-SNE map of images and captions") + page.paragraph(note)


def _parameters_section(rows: Sequence[ParameterRow]) -> tuple[str, str, str]:
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    rows = [*rows, ParameterRow("all", total, trainable)]
    columns = [
        ("module", [row.module for row in rows]),
        ("parameters", [f"{row.total:,}" for row in rows]),
        ("trainable", [f"{row.trainable:,}" for row in rows]),
        ("share", [f"{100 * row.trainable / max(1, row.total):.1f} %" for row in rows]),
    ]
    return "parameters", "Parameters", page.table(columns, num_text_columns=1, sum_row=True)


def _curves_section(png: bytes | None) -> tuple[str, str, str]:
    content = page.paragraph("No training is on record here.") if png is None else page.picture(png, "training curves")
    return "training", "Training", content


def _settings_section(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    flat = flat_settings(settings)
    columns = [("setting", list(flat)), ("value", [str(value) for value in flat.values()])]
    return "settings", "Settings", page.folded(f"{len(flat)} settings", page.table(columns, num_text_columns=2))
