"""Steps whose loss or gradient is not finite: they move nothing, and nobody waits for a GPU to hear of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.parallel import is_spread


class TrainingDiverged(UserError):
    """The loss is not a finite number any more."""


@dataclass
class _Step:
    """A step of which the host does not know yet whether it was finite."""

    number: int
    values: dict[str, Tensor]
    """Terms of the loss, and the norm of the gradient."""
    is_finite: Tensor
    """On the CPU, once `arrived`."""
    arrived: torch.cuda.Event | None


class GuardedOptimizer:
    """Takes an optimiser's steps; one that is not finite leaves weights and moments as they are, on the device itself.

    The host is told later, and asks by `settle` before it goes by what the steps did.
    """

    def __init__(self, optimizer: torch.optim.Adam, rank: int):
        """Takes a fused optimiser, and this worker's number, for messages."""
        self._optimizer, self._rank = optimizer, rank
        self._unsettled: _Step | None = None
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._is_spread = any(map(is_spread, trained))
        self._defers = trained[0].is_cuda and not self._is_spread

    def step(self, number: int, losses: Mapping[str, Tensor], grad_norm: Tensor) -> None:
        """Takes a step if all is finite.

        Args:
            number: Of the step, from 1.
            losses: The terms of its loss.
            grad_norm: Of its gradient.

        Raises:
            TrainingDiverged: If the step before was not finite. Where nothing is gained by waiting, on a CPU or with
                weights that are spread over the workers, also if this one is not.
        """
        self.settle()
        values = {**losses, "grad_norm": grad_norm}
        is_finite = torch.stack([*values.values()]).isfinite().all()
        known, arrived = is_finite.to("cpu", non_blocking=True), None
        if is_finite.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._unsettled = _Step(number, values, known, arrived)
        if self._is_spread:
            self.settle()
            self._optimizer.step()
            return
        guarded = vars(self._optimizer)
        guarded["found_inf"] = (~is_finite).float()  # as torch's GradScaler tells a fused optimiser
        try:
            self._optimizer.step()
        finally:
            del guarded["found_inf"]
        if not self._defers:
            self.settle()

    def settle(self) -> None:
        """Waits for what is known of the last step.

        Raises:
            TrainingDiverged: If it was not finite.
        """
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        if not step.is_finite:
            found = ", ".join(f"{name}={float(value)}" for name, value in step.values.items())
            raise TrainingDiverged(
                f"the loss or its gradient is not finite at step {step.number} on worker {self._rank} ({found}); "
                "start a new run with a lower optim.learning_rate, with optim.clip_grad_norm, or with "
                "train.precision=fp32"
            )
