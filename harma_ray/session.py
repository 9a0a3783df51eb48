"""What the commands do, told to a person: what is about to happen, how it goes, where things are."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harma_ray.checkpoint import META_NAME, list_checkpoints, read_meta
from harma_ray.cluster import Cluster, ray_cluster
from harma_ray.config import RunConfig, build_config, to_yaml
from harma_ray.data.identity import Identity, data_identity, require_same_data
from harma_ray.data.order import planned_order
from harma_ray.data.schema import list_splits, open_split
from harma_ray.data.stream import local_batches
from harma_ray.engine import default_place, evaluate_split, parameters_without_gradient
from harma_ray.errors import UserError, WorkerFailed
from harma_ray.exchange import load_model
from harma_ray.features import with_features
from harma_ray.files import kept_path, output_path, write_text
from harma_ray.header import header_lines
from harma_ray.health import KIND, Finding, standing_findings
from harma_ray.plans import WorkerPlan, check_batch, plan_workers
from harma_ray.recipes import make_task
from harma_ray.report import comparison_section, comparison_table, results_table, write_report
from harma_ray.runs import CONFIG_NAME, Run, create_run, open_run
from harma_ray.shell import command_line, launch_command
from harma_ray.task import require_query
from harma_ray.tracking import read_records
from harma_ray.train import evaluate_on_workers, train


def train_seeds(
    config: RunConfig, seeds: Sequence[int], *, runs: str | Path, name: str | None, address: str | None, started: float
) -> list[Run]:
    """Trains a run for every seed and prints each, then mean and standard deviation.

    Args:
        config: Settings; the seed is replaced.
        seeds: One run each.
        runs: Folder of all runs.
        name: Name of the run; with several seeds, of their common part; None makes one of recipe and time.
        address: Cluster to join.
        started: When the command started (``time.perf_counter``), for the times that are printed.
    """
    made = []
    output_path(runs)
    configs = [absolute_paths(dataclasses.replace(config, seed=seed)) for seed in seeds]
    check_data(configs[0])
    print(f"[{time.perf_counter() - started:6.1f} s] settings and data are checked; starting Ray", flush=True)
    with ray_cluster(address) as cluster:
        dashboard = f", {cluster.dashboard}" if cluster.dashboard else ""
        print(f"[{time.perf_counter() - started:6.1f} s] Ray is up{dashboard}", flush=True)
        check_batch(config, plan_workers(config, cluster).num_workers)
        for seeded in configs:
            own_name = name and (f"{name}-seed{seeded.seed}" if len(seeds) > 1 else name)
            if not name and len(seeds) > 1:
                own_name = f"{seeded.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-seed{seeded.seed}"
            run = create_run(runs, own_name, seeded)
            made.append(run)
            train_and_print(run, cluster, started)
    if len(made) > 1:
        print_spread(made)
    return made


def resume_and_train(path: str | Path, changes: Mapping[str, Any], *, address: str | None, started: float) -> Run:
    """Continues a run; only its workers, and the place of its data set, may change. Arguments as for `train_seeds`."""
    run = open_run(path)
    if run.report is not None:
        print(f"run {run.path} is finished")
        print_report(run)
        return run
    if changes:
        run = Run(run.path, build_config(run.config, changes))
    _check_same_data(run)
    check_data(run.config)
    with ray_cluster(address) as cluster:
        check_batch(run.config, plan_workers(run.config, cluster).num_workers)
        if changes:
            write_text(run.path / CONFIG_NAME, to_yaml(run.config))
        train_and_print(run, cluster, started)
    return run


def train_and_print(run: Run, cluster: Cluster, started: float) -> dict[str, Any]:
    """Trains a run on a cluster that is there, with progress, and prints the results."""
    config = run.config
    order = planned_order(config)
    steps = order.steps_per_epoch * config.train.epochs
    print(f"\nrun        {run.path}")
    print("\n".join(header_lines(config, plan_workers(config, cluster))))
    if config.train.select_on != "val":
        print("WARNING    the best epoch is picked on TEST, as in the released code: the result flatters itself")
    for line in _finding_lines(standing_findings(read_records(run.path))):  # of a run that goes on
        print(line)
    print(f"watch      {command_line('tensorboard', '--logdir', run.path.parent)}", flush=True)
    try:
        with run.locked():
            ready = Run(run.path, with_features(config, run.path, cluster))
            train(ready, cluster, on_record=_Progress(steps, started))
    except KeyboardInterrupt as error:
        error.add_note(f"continue with: {_resume_command(run)}")
        raise
    except WorkerFailed as error:
        error.add_note(
            f"`scaling.max_failures` in its {CONFIG_NAME} restarts workers by itself; continue with: "
            f"{_resume_command(run)}"
        )
        raise
    print_report(run)
    return run.report or {}


def _resume_command(run: Run) -> str:
    return launch_command("train", "--resume", run.path)


def _check_same_data(run: Run) -> None:
    """Checks, before Ray is started, that a run that goes on does so with the data that it was begun on."""
    data = run.config.data.path
    if not Path(data).is_dir():
        raise UserError(
            f"the data set {data} of run {run.path} is not there; if it was moved, say where it is: "
            f"{_resume_command(run)} --data FOLDER"
        )
    checkpoints = list_checkpoints(run.path)
    if checkpoints:
        known = read_meta(checkpoints[-1]).data
        require_same_data(known, data, subject=f"run {run.path}", way_out="start a new run")


def print_report(run: Run) -> None:
    """Prints the results of a finished run and where they are."""
    report = run.report
    assert report is not None
    findings = [Finding.of(entry) for entry in report.get("health", [])]
    size = report["checkpoint_bytes"] / 1e6
    print(f"\n{report['trainable_parameters']:,} of {report['parameters']:,} parameters trained; "
          f"best epoch {report['best_epoch']:g} by {report['selected_on']} {report['objective']}"
          + ("; stopped early" if report["stopped_early"] else "")
          + (f"; figures in {report['eval_precision']}" if "eval_precision" in report else ""))  # fmt: skip
    print(f"checkpoint {run.path / report['checkpoint']} ({size:.1f} MB)")
    for split, metrics in report["metrics"].items():
        print(f"\n{split}\n{results_table(metrics)}")
    if findings:
        print("\nthe training is done, but these figures are not those of one that worked:")
        print("\n".join(_finding_lines(findings)))


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Returns lines that tell what is wrong with a training, then once what to try."""
    lines = [f"WARNING    {finding.message}" for finding in findings]
    advice = list(dict.fromkeys(text for finding in findings for text in finding.advice))
    return lines + [f"{'' if number else 'try':10} {text}" for number, text in enumerate(advice)]


