"""Pictures of composed retrieval: references and texts with the images that the model found for them.

Shapes: Q queries, G gallery images, F embedding, n images that a query is ranked among, k results of a query.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from harma_ray.data.padding import padded_transform
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.splits import Split
from harma_ray.evaluation import Evaluation, Projection, Section, show_figure
from harma_ray.report import page
from harma_ray.report.image_text import FIRST, find_failures, one_each, queries_section
from harma_ray.report.pictures import (
    FAINT,
    GAP,
    MARGIN,
    RIGHT,
    RULE,
    WRONG,
    Colour,
    Layout,
    Thumbs,
    choose_spread,
    load_font,
    make_layout,
    read_images,
    read_thumbs,
    wrap,
)
from harma_ray.retrieval.composed import CATEGORY_KS, ComposedRetrieval
from harma_ray.retrieval.ranking import top_k

REFERENCE: Colour = (232, 150, 20)
"""Orange: the query's own reference, where it is among the results."""

_K = 6
_THUMB = 96
_MAX_FAILURES = 20
_MAX_PROJECTED = 500


@dataclass(frozen=True)
class ComposedEvaluation(Evaluation):
    """An evaluation of composed retrieval."""

    retrieval: ComposedRetrieval = field(kw_only=True)
    """Embeddings and ranks."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the protocol's metrics."""
        return self.retrieval.intervals()

    def resampled(self) -> dict[str, np.ndarray]:
        """Returns the metrics of bootstrap samples."""
        return self.retrieval.resampled()

    def first_right(self) -> dict[str, Tensor]:
        """Returns the ranks of the targets."""
        return {"image and text to image": self.retrieval.result.ranks}

    def show_queries(self, split: Split, kind: str, queries: Sequence[int], most: int) -> str:
        """Returns queries, one a reference, with what was found for them; nothing if the images are not there."""
        pictured, chosen = split.pictured, one_each(queries, self.retrieval.queries.reference.tolist())[:most]
        return queries_section(_draw_sheet(self.retrieval, pictured, chosen, _K, _THUMB)).html if pictured else ""

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return self.retrieval.chance()

    def picture(self, split: Split) -> Image.Image | None:
        """Draws some queries with their first results; nothing if the images are not there any more."""
        pictured = split.pictured
        return composed_sheet(self.retrieval, pictured) if pictured else None

    def projection(self, split: Split) -> Projection:
        """Returns up to 500 gallery embeddings, labelled by name, with thumbnails if there are images."""
        vectors = self.retrieval.gallery_embeddings[:_MAX_PROJECTED]
        names = split.read(["source"]).column("source").to_pylist()[: len(vectors)]
        thumbnails, pictured = None, split.pictured
        if pictured:
            images = read_images(pictured, np.arange(len(vectors)), longest_side=64)
            thumbnails = torch.stack([padded_transform(image, 32, padding="square") for image in images]) / 255
        return Projection(vectors, [name.replace("\t", " ") for name in names], thumbnails)

    def sections(self, split: Split) -> list[Section]:
        """Returns recalls by category, and, if the images are still there, some queries and the worst ones.

        Raises:
            UserError: If an image cannot be read.
        """
        sections, pictured = _categories_section(self.retrieval), split.pictured
        if pictured:
            sheet = composed_sheet(self.retrieval, pictured)
            sections += [queries_section(sheet), _failures_section(self.retrieval, pictured)]
        return sections


def composed_sheet(
    retrieval: ComposedRetrieval, split: Split, *, num_queries: int = 6, k: int = _K, seed: int = 0, thumb: int = _THUMB
) -> Image.Image:
    """Draws some queries, each with the images found for it and, if it is not among them, its target.

    Which queries depends on their number and the seed, never on the embeddings, so that the pictures of different
    models, or of one model as it learns, show the same ones.

    Args:
        retrieval: Embeddings and ranks.
        split: The gallery.
        num_queries: Queries, spread over all.
        k: Results of a query.
        seed: Of the choice of queries.
        thumb: Side of a small image, in pixels.

    Returns:
        An RGB image.

    Raises:
        UserError: If an image cannot be read.
    """
    chosen = choose_spread(len(retrieval.query_embeddings), num_queries, np.random.default_rng(seed))
    return _draw_sheet(retrieval, split, chosen, k, thumb)


