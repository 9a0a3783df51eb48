"""Captions grouped by image against one encoding of an image for each caption: speed, and what is learned.

Without options the step is timed, forward, backward and optimiser, on batches in memory of as many pairs: ViT-B/32 with
adapters and random weights, drawn scenes of 224 px with captions of 14 tokens on average; by seconds, and by CPU
seconds, which other programs disturb less. With ``--train`` a tiny CLIP is trained with as many pairs, then for as
long: adapters on drawn scenes of a style that it has not seen, or with ``--data`` the whole of it from nothing on a
converted data set. Nothing is read ahead there, so seconds are those of one process that decodes, too.

Run: python benchmarks/grouped.py [--batch 30] [--rounds 5] [--threads 1]
     python benchmarks/grouped.py --train [--data FOLDER] [--epochs 4] [--seeds 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from harma_ray.config import RunConfig
from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import create_run, open_run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training
from harma_ray.training.optim import build_optimizer
from harma_ray.training.step import autocast_of, local_worker, train_step
from harma_ray.training.tracking import read_records


def grouping(group: int) -> dict[str, Any]:
    """Returns the settings of `group` captions an image; 1: pairs, as published."""
    return {"train.captions": "grouped", "train.captions_per_image": group} if group > 1 else {}


def steps(config: RunConfig, num_batches: int) -> Iterator[tuple[float, float]]:
    """Takes a step each time that it is asked to, and yields its seconds and CPU seconds."""
    worker = local_worker(config)
    task, device = make_task(config), torch.device(worker.device)
    model = task.new_model().to(device).train()
    optimizer = build_optimizer(task.parameter_groups(model, config.optim), config.optim, device)
    rows, here = task.transform(training=True), Worker(device=worker.device)
    stream = TrainingStream(planned_order(config), rows, config.data, here, local_batches).steps(0, 1)
    batches = [next(stream) for _ in range(num_batches)]
    while True:
        for batch in batches:
            begin, cpu = time.perf_counter(), time.process_time()
            train_step(task, model, [batch], config.train, autocast_of(config.train, device))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter() - begin, time.process_time() - cpu


def measure_steps(folder: Path, options: argparse.Namespace) -> None:
    """Times steps of one, two and five captions an image in turns, and prints pairs/s."""
    convert_scenes(folder / "data", {"train": 2 * options.batch, "val": 2}, style="summer", size=224)
    rows = []
    for tokens in options.tokens:
        changes = {
            "data.path": str(folder / "data"), "model.pretrained": "random", "model.text_tokens": tokens,
            "train.global_batch_size": options.batch, "train.threads": options.threads,
        }  # fmt: skip
        base = build_config(recipe_config("harma-rsitmd-vit"), changes)
        timed = {group: steps(build_config(base, grouping(group)), 2) for group in (1, 2, 5)}
        taken: dict[int, list[tuple[float, float]]] = {group: [] for group in timed}
        for number in range(options.rounds + 1):  # in turns: the machine may be slower at one time than at another
            for group, step in timed.items():
                took = next(step)
                taken[group] += [took] if number else []  # the first step fills caches
        for group, took in taken.items():
            wall, cpu = (
                [one[kind] / other[kind] for one, other in zip(taken[1], took, strict=True)] for kind in (0, 1)
            )
            rates = [options.batch / second for second, _ in took]
            rows.append([tokens, group, *spread(rates, ".2f"), *spread(wall, ".2f"), *spread(cpu, ".2f")])
    headers = ["tokens", "captions an image", "pairs/s", "", "times pairs, seconds", "", "CPU seconds", ""]
    threads = torch.get_num_threads()
    print(f"batches of {options.batch} pairs, {options.rounds} rounds, {threads} threads; medians, least and most")
    print(tabulate(rows, headers=headers, disable_numparse=True))


def spread(values: Sequence[float], form: str) -> tuple[str, str]:
    """Returns the median, and the smallest and the largest value."""
    return f"{statistics.median(values):{form}}", f"{min(values):{form}}-{max(values):{form}}"


def train(folder: Path, name: str, config: RunConfig) -> tuple[Mapping[str, float], float, float]:
    """Trains a run in this process; returns test figures of the best epoch, epochs, and seconds of its steps."""
    run = create_run(folder, name, config)
    report = run_training(make_task(config), config, run.path, worker=local_worker(config), loader=local_batches)
    last = [record for record in read_records(run.path) if record["kind"] == "step"][-1]
    return report["metrics"]["test"], last["epoch"], report["training_seconds"]


def drawn(folder: Path, options: argparse.Namespace) -> RunConfig:
    """Draws scenes, trains the backbone on one style of them, and returns the settings for another one."""
    convert_scenes(folder / "summer", {"train": 1000, "val": 60}, style="summer", size=64)
    counts = {"train": options.images, "val": 100, "test": 200}
    convert_scenes(folder / "winter", counts, style="winter", size=64, settings=WriteSettings(seed=1))
    config = build_config(recipe_config("scenes-pretrain"), {"data.path": str(folder / "summer")})
    train_only(folder, config)
    backbone = export_checkpoint(open_run(folder / "backbone"), "open_clip", folder / "backbone.safetensors").path
    return build_config(
        recipe_config("harma-scenes"), {"data.path": str(folder / "winter"), "model.pretrained": str(backbone)}
    )


def train_only(folder: Path, config: RunConfig) -> None:
    """Trains the backbone."""
    run = create_run(folder, "backbone", config)
    run_training(make_task(config), config, run.path, worker=local_worker(config), loader=local_batches)


def measure_learning(folder: Path, options: argparse.Namespace) -> None:
    """Trains with pairs and with groups of five, as many pairs and as long, and prints test figures."""
    if options.data:
        base = build_config(recipe_config("scenes-pretrain"), {"data.path": str(Path(options.data).absolute())})
    else:
        base = drawn(folder, options)
    base = build_config(base, {
        "train.global_batch_size": options.batch, "train.epochs": options.epochs, "train.log_every_steps": 1,
        "train.threads": options.threads, "optim.learning_rate": options.learning_rate or base.optim.learning_rate,
    })  # fmt: skip
    found: dict[str, list[tuple[Mapping[str, float], float, float]]] = {}
    for seed in range(options.seeds):
        seeded = build_config(base, {"seed": seed})
        grouped = build_config(seeded, grouping(5))

        def arm(name: str, config: RunConfig, seed: int = seed) -> float:
            result = train(folder / "runs", f"{name}-{seed}".replace(" ", "-"), config)
            found.setdefault(name, []).append(result)
            metrics, epochs, seconds = result
            print(f"seed {seed}, {name}: {epochs:g} epochs, {seconds:.0f} s, r_mean {metrics['r_mean']:.2f}, "
                  f"r_mean_text {metrics['r_mean_text']:.2f}", flush=True)  # fmt: skip
            return seconds

        pairs, fewer = arm("pairs", seeded), arm("grouped, equal pairs", grouped)
        epochs = max(options.epochs, round(options.epochs * pairs / fewer))
        arm("grouped, equal time", build_config(grouped, {"train.epochs": epochs}))
    rows = []
    for name, results in found.items():
        means = [[metrics[key] for metrics, _, _ in results] for key in ("r_mean", "r_mean_text")]
        figures = [f"{statistics.mean(v):.2f} +- {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in means]
        epochs, seconds = [taken for _, taken, _ in results], [taken for _, _, taken in results]
        rows.append([name, *spread(epochs, "g"), *spread(seconds, ".0f"), *figures])
    headers = ["captions", "epochs", "", "seconds of steps", "", "test r_mean", "test r_mean_text"]
    print(f"\n{base.recipe}, batches of {options.batch} pairs, {options.seeds} seeds: mean and standard deviation")
    print(tabulate(rows, headers=headers, disable_numparse=True))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="pairs in a step; 30, or 60 with --train")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = as many as cores")
    parser.add_argument("--tokens", nargs="+", choices=("trim", "full"), default=["trim", "full"])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--data", help="a converted data set, in place of drawn scenes")
    parser.add_argument("--images", type=int, default=300, help="drawn images to train on")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the captions")
    parser.add_argument("--learning-rate", type=float, help="another than the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.batch = options.batch or (60 if options.train else 30)
    with tempfile.TemporaryDirectory() as name:
        (measure_learning if options.train else measure_steps)(Path(name), options)


if __name__ == "__main__":
    main()
