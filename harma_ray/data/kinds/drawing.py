"""What the cells of a contact sheet are drawn with: thumbnails and texts."""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from harma_ray.data.images import decode_stored

THUMBNAIL = 176
"""Height and width of an image, in pixels."""
MARGIN = 8
"""Pixels between images."""
_FONT_SIZE = 11
LINE = _FONT_SIZE + 3
"""Height of a line of text, in pixels."""
_TEXT_WIDTH = int(THUMBNAIL / _FONT_SIZE * 1.9)  # letters of a line as wide as an image, about


def paste(cell: Image.Image, data: bytes, x: int) -> None:
    """Puts an image file into a cell, at its upper edge."""
    cell.paste(ImageOps.pad(decode_stored(data, max_pixels=0), (THUMBNAIL, THUMBNAIL), color="lightgrey"), (x, 0))


def write(
    cell: Image.Image, place: tuple[int, int], text: str, colour: str, max_lines: int | None = None, columns: int = 1
) -> int:
    """Writes a text, in several lines as wide as some images if there may be, and returns its height."""
    lines = [text] if max_lines is None else textwrap.wrap(text, width=columns * _TEXT_WIDTH, max_lines=max_lines)
    font = ImageFont.load_default(size=_FONT_SIZE)
    ImageDraw.Draw(cell).text(place, "\n".join(lines), fill=colour, font=font)
    return len(lines) * LINE
