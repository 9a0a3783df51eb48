"""Rows per second of the Ray Data training stream against other loaders: same JPEG bytes, transform and cores.

Run: python benchmarks/stream.py [--images 2000] [--size 256] [--cores 2] [--rounds 5] [--only ray loader ...]

All take turns, each alone on the machine: Ray is started for its own turn only. Of each the middle of an epoch is
timed, while there is more to read. WebDataset (the extra ``benchmarks``) and MosaicML Streaming take part if they are
installed. The latter allows only older versions of what this package needs, so it takes ``pip install --no-deps
mosaicml-streaming catalogue Brotli python-snappy cramjam xxhash zstd`` beside the extra ``vitp``.
"""

import argparse
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stream_rivals import MosaicPairs, Shards, Sources, jpeg_files, tar_files, write_sources
from torch.utils.data import DataLoader

from harma_ray.config import DataConfig
from harma_ray.data.decoding import DecodeRows
from harma_ray.data.order import TrainingOrder, read_samples, training_order
from harma_ray.data.samples import Batch, Send
from harma_ray.data.splits import open_split
from harma_ray.data.stream import TrainingStream, Worker
from harma_ray.data.transforms import PUBLISHED
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes.harma.task import PairTransform

BATCH = 50
LEFT_OUT = 4
"""First batches that are not timed: what the loaders have prepared by then is prepared at the end again."""


@dataclass(frozen=True)
class Rates:
    """What one turn has measured."""

    rows: float
    """Rows per second."""
    next_epoch: float = 0.0
    """Seconds until the next epoch's first batch."""


def timed(batches: Iterator[Any], count: int) -> float:
    """Returns the rows per second of batches after the first, while at least as many are left."""
    for _ in range(LEFT_OUT):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return BATCH * count / (time.perf_counter() - begin)


class SentPairs(PairTransform):
    """Leaves out what is done on a device."""

    def finish(self, batch: Batch, send: Send) -> Batch:
        """Returns the batch as it is sent."""
        return batch


@dataclass(frozen=True)
class Bench:
    """The same rows for everybody."""

    order: TrainingOrder
    transform: PairTransform
    sources: Sources
    cores: int

    @property
    def count(self) -> int:
        """Batches that are timed."""
        return self.order.steps_per_epoch - 3 * LEFT_OUT

    def ray(self) -> Rates:
        """The training stream as a worker on CPUs has it: read by tasks, decoded in threads."""
        return self._stream(DataConfig())

    def tasks(self) -> Rates:
        """The same, where tasks decode, too."""
        return self._stream(DataConfig(decode="tasks", task_cpus=1))

    def sent(self) -> Rates:
        """What a worker on a GPU is sent: tasks decode and crop; what the GPU does then is left out."""
        return self._stream(DataConfig(decode="tasks", task_cpus=1, augment="device"))

    def small(self) -> Rates:
        """The training stream of a split that fits one chunk: read by the worker."""
        return self._stream(DataConfig(chunk_mb=self.order.index.binary_bytes / 2**19))

    def _stream(self, config: DataConfig) -> Rates:
        from harma_ray.on_ray.stream import ray_batches

        with ray_cluster(num_cpus=self.cores):
            worker = Worker(decode_threads=self.cores)
            stream = TrainingStream(self.order, self.transform, config, worker, ray_batches).steps(0, 3)
            for _ in range(self.order.steps_per_epoch):  # Ray's own processes are still importing meanwhile
                next(stream)
            begin = time.perf_counter()
            next(stream)
            started = time.perf_counter() - begin
            rate = timed(stream, self.count)
            stream.close()
        return Rates(rate, started)

    def loader(self) -> Rates:
        """A DataLoader over the same shards, which are read and decoded by the same functions in the same order."""
        return self._rates(
            DataLoader(Shards(self.order, self.transform, self.cores), batch_size=None, num_workers=self.cores)
        )

    def files(self) -> Rates:
        """A DataLoader over JPEG files with Pillow and torchvision, as HarMA's code has it."""
        data = jpeg_files(self.sources, self.transform.architecture)
        return self._rates(DataLoader(data, BATCH, shuffle=True, num_workers=self.cores))

    def mosaic(self) -> Rates:
        """MosaicML Streaming with this package's transform, shuffled its own way."""
        data = MosaicPairs(self.sources, self.transform, BATCH).dataset()
        return self._rates(DataLoader(data, BATCH, num_workers=self.cores))

    def webdataset(self) -> Rates:
        """WebDataset with this package's transform, shuffled its own way."""
        data = tar_files(self.sources, self.transform, BATCH)
        return self._rates(DataLoader(data, batch_size=None, num_workers=self.cores))

    def decoding(self) -> Rates:
        """Rows that lie in memory, decoded by as many processes as there are cores, and thrown away."""
        table = read_samples(self.order, self.order.worker_samples(0, 0, 1)[: 4 * self.cores].reshape(-1, 2), 0)
        context, ready = multiprocessing.get_context("fork"), multiprocessing.Barrier(self.cores + 1)
        parts = [table.slice(4 * BATCH * part, 4 * BATCH) for part in range(self.cores)]
        processes = [context.Process(target=_decode, args=(self.transform, part, ready)) for part in parts]
        for process in processes:
            process.start()
        ready.wait()
        begin = time.perf_counter()
        for process in processes:
            process.join()
        return Rates(len(table) / (time.perf_counter() - begin))

    def _rates(self, loader: DataLoader) -> Rates:
        return Rates(timed(iter(loader), self.count))


