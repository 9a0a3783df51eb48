"""What ``tune`` does, and what it prints."""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tabulate import tabulate

from harma_ray.cli.search_options import SearchOptions
from harma_ray.cli.train_run import print_notices
from harma_ray.cli.tune_progress import SearchProgress, show_params
from harma_ray.config import OnDisk, RunConfig
from harma_ray.data.identity import data_identity, require_same_data, unknown_data
from harma_ray.data.order import planned_order
from harma_ray.errors import UserError, count
from harma_ray.evaluation import FIGURES
from harma_ray.files import output_path
from harma_ray.on_ray.cluster import ray_cluster, require_shared_folder, require_visible
from harma_ray.on_ray.workers import read_paths
from harma_ray.preflight import prepare, require_start
from harma_ray.recipes import make_task
from harma_ray.report.evaluation import results_table
from harma_ray.resources import Cluster, TrialPlan, plan_trials
from harma_ray.runs import absolute_paths, lock_folder
from harma_ray.settings import build_config, marked_settings
from harma_ray.shell import command_line, launch_command
from harma_ray.training.step import check_batch
from harma_ray.tune.folder import create_search, open_search, read_search, write_best, write_definition
from harma_ray.tune.report.page import write_search_report
from harma_ray.tune.results import SearchResults
from harma_ray.tune.space.definition import COSTS, SearchDefinition
from harma_ray.tune.space.urls import absolute_url, show_url
from harma_ray.tune.storage import open_study, storage_url
from harma_ray.tune.study import DATA
from harma_ray.vectors.features import with_features


def start_search(definition: SearchDefinition, *, runs: str | Path, name: str | None, options: SearchOptions) -> None:
    """Starts a search, sees it through, and prints what it found."""
    definition = _absolute(definition)
    _print_timed(options.started)(f"checking recipe {definition.config.recipe} on {definition.config.data.path}")
    _check_data(definition)
    for point in _corners(definition):
        require_start(point)
    output_path(runs)
    with _cluster(options) as cluster:
        plan = _plan(definition, cluster)
        folder = create_search(runs, name, definition)
        _require_same_data(folder, definition)
        with lock_folder(folder, "search"):
            _search(folder, definition, cluster, plan, options)


def resume_search(folder: Path, definition: SearchDefinition, options: SearchOptions) -> None:
    """Goes on with a search: trials that were interrupted first; limits and the data set's place may have changed."""
    _check_data(definition)
    _require_same_data(folder, definition)
    with _cluster(options) as cluster:
        plan = _plan(definition, cluster)
        with lock_folder(folder, "search"):
            write_definition(folder, definition)
            _search(folder, definition, cluster, plan, options)


