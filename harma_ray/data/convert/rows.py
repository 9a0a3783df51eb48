"""Rows of a split from records: reads or draws the images, and tells which cannot be used."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from harma_ray.data.convert.looks import Looks
from harma_ray.data.headers import read_jpeg
from harma_ray.data.image_reading import Picture, read_picture, shrink
from harma_ray.data.images import MAX_PIXELS, BadImage
from harma_ray.data.kinds.base import ImageSource, Record, StoredImage
from harma_ray.data.kinds.queries import QUERY_SCHEMA, QueryRecord
from harma_ray.data.manifest import BadRow
from harma_ray.data.rendering import Rendering

JPEG_QUALITY = 95
"""Quality of JPEG images that had to be made smaller."""
_READ_WHOLE = 2**25
"""JPEG files of up to this many bytes are read into memory."""


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of the image files of a split."""

    resize: int | None = None
    """Images whose shorter side is longer than this many pixels are made smaller (aspect kept) and encoded again, JPEG
    as JPEG of quality 95 and all others as PNG. None, the default, keeps every 8-bit file byte for byte."""
    max_pixels: int = MAX_PIXELS
    """Largest image that is held in memory, in pixels; with `resize` that is what is read of a larger file."""
    rendering: Rendering | None = None
    """How images of more than 8 bits become 8-bit pictures, which are stored as PNG; None = they are refused."""


@dataclass
class Found:
    """What was met while rows were made."""

    bad: list[BadRow] = field(default_factory=list)
    """Images that cannot be used, and rows that need them."""
    rendered: dict[str, int] = field(default_factory=dict)
    """Number of images that were rendered, by what their pixels were, such as ``4 x uint16``."""
    nodata: float = 0.0
    """Sum over these of the part of the pixels without data."""
    looks: Looks = field(default_factory=Looks)
    """How all images look."""

    def __add__(self, other: Found) -> Found:
        rendered = Counter(self.rendered) + Counter(other.rendered)
        return Found(self.bad + other.bad, dict(rendered), self.nodata + other.nodata, self.looks + other.looks)

    def add(self, picture: Picture) -> None:
        """Counts an image."""
        if picture.rendered_from is not None:
            self.rendered[picture.rendered_from] = self.rendered.get(picture.rendered_from, 0) + 1
            self.nodata += picture.nodata_fraction
        self.looks.add(picture.image)


def make_row(record: Record, settings: ImageSettings, found: Found) -> dict[str, Any] | None:
    """Makes a row of the schema of the record's kind.

    Args:
        record: What it is made from.
        settings: What becomes of its images.
        found: Gets what there is to tell.

    Returns:
        The row, or None if one of its images cannot be used.
    """
    images, lost = [], []
    for name, source in record.images:
        try:
            images.append(_load(source, settings, found))
            record.check_image(images[-1].image)
        except BadImage as error:
            found.bad.append(BadRow(name, str(error)))
            lost.append(name)
    if not lost:
        return record.make_row(images)
    left_out = record.explain(lost)
    if left_out is not None:
        found.bad.append(left_out)
    return None


def tabulate_queries(queries: Iterable[QueryRecord]) -> pa.Table:
    """Returns queries as a table of ``QUERY_SCHEMA``."""
    return pa.Table.from_pylist([asdict(query) for query in queries], schema=QUERY_SCHEMA)


def _load(source: ImageSource, settings: ImageSettings, found: Found) -> StoredImage:
    """Reads or draws an image."""
    if not isinstance(source, Path):
        drawn = source.draw()
        image = shrink(drawn.image, settings.resize)
        return StoredImage(_encode(image, "PNG"), image, drawn)
    # Once, where the file is as small as what is kept of it; a raster of gigabytes is read in parts.
    file = read_jpeg(source, _READ_WHOLE + 1)
    if file is None or len(file) > _READ_WHOLE:
        file = source
    picture = read_picture(file, settings.rendering, resize=settings.resize, max_pixels=settings.max_pixels)
    found.add(picture)
    if not picture.unchanged:
        return StoredImage(_encode(picture.image, "JPEG" if picture.is_jpeg else "PNG"), picture.image)
    if isinstance(file, bytes):
        return StoredImage(file, picture.image)
    try:
        return StoredImage(source.read_bytes(), picture.image)
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error


def _encode(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if file_format == "JPEG" else {}
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
