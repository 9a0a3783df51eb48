"""Decoding of image files; imports no torch, so that conversion workers start fast. Nothing here keeps state."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from harma_ray.errors import UserError

MAX_PIXELS = 100_000_000
"""Largest image that is decoded unless the caller says otherwise; 300 MB as RGB."""

FORMATS = ("TIFF", "JPEG", "PNG", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
"""What is read; PIL knows more, some of which it hands to other programs."""

# What PIL's readers raise on files that are cut off, damaged or mislabelled: nearly always the first two (of 60,000
# files with flipped bytes, all), the others by reading its source. `Warning` is for programs that make them errors.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,
)


class BadImage(UserError):
    """An image that cannot be used; the message says why, the caller knows its name."""


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a whole image in its own mode, upright as its EXIF orientation says.

    Of several frames or pages the first is taken.

    Args:
        data: The image file's bytes, of one of ``FORMATS``.
        max_pixels: Largest width times height; checked before anything is decoded. PIL itself warns above 89 million
            and refuses above 179 million.

    Raises:
        BadImage: If the data is no image, is cut off or damaged, or is too large.
    """
    if not data:
        raise BadImage("the file is empty")
    with _errors_named(data, max_pixels), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(_too_large(f"{image.width} x {image.height} pixels", max_pixels))
        image.load()
        return ImageOps.exif_transpose(image)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a whole image to RGB, upright as its EXIF orientation says; takes and raises what `open_image` does.

    Palettes are resolved, transparency is dropped, grey becomes three equal channels, CMYK is converted, bands after
    the third are dropped. Images of one band with more than 8 bits are stretched from their own smallest to their own
    largest value, because sensors seldom use the whole range. Of several frames or pages the first is taken.
    """
    with _errors_named(data, max_pixels):
        return to_rgb(open_image(data, max_pixels=max_pixels))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, as `decode_image` does."""
    if image.mode == "RGB":
        return image
    if is_wide(image):
        return _stretch(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Tells whether an image has one band of numbers that need not fit 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


@contextmanager
def _errors_named(data: bytes, max_pixels: int) -> Iterator[None]:
    """Raises `BadImage` for whatever PIL raises on the file's bytes."""
    try:
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(_too_large(f"PIL says: {error}", max_pixels)) from error
    except UnidentifiedImageError as error:
        raise BadImage(
            f"not an image of a known format ({len(data)} bytes that begin with {data[:4]!r}); "
            "convert it to 8-bit RGB PNG, TIFF or JPEG"
        ) from error
    except _DECODER_ERRORS as error:
        raise BadImage(f"damaged or incomplete image ({type(error).__name__}: {error})") from error


def _stretch(image: Image.Image) -> Image.Image:
    """Maps one band of wide numbers to 0..255, unless its numbers fit in there already."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
        values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _too_large(size: str, max_pixels: int) -> str:
    return f"{size}; the limit is {max_pixels:,} pixels: scale the image down"
