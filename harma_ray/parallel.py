"""A model over several workers: whole on each of them (DDP), or a part of every parameter on each (FSDP2)."""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harma_ray.distributed import rank
from harma_ray.errors import UserError, first_few

if TYPE_CHECKING:  # importing them takes half as long as importing torch, and few models are spread
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

KeyT = TypeVar("KeyT")


def replicate(model: nn.Module, device: str) -> nn.Module:
    """Returns a model that averages its gradients over the workers, each of which holds all of it."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    # Buffers are constants and frozen statistics, the same on every worker: nothing to send in each step.
    replica: Any = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    if device == "cpu":
        replica.register_comm_hook(None, _mean_in_rank_order)
    return replica


def shard(model: nn.Module, modules: Iterable[nn.Module], device: str) -> nn.Module:
    """Spreads the parameters of a model over the workers, in place, and returns it.

    Args:
        model: The model, the same on every worker.
        modules: Its parts that are put together one at a time in a step, such as its layers; the rest is one more.
        device: Where the model is.

    Raises:
        UserError: If a parameter has no dimension along which it could be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
    if scalars:
        raise UserError(
            "a model that is spread over workers needs parameters with a dimension, which these have not: "
            f"{first_few(scalars)}; give them the shape [1]"
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in modules:
        fully_shard(module, mesh=mesh)
    root: Any = fully_shard(model, mesh=mesh)
    root._get_fsdp_state()._lazy_init()  # or no part of it could be called before it was called itself
    return model


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Says whether a tensor is spread over the workers."""
    return _is_a("torch.distributed.tensor", "DTensor", tensor)


def is_shard(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Says whether a module's parameters are spread over the workers, and are put together when it is called."""
    return _is_a("torch.distributed.fsdp", "FSDPModule", module)


def _is_a(module: str, name: str, value: object) -> bool:
    """Says whether a value is of a class of a module that may not have been imported: then nothing is."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(value, known)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be spread over the workers as every worker can use it; called on all of them."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def gather_tensors(tensors: Mapping[KeyT, Tensor]) -> dict[KeyT, Tensor]:
    """Returns tensors that may be spread over the workers, whole and on CPU, on worker 0; on the others nothing.

    Called on all of them; one tensor at a time is whole on their devices.
    """
    gathered: dict[KeyT, Tensor] = {}
    for key, tensor in tensors.items():
        found = whole(tensor.detach())
        if rank() == 0:
            gathered[key] = found.cpu()
    return gathered


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this worker's part of a tensor that all workers have, if `like` is spread over them; nothing is sent."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Puts a model together on every worker, so that each may call it as often as it needs to; without gradients."""
    parts = [module for module in model.modules() if is_shard(module)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@contextlib.contextmanager
def holding_gradients(model: nn.Module) -> Iterator[None]:
    """Adds gradients up on each worker; they are averaged over the workers by the first step outside of it."""
    if is_shard(model):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
            yield


def _mean_in_rank_order(state, bucket):  # DDP does not know annotations that are strings
    """Averages gradients over the workers, adding them by rank.

    An all-reduce adds those of three or more workers in an order that depends on where a gradient lies in its bucket,
    and DDP fills its buckets anew after its first step: a resumed run would differ in the last bit.
    """
    own = bucket.buffer()
    parts = own.new_empty((dist.get_world_size(), len(own)))
    dist.all_gather(list(parts.unbind()), own)
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(functools.reduce(torch.add, parts.unbind()).div_(len(parts)))
    return mean