def _decode(transform: PairTransform, table: Any, ready: Any) -> None:
    decode = DecodeRows(transform, 0)
    decode(table.slice(0, 2))
    ready.wait()
    for start in range(0, len(table), BATCH):
        decode(table.slice(start, BATCH))


LABELS: dict[str, str] = {
    "ray": "Ray Data stream",
    "tasks": "Ray Data stream, tasks decode",
    "sent": "the same, but only cropped",
    "small": "stream of one chunk",
    "loader": "torch DataLoader, shards",
    "files": "torch DataLoader, JPEG files",
    "mosaic": "MosaicML Streaming",
    "webdataset": "WebDataset",
    "decoding": "decoding alone",
}
_MODULES = {"mosaic": "streaming", "webdataset": "webdataset"}


def main() -> None:
    """Measures all in turn, and prints medians, spread and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS))
    options = parser.parse_args()
    if options.images * 5 < BATCH * 4 * LEFT_OUT:
        parser.error(f"--images must be at least {BATCH * 4 * LEFT_OUT // 5}, got {options.images}")
    torch.set_num_threads(1)
    transform = SentPairs("ViT-B-32", 224, 10**8, PUBLISHED)
    names = [name for name in options.only if name not in _MODULES or importlib.util.find_spec(_MODULES[name])]
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), options.images, options.size, names)
        split = open_split(sources.shards, "train")
        order = training_order(split, seed=0, global_batch_size=BATCH, shuffle_window_mb=256)
        size, chunk = order.index.binary_bytes / 2**20, DataConfig().chunk_mb
        what = f"{order.num_samples:,} samples of {len(order.index):,} images"
        print(f"an epoch: {what}, {size:.0f} MiB, in chunks of {chunk:g} MiB")
        if {"ray", "tasks", "sent"} & set(names) and size <= chunk:
            parser.error("the stream would read one chunk by itself, without Ray Data; draw more with --images")
        bench = Bench(order, transform, sources, options.cores)
        rates: dict[str, list[Rates]] = {name: [] for name in names}
        for number in range(options.rounds):
            print(f"round {number + 1}:", end="", flush=True)
            for name in names:
                turn: Callable[[], Rates] = getattr(bench, name)
                rates[name].append(turn())
                print(f" {name} {rates[name][-1].rows:.0f}", end="", flush=True)
            print(" rows/s")
    _print(rates)


def _print(rates: dict[str, list[Rates]]) -> None:
    first = rates.get("ray", [])
    for name, found in rates.items():
        rows = [rate.rows for rate in found]
        line = f"{LABELS[name]:30}{np.median(rows):6.0f} rows/s ({min(rows):.0f}-{max(rows):.0f})"
        if first and name != "ray":
            ratios = [own.rows / rate.rows for own, rate in zip(first, found, strict=True)]
            line += f"   ray / this {np.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(line)
    if first:
        print(f"first batch of the second epoch after {np.median([rate.next_epoch for rate in first]):.2f} s")


if __name__ == "__main__":
    main()
