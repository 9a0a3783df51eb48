"""What frozen encoders give for a data set of composed retrieval, computed once with Ray Data: a data set of vectors.

Every image and every text is encoded once, however many triplets share it. The result has the splits of the data set,
with vectors in place of images and beside the texts; it is trained on and evaluated like the data set itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from harma_ray import __version__
from harma_ray.config import RunConfig
from harma_ray.data.convert.shards import disk_error, write_table
from harma_ray.data.convert.staging import lock, put_in_place, work_folder
from harma_ray.data.kinds.base import RowKind
from harma_ray.data.kinds.queries import QUERY_SCHEMA, QUERY_VECTOR_SCHEMA
from harma_ray.data.manifest import (
    MANIFEST_NAME,
    QUERIES_NAME,
    ROW_GROUP_BYTES,
    SHARD_BYTES,
    SOURCE,
    Manifest,
    Shard,
)
from harma_ray.data.order import IndexedSplit, iterate_slices, read_samples
from harma_ray.data.splits import Split, index_rows, list_splits, open_split
from harma_ray.errors import UserError, find_user_error
from harma_ray.files import atomic, output_path
from harma_ray.on_ray.cluster import node_cpus
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import Cluster
from harma_ray.settings import build_config, to_dict
from harma_ray.task import FeatureEncoder

FOLDER = "features"
"""Where the features of a run or a search lie, in its folder."""


def with_features(config: RunConfig, folder: Path, cluster: Cluster) -> RunConfig:
    """Returns the settings to train with: those given, or with the features of their data set in its place.

    Args:
        config: Settings.
        folder: Of the run or the search; features go into it if they are not there yet.
        cluster: Where they are computed; Ray must have been initialised.

    Raises:
        UserError: If an image cannot be read or the disk is full.
    """
    data, task = config.data, make_task(config)
    if not task.caches_features:
        return config
    rows = open_split(data.path, data.train_split).kind
    if not rows.is_query or rows.is_encoded:
        return config
    wanted = {data.train_split, data.val_split, data.test_split} & set(list_splits(data.path))
    write_features(config, folder / FOLDER, [name for name in list_splits(data.path) if name in wanted], cluster)
    return build_config(config, {"data.path": str(folder / FOLDER)})


def write_features(config: RunConfig, out: str | Path, splits: Sequence[str], cluster: Cluster) -> None:
    """Encodes some splits of a data set; those that are there already, from the same data set, stay.

    Args:
        config: Settings of the encoders; ``data.path`` is the data set.
        out: Folder of the features; each split in it is written whole or not at all.
        splits: Names of the splits.
        cluster: Where; Ray must have been initialised.

    Raises:
        UserError: If an image cannot be read, the disk is full, or other features are there.
    """
    target = output_path(out)
    sources = [open_split(config.data.path, name) for name in splits]
    missing = [source for source in sources if not _is_done(source, target)]
    if not missing:
        return
    wanted = [_Wanted.of(config, source) for source in missing]
    items = [item for split in wanted for item in split.items(config.train.eval_batch_size)]
    with contextlib.closing(_encode(config, items, cluster)) as results:
        for split in wanted:
            vectors, identity = _collect(results, split.items(config.train.eval_batch_size))
            try:
                _write(split, vectors, identity, target / split.source.name)
            except OSError as error:
                raise disk_error(target, error) from error


def _is_done(source: Split, target: Path) -> bool:
    if not (target / source.name / MANIFEST_NAME).is_file():
        return False
    if open_split(target, source.name).manifest.inputs != {"manifest": source.fingerprint}:
        raise UserError(f"{target / source.name} holds features of other data than {source.path}; remove it")
    return True


@dataclass(frozen=True)
class _Item:
    """What is encoded at one go: images of a split, or texts."""

    split: Split
    column: str
    """Where the images lie; nothing = texts."""
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    """What the results are kept under: the names of the images, or the texts themselves."""


@dataclass(frozen=True)
class _Wanted:
    """A split to encode."""

    source: Split
    kind: RowKind
    """What is made of its rows."""
    light: pa.Table
    """Its queries: its rows without images, or those beside them."""
    texts: list[Sequence[str]]
    """Texts that each of these may have."""

    @staticmethod
    def of(config: RunConfig, source: Split) -> _Wanted:
        kind = source.kind.encoded
        if kind is None:
            raise UserError(f"{source.path} holds {source.kind.name}, of which there are no features")
        light = source.read(QUERY_SCHEMA.names) if kind.is_query else source.queries()
        texts_of = make_task(config).texts_of
        texts = [texts_of(captions, kind.is_query) for captions in light.column("captions").to_pylist()]
        return _Wanted(source, kind, light, texts)

    def items(self, size: int) -> Iterator[_Item]:
        """Yields what is to be encoded: every image once, then every text once."""
        for column, rows, keys in self._images():
            for part in iterate_slices(len(rows), size):
                yield _Item(self.source, column, tuple(rows[part]), tuple(keys[part]))
        distinct = sorted({text for texts in self.texts for text in texts}, key=lambda text: (len(text), text))
        for part in iterate_slices(len(distinct), size):
            yield _Item(self.source, "", (), tuple(distinct[part]))

    def _images(self) -> Iterator[tuple[str, list[int], list[str]]]:
        seen: set[str] = set()
        for column, names in self.names().items():
            rows, keys = [], []
            for row, name in enumerate(names):
                if name not in seen:
                    seen.add(name)
                    rows.append(row)
                    keys.append(name)
            yield column, rows, keys

    def names(self) -> dict[str, list[str]]:
        """Returns the names of the images in each column of images."""
        images = self.source.kind.images
        names = self.source.read([*images.values()])
        return {column: names.column(name).to_pylist() for column, name in images.items()}


def _encode(config: RunConfig, items: Sequence[_Item], cluster: Cluster) -> Generator[dict[str, Any]]:
    """Yields for every item, in order, the bytes of its vectors and the identity of the encoders."""
    from harma_ray.on_ray.quirks import closing_batches
    from harma_ray.on_ray.stream import map_in_actors

    use_gpu = cluster.gpus >= 1 if config.scaling.use_gpu is None else config.scaling.use_gpu
    actors = int(cluster.gpus) if use_gpu else 1
    settings = {"config": to_dict(config), "device": "cuda" if use_gpu else "cpu", "actors": actors}
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = map_in_actors(rows, _Encoder, settings, num_actors=actors, use_gpu=use_gpu)
    total = sum(len(item.keys) for item in items)
    with closing_batches(dataset.iter_rows()) as found, tqdm(total=total, unit=" inputs", desc="features") as bar:
        for item, row in zip(items, found, strict=True):
            if row["error"]:
                raise UserError(row["error"])
            bar.update(len(item.keys))
            yield row


class _Encoder:
    """Holds the encoders in its process. Mistakes come back as rows: Ray would wrap an exception in its own traces."""

    def __init__(self, config: dict[str, Any], device: str, actors: int):
        import torch

        torch.set_num_threads(max(1, node_cpus() // actors))
        self._task, self._device = make_task(build_config(recipe_config(config["recipe"]), config)), device

    @functools.cached_property
    def _encoder(self) -> FeatureEncoder:
        return self._task.feature_encoder(self._device)

    def __call__(self, table: pa.Table) -> dict[str, list]:
        rows = [self._encode(pickle.loads(item)) for item in table.column("item").to_pylist()]
        return {name: [row[name] for row in rows] for name in ("vectors", "identity", "error")}

    def _encode(self, item: _Item) -> dict[str, Any]:
        origin = ""
        try:
            encoder, origin = self._encoder, f"{item.split.path}: "
            if item.column:
                samples = np.stack([np.asarray(item.rows), np.zeros(len(item.rows), np.int64)], axis=1)
                table = read_samples(_indexed(item.split.path), samples, 0)
                vectors = encoder.encode_images(table.column(item.column).to_pylist(), list(item.keys))
            else:
                vectors = encoder.encode_texts(list(item.keys))
        except Exception as raised:
            error = find_user_error(raised)
            if error is None:
                raise
            return {"vectors": b"", "identity": "", "error": f"{origin}{error}"}
        return {"vectors": vectors.numpy().tobytes(), "identity": json.dumps(dict(encoder.identity)), "error": ""}


@functools.lru_cache(maxsize=4)
def _indexed(path: Path) -> IndexedSplit:
    split = open_split(path.parent, path.name)
    return IndexedSplit(split, index_rows(split))


@dataclass(frozen=True)
class _Vectors:
    """The vectors of a split by name of the image and by text, as bytes."""

    images: dict[str, bytes]
    texts: dict[str, bytes]


def _collect(results: Iterator[dict[str, Any]], items: Iterator[_Item]) -> tuple[_Vectors, dict[str, Any]]:
    found, identity = _Vectors({}, {}), {}
    for item in items:
        row = next(results)
        width = len(row["vectors"]) // len(item.keys)
        parts = [row["vectors"][start : start + width] for start in range(0, len(row["vectors"]), width)]
        (found.images if item.column else found.texts).update(zip(item.keys, parts, strict=True))
        identity = json.loads(row["identity"])
    return found, identity


def _write(wanted: _Wanted, vectors: _Vectors, identity: dict[str, Any], out: Path) -> None:
    """Writes a split of vectors, whole or not at all."""
    source, kind = wanted.source, wanted.kind
    text_vectors = pa.array([[vectors.texts[text] for text in texts] for texts in wanted.texts], pa.list_(pa.binary()))
    queries = wanted.light.append_column("text_vectors", text_vectors)
    rows = queries if kind.is_query else source.read(kind.light_columns)
    for column, names in wanted.names().items():
        found = pa.array([vectors.images[name] for name in names], pa.binary())
        rows = rows.append_column(column.replace("image", "vector"), found)
    with lock(out):
        work = work_folder(out) / "new"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        shards = _write_shards(rows.cast(kind.schema), work)
        beside = None
        if not kind.is_query:
            beside = write_table(queries.cast(QUERY_VECTOR_SCHEMA), work / QUERIES_NAME)
        manifest = Manifest(
            rows=len(rows),
            captions=source.manifest.captions,
            shards=tuple(shards),
            inputs={"manifest": source.fingerprint},
            options={"converter": FOLDER, "encoder": identity, SOURCE: str(source.path)},
            tool_version=__version__,
            kind=kind.name,
            queries=beside,
        )
        with atomic(work / MANIFEST_NAME) as file:
            file.write_text(manifest.to_json())
        put_in_place(work, out)


def _write_shards(rows: pa.Table, folder: Path) -> Iterator[Shard]:
    row_bytes = max(1, rows.nbytes // max(1, len(rows)))
    for number, part in enumerate(iterate_slices(len(rows), max(1, SHARD_BYTES // row_bytes))):
        path, shard = folder / f"part-{number:05d}.parquet", rows.slice(part.start, part.stop - part.start)
        yield write_table(shard, path, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
