"""How retrieval by class shows itself: queries with what they found, classes and their confusion, a map of the vectors.

Shapes: Q queries, G gallery images, E embedding width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from harma_ray.data.splits import Split
from harma_ray.data.transforms import eval_transform
from harma_ray.errors import count
from harma_ray.evaluation import Projection, Section, show_figure
from harma_ray.report import page
from harma_ray.report.figures import MAX_POINTS, draw_classes, draw_confusion
from harma_ray.report.image_text import queries_section
from harma_ray.report.pictures import (
    FAINT,
    GAP,
    MARGIN,
    RIGHT,
    WRONG,
    Layout,
    Thumbs,
    choose_spread,
    load_font,
    make_layout,
    read_images,
    wrap,
)
from harma_ray.retrieval.by_class import ByClassRetrieval

ReadThumbs = Callable[[Iterable[int], int], Thumbs]
"""Reads the images of some rows, at most so many pixels wide and high."""

_K = 6
_THUMB = 96
_MAX_FAILURES = 20
_MAX_PROJECTED = 500
_MAX_CONFUSED = 100
_NUM_TAKEN_FOR = 3


@dataclass(frozen=True)
class Pictured:
    """Where the images of queries and gallery can be read."""

    queries: ReadThumbs
    """By the rows that the queries were chosen of, `ByClassRetrieval.rows`."""
    gallery: ReadThumbs


def gallery_projection(retrieval: ByClassRetrieval, images: Split) -> Projection:
    """Returns up to 500 vectors of the gallery, labelled by class, with thumbnails.

    Args:
        retrieval: Embeddings and classes.
        images: Those of the gallery.
    """
    vectors, classes = retrieval.gallery[:_MAX_PROJECTED], retrieval.result.classes
    labels = [classes.names[number].replace("\t", " ") for number in classes.gallery[: len(vectors)].tolist()]
    shown = read_images(images, np.arange(len(vectors)), longest_side=64)
    return Projection(vectors, labels, torch.stack([eval_transform(image, 32) for image in shown]) / 255)


def retrieval_sections(retrieval: ByClassRetrieval, pictured: Pictured | None, note: str = "") -> list[Section]:
    """Returns the parts of a page about a retrieval by class.

    Args:
        retrieval: Embeddings and ranks.
        pictured: Where the images are; None: nothing is drawn of them.
        note: Why that is, for the reader.

    Raises:
        UserError: If an image cannot be read.
    """
    if pictured:
        pictures = [queries_section(neighbours_sheet(retrieval, pictured)), _failures_section(retrieval, pictured)]
    else:
        pictures = [Section("retrievals", "Some queries", page.paragraph(note or "The images are not there any more."))]
    return [*pictures, _classes_section(retrieval), _confusion_section(retrieval), _map_section(retrieval)]


def neighbours_sheet(
    retrieval: ByClassRetrieval,
    pictured: Pictured,
    *,
    chosen: Sequence[int] | None = None,
    num_queries: int = 8,
    k: int = _K,
    seed: int = 0,
    thumb: int = _THUMB,
) -> Image.Image:
    """Draws queries with the images that they found, those of the query's class in a green frame.

    Args:
        retrieval: Embeddings and ranks.
        pictured: Where the images are.
        chosen: Which queries; None: some, spread over all, which depend on their number and the seed alone.
        num_queries: How many then.
        k: Neighbours; fewer if the gallery is smaller.
        seed: Of the choice.
        thumb: Side of a small image, in pixels.

    Returns:
        An RGB image.

    Raises:
        UserError: If an image cannot be read.
    """
    result = retrieval.result
    queries = (
        chosen if chosen is not None else choose_spread(len(result.ranks), num_queries, np.random.default_rng(seed))
    )
    k = min(k, int(result.num_items.min()))
    scores, items = retrieval.neighbours(queries, k)
    rows = retrieval.rows[list(queries)].tolist()
    own, found = pictured.queries(rows, thumb), pictured.gallery(items[items >= 0].tolist(), thumb)
    layout = make_layout(thumb, thumb + max(200, round(2.0 * thumb)), k * (thumb + GAP))
    strips = [layout.heading("Image to images", f"the first {k} of {count(len(retrieval.gallery), 'image')}")]
    for query, row, near, near_scores in zip(queries, rows, items.tolist(), scores.tolist(), strict=True):
        strips.append(_draw_query(layout, retrieval, query, own[row], near, near_scores, found))
    strips.append(layout.legend([(RIGHT, "of the query's class"), (WRONG, "of another class")]))
    return layout.stack(strips)


def _draw_query(
    layout: Layout,
    retrieval: ByClassRetrieval,
    query: int,
    image: Image.Image,
    items: Sequence[int],
    scores: Sequence[float],
    thumbs: Thumbs,
) -> Image.Image:
    result, classes, thumb = retrieval.result, retrieval.result.classes, layout.thumb
    strip, draw = layout.strip(thumb + 2 * layout.line + 3 * GAP // 2)
    layout.result(strip, MARGIN, image, None, [])
    left, font = MARGIN + thumb + GAP, load_font(layout.size)
    lines = wrap(classes.names[int(classes.queries[query])], font, layout.left - left - GAP, 3)
    layout.write(draw, (left, 0), lines)
    if int(result.ranks[query]) < int(result.num_items[query]):
        note = f"first of its class at rank {int(result.ranks[query]) + 1:,}"
        layout.write(draw, (left, len(lines) * layout.line), wrap(note, font, layout.left - left - GAP, 2), FAINT)
    near = [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
    for place, (item, score) in enumerate(near):
        number = int(classes.gallery[item])
        colour = RIGHT if number == int(classes.queries[query]) else WRONG
        name = wrap(classes.names[number], font, thumb + GAP / 2, 1)
        layout.result(strip, layout.left + place * (thumb + GAP), thumbs[item], colour, [f"{score:.3f}", *name])
    return strip


def _failures_section(retrieval: ByClassRetrieval, pictured: Pictured) -> Section:
    ranks, last = retrieval.result.ranks, max(retrieval.result.ks)
    failed = sorted((ranks >= last).nonzero()[:, 0].tolist(), key=lambda query: -int(ranks[query]))
    shown = f"; the worst {_MAX_FAILURES} are shown" if len(failed) > _MAX_FAILURES else ""
    text = page.paragraph(
        f"{len(failed):,} of {len(ranks):,} queries have no image of their class among the first {last}{shown}."
    )
    if not failed:
        return Section("failures", "Failures", text)
    sheet = neighbours_sheet(retrieval, pictured, chosen=failed[:_MAX_FAILURES])
    drawn = queries_section(sheet, "failures", "Failures")
    return replace(drawn, html=text + drawn.html)


def _classes_section(retrieval: ByClassRetrieval) -> Section:
    figures, classes = retrieval.result.by_class(), retrieval.result.classes
    sizes = dict(
        zip(classes.names, torch.bincount(classes.gallery, minlength=len(classes.names)).tolist(), strict=True)
    )
    columns = [
        ("class", [row.name for row in figures]),
        ("its first neighbour's, where wrong", [_tell_confused(row.taken_for) for row in figures]),
        ("queries", [f"{row.num_queries:,}" for row in figures]),
        ("gallery", [f"{sizes[row.name]:,}" for row in figures]),
        *(
            (f"{name} (%)", [show_figure(row.metrics[name], 1, percent=True) for row in figures])
            for name in retrieval.result.metrics
        ),
    ]
    note = page.paragraph("The worst classes come first.")
    return Section("classes", "Classes", note + page.table(columns, num_text_columns=2))


def _tell_confused(taken_for: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in taken_for[:_NUM_TAKEN_FOR])


def _confusion_section(retrieval: ByClassRetrieval) -> Section:
    names = retrieval.result.classes.names
    if len(names) > _MAX_CONFUSED:
        html = page.paragraph(f"{len(names)} classes are too many for a picture; see the table of classes.")
        return Section("confusion", "Confusion", html)
    png = draw_confusion(retrieval.result.confusion().numpy(), names, "class of the first neighbour")
    note = "Shares of the queries of a class. Of equally near first neighbours a wrong one counts."
    html = page.picture(png, "confusion of classes") + page.paragraph(note)
    return Section("confusion", "Confusion", html, {"confusion.png": png})


def _map_section(retrieval: ByClassRetrieval) -> Section:
    classes = retrieval.result.classes
    labels = [[classes.names[number] for number in numbers.tolist()] for numbers in (classes.queries, classes.gallery)]
    groups = {"gallery images": (retrieval.gallery, labels[1])}
    if retrieval.excluded is None or not bool((retrieval.excluded.sizes > 0).all()):  # not the gallery's own images
        groups["queries"] = (retrieval.queries, labels[0])
    png = draw_classes(groups)
    if png is None:
        return Section("embeddings", "Embeddings", page.paragraph("Too few different images for a map."))
    note = (
        f"A t-SNE map of up to {MAX_POINTS:,} images: near points are alike, the distances between groups mean little."
    )
    html = page.picture(png, "t-SNE map of images by class") + page.paragraph(note)
    return Section("embeddings", "Embeddings", html, {"embeddings.png": png})
