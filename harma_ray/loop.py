"""The training loop: read it top to bottom. It does not know who runs it.

It is given its place among the workers, a reader for its streams, and a reporter that hears every evaluation: Ray
Train, a Ray Tune trial, or nobody. What it finds in the run's folder decides where it starts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harma_ray.checkpoint import (
    CheckpointMeta,
    checkpoint_path,
    list_checkpoints,
    load_state,
    load_weights,
    prune_checkpoints,
    read_meta,
    save_checkpoint,
)
from harma_ray.config import RunConfig, config_hash, to_dict
from harma_ray.data.order import training_order
from harma_ray.data.schema import list_splits, open_split
from harma_ray.data.stream import EvaluationStream, Place, Reader, TrainingStream
from harma_ray.distributed import barrier, gather_rows
from harma_ray.engine import Meter, autocast_of, timed, train_step, wrap_model
from harma_ray.errors import UserError
from harma_ray.models.weights import backbone_fingerprint
from harma_ray.optim import build_optimizer, build_schedule
from harma_ray.task import Evaluation, Task
from harma_ray.tracking import Tracker

REPORT_NAME = "report.json"
Reporter = Callable[[dict[str, float]], None]
"""Called on every worker after every evaluation with ``epoch``, ``step`` and the metrics."""


class TrainingDiverged(UserError):
    """The loss is not a finite number any more."""


@dataclass
class Progress:
    """The loop's own state, saved with every checkpoint."""

    step: int = 0
    """Optimiser steps done."""
    best: float = -math.inf
    """Best value of the objective."""
    best_step: int = 0
    """Where it was reached."""
    without_improvement: int = 0
    """Evaluations since."""
    seconds: float = 0.0
    """Time spent in training steps, over all attempts."""


def run_training(
    task: Task,
    config: RunConfig,
    run_dir: Path,
    *,
    place: Place,
    reader: Reader,
    reporter: Reporter = lambda metrics: None,
) -> dict[str, Any]:
    """Trains from the run's last checkpoint, or from the start, to the end; evaluates test once, with the best weights.

    Args:
        task: What is trained.
        config: All settings; the run's folder holds them too.
        run_dir: The run's folder, the same for all workers.
        place: This worker.
        reader: Who reads the shards.
        reporter: Hears of every evaluation.

    Returns:
        The final report, as written to ``report.json``.

    Raises:
        UserError: For what the user can mend.
        TrainingDiverged: If the loss is not finite.
    """
    with contextlib.ExitStack() as at_exit:
        return _run(task, config, run_dir, place, reader, reporter, at_exit)


def _run(
    task: Task, config: RunConfig, run_dir: Path, place: Place, reader: Reader, reporter: Reporter,
    at_exit: contextlib.ExitStack,
) -> dict[str, Any]:  # fmt: skip
    train, data = config.train, config.data
    _check_batch(config, place.world_size)
    torch.manual_seed(config.seed)
    order = training_order(
        open_split(data.path, data.train_split),
        seed=config.seed,
        global_batch_size=train.global_batch_size,
        shuffle_window_mb=data.shuffle_window_mb,
    )
    total_steps = order.steps_per_epoch * train.epochs
    selection_split = data.val_split if train.select_on == "val" else data.test_split
    selection = EvaluationStream(open_split(data.path, selection_split), data, place, reader)

    device = torch.device(place.device)
    model = task.build_model()
    backbone = backbone_fingerprint(model)
    model.to(device)
    optimizer = build_optimizer(model, config.optim, device)
    schedule = build_schedule(optimizer, config.optim, total_steps)
    progress = Progress()
    checkpoints = list_checkpoints(run_dir)
    if checkpoints:
        _restore(checkpoints[-1], model, backbone, optimizer, schedule, progress, config, place.rank)
    tracker = None
    if place.rank == 0:
        tracker = Tracker(run_dir, start_step=progress.step)
        at_exit.callback(tracker.close)
    forward = wrap_model(model, train, place)
    autocast = autocast_of(train, device)

    def save(epoch: float, metrics: dict[str, float]) -> None:
        rng = gather_rows(torch.get_rng_state()[None].to(device)).cpu()
        cuda_rng = (
            gather_rows(torch.cuda.get_rng_state(device)[None].to(device)).cpu() if device.type == "cuda" else None
        )
        if tracker is not None:
            meta = CheckpointMeta(
                progress.step, epoch, metrics, asdict(progress), config_hash(config), config.recipe, backbone
            )
            state = {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": rng,
                "cuda_rng": cuda_rng,
            }
            save_checkpoint(run_dir, meta, model, state)
            prune_checkpoints(run_dir, task.objective, train.keep_checkpoints)
        barrier()

    def evaluate(stream: EvaluationStream) -> Evaluation:
        model.eval()
        with torch.no_grad(), autocast():
            return task.evaluate(model, stream)

    def evaluate_and_save(epoch: int) -> bool:
        """Evaluates on the selection split; returns whether patience has run out."""
        started = time.perf_counter()
        evaluation = evaluate(selection)
        value = evaluation.metrics[task.objective]
        if value > progress.best:
            progress.best, progress.best_step, progress.without_improvement = value, progress.step, 0
        else:
            progress.without_improvement += 1
        if tracker is not None:
            tracker.log("evaluation", progress.step, evaluation.metrics, prefix=f"{selection.split.name}/", epoch=epoch,
                        split=selection.split.name, seconds=round(time.perf_counter() - started, 3))  # fmt: skip
            tracker.log("monitor", progress.step, task.monitor(model), prefix="model/", epoch=epoch)
            picture = task.picture(evaluation, selection.split)
            if picture is not None:
                tracker.log_image("retrievals", progress.step, picture)
        save(epoch, evaluation.metrics)
        reporter({"epoch": epoch, "step": progress.step, **evaluation.metrics})
        return 0 < train.early_stopping_patience <= progress.without_improvement

    stopped = 0 < train.early_stopping_patience <= progress.without_improvement
    if not checkpoints:
        evaluate_and_save(0)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trainable and not stopped and progress.step < total_steps:
        stream = TrainingStream(order, task.transform(training=True), data, place, reader)
        batches = stream.steps(progress.step, train.epochs)
        at_exit.callback(batches.close)
        meter = Meter(train.global_batch_size)
        for batch in timed(batches, meter):
            model.train()
            terms = train_step(task, forward, batch, train, autocast)
            loss_values = {name: float(term) for name, term in terms.items()}
            if not all(map(math.isfinite, loss_values.values())):
                raise TrainingDiverged(_diverged(loss_values, progress.step + 1, place.rank))
            limit = config.optim.clip_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            meter.count()
            epoch, rest = divmod(progress.step, order.steps_per_epoch)
            if tracker is not None and (progress.step % train.log_every_steps == 0 or progress.step == 1):
                values = {
                    "loss": sum(loss_values.values()),
                    **{f"loss_{name}": value for name, value in loss_values.items()},
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    **meter.read(device),
                }
                tracker.log("step", progress.step, values, prefix="train/", epoch=progress.step / order.steps_per_epoch)
            if rest == 0 and (epoch % train.eval_every_epochs == 0 or epoch == train.epochs):
                progress.seconds += meter.lap()
                if evaluate_and_save(epoch):
                    stopped = True
                    break
                meter.reset()
            elif train.checkpoint_every_steps and progress.step % train.checkpoint_every_steps == 0:
                save(progress.step / order.steps_per_epoch, {})

    return _finish(task, config, run_dir, model, backbone, progress, selection, evaluate, place, reader, tracker,
                   stopped, total_steps)  # fmt: skip


