"""CLIP4Cir on data that it draws itself; what ``launch.py demo cir`` runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harma_ray.cli.train_run import train_and_print
from harma_ray.data.convert.commands import convert_scenes, convert_scenes_cir
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.files import output_path
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.tasks import map_with_ray
from harma_ray.preflight import prepare
from harma_ray.recipes import recipe_config
from harma_ray.report.comparison import paired_differences
from harma_ray.report.composed import ComposedEvaluation
from harma_ray.resources import Cluster
from harma_ray.runs import Run, create_run, timed_name
from harma_ray.settings import build_config
from harma_ray.shell import command_line
from harma_ray.training.step import evaluate_split, local_worker

SCENES = {"train": 2000, "val": 200}
"""Scenes with captions, by which CLIP is pretrained."""
QUERIES = {"train": 2000, "val": 100, "test": 300}
"""Of each six images, all laid out anew: where layouts are kept, any image encoder finds the scenes that belong to a
query by their pixels, and a Combiner on a CLIP that nobody trained does as well as on one that was."""
STAGES: Mapping[str, Mapping[str, Any]] = {"scenes-cir-finetune": {"train.epochs": 4}, "scenes-cir-combiner": {}}
"""Recipes of both stages, and what is set otherwise."""
TRAINED, UNTRAINED = "trained", "random"
BEST, STAGE_1 = (TRAINED, "combiner"), (TRAINED, "sum")
"""What the demo is about, and what it need not be better than: the model that it is built on."""
Found = dict[tuple[str, str], ComposedEvaluation]
"""By CLIP and kind of query."""
_ROWS = {"image": "image alone", "text": "sentence alone", "sum": "sum", "combiner": "Combiner"}
_STAGES = {STAGE_1: " (stage 1)", BEST: " (stage 2)"}
_METRICS = {"recall_at1": "R@1", "recall_at10": "R@10", "group_recall_at1": "R_subset@1", "r_mean": "r_mean"}


def run_demo_of_queries(out: Path, *, seed: int = 0, num_workers: int = 0) -> None:
    """Draws scenes, pretrains a tiny CLIP, trains both stages and a Combiner on a random CLIP, and prints a table.

    Args:
        out: Folder for data and runs.
        seed: Seed of everything.
        num_workers: Workers of all trainings; 0 = as for `train`.

    Raises:
        UserError: If training brought nothing that the test queries could show.
    """
    out = output_path(out)
    with ray_cluster() as cluster:
        demo = _Demo(out, cluster, {"seed": seed, "scaling.num_workers": num_workers}, time.perf_counter())
        demo.tell("Ray is up; drawing scenes with captions, and scenes that one sentence changes into others")
        scenes, composed = out / "data" / f"scenes-{seed}", out / "data" / f"scenes-cir-{seed}"
        settings = WriteSettings(seed=seed + 1_000_000, map_tasks=map_with_ray)
        convert_scenes(scenes, SCENES, style="summer", size=64, settings=settings)
        settings = WriteSettings(seed=seed, map_tasks=map_with_ray)
        convert_scenes_cir(composed, QUERIES, style="summer", size=64, own_layouts=True, settings=settings)
        demo.tell("pretraining a tiny CLIP whole, from nothing, on scenes with captions")
        pretrained = demo.train("pretrain", "scenes-pretrain", {"data.path": str(scenes)})
        backbone = export_checkpoint(pretrained, "open_clip", out / "clip.safetensors", overwrite=True).path
        data = {"data.path": str(composed)}
        finetune, combiner = STAGES
        demo.tell("stage 1: fine-tuning it so that the sum of image and text features finds the answer")
        first = demo.train("stage1", finetune, {**data, "model.pretrained": str(backbone)})
        demo.tell("stage 2: training a Combiner of the features of that CLIP")
        second = demo.train("stage2", combiner, {**data, **recipe_config(combiner).after(first)})
        demo.tell("for comparison: training the same Combiner on a random CLIP")
        other = demo.train("random", combiner, {**data, "model.pretrained": "random"})
    show({TRAINED: second, UNTRAINED: other})
    print(f"\nruns       {', '.join(str(run.path) for run in (pretrained, first, second, other))}")
    print(f"watch      {command_line('tensorboard', '--logdir', out / 'runs')}")
    print(f"total      {time.perf_counter() - demo.started:.0f} s")


@dataclass(frozen=True)
class _Demo:
    """What its trainings share."""

    out: Path
    cluster: Cluster
    settings: Mapping[str, Any]
    started: float

    def tell(self, what: str) -> None:
        print(f"\n[{time.perf_counter() - self.started:5.0f} s] {what}")

    def train(self, name: str, recipe: str, changes: Mapping[str, Any]) -> Run:
        changes = {**self.settings, **STAGES.get(recipe, {}), **changes}
        run = create_run(self.out / "runs", timed_name(name), build_config(recipe_config(recipe), changes))
        train_and_print(run, prepare(run.config).on(self.cluster), self.cluster, self.started)
        return run


def show(runs: Mapping[str, Run]) -> None:
    """Prints what Combiners find on test, beside what their CLIPs find without, with intervals.

    Args:
        runs: Runs of the second stage on the `TRAINED` and the `UNTRAINED` CLIP.

    Raises:
        UserError: If the test queries do not tell the Combiner on the trained CLIP from what should be worse.
    """
    found: Found = {}
    for clip, run in runs.items():
        worker, model = local_worker(run.config), run.load_model()
        own = evaluate_split(run.task, run.config, model, "test", worker=worker, loader=local_batches)
        for query, evaluation in own.by_query.items():
            assert isinstance(evaluation, ComposedEvaluation)
            found[clip, query] = evaluation
    best = found[BEST]
    chance, queries = best.chance(), best.retrieval.queries
    rows = [["", "chance", *(f"{chance[name]:.1f}" for name in _METRICS)]]
    rows += [[*_name(key), *_cells(found[key])] for key in _ordered(found)]
    print(f"\ntest: {len(queries.captions):,} queries in {len(queries.names):,} images, in percent (95 % interval)")
    print(tabulate(rows, headers=["CLIP", "query", *_METRICS.values()], disable_numparse=True))
    require_apart(found)


def _cells(evaluation: ComposedEvaluation) -> list[str]:
    figures, bounds = evaluation.metrics, evaluation.intervals()
    return [f"{figures[name]:.1f} ({bounds[name][0]:.1f}-{bounds[name][1]:.1f})" for name in _METRICS]


def require_apart(found: Found) -> None:
    """Prints how far the best row is above the others, and checks it.

    Args:
        found: All rows.

    Raises:
        UserError: If its interval overlaps that of the Combiner on the untrained CLIP, or it is not above any other row
            but its own stage 1, over the same queries.
    """
    best, other = found[BEST], found[UNTRAINED, BEST[1]]
    rows, level = [], []
    for key in _ordered(found):
        gain, bounds = paired_differences(found[key], best)["r_mean"]
        low, high = bounds or (gain, gain)
        if key != BEST:
            rows.append([*_name(key), f"{gain:.1f}", f"{low:.1f} to {high:.1f}"])
        if key not in (BEST, STAGE_1) and low <= 0:
            level.append(" ".join(_name(key)))
    print("\nr_mean of the Combiner on the trained CLIP above that of others, in points (95 %, query by query)")
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    low, high = best.intervals()["r_mean"][0], other.intervals()["r_mean"][1]
    if low <= high:
        raise UserError(
            f"the intervals of both Combiners' r_mean should not overlap, but that on the trained CLIP begins at "
            f"{low:.1f} and that on the random one ends at {high:.1f}; something is wrong here"
        )
    if level:
        raise UserError(
            f"the Combiner on the trained CLIP is not told from {', '.join(level)}; something is wrong here"
        )


def _name(key: tuple[str, str]) -> tuple[str, str]:
    return key[0], _ROWS[key[1]] + _STAGES.get(key, "")


def _ordered(found: Found) -> list[tuple[str, str]]:
    return [(clip, query) for clip in (UNTRAINED, TRAINED) for query in _ROWS if (clip, query) in found]