def print_spread(runs: Sequence[Run]) -> None:
    """Prints mean and standard deviation over several runs of one setting."""
    reports = [run.report or {} for run in runs]
    for split in reports[0]["metrics"]:
        rows = []
        for name in reports[0]["metrics"][split]:
            values = [report["metrics"][split][name] for report in reports]
            rows.append([name, statistics.mean(values), statistics.stdev(values), *values])
        headers = [split, "mean", "std", *(f"seed {run.config.seed}" for run in runs)]
        print("\n" + tabulate(rows, headers=headers, floatfmt=".2f"))
    for run, report in zip(runs, reports, strict=True):
        for entry in report.get("health", []):
            print(f"WARNING    {run.path.name}: {Finding.of(entry).message}")


def check_gradients(config: RunConfig) -> None:
    """Runs one step and prints the trainable parameters that got no gradient.

    Raises:
        UserError: If there are some.
    """
    config = absolute_paths(config)
    check_data(config)
    task = make_task(config)
    place = default_place(config)
    print(
        "\n".join(header_lines(config, WorkerPlan(1, place.decode_threads, float(place.device != "cpu")))), flush=True
    )
    without = parameters_without_gradient(task, config, place, local_batches)
    if without:
        raise UserError(f"{len(without)} trainable parameters got no gradient: {', '.join(without)}")
    print("one step done: every trainable parameter got a gradient")


def evaluate_and_print(
    config: RunConfig,
    file: str | None,
    *,
    split: str,
    json_file: str | None = None,
    report: str | None = None,
    num_workers: int = 1,
    address: str | None = None,
    query: str | None = None,
) -> dict[str, Any]:
    """Evaluates, prints a table with intervals and chance, writes JSON and the page if asked for.

    Args:
        config: Settings of the model and the data.
        file: A run's folder or another file of weights, see `harma_ray.exchange.load_model`; None = as built.
        split: Name of the split.
        json_file: Where the figures go.
        report: Folder of the page.
        num_workers: More than one need Ray.
        address: Cluster to join for that.
        query: Whose figures, of a model that knows several kinds of queries; None = its own, ``all`` = beside its own
            a table of all.

    Raises:
        UserError: If the weights, the split or the kind of queries does not fit.
    """
    config = absolute_paths(config)
    data, task = open_split(config.data.path, split), make_task(config)
    figures, folder = (output_path(path) if path else None for path in (json_file, report))
    if figures and not figures.parent.is_dir():
        raise UserError(f"the folder of `--json` {figures} does not exist")
    started = time.perf_counter()
    model = load_model(file, config)
    if query:
        require_query(task, model, query if query != "all" else next(iter(task.queries(model)), query))
    if num_workers > 1:
        with ray_cluster(address) as cluster:
            evaluation = evaluate_on_workers(config, file, split, cluster)
    else:
        place = default_place(config)
        evaluation = evaluate_split(task, config, model, split, place=place, reader=local_batches)
    by_query = evaluation.by_query
    if query and query != "all":
        evaluation = by_query[query]
    intervals, chance = evaluation.intervals(), evaluation.chance()
    kinds = {name: found.metrics for name, found in by_query.items()} if query == "all" else {}
    spreads = {name: by_query[name].intervals() for name in kinds}
    precision = config.train.eval_precision
    print(f"{data.path}: {data.describe()}, {precision}, {time.perf_counter() - started:.1f} s")
    if evaluation.note:
        print(evaluation.note)
    print(results_table(evaluation.metrics, intervals, chance))
    identity, trained_on = data_identity(config.data.path, [split])[split], _trained_on(file)
    if trained_on and trained_on.get(split, identity) != identity:
        print(f"notice: the run was begun on another `{split}` than this one")
    outcome: dict[str, Any] = {
        "split": split, "data": str(data.path), **identity, "weights": file, "trained_on": trained_on,
        "precision": precision, "metrics": evaluation.metrics,
        "interval_95": intervals, "chance": chance,
    }  # fmt: skip
    if evaluation.query:
        outcome["query"] = evaluation.query
    sections = evaluation.sections(data) if folder else []
    if kinds:
        print(f"\n{comparison_table(kinds, spreads)}")
        outcome["queries"] = {name: {"metrics": kinds[name], "interval_95": spreads[name]} for name in kinds}
        sections.insert(0, comparison_section(kinds, spreads))
    if figures:
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder:
        page = write_report(
            folder, title=f"{config.recipe} on {split}", sections=sections,
            subtitle="; ".join(filter(None, [
                f"{data.path.parent.name}/{split}: {data.describe()}", evaluation.note, f"measured in {precision}"
            ])),
            metrics=evaluation.metrics, intervals=intervals, chance=chance, model=model,
            settings=dataclasses.asdict(config), records=list(read_records(Path(file))) if file else [],
        )  # fmt: skip
        print(f"report     {page}")
    return outcome


