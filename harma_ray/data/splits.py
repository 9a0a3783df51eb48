"""Reading of converted data sets: opens splits, and finds where each row lies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.config import RunConfig
from harma_ray.data.kinds import KINDS
from harma_ray.data.kinds.base import RowKind
from harma_ray.data.manifest import MANIFEST_NAME, SOURCE, Manifest
from harma_ray.errors import UserError, count
from harma_ray.files import did_you_mean, near_folders
from harma_ray.settings import nearest

_CONVERT = "`launch.py convert`"


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
    def kind(self) -> RowKind:
        """What its rows are."""
        return KINDS[self.manifest.kind]

    @property
    def pictured(self) -> Split | None:
        """The split with the images of this one's rows: itself, or what its vectors were computed from.

        None if there are no images, or they are not there any more as they were.
        """
        if self.kind.is_image:
            return self
        place = self.manifest.options.get(SOURCE)
        if place is None:
            return None
        try:
            split = open_split(Path(place).parent, Path(place).name)
        except UserError:
            return None
        same = self.manifest.inputs.get("manifest") == split.fingerprint
        return split if same and split.kind.is_image else None

    def describe(self) -> str:
        """Returns what it holds in a few words."""
        return self.kind.describe(self.manifest)

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

    def require_kind(self, kinds: Sequence[RowKind], purpose: str) -> None:
        """Raises UserError unless the split's rows are of one of some kinds."""
        if self.kind not in kinds:
            names = " or ".join(kind.name for kind in kinds)
            raise UserError(f"{purpose} needs {names}, but {self.path} holds {self.kind.name}")

    def require_images(self, purpose: str) -> None:
        """Raises UserError unless the split's rows hold images."""
        self.require_kind([kind for kind in KINDS.values() if kind.images], purpose)


def open_split(data: str | Path, split: str) -> Split:
    """Opens one split of a data set and checks that its shards are all there.

    Args:
        data: Folder of the data set.
        split: Name of the split.

    Raises:
        UserError: If the folder, the split or a shard is missing, or the manifest cannot be read.
    """
    root = data_folder(data)
    path = root / split
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        there = list_splits(root)
        if not there:
            near = did_you_mean(near_folders(root, has_splits))
            raise UserError(f"data set {root} has no split `{split}`, nor any other; make one with {_CONVERT}{near}")
        near = f", or did you mean `{found[0]}`?" if (found := nearest(split, there)) else ""
        raise UserError(
            f"data set {root} has no split `{split}` (splits there: {', '.join(there)}); convert it first{near}"
        )
    manifest = Manifest.from_json(manifest_path.read_text(), origin=str(manifest_path))
    if manifest.kind not in KINDS:
        raise UserError(f"{manifest_path} tells of rows that this program does not know: `{manifest.kind}`")
    if not manifest.rows:
        raise UserError(f"{path} holds no rows")
    for shard in (*manifest.shards, *([manifest.queries] if manifest.queries else [])):
        file = path / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise UserError(f"shard {file} is missing or not of {shard.bytes} bytes; convert the split again")
    return Split(path, manifest)


def data_folder(data: str | Path) -> Path:
    """Returns the absolute folder of a data set.

    Raises:
        UserError: If none is given, or it is not there.
    """
    if not str(data):
        raise UserError(f"no data set is given; use --data FOLDER (made by {_CONVERT})")
    root = Path(data).expanduser().absolute()
    if not root.is_dir():
        near = did_you_mean(near_folders(root, has_splits))
        raise UserError(f"data set folder {root} does not exist; make one with {_CONVERT}{near}")
    return root


def has_splits(folder: Path) -> bool:
    """Tells whether a folder is a data set: one split, or more, is in it."""
    return folder.is_dir() and bool(list_splits(folder))


def open_used(config: RunConfig) -> tuple[Split, list[Split], list[str]]:
    """Opens the splits that a training uses: the one it trains on, those it is evaluated on, and notices for the user.

    Raises:
        UserError: As `open_split`.
    """
    data = config.data
    training = open_split(data.path, data.train_split)
    evaluated = [open_split(data.path, config.selecting_split)]
    if data.test_split not in list_splits(data.path):
        return training, evaluated, [f"{data.path} has no split `{data.test_split}`, so nothing is evaluated on it at "
                                     "the end"]  # fmt: skip
    if data.test_split != evaluated[0].name:
        evaluated.append(open_split(data.path, data.test_split))
    return training, evaluated, []


def require_batch(split: Split, num_samples: int, batch_size: int) -> None:
    """Raises UserError if an epoch of a split has no samples, or fewer than a global batch."""
    if not num_samples:
        raise UserError(f"{split.path} has no captions to train on; convert it with captions or a caption template")
    if num_samples < batch_size:
        raise UserError(
            f"`train.global_batch_size` must not exceed the {count(num_samples, split.kind.sample)} of an epoch of "
            f"{split.path}, got {batch_size}; use {num_samples} or less"
        )


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
    """int32[N], samples of an epoch, as the kind of row has them."""
    binary_bytes: int
    """Bytes of all images or vectors, about, and of the texts of a kind that weighs them."""
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
    return _index_files(split.kind, tuple((path, path.stat().st_mtime_ns if path.exists() else 0) for path in paths))


@functools.lru_cache(maxsize=8)
def _index_files(kind: RowKind, files: tuple[tuple[Path, int], ...]) -> RowIndex:
    shards, groups, offsets, group_in_shard, counts = [], [], [], [], []
    total_bytes = 0
    for number, (path, _) in enumerate(files):
        with open_shard(path) as file:
            if not file.schema_arrow.equals(kind.schema):
                raise UserError(f"{path} does not have the columns of {kind.name}; convert the split again")
            weighed = _weighed_columns(file, kind)
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                shards.append(np.full(metadata.num_rows, number, np.int32))
                groups.append(np.full(metadata.num_rows, len(group_in_shard), np.int32))
                offsets.append(np.arange(metadata.num_rows))
                group_in_shard.append(group)
                total_bytes += sum(metadata.column(column).total_uncompressed_size for column in weighed)
            counts.append(kind.count_samples(file))
    return RowIndex(
        shard=np.concatenate(shards),
        row_group=np.concatenate(groups),
        offset=np.concatenate(offsets),
        num_samples=np.concatenate(counts).astype(np.int32),
        binary_bytes=total_bytes,
        group_in_shard=np.asarray(group_in_shard, np.int32),
    )


def _weighed_columns(file: pq.ParquetFile, kind: RowKind) -> list[int]:
    """Returns the numbers of the columns, as Parquet counts them, that hold images, vectors or texts that weigh."""
    types = [("BYTE_ARRAY", "NONE"), *([("BYTE_ARRAY", "STRING")] if kind.weighs_texts else [])]
    columns = [(number, file.schema.column(number)) for number in range(len(file.schema))]
    return [n for n, column in columns if (column.physical_type, column.logical_type.type) in types]
