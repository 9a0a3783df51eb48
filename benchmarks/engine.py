"""Steps per second of the whole loop inside Ray Train against a bare loop over batches in memory; trim against full.

Run: python benchmarks/engine.py [--steps 24] [--batch 16] [--architecture ViT-B-32]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import train
from harma_ray.preflight import prepare
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import create_run
from harma_ray.settings import build_config
from harma_ray.training.optim import build_optimizer
from harma_ray.training.step import autocast_of, local_worker, train_step
from harma_ray.training.tracking import read_records


def bare_loop(config, steps: int) -> list[float]:
    """Returns the seconds of each step after the first."""
    worker = local_worker(config)
    task, device = make_task(config), torch.device(worker.device)
    model = task.new_model().to(device).train()
    optimizer = build_optimizer(task.parameter_groups(model, config.optim), config.optim, device)
    stream = TrainingStream(
        planned_order(config), task.transform(training=True), config.data, Worker(device=worker.device), local_batches
    ).steps(0, 1)
    batches = [next(stream) for _ in range(steps)]
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        train_step(task, model, [batch], config.train, autocast_of(config.train, device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def inside_ray(config, cluster, folder: Path, name: str) -> list[float]:
    """Returns the seconds of each step after the first, waiting for data included, from the run's own record."""
    run = create_run(folder, name, config)
    train(run, prepare(config).on(cluster), cluster, on_record=lambda record: None)
    steps = [record for record in read_records(run.path) if record["kind"] == "step"][1:]
    return [config.train.global_batch_size / record["pairs_per_second"] for record in steps]


def main() -> None:
    """Measures and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--architecture", default="ViT-B-32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ray_cluster() as cluster:
        folder = Path(name)
        images = -(-options.steps * options.batch // 5)
        convert_scenes(folder / "data", {"train": images, "val": 2}, style="summer", size=224)
        changes = {
            "data.path": str(folder / "data"),
            "model.architecture": options.architecture,
            "model.pretrained": "random",
            "train.epochs": 1,
            "train.global_batch_size": options.batch,
            "train.log_every_steps": 1,
            "scaling.num_workers": 1,
        }
        config = build_config(recipe_config("harma-rsitmd-vit"), changes)
        trimmed = build_config(config, {"model.text_tokens": "trim"})
        bare, trim, ray_steps = [], [], []
        for turn in range(2):  # in turns: the machine may be slower at one time than at another
            bare += bare_loop(config, options.steps)
            trim += bare_loop(trimmed, options.steps)
            ray_steps += inside_ray(config, cluster, folder / "runs", f"turn{turn}")
    full, cut, ray_seconds = statistics.median(bare), statistics.median(trim), statistics.median(ray_steps)
    print(f"bare loop           {1 / full:.3f} steps/s of {options.batch} pairs, {options.architecture}; medians")
    print(f"inside Ray Train    {1 / ray_seconds:.3f} steps/s")
    print(f"ratio               {full / ray_seconds:.2f}")
    print(f"trim against full   {full / cut:.2f} (pairs/s)")


if __name__ == "__main__":
    main()
