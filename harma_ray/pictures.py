"""Pictures of a retrieval: queries with what the model found for them.

Shapes: N images, M texts, E embedding, Q queries, k results of a query.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from harma_ray.data.images import MAX_PIXELS, BadImage, decode_image
from harma_ray.data.order import IndexedSplit, read_samples
from harma_ray.data.schema import Split, index_rows
from harma_ray.errors import UserError
from harma_ray.metrics import RetrievalResult
from harma_ray.ranking import top_k

RIGHT = (22, 140, 60)
"""Green: the query's own image or caption."""
EQUAL = (30, 100, 220)
"""Blue: another image's, but with a caption equal word for word."""
WRONG = (205, 60, 50)
"""Red: anything else."""

_BACKGROUND = (255, 255, 255)
_INK = (25, 28, 32)
_FAINT = (110, 116, 124)
_RULE = (222, 225, 229)
_MARGIN = 16
_GAP = 10
_FRAME = 4  # width of a right image's frame, in pixels; a wrong one has a line of 1


class RetrievalDetails(Protocol):
    """What a picture or a page needs to know of an image-text evaluation."""

    @property
    def image_embeddings(self) -> Tensor:
        """fp32[N, E], L2-normalised, in row order."""
        ...

    @property
    def text_embeddings(self) -> Tensor:
        """fp32[M, E], L2-normalised."""
        ...

    @property
    def texts(self) -> list[str]:
        """M captions."""
        ...

    @property
    def image_of_text(self) -> Tensor:
        """int64[M], the row of each caption's image."""
        ...

    @property
    def result(self) -> RetrievalResult:
        """Ranks."""
        ...


