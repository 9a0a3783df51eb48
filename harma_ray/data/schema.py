"""The format of a converted data set: one folder a split, Parquet shards, and a manifest that vouches for them.

A data set is a folder with one sub-folder for each split (``train``, ``val``, ``test``). A split holds shards
``part-00000.parquet``, ... and ``manifest.json``. A split without a manifest is not a split: converters write it last.

A split's rows are images, or triplets of composed retrieval (a reference image, a text that changes it, the target
image), or either with vectors in place of images. A split of images may have queries beside it (``queries.parquet``):
triplets without images, whose answers are to be found among the split's images.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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

TRIPLET_SCHEMA = pa.schema(
    [
        *QUERY_SCHEMA,
        pa.field("reference_image", pa.binary(), nullable=False),
        pa.field("target_image", pa.binary(), nullable=False),
    ]
)
"""One row a query with the bytes of both image files, so that training looks nothing up."""

IMAGE_VECTOR_SCHEMA = pa.schema(
    [
        *(field for field in IMAGE_SCHEMA if field.name not in ("image", "height", "width")),
        pa.field("vector", pa.binary(), nullable=False),
    ]
)
"""`IMAGE_SCHEMA` with an encoder's output, float32 bytes, in place of the image."""

QUERY_VECTOR_SCHEMA = pa.schema([*QUERY_SCHEMA, pa.field("text_vectors", pa.list_(pa.binary()), nullable=False)])
"""`QUERY_SCHEMA` with the encoder's output for the text, or for each of the texts that training may draw."""

TRIPLET_VECTOR_SCHEMA = pa.schema(
    [
        *QUERY_VECTOR_SCHEMA,
        pa.field("reference_vector", pa.binary(), nullable=False),
        pa.field("target_vector", pa.binary(), nullable=False),
    ]
)
"""`TRIPLET_SCHEMA` with vectors in place of images."""

Kind = Literal["images", "triplets", "image vectors", "triplet vectors"]
SCHEMAS: dict[Kind, pa.Schema] = {
    "images": IMAGE_SCHEMA,
    "triplets": TRIPLET_SCHEMA,
    "image vectors": IMAGE_VECTOR_SCHEMA,
    "triplet vectors": TRIPLET_VECTOR_SCHEMA,
}
"""What the rows of a split can be."""


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
    kind: Kind = "images"
    """What a row is."""
    queries: Shard | None = None
    """The file of the queries that go with the images, if there are any."""
    rendered: Rendered | None = None
    """What is known of the images that are not stored as they came; None if all are, but for their size."""

    def to_json(self) -> str:
        """Returns the manifest as indented JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, *, origin: str) -> Manifest:
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
            raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
            raw["bad"] = tuple(BadRow(**row) for row in raw["bad"])
            raw["queries"] = Shard(**raw["queries"]) if raw.get("queries") else None
            raw["rendered"] = Rendered(**raw["rendered"]) if raw.get("rendered") else None
            manifest = Manifest(**raw)
            if manifest.kind not in SCHEMAS:
                raise UserError(f"{origin} tells of rows that this program does not know: `{manifest.kind}`")
            return manifest
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{origin} is not a manifest of a converted data set ({error}); convert it again"
            ) from error


@dataclass(frozen=True)
class Split:
    """An opened split: its folder and its manifest."""

    path: Path
    """Absolute folder of the split."""
    manifest: Manifest
    """The manifest found there."""

    @property
    def name(self) -> str:
        """The split's name, such as ``train``."""
        return self.path.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, in hexadecimal digits."""
        return hashlib.sha256((self.path / MANIFEST_NAME).read_bytes()).hexdigest()

    @property
    def pictured(self) -> Split | None:
        """The split with the images of this one's rows: itself, or what its vectors were computed from.

        None if there are no images, or they are not there any more as they were.
        """
        if self.manifest.kind == "images":
            return self
        place = self.manifest.options.get(SOURCE)
        if place is None:
            return None
        try:
            split = open_split(Path(place).parent, Path(place).name)
        except UserError:
            return None
        same = self.manifest.inputs.get("manifest") == split.fingerprint
        return split if same and split.manifest.kind == "images" else None

    def describe(self) -> str:
        """Returns what it holds in a few words."""
        if self.manifest.kind in ("triplets", "triplet vectors"):
            return f"{self.manifest.rows:,} triplets"
        queries = self.manifest.queries
        more = f"{queries.rows:,} queries" if queries else f"{self.manifest.captions:,} captions"
        return f"{self.manifest.rows:,} images, {more}"

    def shard_paths(self) -> list[Path]:
        """Returns the shard files in reading order."""
        return [self.path / shard.file for shard in self.manifest.shards]

    def read(self, columns: list[str]) -> pa.Table:
        """Reads some columns of the whole split, in row order; not meant for ``image``."""
        tables = []
        for path in self.shard_paths():
            with open_shard(path) as file:
                tables.append(file.read(columns=columns))
        return pa.concat_tables(tables)

    def queries(self) -> pa.Table:
        """Reads the queries that go with the split's images.

        Raises:
            UserError: If there are none.
        """
        if self.manifest.queries is None:
            raise UserError(
                f"{self.path} has no queries of composed retrieval; convert it with fashioniq, cirr or scenes-cir"
            )
        with open_shard(self.path / self.manifest.queries.file) as file:
            return file.read()

    def require_kind(self, kinds: Sequence[Kind], purpose: str) -> None:
        """Raises UserError unless the split's rows are of one of some kinds."""
        if self.manifest.kind not in kinds:
            raise UserError(f"{purpose} needs {' or '.join(kinds)}, but {self.path} holds {self.manifest.kind}")


