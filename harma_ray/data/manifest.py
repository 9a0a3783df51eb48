"""The format of a converted data set: one folder a split, Parquet shards, and a manifest that vouches for them.

A data set is a folder with one sub-folder for each split (``train``, ``val``, ``test``). A split holds shards
``part-00000.parquet``, ... and ``manifest.json``. A split without a manifest is not a split: converters write it last.

A split's rows are images, or triplets of composed retrieval (a reference image, a text that changes it, the target
image), or either with vectors in place of images. A split of images may have queries beside it (``queries.parquet``):
triplets without images, whose answers are to be found among the split's images.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from harma_ray.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
QUERIES_NAME = "queries.parquet"
SOURCE = "source"
"""Option of a manifest of vectors: the folder of the split that they were computed from."""
SHARD_BYTES = 64 * 2**20
"""Target size of a shard, in bytes of encoded images."""
ROW_GROUP_BYTES = 2**20
"""Target size of a Parquet row group: the unit of random access, small so that a shuffled read wastes little."""


@dataclass(frozen=True)
class Shard:
    """A Parquet file of a split."""

    file: str
    """Name inside the split's folder."""
    rows: int
    """Number of rows."""
    bytes: int
    """Size of the file."""


@dataclass(frozen=True)
class BadRow:
    """An input that was left out of a split."""

    source: str
    """Path of the image, or annotation file and row."""
    reason: str
    """Why it could not be used."""


@dataclass(frozen=True)
class Rendered:
    """What is known of the images whose files were no 8-bit pictures, and for which 8-bit PNG is stored."""

    images: dict[str, int]
    """How many there are, by what a pixel of the file was, such as ``4 x uint16``."""
    nodata_percent: float
    """Part of their pixels without data, which are black; mean over the images."""
    rule: dict[str, Any] | None
    """`Rendering.to_dict` of the rule, with the statistics of the split if it rests on them; None if there was none."""


@dataclass(frozen=True)
class Manifest:
    """What a split holds and what it was made from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rows: int
    """Number of images, or of triplets."""
    captions: int
    """Number of captions."""
    shards: tuple[Shard, ...]
    """The files, in reading order."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Source files and their SHA-256, or a fingerprint of the listing of an image folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """The converter's name and settings, so that a second run knows whether the work is done."""
    bad: tuple[BadRow, ...] = ()
    """Inputs that were left out, with the reason."""
    tool_version: str = ""
    """Version of harma_ray that wrote the split."""
    schema_version: int = SCHEMA_VERSION
    """Version of the schemas."""
    kind: str = "images"
    """What a row is: the name of one of `harma_ray.data.kinds.KINDS`."""
    queries: Shard | None = None
    """The file of the queries that go with the images, if there are any."""
    rendered: Rendered | None = None
    """What is known of the images that are not stored as they came; None if all are, but for their size."""

    def to_json(self) -> str:
        """Returns the manifest as indented JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> Self:
        """Parses a manifest.

        Raises:
            UserError: If the text is no manifest of a version that this program reads.
        """
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise UserError(
                    f"{origin} has schema version {version}, but this program reads version {SCHEMA_VERSION}; "
                    "convert the data set again"
                )
            return TypeAdapter(cls).validate_python(raw)
        except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
            raise UserError(
                f"{origin} is not a manifest of a converted data set ({error}); convert it again"
            ) from error
