"""Queries of composed retrieval: part of a triplet, or in a file beside the images among which answers are found."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from harma_ray.data.manifest import BadRow

QUERY_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.int64(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("target", pa.string()),
        pa.field("category", pa.string()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("members", pa.list_(pa.string()), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""One row a query of composed retrieval: names of the reference and the target image (null: not known), the texts that
change one into the other, and the names of the images that a subset ranking is restricted to (none: there is none)."""

QUERY_VECTOR_SCHEMA = pa.schema([*QUERY_SCHEMA, pa.field("text_vectors", pa.list_(pa.binary()), nullable=False)])
"""`QUERY_SCHEMA` with the encoder's output for the text, or for each of the texts that training may draw."""


@dataclass(frozen=True)
class QueryRecord:
    """One query of composed retrieval, with the fields of ``QUERY_SCHEMA``."""

    pair_id: int
    """The data set's own number, or a running one."""
    reference: str
    """Name of the reference image."""
    target: str | None
    """Name of the target image; None = not known."""
    category: str | None
    """Part of the data set whose images it is to be found among; None = there are no parts."""
    captions: tuple[str, ...]
    """What changes the reference into the target, as annotated."""
    members: tuple[str, ...]
    """Names of the images of a subset ranking, reference and target included; possibly none."""
    source: str
    """Where it was read: annotation file and row."""

    @property
    def pair(self) -> list[str]:
        """Names of the reference and, if it is known, the target."""
        return [self.reference, *([] if self.target is None else [self.target])]

    @property
    def needs(self) -> list[str]:
        """Names of the images that it cannot be evaluated without."""
        return [*self.pair, *self.members]

    def explain(self, lost: Iterable[str]) -> BadRow:
        """Returns why it is left out if some images are."""
        return BadRow(self.source, f"needs {', '.join(dict.fromkeys(lost))}, which cannot be used")
