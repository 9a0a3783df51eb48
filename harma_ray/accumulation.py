"""Exact gradient accumulation for losses that compare every sample with every other.

Cutting a batch of a contrastive loss into parts would cut its negatives. Here the model runs twice: first over all
parts without a graph, to get all outputs; the loss and its gradient with respect to the outputs follow; then each part
runs again with a graph and is given its share of that gradient. Source: Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup" (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class PartialForward:
    """Stands for a model in `Task.losses`; runs it over parts of the batch.

    Call it once, compute the loss from its outputs, call ``backward`` on the loss, then `backward` here. What layers
    draw at random (dropout) is drawn alike both times.
    """

    def __init__(self, model: nn.Module, num_parts: int):
        """Wraps a model.

        Args:
            model: Called with tensors only; outputs have the batch as first dimension, or are scalars.
            num_parts: Parts of a batch; the last may be smaller.
        """
        self._model, self._num_parts = model, num_parts

    def __call__(self, *args: Tensor) -> dict[str, Tensor]:
        """Returns the outputs of the whole batch as leaves that collect gradients."""
        self._parts = list(zip(*(arg.chunk(self._num_parts) for arg in args), strict=True))
        self._random_states, parts = [], []
        with torch.no_grad():
            for part in self._parts:
                self._random_states.append(_random_state(part))
                parts.append(self._model(*part))
        self._outputs = {
            name: (torch.cat([part[name] for part in parts]) if value.ndim else value.detach().clone()).requires_grad_()
            for name, value in parts[0].items()
        }
        return self._outputs

    def backward(self, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        """Carries the gradients of the outputs on to the parameters.

        Args:
            autocast: The context that the first pass ran in.
        """
        start, after = 0, _random_state(self._parts[0])
        for number, part in enumerate(self._parts):
            _set_random_state(part, self._random_states[number])
            last = number == len(self._parts) - 1
            stop = start + len(part[0])
            hold = isinstance(self._model, DistributedDataParallel) and not last
            quiet: Any = self._model.no_sync if hold else contextlib.nullcontext  # DDP averages after the last part
            with quiet():
                with autocast():
                    outputs = self._model(*part)
                pairs = []
                for name, output in outputs.items():
                    grad = self._outputs[name].grad
                    if not output.requires_grad:
                        continue
                    grad = torch.zeros_like(self._outputs[name]) if grad is None else grad
                    pairs.append((output, grad[start:stop] if output.ndim else grad * last))
                torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
            start = stop
        _set_random_state(self._parts[0], after)


def _random_state(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns the state of the CPU's generator, and of the GPU's that tensors are on, if they are."""
    device = tensors[0].device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(tensors: Sequence[Tensor], state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], tensors[0].device)
