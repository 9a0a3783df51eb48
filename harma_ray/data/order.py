"""Which samples a worker sees, in which order, and how their rows are read from the shards.

A sample is a pair (row, caption): ``int64[2]``; rows other than images have one sample each. Where captions are grouped
it is an image with ``captions_per_sample`` of its captions, and the second number that of the group. The order of an
epoch is a function of (seed, epoch) alone; step `s` takes the next ``samples_per_step`` samples and worker `r` of `W`
the r-th W-th of them. So the global batches are the same for any number of workers, and a run can be resumed at any
step.

The shuffle has two levels, so that it never needs the whole split in memory: the row groups (about 1 MiB each) are
dealt into windows, anew every epoch, and all pairs of a window are permuted together.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from harma_ray.config import RunConfig, TrainConfig
from harma_ray.data.splits import RowIndex, Split, index_rows, open_shard, open_split, require_batch
from harma_ray.errors import UserError

MAX_CHUNK_SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class IndexedSplit:
    """A split and where its rows lie."""

    split: Split
    index: RowIndex


@dataclass(frozen=True, eq=False)
class TrainingOrder(IndexedSplit):
    """The order of the samples of a split in training."""

    seed: int
    global_batch_size: int
    """Pairs of a step, over all workers."""
    window_rows: int
    """Images that are shuffled together."""
    one_caption: bool = False
    """Whether an epoch visits one caption of every image, drawn anew, instead of all."""
    captions_per_sample: int = 1
    """Captions of a group."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, such as (image, caption) pairs."""
        counts = self._samples_of_rows
        return int(np.count_nonzero(counts) if self.one_caption else counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_samples // self.samples_per_step

    @property
    def samples_per_step(self) -> int:
        """Samples of a step, over all workers."""
        return self.global_batch_size // self.captions_per_sample

    @property
    def _samples_of_rows(self) -> np.ndarray:
        """Samples that each row gives: int[N]."""
        return -(-self.index.num_samples // self.captions_per_sample)

    def total_steps(self, train: TrainConfig) -> int:
        """Returns the steps of a whole training."""
        return train.steps or self.steps_per_epoch * train.epochs

    def is_evaluated_at(self, step: int, train: TrainConfig) -> bool:
        """Returns whether a step is followed by an evaluation; the last one is."""
        every = train.eval_every_steps or train.eval_every_epochs * self.steps_per_epoch
        return step == self.total_steps(train) or step % every == 0

    def epoch_at(self, step: int) -> float:
        """Returns the epochs done after some steps; an integer at their ends."""
        return step / self.steps_per_epoch if step % self.steps_per_epoch else step // self.steps_per_epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the samples of an epoch: int64[steps_per_epoch * samples_per_step, 2] of (row, caption)."""
        rng = np.random.default_rng([self.seed, epoch])
        groups = self.index.row_group
        place = rng.permutation(int(groups[-1]) + 1)
        rows = np.argsort(place[groups], kind="stable")
        if self.one_caption:
            counts = self.index.num_samples[rows]
            samples = np.stack([rows, (rng.random(len(rows)) * counts).astype(np.int64)], axis=1)[counts > 0]
            windows = [rng.permutation(samples[part]) for part in iterate_slices(len(samples), self.window_rows)]
        else:
            windows = [
                rng.permutation(_pairs(rows[part], self._samples_of_rows))
                for part in iterate_slices(len(rows), self.window_rows)
            ]
        return np.concatenate(windows)[: self.steps_per_epoch * self.samples_per_step]

    def worker_samples(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """Returns the samples of one worker: int64[steps_per_epoch, samples_per_step / world_size, 2]."""
        share = self.samples_per_step // world_size
        steps = self.epoch(epoch).reshape(self.steps_per_epoch, world_size, share, 2)
        return steps[:, rank]


@dataclass(frozen=True)
class TrainingChunk:
    """Steps ``start`` to ``stop`` of an epoch, as one worker sees them."""

    epoch: int
    rank: int
    world_size: int
    start: int
    stop: int
    num_rows: int

    def read(self, source: IndexedSplit) -> pa.Table:
        """Reads the samples of the steps; the source is the order that they belong to."""
        assert isinstance(source, TrainingOrder)
        samples = _cached_samples(source, self.epoch, self.rank, self.world_size)[self.start : self.stop]
        return read_samples(source, samples.reshape(-1, 2), self.epoch)


@dataclass(frozen=True)
class RowsChunk:
    """Some rows, each once."""

    rows: np.ndarray
    """int64[n]."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def read(self, source: IndexedSplit) -> pa.Table:
        """Reads the rows; their ``caption`` is 0."""
        return read_samples(source, np.stack([self.rows, np.zeros_like(self.rows)], axis=1), 0)


Chunk: TypeAlias = TrainingChunk | RowsChunk
"""The samples that are read at one go: a few numbers, read somewhere else; with a column ``epoch``."""


@functools.lru_cache(maxsize=2)
def _cached_samples(order: TrainingOrder, epoch: int, rank: int, world_size: int) -> np.ndarray:
    return order.worker_samples(epoch, rank, world_size)


def training_order(
    split: Split,
    *,
    seed: int,
    global_batch_size: int,
    shuffle_window_mb: float,
    one_caption: bool = False,
    captions_per_sample: int = 1,
) -> TrainingOrder:
    """Indexes a split for training.

    Raises:
        UserError: If the split has no captions, no image with so many as a group, or fewer than a global batch.
    """
    index = index_rows(split)
    window_rows = max(1, int(len(index) * shuffle_window_mb * 2**20 / max(1, index.binary_bytes)))
    order = TrainingOrder(
        split, index, seed, global_batch_size, min(window_rows, len(index)), one_caption, captions_per_sample
    )
    if order.num_samples and captions_per_sample > (most := int(index.num_samples.max())):
        raise UserError(
            f"`train.captions_per_image` must not exceed the captions that an image of {split.path} has, got "
            f"{captions_per_sample}; use {most} or less"
        )
    require_batch(split, order.num_samples * captions_per_sample, global_batch_size)
    return order


def planned_order(config: RunConfig) -> TrainingOrder:
    """Indexes the training split of a run; see `training_order`."""
    data = config.data
    return training_order(
        open_split(data.path, data.train_split),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        shuffle_window_mb=data.shuffle_window_mb,
        one_caption=config.train.captions == "one",
        captions_per_sample=config.train.pairs_per_sample,
    )


def captions_of_group(group: int, size: int, *, num_captions: int, epoch: int) -> list[int]:
    """Returns which captions of an image a group has: `size` numbers below `num_captions`.

    The captions stand in a circle that starts one further in every epoch, and the groups of an epoch follow each other
    along it. So the groups of an epoch hold every caption, and those that fill the last one up are others in the next
    epoch.

    Args:
        group: The group, of ``ceil(num_captions / size)``.
        size: Captions of a group; they repeat where an image has fewer.
        num_captions: Captions of the image.
        epoch: The epoch.
    """
    return [(epoch + group * size + place) % num_captions for place in range(size)]


def worker_rows(num_rows: int, rank: int, world_size: int) -> np.ndarray:
    """Returns the rows that a worker evaluates: int64, contiguous; over all workers every row exactly once."""
    bounds = np.linspace(0, num_rows, world_size + 1).astype(np.int64)
    return np.arange(bounds[rank], bounds[rank + 1])


def chunk_samples(index: RowIndex, chunk_mb: float) -> int:
    """Returns how many samples of average size one read task takes for about `chunk_mb` MiB."""
    return int(np.clip(chunk_mb * 2**20 * len(index) / max(1, index.binary_bytes), 1, MAX_CHUNK_SAMPLES))


def read_samples(source: IndexedSplit, samples: np.ndarray, epoch: int) -> pa.Table:
    """Reads the rows of some samples, in their order.

    Args:
        source: The split and its index.
        samples: int64[n, 2] of (row, caption).
        epoch: Value of the column ``epoch``.

    Returns:
        The columns of the schema and three more, int64: ``row`` and ``caption``, the sample, and ``epoch``.

    Raises:
        UserError: If a shard cannot be read.
    """
    rows, inverse = np.unique(samples[:, 0], return_inverse=True)
    shard_of_row = source.index.shard[rows]
    parts = [_read_rows(source, rows[shard_of_row == shard]) for shard in np.unique(shard_of_row)]
    table = pa.concat_tables(parts).take(pa.array(inverse))
    extra = {"row": samples[:, 0], "caption": samples[:, 1], "epoch": np.full(len(samples), epoch, np.int64)}
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    return table


def iterate_slices(length: int, size: int) -> Iterator[slice]:
    """Yields slices of at most `size` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _pairs(rows: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
    counts = num_samples[rows]
    first = np.cumsum(counts) - counts
    captions = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.stack([np.repeat(rows, counts), captions], axis=1)


def _read_rows(source: IndexedSplit, rows: np.ndarray) -> pa.Table:
    """Reads ascending rows of one shard."""
    index = source.index
    path = source.split.shard_paths()[index.shard[rows[0]]]
    groups, firsts = np.unique(index.row_group[rows], return_index=True)
    parts = []
    with open_shard(path) as file:
        for group, offsets in zip(groups, np.split(index.offset[rows], firsts[1:]), strict=True):
            table = file.read_row_group(int(index.group_in_shard[group]), use_threads=False)
            parts.append(table.take(pa.array(offsets)))  # one group in memory at a time
    return pa.concat_tables(parts)