def _categories_section(retrieval: ComposedRetrieval) -> list[Section]:
    """Returns recalls by the queries' categories, or nothing if there are not two of them."""
    queries, found = retrieval.queries, retrieval.result.metrics
    sizes, galleries = Counter(queries.categories or ()), Counter(queries.gallery_categories or ())
    if len(sizes) < 2:
        return []
    names = sorted(sizes, key=lambda name: sum(found[f"{name}_recall_at{k}"] for k in CATEGORY_KS))
    columns = [("category", names)]
    columns += [
        (title, [f"{of[name]:,}" for name in names]) for title, of in (("queries", sizes), ("images", galleries))
    ]
    for k in CATEGORY_KS:
        cells = [show_figure(found[f"{name}_recall_at{k}"], 1, percent=True) for name in names]
        columns.append((f"R@{k} (%)", cells))
    note = page.paragraph("Each category's queries are ranked among its own images. The worst comes first.")
    return [Section("classes", "Categories", note + page.table(columns, num_text_columns=1))]


def _failures_section(retrieval: ComposedRetrieval, split: Split) -> Section:
    failed = find_failures(retrieval.result.ranks)
    chosen = one_each(failed, retrieval.queries.reference.tolist())[:_MAX_FAILURES]
    shown = f"; of each reference the worst one, {len(chosen)} in all, are shown" if chosen != failed else ""
    text = page.paragraph(
        f"{len(failed):,} of {len(retrieval.result.ranks):,} queries have their target outside the first {FIRST}"
        f"{shown}. The worst come first."
    )
    if not failed:
        return Section("failures", "Failures", text)
    drawn = queries_section(_draw_sheet(retrieval, split, chosen, _K, _THUMB), "failures", "Failures")
    return replace(drawn, html=text + drawn.html)


@dataclass(frozen=True)
class _Answer:
    """What the model found for a query."""

    query: int
    items: list[int]
    """k rows of the gallery, the best first."""
    scores: list[float]
    num_candidates: int
    """n."""
    reference: int
    """Row of the gallery."""
    target: int
    """Row of the gallery."""
    target_score: float


def _find_answer(retrieval: ComposedRetrieval, query: int, k: int) -> _Answer:
    """Ranks what the query's protocol ranks; k or, if there are not as many, all images are results."""
    vector, gallery = retrieval.query_embeddings[query], retrieval.gallery_embeddings
    target, rows = int(retrieval.queries.target[query]), _find_candidates(retrieval.queries, query)
    scores, places = top_k(vector[None], gallery[rows], min(k, len(rows)))
    return _Answer(
        query=query,
        items=rows[places[0]].tolist(),
        scores=scores[0].tolist(),
        num_candidates=len(rows),
        reference=int(retrieval.queries.reference[query]),
        target=target,
        target_score=float(vector @ gallery[target]),
    )


def _find_candidates(queries: ComposedQueries, query: int) -> Tensor:
    """Returns the rows, int64[n], increasing, that a query is ranked among: see `composed_metrics`."""
    rows = torch.arange(len(queries.names))
    if queries.members is not None:
        return rows[rows != queries.reference[query]]
    if queries.categories is None or queries.gallery_categories is None:
        return rows
    own = queries.categories[query]
    return rows[torch.tensor([category == own for category in queries.gallery_categories])]


