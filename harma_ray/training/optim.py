"""The optimiser and its schedule."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from harma_ray.config import OptimConfig
from harma_ray.errors import UserError, first_few
from harma_ray.task import ParameterGroup, Task


def checked_groups(task: Task, model: nn.Module) -> list[ParameterGroup]:
    """Returns a task's groups of parameters.

    Raises:
        UserError: If they are not exactly what is trainable, or name a parameter twice.
    """
    groups = [{**group, "params": [*group["params"]]} for group in task.parameter_groups(model, task.config.optim)]
    held = Counter(id(parameter) for group in groups for parameter in group["params"])
    wrong = [name for name, p in model.named_parameters() if held.pop(id(p), 0) != p.requires_grad]
    if held:
        wrong.append(f"{len(held)} that are none of the model's")
    if wrong:
        raise UserError(
            "`parameter_groups` must hold every trainable parameter once and no other, which does not hold for "
            f"{first_few(wrong)}; mend recipe {task.config.recipe}"
        )
    return groups


def build_optimizer(
    groups: Sequence[ParameterGroup], config: OptimConfig, device: torch.device | str = "cpu"
) -> torch.optim.Adam:
    """Returns the optimiser of groups of parameters; what a group does not say is `config`'s."""
    if not groups:  # zero-shot: an optimiser of nothing, so that the loop needs no second path
        groups = [{"params": [nn.Parameter(torch.zeros((), device=device))]}]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(list(groups), lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def warmup_steps(total_steps: int, config: OptimConfig) -> int:
    """Returns the number of steps in which the learning rate climbs to its peak."""
    return int(config.warmup_fraction * total_steps)


def learning_rate_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Returns the share of the peak learning rate that the update after `step` updates uses, in [0, 1].

    Warm-up: step / warm-up steps, so the first update has rate 0, as in the schedule of HarMA's code. After it, on the
    remaining share x in [0, 1]: linear 1 - x, cosine (1 + cos(pi x)) / 2, constant 1.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Returns the schedule of a run of `total_steps` updates; step it after every update."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, config))
