"""Trainings, as they are printed: what is about to happen, how it goes, where things are."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.cli.early_checks import check_same_data
from harma_ray.cli.header import header_lines, start_line
from harma_ray.cli.seeds_run import advice_lines, begun_runs, print_seeds
from harma_ray.config import RunConfig
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError, WorkerFailed, count
from harma_ray.evaluation import FIGURES, Metrics
from harma_ray.files import output_path, write_text
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import train
from harma_ray.preflight import Prepared, prepare, require_start
from harma_ray.report.evaluation import results_table
from harma_ray.resources import Cluster, WorkerPlan
from harma_ray.runs import CONFIG_NAME, Run, absolute_paths, create_run, new_folder, open_run, timed_name
from harma_ray.settings import build_config, to_yaml
from harma_ray.shell import command_line, launch_command
from harma_ray.training.health import KIND, Finding, standing_findings
from harma_ray.training.step import check_batch, local_worker, parameters_without_gradient
from harma_ray.training.tracking import read_records
from harma_ray.vectors.features import with_features


def train_seeds(
    config: RunConfig, seeds: Sequence[int], *, runs: str | Path, name: str | None, address: str | None, started: float
) -> None:
    """Trains a run for every seed and prints each, then mean and standard deviation.

    Args:
        config: Settings; the seed is replaced.
        seeds: One run each.
        runs: Folder of all runs.
        name: Name of the run; with several seeds, of their common part; None makes one of recipe and time.
        address: Cluster to join.
        started: When the command started (``time.perf_counter``), for the times that are printed.
    """
    output_path(runs)
    own_name = name or timed_name(config.recipe)
    names = {seed: f"{own_name}-seed{seed}" if len(seeds) > 1 else own_name for seed in seeds}
    configs = {names[seed]: absolute_paths(dataclasses.replace(config, seed=seed)) for seed in seeds}
    begun = begun_runs(runs, configs) if name and len(seeds) > 1 else {}
    for run in begun.values():
        print(f"run {run.path} is {'finished, and taken as it is' if run.report else 'begun, and goes on'}")
    done = {own: run for own, run in begun.items() if run.report}
    trainings = {own: prepare(seeded) for own, seeded in configs.items() if own not in done}
    for own in trainings.keys() - begun.keys():
        new_folder(runs, own, "run")
        require_start(configs[own])
    if trainings:
        print_notices(next(iter(trainings.values())).notices)
        print(f"[{time.perf_counter() - started:6.1f} s] settings and data are checked; starting Ray", flush=True)
        with ray_cluster(address) as cluster:
            dashboard = f", {cluster.dashboard}" if cluster.dashboard else ""
            print(f"[{time.perf_counter() - started:6.1f} s] Ray is up{dashboard}", flush=True)
            for own, prepared in [(own, training.on(cluster)) for own, training in trainings.items()]:
                run = done[own] = begun.get(own) or create_run(runs, own, prepared.config)
                with _several_seeds(own_name if len(seeds) > 1 else ""):
                    train_and_print(run, prepared, cluster, started, advise=len(seeds) == 1)
    if len(seeds) > 1:
        print_seeds([done[own] for own in configs], output_path(runs) / f"{own_name}-seeds.md")


@contextlib.contextmanager
def _several_seeds(name: str) -> Iterator[None]:
    """Says of an interruption that the whole command goes on; `name` is what the runs have in common."""
    try:
        yield
    except (KeyboardInterrupt, WorkerFailed) as error:
        if name:
            error.__notes__ = [f"run the same command again with --name {name}: finished seeds are taken as they are"]
        raise


def resume_and_train(path: str | Path, changes: Mapping[str, Any], *, address: str | None, started: float) -> None:
    """Continues a run; only its workers, and the place of its data set, may change. Arguments as for `train_seeds`."""
    run = open_run(path)
    if run.report is not None:
        print(f"run {run.path} is finished; to train it further, start a new run from it: {_further_command(run)}")
        print_report(run)
        return
    if changes:
        run = Run(run.path, build_config(run.config, changes))
    check_same_data(run)
    prepared = prepare(run.config)
    print_notices(prepared.notices)
    with ray_cluster(address) as cluster:
        train_and_print(run, prepared.on(cluster), cluster, started)


def train_and_print(run: Run, prepared: Prepared, cluster: Cluster, started: float, *, advise: bool = True) -> None:
    """Trains a run on a cluster that is there, with progress, and prints the results; `advise`: and what to try."""
    config = run.config
    print(f"\nrun        {run.path}")
    print("\n".join(header_lines(prepared)))
    if config.train.select_on != "val":
        print("WARNING    the best epoch is picked on TEST, as in the released code: the result flatters itself")
    for line in _finding_lines(standing_findings(read_records(run.path)), advise=advise):  # of a run that goes on
        print(line)
    print(f"watch      {command_line('tensorboard', '--logdir', run.path.parent)}", flush=True)
    try:
        with run.locked():
            if open_run(run.path).config != config:  # its workers, or the place of its data, are others now
                write_text(run.path / CONFIG_NAME, to_yaml(config))
            ready = with_features(config, run.path, cluster)
            if ready is not config:  # the training reads vectors in place of images
                prepared = prepare(ready).on(cluster)
            start = config.started_from.title
            metrics, counted = prepared.task.metrics, "pairs" if config.train.captions == "grouped" else "samples"
            progress = Progress(prepared.total_steps, started, metrics, start, advise=advise, counted=counted)
            num_workers = prepared.workers.num_workers if prepared.workers else 1
            progress.say(start_line(num_workers))
            train(run, prepared, cluster, on_record=progress)
    except KeyboardInterrupt as error:
        if run.report is None:
            error.add_note(f"continue with: {_resume_command(run)}")
        else:  # it came while the best weights were evaluated
            print_report(run, advise=advise)
        raise
    except WorkerFailed as error:
        error.add_note(
            f"`scaling.max_failures` in its {CONFIG_NAME} restarts workers by itself; continue with: "
            f"{_resume_command(run)}"
        )
        raise
    print_report(run, advise=advise)


def _further_command(run: Run) -> str:
    config, train = run.config, run.config.train
    length = f"train.steps={train.steps}" if train.steps else f"train.epochs={train.epochs}"
    return launch_command(
        "train", "--recipe", config.recipe, "--from", run.path, "--data", config.data.path, "--set", length
    )


def _resume_command(run: Run) -> str:
    return launch_command("train", "--resume", run.path)


def print_report(run: Run, *, advise: bool = True) -> None:
    """Prints the results of a finished run and where they are; `advise`: and what to try if they are bad."""
    report = run.report
    assert report is not None
    findings = [Finding.of(entry) for entry in report.get("health", [])]
    size = report["checkpoint_bytes"] / 1e6
    print(f"\n{report['trainable_parameters']:,} of {report['parameters']:,} parameters trained; "
          f"best epoch {report['best_epoch']:g} by {report['selected_on']} {report['objective']}"
          + ("; stopped early" if report["stopped_early"] else "")
          + (f"; figures in {report['eval_precision']}" if "eval_precision" in report else ""))  # fmt: skip
    print(f"checkpoint {run.path / report['checkpoint']} ({size:.1f} MB)")
    for split in report["metrics"]:
        found = (report.get(key, {}).get(split, {}) for key in FIGURES)  # older reports have metrics alone
        print(f"\n{split}\n{results_table(run.task.metrics, *found)}")
    if findings:
        print("\nthe training is done, but its figures do not show that it worked:")
        print("\n".join(_finding_lines(findings, advise=advise)))


def _finding_lines(findings: Sequence[Finding], *, advise: bool = True) -> list[str]:
    """Returns lines that tell what is wrong with a training, then once, if wanted, what to try."""
    return [f"WARNING    {finding.message}" for finding in findings] + (advice_lines(findings) if advise else [])


def print_notices(notices: Sequence[str]) -> None:
    """Prints what the user should know before anything starts."""
    for notice in notices:
        print(f"notice: {notice}")


def check_gradients(config: RunConfig) -> None:
    """Runs one step and prints the trainable parameters that got no gradient.

    Raises:
        UserError: If there are some.
    """
    config = absolute_paths(config)
    prepared, worker = prepare(config), local_worker(config)
    require_start(config)
    check_batch(prepared.task, config.scaling.num_workers or 1)
    print_notices(prepared.notices)
    alone = WorkerPlan(1, worker.decode_threads, float(worker.device != "cpu"))
    print("\n".join(header_lines(dataclasses.replace(prepared, workers=alone))), flush=True)
    without = parameters_without_gradient(prepared.task, prepared.order, config, worker, local_batches)
    if without:
        raise UserError(f"{count(len(without), 'trainable parameter')} got no gradient: {', '.join(without)}")
    print("one step done: every trainable parameter got a gradient")


class Progress:
    """Prints the run's record as it grows."""

    def __init__(
        self,
        total_steps: int,
        started: float,
        metrics: Metrics,
        start: str = "",
        *,
        advise: bool = True,
        counted: str = "samples",
    ):
        self._total, self._started, self._first = total_steps, started, None
        self._start, self._advise, self._counted = start, advise, counted
        self._metrics, self._shown = metrics, dict.fromkeys((metrics.objective, "r_mean", "r_mean_text"))
        self._printed, self._last = -math.inf, -1

    def say(self, text: str) -> None:
        """Prints a line with the time since the command started."""
        print(f"[{time.perf_counter() - self._started:6.1f} s] {text}", flush=True)

    def __call__(self, record: dict[str, Any]) -> None:
        """Prints a line of the record, if it is one that is shown."""
        if record["kind"] == "start":
            self.say(f"workers are up and the model is built in {record['seconds']:.1f} s")
        elif record["kind"] == "notice":
            print(f"notice: {record['text']}", flush=True)
        elif record["kind"] == "restart":
            self.say(record["text"])
        elif record["kind"] == "step":
            self._tell_step(record)
        elif record["kind"] == KIND:
            if record["step"] != self._last:  # else the lines above tell where it stands
                self.say(f"step {record['step']}/{self._total}")
            finding = Finding.of(record)
            over = [f"better     {finding.message}"]
            lines = over if finding.over else _finding_lines([finding], advise=self._advise)
            print("\n".join(lines), flush=True)
        elif record["kind"] == "evaluation":
            figures = "  ".join(f"{k} {self._metrics.show(k, record[k])}" for k in self._shown if k in record)
            start = f"  ({self._start})" if self._start and not record["step"] else ""
            self.say(f"epoch {record['epoch']:.4g}  {record['split']}  {figures}{start}")
            self._last = record["step"]

    def _tell_step(self, record: dict[str, Any]) -> None:
        """Prints that the first step is done, or where the training stands if that was not told for a while."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, record["step"])
            self.say("first step")
        elif now - self._printed > 10 and record["step"] > self._first[1]:
            left = (now - self._first[0]) / (record["step"] - self._first[1]) * (self._total - record["step"])
            self.say(
                f"step {record['step']}/{self._total}  loss {record['loss']:.3f}  "
                f"{record['pairs_per_second']:.0f} {self._counted}/s  waiting for data "
                f"{record['data_wait_fraction']:.0%}  about {left:.0f} s left"
            )
            self._printed, self._last = now, record["step"]
