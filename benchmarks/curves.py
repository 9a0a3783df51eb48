"""Makes a table of real learning curves, on which tuners are compared in seconds (see benchmarks/tuners.py).

Every setting of a grid trains the adapters of ``harma-scenes`` on drawn winter scenes, in a tiny CLIP that was trained
on summer scenes, for nine epochs with an evaluation after each. The seeds of training are outermost, so that a run that
is cut short has whole grids. A training leaves a small file in the folder and is not repeated: the command can be
stopped and started again. Within a seed every second learning rate comes first: a coarser whole grid.

Nothing here changes a curve, but the batches of a seed are decoded and augmented once for all settings, which see the
same ones in any case, and records go to memory.

Run: python benchmarks/curves.py [--folder curves] [--processes 1] [--seeds 2]
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harma_ray.config import RunConfig
from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.order import Chunk, IndexedSplit, TrainingChunk
from harma_ray.data.samples import Batch
from harma_ray.data.stream import Batches, Worker, local_batches
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.files import write_text
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import create_run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training, run_trial
from harma_ray.training.step import local_worker
from harma_ray.tune.space.parameters import Range

EPOCHS = 9
IMAGES = 80
PARAMETERS = (
    Range(name="optim.learning_rate", kind="float", low=5e-4, high=2e-2, log=True, points=12),
    Range(name="loss.margin", kind="float", low=0.05, high=0.5, points=3),
    Range(name="loss.gamma", kind="float", low=0, high=5, points=3),
    Range(name="adapter.width", kind="int", low=16, high=128, points=2),
)
NAMES = tuple(parameter.name for parameter in PARAMETERS)
TABLE = Path(__file__).with_name("curves.parquet")


class RememberedBatches:
    """A loader that reads a batch once: what it holds is a function of the seed, the step and the rows alone."""

    def __init__(self):
        """Remembers nothing yet."""
        self._known: dict[tuple, list[Batch]] = {}

    def __call__(self, source: IndexedSplit, chunks: Sequence[Chunk], how: Batches) -> Iterator[Batch]:
        """Yields the batches of `local_batches`; who is given them leaves them as they are."""
        rows = [chunk if isinstance(chunk, TrainingChunk) else chunk.rows.tobytes() for chunk in chunks]
        key = (source.split.path, how.decode.seed, type(how.decode.transform), how.batch_size, *rows)
        if key not in self._known:
            self._known[key] = list(local_batches(source, chunks, how))
        return map(dict, self._known[key])


def pretrain(folder: Path, images: int) -> Path:
    """Trains a tiny CLIP whole on summer scenes, in this process, and returns its file."""
    config = build_config(recipe_config("scenes-pretrain"), {"data.path": str(folder / "summer")})
    run = create_run(folder, "pretrain", config)
    run_training(make_task(config), config, run.path, worker=local_worker(config), loader=local_batches)
    return export_checkpoint(run, "open_clip", folder / "backbone.safetensors").path


def prepare(folder: Path) -> RunConfig:
    """Draws scenes and trains the backbone, unless they are there; returns what all trainings share."""
    backbone = folder / "backbone.safetensors"
    if not backbone.is_file():
        convert_scenes(folder / "summer", {"train": 1000, "val": 60}, style="summer", size=64)
        winter = {"train": IMAGES, "val": 100}
        convert_scenes(folder / "winter", winter, style="winter", size=64, settings=WriteSettings(seed=1))
        pretrain(folder, 1000)
    return build_config(recipe_config("harma-scenes"), {
        "data.path": str(folder / "winter"), "model.pretrained": str(backbone), "train.epochs": EPOCHS,
        "train.global_batch_size": 40, "adapter.shared_width": 16, "train.threads": 1,
    })  # fmt: skip


def settings() -> list[dict[str, Any]]:
    """Returns the grid."""
    values = [list(parameter.values(of_grid=True)) for parameter in PARAMETERS]
    return [dict(zip(NAMES, point, strict=True)) for point in itertools.product(*values)]


def train(config: RunConfig, loader: RememberedBatches) -> dict[str, list[float]]:
    """Trains one setting; returns r_mean and the seconds since the start after each epoch."""
    curve: dict[str, list[float]] = {"r_mean": [], "seconds": []}
    started = time.perf_counter()

    def note(metrics: dict[str, float]) -> None:
        curve["r_mean"].append(metrics["r_mean"])
        curve["seconds"].append(round(time.perf_counter() - started, 3))

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as run:
        run_trial(make_task(config), config, Path(run), worker=Worker(), loader=loader, callback=note)
    return curve


def training_order(grid: Sequence[dict[str, Any]], seeds: int) -> list[tuple[int, int]]:
    """Returns seeds and numbers of settings: a seed is done before the next, every second rate before the others."""
    rates = sorted({point[NAMES[0]] for point in grid})
    coarse = [number for number, point in enumerate(grid) if rates.index(point[NAMES[0]]) % 2 == 0]
    fine = [number for number in range(len(grid)) if number not in coarse]
    order = []
    for seed in range(seeds):
        for part in (coarse, fine):
            order += [(seed, number) for number in random.Random(seed).sample(part, len(part))]
    return order


def train_all(folder: Path, seeds: int, offset: int, processes: int) -> None:
    """Trains every `processes`-th of what is missing, and prints how far it is."""
    torch.set_num_threads(1)
    shared, loader, grid = prepare(folder), RememberedBatches(), settings()
    order = training_order(grid, seeds)
    for place, (seed, number) in enumerate(order):
        path = folder / f"curve-{seed}-{number:03d}.json"
        if path.exists() or place % processes != offset:
            continue
        curve = train(build_config(shared, {**grid[number], "seed": seed}), loader)
        write_text(path, json.dumps({**grid[number], "seed": seed, **curve}))
        taken = curve["seconds"][-1]
        print(f"{place + 1}/{len(order)}: {path.stem} {curve['r_mean'][-1]:.2f} {taken:.1f} s", flush=True)


def collect(folder: Path, table: Path) -> None:
    """Writes the table: a row for each epoch."""
    rows = []
    for path in sorted(folder.glob("curve-*.json")):
        known = json.loads(path.read_text())
        values, seconds = known.pop("r_mean"), known.pop("seconds")
        for epoch, (value, spent) in enumerate(zip(values, seconds, strict=True), 1):
            rows.append({**known, "epoch": epoch, "r_mean": value, "seconds": spent})
    types = {**{name: pa.float32() for name in NAMES}, "adapter.width": pa.int16(), "seed": pa.int8()}
    types |= {"optim.learning_rate": pa.float64(), "epoch": pa.int8(), "r_mean": pa.float32(), "seconds": pa.float32()}
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(types.items()))), table, compression="zstd")
    print(f"{table}: {len(rows)} rows, {table.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Makes what is missing, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("curves"), help="of data, backbone and finished curves")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=2, help="of training")
    parser.add_argument("--processes", type=int, default=1, help="0 = none: a table of the curves that are there")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        train_all(options.folder, options.seeds, options.part, options.processes)
        return
    prepare(options.folder)
    command = [sys.executable, __file__, "--folder", str(options.folder), "--seeds", str(options.seeds)]
    command += ["--processes", str(options.processes)]
    parts = [subprocess.Popen([*command, "--part", str(part)]) for part in range(options.processes)]
    failed = [part for part in parts if part.wait()]
    collect(options.folder, options.table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
