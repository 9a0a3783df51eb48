"""How an image-text evaluation shows itself: some queries, the failures, a map of the embeddings."""

from __future__ import annotations

import io
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.splits import Split
from harma_ray.data.transforms import eval_transform
from harma_ray.evaluation import Evaluation, Projection, Section
from harma_ray.report import page
from harma_ray.report.figures import MAX_POINTS, draw_embeddings
from harma_ray.report.pictures import read_images, retrieval_sheet
from harma_ray.retrieval.image_text import ImageTextRetrieval

FIRST = 10
"""A query fails if its right answer is not among the first this many."""
_MAX_FAILURES = 30
_MAX_PROJECTED = 500


@dataclass(frozen=True)
class ImageTextEvaluation(Evaluation):
    """An evaluation of image-text retrieval."""

    retrieval: ImageTextRetrieval = field(kw_only=True)
    """Embeddings and ranks."""

    @staticmethod
    def of(retrieval: ImageTextRetrieval) -> ImageTextEvaluation:
        """Measures a retrieval."""
        return ImageTextEvaluation(retrieval.result.metrics, retrieval=retrieval)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the metrics."""
        return self.retrieval.intervals()

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return self.retrieval.chance()

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
        """Returns some queries, the failures and a map of the embeddings.

        Raises:
            UserError: If an image cannot be read.
        """
        retrieval = self.retrieval
        labels = split.read(["label_name"]).column("label_name").to_pylist()
        points = draw_embeddings(retrieval.image_embeddings, retrieval.text_embeddings, retrieval.image_of_text, labels)
        return [
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


def _failures_section(retrieval: ImageTextRetrieval, split: Split) -> Section:
    failed_texts = find_failures(retrieval.result.text_to_image_ranks)
    failed_images = find_failures(retrieval.result.image_to_text_ranks)
    parts = [
        page.paragraph(
            f"Queries whose right answer is not among the first {FIRST}, the worst first. Green: right; blue: another "
            "image's, with an equal caption; red: wrong. The number is the cosine."
        ),
        page.subsection(f"Text to image: {_count(failed_texts, retrieval.texts, 'captions')}"),
        page.failed_texts(retrieval, split, failed_texts[:_MAX_FAILURES]),
        page.subsection(f"Image to text: {_count(failed_images, retrieval.image_embeddings, 'images')}"),
        page.failed_images(retrieval, split, failed_images[:_MAX_FAILURES]),
    ]
    return Section("failures", "Failures", "\n".join(parts))


def _count(failed: Sequence[int], queries: Sized, kind: str) -> str:
    shown = f"; the worst {_MAX_FAILURES} are shown" if len(failed) > _MAX_FAILURES else ""
    return f"{len(failed):,} of {len(queries):,} {kind}{shown}"


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
