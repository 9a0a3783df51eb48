"""One trial of a search: the ordinary training of the ordinary recipe, once for each seed.

A trial of one worker runs the loop right in its process, which several trials use one after another; a trial of
several workers starts Ray Train from its process.
"""

import contextlib
import gc
import math
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
import torch

from harma_ray.compiler import defer_compiler
from harma_ray.config import RunConfig
from harma_ray.data.stream import Loader, Worker, prefetched_batches
from harma_ray.errors import UserError, find_user_error
from harma_ray.files import write_text
from harma_ray.on_ray.quirks import set_variables, wait_for_stopped_trials
from harma_ray.on_ray.workers import enter_worker, on_workers, plain_errors
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import WorkerPlan
from harma_ray.runs import CONFIG_NAME, ENVIRONMENT_NAME, Run
from harma_ray.settings import build_config, to_yaml
from harma_ray.task import Task
from harma_ray.training.checkpoint import list_checkpoints, load_start, read_meta
from harma_ray.training.interruption import TrainingStopped, withdraw_stop
from harma_ray.training.loop import finish_training, run_training, run_trial
from harma_ray.training.services import adopt_variables
from harma_ray.training.sinks import Label
from harma_ray.training.step import evaluate_split
from harma_ray.training.threads import use_threads
from harma_ray.training.tracking import read_records
from harma_ray.tune.sharing import SharedBackbone
from harma_ray.tune.space.definition import Target
from harma_ray.tune.study import Report

ERROR_NAME = "error.txt"
"""The whole trace of what made a trial fail."""
RESTARTS = 2
"""How often a trial is started again from its checkpoint after a process of it died."""
_LOCK_SECONDS = 60
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a search have in common."""

    objectives: tuple[Target, ...]
    """What the search compares."""
    unit: Literal["epoch", "step"]
    """What it counts trainings in."""
    plan: WorkerPlan
    """The workers of a trial."""
    backbone: tuple[str, Any] | None
    """Name of the shared backbone and Ray's reference to it, a `SharedModule`; None = none is shared."""
    environment: str
    """What ``environment.json`` of every trial holds."""
    shown: tuple[str, ...]
    """The settings that were searched, and those that were set by hand for all trials."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """See `harma_ray.training.services.service_variables`."""


def run(assignment: Mapping[str, Any], setting: TrialSetting, report: Callable[[dict[str, Any]], None]) -> None:
    """Runs a trial to its end, and reports after every evaluation; what it cannot do is reported as a failure.

    Only the death of the process is left to Ray Tune, which starts the trial again, from its checkpoint.

    Args:
        assignment: ``number``, ``params`` and ``runs``, see `harma_ray.tune.scheduling.StudySearcher.suggest`.
        setting: What all trials have in common.
        report: `ray.tune.report`.
    """
    wait_for_stopped_trials()
    tally = _Tally(setting.objectives, setting.unit)
    folder = Path(assignment["runs"][0]["folder"])

    def callback(metrics: Mapping[str, Any]) -> None:
        report(asdict(tally.add(metrics)))

    try:
        for wanted in assignment["runs"]:
            folder = Path(wanted["folder"])
            config = build_config(recipe_config(wanted["config"]["recipe"]), wanted["config"], origin="configuration")
            prepare_folder(folder, config, setting)
            tally.begin(folder)
            for past in tally.catch_up():
                report(asdict(past))
            if setting.plan.num_workers > 1:
                with Run(folder, config).locked(wait_seconds=_LOCK_SECONDS):
                    tally = _run_on_workers(folder, config, setting, tally)
                continue
            _alone(run_trial, folder, config, setting, callback=callback)
        report(asdict(replace(tally.report(), finished=True)))
    except TrainingStopped:
        return  # the search is being left; what it knows of this trial stays as it is
    except Exception as error:
        mistake = find_user_error(error)
        reason = str(mistake) if mistake else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if setting.plan.num_workers > 1:
            list(tally.catch_up())  # the workers know of more than this process
        with contextlib.suppress(UserError):  # a full disk may be why it failed
            write_text(folder / ERROR_NAME, "".join(traceback.format_exception(error)))
        report(asdict(replace(tally.report(), failed=reason)))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def finish(folder: Path, config: RunConfig, setting: TrialSetting) -> dict[str, Any]:
    """Ends a trial's run: test is evaluated with its best weights. One worker is enough; returns the final report."""
    return _alone(finish_training, folder, config, setting)


