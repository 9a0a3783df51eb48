"""Rows per second of the Ray Data training stream against a torch DataLoader: same files, transform and cores.

Run: python benchmarks/stream.py [--images 2000] [--size 256] [--cores 2]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harma_ray.config import DataConfig
from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.order import chunk_samples, iterate_slices, read_samples, training_order
from harma_ray.data.splits import open_split
from harma_ray.data.stream import DecodeRows, TrainingStream, Worker
from harma_ray.data.transforms import PUBLISHED
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes.harma.task import PairTransform


class Pairs(IterableDataset):
    """The same batches, read in pieces of the same size and decoded in DataLoader workers."""

    def __init__(self, order, transform):
        self.order, self.decode = order, DecodeRows(transform, order.seed)
        samples = order.worker_samples(0, 0, 1)
        steps = max(1, chunk_samples(order.index, DataConfig().chunk_mb) // order.global_batch_size)
        self.pieces = [samples[part] for part in iterate_slices(len(samples), steps)]

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None  # it is read by DataLoader's processes alone
        for piece in self.pieces[worker.id :: worker.num_workers]:
            table = read_samples(self.order, piece.reshape(-1, 2), 0)
            for part in iterate_slices(len(table), self.order.global_batch_size):
                arrays = self.decode(table.slice(part.start, self.order.global_batch_size))
                yield {name: torch.as_tensor(array) for name, array in arrays.items()}


def main() -> None:
    """Measures both in turn, three times, and prints medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transform = PairTransform("ViT-B-32", 224, 10**8, PUBLISHED)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(num_cpus=options.cores):
        from harma_ray.on_ray.stream import ray_batches

        convert_scenes(Path(folder), {"train": options.images}, style="summer", size=options.size)
        split = open_split(folder, "train")
        order = training_order(split, seed=0, global_batch_size=100, shuffle_window_mb=256)
        rates: dict[str, list[float]] = {"ray": [], "loader": []}
        starts = []
        worker = Worker(decode_threads=options.cores)
        for _ in range(3):
            stream = TrainingStream(order, transform, DataConfig(), worker, ray_batches).steps(0, 2)
            next(stream)
            begin = time.perf_counter()
            for step in range(1, order.steps_per_epoch):
                next(stream)
                if step == order.steps_per_epoch - 1:
                    boundary = time.perf_counter()
            rates["ray"].append(100 * (order.steps_per_epoch - 1) / (boundary - begin))
            next(stream)
            starts.append(time.perf_counter() - boundary)
            stream.close()
            loader = iter(DataLoader(Pairs(order, transform), batch_size=None, num_workers=options.cores))
            next(loader)
            begin = time.perf_counter()
            count = sum(len(batch["row"]) for batch in loader)
            rates["loader"].append(count / (time.perf_counter() - begin))
    ray_rate, loader_rate = float(np.median(rates["ray"])), float(np.median(rates["loader"]))
    print(f"Ray Data stream     {ray_rate:7.0f} rows/s")
    print(f"torch DataLoader    {loader_rate:7.0f} rows/s ({options.cores} workers)")
    print(f"ratio               {ray_rate / loader_rate:7.2f}")
    print(f"first batch of the second epoch after {float(np.median(starts)):.2f} s")


if __name__ == "__main__":
    main()
