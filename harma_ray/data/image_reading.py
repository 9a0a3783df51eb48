"""From an image file as users have it to an 8-bit picture: the one door for all that is not in a data set yet.

Files of 8 bits and a usual layout are decoded by Pillow, without any rule. What Pillow would not show as it is meant
(more than 8 bits, more than four bands, colours multiplied by alpha, ...) is read by GDAL. Of more than 8 bits no
picture is made without a rule of the user's.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from harma_ray.data.headers import Header, opened, read_header
from harma_ray.data.images import MAX_PIXELS, BadImage, check_pixels, errors_named, open_header, to_rgb
from harma_ray.data.rasters import DRIVERS, describe_raster, read_raster
from harma_ray.data.rendering import OPTIONS, Raster, Rendering, render

_OVERSAMPLING = 2
"""A reduced reading keeps this many times the pixels of a side that are wanted in the end, so that a proper resize
comes last."""
_WAY_OUT = "let it be made smaller while it is read (--resize PIXELS), or raise --max-pixels"


@dataclass(frozen=True)
class Picture:
    """What a file shows."""

    image: Image.Image
    """RGB, upright."""
    unchanged: bool
    """Whether the file's bytes are this image: `decode_stored` makes the same of them."""
    is_jpeg: bool
    """Whether the file is lossy already."""
    rendered_from: str | None
    """What a pixel of a raster was, such as ``4 x uint16``; None if Pillow has decoded the file."""
    nodata_fraction: float = 0.0
    """Part of a raster's pixels that hold no data."""


def read_picture(
    file: bytes | Path, rule: Rendering | None = None, *, resize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Makes an 8-bit RGB picture of an image file.

    Args:
        file: The file, or its bytes; of one of ``FORMATS``. Of several frames or pages the first is taken.
        rule: How numbers of more than 8 bits are mapped, and which bands are taken; None = such files are refused.
        resize: Pictures whose shorter side is longer than this are made so small (bicubic, aspect kept). JPEG, TIFF,
            PNG and JPEG 2000 are read at reduced size then, so that memory does not grow with the file's.
        max_pixels: Largest width times height that is held in memory.

    Raises:
        BadImage: The file cannot be read, is damaged or too large, has more than 8 bits and there is no rule, or the
            rule does not fit it.
    """
    header = read_header(file)
    if not _takes_raster(header, rule):
        too_large = header.width * header.height > max_pixels > 0
        if not (resize and too_large and header.format in DRIVERS):
            return _decode(file, header, resize, max_pixels)
    raster = load_raster(file, header, rule, resize=resize, max_pixels=max_pixels)
    image = shrink(Image.fromarray(render(raster, rule)), resize)
    return Picture(image, False, False, raster.held, raster.nodata_fraction)


def picture_size(file: bytes | Path, *, resize: int | None = None) -> tuple[int, int]:
    """Returns width and height of what `read_picture` makes of a file, from its header alone.

    Raises:
        BadImage: If the file cannot be read, or its header is damaged.
    """
    header = read_header(file)
    upright = (header.width, header.height) if header.orientation < 5 else (header.height, header.width)
    return upright if resize is None or min(upright) <= resize else _fitted(upright, resize)


def load_raster(
    file: bytes | Path,
    header: Header,
    rule: Rendering | None,
    *,
    resize: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Raster:
    """Reads what a picture is rendered from; arguments and errors as for `read_picture`."""
    if needs_rule(header, rule):
        raise BadImage(f"{describe_raster(file, header)}: more than 8 bits; say how to show it: {OPTIONS}")
    shorter = None if resize is None else _OVERSAMPLING * resize
    return read_raster(file, header, rule, shorter=shorter, max_pixels=max_pixels)


def needs_rule(header: Header, rule: Rendering | None) -> bool:
    """Tells whether a file has more than 8 bits and the rule does not say how they are mapped."""
    return header.is_wide and (rule is None or rule.stretch is None)


def measured(file: bytes | Path, rule: Rendering, *, resize: int | None, max_pixels: int) -> Raster | None:
    """Returns the raster that a split's statistics are taken of; None if the file has no part in them."""
    header = read_header(file)
    return load_raster(file, header, rule, resize=resize, max_pixels=max_pixels) if header.is_wide else None


def _takes_raster(header: Header, rule: Rendering | None) -> bool:
    """Tells whether GDAL reads a file: Pillow would show something else, or the user chooses bands."""
    if header.format not in DRIVERS:
        return False
    chosen = rule is not None and rule.bands not in (None, (1, 2, 3))
    return not header.plain or (chosen and header.bands > 2 and header.format in ("TIFF", "JPEG2000"))


def _decode(file: bytes | Path, header: Header, resize: int | None, max_pixels: int) -> Picture:
    """Decodes a file with Pillow; JPEG at a fraction of its size if that is enough."""
    with opened(file) as stream:
        head = stream.read(16)
        stream.seek(0)
        with errors_named(head):
            image = open_header(stream)
            way_out = _WAY_OUT
            if resize and header.format == "JPEG":
                # Of a progressive file all coefficients are held at once, whatever the size that is wanted.
                if "progressive" in image.info:
                    check_pixels(image.width, image.height, max_pixels, "it is progressive; store it as baseline JPEG")
                width, height = _fitted(image.size, resize)
                image.draft(None, (_OVERSAMPLING * width, _OVERSAMPLING * height))
            elif resize:
                way_out = f"{header.format} is not read at reduced size: convert it to TIFF, or raise --max-pixels"
            check_pixels(image.width, image.height, max_pixels, way_out)
            image.load()
            picture = to_rgb(ImageOps.exif_transpose(image))
    upright = picture.size if header.orientation < 5 else picture.size[::-1]
    unchanged = upright == (header.width, header.height) and (not resize or min(upright) <= resize)
    return Picture(shrink(picture, resize), unchanged, header.format == "JPEG", None)


def _fitted(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Returns the size of which the shorter side is `resize`."""
    scale = resize / min(size)
    return max(resize, round(size[0] * scale)), max(resize, round(size[1] * scale))


def shrink(image: Image.Image, resize: int | None) -> Image.Image:
    """Makes an image smaller whose shorter side is longer than `resize`; None = never."""
    if resize is None or min(image.size) <= resize:
        return image
    return image.resize(_fitted(image.size, resize), Image.Resampling.BICUBIC)
