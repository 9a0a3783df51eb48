"""Captions of unequal lengths one after another, without their padding.

Shape letters: B captions, L tokens of the longest, T tokens of all, D features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Packing:
    """Where the tokens of packed captions are in the padded batch.

    Args:
        lengths: int64 (B,), 1 or more; on the CPU, so that nobody waits for a GPU.
        device: of the features.

    Attributes:
        ends: int64 (B,), of the packed tokens each caption's last.
        visible: bool (B, 1, 1, L), false where a key is padding.
        num_tokens: T.
    """

    def __init__(self, lengths: Tensor, device: torch.device):
        kept = torch.arange(int(lengths.max())) < lengths[:, None]
        self.num_tokens = int(lengths.sum())
        self.ends = (lengths.cumsum(0) - 1).to(device, non_blocking=True)
        self.visible = kept[:, None, None].to(device, non_blocking=True)
        self._shape = kept.shape
        self._places = kept.flatten().nonzero()[:, 0].to(device, non_blocking=True)

    def pack(self, x_BLD: Tensor) -> Tensor:
        """Return the tokens alone, (T, D)."""
        return _Pack.apply(x_BLD.flatten(0, 1), self._places)

    def spread(self, x_TD: Tensor) -> Tensor:
        """Return the padded batch, (B, L, D), 0 where there is no token."""
        batch, length = self._shape
        return _Spread.apply(x_TD, self._places, batch * length).unflatten(0, (batch, length))


class _Pack(torch.autograd.Function):
    """Some rows; each at most once, so that their gradients are put back and not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, places, grad), None


class _Spread(torch.autograd.Function):
    """Rows at their places among zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None
