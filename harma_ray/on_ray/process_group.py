"""Torch's process group on Ray Train's workers, set up by a controller that does not import torch (Ray 2.60).

What Ray's own ``TorchConfig`` does for workers of torch on CPUs or CUDA that meet by variables of their environment;
importing it costs the controller some two seconds of a CPU before it asks for the first worker.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
from ray._common.utils import env_integer
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port, update_env_vars
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.util import TrainingFramework

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroup(BackendConfig):
    """How the workers of a training are connected."""

    backend: Literal["gloo", "nccl"]
    """Torch's backend."""
    timeout_s: int
    """Seconds after which an operation of the group fails."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What connects them."""
        return _Connection

    @property
    def train_func_context(self) -> Any:
        """What a worker's function runs in: Ray's own, with the worker's GPU as the current one. The driver asks."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        """What Ray's dashboard names."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Returns what Ray's dashboard shows."""
        return asdict(self)


class _Connection(Backend):
    share_cuda_visible_devices = True  # as NCCL needs them to reach a neighbour's memory

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Connects the workers, which meet at the first one."""
        assert isinstance(backend_config, ProcessGroup)
        host, port = worker_group.execute_single(0, get_address_and_port)
        world_size = len(worker_group)
        worker_group.execute(update_env_vars, {"MASTER_ADDR": host, "MASTER_PORT": port})
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _connect, backend_config.backend, rank, world_size, backend_config.timeout_s
                )
                for rank in range(world_size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Disconnects the workers; those that take too long are ended as they are."""
        seconds = env_integer(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        left = worker_group.execute_async(_disconnect, len(worker_group) > 1)
        try:
            ray.get(left, timeout=seconds)
        except GetTimeoutError:
            _logger.warning("the workers did not leave their process group within %d s", seconds)


def _connect(backend: str, rank: int, world_size: int, timeout_s: int) -> None:
    """Joins the group, by Ray's own function, which imports torch; in a worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world_size, "env://", timeout_s)


def _disconnect(is_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=is_group)
