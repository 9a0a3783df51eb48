"""Ray Train's trainer, without what it starts beside the workers that a training here does not use (Ray 2.60).

Each is a process of its own that imports Ray Train: some two seconds of a CPU, in a start that is bound by the CPUs.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

PREEMPTION_VARIABLE = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


class Trainer(DataParallelTrainer):
    """Hands out no data sets: workers read their own, see `harma_ray.on_ray.stream`.

    On a cluster that ends with the training no autoscaler is asked for the workers' places, nobody watches for nodes
    that are reclaimed, and nobody waits to free the places of a controller that has died. Ray Data, which would be told
    of these places, may then submit more tasks at a time than run; the others wait their turn.
    """

    def __init__(self, *arguments: Any, own_cluster: bool, **options: Any):
        """Arguments as Ray Train's.

        Args:
            arguments: Ray Train's.
            own_cluster: Whether the cluster is of this machine and this training alone, and ends with it.
            options: Ray Train's.
        """
        super().__init__(*arguments, **options)
        self._own_cluster = own_cluster

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if self._own_cluster else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if not self._own_cluster:
            return super()._initialize_and_run_controller(**settings)
        settings["scaling_policy"] = _Workers(self.scaling_config)
        with _unless_set(PREEMPTION_VARIABLE, "0"):
            return super()._initialize_and_run_controller(**settings)


@contextlib.contextmanager
def _unless_set(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment for the block, unless the user has."""
    is_ours = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop(name, None)


class _Workers(FixedScalingPolicy):
    """Does not wait for the process that would ask an autoscaler for the workers' places."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Does nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Does nothing."""
