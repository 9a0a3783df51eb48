"""What is checked and planned before anything starts, once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from harma_ray.config import OnDisk, RunConfig
from harma_ray.data.order import TrainingOrder, planned_order
from harma_ray.data.splits import open_used
from harma_ray.errors import UserError, count, first_few
from harma_ray.models.fingerprints import file_fingerprint
from harma_ray.recipes import make_task
from harma_ray.resources import Cluster, WorkerPlan, plan_workers
from harma_ray.runs import Run, open_run
from harma_ray.settings import flat_settings, marked_settings, to_dict
from harma_ray.task import Task
from harma_ray.training.checkpoint import WEIGHTS_NAME, keeps_weights, trainable_tensors
from harma_ray.training.run_files import read_meta
from harma_ray.training.services import check_services
from harma_ray.training.step import check_batch


@dataclass(frozen=True)
class Prepared:
    """A training that was checked and planned: what the terminal announces and the workers do."""

    config: RunConfig
    """Its settings."""
    task: Task
    order: TrainingOrder
    """Of the samples."""
    notices: tuple[str, ...]
    """What the user should know."""
    workers: WorkerPlan | None = None
    """None until it is known where it runs."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.order.total_steps(self.config.train)

    def on(self, cluster: Cluster) -> Self:
        """Divides a cluster among its workers.

        Raises:
            UserError: If they do not fit, or cannot share a batch.
        """
        workers = plan_workers(self.config, cluster)
        check_batch(self.task, workers.num_workers)
        return replace(self, workers=workers)


def prepare(config: RunConfig, metrics: Sequence[str] = ()) -> Prepared:
    """Checks that the splits are there and the model can be described, and plans the order of the samples.

    Args:
        config: Settings; their paths must not depend on the working folder, see `harma_ray.runs.absolute_paths`.
        metrics: Metrics that a search compares, beside the recipe's objective.

    Raises:
        UserError: If they are not, or the splits have other metrics.
    """
    check_services(config.train.log_to)
    training, evaluated, notices = open_used(config)
    task = make_task(config)
    task.check(training, evaluated, metrics)
    order, later = planned_order(config), config.next_stage
    if later and order.num_samples < later.train.global_batch_size:
        notices.append(
            f"the next stage, {later.recipe}, has batches of {later.train.global_batch_size}, but {training.path} has "
            f"{count(order.num_samples, training.kind.sample)} an epoch: give it --set "
            f"train.global_batch_size={order.num_samples} or less"
        )
    return Prepared(config, task, order, tuple(notices))


def starting_from(run: Run, config: RunConfig, metric: str | None, *, adopts: bool) -> dict[str, Any]:
    """Returns the settings by which a new run starts from the best weights of another.

    Args:
        run: The other one, finished or imported.
        config: The new run's settings so far; what they leave empty of the model is the other run's.
        metric: What its weights are the best by; None = the run's objective.
        adopts: Whether all of the model is the other run's, if both are of one recipe.

    Raises:
        UserError: If the other one is of another kind of recipe, is not finished, or has no such weights.
    """
    run.require_related(config)
    best = run.best_start(metric)
    theirs, ours = _model_settings(run.config), _model_settings(config)
    adopts = adopts and run.config.recipe == config.recipe
    return {
        **{name: value for name, value in theirs.items() if adopts or ours[name] == ""},
        "started_from.run": str(run.path),
        "started_from.checkpoint": best.name,
        "started_from.weights": file_fingerprint(best / WEIGHTS_NAME),
    }


def require_start(config: RunConfig) -> None:
    """Checks that a new run can start from the weights that its settings name, if they do.

    Raises:
        UserError: If these are not there, or are those of another model; it names the settings that differ.
    """
    start = config.started_from
    if not start.weights:
        return
    run, meta = open_run(start.run), read_meta(start.path)
    task, known = make_task(config), _model_settings(run.config)
    places = marked_settings(config, OnDisk)  # what lies elsewhere now may be the same
    wrong = [
        f"`{name}` must be {known[name]}, as there, got {value}"
        for name, value in _model_settings(config).items()
        if name not in places and value != known.get(name)
    ]
    model = task.build_model(task.backbone.outline())
    trained = {name: list(tensor.shape) for name, tensor in trainable_tensors(model).items()}
    theirs, ours = run.task.backbone.name, task.backbone.name
    is_moved = any(mark.is_there(Path(value)) for value, mark in places.values() if value)
    if not wrong and keeps_weights(model) and theirs != ours and not is_moved:
        wrong = [f"what stays frozen must be {theirs}, as there, got {ours}"]
    if not wrong and trained != meta.trainable:
        others = sorted(trained.keys() ^ meta.trainable.keys()) or ["of other sizes"]
        wrong = [f"other weights are trained there ({first_few(others)})"]
    if wrong:
        raise UserError(f"the new run cannot start from the weights of {run.path}: {'; '.join(wrong)}")


def _model_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that `Task.model_settings` names."""
    flat, named = flat_settings(to_dict(config)), make_task(config).model_settings
    return {name: value for name, value in flat.items() if any(f"{name}.".startswith(f"{part}.") for part in named)}
