"""Epochs that a search needs to reach the best of a full grid, against random search; real trainings on drawn scenes.

The grid trains every setting to its end. Random search does so too, with random settings; the search is what
`launch.py tune` does by default: multivariate TPE and ASHA. All three see the same data, backbone and seed of training.

Run: python benchmarks/search.py [--seeds 3] [--images 80] [--budget 0.25]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tabulate import tabulate

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.stream import local_batches
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import plan_trials
from harma_ray.runs import create_run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training
from harma_ray.training.step import local_worker
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range

EPOCHS = 3
PARAMETERS = (
    Range(name="optim.learning_rate", kind="float", low=5e-4, high=2e-2, log=True, points=4),
    Range(name="loss.margin", kind="float", low=0.05, high=0.5, points=3),
    Range(name="loss.gamma", kind="float", low=0, high=5, points=3),
    Range(name="adapter.width", kind="int", low=16, high=128, step=16),
)
GRID = (*PARAMETERS[:3], Range(name="adapter.width", kind="int", low=16, high=128, step=112))


@dataclass
class Trace:
    """The best value after every report, by epochs trained in all trials together."""

    trained: dict[int, float] = field(default_factory=dict)
    best: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, event) -> None:
        """Hears of an event of the search."""
        if event.report and event.report.values:
            self.trained[event.number] = event.report.trained
            value = max(event.report.value, self.best[-1][1] if self.best else 0.0)
            self.best.append((sum(self.trained.values()), value))

    def at(self, epochs: float) -> float:
        """Returns the best value after so many epochs."""
        return max((value for spent, value in self.best if spent <= epochs), default=0.0)

    def reaches(self, value: float) -> float | None:
        """Returns the epochs after which a value is reached."""
        return next((spent for spent, best in self.best if best >= value), None)


def pretrain(folder: Path, images: int) -> Path:
    """Trains a tiny CLIP whole on summer scenes, in this process, and returns its file."""
    config = build_config(recipe_config("scenes-pretrain"), {"data.path": str(folder / "summer")})
    run = create_run(folder, "pretrain", config)
    worker = local_worker(config)
    run_training(make_task(config), config, run.path, worker=worker, loader=local_batches)
    return export_checkpoint(run, "open_clip", folder / "backbone.safetensors").path


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--budget", type=float, default=0.25, help="epochs of a search, in parts of the grid's")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, ray_cluster() as cluster:
        from harma_ray.tune.search import prepare_trials, run_search

        folder = Path(name)
        convert_scenes(folder / "summer", {"train": 1000, "val": 60}, style="summer", size=64)
        convert_scenes(
            folder / "winter",
            {"train": options.images, "val": 100},
            style="winter",
            size=64,
            settings=WriteSettings(seed=1),
        )
        backbone = pretrain(folder, 1000)
        config = build_config(recipe_config("harma-scenes"), {
            "data.path": str(folder / "winter"), "model.pretrained": str(backbone), "train.epochs": EPOCHS,
            "train.global_batch_size": 40, "adapter.shared_width": 16,
        })  # fmt: skip
        plan = plan_trials(config, cluster)
        grid = SearchDefinition(
            config=config, parameters=GRID, sampler=Sampler(name="grid"), scheduler=Scheduler(name="none")
        )
        setting = prepare_trials(grid, plan)

        def measure(title: str, definition: SearchDefinition) -> Trace:
            trace, begin = Trace(), time.perf_counter()
            (folder / title).mkdir()
            run_search(folder / title, definition, plan, setting, trace)
            spent, best = trace.best[-1]
            print(
                f"[{time.perf_counter() - started:5.0f} s] {title}: {len(trace.trained)} trials, {spent:g} epochs, "
                f"best r_mean {best:.2f}, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            return trace

        published = replace(grid, parameters=PARAMETERS, limits=Limits(trials=1), sampler=Sampler(name="random"))
        base = measure("published", published).best[-1][1]
        whole = measure("grid", grid)
        total, target = whole.best[-1]
        budget = Limits(epochs=int(options.budget * total))
        rows = []
        methods = {
            "random search": {"sampler": "random", "scheduler": Scheduler(name="none")},
            "search": {"sampler": "tpe-multivariate", "scheduler": Scheduler(name="asha", reduction_factor=3)},
        }
        for method, parts in methods.items():
            traces = []
            for seed in range(options.seeds):
                definition = replace(
                    grid,
                    parameters=PARAMETERS,
                    limits=budget,
                    scheduler=parts["scheduler"],
                    sampler=Sampler(name=parts["sampler"], seed=seed + 1),
                )
                traces.append(measure(f"{method} {seed}", definition))
            reached = [trace.reaches(target) for trace in traces]
            shares = [float("inf") if spent is None else spent / total for spent in reached]
            bests = [trace.at(total / 4) for trace in traces]
            rows.append([
                method, statistics.mean(bests), min(bests), max(bests),
                statistics.median(shares), ", ".join("not" if s == float("inf") else f"{s:.2f}" for s in shares),
            ])  # fmt: skip
    print(f"\npublished setting {base:.2f}; grid of {grid.size} settings, {total:g} epochs: {target:.2f}")
    print(
        tabulate(
            rows,
            floatfmt=".2f",
            headers=["", "best at a quarter", "lowest", "highest", "share of the grid's epochs to its best", "by seed"],
        )
    )


if __name__ == "__main__":
    main()
