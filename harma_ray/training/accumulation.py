"""Exact gradient accumulation: of losses that are means over samples, and of those that compare every pair of samples.

Cutting a batch of a contrastive loss into parts would cut its negatives. Here the model runs twice: first over all
parts without a graph, to get all outputs; the loss and its gradient with respect to the outputs follow; then each part
runs again with a graph and is given its share of that gradient. Source: Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup" (GradCache, arXiv 2101.06983).
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harma_ray.data.samples import Batch
from harma_ray.distributed import sum_over_ranks, world_size
from harma_ray.errors import UserError
from harma_ray.parallel import holding_gradients, is_shard
from harma_ray.task import Task

_TOLERANCE = 1e-5
"""How far, in parts of its size, two computations of one function of the parameters may be apart on a GPU."""

Slope = list[Tensor | None]
"""Gradients by all trained parameters; None: does not depend on it."""


def summed_step(
    task: Task, model: nn.Module, parts: Sequence[Batch], autocast: Callable[[], contextlib.AbstractContextManager]
) -> dict[str, Tensor]:
    """Leaves the gradient of the whole global batch on the parameters, of a loss that is a mean over what it counts.

    Args:
        task: Its `counted` weighs the parts; its `accumulation` is ``summed``.
        model: What a step calls; it averages gradients over the workers.
        parts: This worker's share of the batch.
        autocast: The context of the forward passes.

    Returns:
        The terms of the loss of the whole global batch.
    """
    device = next(model.parameters()).device  # where workers add up, though tokens are counted on the CPU
    counts = torch.stack([task.counted(part) for part in parts]).float().to(device, non_blocking=True)
    shares = counts / sum_over_ranks(counts.sum()).clamp(min=1)  # 0 in a batch that counts nothing
    sums: dict[str, Tensor] = {}
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        with contextlib.nullcontext() if number == len(parts) - 1 else holding_gradients(model):
            with autocast():
                terms = task.losses(model, part)
            terms = {name: term * share for name, term in terms.items()}
            (torch.stack(list(terms.values())).sum() * world_size()).backward()
        sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
    whole = sum_over_ranks(torch.stack(list(sums.values())))
    return dict(zip(sums, whole, strict=True))


class PartialForward:
    """Stands for a model in `Task.losses`; runs it over parts of the batch.

    Call it once, compute the loss from its outputs, call ``backward`` on the loss, then `backward` here. What layers
    draw at random (dropout) is drawn alike both times.

    Every output has a row for each sample of the batch, or is a scalar that depends on the parameters alone, such as
    a temperature: the first part's value then stands for all. Of a scalar that depends on the samples (a mean over
    the batch, an auxiliary loss) no single part knows the value, so it is refused, by its values and by its gradients
    (it may be 0 in every part at the start of a training and still pull on the parameters).
    """

    def __init__(self, model: nn.Module, num_parts: int, num_samples: int):
        """Wraps a model.

        Args:
            model: Called with tensors only, each of which has a row for each sample.
            num_parts: Parts of a batch; the last may be smaller.
            num_samples: Samples of a batch.
        """
        self._model, self._num_parts, self._num_samples = model, num_parts, num_samples

    def __call__(self, *args: Tensor) -> dict[str, Tensor]:
        """Returns the outputs of the whole batch as leaves that collect gradients.

        Raises:
            UserError: If an argument cannot be cut into parts, or an output is not of the two kinds that can be put
                together from them.
        """
        for arg in args:
            if not arg.ndim or len(arg) != self._num_samples:
                raise UserError(
                    "`train.accumulation` above 1 needs a row for each sample in what the model is called with, got "
                    f"shape {tuple(arg.shape)} for {self._num_samples} samples; use train.accumulation=1"
                )
        self._parts = list(zip(*(arg.chunk(self._num_parts) for arg in args), strict=True))
        self._random_states, parts = [], []
        with torch.no_grad():
            for part in self._parts:
                self._random_states.append(_random_state(part))
                parts.append(self._model(*part))
        self._outputs = {name: self._join(name, [part[name] for part in parts]) for name in parts[0]}
        return self._outputs

    def _join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Returns an output of the whole batch, which collects gradients."""
        if not values[0].ndim:
            if is_shard(self._model):
                raise UserError(
                    "`train.accumulation` above 1 needs a row for each sample in all outputs of a model that is spread "
                    f"over the workers, got the scalar `{name}`; expand it to the samples, or use train.accumulation=1"
                )
            _require_same(name, "values", [_differs(value, values[0]) for value in values[1:]])
            return values[0].detach().clone().requires_grad_()
        for value, part in zip(values, self._parts, strict=True):
            if len(value) != len(part[0]):
                raise UserError(
                    f"`train.accumulation` above 1 needs a row for each sample in the model's output `{name}`, got "
                    f"shape {tuple(value.shape)} for {len(part[0])} samples; use train.accumulation=1"
                )
        return torch.cat(list(values)).requires_grad_()

    def backward(self, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        """Carries the gradients of the outputs on to the parameters.

        Args:
            autocast: The context that the first pass ran in.

        Raises:
            UserError: If the gradient of a scalar output is not the same for all parts.
        """
        start, after = 0, _random_state(self._parts[0])
        slopes: dict[str, list[Slope]] = {}
        for number, part in enumerate(self._parts):
            _set_random_state(part, self._random_states[number])
            last = number == len(self._parts) - 1
            stop = start + len(part[0])
            with contextlib.nullcontext() if last else holding_gradients(self._model):
                with autocast():
                    outputs = self._model(*part)
                pairs = []
                for name, output in outputs.items():
                    grad = self._outputs[name].grad
                    if not output.ndim:
                        slopes.setdefault(name, []).append(self._slope(output))
                    if not output.requires_grad:
                        continue
                    grad = torch.zeros_like(self._outputs[name]) if grad is None else grad
                    pairs.append((output, grad[start:stop] if output.ndim else grad * last))
                torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
            start = stop
        _set_random_state(self._parts[0], after)
        for name, found in slopes.items():
            _require_same(
                name,
                "gradients",
                [_differs(*pair) for slope in found[1:] for pair in zip(slope, found[0], strict=True)],
            )

    def _slope(self, output: Tensor) -> Slope:
        """Returns a scalar's gradient by every trained parameter; quick for a function of few parameters."""
        parts = self._model.modules()
        if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts):
            return []  # a compiled graph frees its buffers as it goes back and cannot be gone through twice
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if not output.requires_grad:
            return [None] * len(trained)
        return list(torch.autograd.grad(output, trained, retain_graph=True, allow_unused=True))


def _differs(value: Tensor | None, other: Tensor | None) -> Tensor:
    """Returns whether tensors differ by more than rounding, as a scalar on their device, which nobody waits for."""
    if value is None or other is None:
        return torch.tensor(value is not other)
    value, other = value.detach(), other.detach()
    near = (value - other).abs() <= _TOLERANCE * other.abs().max()
    return ~(near | (value == other) | (value.isnan() & other.isnan())).all()  # the loop tells of what is not finite


def _require_same(name: str, what: str, differ: Sequence[Tensor]) -> None:
    if differ and bool(torch.stack([flag.cpu() for flag in differ]).any()):
        raise UserError(
            f"`train.accumulation` above 1 needs a scalar that the model returns to depend on parameters alone, got "
            f"other {what} of `{name}` in other parts of the batch; use train.accumulation=1, or return a row for each "
            "sample"
        )


def _random_state(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns the state of the CPU's generator, and of the GPU's that tensors are on, if they are."""
    device = tensors[0].device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(tensors: Sequence[Tensor], state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], tensors[0].device)
