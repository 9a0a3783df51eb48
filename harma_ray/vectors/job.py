"""The job that encodes: processes that hold a model read what they are asked to, and the vectors come back in order."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.images import open_image
from harma_ray.data.order import IndexedSplit, RowsChunk, iterate_slices
from harma_ray.data.splits import Split, index_rows, open_split
from harma_ray.errors import UserError, count
from harma_ray.on_ray.cluster import node_cpus
from harma_ray.on_ray.tasks import map_in_actors
from harma_ray.progress import progress_bar
from harma_ray.retrieval.encoding import Encoder, VectorIdentity
from harma_ray.training.threads import use_threads

Row = Mapping[str, Any]
Load = Callable[[str], tuple[Encoder, VectorIdentity]]
"""Loads an encoder on a device."""
_LISTED = 10


@dataclass(frozen=True)
class Inputs:
    """What is encoded at one go."""

    rows: Sequence[Row] = ()
    """What is known of each image: its ``name``, what messages call it (``label``), its file's ``content`` hash, ..."""
    images: Sequence[Callable[[], Image.Image]] = ()
    """Open these images; raise UserError."""
    texts: Sequence[str] = ()
    """Left out where the encoder takes none."""
    captions: Sequence[Sequence[str]] = ()
    """One or two of each of the images, where these are references whose queries are composed."""
    query: str = ""
    """How these are: a name in `Encoder.compose`."""


Request = Callable[[], Inputs]
"""Reads inputs, where they are encoded."""


@dataclass(frozen=True)
class Encoded:
    """What became of a request."""

    rows: Sequence[Row]
    """Of the images that could be read, as in the inputs."""
    images: np.ndarray
    """fp32[N, F], of these rows; where there are captions, of the queries."""
    texts: Mapping[str, np.ndarray]
    """fp32[F] by text; empty if the encoder takes none."""
    bad: Sequence[str]
    """Which images could not be read, and why."""
    identity: VectorIdentity
    """What the vectors depend on."""


@dataclass(frozen=True)
class JobSettings:
    """How a job encodes."""

    batch_size: int = 64
    """Images, or texts, at a time."""
    num_actors: int = 1
    """Processes that hold the model."""
    use_gpu: bool = False
    """Whether each of them takes a GPU."""
    max_bad: int = 0
    """Unreadable images that may be left out."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("num_actors", 1), ("max_bad", 0)):
            if getattr(self, name) < low:
                raise UserError(f"`{name}` must be at least {low}, got {getattr(self, name)}")


def encode(
    requests: Sequence[Request], load: Load, settings: JobSettings, *, progress: str, hint: str = ""
) -> Generator[Encoded]:
    """Yields what becomes of requests, in their order, and shows how far they are.

    Ray must have been initialised.

    Args:
        requests: At least one.
        load: Loads what encodes, once in each process.
        settings: How; the batches are the requests'.
        progress: What the bar is called.
        hint: What the message about too many unreadable images ends with.

    Raises:
        UserError: If nothing can be loaded or read, more images are unreadable than may be left out, or the cluster
            has too few GPUs.
        WorkerDied: If one of the processes ends.
    """
    import ray

    num_actors, use_gpu = settings.num_actors, settings.use_gpu
    gpus = ray.cluster_resources().get("GPU", 0)
    if use_gpu and num_actors > gpus:  # Ray itself would wait for ever
        raise UserError(f"{num_actors} processes need a GPU each, but the cluster has {gpus:g}; use fewer, or --cpu")
    build = partial(_Process, load, "cuda" if use_gpu else "cpu", num_actors)
    results, bad = map_in_actors(build, requests, num_actors=num_actors, use_gpu=use_gpu), []
    with closing(results):
        for found in progress_bar(iterable=results, total=len(requests), unit=" batches", desc=progress, leave=False):
            bad += found.bad
            if len(bad) > settings.max_bad:
                raise UserError(
                    f"{count(len(bad), 'image')} cannot be read ({'; '.join(bad[:_LISTED])}); mend them{hint}"
                )
            yield found


def image_requests(
    split: Split, rows: Sequence[int], settings: JobSettings, column: str, max_pixels: int, *, captions: bool = False
) -> Iterator[Request]:
    """Yields requests of images of a data set; in the answers a row's ``id`` is that of its image in a store.

    Args:
        split: Where they are.
        rows: Theirs.
        settings: With the size of a batch.
        column: Where in a row they are.
        max_pixels: Largest width times height; 0 = any.
        captions: Whether the rows' captions are encoded too.
    """
    for part in iterate_slices(len(rows), settings.batch_size):
        yield partial(read_images, split.path, rows[part], column, max_pixels, captions=captions)


def first_rows(names: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Returns for columns of images the rows where an image stands that is in no earlier row or column.

    Args:
        names: Names of the images of all rows, by column.
    """
    found: dict[str, list[int]] = {}
    seen: set[str] = set()
    for column, own in names.items():
        first = {name: row for row, name in reversed([*enumerate(own)]) if name not in seen}
        found[column] = sorted(first.values())
        seen.update(own)
    return found


