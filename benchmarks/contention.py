"""What a training thread loses to decoding beside it: to threads of its own process, and to Ray tasks.

The thread does what a step on a GPU asks of Python: short operations, one after the other, here on the CPU. They are
timed while the training stream prepares the next batches, and so is the stream.

Run: python benchmarks/contention.py [--threads 2 4 16] [--batch 128] [--steps 40] [--cores 2]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.stream import TrainingStream, Worker
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.stream import ray_batches
from harma_ray.preflight import prepare
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config

OPERATIONS = 300


def operations() -> float:
    """Returns the seconds of so many short operations."""
    value, begin = torch.randn(8, 8), time.perf_counter()
    for _ in range(OPERATIONS):
        value = value * 1.0
    return time.perf_counter() - begin


def measure(batches: Iterator[Any], size: int, steps: int) -> tuple[float, float]:
    """Returns the median milliseconds of the operations, and rows per second; somebody else takes the batches."""
    for _ in range(steps // 2):  # the processes are still importing
        next(batches)
    seconds, begin = [], time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(lambda: [next(batches)["row"] for _ in range(steps)])
        while not taking.done():
            seconds.append(operations())
            time.sleep(0.02)  # the GPU's time
    return 1000 * statistics.median(seconds), len(taking.result()) * size / (time.perf_counter() - begin)


def main() -> None:
    """Draws, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(num_cpus=options.cores):
        data = Path(folder) / "data"
        convert_scenes(data, counts={"train": 600, "val": 10, "test": 10}, style="summer", size=256)
        settings = {
            "data.path": str(data), "model.pretrained": "random", "train.global_batch_size": options.batch,
            "train.epochs": 50, "data.prefetch_batches": 4,
        }  # fmt: skip
        config = build_config(recipe_config("harma-rsitmd-vit"), settings)
        order, transform = prepare(config).order, make_task(config).transform(training=True)
        alone = 1000 * statistics.median(operations() for _ in range(100))
        print(f"nothing beside it: {OPERATIONS} operations in {alone:.1f} ms")
        for decode, threads in [("worker", number) for number in options.threads] + [("tasks", 1)]:
            how = replace(config.data, decode=decode)
            worker = Worker(decode_threads=threads)
            stream = TrainingStream(order, transform, how, worker, ray_batches).steps(0, config.train.epochs)
            took, rows = measure(stream, options.batch, options.steps)
            stream.close()
            way = "tasks" if decode == "tasks" else f"{threads} threads"
            print(f"{way}: {took:.1f} ms, {took / alone:.1f} times as long; {rows:.0f} rows/s", flush=True)


if __name__ == "__main__":
    main()
