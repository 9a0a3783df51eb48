"""How an image-text evaluation shows itself: some queries, the failures, a map of the embeddings."""

import io
from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass, field
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.splits import Split
from harma_ray.data.transforms import eval_transform
from harma_ray.errors import count
from harma_ray.evaluation import Evaluation, Projection, Section, show_figure
from harma_ray.report import page
from harma_ray.report.figures import MAX_POINTS, draw_embeddings
from harma_ray.report.pictures import (
    EQUAL,
    RIGHT,
    Colour,
    read_images,
    read_thumbs,
    retrieval_sheet,
    verdict_of_images,
    verdict_of_texts,
)
from harma_ray.retrieval.image_text import RECALL_KS, ImageTextRetrieval, recalls_by_class
from harma_ray.retrieval.ranking import top_k

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text to image", "image to text"
"""Kinds of queries."""
FIRST = 10
"""A query fails if its right answer is not among the first this many."""
_MAX_FAILURES = 30
_MAX_PROJECTED = 500
_THUMB = 112
_NUM_FOUND = 5


@dataclass(frozen=True)
class ImageTextEvaluation(Evaluation):
    """An evaluation of image-text retrieval."""

    retrieval: ImageTextRetrieval = field(kw_only=True)
    """Embeddings and ranks."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the metrics."""
        return self.retrieval.intervals()

    def resampled(self) -> dict[str, np.ndarray]:
        """Returns the metrics of bootstrap samples."""
        return self.retrieval.resampled()

    def first_right(self) -> dict[str, Tensor]:
        """Returns the ranks by which equal captions are right too."""
        result = self.retrieval.result
        return {
            TEXT_TO_IMAGE: result.text_to_image_ranks_by_text,
            IMAGE_TO_TEXT: result.image_to_text_ranks_by_text,
        }

    def show_queries(self, split: Split, kind: str, queries: Sequence[int], most: int) -> str:
        """Returns captions, one an image and one of equal ones, or images, with what was found for them."""
        if kind == IMAGE_TO_TEXT:
            return _show_images(self.retrieval, split, queries[:most])
        return _show_texts(self.retrieval, split, distinct_texts(self.retrieval, queries)[:most])

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return self.retrieval.chance()

    def ceiling(self) -> dict[str, float]:
        """Returns what equal captions leave of recall by index; nothing if no two captions are equal."""
        if len(set(self.retrieval.texts)) == len(self.retrieval.texts):
            return {}
        return {name: value for name, value in self.retrieval.ceiling().items() if not name.endswith("_text")}

    def picture(self, split: Split) -> Image.Image:
        """Draws some queries with their first results."""
        return retrieval_sheet(self.retrieval, split)

    def projection(self, split: Split) -> Projection:
        """Returns up to 500 image embeddings, labelled by class (or by first caption), with thumbnails."""
        vectors = self.retrieval.image_embeddings[:_MAX_PROJECTED]
        columns = split.read(["label_name", "captions"]).slice(0, len(vectors)).to_pylist()
        labels = [(row["label_name"] or row["captions"][0]).replace("\t", " ") for row in columns]
        images = read_images(split, np.arange(len(vectors)), longest_side=64)
        thumbnails = torch.stack([eval_transform(image, 32) for image in images]) / 255
        return Projection(vectors, labels, thumbnails)

    def sections(self, split: Split) -> list[Section]:
        """Returns recalls by class, some queries, the failures and a map of the embeddings.

        Raises:
            UserError: If an image cannot be read.
        """
        retrieval = self.retrieval
        labels = split.read(["label_name"]).column("label_name").to_pylist()
        points = draw_embeddings(retrieval.image_embeddings, retrieval.text_embeddings, retrieval.image_of_text, labels)
        return [
            *_classes_section(retrieval, labels),
            queries_section(retrieval_sheet(retrieval, split)),
            _failures_section(retrieval, split),
            _embeddings_section(points),
        ]


