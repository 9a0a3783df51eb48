"""Runs a search on a Ray cluster: Ray Tune gives each trial its place, the study says which and keeps the results."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.tune
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from harma_ray.config import RunConfig
from harma_ray.errors import UserError, WorkerFailed, count, find_user_error
from harma_ray.files import write_text
from harma_ray.on_ray.interruption import GRACE_SECONDS
from harma_ray.on_ray.quirks import Unpickled, is_out_of_memory, start_side_by_side
from harma_ray.on_ray.workers import train
from harma_ray.preflight import prepare
from harma_ray.recipes import changed_settings, make_task
from harma_ray.resources import DRIVER_CPUS, Cluster, TrialPlan, WorkerPlan
from harma_ray.runs import Run, describe_environment
from harma_ray.settings import build_config
from harma_ray.shell import launch_command
from harma_ray.training.interruption import ask_to_stop, withdraw_stop
from harma_ray.training.run_files import REPORT_NAME
from harma_ray.training.services import service_variables
from harma_ray.tune.folder import BASELINE_NAME, confirmation_folder, drop_checkpoints, read_search
from harma_ray.tune.results import SearchResults
from harma_ray.tune.scheduling import StudySearcher, make_scheduler
from harma_ray.tune.sharing import SharedModule
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.storage import cause_of
from harma_ray.tune.study import Event, SearchStudy, trial_folder
from harma_ray.tune.trial import RESTARTS, TrialSetting, evaluate_baseline, finish, prepare_folder, run, train_alone

WORK_FOLDER = "ray"
"""Ray Tune's own files, inside the search's folder, while it runs."""
_LOST = (
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.NodeDiedError,
    WorkerFailed,
)
"""What Ray raises where a process is gone."""
_logger = logging.getLogger(__name__)


def prepare_trials(definition: SearchDefinition, plan: TrialPlan) -> TrialSetting:
    """Puts the frozen backbone, which all trials share, into Ray's object store, and says what else they share.

    Raises:
        UserError: If the backbone cannot be built.
    """
    task = make_task(definition.config)
    module = task.backbone.build()
    task.backbone.fingerprint(module)  # noted on the module: no trial computes it again
    backbone = (task.backbone.name, ray.put(SharedModule.of(module)))
    shown = tuple(dict.fromkeys([*(p.name for p in definition.parameters), *changed_settings(definition.config)]))
    made, variables = describe_environment(), service_variables(definition.config)
    return TrialSetting(definition.objectives, definition.unit, plan.workers, backbone, made, shown, variables)


def run_search(
    folder: Path, definition: SearchDefinition, plan: TrialPlan, setting: TrialSetting,
    on_event: Callable[[Event], None], *, trial: Callable[..., None] = run,
) -> SearchResults:  # fmt: skip
    """Runs trials until a limit is reached or nothing is left to try; goes on with what an earlier session left.

    Args:
        folder: The search's folder.
        definition: The search.
        plan: Trials at a time, and the workers of each.
        setting: What all trials share.
        on_event: Called for every trial that begins, reports or ends.
        trial: What runs a trial; see `harma_ray.tune.trial.run`.

    Raises:
        UserError: If trial after trial fails, or the record cannot be kept.
    """
    concurrent, failures = plan.concurrent, []
    while True:
        study = SearchStudy(folder, definition, failures)
        study.listener = partial(_handle_event, folder, definition, study, on_event)
        out_of_memory = False
        try:
            _fit(folder, definition, replace(plan, concurrent=concurrent), setting, study, trial)
        except _OutOfMemory:
            out_of_memory = True
            if concurrent > 1:
                concurrent -= 1
                _logger.warning("the machine ran out of memory; going on with %s at a time", count(concurrent, "trial"))
            else:
                study.close_open("the machine ran out of memory with no other trial beside it")
        study.save_time()
        failures = study.failures
        if not out_of_memory or study.failure_reason():
            break
    results, reason = read_search(folder, definition, study.study), study.failure_reason()
    if reason:
        raise UserError(
            f"one trial after another failed, the last because: {reason}; mend that and go on with: "
            f"{results.resume_command}"
        )
    drop_checkpoints(results)
    return results


class _OutOfMemory(Exception):
    """Ray killed a trial's process to save its machine; Ray Tune knows no way to go on from there."""


def _fit(
    folder: Path, definition: SearchDefinition, plan: TrialPlan, setting: TrialSetting, study: SearchStudy,
    trial: Callable[..., None],
) -> None:  # fmt: skip
    past = read_search(folder, definition, study.study).trials
    traces = _Traces()
    searcher = StudySearcher(study, plan.concurrent, traces.read)
    start_side_by_side(plan.concurrent)
    work = folder / WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    workers = plan.workers
    alone = {"cpu": workers.cpus_per_worker, "gpu": workers.gpus_per_worker}
    resources = alone if workers.num_workers == 1 else {"cpu": DRIVER_CPUS}
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a trial's own reason says what failed
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(_run_in_tune, setting=setting, trial=trial), resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(definition, past),
            num_samples=-1,
            reuse_actors=workers.num_workers == 1,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:05d}-{trial.trial_id}",
        ),
        run_config=ray.tune.RunConfig(
            name=WORK_FOLDER,
            storage_path=str(folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=RESTARTS),
            stop=_Limits(study, searcher),
            callbacks=[traces],
        ),
    )
    try:
        tuner.fit()
    except KeyboardInterrupt:
        _save_running(folder, definition, study)
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _OutOfMemory from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if searcher.error is not None:
        way_out = f"mend that and go on with: {launch_command('tune', '--resume', folder)}"
        if isinstance(searcher.error, (OSError, StorageInternalError)):
            reason = cause_of(searcher.error)
            raise UserError(f"the search cannot keep its record ({reason}); {way_out}") from searcher.error
        raise searcher.error


