"""A sheet of sample rows of a converted split: images with their captions, or triplets."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from harma_ray.data.images import decode_stored
from harma_ray.data.schema import Split, open_shard
from harma_ray.errors import UserError
from harma_ray.files import output_path

_THUMBNAIL = 176
_MARGIN = 8
_FONT_SIZE = 11
_LINE = _FONT_SIZE + 3
_TEXT_WIDTH = int(_THUMBNAIL / _FONT_SIZE * 1.9)  # letters of a line as wide as an image, about
_CAPTION_LINES = 6
_TRIPLET_CAPTION_LINES = 5  # each of two
_IMAGE_COLUMNS = 6
_TRIPLET_COLUMNS = 2


def contact_sheet(split: Split, path: str | Path, n: int = 24, *, seed: int = 0) -> Path:
    """Draws a sample of a split's rows and saves it as PNG.

    An image has its class and first caption under it; of a triplet the reference, the captions and the target stand
    side by side.

    Args:
        split: An opened split.
        path: The PNG file; its folder is made if need be.
        n: Number of rows, at most those of the split.
        seed: Seed of the choice.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: If ``n`` is not positive, the split holds no images, or the file cannot be written.
    """
    if n < 1:
        raise UserError(f"a contact sheet needs 1 image or more, got {n}")
    split.require_kind(["images", "triplets"], "a contact sheet")
    rows = split.manifest.rows
    chosen = set(np.random.default_rng(seed).permutation(rows)[:n].tolist())
    samples = [row for number, row in enumerate(_iterate_rows(split, chosen)) if number in chosen]
    if split.manifest.kind == "triplets":
        cells, most = [_draw_triplet(row) for row in samples], _TRIPLET_COLUMNS
    else:
        cells, most = [_draw_image(row) for row in samples], _IMAGE_COLUMNS
    columns, (width, height) = min(most, len(cells)), cells[0].size
    sheet = Image.new("RGB", (columns * width + _MARGIN, -(-len(cells) // columns) * height + _MARGIN), "white")
    for position, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + position % columns * width, _MARGIN + position // columns * height))
    target = output_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target, "PNG")
    except OSError as error:
        raise UserError(
            f"cannot write the contact sheet {target} ({error.strerror or error}); choose another folder (--sheet)"
        ) from error
    return target


def _draw_image(row: dict[str, Any]) -> Image.Image:
    """Draws an image, its class or name, and its first caption, or its name if that is not told yet."""
    size = (_THUMBNAIL + _MARGIN, _THUMBNAIL + (_CAPTION_LINES + 1) * _LINE + 2 * _MARGIN)
    cell = Image.new("RGB", size, "white")
    _paste(cell, row["image"], 0)
    text = row["captions"][0] if row["captions"] else row["source"] if row["label_name"] else "(no caption)"
    _write(cell, (0, _THUMBNAIL + 2), row["label_name"] or row["source"], "black")
    _write(cell, (0, _THUMBNAIL + 2 + _LINE), text, "dimgrey", _CAPTION_LINES)
    return cell


def _draw_triplet(row: dict[str, Any]) -> Image.Image:
    """Draws the reference, the captions over an arrow, and the target."""
    step = _THUMBNAIL + _MARGIN
    cell = Image.new("RGB", (3 * step + _MARGIN, _THUMBNAIL + _LINE + 2 * _MARGIN), "white")
    for x, image, name in ((0, "reference_image", "reference"), (2 * step, "target_image", "target")):
        _paste(cell, row[image], x)
        _write(cell, (x, _THUMBNAIL + 2), row[name], "black")
    _write(cell, (step, 0), " ".join([*([row["category"]] if row["category"] else []), str(row["pair_id"])]), "black")
    top = _LINE
    for caption in row["captions"]:
        top += _write(cell, (step, top), caption.strip() or "(empty)", "dimgrey", _TRIPLET_CAPTION_LINES) + _MARGIN // 2
    y, end = _THUMBNAIL - _MARGIN, step + _THUMBNAIL - _MARGIN
    draw = ImageDraw.Draw(cell)
    draw.line([(step, y), (end, y)], fill="black", width=2)
    draw.polygon([(end, y - 4), (end, y + 4), (end + 7, y)], fill="black")
    return cell


def _paste(cell: Image.Image, data: bytes, x: int) -> None:
    cell.paste(ImageOps.pad(decode_stored(data, max_pixels=0), (_THUMBNAIL, _THUMBNAIL), color="lightgrey"), (x, 0))


def _write(cell: Image.Image, place: tuple[int, int], text: str, colour: str, max_lines: int | None = None) -> int:
    """Writes a text, in several lines as wide as an image if there may be, and returns its height."""
    lines = [text] if max_lines is None else textwrap.wrap(text, width=_TEXT_WIDTH, max_lines=max_lines)
    font = ImageFont.load_default(size=_FONT_SIZE)
    ImageDraw.Draw(cell).text(place, "\n".join(lines), fill=colour, font=font)
    return len(lines) * _LINE


def _iterate_rows(split: Split, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """Yields all rows in order; those of row groups without a wanted row are empty, because they are not read."""
    start = 0
    for path in split.shard_paths():
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(start, start + rows)):
                    yield from ({} for _ in range(rows))
                else:
                    yield from file.read_row_group(group).to_pylist()
                start += rows
