"""What a training needs beside its weights to go on to the bit: optimiser, schedule, progress, random states."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from harma_ray.config import RunConfig
from harma_ray.data.stream import Worker
from harma_ray.distributed import gather_rows
from harma_ray.errors import count
from harma_ray.parallel import gather_tensors, spread_like
from harma_ray.task import ParameterGroup
from harma_ray.training.divergence import GuardedOptimizer
from harma_ray.training.optim import build_optimizer, build_schedule


@dataclass
class Progress:
    """The loop's own state, saved with every checkpoint."""

    step: int = 0
    """Optimiser steps done."""
    best: float | None = None
    """Best value of the objective; None before the first evaluation."""
    best_step: int = 0
    """Where it was reached."""
    without_improvement: int = 0
    """Evaluations since."""
    seconds: float = 0.0
    """Time spent in training steps, over all attempts."""


class TrainState:
    """One worker's part of the state of a training."""

    def __init__(self, groups: Sequence[ParameterGroup], config: RunConfig, total_steps: int, worker: Worker):
        """Makes the state of step 0, and gives this worker random numbers of its own.

        Args:
            groups: What is trained, see `harma_ray.task.Task.parameter_groups`.
            config: Settings.
            total_steps: Steps of the whole training.
            worker: This worker.
        """
        self.device, self.worker, self._seed = torch.device(worker.device), worker, config.seed
        self._names = [group.get("name") for group in groups]
        unnamed = [{key: value for key, value in group.items() if key != "name"} for group in groups]
        self.optimizer = build_optimizer(unnamed, config.optim, self.device)
        self.guarded = GuardedOptimizer(self.optimizer, worker.rank)
        self.schedule = build_schedule(self.optimizer, config.optim, total_steps)
        self.progress = Progress()
        _seed_worker(config.seed, worker.rank)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The next step's largest ``learning_rate``, and ``learning_rate_NAME`` of each group that has a name."""
        rates = list(map(float, self.schedule.get_last_lr()))
        named = {f"learning_rate_{name}": rate for name, rate in zip(self._names, rates, strict=False) if name}
        return {"learning_rate": max(rates), **named}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of all workers but the progress, which `progress_dict` gives; called on every worker.

        Only worker 0 gets the optimiser's.
        """
        cuda_rng = None
        if self.device.type == "cuda":
            cuda_rng = gather_rows(torch.cuda.get_rng_state(self.device)[None].to(self.device)).cpu()
        optimizer = self.optimizer.state_dict()
        moments = {number: gather_tensors(own) for number, own in optimizer["state"].items()}
        return {
            "optimizer": {**optimizer, "state": moments},
            "schedule": self.schedule.state_dict(),
            "rng": gather_rows(torch.get_rng_state()[None].to(self.device)).cpu(),
            "cuda_rng": cuda_rng,
        }

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {
                name: (spread_like(value, trained[number]) if value.shape == trained[number].shape else value).clone()
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": moments})

    def progress_dict(self) -> dict[str, Any]:
        """Returns the progress as plain values."""
        return asdict(self.progress)

    def load_state_dict(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> list[str]:
        """Goes on from a saved state, on as many workers as there are now.

        Args:
            state: What `state_dict` returned.
            progress: What `progress_dict` returned.

        Returns:
            What keeps the rest from being, to the bit, what it would have been; one line each.
        """
        self._load_optimizer(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**{entry.name: progress[entry.name] for entry in fields(Progress)})
        rank, workers, on_gpu = self.worker.rank, self.worker.world_size, self.device.type == "cuda"
        _seed_worker(self._seed, rank, self.progress.step)  # stays that of a worker that was not there
        # A row of a matrix starts in the middle of its storage, which torch 2.15 does not heed: it reads past the end.
        if rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank].clone())
        if on_gpu and state["cuda_rng"] is not None and rank < len(state["cuda_rng"]):
            torch.cuda.set_rng_state(state["cuda_rng"][rank].clone(), self.device)
        notices = []
        if workers != len(state["rng"]):
            notices.append(
                f"{count(workers, 'worker')} took over what {len(state['rng'])} began: the batches are the same, but "
                "sums are rounded and dropout is drawn differently, so the figures agree within rounding only"
            )
        if on_gpu != (state["cuda_rng"] is not None):
            began, goes_on = ("a CPU", "a GPU") if on_gpu else ("a GPU", "a CPU")
            notices.append(f"{goes_on} goes on with what {began} began: the figures agree within rounding only")
        return notices


def _seed_worker(seed: int, rank: int, step: int = 0) -> None:
    """Seeds torch's generators for one worker; models are the same on all, dropout is not."""
    entropy = (seed, rank, step) if step else (seed, rank)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
