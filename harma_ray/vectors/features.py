"""What frozen encoders give for a data set of composed retrieval, computed once with Ray Data: a data set of vectors.

Every image and every text is encoded once, however many triplets share it. The result has the splits of the data set,
with vectors in place of images and beside the texts; it is trained on and evaluated like the data set itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from harma_ray import __version__
from harma_ray.config import RunConfig
from harma_ray.data.convert.shards import write_table
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
from harma_ray.data.order import iterate_slices
from harma_ray.data.splits import Split, list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import making, output_path, write_text
from harma_ray.recipes import make_task
from harma_ray.resources import Cluster, uses_gpu
from harma_ray.settings import build_config
from harma_ray.vectors.job import Encoded, Inputs, JobSettings, Request, encode, first_rows, image_requests

FOLDER = "features"
"""Where the features of a run or a search lie, in its folder."""


def with_features(config: RunConfig, folder: Path, cluster: Cluster) -> RunConfig:
    """Returns the settings to train with: those given, or with the features of their data set in its place.

    Splits that are there already, from the same data set, stay.

    Args:
        config: Settings.
        folder: Of the run or the search; features go into it, each split whole or not at all.
        cluster: Where they are computed; Ray must have been initialised.

    Raises:
        UserError: If an image cannot be read, the disk is full, or other features are there.
    """
    data, features = config.data, make_task(config).features
    if features is None:
        return config
    rows = open_split(data.path, data.train_split).kind
    if not rows.is_query or rows.is_encoded:
        return config
    wanted = {data.train_split, data.val_split, data.test_split}
    target = output_path(folder / FOLDER)
    sources = [open_split(data.path, name) for name in list_splits(data.path) if name in wanted]
    splits = [_Encoding(source, features.texts_of) for source in sources if not _is_done(source, target)]
    use_gpu = uses_gpu(config, cluster)
    settings = JobSettings(
        min(JobSettings.batch_size, config.train.eval_batch_size), int(cluster.gpus) if use_gpu else 1, use_gpu
    )
    requests = [split.requests(settings, data.max_pixels) for split in splits]
    with closing(encode([*chain(*requests)], features.load, settings, progress="features")) as results:
        for split, own in zip(splits, requests, strict=True):
            split.write(islice(results, len(own)), target / split.source.name)
    return build_config(config, {"data.path": str(target)})


def _is_done(source: Split, target: Path) -> bool:
    if not (target / source.name / MANIFEST_NAME).is_file():
        return False
    if open_split(target, source.name).manifest.inputs != {"manifest": source.fingerprint}:
        raise UserError(f"{target / source.name} holds features of other data than {source.path}; remove it")
    return True


@dataclass(frozen=True)
class _Encoding:
    """A split to encode."""

    source: Split
    texts_of: Callable[[Sequence[str], bool], Sequence[str]]
    """See `Features`."""

    @cached_property
    def kind(self) -> RowKind:
        """What is made of its rows."""
        if self.source.kind.encoded is None:
            raise UserError(f"{self.source.path} holds {self.source.kind.name}, of which there are no features")
        return self.source.kind.encoded

    @cached_property
    def queries(self) -> pa.Table:
        """Its rows without images, or the queries beside them."""
        return self.source.read(QUERY_SCHEMA.names) if self.kind.is_query else self.source.queries()

    @cached_property
    def texts(self) -> list[Sequence[str]]:
        """The texts that each query may have."""
        return [self.texts_of(captions, self.kind.is_query) for captions in self.queries["captions"].to_pylist()]

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """The names of the images in each column of images."""
        images = self.source.kind.images
        names = self.source.read([*images.values()])
        return {column: names[name].to_pylist() for column, name in images.items()}

    def requests(self, settings: JobSettings, max_pixels: int) -> list[Request]:
        """Returns what is to be encoded: every image once, then every text once."""
        requests = []
        for column, rows in first_rows(self.names).items():
            requests += image_requests(self.source, rows, settings, column, max_pixels)
        distinct = sorted({text for texts in self.texts for text in texts}, key=lambda text: (len(text), text))
        parts = iterate_slices(len(distinct), settings.batch_size)
        return [*requests, *(partial(Inputs, texts=distinct[part]) for part in parts)]

    def write(self, found: Iterable[Encoded], out: Path) -> None:
        """Writes the split of vectors, whole or not at all."""
        images: dict[str, bytes] = {}
        texts: dict[str, bytes] = {}
        identity = None
        for encoded in found:
            images |= {row["name"]: vector.tobytes() for row, vector in zip(encoded.rows, encoded.images, strict=True)}
            texts |= {text: vector.tobytes() for text, vector in encoded.texts.items()}
            identity = encoded.identity
        text_vectors = pa.array([[texts[text] for text in own] for own in self.texts], pa.list_(pa.binary()))
        queries = self.queries.append_column("text_vectors", text_vectors)
        rows = queries if self.kind.is_query else self.source.read(self.kind.light_columns)
        for column, names in self.names.items():
            vectors = pa.array([images[name] for name in names], pa.binary())
            rows = rows.append_column(column.replace("image", "vector"), vectors)
        with making(out) as work:
            work.mkdir()
            manifest = Manifest(
                rows=len(rows),
                captions=self.source.manifest.captions,
                shards=tuple(_write_shards(rows.cast(self.kind.schema), work)),
                inputs={"manifest": self.source.fingerprint},
                options={"converter": FOLDER, "encoder": identity and identity.values, SOURCE: str(self.source.path)},
                tool_version=__version__,
                kind=self.kind.name,
            )
            if not self.kind.is_query:
                beside = write_table(queries.cast(QUERY_VECTOR_SCHEMA), work / QUERIES_NAME)
                manifest = replace(manifest, queries=beside)
            write_text(work / MANIFEST_NAME, manifest.to_json())


def _write_shards(rows: pa.Table, folder: Path) -> Iterator[Shard]:
    row_bytes = max(1, rows.nbytes // max(1, len(rows)))
    for number, part in enumerate(iterate_slices(len(rows), max(1, SHARD_BYTES // row_bytes))):
        path, shard = folder / f"part-{number:05d}.parquet", rows.slice(part.start, part.stop - part.start)
        yield write_table(shard, path, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
