"""Collectives that also work without a process group.

A process that never called ``torch.distributed.init_process_group`` is a world of one: every function here then
returns at once with its own input. With a group, every rank must call the same functions in the same order; gloo and
nccl both work, and a tensor on a device that the group cannot carry is moved there and back.

Shape letters: W ranks, B rows on one rank.
"""

import zlib
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number in the group, ``0 <= rank < world_size()``; 0 without a group."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if _has_group() else 1


def gather_with_gradient(x: Tensor) -> Tensor:
    """Gather equally many rows from every rank, and let gradients flow back to the ranks they came from.

    The convention for losses over gathered features: every rank computes the whole global loss from the gathered
    rows. The backward pass here SUMS over the ranks the gradients with respect to this rank's rows. With W ranks that
    hold the same loss this is W times the loss's gradient, and the averaging of ``DistributedDataParallel`` divides
    by W again, so that the parameter gradients are exactly those of one worker with a batch of W x B rows. A
    parameter used after the gather (a temperature) needs no such care: its gradient is the same on every rank.

    The backward pass is a collective too: the result must reach the loss on every rank, or on none.

    Args:
        x: [B, ...], any dtype; same B, trailing shape and dtype on every rank, which are compared first. Half-precision
            gradients are summed in float32.

    Returns:
        [W*B, ...], rows in rank order, on ``x``'s device; ``x`` itself in a world of one.

    Raises:
        ValueError: The shapes or dtypes of the ranks differ (raised on every rank).
    """
    _require_rows(x, "gather_with_gradient")
    if world_size() == 1:
        return x
    counts = _row_counts(x, "gather_with_gradient")
    if len(set(counts)) > 1:
        raise ValueError(
            f"gather_with_gradient needs as many rows on every rank, got {counts} (in rank order); "
            "drop the last incomplete batch, or use gather_rows where no gradient is needed."
        )
    return _GatherWithGradient.apply(x)


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, which may be unequally many, without a gradient.

    For evaluation: embeddings and ids of a split that does not divide evenly over the ranks. Values arrive bit by bit
    as they were sent.

    Args:
        x: [B_r, ...], any dtype; B_r may differ by rank and may be 0, trailing shape and dtype may not differ.

    Returns:
        [sum of B_r, ...], rows in rank order, on ``x``'s device; detached. In a world of one, ``x`` detached.

    Raises:
        ValueError: Trailing shapes or dtypes differ between the ranks (raised on every rank).
    """
    _require_rows(x, "gather_rows")
    if world_size() == 1:
        return x.detach()
    counts = _row_counts(x, "gather_rows")
    longest = max(counts)
    if longest == 0:
        return x.detach().clone()
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = _all_gather_equal(padded).view(len(counts), longest, *x.shape[1:])
    return torch.cat([rows[:count] for rows, count in zip(gathered.unbind(0), counts, strict=True)])


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors of one shape, detached, on ``x``'s device."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().to(_device_for(x), copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def barrier() -> None:
    """Wait, on the host, until every rank has come here."""
    # Not dist.barrier: with nccl and no bound device it warns and may pick another rank's GPU.
    sum_over_ranks(torch.zeros(1))


def broadcast_object(value: T) -> T:
    """Return rank 0's value, any object that can be pickled, on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


class _GatherWithGradient(torch.autograd.Function):
    """All-gather forward, sum over the ranks backward.

    ``torch.distributed.nn.functional.all_gather`` does the same but is deprecated, and its successor is private.
    The backward pass reduces all W*B rows and keeps B: every backend has an all-reduce, not every one a
    reduce-scatter, and the embeddings of a global batch are about a megabyte.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _all_gather_equal(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A copy, since autograd may hand the same tensor to others and the reduction works in place.
        total = grad.to(
            _device_for(grad),
            torch.promote_types(grad.dtype, torch.float32),
            copy=True,
            memory_format=torch.contiguous_format,
        )
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        start = rank() * ctx.num_rows
        return total[start : start + ctx.num_rows].to(grad.device, grad.dtype)


def _require_rows(x: Tensor, function: str) -> None:
    if x.ndim == 0:
        raise ValueError(f"{function} needs a tensor of at least one dimension [rows, ...], got a scalar.")


def _group_device() -> torch.device:
    """Return the device whose tensors the group can carry: the CPU where it can, else this process's GPU."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _device_for(x: Tensor) -> torch.device:
    return x.device if f"{x.device.type}:" in dist.get_backend_config() else _group_device()


def _row_counts(x: Tensor, what: str) -> list[int]:
    """Return every rank's number of rows, after checking that the ranks agree on ``what``, trailing shape and dtype."""
    description = f"{what}, {x.dtype}, trailing shape {tuple(x.shape[1:])}"
    mine = torch.tensor([x.shape[0], zlib.crc32(description.encode())], dtype=torch.int64, device=_group_device())
    everyone = _all_gather_equal(mine).view(-1, 2).tolist()
    if len({checksum for _, checksum in everyone}) > 1:
        different = [number for number, (_, checksum) in enumerate(everyone) if checksum != everyone[rank()][1]]
        raise ValueError(
            f"All ranks must make the same collective call; rank {rank()} makes: {description}; "
            f"a different one is made by rank(s) {different}."
        )
    return [count for count, _ in everyone]


def _all_gather_equal(x: Tensor) -> Tensor:
    """Gather tensors of equal shape to [W*B, ...] on ``x``'s device, without a gradient.

    Rows travel as bytes, because no backend carries every dtype.
    """
    size = world_size()
    result = torch.empty((size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=_device_for(x))
    if result.numel():
        payload = x.detach().to(result.device).contiguous().view(-1).view(torch.uint8)
        dist.all_gather(list(result.view(-1).view(torch.uint8).view(size, -1).unbind(0)), payload)
    return result.to(x.device)
