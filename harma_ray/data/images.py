"""Decoding of the images that a data set holds, with Pillow alone; imports no torch, so that workers start fast.

What a data set holds is 8-bit: conversion renders whatever is not (see `harma_ray.data.image_reading`).
"""

import functools
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from harma_ray.errors import UserError

MAX_PIXELS = 100_000_000
"""Largest image of a user's that is read unless the user says otherwise (``--max-pixels``); 300 MB as RGB.

Conversion is the door that checks it: what a data set holds is read whatever its size. Pillow's own limits, which warn
above 89 million and refuse above 179 million pixels, are not asked.
"""

_MAX_RATIO = 100

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


_logger = logging.getLogger(__name__)


class BadImage(UserError):
    """An image that cannot be used; the message says why, the caller knows its name."""


def open_header(file: BinaryIO) -> Image.Image:
    """Reads an image file's header as ``PIL.Image.open`` does, without Pillow's limit of pixels; decodes nothing.

    Raises:
        UnidentifiedImageError: The file is of none of ``FORMATS``, or of a kind of them that Pillow does not read.
    """
    prefix = file.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # what Pillow takes for: another format
    raise UnidentifiedImageError("no known format")


def open_image(data: bytes, *, max_pixels: int = 0) -> Image.Image:
    """Decodes an image of a data set whole, in its own mode, upright as its EXIF orientation says.

    Of several frames or pages the first is taken. What older versions stored of more than 8 bits is read as they read
    it, with a warning.

    Args:
        data: The image file's bytes, of one of ``FORMATS``.
        max_pixels: Largest width times height, checked before anything is decoded; 0 = any.

    Raises:
        BadImage: If the data is no image, is cut off or damaged, or is too large.
    """
    with errors_named(data):
        image = open_header(io.BytesIO(data))
        check_pixels(image.width, image.height, max_pixels)
        if _is_cut_to_eight_bits(image):
            _warn_of_wide_images()
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # else it copies an image that stands upright
        return image


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes any image file of 8 bits to RGB, as `read_picture` does without a rule; for rows see `decode_stored`.

    Raises:
        BadImage: If the data is no image, is cut off, damaged or too large, or holds more than 8 bits.
    """
    from harma_ray.data.image_reading import read_picture  # which is built on this module

    return read_picture(data, max_pixels=max_pixels).image


def decode_stored(data: bytes, *, max_pixels: int = 0) -> Image.Image:
    """Decodes an image of a data set to RGB, upright; takes and raises what `open_image` does.

    Palettes are resolved, transparency is dropped, grey becomes three equal channels, CMYK is converted, bands after
    the third are dropped. Of several frames or pages the first is taken.
    """
    with errors_named(data):
        return to_rgb(open_image(data, max_pixels=max_pixels))


def check_pixels(width: int, height: int, max_pixels: int, way_out: str = "scale the image down") -> None:
    """Raises `BadImage` if an image has more pixels than may be; 0 = any number."""
    if max_pixels and width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels; the limit is {max_pixels:,} pixels: {way_out}")


def check_sides(image: Image.Image) -> None:
    """Raises BadImage for a line of pixels, of which a small square would show nothing."""
    if max(image.size) > _MAX_RATIO * min(image.size):
        raise BadImage(
            f"{image.width} x {image.height} pixels; a side may be {_MAX_RATIO} times as long as the other: cut it"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, as `decode_stored` does."""
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
def errors_named(data: bytes) -> Iterator[None]:
    """Raises `BadImage` for whatever Pillow raises on an image file's bytes, of which the first few are enough."""
    if not data:
        raise BadImage("the file is empty")
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            f"not an image of a known format (it begins with {data[:4]!r}); convert it to 8-bit RGB PNG, TIFF or JPEG"
        ) from error
    except _DECODER_ERRORS as error:
        raise BadImage(f"damaged or incomplete image ({type(error).__name__}: {error})") from error


def crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """Cuts a rectangle out of an RGB image, as ``Image.crop`` does, which has a limit of pixels of its own."""
    if Image.MAX_IMAGE_PIXELS is None or width * height <= Image.MAX_IMAGE_PIXELS:
        return image.crop((left, top, left + width, top + height))
    return Image.fromarray(np.asarray(image)[top : top + height, left : left + width])


def _is_cut_to_eight_bits(image: Image.Image) -> bool:
    """Tells whether Pillow would give something else than the numbers of a file that has not been decoded yet."""
    return is_wide(image) or any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))


@functools.cache
def _warn_of_wide_images() -> None:
    """Warns once a process."""
    _logger.warning(
        "the data set holds images of more than 8 bits as an older version of this program stored them: grey ones are "
        "stretched over the range of each, of colour only the upper 8 bits are seen (often black); convert it again "
        "with --stretch, and `launch.py inspect` shows how it looks"
    )


def _stretch(image: Image.Image) -> Image.Image:
    """Maps one band of wide numbers to 0..255, unless its numbers fit in there already."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
        values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