@contextlib.contextmanager
def _cluster(options: SearchOptions) -> Iterator[Cluster]:
    """Starts or joins Ray as the options say, and tells so: it takes seconds."""
    say = _print_timed(options.started)
    address = options.address or os.environ.get("RAY_ADDRESS")
    say(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    with ray_cluster(options.address, dashboard=options.dashboard) as cluster:
        say(f"Ray is there: {cluster.cpus:g} CPU, {cluster.gpus:g} GPU on {count(cluster.nodes, 'machine')}")
        yield cluster


def report_search(path: str | Path, out: str | Path | None = None) -> None:
    """Writes the report of a search as it stands, and prints the table.

    Args:
        path: The search's folder.
        out: Where report and best setting go, made if missing; nothing else is written then. None = its folder.

    Raises:
        UserError: If the search's folder is read-only, and no other place is named.
    """
    folder, definition = open_search(path)
    if out is None and not os.access(folder, os.W_OK):
        raise UserError(f"a report goes into its search's folder, but {folder} is read-only; add --out FOLDER")
    target = folder if out is None else output_path(out)
    results = read_search(folder, definition, open_study(folder, definition, read_only=out is not None))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {target} ({error.strerror}); choose another --out") from error
    _conclude(target, results)


def _absolute(definition: SearchDefinition) -> SearchDefinition:
    """Returns the search with paths that do not depend on the working folder."""
    config, storage = absolute_paths(definition.config), definition.storage
    searched = {parameter.name for parameter in definition.parameters}
    # Searched paths stay as they are written, and so do the published ones among them.
    written = {name: definition.configured[name] for name in marked_settings(config, OnDisk) if name in searched}
    config = build_config(config, written)
    return dataclasses.replace(definition, config=config, storage=storage and absolute_url(storage))


def _check_data(definition: SearchDefinition) -> None:
    compared = [target.metric for target in definition.objectives if target.metric not in COSTS]
    print_notices(prepare(definition.config, compared).notices)


def _require_same_data(folder: Path, definition: SearchDefinition) -> None:
    """Keeps with a search what its data sets hold, and checks that they still do.

    Raises:
        UserError: If one does not: trials on other data cannot be compared with earlier ones.
    """
    study = open_study(folder, definition)
    known, found = study.user_attrs.get(DATA) or {}, data_identity(definition.config)
    require_same_data(known, definition.config, subject=f"search {folder}", way_out="start a new search")
    unknown = unknown_data(known, found, subject="the search")
    if unknown and study.get_trials(deepcopy=False):
        print_notices(unknown)
        if not known and definition.scheduler.name == "hyperband":
            print("notice: its trials drew their brackets of hyperband at random; now all have that of their number")
    if unknown:
        study.set_user_attr(DATA, known | found)


def _plan(definition: SearchDefinition, cluster: Cluster) -> TrialPlan:
    """Divides the cluster, and checks that the batches of all trials can be shared out.

    Raises:
        UserError: If something does not fit.
    """
    plan = plan_trials(definition.config, cluster, definition.concurrent)
    num_workers = plan.workers.num_workers
    if num_workers > 1 and not cluster.dashboard:
        raise UserError(
            "trials of several workers need Ray's dashboard to free their places; leave out --no-dashboard, or start "
            "the cluster with it"
        )
    for config in _corners(definition):
        check_batch(make_task(config), num_workers)
        planned_order(config)
    return plan


def _corners(definition: SearchDefinition) -> list[RunConfig]:
    """Returns the settings that a search begins with, and those at the ends of each of its parameters."""
    ends = [{parameter.name: end} for parameter in definition.parameters for end in parameter.ends]
    return [build_config(definition.config, point) for point in [{}, *ends]]


def _search(
    folder: Path, definition: SearchDefinition, cluster: Cluster, plan: TrialPlan, options: SearchOptions
) -> None:
    from harma_ray.tune.search import confirm, finish_best, prepare_trials, run_search

    config, failures = definition.config, []
    require_shared_folder(folder, cluster)
    require_visible(read_paths(config), cluster)
    _print_plan(folder, definition, cluster, plan.describe())
    try:
        ready = _with_features(definition, folder, cluster)
        say = _print_timed(options.started)
        say(f"reading the backbone, once for all trials: {make_task(ready.config).backbone.name}")
        setting = prepare_trials(ready, plan)
        say("the backbone lies in Ray's memory; the first trial begins when Ray Tune and its process are up")
        with SearchProgress(read_search(folder, definition), options.started) as progress:
            results = run_search(folder, ready, plan, setting, progress)
        best = results.best_trial
        if best is None:
            raise UserError(f"no trial has ended within the limits; go on with: {results.resume_command}")
        try:
            print(f"\nevaluating trial {best.number}, the best, and {config.started_from.title}", flush=True)
            finish_best(results, setting, ready.settings(best.params))
            if options.confirm:
                first = definition.first_name
                seeds = count(options.confirm, "fresh seed")
                print(f"training the best and the {first} setting with {seeds}", flush=True)
                failures = confirm(results, plan, setting, cluster, options.confirm, _print_timed(options.started))
        finally:
            _conclude(folder, read_search(folder, definition))
    except KeyboardInterrupt as error:
        error.add_note(f"continue with: {launch_command('tune', '--resume', folder)}")
        raise
    if failures:
        raise UserError(f"{count(len(failures), 'confirming run')} failed: " + "; ".join(failures))


def _with_features(definition: SearchDefinition, folder: Path, cluster: Cluster) -> SearchDefinition:
    """Computes once what all trials share of their encoders' features, unless these are searched themselves."""
    sections = make_task(definition.config).feature_sections
    if any(parameter.name.partition(".")[0] in sections for parameter in definition.parameters):
        return definition
    return dataclasses.replace(definition, config=with_features(definition.config, folder, cluster))


def _print_timed(started: float) -> Callable[[str], None]:
    return lambda line: print(f"[{time.perf_counter() - started:7.1f} s] {line}", flush=True)


def _print_plan(folder: Path, definition: SearchDefinition, cluster: Cluster, trials: str) -> None:
    config, limits = definition.config, definition.limits
    order = planned_order(config)
    size = f", {count(definition.size, 'different setting')}" if definition.size else ""
    units = {"trial": limits.trials, "hour": limits.hours, definition.unit: definition.budget}
    ends = [count(value, unit) for unit, value in units.items() if value]
    print(f"\nsearch     {folder}")
    print(f"recipe     {config.recipe}, {order.split.describe()}, {count(order.num_samples, 'sample')} and "
          f"{count(order.steps_per_epoch, 'step')} an epoch")  # fmt: skip
    print(f"space      {', '.join(parameter.name for parameter in definition.parameters)}{size}")
    print(f"{definition.first_name:<11}{show_params(definition.published)} (trial 0)")
    seeds = f", {definition.seeds} seeds" if definition.seeds > 1 else ""
    print(f"sampler    {definition.sampler.name}; scheduler {definition.scheduler.name}")
    evaluated = f", evaluated every {config.train.eval_every_steps}" if definition.unit == "step" else ""
    print(f"a trial    {count(definition.length, definition.unit)}{evaluated}{seeds}")
    if config.train.select_on != "val":
        print("WARNING    trials are compared on TEST, as in the released code: the result flatters itself")
    print(f"ends       after {' or '.join(ends) or 'all settings of the grid'}")
    print(f"trials     {trials}")
    print(f"watch      {command_line('tensorboard', '--logdir', folder)}")
    print(f"           {command_line('optuna-dashboard', show_url(storage_url(folder, definition)))}")
    if cluster.dashboard:
        token = os.environ.get("RAY_AUTH_TOKEN") if cluster.is_own else None
        print(f"           http://{cluster.dashboard} (Ray's dashboard{f'; access token {token}' if token else ''})")
    print(flush=True)


def _conclude(folder: Path, results: SearchResults) -> None:
    """Writes the best setting and the report into a folder, and prints what was found."""
    best_file = write_best(folder, results)
    page = write_search_report(results, folder)
    print(f"\n{count(len(results.trials), 'trial')}: {results.counts}")
    (trained, planned), units = results.ended_training, f"{results.definition.unit}s"
    if planned:
        spent = count(sum(trial.trained for trial in results.trials), results.definition.unit)
        print(f"{spent} trained; stopping early saved {1 - trained / planned:.0%} of the ended trials' {units}")
    objective, targets = results.objective, results.definition.objectives
    rated = [trial for trial in results.trials if trial.values and trial.state != "failed"]
    rows = [
        [
            trial.number,
            trial.state,
            f"{trial.trained:.9g}",
            *(target.show(value) for target, value in zip(targets, trial.values or (), strict=True)),
            show_params(trial.params),
        ]
        for trial in sorted(rated, key=lambda trial: -objective.merit(trial.value))[:5]
    ]
    headers = ["trial", "", units, *(target.metric for target in targets), "settings"]
    align = ["right", "left", *["right"] * (len(targets) + 1), "left"]
    print(tabulate(rows, headers=headers, disable_numparse=True, colalign=align))
    for split, metrics in results.final.items():
        beside = (results.beside.get(key, {}).get(split) for key in FIGURES[1:])
        print(f"\n{results.final_title} on {split}\n{results_table(results.metrics, metrics, *beside)}")
    metric, best = objective.metric, results.best_trial
    if metric in results.baseline:
        start, value = results.definition.config.started_from.title, objective.show(results.baseline[metric])
        print(f"\n{start}: {metric} {value} on the same split as the trials")
        if best is not None and objective.merit(best.value - results.baseline[metric]) <= 0:
            print(f"notice     no trial is better than {start}")
    _print_confirmations(results)
    print(f"\nreport     {page}")
    if best_file is not None:
        print(f"best       {launch_command('train', '--config', best_file)}")
    if results.best == 0:
        print(f"notice     the {results.definition.first_name} setting is the best one found")
    elif results.best is not None and not results.confirmations:
        print("notice     one run of a setting proves little; compare over fresh seeds with:")
        print(f"           {results.resume_command} --confirm 3")


def _print_confirmations(results: SearchResults) -> None:
    metric = results.objective.metric
    names = [name for c in results.confirmations[:1] for name in c.metrics if name.split(" ")[1] == metric]
    rows = []
    for confirmation in results.confirmations:
        for name in names:
            values = confirmation.metrics[name]
            spread = results.objective.show(statistics.stdev(values)) if len(values) > 1 else "nan"
            rows.append(
                [confirmation.title, name, results.objective.show(statistics.mean(values)), spread, len(values)]
            )
    if rows:
        print("\nwith fresh seeds")
        print(tabulate(rows, headers=["", "", "mean", "std", "seeds"], disable_numparse=True))