def queries_section(sheet: Image.Image, name: str = "retrievals", title: str = "Some queries") -> Section:
    """Returns the section of a picture of some queries."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    html = page.picture(buffer.getvalue(), "queries with what was found for them")
    return Section(name, title, html, {f"{name}.png": buffer.getvalue()})


def find_failures(ranks: Tensor) -> list[int]:
    """Returns the queries whose 0-based rank, int64[Q], is `FIRST` or worse; the worst first, equal ones in order."""
    order = torch.argsort(ranks, descending=True, stable=True)
    return order[ranks[order] >= FIRST].tolist()


def one_each(queries: Sequence[int], *keys: Sequence[Hashable]) -> list[int]:
    """Keeps of queries, in order, those that share no key with one that was kept before.

    Args:
        queries: Numbers of queries.
        keys: What queries may have in common, such as their captions; each by the queries' numbers.
    """
    seen, kept = set(), []
    for query in queries:
        own = {(kind, key[query]) for kind, key in enumerate(keys)}
        if seen.isdisjoint(own):
            seen |= own
            kept.append(query)
    return kept


def distinct_texts(retrieval: ImageTextRetrieval, texts: Sequence[int]) -> list[int]:
    """Keeps of captions, in order, one an image and one of those that are equal."""
    return one_each(texts, retrieval.image_of_text.tolist(), retrieval.texts)


def _classes_section(retrieval: ImageTextRetrieval, labels: Sequence[str | None]) -> list[Section]:
    """Returns recalls by class, or nothing if there are not two of them."""
    rows = recalls_by_class(retrieval.result, labels)
    if len(rows) < 2:
        return []
    columns = [
        ("class", [row.name for row in rows]),
        ("images", [f"{row.num_images:,}" for row in rows]),
        ("captions", [f"{row.num_texts:,}" for row in rows]),
    ]
    sides = {"image to text (%)": "txt", "text to image (%)": "img"}
    names = {f"{side}_r{k}": f"R@{k}" for side in sides.values() for k in RECALL_KS}
    names |= {"r_mean": "own pair right", "r_mean_text": "equal captions too"}
    columns += [
        (title, [show_figure(row.metrics[name], 1, percent=True) for row in rows]) for name, title in names.items()
    ]
    groups = [("", 2), *((title, len(RECALL_KS)) for title in sides), ("mean of the six (%)", 2)]
    note = page.paragraph(
        "Images of a class and their captions, each ranked in the whole split; the worst class comes first, by the "
        "last column. Few images make a recall rough: the counts say how many stand behind it."
    )
    return [Section("classes", "Classes", note + page.table(columns, num_text_columns=1, groups=groups))]


def _failures_section(retrieval: ImageTextRetrieval, split: Split) -> Section:
    result = retrieval.result
    failed_texts = find_failures(result.text_to_image_ranks_by_text)
    failed_images = find_failures(result.image_to_text_ranks_by_text)
    shown_texts = distinct_texts(retrieval, failed_texts)[:_MAX_FAILURES]
    shown_images = failed_images[:_MAX_FAILURES]
    parts = [
        page.paragraph(
            f"Queries without a right answer among the first {FIRST}, the worst first. An equal caption counts as "
            "right here, so that none is shown that found what it asked for. Green: right; blue: another image's, with "
            "an equal caption; red: wrong. The number is the cosine."
        ),
        page.subsection(f"Text to image: {_count(failed_texts, shown_texts, retrieval.texts, 'caption')}"),
        _show_texts(retrieval, split, shown_texts),
        page.subsection(f"Image to text: {_count(failed_images, shown_images, retrieval.image_embeddings, 'image')}"),
        _show_images(retrieval, split, shown_images),
    ]
    return Section("failures", "Failures", "\n".join(parts))


def _count(failed: Sequence[int], shown: Sequence[int], queries: Sized, kind: str) -> str:
    each = "of each image, and of equal captions, the worst one" if kind == "caption" else "the worst"
    more = f"; {each}, {len(shown)} in all, {'is' if len(shown) == 1 else 'are'} shown" if shown != failed else ""
    return f"{len(failed):,} of {count(len(queries), kind)}{more}"


def _embeddings_section(png: bytes | None) -> Section:
    if png is None:
        html = page.paragraph("Too few different images and captions for a map.")
        return Section("embeddings", "Embeddings", html)
    note = (
        f"A t-SNE map of up to {MAX_POINTS:,} points, images and captions together: near points are alike, the "
        "distances between groups mean little. Two clouds apart are the usual gap between images and text."
    )
    html = page.picture(png, "t-SNE map of images and captions") + page.paragraph(note)
    return Section("embeddings", "Embeddings", html, {"embeddings.png": png})


def _show_texts(retrieval: ImageTextRetrieval, split: Split, texts: Sequence[int]) -> str:
    """Returns captions: the caption, its image, and the images found first."""
    if not texts:
        return ""
    owners = retrieval.image_of_text[list(texts)].tolist()
    num_found = min(_NUM_FOUND, len(retrieval.image_embeddings))
    top_scores, top_items = top_k(retrieval.text_embeddings[list(texts)], retrieval.image_embeddings, num_found)
    thumbs = _read_thumbs(split, {*owners, *top_items.flatten().tolist()})
    sources = split.read(["source"]).column("source").to_pylist()
    result, cards = retrieval.result, []
    for text, owner, scores, items in zip(texts, owners, top_scores.tolist(), top_items.tolist(), strict=True):
        own_score = float(retrieval.text_embeddings[text] @ retrieval.image_embeddings[owner])
        colours = verdict_of_images(retrieval, text, items)
        found = "".join(
            _figure(thumbs[row], colour, f"{score:.3f}", sources[row])
            for row, score, colour in zip(items, scores, colours, strict=True)
        )
        note = _note(result.text_to_image_ranks[text], result.text_to_image_ranks_by_text[text], "own image")
        own = _figure(thumbs[owner], RIGHT, f"{own_score:.3f}", sources[owner], "own ")
        query = f"<p>{escape(retrieval.texts[text])}</p>{note}"
        cards.append(_card(query, "found", own + found))
    return "\n".join(cards)


def _show_images(retrieval: ImageTextRetrieval, split: Split, rows: Sequence[int]) -> str:
    """Returns images: the image, its best caption, and the captions found first."""
    if not rows:
        return ""
    num_found = min(_NUM_FOUND, len(retrieval.texts))
    top_scores, top_items = top_k(retrieval.image_embeddings[list(rows)], retrieval.text_embeddings, num_found)
    thumbs = _read_thumbs(split, set(rows))
    sources = split.read(["source"]).column("source").to_pylist()
    result, cards = retrieval.result, []
    for row, scores, items in zip(rows, top_scores.tolist(), top_items.tolist(), strict=True):
        own = (retrieval.image_of_text == row).nonzero()[:, 0]
        own_scores = retrieval.text_embeddings[own] @ retrieval.image_embeddings[row]
        best = int(own[own_scores.argmax()])
        lines = [_caption(retrieval.texts[best], RIGHT, float(own_scores.max())) + "<hr>"]
        colours = verdict_of_texts(retrieval, row, items)
        lines += [_caption(retrieval.texts[text], c, s) for text, c, s in zip(items, colours, scores, strict=True)]
        note = _note(result.image_to_text_ranks[row], result.image_to_text_ranks_by_text[row], "best own caption")
        query = f'<img alt="" src="{thumbs[row]}">{page.paragraph(sources[row])}{note}'
        cards.append(_card(query, "captions", "".join(lines)))
    return "\n".join(cards)


def _card(query: str, kind: str, content: str) -> str:
    return f'<div class="failure"><div class="query">{query}</div><div class="{kind}">{content}</div></div>'


def _note(rank: object, rank_by_text: object, what: str) -> str:
    """Tells 0-based ranks as people count."""
    own, equal = int(rank) + 1, int(rank_by_text) + 1  # pyright: ignore[reportArgumentType]
    more = f"; one with an equal caption at rank {equal:,}" if equal < own else ""
    return page.paragraph(f"{what} at rank {own:,}{more}")


def _figure(uri: str, colour: Colour, caption: str, description: str, kind: str = "") -> str:
    return (
        f'<figure class="{kind}{_verdict(colour)}"><img alt="{escape(description)}" title="{escape(description)}" '
        f'src="{uri}">{escape(caption)}</figure>'
    )


def _caption(text: str, colour: Colour, score: float) -> str:
    return f'<p class="{_verdict(colour)}"><span class="score">{score:.3f}</span>{escape(text)}</p>'


def _verdict(colour: Colour) -> str:
    return {RIGHT: "right", EQUAL: "equal"}.get(colour, "wrong")


def _read_thumbs(split: Split, rows: set[int]) -> dict[int, str]:
    """Returns small images as data URIs, by row."""
    thumbs = read_thumbs(split, rows, _THUMB)
    return {row: page.data_uri(_jpeg(image), "jpeg") for row, image in thumbs.items()}


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
