"""Rows that composed retrieval trains on: a query with its reference and target image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pyarrow as pa
from PIL import Image, ImageDraw

from harma_ray.data.kinds.base import ImageSource, Record, RowKind, StoredImage
from harma_ray.data.kinds.drawing import LINE, MARGIN, THUMBNAIL, paste, write
from harma_ray.data.kinds.queries import QUERY_SCHEMA, QUERY_VECTOR_SCHEMA, QueryRecord
from harma_ray.data.manifest import BadRow, Manifest
from harma_ray.errors import count

TRIPLET_SCHEMA = pa.schema(
    [
        *QUERY_SCHEMA,
        pa.field("reference_image", pa.binary(), nullable=False),
        pa.field("target_image", pa.binary(), nullable=False),
    ]
)
"""One row a query with the bytes of both image files, so that training looks nothing up."""

TRIPLET_VECTOR_SCHEMA = pa.schema(
    [
        *QUERY_VECTOR_SCHEMA,
        pa.field("reference_vector", pa.binary(), nullable=False),
        pa.field("target_vector", pa.binary(), nullable=False),
    ]
)
"""`TRIPLET_SCHEMA` with vectors in place of images."""

_CAPTION_LINES = 5  # each of two


class _Queries(RowKind):
    """Triplets or their vectors."""

    row = "query"
    sample = "triplet"
    is_query = True
    weighs_texts = False  # as in data sets that are there

    def describe(self, manifest: Manifest) -> str:
        return count(manifest.rows, "triplet")


class _TripletVectors(_Queries):
    """The outputs of the encoders for triplets."""

    name = "triplet vectors"
    schema = TRIPLET_VECTOR_SCHEMA
    is_encoded = True


TRIPLET_VECTORS = _TripletVectors()
"""Rows of `TRIPLET_VECTOR_SCHEMA`."""


class _Triplets(_Queries):
    """Queries with their images."""

    name = "triplets"
    schema = TRIPLET_SCHEMA
    images: ClassVar[Mapping[str, str]] = {"reference_image": "reference", "target_image": "target"}
    encoded = TRIPLET_VECTORS
    cells_across = 2

    def draw(self, row: Mapping[str, Any]) -> Image.Image:
        """Draws the reference, the captions over an arrow, and the target: a query may have none that is known."""
        step = THUMBNAIL + MARGIN
        cell = Image.new("RGB", (3 * step + MARGIN, THUMBNAIL + LINE + 2 * MARGIN), "white")
        for x, image, name in ((0, "reference_image", "reference"), (2 * step, "target_image", "target")):
            if row[image] is None:
                ImageDraw.Draw(cell).rectangle((x, 0, x + THUMBNAIL - 1, THUMBNAIL - 1), outline="darkgrey")
                write(cell, (x + MARGIN, THUMBNAIL // 2 - LINE), "(target not known)", "dimgrey")
                continue
            paste(cell, row[image], x)
            write(cell, (x, THUMBNAIL + 2), row[name], "black")
        about = [*([row["category"]] if row["category"] else []), str(row["pair_id"])]
        write(cell, (step, 0), " ".join(about), "black")
        top = LINE
        for caption in row["captions"]:
            top += write(cell, (step, top), caption.strip() or "(empty)", "dimgrey", _CAPTION_LINES) + MARGIN // 2
        y, end = THUMBNAIL - MARGIN, step + THUMBNAIL - MARGIN
        draw = ImageDraw.Draw(cell)
        draw.line([(step, y), (end, y)], fill="black", width=2)
        draw.polygon([(end, y - 4), (end, y + 4), (end + 7, y)], fill="black")
        return cell


TRIPLETS = _Triplets()
"""Rows of `TRIPLET_SCHEMA`."""


@dataclass(frozen=True)
class TripletRecord(Record):
    """One training row of composed retrieval before conversion."""

    kind: ClassVar[RowKind] = TRIPLETS

    query: QueryRecord
    """What is known of it; with a target."""
    reference_image: ImageSource
    """Where the reference is."""
    target_image: ImageSource
    """Where the target is."""

    @property
    def images(self) -> Sequence[tuple[str, ImageSource]]:
        """Names and sources of the reference and the target."""
        return ((self.query.reference, self.reference_image), (self.query.target or "", self.target_image))

    @property
    def annotation(self) -> QueryRecord:
        """The query."""
        return self.query

    def make_row(self, images: Sequence[StoredImage]) -> dict[str, Any]:
        """Returns the row of the query."""
        reference, target = images
        return {**asdict(self.query), "reference_image": reference.data, "target_image": target.data}

    def explain(self, lost: Sequence[str]) -> BadRow:
        """Returns that the query needs them."""
        return self.query.explain(lost)
