"""What a page about an image-text evaluation shows: some queries, the failures, a map of the embeddings."""

from __future__ import annotations

import io
from collections.abc import Sequence, Sized

import torch
from PIL import Image
from torch import Tensor

from harma_ray import page
from harma_ray.data.schema import Split
from harma_ray.figures import MAX_POINTS, draw_embeddings
from harma_ray.pictures import RetrievalDetails, retrieval_sheet
from harma_ray.task import Section

FIRST = 10
"""A query fails if its right answer is not among the first this many."""
_MAX_FAILURES = 30


def image_text_sections(details: RetrievalDetails, split: Split) -> list[Section]:
    """Returns the sections of a page.

    Raises:
        UserError: If an image cannot be read.
    """
    labels = split.read(["label_name"]).column("label_name").to_pylist()
    points = draw_embeddings(details.image_embeddings, details.text_embeddings, details.image_of_text, labels)
    return [
        queries_section(retrieval_sheet(details, split)),
        _failures_section(details, split),
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


def _failures_section(details: RetrievalDetails, split: Split) -> Section:
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
