"""Tiles per second and peak memory of ViTP's training stream on a small and on an eight times larger set of talks.

Memory is counted as in `memory.py`. Chunks are small, so that even the small set has more than wait at a time.

Run: python benchmarks/tiles.py [--scenes 200 1600] [--size 256] [--tiles 12]
"""

import argparse
import tempfile
import time
from pathlib import Path

from memory import MIB, Watch

from harma_ray.data.convert.commands import convert_scenes_talk
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.stream import ray_batches
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config


def main() -> None:
    """Reads an epoch of each set, in clusters of their own, and prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, nargs="+", default=[200, 1600])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tiles", type=int, default=12)
    options = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for scenes in options.scenes:
            folder = Path(name) / str(scenes)
            convert_scenes_talk(folder, {"train": scenes}, style="summer", size=options.size)
            stored = sum(file.stat().st_size for file in (folder / "train").glob("*.parquet"))
            changes = {
                "data.path": str(folder), "data.chunk_mb": 1, "train.steps": 0, "talk.max_tiles": options.tiles,
                "talk.max_tokens": 4096,
            }  # fmt: skip
            config = build_config(recipe_config("scenes-vitp"), changes)
            task, order = make_task(config), planned_order(config)
            with ray_cluster(), Watch() as watch:
                stream = TrainingStream(order, task.transform(training=True), config.data, Worker(), ray_batches)
                begin = time.perf_counter()
                tiles = sum(len(batch["pixels"]) for batch in stream.steps(0, 1))
                seconds = time.perf_counter() - begin
            peaks.append(watch.peak)
            print(f"{scenes} scenes, {stored / MIB:.1f} MiB of shards, {tiles:,} tiles, {tiles / seconds:.0f} a second")
            print(f"  peak of all processes   {watch.peak / MIB:6.0f} MiB")
            for kind, (size, count) in sorted(watch.peaks.items()):
                print(f"    {kind:20}  {size / MIB:6.0f} MiB in {count} processes", flush=True)
    print(f"ratio of the last peak to the first: {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