def _save_running(folder: Path, definition: SearchDefinition, study: SearchStudy) -> None:
    """Asks the trials at work to save where they are, and gives them some seconds for it."""
    trials = study.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    paths = [trial_folder(folder, trial.number, seed) for trial in trials for seed in range(definition.seeds)]
    begun = [path for path in paths if path.is_dir()]
    deadline = time.monotonic() + GRACE_SECONDS
    for path in begun:
        ask_to_stop(path)
    for path in begun:
        left = deadline - time.monotonic()
        with contextlib.suppress(UserError), Run(path, definition.config).locked(wait_seconds=left):
            withdraw_stop(path)


def finish_best(results: SearchResults, setting: TrialSetting, config: RunConfig) -> None:
    """Evaluates test once, with the best trial's best weights, and val with the model before any training.

    Args:
        results: What the search found; there is a best trial.
        setting: What all trials share.
        config: The best trial's settings.

    Raises:
        UserError: If an image cannot be read or the disk is full.
    """
    best = results.best_trial
    assert best is not None
    if not results.final:
        _get(_remote(finish, setting.plan).remote(best.folder, config, setting))
    if not results.baseline:
        metrics = _get(_remote(evaluate_baseline, setting.plan).remote(config, setting))
        write_text(results.folder / BASELINE_NAME, json.dumps(metrics))


def _remote(function: Callable[..., Any], workers: WorkerPlan) -> Any:
    """Returns the function as a Ray task that takes the place of a trial's worker."""
    options = {"num_cpus": workers.cpus_per_worker, "num_gpus": workers.gpus_per_worker, "max_retries": RESTARTS}
    return ray.remote(**options)(function)


def confirm(
    results: SearchResults,
    plan: TrialPlan,
    setting: TrialSetting,
    cluster: Cluster,
    num_seeds: int,
    print_line: Callable[[str], None],
) -> list[str]:
    """Trains the best and the published setting with seeds that the search has not seen; runs that are there stay.

    Args:
        results: What the search found.
        plan: Runs at a time, and the workers of each.
        setting: What the runs share.
        cluster: Where.
        num_seeds: Runs of each setting.
        print_line: Called with a line about each run that has ended.

    Returns:
        What failed, and why.
    """
    search, runs = results.definition, []
    points = {trial.number: trial.params for trial in (results.best_trial, results.published) if trial}
    for number, params in points.items():
        config = search.settings(params)
        for seed in range(config.seed + search.seeds, config.seed + search.seeds + num_seeds):
            path = confirmation_folder(results.folder, number, seed)
            if not (path / REPORT_NAME).is_file():
                runs.append(Run(path, build_config(config, {"seed": seed})))
    if plan.workers.num_workers == 1:
        return _confirm_side_by_side(runs, plan, setting, print_line)
    failures = []
    for made in runs:
        prepare_folder(made.path, made.config, setting)
        training = prepare(made.config).on(cluster)
        failures += _attempt(made, partial(train, made, training, cluster, on_record=lambda record: None), print_line)
    return failures


def _confirm_side_by_side(
    runs: Sequence[Run], plan: TrialPlan, setting: TrialSetting, print_line: Callable[[str], None]
) -> list[str]:
    task = _remote(train_alone, plan.workers)
    waiting, running, failures = list(runs), {}, []
    while waiting or running:
        while waiting and len(running) < plan.concurrent:
            made = waiting.pop(0)
            running[task.remote(made.path, made.config, setting)] = made
        done, _ = ray.wait(list(running))
        for reference in done:
            failures += _attempt(running.pop(reference), partial(_get, reference), print_line)
    return failures


def _attempt(made: Run, train_it: Callable[[], Any], print_line: Callable[[str], None]) -> list[str]:
    """Trains a run, and prints how it ended; returns why it failed, if it did: the others go on."""
    try:
        train_it()
    except (UserError, *_LOST) as error:
        reason = "its process was killed, or its machine was lost"
        if isinstance(error, UserError | WorkerFailed):
            reason = str(error)
        elif isinstance(error, ray.exceptions.OutOfMemoryError):
            reason = "the machine ran out of memory"
        print_line(f"{made.path.name} failed: {reason}")
        return [f"{made.path.name}: {reason}"]
    print_line(f"{made.path.name} is trained")
    return []


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise (find_user_error(error) or error) from error


def _run_in_tune(config: dict[str, Any], setting: TrialSetting, trial: Callable[..., None]) -> None:
    trial(config, setting, ray.tune.report)


def _handle_event(
    folder: Path, definition: SearchDefinition, study: SearchStudy, on_event: Callable[[Event], None], event: Event
) -> None:
    if event.state in ("complete", "stopped", "failed"):
        drop_checkpoints(read_search(folder, definition, study.study))
    on_event(event)


class _Limits(Unpickled, ray.tune.Stopper):
    """Ends a search at its limit of hours, epochs or steps, or when nothing works; running trials can go on later."""

    def __init__(self, study: SearchStudy, searcher: StudySearcher):
        self._study, self._searcher = study, searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no trial of its own."""
        return False

    def stop_all(self) -> bool:
        """Says whether the search is over."""
        return self._study.is_over() or self._study.failure_reason() is not None or self._searcher.error is not None


class _Traces(Unpickled, ray.tune.Callback):
    """Knows where Ray Tune writes the trace of what ended a trial's process."""

    def __init__(self):
        self._trials: dict[str, Any] = {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Remembers a trial."""
        self._trials[trial.trial_id] = trial

    def read(self, trial_id: str) -> str:
        """Returns the trace, or nothing."""
        trial = self._trials.get(trial_id)
        return Path(trial.error_file).read_text() if trial is not None and trial.error_file else ""
