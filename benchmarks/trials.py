"""Start-up of trials, time between them, and memory of several at a time against as many times one (Linux).

Trials of one worker train a ViT-B/32 with adapters on random weights for a few steps; see benchmarks/memory.py for what
is counted as memory.

Run: python benchmarks/trials.py [--concurrent 4] [--architecture ViT-B-32]
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from memory import MIB, Watch

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes import recipe_config
from harma_ray.resources import plan_trials
from harma_ray.settings import build_config
from harma_ray.training.tracking import read_records
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.study import trial_folder

RATE = Range(name="optim.learning_rate", kind="float", low=1e-5, high=1e-3, log=True)


def timed_trial(assignment, setting, report) -> None:
    """Runs a trial and notes when and in which process it begins and ends."""
    from harma_ray.tune.trial import run

    begin = time.time()
    run(assignment, setting, report)
    note = {"begin": begin, "end": time.time(), "process": os.getpid()}
    Path(assignment["runs"][0]["folder"], "times.json").write_text(json.dumps(note))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--architecture", default="ViT-B-32")
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        with ray_cluster() as cluster:
            print(f"Ray                       {time.perf_counter() - begin:6.1f} s to start, without its dashboard")
            from harma_ray.tune.search import prepare_trials, run_search

            convert_scenes(folder / "data", {"train": 7, "val": 4}, style="summer", size=224)
            for concurrent in (1, options.concurrent):
                changes = {
                    "data.path": str(folder / "data"),
                    "model.architecture": options.architecture,
                    "model.pretrained": "random",
                    "train.epochs": 1,
                    "train.global_batch_size": 16,
                    "scaling.cpus_per_worker": cluster.cpus / options.concurrent,
                }
                definition = SearchDefinition(
                    config=build_config(recipe_config("harma-rsitmd-vit"), changes),
                    parameters=(RATE,),
                    sampler=Sampler(name="random"),
                    scheduler=Scheduler(name="none"),
                    limits=Limits(trials=max(3, concurrent)),
                    concurrent=concurrent,
                )
                plan = plan_trials(definition.config, cluster, concurrent)
                begin = time.perf_counter()
                setting = prepare_trials(definition, plan)
                shared = time.perf_counter() - begin
                own = folder / f"at-{concurrent}"
                own.mkdir()
                called = time.time()
                with Watch() as watch:
                    run_search(own, definition, plan, setting, lambda event: None, trial=timed_trial)
                peaks[concurrent] = watch.peaks["trials"][0] / MIB
                if concurrent == 1:
                    _print_times(own, called, shared)
    several, one = peaks[options.concurrent], peaks[1]
    print(
        f"memory of trials          {one:6.0f} MiB with one, {several:.0f} MiB with {options.concurrent} at a time: "
        f"{several / (options.concurrent * one):.2f} of {options.concurrent} times one"
    )


def _print_times(folder: Path, called: float, shared: float) -> None:
    notes = [json.loads((trial_folder(folder, number) / "times.json").read_text()) for number in range(3)]
    builds = [
        next(record["seconds"] for record in read_records(trial_folder(folder, number)) if record["kind"] == "start")
        for number in range(3)
    ]
    gaps = [after["begin"] - before["end"] for before, after in itertools.pairwise(notes)]
    same = len({note["process"] for note in notes}) == 1
    print(f"backbone                  {shared:6.1f} s to build and share, once a search")
    print(f"first trial begins        {notes[0]['begin'] - called:6.1f} s after the search: a process, imports")
    print(f"model of the first trial  {builds[0]:6.2f} s, of later ones {statistics.mean(builds[1:]):.2f} s")
    print(f"between two trials        {statistics.mean(gaps):6.2f} s, {'one process' if same else 'several processes'}")


if __name__ == "__main__":
    main()
