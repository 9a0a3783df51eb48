"""Epochs per second of a Combiner's training: features computed once against encoding images and texts every epoch.

Run: python benchmarks/features.py [--triplets 512] [--architecture scenes-tiny] [--epochs 2] [--size 64]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from harma_ray.data.convert.commands import convert_scenes_cir
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, prefetched_batches
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.optim import build_optimizer
from harma_ray.training.step import autocast_of, local_worker, train_step
from harma_ray.vectors.features import with_features


def seconds_of_epochs(config, worker: Worker, epochs: int) -> float:
    """Returns the seconds of some epochs, reading and steps, without evaluation; one step before is left out."""
    task, device = make_task(config), torch.device(worker.device)
    model = task.new_model().to(device).train()
    optimizer = build_optimizer(task.parameter_groups(model, config.optim), config.optim, device)
    order = planned_order(config)
    stream = TrainingStream(order, task.transform(training=True), config.data, worker, prefetched_batches)
    begin = 0.0
    for number, batch in enumerate(stream.steps(order.steps_per_epoch - 1, epochs + 1)):
        train_step(task, model, [batch], config.train, autocast_of(config.train, device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = begin if number else time.perf_counter()
    return time.perf_counter() - begin


def main() -> None:
    """Measures both ways in turns and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triplets", type=int, default=512)
    parser.add_argument("--architecture", default="scenes-tiny")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ray_cluster() as cluster:
        folder = Path(name)
        convert_scenes_cir(folder / "data", {"train": options.triplets, "val": 1}, style="summer", size=options.size)
        changes = {
            "data.path": str(folder / "data"),
            "model.architecture": options.architecture,
            "model.pretrained": "random",
            "train.global_batch_size": min(128, options.triplets),
        }
        anew = build_config(recipe_config("scenes-cir-combiner"), changes)
        begin = time.perf_counter()
        once = with_features(anew, folder, cluster)
        print(
            f"features of {options.triplets} triplets once, with a process's start: {time.perf_counter() - begin:.1f} s"
        )
        worker = local_worker(anew)
        seconds = {"anew": 0.0, "once": 0.0}
        for _ in range(2):  # in turns: the machine may be slower at one time than at another
            for kind, config in (("anew", anew), ("once", once)):
                seconds[kind] += seconds_of_epochs(config, worker, options.epochs)
    rates = {kind: 2 * options.epochs / value for kind, value in seconds.items()}
    print(f"epochs/s   encoding every epoch {rates['anew']:.3f}, features computed once {rates['once']:.3f}")
    print(f"ratio      {rates['once'] / rates['anew']:.1f}")


if __name__ == "__main__":
    main()
