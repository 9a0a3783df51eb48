"""Runs a search on a Ray cluster: Ray Tune gives each trial its place, the study says which and hears of it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.tune
from torch.utils.tensorboard import SummaryWriter

from harma_ray.cluster import DRIVER_CPUS, Cluster, TrialPlan
from harma_ray.config import RunConfig, build_config
from harma_ray.errors import UserError, find_user_error
from harma_ray.recipes import make_task
from harma_ray.runs import REPORT_NAME, Run, describe_environment
from harma_ray.tracking import EVENTS_FOLDER
from harma_ray.train import train
from harma_ray.tune.definition import SearchDefinition
from harma_ray.tune.folder import confirmation_folder, drop_checkpoints, read_search
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.scheduling import StudySearcher, make_scheduler
from harma_ray.tune.sharing import SharedModule
from harma_ray.tune.study import Event, SearchStudy, trial_folder
from harma_ray.tune.trial import TrialSetting, finish, prepare_folder, run, train_alone

WORK_FOLDER = "ray"
"""Ray Tune's own files, inside the search's folder, while it runs."""
RESTARTS = 2
"""How often a trial is started again from its checkpoint after its process died."""
_HOPELESS = 3
"""So many trials that fail before any succeeds end the search."""


def prepare_trials(definition: SearchDefinition, plan: TrialPlan) -> TrialSetting:
    """Puts the frozen backbone, which all trials share, into Ray's object store, and says what else they share.

    Raises:
        UserError: If the backbone cannot be built.
    """
    task = make_task(definition.config)
    base = (task.base_name, ray.put(SharedModule.of(task.build_base())))
    environment = json.dumps(describe_environment(sys.argv), indent=1)
    metrics = tuple(target.metric for target in definition.objectives)
    return TrialSetting(metrics, plan.workers, base, environment)


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
        on_event: Hears of every trial that begins, reports or ends.
        trial: What runs a trial; see `harma_ray.tune.trial.run`.

    Raises:
        UserError: If the first trials all fail.
    """
    study = SearchStudy(folder, definition)
    study.listener = partial(_heard, folder, definition, study, on_event)
    past = read_search(folder, definition, study.study).trials
    searcher, traces = StudySearcher(study), _Traces()
    searcher.errors = traces.read
    work = folder / WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    workers = plan.workers
    alone = {"cpu": workers.cpus_per_worker, "gpu": workers.gpus_per_worker}
    resources = alone if workers.num_workers == 1 else {"cpu": DRIVER_CPUS}
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is told by the trial's own reason
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(_run_in_tune, setting=setting, trial=trial), resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(definition, past),
            num_samples=-1,
            max_concurrent_trials=plan.concurrent,
            reuse_actors=workers.num_workers == 1,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:05d}-{trial.trial_id}",
        ),
        run_config=ray.tune.RunConfig(
            name=WORK_FOLDER,
            storage_path=str(folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=RESTARTS),
            stop=_Limits(study),
            callbacks=[traces],
        ),
    )
    tuner.fit()
    shutil.rmtree(work, ignore_errors=True)
    reasons = study.failures_alone()
    if reasons:
        raise UserError(f"no trial of {folder} succeeded: {reasons[0]}")
    return read_search(folder, definition, study.study)


def finish_best(results: SearchResults, setting: TrialSetting, config: RunConfig) -> dict[str, Any]:
    """Evaluates test once, with the best trial's best weights; returns the report of its run."""
    assert results.best is not None
    best = next(trial for trial in results.trials if trial.number == results.best)
    report = best.folder / REPORT_NAME
    if report.is_file():
        return json.loads(report.read_text())
    workers = setting.plan
    task: Any = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, max_retries=RESTARTS)(
        finish
    )
    return _get(task.remote(best.folder, config, setting, dict(best.params)))


def confirm(
    folder: Path, definition: SearchDefinition, results: SearchResults, plan: TrialPlan, setting: TrialSetting,
    cluster: Cluster, num_seeds: int, tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Trains the best and the published setting with seeds that the search has not seen; runs that are there stay.

    Args:
        folder: The search's folder.
        definition: The search.
        results: What it found.
        plan: Runs at a time, and the workers of each.
        setting: What the runs share.
        cluster: Where.
        num_seeds: Runs of each setting.
        tell: Hears a line about each run that has ended.
    """
    by_number = {trial.number: trial for trial in results.trials}
    runs = []
    for number in dict.fromkeys((results.best, 0)):
        if number in by_number:
            config = definition.settings(dict(by_number[number].params))
            for seed in range(definition.seeds, definition.seeds + num_seeds):
                path = confirmation_folder(folder, number, config.seed + seed)
                if not (path / REPORT_NAME).is_file():
                    runs.append(Run(path, build_config(config, {"seed": config.seed + seed})))
    if plan.workers.num_workers > 1:
        for made in runs:
            prepare_folder(made.path, made.config, setting)
            train(made, cluster, on_record=lambda record: None)
            tell(f"{made.path.name} is trained")
        return
    _confirm_side_by_side(runs, plan, setting, tell)


def _confirm_side_by_side(
    runs: Sequence[Run], plan: TrialPlan, setting: TrialSetting, tell: Callable[[str], None]
) -> None:
    workers = plan.workers
    task = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, max_retries=RESTARTS)(
        train_alone
    )
    waiting, running = list(runs), {}
    while waiting or running:
        while waiting and len(running) < plan.concurrent:
            made = waiting.pop(0)
            running[task.remote(made.path, made.config, setting)] = made
        done, _ = ray.wait(list(running))
        for reference in done:
            _get(reference)
            tell(f"{running.pop(reference).path.name} is trained")


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        told = find_user_error(error)
        raise (told or error) from error


def _run_in_tune(config: dict[str, Any], setting: TrialSetting, trial: Callable[..., None]) -> None:
    trial(config, setting, ray.tune.report)


def _heard(
    folder: Path, definition: SearchDefinition, study: SearchStudy, on_event: Callable[[Event], None], event: Event
) -> None:
    if event.state in ("complete", "stopped", "failed"):
        results = read_search(folder, definition, study.study)
        drop_checkpoints(folder, results)
        _log_hparams(next(trial for trial in results.trials if trial.number == event.number), results)
    on_event(event)


def _log_hparams(trial: TrialResult, results: SearchResults) -> None:
    """Fills TensorBoard's HParams page with a trial that has ended."""
    if not trial.values:
        return
    params = {k: v if isinstance(v, str | bool | int | float) else str(v) for k, v in trial.params.items()}
    metrics = {f"search/{o.metric}": v for o, v in zip(results.objectives, trial.values, strict=True)}
    with SummaryWriter(str(trial_folder(results.folder, trial.number) / EVENTS_FOLDER)) as writer:
        writer.add_hparams(params, {**metrics, "search/epochs": trial.epochs}, run_name=".")


class _Limits(ray.tune.Stopper):
    """Ends a search at its limit of hours or epochs, or when nothing works; running trials can go on later."""

    def __init__(self, study: SearchStudy):
        self._study = study

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no trial of its own."""
        return False

    def stop_all(self) -> bool:
        """Says whether the search is over."""
        return self._study.is_over() or len(self._study.failures_alone()) >= _HOPELESS

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the study out of Ray Tune's pickles."""
        return {}


class _Traces(ray.tune.Callback):
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

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the trials out of Ray Tune's pickles."""
        return {}