def _trained_on(file: str | None) -> Identity | None:
    """Returns the data of the run whose folder or checkpoint a file is; None if that is not known."""
    folder = Path(file or "").expanduser()
    checkpoints = [folder] if file and (folder / META_NAME).is_file() else list_checkpoints(folder) if file else []
    return (read_meta(checkpoints[-1]).data or None) if checkpoints else None


def check_data(config: RunConfig, metrics: Sequence[str] = ()) -> None:
    """Checks, before any worker starts, that the splits are there and the model can be described.

    Args:
        config: Settings.
        metrics: Metrics that a search compares, beside the recipe's objective.

    Raises:
        UserError: If they are not, or the splits have other metrics.
    """
    data = config.data
    if not data.path:
        raise UserError("no data set is given; use --data FOLDER (made by `launch.py convert`)")
    order = planned_order(config)
    evaluated = [open_split(data.path, data.val_split if config.train.select_on == "val" else data.test_split)]
    if data.test_split not in list_splits(data.path):
        print(f"notice: {data.path} has no split `{data.test_split}`, so nothing is evaluated on it at the end")
    elif data.test_split != evaluated[0].name:
        evaluated.append(open_split(data.path, data.test_split))
    make_task(config).check(order.split, evaluated, metrics)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns settings whose paths do not depend on the working folder.

    Raises:
        UserError: If one leads into the copy of a working folder that a Ray job runs in.
    """
    changes: dict[str, Any] = {}
    if config.data.path:
        changes["data.path"] = str(kept_path(config.data.path, "the data set"))
    for name, is_there in (("pretrained", Path.is_file), ("tuned", Path.is_dir)):
        weights = getattr(getattr(config, "model", None), name, None)
        if weights and (Path(weights).suffix or is_there(Path(weights).expanduser())):  # no tag of open_clip's has one
            path = kept_path(weights, f"`model.{name}`")
            if is_there(path):
                changes[f"model.{name}"] = str(path)
    return build_config(config, changes)


class _Progress:
    """Prints the run's record as it grows."""

    def __init__(self, total_steps: int, started: float):
        self._total, self._started, self._first = total_steps, started, None
        self._printed = -math.inf

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        clock = f"[{now - self._started:6.1f} s]"
        if record["kind"] == "start":
            print(f"{clock} workers are up and the model is built in {record['seconds']:.1f} s", flush=True)
        elif record["kind"] == "notice":
            print(f"notice: {record['text']}", flush=True)
        elif record["kind"] == "restart":
            print(f"{clock} {record['text']}", flush=True)
        elif record["kind"] == "step":
            if self._first is None:
                self._first = (now, record["step"])
                print(f"{clock} first step", flush=True)
            elif now - self._printed > 10 and record["step"] > self._first[1]:
                left = (now - self._first[0]) / (record["step"] - self._first[1]) * (self._total - record["step"])
                print(f"{clock} step {record['step']}/{self._total}  loss {record['loss']:.3f}  "
                      f"{record['pairs_per_second']:.0f} pairs/s  waiting for data {record['data_wait_fraction']:.0%}  "
                      f"about {left:.0f} s left", flush=True)  # fmt: skip
                self._printed = now
        elif record["kind"] == KIND:
            finding = Finding.of(record)
            lines = [f"better     {finding.message}"] if finding.over else _finding_lines([finding])
            print("\n".join([f"{clock} step {record['step']}/{self._total}", *lines]), flush=True)
        elif record["kind"] == "evaluation":
            figures = "  ".join(f"{k} {record[k]:.2f}" for k in ("r_mean", "r_mean_text") if k in record)
            print(f"{clock} epoch {record['epoch']}  {record['split']}  {figures}", flush=True)