def _draw_sheet(retrieval: ComposedRetrieval, split: Split, chosen: Sequence[int], k: int, thumb: int) -> Image.Image:
    queries = retrieval.queries
    answers = [_find_answer(retrieval, query, k) for query in chosen]
    needed = (row for answer in answers for row in (*answer.items, answer.target, answer.reference))
    thumbs = read_thumbs(split, needed, thumb)
    num_results = max(len(answer.items) for answer in answers)
    query_width = thumb + 2 * _sign_width(thumb) + _text_width(thumb)
    layout = make_layout(thumb, query_width, (num_results + 1) * (thumb + GAP) + 2 * GAP)
    strips = [layout.heading("Image and text to image", f"the first {num_results} images{_restriction(queries)}")]
    strips += [_draw_query(layout, retrieval, answer, thumbs, num_results) for answer in answers]
    entries = [(RIGHT, "target"), (REFERENCE, "reference"), (WRONG, "wrong")]
    strips.append(layout.legend(entries if queries.members is None else [entries[0], entries[2]]))
    return layout.stack(strips)


def _text_width(thumb: int) -> int:
    return max(240, round(2.5 * thumb))


def _sign_width(thumb: int) -> int:
    return max(36, round(thumb * 0.4))


def _restriction(queries: ComposedQueries) -> str:
    if queries.members is not None:
        return ", the reference left out"
    return " of the query's category" if queries.categories is not None else ""


def _draw_query(
    layout: Layout, retrieval: ComposedRetrieval, answer: _Answer, thumbs: Thumbs, num_results: int
) -> Image.Image:
    """Draws a query, its results and, behind a line, the target if it is not one of them."""
    thumb, line, sign = layout.thumb, layout.line, _sign_width(layout.thumb)
    text = retrieval.queries.texts()[answer.query]
    lines = wrap(text, load_font(layout.size), _text_width(thumb), max(3, thumb // line + 1))
    notes = _tell_ranks(retrieval, answer)
    notes_top = len(lines) * line + GAP // 2
    strip, draw = layout.strip(max(thumb + 2 * line, notes_top + len(notes) * line) + 3 * GAP // 2)
    layout.result(strip, MARGIN, thumbs[answer.reference], None, ["reference"])
    _draw_sign(draw, MARGIN + thumb + sign // 2, layout, "+")
    left = MARGIN + thumb + sign
    layout.write(draw, (left, 0), lines)
    layout.write(draw, (left, notes_top), notes, FAINT)
    _draw_sign(draw, layout.left - sign // 2, layout, "→")
    for place, (row, score) in enumerate(zip(answer.items, answer.scores, strict=True)):
        is_reference = row == answer.reference
        colour = RIGHT if row == answer.target else REFERENCE if is_reference else WRONG
        below = [f"{score:.3f}", "reference" if is_reference else ""]
        layout.result(strip, layout.left + place * (thumb + GAP), thumbs[row], colour, below)
    if answer.target not in answer.items:
        left = layout.left + num_results * (thumb + GAP) + 2 * GAP
        draw.line((left - 3 * GAP // 2, 0, left - 3 * GAP // 2, thumb - 1), RULE)
        below = [f"{answer.target_score:.3f}", f"rank {int(retrieval.result.ranks[answer.query]) + 1:,}"]
        layout.result(strip, left, thumbs[answer.target], RIGHT, below)
    return strip


def _draw_sign(draw: ImageDraw.ImageDraw, centre: int, layout: Layout, sign: str) -> None:
    draw.text((centre, layout.thumb / 2), sign, FAINT, load_font(round(1.6 * layout.size), bold=True), anchor="mm")


def _tell_ranks(retrieval: ComposedRetrieval, answer: _Answer) -> list[str]:
    """Tells 0-based ranks as people count."""
    queries, result, query = retrieval.queries, retrieval.result, answer.query
    notes = [f"target at rank {int(result.ranks[query]) + 1:,} of {answer.num_candidates:,}"]
    if queries.members is not None and result.subset_ranks is not None:
        num_others = len(set(queries.members[query]) - {answer.reference})
        notes.append(f"rank {int(result.subset_ranks[query]) + 1} of {num_others} in its subset")
    elif queries.categories is not None:
        notes.append(f"category {queries.categories[query]}")
    return notes
