"""Pictures of a retrieval: queries with what the model found for them; the pieces that such pictures are made of.

Shapes: N images, M texts, E embedding, Q queries, k results of a query.
"""

import importlib.util
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from harma_ray.data.images import BadImage, decode_stored
from harma_ray.data.order import IndexedSplit, read_samples
from harma_ray.data.splits import Split, index_rows
from harma_ray.errors import UserError, count
from harma_ray.retrieval.image_text import ImageTextRetrieval
from harma_ray.retrieval.ranking import top_k

Colour = tuple[int, int, int]
Thumbs = Mapping[int, Image.Image]
"""Small images by row."""

RIGHT: Colour = (22, 140, 60)
"""Green: the query's own image or caption."""
EQUAL: Colour = (30, 100, 220)
"""Blue: another image's, but with a caption equal word for word."""
WRONG: Colour = (205, 60, 50)
"""Red: anything else."""

INK: Colour = (25, 28, 32)
FAINT: Colour = (110, 116, 124)
RULE: Colour = (222, 225, 229)
MARGIN = 16
"""Left and right of a sheet, in pixels."""
GAP = 10
"""Between images, in pixels."""
_BACKGROUND = (255, 255, 255)
_PADDING = (236, 238, 240)
_FRAME = 4  # width of a right image's frame, in pixels; a wrong one has a line of 1