def evaluate_baseline(config: RunConfig, setting: TrialSetting) -> dict[str, float]:
    """Returns the metrics of the model before any training, on the split that the best epoch is picked on."""
    task, worker = _task(config, setting), single_worker(config, setting.plan)
    model, split = task.baseline_model(), config.selecting_split
    if config.started_from.weights:
        model = task.new_model()
        load_start(config.started_from, model, backbone=task.backbone.fingerprint(model))
    return evaluate_split(task, config, model, split, worker=worker, loader=_loader(config, worker)).metrics


def train_alone(folder: Path, config: RunConfig, setting: TrialSetting) -> dict[str, Any]:
    """Trains a run of one worker to its end, test included; returns the final report."""
    prepare_folder(folder, config, setting)
    return _alone(run_training, folder, config, setting)


def prepare_folder(folder: Path, config: RunConfig, setting: TrialSetting) -> None:
    """Makes the folder of a trial's run, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the trial's folder {folder} ({error.strerror}); free some space") from error
    withdraw_stop(folder)
    write_text(folder / ENVIRONMENT_NAME, setting.environment)
    write_text(folder / CONFIG_NAME, to_yaml(config))


def past_evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields what earlier attempts at a trial evaluated, up to their last checkpoint: epoch, step and metrics."""
    checkpoints = list_checkpoints(folder)
    last = read_meta(checkpoints[-1]).step if checkpoints else -1
    for record in read_records(folder):
        if record["kind"] == "evaluation" and record["step"] <= last:
            yield {name: math.nan if value is None else value for name, value in record.items()}


def single_worker(config: RunConfig, plan: WorkerPlan) -> Worker:
    """Returns the only worker of a trial, which is this process, and gives torch its share of the machine."""
    if plan.use_gpu and not torch.cuda.is_available():
        raise UserError("Ray gave this trial a GPU, but torch finds none; check the driver, or use --cpu")
    defer_compiler()
    threads = use_threads(plan.cpus_per_worker, config)
    return Worker(device="cuda" if plan.use_gpu else "cpu", decode_threads=threads)


class _Tally:
    """Sums up a trial: the best of each training so far, the mean over its seeds."""

    def __init__(self, objectives: tuple[Target, ...], unit: str):
        self._first, self._metrics = objectives[0], tuple(target.metric for target in objectives)
        self._folder, self._unit = Path(), unit
        self._best: list[dict[str, float]] = []
        self._trained: list[float] = []
        self._costs: list[dict[str, float]] = []

    def begin(self, folder: Path) -> None:
        """Goes on to the next seed's training."""
        self._folder = folder
        self._best.append({})
        self._trained.append(0)
        self._costs.append({"seconds": 0.0})

    def catch_up(self) -> Iterator[Report]:
        """Forgets the current training, and yields what its record holds, one report an evaluation."""
        if self._best:
            self._best[-1], self._trained[-1] = {}, 0
            yield from map(self.add, past_evaluations(self._folder))

    def add(self, metrics: Mapping[str, Any]) -> Report:
        """Takes in an evaluation of the current training, whose checkpoint is written."""
        meta = read_meta(list_checkpoints(self._folder)[-1])
        self._trained[-1] = metrics[self._unit]
        parameters = sum(math.prod(shape) for shape in meta.trainable.values())
        self._costs[-1] = {"seconds": meta.progress["seconds"], "trainable_parameters": parameters}
        first, merit = self._first.metric, self._first.merit
        if not self._best[-1] or merit(metrics[first]) > merit(self._best[-1][first]):
            self._best[-1] = {name: metrics[name] for name in self._metrics if name in metrics}
        return self.report()

    def report(self) -> Report:
        """Returns where the trial stands."""
        reached = [{**cost, **best} for best, cost in zip(self._best, self._costs, strict=True) if best]
        means = tuple(statistics.fmean(known[name] for known in reached) for name in self._metrics if reached)
        return Report(
            progress=self._trained[0] if self._trained else 0,
            value=means[0] if means else 0.0,
            values=means,
            trained=sum(self._trained),
            seconds=sum(cost["seconds"] for cost in self._costs),
        )


