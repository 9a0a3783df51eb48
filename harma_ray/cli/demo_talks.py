"""ViTP on data that it draws itself; what ``launch.py demo vitp`` runs."""

import time
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from harma_ray.cli.train_run import train_and_print
from harma_ray.data.convert.commands import convert_scenes, convert_scenes_talk
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.scenes.talks import QUESTION_KINDS
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.files import output_path
from harma_ray.models.internvl.configs import require_transformers
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.tasks import map_with_ray
from harma_ray.preflight import prepare
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run, create_run, timed_name
from harma_ray.settings import build_config
from harma_ray.shell import command_line
from harma_ray.training.step import evaluate_split, local_worker

SCENES_TOLD = {"train": 20_000, "val": 240, "test": 600}
SCENES_BY_CLASS = {"summer": {"train": 1000}, "winter": {"val": 400, "test": 500}}
"""The gallery in one season and the queries in another: colours alone find nothing. Talks are about both."""
LEAST_GAIN = 10
"""Points that pretraining must bring: of Top-1 over the untrained transformer, of right answers over the commonest."""
_FEATURES = {"top_1": "Top-1", "top_3": "Top-3", "top_5": "Top-5", "map": "mAP"}
_VARIANTS = {"pretrained": {}, "without token drop": {"token_drop.preset": "none"}}


def run_demo_of_talks(out: Path, *, seed: int = 0, num_workers: int = 0) -> None:
    """Draws talks and classes, pretrains a tiny transformer with and without token drop, and prints a table.

    Args:
        out: Folder for data and runs.
        seed: Seed of everything.
        num_workers: Workers of both trainings; 0 = as for `train`.

    Raises:
        UserError: If what the model is built with is not installed, or pretraining brought too little.
    """
    require_transformers()
    out = output_path(out)
    started = time.perf_counter()
    runs: dict[str, Run] = {}
    with ray_cluster() as cluster:
        print(f"[{time.perf_counter() - started:5.0f} s] Ray is up; drawing talks about scenes, and scenes by class")
        talks, scenes = out / "data" / f"talks-{seed}", out / "data" / f"classes-{seed}"
        settings = WriteSettings(seed=seed, map_tasks=map_with_ray)
        convert_scenes_talk(talks, SCENES_TOLD, style=",".join(SCENES_BY_CLASS), size=64, settings=settings)
        settings = WriteSettings(seed=seed + 1_000_000, map_tasks=map_with_ray)
        for style, counts in SCENES_BY_CLASS.items():
            convert_scenes(scenes, counts, style=style, size=64, settings=settings)
        changes = {"seed": seed, "scaling.num_workers": num_workers, "data.path": str(talks)}
        for name, own in _VARIANTS.items():
            print(f"\n[{time.perf_counter() - started:5.0f} s] pretraining a tiny vision transformer: {name}")
            config = build_config(recipe_config("scenes-vitp"), {**changes, "features.data": str(scenes), **own})
            runs[name] = create_run(out / "runs", timed_name("vitp"), config)
            train_and_print(runs[name], prepare(config).on(cluster), cluster, started)
    _show(runs, started)


def _show(runs: Mapping[str, Run], started: float) -> None:
    """Prints what the untrained transformer and the runs find on test."""
    first = next(iter(runs.values()))
    worker, models = local_worker(first.config), {"untrained": (first, first.task.new_model())}
    models |= {name: (run, run.load_model()) for name, run in runs.items()}
    found: dict[str, Evaluation] = {
        name: evaluate_split(run.task, run.config, model, "test", worker=worker, loader=local_batches)
        for name, (run, model) in models.items()
    }
    pretrained, untrained = found["pretrained"], found["untrained"]
    baselines = pretrained.chance()
    rows = [[name, *(evaluation.metrics[key] for key in _FEATURES)] for name, evaluation in found.items()]
    print("\nsummer scenes of the same class found by winter scenes, in percent (test)")
    print(tabulate([["chance", *map(baselines.get, _FEATURES)], *rows], ["", *_FEATURES.values()], floatfmt=".1f"))
    keys = ["answers", *(f"answers_{kind}" for kind in QUESTION_KINDS)]
    rows = [[name, *(evaluation.metrics[key] for key in keys)] for name, evaluation in found.items()]
    print("\nanswers that are right, by kind of question, in percent (test)")
    print(
        tabulate(
            [["the commonest answer", *map(baselines.get, keys)], *rows], ["", "all", *QUESTION_KINDS], floatfmt=".1f"
        )
    )
    print(f"\nruns       {', '.join(str(run.path) for run in runs.values())}")
    print(f"watch      {command_line('tensorboard', '--logdir', first.path.parent)}")
    print(f"total      {time.perf_counter() - started:.0f} s")
    gains = {
        "Top-1 over the untrained transformer": pretrained.metrics["top_1"] - untrained.metrics["top_1"],
        "right answers over the commonest": pretrained.metrics["answers"] - baselines["answers"],
    }
    low = [f"{gain:.1f} points of {what}" for what, gain in gains.items() if gain < LEAST_GAIN]
    if low:
        raise UserError(f"pretraining should bring {LEAST_GAIN} points, got {', '.join(low)}; something is wrong here")