def open_split(data: str | Path, split: str) -> Split:
    """Opens one split of a data set and checks that its shards are all there.

    Args:
        data: Folder of the data set.
        split: Name of the split.

    Raises:
        UserError: If the folder, the split or a shard is missing, or the manifest cannot be read.
    """
    root = Path(data).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"data set folder {root} does not exist; make one with `launch.py convert`")
    path = root / split
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        there = ", ".join(list_splits(root)) or "none"
        raise UserError(f"data set {root} has no split `{split}` (splits there: {there}); convert it first")
    manifest = Manifest.from_json(manifest_path.read_text(), origin=str(manifest_path))
    if not manifest.rows:
        raise UserError(f"{path} holds no rows")
    for shard in (*manifest.shards, *([manifest.queries] if manifest.queries else [])):
        file = path / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise UserError(f"shard {file} is missing or not of {shard.bytes} bytes; convert the split again")
    return Split(path, manifest)


def list_splits(data: str | Path) -> list[str]:
    """Returns the names of the complete splits of a data set, train, val and test first."""
    names = [path.parent.name for path in Path(data).glob(f"*/{MANIFEST_NAME}")]
    return sorted(names, key=lambda name: ("train", "val", "test", name).index(name))


@dataclass(frozen=True)
class RowIndex:
    """Where each row of a split lies and how many samples it gives; a few bytes a row."""

    shard: np.ndarray
    """int32[N], number of the shard."""
    row_group: np.ndarray
    """int32[N], number of the row group over the whole split, non-decreasing."""
    offset: np.ndarray
    """int64[N], position inside the row group."""
    num_samples: np.ndarray
    """int32[N], samples of an epoch: the captions of an image; one of anything else."""
    binary_bytes: int
    """Bytes of all images or vectors, about."""
    group_in_shard: np.ndarray
    """int32[num row groups], number of the group inside its shard."""

    def __len__(self) -> int:
        return len(self.shard)


@contextmanager
def open_shard(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a shard for the length of a block.

    Raises:
        UserError: If it cannot be opened, or what the block reads of it is damaged.
    """
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read shard {path} ({error}); convert the split again with --overwrite") from error


def index_rows(split: Split) -> RowIndex:
    """Reads the positions and sample counts of all rows of a split, without touching image bytes.

    The last few indices are kept, for a process may train on the same files many times (a search); a file that has
    changed is read again.
    """
    paths = split.shard_paths()
    return _index_files(tuple((path, path.stat().st_mtime_ns if path.exists() else 0) for path in paths))


@functools.lru_cache(maxsize=8)
def _index_files(files: tuple[tuple[Path, int], ...]) -> RowIndex:
    shards, groups, offsets, group_in_shard, counts = [], [], [], [], []
    total_bytes = 0
    for number, (path, _) in enumerate(files):
        with open_shard(path) as file:
            kind = next((kind for kind, schema in SCHEMAS.items() if file.schema_arrow.equals(schema)), None)
            if kind is None:
                raise UserError(f"{path} does not have the columns of a converted data set; convert the split again")
            binary = _binary_columns(file)
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                shards.append(np.full(metadata.num_rows, number, np.int32))
                groups.append(np.full(metadata.num_rows, len(group_in_shard), np.int32))
                offsets.append(np.arange(metadata.num_rows))
                group_in_shard.append(group)
                total_bytes += sum(metadata.column(column).total_uncompressed_size for column in binary)
            captions = file.read(columns=["captions"]).column("captions").combine_chunks()
            lengths = captions.value_lengths().to_numpy(zero_copy_only=False)
            counts.append(lengths if kind == "images" else np.ones_like(lengths))
    return RowIndex(
        shard=np.concatenate(shards),
        row_group=np.concatenate(groups),
        offset=np.concatenate(offsets),
        num_samples=np.concatenate(counts).astype(np.int32),
        binary_bytes=total_bytes,
        group_in_shard=np.asarray(group_in_shard, np.int32),
    )


def _binary_columns(file: pq.ParquetFile) -> list[int]:
    """Returns the numbers of the columns, as Parquet counts them, that hold images or vectors."""
    columns = [(number, file.schema.column(number)) for number in range(len(file.schema))]
    return [n for n, column in columns if (column.physical_type, column.logical_type.type) == ("BYTE_ARRAY", "NONE")]
