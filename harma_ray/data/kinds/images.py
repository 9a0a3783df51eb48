"""Rows that are an image with its captions and class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harma_ray.data.kinds.base import ImageSource, Record, RowKind, StoredImage
from harma_ray.data.kinds.drawing import LINE, MARGIN, THUMBNAIL, paste, write
from harma_ray.data.manifest import BadRow, Manifest
from harma_ray.errors import count

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("label_name", pa.string()),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""One row an image: ``image`` holds the file's bytes as they came, ``captions`` the cleaned texts (possibly none),
``source`` the path or name of the image."""

IMAGE_VECTOR_SCHEMA = pa.schema(
    [
        *(field for field in IMAGE_SCHEMA if field.name not in ("image", "height", "width")),
        pa.field("vector", pa.binary(), nullable=False),
    ]
)
"""`IMAGE_SCHEMA` with an encoder's output, float32 bytes, in place of the image."""

_CAPTION_LINES = 6


class _Gallery(RowKind):
    """Images or their vectors, and the queries beside them if there are any."""

    weighs_texts = False  # as in data sets that are there

    def describe(self, manifest: Manifest) -> str:
        queries = manifest.queries
        more = count(queries.rows, "query") if queries else count(manifest.captions, "caption")
        return f"{count(manifest.rows, 'image')}, {more}"


class _ImageVectors(_Gallery):
    """The outputs of an image encoder."""

    name = "image vectors"
    schema = IMAGE_VECTOR_SCHEMA
    is_encoded = True


IMAGE_VECTORS = _ImageVectors()
"""Rows of `IMAGE_VECTOR_SCHEMA`."""


class _Images(_Gallery):
    """Images; a sample is an image with one of its captions."""

    name = "images"
    schema = IMAGE_SCHEMA
    images: ClassVar[Mapping[str, str]] = {"image": "source"}
    is_image = True
    encoded = IMAGE_VECTORS

    def count_samples(self, shard: pq.ParquetFile) -> np.ndarray:
        """Returns the number of captions of each image: int[N]."""
        captions = shard.read(columns=["captions"]).column("captions").combine_chunks()
        return captions.value_lengths().to_numpy(zero_copy_only=False)

    def most_samples(self, manifest: Manifest, *, one_caption: bool) -> int:
        """Returns the number of captions, or of images if an epoch visits one of each."""
        return min(manifest.rows, manifest.captions) if one_caption else manifest.captions

    def draw(self, row: Mapping[str, Any]) -> Image.Image:
        """Draws an image, its class or name, and its first caption, or its name if that is not told yet."""
        size = (THUMBNAIL + MARGIN, THUMBNAIL + (_CAPTION_LINES + 1) * LINE + 2 * MARGIN)
        cell = Image.new("RGB", size, "white")
        paste(cell, row["image"], 0)
        text = row["captions"][0] if row["captions"] else row["source"] if row["label_name"] else "(no caption)"
        write(cell, (0, THUMBNAIL + 2), row["label_name"] or row["source"], "black")
        write(cell, (0, THUMBNAIL + 2 + LINE), text, "dimgrey", _CAPTION_LINES)
        return cell


IMAGES = _Images()
"""Rows of `IMAGE_SCHEMA`."""


@dataclass(frozen=True)
class SourceRecord(Record):
    """One image before conversion."""

    kind: ClassVar[RowKind] = IMAGES

    image_id: int
    """Number of the image, unique in its split."""
    source: str
    """Name of the image, relative to its root, the same on every machine."""
    origin: str
    """Where the record was read, for messages: annotation file and row."""
    image: ImageSource
    """Where the image is."""
    captions: tuple[str, ...] = ()
    """Cleaned captions; a drawn image brings its own."""
    label: int | None = None
    """Number of the class."""
    label_name: str | None = None
    """Name of the class."""

    @property
    def images(self) -> Sequence[tuple[str, ImageSource]]:
        """Name and source of the image."""
        return ((self.source, self.image),)

    def make_row(self, images: Sequence[StoredImage]) -> dict[str, Any]:
        """Returns the row of the image."""
        (stored,) = images
        known = stored.drawn or self
        return {
            "image_id": self.image_id,
            "image": stored.data,
            "height": stored.image.height,
            "width": stored.image.width,
            "captions": list(known.captions),
            "label": known.label,
            "label_name": known.label_name,
            "source": self.source,
        }

    def explain(self, lost: Sequence[str]) -> BadRow | None:
        """Returns None: the row is the image."""
        return None