@dataclass(frozen=True)
class Layout:
    """Sizes of a sheet, in pixels, and its pieces: strips as wide as the sheet, one below another."""

    thumb: int
    """Side of a small image."""
    size: int
    """Of the font."""
    line: int
    """Height of a line of text."""
    left: int
    """Where the results begin; the query stands left of it."""
    width: int
    """Of the sheet."""

    def strip(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """Returns an empty strip and what draws on it."""
        strip = Image.new("RGB", (self.width, height), _BACKGROUND)
        return strip, ImageDraw.Draw(strip)

    def write(
        self, draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], ink: Colour = INK, *, bold: bool = False
    ) -> None:
        """Writes lines whose upper left corner is `at`."""
        for number, text in enumerate(lines):
            draw.text((at[0], at[1] + number * self.line), text, ink, load_font(self.size, bold=bold))

    def result(
        self, strip: Image.Image, left: int, image: Image.Image, colour: Colour | None, notes: list[str]
    ) -> None:
        """Draws an image at the top of a strip, framed as `framed` does it, with short lines centred below."""
        strip.paste(framed(image, self.thumb, colour), (left, 0))
        draw, font = ImageDraw.Draw(strip), load_font(self.size)
        for number, note in enumerate(notes):
            at = (left + self.thumb / 2, self.thumb + 1 + number * self.line)
            draw.text(at, note, FAINT, font, anchor="ma")

    def heading(self, title: str, note: str) -> Image.Image:
        """Returns a strip with a title and, above the results, a note."""
        strip, draw = self.strip(3 * self.line)
        draw.text((MARGIN, self.line // 2), title, INK, load_font(round(1.3 * self.size), bold=True))
        draw.text((self.left, round(0.7 * self.line)), note, FAINT, load_font(self.size))
        draw.line((MARGIN, round(2.3 * self.line), self.width - MARGIN, round(2.3 * self.line)), RULE)
        return strip

    def legend(self, entries: Sequence[tuple[Colour, str]]) -> Image.Image:
        """Returns a strip that tells what frames and numbers mean."""
        strip, draw = self.strip(2 * self.line)
        left = float(MARGIN)
        for colour, text in entries:
            width = _FRAME if colour != WRONG else 1
            draw.rectangle((left, 2, left + self.size, 2 + self.size), outline=colour, width=width)
            draw.text((left + 1.5 * self.size, 0), text, FAINT, load_font(self.size))
            left += 4 * self.size + load_font(self.size).getlength(text)
        draw.text((left, 0), "number: cosine", FAINT, load_font(self.size))
        return strip

    def stack(self, strips: Sequence[Image.Image]) -> Image.Image:
        """Returns the sheet of some strips."""
        sheet = Image.new("RGB", (self.width, sum(strip.height for strip in strips)), _BACKGROUND)
        top = 0
        for strip in strips:
            sheet.paste(strip, (0, top))
            top += strip.height
        return sheet


def make_layout(thumb: int, query_width: int, results_width: int) -> Layout:
    """Returns a sheet at least 700 pixels wide, with text in proportion to its small images."""
    size = max(12, round(thumb / 7))
    left = MARGIN + query_width
    return Layout(thumb, size, round(size * 1.4), left, max(700, left + results_width + MARGIN))


def read_images(
    split: Split, rows: Sequence[int] | np.ndarray, *, longest_side: int | None = None
) -> list[Image.Image]:
    """Reads the images of some rows, in their order.

    Args:
        split: Where they lie.
        rows: Row numbers; they may repeat.
        longest_side: If given, larger images are made smaller, so that only one large image is in memory at a time.

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
            image = decode_stored(data.as_py(), max_pixels=0)  # conversion has checked the size
        except BadImage as error:
            raise UserError(f"{split.path}, row {row}, {source}: {error}") from error
        if longest_side is not None:
            image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        images.append(image)
    return [images[number] for number in place]


def read_thumbs(split: Split, rows: Iterable[int], side: int) -> Thumbs:
    """Reads the images of some rows, at most so many pixels wide and high; errors as of `read_images`."""
    wanted = sorted(set(rows))
    return dict(zip(wanted, read_images(split, wanted, longest_side=side), strict=True))


def verdict_of_images(retrieval: ImageTextRetrieval, text: int, rows: Sequence[int]) -> list[Colour]:
    """Returns ``RIGHT``, ``EQUAL`` or ``WRONG`` for each image that was found for a caption."""
    caption = retrieval.texts[text]
    owners = {int(retrieval.image_of_text[i]) for i, other in enumerate(retrieval.texts) if other == caption}
    own = int(retrieval.image_of_text[text])
    return [RIGHT if row == own else EQUAL if row in owners else WRONG for row in rows]


def verdict_of_texts(retrieval: ImageTextRetrieval, row: int, texts: Sequence[int]) -> list[Colour]:
    """Returns ``RIGHT``, ``EQUAL`` or ``WRONG`` for each caption that was found for an image."""
    own = set((retrieval.image_of_text == row).nonzero()[:, 0].tolist())
    captions = {retrieval.texts[i] for i in own}
    return [RIGHT if text in own else EQUAL if retrieval.texts[text] in captions else WRONG for text in texts]


def choose_queries(retrieval: ImageTextRetrieval, num_queries: int, seed: int) -> tuple[list[int], list[int]]:
    """Chooses images spread over all rows and one caption of each.

    The choice depends on the number of images, their captions and the seed, never on the embeddings, so that the
    pictures of different models, or of one model as it learns, show the same queries.

    Returns:
        Up to `num_queries` rows, and as many texts.
    """
    rng = np.random.default_rng(seed)
    rows = choose_spread(len(retrieval.image_embeddings), num_queries, rng)
    return rows, [int(rng.choice((retrieval.image_of_text == row).nonzero()[:, 0].numpy())) for row in rows]


def choose_spread(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draws one number from each of `count` equal parts of ``range(size)``; all numbers if there are no more."""
    bounds = np.linspace(0, size, min(count, size) + 1).astype(np.int64)
    return [int(rng.integers(low, high)) for low, high in itertools.pairwise(bounds)]


def retrieval_sheet(
    retrieval: ImageTextRetrieval, split: Split, *, num_queries: int = 6, k: int = 5, seed: int = 0, thumb: int = 96
) -> Image.Image:
    """Draws some captions with the images found for them, then some images with the captions found for them.

    Args:
        retrieval: Embeddings and ranks of the split.
        split: Where the images lie.
        num_queries: Queries of each direction, spread over the split; the same for every model.
        k: Results of a query.
        seed: Of the choice of queries.
        thumb: Side of a small image, in pixels.

    Returns:
        An RGB image.
    """
    rows, texts = choose_queries(retrieval, num_queries, seed)
    num_images, num_texts = len(retrieval.image_embeddings), len(retrieval.texts)
    image_scores, image_items = top_k(retrieval.text_embeddings[texts], retrieval.image_embeddings, min(k, num_images))
    text_scores, text_items = top_k(retrieval.image_embeddings[rows], retrieval.text_embeddings, min(k, num_texts))
    thumbs = read_thumbs(split, [*rows, *image_items.flatten().tolist()], thumb)
    page = make_layout(thumb, max(240, round(2.2 * thumb)), image_items.shape[1] * (thumb + GAP))
    strips = [page.heading("Text to image", f"the first {image_items.shape[1]} of {count(num_images, 'image')}")]
    for text, scores, items in zip(texts, image_scores.tolist(), image_items.tolist(), strict=True):
        strips.append(_text_query(page, retrieval, text, items, scores, thumbs))
    strips.append(page.heading("Image to text", f"the first {text_items.shape[1]} of {count(num_texts, 'caption')}"))
    for row, scores, items in zip(rows, text_scores.tolist(), text_items.tolist(), strict=True):
        strips.append(_image_query(page, retrieval, row, thumbs[row], items, scores))
    strips.append(page.legend([(RIGHT, "right"), (EQUAL, "equal caption, other image"), (WRONG, "wrong")]))
    return page.stack(strips)


def _text_query(
    page: Layout, retrieval: ImageTextRetrieval, text: int, items: list[int], scores: list[float], thumbs: Thumbs
) -> Image.Image:
    strip, draw = page.strip(max(page.thumb + page.line, 5 * page.line) + 2 * GAP)
    lines = wrap(
        retrieval.texts[text], load_font(page.size), page.left - MARGIN - 2 * GAP, max(3, page.thumb // page.line)
    )
    page.write(draw, (MARGIN, 0), lines)
    note = f"own image at rank {int(retrieval.result.text_to_image_ranks[text]) + 1:,}"
    page.write(draw, (MARGIN, len(lines) * page.line), [note], FAINT)
    colours = verdict_of_images(retrieval, text, items)
    for place, (row, score, colour) in enumerate(zip(items, scores, colours, strict=True)):
        page.result(strip, page.left + place * (page.thumb + GAP), thumbs[row], colour, [f"{score:.3f}"])
    return strip


def _image_query(
    page: Layout, retrieval: ImageTextRetrieval, row: int, image: Image.Image, items: list[int], scores: list[float]
) -> Image.Image:
    left, indent = MARGIN + page.thumb + 2 * GAP, 10 + 4 * page.size
    room = page.width - MARGIN - left - indent
    captions = [wrap(retrieval.texts[text], load_font(page.size, bold=True), room, 2) for text in items]
    strip, draw = page.strip(max(page.thumb + page.line, page.line * sum(map(len, captions))) + 2 * GAP)
    strip.paste(framed(image, page.thumb, None), (MARGIN, 0))
    note = f"rank {int(retrieval.result.image_to_text_ranks[row]) + 1:,}"
    page.write(draw, (MARGIN, page.thumb + 1), [note], FAINT)
    top = 0
    for lines, score, colour in zip(captions, scores, verdict_of_texts(retrieval, row, items), strict=True):
        bar = _FRAME if colour != WRONG else 1
        draw.rectangle((left, top + 1, left + bar - 1, top + len(lines) * page.line - 4), fill=colour)
        page.write(draw, (left + 10, top), [f"{score:.3f}"], FAINT)
        page.write(draw, (left + indent, top), lines, INK if colour == WRONG else colour, bold=colour != WRONG)
        top += len(lines) * page.line
    return strip


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if not lines[-1]:
            lines.pop()
        lines.append(word)
    cut = len(lines) > max_lines
    return [
        _shorten(line, font, width, cut and number == max_lines - 1) for number, line in enumerate(lines[:max_lines])
    ]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: float, more_follows: bool) -> str:
    if not more_follows and font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def framed(image: Image.Image, side: int, colour: Colour | None) -> Image.Image:
    """Fits an image into a square, uncropped, with a thick frame if it is right, a thin one if wrong, none if None."""
    square = ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color=_PADDING)
    if colour is not None:
        width = 1 if colour == WRONG else _FRAME
        ImageDraw.Draw(square).rectangle((0, 0, side - 1, side - 1), outline=colour, width=width)
    return square


@lru_cache(maxsize=16)
def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans as matplotlib ships it: the same on every machine, and it has more than Latin letters."""
    found = importlib.util.find_spec("matplotlib")  # only found: importing it would look for a place for its caches
    assert found is not None
    assert found.origin is not None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / name), size)