def hash_file(path: Path) -> str | None:
    """Returns the SHA-256 of a file, in hexadecimal digits; None if it cannot be read: who opens it says why."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def read_images(
    path: Path, rows: Sequence[int] | np.ndarray, column: str, max_pixels: int, *, captions: bool = False
) -> Inputs:
    """Reads images of a data set, see `image_requests`; ``path`` is the folder of the split."""
    source = _indexed(path)
    kind = source.split.kind
    held = RowsChunk(np.asarray(rows)).read(source).select([column, *kind.light_columns]).to_pylist()
    files = [row.pop(column) for row in held]
    images = [partial(open_image, file, max_pixels=max_pixels) for file in files]
    for row, file in zip(held, files, strict=True):
        name, content = row[kind.images[column]], hashlib.sha256(file).hexdigest()
        row["id"] = f"{path.name}/{row.get('image_id', name)}"
        row.update(name=name, label=f"{path}: image {name}", content=content)
    return Inputs(held, images, [text for row in held for text in row["captions"]] if captions else ())


@lru_cache(maxsize=4)
def _indexed(path: Path) -> IndexedSplit:
    split = open_split(path.parent, path.name)
    return IndexedSplit(split, index_rows(split))


class _Process:
    """Holds an encoder."""

    def __init__(self, load: Load, device: str, num_actors: int):
        self._threads = use_threads(node_cpus() / num_actors)
        self._encoder, self._identity = load(device)

    def __call__(self, request: Request) -> Encoded:
        inputs, encoder = request(), self._encoder
        with ThreadPoolExecutor(self._threads) as pool:
            prepared = list(pool.map(self._prepare, inputs.images))
        pairs = list(zip(inputs.rows, prepared, strict=True))
        texts = {}
        if inputs.texts and encoder.encode_texts:
            distinct = list(dict.fromkeys(inputs.texts))
            texts = dict(zip(distinct, encoder.encode_texts(distinct).numpy(), strict=True))
        return Encoded(
            [row for row, image in pairs if isinstance(image, Tensor)],
            self._encode(inputs, prepared),
            texts,
            [f"{row['label']}: {reason}" for row, reason in pairs if isinstance(reason, UserError)],
            self._identity,
        )

    def _encode(self, inputs: Inputs, prepared: Sequence[Tensor | UserError]) -> np.ndarray:
        encoder, good = self._encoder, [image for image in prepared if isinstance(image, Tensor)]
        if not good:
            return np.empty((0, encoder.width), np.float32)
        if not inputs.captions:
            return encoder.encode_images(torch.stack(good)).numpy()
        both = zip(inputs.captions, prepared, strict=True)
        captions = [own for own, image in both if isinstance(image, Tensor)]
        return encoder.compose[inputs.query](torch.stack(good), captions).numpy()

    def _prepare(self, image: Callable[[], Image.Image]) -> Tensor | UserError:
        try:
            return self._encoder.prepare(image())
        except UserError as error:
            return error
