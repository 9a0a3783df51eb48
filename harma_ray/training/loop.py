"""The training loop. It does not know who runs it, and is given a worker's number, a loader of batches and a callback.

What it finds in the run's folder decides where it starts.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from harma_ray.config import RunConfig
from harma_ray.data.identity import data_identity, require_same_data, unknown_data
from harma_ray.data.order import TrainingOrder, planned_order
from harma_ray.data.splits import list_splits, open_split
from harma_ray.data.stream import EvaluationStream, Loader, TrainingStream, Worker
from harma_ray.distributed import barrier, broadcast_object
from harma_ray.errors import UserError
from harma_ray.evaluation import FIGURES, Evaluation
from harma_ray.files import write_text
from harma_ray.parallel import whole_model
from harma_ray.settings import config_hash
from harma_ray.task import Task
from harma_ray.training.checkpoint import (
    CheckpointMeta,
    checkpoint_path,
    list_checkpoints,
    load_start,
    load_state,
    load_weights,
    prune_checkpoints,
    read_meta,
    save_checkpoint,
)
from harma_ray.training.health import health_watch, objective_interval
from harma_ray.training.interruption import StopSignal, TrainingStopped
from harma_ray.training.optim import checked_groups
from harma_ray.training.run_files import REPORT_NAME
from harma_ray.training.sinks import Label, evaluation_curves, step_curves, weight_curves
from harma_ray.training.state import Progress, TrainState
from harma_ray.training.step import (
    Meter,
    autocast_of,
    check_batch,
    evaluate_stream,
    num_batches,
    timed,
    train_step,
    update_weights,
    wrap_model,
)
from harma_ray.training.tracking import Tracker

Callback = Callable[[dict[str, float]], None]
"""Called on every worker after every evaluation with ``epoch``, ``step`` and the metrics."""


def run_training(
    task: Task,
    config: RunConfig,
    run_dir: Path,
    *,
    worker: Worker,
    loader: Loader,
    callback: Callback = lambda metrics: None,
    order: TrainingOrder | None = None,
    label: Label | None = None,
) -> dict[str, Any]:
    """Trains from the run's last checkpoint, or from the start, to the end; evaluates test once, with the best weights.

    Args:
        task: What is trained.
        config: All settings; the run's folder holds them too.
        run_dir: The run's folder, the same for all workers.
        worker: This worker.
        loader: Makes batches of rows.
        callback: Called after every evaluation.
        order: Of the samples, if it is planned already.
        label: What the run is called where it is one of many; None: by its folder.

    Returns:
        The final report, as written to ``report.json``.

    Raises:
        UserError: For what the user can mend.
        TrainingDiverged: If the loss is not finite.
        TrainingStopped: If it was asked to end early; it is saved where it stands.
    """
    with _Training(task, config, run_dir, worker, loader, callback, order, label) as training:
        if not training.resume():
            training.evaluate_and_save()
        training.train()
        return training.finish()


def run_trial(
    task: Task,
    config: RunConfig,
    run_dir: Path,
    *,
    worker: Worker,
    loader: Loader,
    callback: Callback,
    label: Label | None = None,
) -> None:
    """Trains as `run_training` does, but only what a search compares: the selecting split at each evaluation.

    Nothing is evaluated before the first step (adapters start as the identity, so all trials are equal there), nothing
    is drawn, and test is left alone; `finish_training` makes up for the trial that is chosen. Arguments and errors are
    those of `run_training`.
    """
    with _Training(task, config, run_dir, worker, loader, callback, label=label, draw=False) as training:
        if not training.resume() and not training.can_train:
            training.evaluate_and_save()
        training.train()


def finish_training(
    task: Task, config: RunConfig, run_dir: Path, *, worker: Worker, loader: Loader, label: Label | None = None
) -> dict[str, Any]:
    """Ends a run where it stands: evaluates test once, with the best weights so far, and writes ``report.json``.

    Arguments, result and errors are those of `run_training`.
    """
    with _Training(task, config, run_dir, worker, loader, label=label) as training:
        training.resume()
        return training.finish()


class _Training:
    """One worker's part in a run."""

    def __init__(
        self, task: Task, config: RunConfig, run_dir: Path, worker: Worker, loader: Loader,
        callback: Callback = lambda metrics: None, order: TrainingOrder | None = None, label: Label | None = None,
        *, draw: bool = True,
    ):  # fmt: skip
        """Builds everything as it is at step 0; nothing is written yet."""
        check_batch(task, worker.world_size)
        torch.manual_seed(config.seed)  # the same model on every worker
        order = order or planned_order(config)
        started = time.perf_counter()
        self._task, self._config, self._run_dir = task, config, run_dir
        self._worker, self._loader, self._callback, self._draw = worker, loader, callback, draw
        self._order, self._total_steps = order, order.total_steps(config.train)
        data = config.data
        self._selection = EvaluationStream(open_split(data.path, config.selecting_split), data, worker, loader)
        self._device = torch.device(worker.device)
        self._model = task.new_model()
        self._backbone = task.backbone.fingerprint(self._model)
        self._model.to(self._device)
        self._forward = wrap_model(task, self._model, worker)
        self._trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._state = TrainState(checked_groups(task, self._model), config, self._total_steps, worker)
        self._autocast = autocast_of(config.train, self._device)
        self._identity = data_identity(config)
        self._label = label or Label.of(run_dir)
        self._tracker: Tracker | None = None  # worker 0 keeps the record
        self._is_finished = False  # also where it stands, before its last step
        self._build_seconds = time.perf_counter() - started

    def resume(self) -> bool:
        """Goes to the last checkpoint if there is one, and opens the record; returns whether there was one."""
        checkpoints = list_checkpoints(self._run_dir)
        last = broadcast_object(checkpoints[-1] if checkpoints else None)  # a shared disk may show others an older one
        start, model = self._config.started_from, self._model
        notices = load_start(start, model, backbone=self._backbone) if last is None else self._restore(last)
        if self._worker.rank == 0:
            last_step, watch = self._progress.step if last else None, health_watch(self._task, self._total_steps)
            self._tracker = Tracker(self._run_dir, last_step, watch, self._config, self._label)
            self._tracker.log("start", self._progress.step, {}, seconds=round(self._build_seconds, 3))
            for notice in notices:
                self._tracker.log("notice", self._progress.step, {}, text=notice)
        return last is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes the record: as that of a run that is done, or of one that stopped or failed before its end."""
        if self._tracker is not None:
            self._tracker.close(done=error is None and (self._is_finished or not self.can_train))

    @property
    def can_train(self) -> bool:
        """Whether there are steps left to take."""
        return bool(self._trainable) and not self._out_of_patience and self._progress.step < self._total_steps

    def train(self) -> None:
        """Takes the remaining steps, with evaluations and checkpoints, until the end or until patience runs out."""
        train, progress = self._config.train, self._progress
        if not self.can_train:
            return
        rows = self._task.transform(training=True)
        stream = TrainingStream(self._order, rows, self._config.data, self._worker, self._loader)
        meter, parts = Meter(train.global_batch_size, self._worker.world_size), num_batches(self._task)
        epochs, stop = math.ceil(self._total_steps / self._order.steps_per_epoch), StopSignal(self._run_dir)
        with contextlib.closing(stream.steps(progress.step, epochs, parts)) as batches:
            for step_batches in timed(zip(*[batches] * parts, strict=True), meter):
                self._model.train()
                self._task.begin_step(progress.step)
                losses = train_step(self._task, self._forward, step_batches, train, self._autocast)
                grad_norm, rates = update_weights(self._state, self._trainable, losses, self._config.optim)
                meter.count(self._task.amounts(batch) for batch in step_batches)
                if progress.step % train.log_every_steps == 0 or progress.step == 1:
                    self._log_step(losses, grad_norm, rates, meter)
                is_stopped = stop.is_given(progress.step)
                if self._order.is_evaluated_at(progress.step, train):
                    self._end_lap(meter)
                    self.evaluate_and_save()
                    if not self.can_train:
                        return
                    meter.reset()
                elif is_stopped or (train.checkpoint_every_steps and progress.step % train.checkpoint_every_steps == 0):
                    self._end_lap(meter)
                    self._save({})
                if is_stopped:
                    raise TrainingStopped

    def _end_lap(self, meter: Meter) -> None:
        """Waits until all steps are done and known to be finite, and counts their time."""
        self._state.guarded.settle()
        self._progress.seconds += meter.lap()

    def evaluate_and_save(self) -> None:
        """Evaluates on the split that selects the best epoch, writes a checkpoint, and reports."""
        progress, selection = self._progress, self._selection
        started = time.perf_counter()
        evaluation = self._evaluate(selection)
        metrics = self._task.metrics
        value = evaluation.metrics[metrics.objective]
        if progress.best is None or metrics.is_better(metrics.objective, value, progress.best):
            progress.best, progress.best_step, progress.without_improvement = value, progress.step, 0
        else:
            progress.without_improvement += 1
        if self._tracker is not None:
            more: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3)}
            more |= {} if progress.step else objective_interval(evaluation, metrics)
            split = selection.split.name
            curves = evaluation_curves(split, evaluation.metrics, metrics, progress.best)
            self._tracker.log(
                "evaluation",
                progress.step,
                evaluation.metrics,
                curves,
                epoch=self._order.epoch_at(progress.step),
                split=split,
                **more,
            )
            if self._draw and (picture := evaluation.picture(selection.split)) is not None:
                self._tracker.log_image("retrievals", progress.step, picture)
        self._save(evaluation.metrics)
        self._callback({"epoch": self._order.epoch_at(progress.step), "step": progress.step, **evaluation.metrics})

    def finish(self) -> dict[str, Any]:
        """Loads the best weights, evaluates test once, and writes the final report; see `finish_training`."""
        data, selected_on = self._config.data, self._selection.split.name
        best = checkpoint_path(self._run_dir, self._progress.best_step)
        load_weights(best, self._model, backbone=self._backbone)
        selected = self._evaluate(self._selection)
        found = {selected_on: selected.figures()}
        if data.test_split != selected_on and data.test_split in list_splits(data.path):
            test = EvaluationStream(open_split(data.path, data.test_split), data, self._worker, self._loader)
            found[data.test_split] = self._evaluate(test).figures()
        report = self._report(best, found)
        if self._tracker is not None:
            self._tracker.log_results(self._progress.step, report["metrics"], self._task.metrics, curve_of=selected_on)
            if (projection := selected.projection(self._selection.split)) is not None:
                self._tracker.log_embeddings(projection, self._progress.step)
            write_text(self._run_dir / REPORT_NAME, json.dumps(report, indent=1))
        self._is_finished = True
        return report

    @property
    def _progress(self) -> Progress:
        return self._state.progress

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self._config.train.early_stopping_patience <= self._progress.without_improvement

    def _evaluate(self, stream: EvaluationStream) -> Evaluation:
        return evaluate_stream(self._task, self._config, self._model, stream, self._worker)

    def _log_step(self, losses: dict[str, Tensor], grad_norm: Tensor, rates: dict[str, float], meter: Meter) -> None:
        self._state.guarded.settle()
        with whole_model(self._model), torch.no_grad():
            watched = self._task.monitor(self._model)
        measured = meter.read(self._device)
        if self._tracker is None:
            return
        terms = {f"loss_{name}": float(loss) for name, loss in losses.items()}
        values = {"loss": sum(terms.values()), **terms, **rates, "grad_norm": float(grad_norm), **measured}
        step = self._progress.step
        self._tracker.log("step", step, values, step_curves(values), epoch=step / self._order.steps_per_epoch)
        self._tracker.log("monitor", step, watched, weight_curves(watched))

    def _save(self, metrics: dict[str, float]) -> None:
        """Writes a checkpoint with every worker's state, and deletes those that are not kept."""
        config, step = self._config, self._progress.step
        meta = CheckpointMeta(
            step, self._order.epoch_at(step), metrics, self._state.progress_dict(), config_hash(config), config.recipe,
            self._backbone, data=self._identity,
        )  # fmt: skip
        save_checkpoint(self._run_dir, meta, self._model, self._state.state_dict())
        if self._worker.rank == 0:
            prune_checkpoints(self._run_dir, self._task.metrics, config.train.keep_checkpoints)
        barrier()

    def _restore(self, path: Path) -> list[str]:
        """Goes to a checkpoint; returns what the user should know of it, one line each."""
        meta = load_weights(path, self._model, backbone=self._backbone)
        if meta.config_hash != config_hash(self._config):
            raise UserError(
                f"{path} was written with other settings; resume with the run's own config.yaml, or start a new run"
            )
        require_same_data(meta.data, self._config, subject=f"run {self._run_dir}", way_out="start a new run")
        state = load_state(path)
        if not state:
            raise UserError(f"{path} holds weights alone (an import), so there is no training to continue")
        return self._state.load_state_dict(state, meta.progress) + unknown_data(meta.data, self._identity)

    def _report(self, best: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "recipe": self._config.recipe,
            **self._config.started_from.entry,
            "objective": self._task.metrics.objective,
            "selected_on": self._selection.split.name,
            "eval_precision": self._config.train.eval_precision,
            "best_step": self._progress.best_step,
            "best_epoch": read_meta(best).epoch,
            "steps": self._progress.step,
            "planned_steps": self._total_steps,
            "stopped_early": self._out_of_patience,
            "training_seconds": round(self._progress.seconds, 1),
            "trainable_parameters": sum(p.numel() for p in self._trainable),
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "checkpoint": str(best.relative_to(self._run_dir)),
            "checkpoint_bytes": sum(file.stat().st_size for file in best.iterdir()),
            **{key: {split: figures[key] for split, figures in found.items()} for key in FIGURES},
            "data": self._identity,
            "health": [finding.as_record() for finding in self._tracker.findings] if self._tracker else [],
        }
