"""What is checked and planned before anything starts, once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from harma_ray.config import OnDisk, RunConfig
from harma_ray.data.order import TrainingOrder, planned_order
from harma_ray.data.samples import check_decoding
from harma_ray.data.splits import list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import kept_path
from harma_ray.recipes import make_task
from harma_ray.resources import Cluster, WorkerPlan, plan_workers
from harma_ray.settings import build_config, marked_settings
from harma_ray.task import Task
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
        config: Settings; their paths must not depend on the working folder, see `absolute_paths`.
        metrics: Metrics that a search compares, beside the recipe's objective.

    Raises:
        UserError: If they are not, or the splits have other metrics.
    """
    data = config.data
    check_services(config.train.log_to)
    if not data.path:
        raise UserError("no data set is given; use --data FOLDER (made by `launch.py convert`)")
    training = open_split(data.path, data.train_split)
    evaluated = [open_split(data.path, config.selecting_split)]
    notices = []
    if data.test_split not in list_splits(data.path):
        notices.append(f"{data.path} has no split `{data.test_split}`, so nothing is evaluated on it at the end")
    elif data.test_split != evaluated[0].name:
        evaluated.append(open_split(data.path, data.test_split))
    task = make_task(config)
    task.check(training, evaluated, metrics)
    for is_training in (True, False):
        check_decoding(task.transform(training=is_training), data)
    return Prepared(config, task, planned_order(config), tuple(notices))


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns settings whose paths do not depend on the working folder.

    Raises:
        UserError: If one leads into the copy of a working folder that a Ray job runs in.
    """
    changes: dict[str, Any] = {}
    if config.data.path:
        changes["data.path"] = str(kept_path(config.data.path, "the data set"))
    for name, (value, mark) in marked_settings(config, OnDisk).items():
        has_suffix = bool(Path(value).suffix)  # no tag of open_clip's has one
        if value and (has_suffix or mark.is_there(Path(value).expanduser())):
            path = kept_path(value, f"`{name}`")
            if mark.is_there(path):
                changes[name] = str(path)
    return build_config(config, changes)