def _finish(
    task: Task, config: RunConfig, run_dir: Path, model: nn.Module, backbone: str, progress: Progress,
    selection: EvaluationStream, evaluate: Callable[[EvaluationStream], Evaluation], place: Place, reader: Reader,
    tracker: Tracker | None, stopped: bool, total_steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Loads the best weights, evaluates test once, and writes the final report."""
    data = config.data
    best_path = checkpoint_path(run_dir, progress.best_step)
    load_weights(best_path, model, backbone=backbone)
    selected = evaluate(selection)
    results = {selection.split.name: selected.metrics}
    if data.test_split != selection.split.name and data.test_split in list_splits(data.path):
        test = EvaluationStream(open_split(data.path, data.test_split), data, place, reader)
        results[data.test_split] = evaluate(test).metrics
    parameters = list(model.parameters())
    report = {
        "recipe": config.recipe,
        "objective": task.objective,
        "selected_on": selection.split.name,
        "best_step": progress.best_step,
        "best_epoch": read_meta(best_path).epoch,
        "steps": progress.step,
        "planned_steps": total_steps,
        "stopped_early": stopped,
        "training_seconds": round(progress.seconds, 1),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "checkpoint": str(best_path.relative_to(run_dir)),
        "checkpoint_bytes": sum(file.stat().st_size for file in best_path.iterdir()),
        "metrics": results,
    }
    if tracker is not None:
        for split, metrics in results.items():
            tracker.log("final", progress.step, metrics, prefix=f"final_{split}/", split=split)
        tracker.log_hparams(
            flat_settings(config), {f"{split}_{k}": v for split, m in results.items() for k, v in m.items()}
        )
        projection = task.projection(selected, selection.split)
        if projection is not None:
            tracker.log_embeddings(projection, progress.step)
        partial = run_dir / f".{REPORT_NAME}.partial"
        partial.write_text(json.dumps(report, indent=1))
        os.replace(partial, run_dir / REPORT_NAME)
    return report


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings with dotted keys."""

    def flatten(raw: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in raw.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(flatten(to_dict(config), ""))


def _check_batch(config: RunConfig, world_size: int) -> None:
    size = config.train.global_batch_size
    if size % world_size:
        low = size - size % world_size
        raise UserError(
            f"`train.global_batch_size` must divide by the number of workers, got {size} and {world_size}; "
            f"use {low or world_size} or {low + world_size}"
        )
    if config.train.accumulation > size // world_size:
        raise UserError(
            f"`train.accumulation` must not exceed a worker's share of the batch, got {config.train.accumulation} and "
            f"{size // world_size}"
        )


def _restore(
    path: Path, model: nn.Module, backbone: str, optimizer: torch.optim.Optimizer, schedule: Any, progress: Progress,
    config: RunConfig, rank: int,
) -> None:  # fmt: skip
    meta = load_weights(path, model, backbone=backbone)
    if meta.config_hash != config_hash(config):
        raise UserError(
            f"{path} was written with other settings; resume with the run's own config.yaml, or start a new run"
        )
    state = load_state(path)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    for entry in fields(Progress):
        setattr(progress, entry.name, meta.progress[entry.name])
    if rank < len(state["rng"]):
        torch.set_rng_state(state["rng"][rank])
        if state["cuda_rng"] is not None and torch.cuda.is_available() and rank < len(state["cuda_rng"]):
            torch.cuda.set_rng_state(state["cuda_rng"][rank])


def _diverged(terms: dict[str, float], step: int, rank: int) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in terms.items())
    return (
        f"the loss is not finite at step {step} on worker {rank} ({listed}); lower optim.learning_rate, set "
        "optim.clip_grad_norm, or train in fp32, and resume from the last checkpoint"
    )