def _run_on_workers(folder: Path, config: RunConfig, setting: TrialSetting, tally: _Tally) -> _Tally:
    """Trains on the workers of Ray Train, whose reports go on to Ray Tune; returns the tally as it is then."""
    from ray.tune.integration.ray_train import TuneReportCallback

    set_variables()  # this process is not the one that started Ray
    adopt_variables(setting.variables)
    settings = {"run": str(folder), "setting": setting, "tally": tally}
    tally = on_workers(
        _work, settings, config, setting.plan, folder, make_callbacks=lambda: [TuneReportCallback()],
        max_deaths=RESTARTS,
    )  # fmt: skip
    if tally is None:
        raise TrainingStopped
    return tally


def _work(settings: dict[str, Any]) -> _Tally | None:
    """Trains on one of several workers; returns None if the training was asked to end early."""
    import ray.train

    from harma_ray.on_ray.stream import ray_batches

    config, worker = enter_worker(settings)
    folder, setting = Path(settings["run"]), settings["setting"]
    tally: _Tally = settings["tally"]
    if worker.rank == 0:
        list(tally.catch_up())  # these workers may follow others that died

    def callback(metrics: Mapping[str, Any]) -> None:
        ray.train.report(asdict(tally.add(metrics)) if worker.rank == 0 else {})  # the report of worker 0 counts

    with plain_errors():
        try:
            run_trial(
                _task(config, setting, writable=worker.device == "cpu"), config, folder,
                worker=worker, loader=ray_batches, callback=callback, label=_label(folder, setting),
            )  # fmt: skip
        except TrainingStopped:
            return None
    return tally


def _task(config: RunConfig, setting: TrialSetting, *, writable: bool = False) -> Task:
    """Returns the task, on the shared backbone if that is its own; `writable`: on a copy of it."""
    task = make_task(config)
    if setting.backbone is not None and setting.backbone[0] == task.backbone.name:
        shared = setting.backbone[1]
        task.backbone = SharedBackbone(task.backbone, lambda: ray.get(shared), is_shared=not writable)
    return task


def _label(folder: Path, setting: TrialSetting) -> Label:
    search = folder.parents[1]
    within = folder.parent.relative_to(search.parent)
    repeats = f"{folder.name.partition('-seed')[0]} {within}"  # the number first: TensorBoard shows 15 letters
    return Label(f"{within}/{folder.name}", search.parent, search.name, repeats, setting.shown)


def _loader(config: RunConfig, worker: Worker) -> Loader:
    if not config.data.decodes_in_tasks(on_gpu=worker.device != "cpu"):
        return prefetched_batches
    from harma_ray.on_ray.stream import ray_batches

    return ray_batches


def _alone(
    function: Callable[..., ResultT], folder: Path, config: RunConfig, setting: TrialSetting, **more: Any
) -> ResultT:
    """Calls one of the loop's functions for a run of one worker, which is this process."""
    adopt_variables(setting.variables)
    worker = single_worker(config, setting.plan)
    with Run(folder, config).locked(wait_seconds=_LOCK_SECONDS):
        task, label = _task(config, setting), _label(folder, setting)
        return function(task, config, folder, worker=worker, loader=_loader(config, worker), label=label, **more)
