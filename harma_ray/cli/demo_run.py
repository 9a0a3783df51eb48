"""The whole job on data that it draws itself; what ``make demo`` runs."""

import time
from pathlib import Path

from tabulate import tabulate

from harma_ray.cli.train_run import train_and_print
from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.splits import open_split
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.files import output_path
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.tasks import map_with_ray
from harma_ray.preflight import prepare
from harma_ray.recipes import recipe_config
from harma_ray.runs import create_run, timed_name
from harma_ray.settings import build_config
from harma_ray.shell import command_line
from harma_ray.training.step import evaluate_split, local_worker

SOURCE_STYLE, TARGET_STYLE = "summer", "winter"
SOURCE_COUNTS = {"train": 2000, "val": 200}
TARGET_COUNTS = {"train": 1000, "val": 200, "test": 400}
LEAST_GAIN, LEAST_TIMES_CHANCE = 15, 10
"""What the demo must show, in points of r_mean over step 0 and in times of chance."""
_METRICS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


def run_demo(out: Path, *, seed: int = 0, num_workers: int = 0) -> None:
    """Draws two data sets, trains a tiny CLIP whole on one, adapts it to the other with HarMA, and prints a table.

    Args:
        out: Folder for data, runs and picture.
        seed: Seed of everything.
        num_workers: Workers of both trainings; 0 = as for `train`.
    """
    out = output_path(out)
    started = time.perf_counter()
    with ray_cluster() as cluster:
        print(f"[{time.perf_counter() - started:5.0f} s] Ray is up; drawing scenes in two styles")
        folders = {}
        for style, counts in ((SOURCE_STYLE, SOURCE_COUNTS), (TARGET_STYLE, TARGET_COUNTS)):
            folders[style] = out / "data" / f"scenes-{style}-{seed}"
            settings = WriteSettings(seed=seed if style == SOURCE_STYLE else seed + 1_000_000, map_tasks=map_with_ray)
            convert_scenes(folders[style], counts, style=style, size=64, settings=settings)
        print(f"[{time.perf_counter() - started:5.0f} s] training a tiny CLIP whole, from nothing, on {SOURCE_STYLE}")
        scaling = {"seed": seed, "scaling.num_workers": num_workers}
        changes = {**scaling, "data.path": str(folders[SOURCE_STYLE])}
        whole = build_config(recipe_config("scenes-pretrain"), changes)
        source = create_run(out / "runs", timed_name("pretrain"), whole)
        train_and_print(source, prepare(source.config).on(cluster), cluster, started)
        backbone = export_checkpoint(source, "open_clip", out / "backbone.safetensors", overwrite=True).path
        print(f"\n[{time.perf_counter() - started:5.0f} s] adapting the frozen CLIP to {TARGET_STYLE} with HarMA")
        changes = {**scaling, "data.path": str(folders[TARGET_STYLE]), "model.pretrained": str(backbone)}
        adapted = create_run(out / "runs", timed_name("harma"), build_config(recipe_config("harma-scenes"), changes))
        train_and_print(adapted, prepare(adapted.config).on(cluster), cluster, started)
    _show(adapted, out, started)


def _show(adapted, out: Path, started: float) -> None:
    config, task = adapted.config, adapted.task
    worker, before_training = local_worker(config), task.baseline_model()
    rows, results = [], {}
    for split in ("val", "test"):
        before = evaluate_split(task, config, before_training, split, worker=worker, loader=local_batches)
        chance = before.chance()
        after = adapted.report["metrics"][split]
        results = {"chance": chance, "step 0": before.metrics, "adapted": after}
        rows += [[split, kind, *(metrics[name] for name in _METRICS)] for kind, metrics in results.items()]
    evaluation = evaluate_split(task, config, adapted.load_model(), "test", worker=worker, loader=local_batches)
    picture = out / "retrievals.png"
    sheet = evaluation.picture(open_split(config.data.path, "test"))
    assert sheet is not None
    sheet.save(picture)
    headers = ["split", "", "I2T R@1", "R@5", "R@10", "T2I R@1", "R@5", "R@10", "r_mean"]
    print(f"\nHarMA on drawn scenes: {SOURCE_STYLE} to {TARGET_STYLE}, recalls in percent")
    print(tabulate(rows, headers=headers, floatfmt=".1f"))
    print(f"\nrun        {adapted.path}")
    print(f"picture    {picture}")
    print(f"watch      {command_line('tensorboard', '--logdir', adapted.path.parent)}")
    print(f"total      {time.perf_counter() - started:.0f} s")
    chance, before, after = (results[kind]["r_mean"] for kind in ("chance", "step 0", "adapted"))
    if after < before + LEAST_GAIN or after < LEAST_TIMES_CHANCE * chance:
        raise UserError(
            f"the adapted r_mean on test should be {LEAST_GAIN} points above step 0 and {LEAST_TIMES_CHANCE} times "
            f"chance, got {after:.1f}, {before:.1f} and {chance:.1f}; something is wrong here"
        )
