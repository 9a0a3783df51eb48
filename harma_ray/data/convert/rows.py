"""Rows of a split from records: reads or draws the images, and tells which cannot be used."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from harma_ray.data.convert.records import MemberSpec, QueryRecord, Record, SceneSpec, SourceRecord, clean_captions
from harma_ray.data.images import BadImage, decode_image
from harma_ray.data.scenes import composed_scene, draw, scene
from harma_ray.data.schema import QUERY_SCHEMA, BadRow

JPEG_QUALITY = 95
"""Quality of JPEG images that had to be made smaller."""


def make_row(record: Record, *, resize: int | None, max_pixels: int, bad: list[BadRow]) -> dict[str, Any] | None:
    """Makes a row of the schema of the record's kind.

    Args:
        record: The image or triplet.
        resize: Largest shorter side of an image, in pixels; larger images are made smaller. None keeps files untouched.
        max_pixels: Largest image that is read, in pixels.
        bad: Gets the images that cannot be used, and the triplet that needs them.

    Returns:
        The row, or None if one of its images cannot be used.
    """
    if isinstance(record, SourceRecord):
        try:
            return _make_image_row(record, resize, max_pixels)
        except BadImage as error:
            bad.append(BadRow(record.source, str(error)))
            return None
    images, lost = [], []
    for name, place in record.images:
        try:
            images.append(_load(place, resize, max_pixels)[0])
        except BadImage as error:
            bad.append(BadRow(name, str(error)))
            lost.append(name)
    if lost:
        bad.append(record.query.explain(lost))
        return None
    return {**asdict(record.query), "reference_image": images[0], "target_image": images[1]}


def tabulate_queries(queries: Iterable[QueryRecord]) -> pa.Table:
    """Returns queries as a table of ``QUERY_SCHEMA``."""
    return pa.Table.from_pylist([asdict(query) for query in queries], schema=QUERY_SCHEMA)


def _make_image_row(record: SourceRecord, resize: int | None, max_pixels: int) -> dict[str, Any]:
    captions, label, label_name = record.captions, record.label, record.label_name
    if isinstance(record.image, SceneSpec):
        spec = record.image
        drawn = scene(spec.seed, spec.index, spec.style, spec.size)
        captions = clean_captions(drawn.captions, record.origin)
        label, label_name = drawn.label, drawn.label_name
        data, image = _fit(_encode(drawn.image, "PNG"), drawn.image, resize)
    else:
        data, image = _load(record.image, resize, max_pixels)
    return {
        "image_id": record.image_id,
        "image": data,
        "height": image.height,
        "width": image.width,
        "captions": list(captions),
        "label": label,
        "label_name": label_name,
        "source": record.source,
    }


def _load(place: Path | MemberSpec, resize: int | None, max_pixels: int) -> tuple[bytes, Image.Image]:
    """Returns the bytes to store of an image, and the image."""
    if isinstance(place, MemberSpec):
        query = composed_scene(place.seed, place.index, place.style)
        image = draw(query.members[place.member], place.style, place.size)
        return _fit(_encode(image, "PNG"), image, resize)
    try:
        data = place.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error
    return _fit(data, decode_image(data, max_pixels=max_pixels), resize)


def _fit(data: bytes, image: Image.Image, resize: int | None) -> tuple[bytes, Image.Image]:
    """Makes an image smaller if it is larger than wanted; its shorter side is ``resize`` then."""
    if resize is None or min(image.size) <= resize:
        return data, image
    scale = resize / min(image.size)
    size = (max(resize, round(image.width * scale)), max(resize, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return _encode(image, "JPEG" if data.startswith(b"\xff\xd8\xff") else "PNG"), image


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if kind == "JPEG" else {}
    image.save(buffer, kind, **options)
    return buffer.getvalue()