def read_images(
    split: Split, rows: Sequence[int] | np.ndarray, *, longest_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """Reads the images of some rows, in their order.

    Args:
        split: Where they lie.
        rows: Row numbers; they may repeat.
        longest_side: If given, larger images are made smaller, aspect kept, so that no more than one large image is in
            memory at a time.
        max_pixels: Largest image that is decoded.

    Raises:
        UserError: If an image cannot be decoded; the message names split, row and source.
    """
    if not len(rows):
        return []
    wanted, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    samples = np.stack([wanted, np.zeros_like(wanted)], axis=1)
    table = read_samples(IndexedSplit(split, index_rows(split)), samples, 0).select(["image", "source"])
    images = []
    for row, data, source in zip(wanted, table["image"], table["source"], strict=True):
        try:
            image = decode_image(data.as_py(), max_pixels=max_pixels)
        except BadImage as error:
            raise UserError(f"{split.path}, row {row}, {source}: {error}") from error
        if longest_side is not None:
            image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        images.append(image)
    return [images[number] for number in place]


def verdict_of_images(details: RetrievalDetails, text: int, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns ``RIGHT``, ``EQUAL`` or ``WRONG`` for each image that was found for a caption."""
    caption = details.texts[text]
    owners = {int(details.image_of_text[i]) for i, other in enumerate(details.texts) if other == caption}
    own = int(details.image_of_text[text])
    return [RIGHT if row == own else EQUAL if row in owners else WRONG for row in rows]


def verdict_of_texts(details: RetrievalDetails, row: int, texts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns ``RIGHT``, ``EQUAL`` or ``WRONG`` for each caption that was found for an image."""
    own = set((details.image_of_text == row).nonzero()[:, 0].tolist())
    captions = {details.texts[i] for i in own}
    return [RIGHT if text in own else EQUAL if details.texts[text] in captions else WRONG for text in texts]


def choose_queries(details: RetrievalDetails, num_queries: int, seed: int) -> tuple[list[int], list[int]]:
    """Chooses images spread over all rows and one caption of each.

    The choice depends on the number of images, their captions and the seed, never on the embeddings, so that the
    pictures of different models, or of one model as it learns, show the same queries.

    Returns:
        Up to `num_queries` rows, and as many texts.
    """
    rng = np.random.default_rng(seed)
    num_images = len(details.image_embeddings)
    bounds = np.linspace(0, num_images, min(num_queries, num_images) + 1).astype(np.int64)
    rows = [int(rng.integers(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    return rows, [int(rng.choice((details.image_of_text == row).nonzero()[:, 0].numpy())) for row in rows]


def retrieval_sheet(
    details: RetrievalDetails,
    split: Split,
    *,
    num_queries: int = 6,
    k: int = 5,
    seed: int = 0,
    thumb: int = 96,
) -> Image.Image:
    """Draws some captions with the images found for them, then some images with the captions found for them.

    Args:
        details: Embeddings and ranks of the split.
        split: Where the images lie.
        num_queries: Queries of each direction, spread over the split; the same for every model.
        k: Results of a query.
        seed: Of the choice of queries.
        thumb: Side of a small image, in pixels.

    Returns:
        An RGB image.
    """
    rows, texts = choose_queries(details, num_queries, seed)
    num_images, num_texts = len(details.image_embeddings), len(details.texts)
    image_scores, image_items = top_k(details.text_embeddings[texts], details.image_embeddings, min(k, num_images))
    text_scores, text_items = top_k(details.image_embeddings[rows], details.text_embeddings, min(k, num_texts))
    needed = sorted({*rows, *image_items.flatten().tolist()})
    thumbs = dict(zip(needed, read_images(split, needed, longest_side=thumb), strict=True))

    size = max(12, round(thumb / 7))
    regular, bold = load_font(size), load_font(size, bold=True)
    line = round(size * 1.4)
    text_width = max(230, 2 * thumb)
    width = max(660, 2 * _MARGIN + text_width + image_items.shape[1] * (thumb + _GAP))
    parts = [_heading("Text to image", f"the first {image_items.shape[1]} of {num_images:,} images", width, size)]
    for text, scores, items in zip(texts, image_scores, image_items, strict=True):
        found = items.tolist()
        cells = [(thumbs[row], float(score)) for row, score in zip(found, scores, strict=True)]
        strip = Image.new("RGB", (width, max(thumb + line, 5 * line) + _GAP), _BACKGROUND)
        draw = ImageDraw.Draw(strip)
        lines = wrap(details.texts[text], regular, text_width - _GAP, max_lines=max(3, (thumb + line) // line - 1))
        draw.multiline_text((_MARGIN, 0), "\n".join(lines), _INK, regular, spacing=line - size)
        below = len(lines) * line + 2
        draw.text((_MARGIN, below), _rank_note(details.result.text_to_image_ranks[text], "own image"), _FAINT, regular)
        for place, ((image, score), colour) in enumerate(zip(cells, verdict_of_images(details, text, found), strict=True)):
            left = _MARGIN + text_width + place * (thumb + _GAP)
            strip.paste(framed(image, thumb, colour), (left, 0))
            draw.text((left + thumb / 2, thumb + 2), f"{score:.3f}", _FAINT, regular, anchor="ma")
        parts.append(strip)
    parts.append(_heading("Image to text", f"the first {text_items.shape[1]} of {num_texts:,} captions", width, size))
    for row, scores, items in zip(rows, text_scores, text_items, strict=True):
        left = _MARGIN + thumb + 2 * _GAP
        lines = [wrap(details.texts[text], regular, width - _MARGIN - left - 5 * size, max_lines=2) for text in items]
        height = max(thumb + line, line * sum(map(len, lines))) + _GAP
        strip = Image.new("RGB", (width, height), _BACKGROUND)
        draw = ImageDraw.Draw(strip)
        strip.paste(framed(thumbs[row], thumb, None), (_MARGIN, 0))
        draw.text((_MARGIN, thumb + 2), _rank_note(details.result.image_to_text_ranks[row], "first"), _FAINT, regular)
        top = 0
        colours = verdict_of_texts(details, row, items.tolist())
        for caption, score, colour in zip(lines, scores, colours, strict=True):
            bottom = top + len(caption) * line
            draw.rectangle((left, top + 1, left + (_FRAME if colour != WRONG else 1), bottom - 3), fill=colour)
            draw.text((left + 10, top), f"{float(score):.3f}", _FAINT, regular)
            font, ink = (bold, colour) if colour != WRONG else (regular, _INK)
            draw.multiline_text((left + 10 + 4 * size, top), "\n".join(caption), ink, font, spacing=line - size)
            top = bottom
        parts.append(strip)
    return _stack(parts, width)
