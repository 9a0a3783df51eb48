"""The parts of the training loop that know about torch's machinery: one step, wrapping, autocast, rates."""

import contextlib
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harma_ray.config import OptimConfig, RunConfig, TrainConfig
from harma_ray.data.order import TrainingOrder
from harma_ray.data.samples import Batch
from harma_ray.data.splits import open_split
from harma_ray.data.stream import EvaluationStream, Loader, TrainingStream, Worker
from harma_ray.distributed import broadcast_object
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.models.precision import attend_at_any_length, evaluating
from harma_ray.parallel import whole, whole_model
from harma_ray.task import Task
from harma_ray.training.accumulation import PartialForward, summed_step
from harma_ray.training.state import TrainState
from harma_ray.training.threads import use_threads

Autocast = Callable[[], contextlib.AbstractContextManager]


def check_batch(task: Task, world_size: int) -> None:
    """Checks that several workers can train, and that a global batch can be shared out.

    Raises:
        UserError: If the model cannot be compiled for them, the batch does not divide by their number, or a worker's
            share into its parts.
    """
    train = task.config.train
    size, unit = train.global_batch_size, world_size * train.pairs_per_sample
    if world_size > 1 and train.compile and type(task).parallelise is not Task.parallelise:
        raise UserError(
            f"`train.compile` needs a model that is whole on every worker, but recipe {task.config.recipe} spreads its "
            "own over them; use train.compile=false"
        )
    if size % unit:
        low, times = size - size % unit, " times `train.captions_per_image`" if train.pairs_per_sample > 1 else ""
        raise UserError(
            f"`train.global_batch_size` must divide by the number of workers{times}, got {size} and {unit}; "
            f"use {low or unit} or {low + unit}"
        )
    share = size // unit
    if train.accumulation > share:
        raise UserError(
            f"`train.accumulation` must not exceed a worker's share of the batch, got {train.accumulation} and "
            f"{share}{' images' if train.pairs_per_sample > 1 else ''}"
        )
    if share % num_batches(task):
        raise UserError(
            f"`train.accumulation` must divide a worker's share of the batch, got {train.accumulation} and {share}"
        )


def num_batches(task: Task) -> int:
    """Returns how many batches a worker reads for a step: one that is cut later, or each part by itself."""
    return task.config.train.accumulation if task.accumulation == "summed" else 1


def update_weights(
    state: TrainState, trainable: Sequence[nn.Parameter], losses: dict[str, Tensor], optim: OptimConfig
) -> tuple[Tensor, dict[str, float]]:
    """Moves the weights by their gradients; returns their norm, before clipping, and the learning rates.

    Args:
        state: Of the training; its step is counted.
        trainable: What is moved.
        losses: The terms of the step's loss.
        optim: Settings.

    Raises:
        TrainingDiverged: If a term of the loss or the norm was not finite, see `GuardedOptimizer`; the weights are as
            they were.
    """
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(trainable, optim.clip_grad_norm or math.inf)).to(state.device)
    learning_rates = state.learning_rates
    state.guarded.step(state.progress.step + 1, losses, grad_norm)
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.progress.step += 1
    return grad_norm, learning_rates


def train_step(
    task: Task, forward: nn.Module, batches: Sequence[Batch], train: TrainConfig, autocast: Autocast
) -> dict[str, Tensor]:
    """Runs the forward and backward passes of a step; gradients are left on the parameters.

    Args:
        task: What is trained.
        forward: See `wrap_model`.
        batches: So many as `num_batches` says.
        train: How.
        autocast: The context of the forward passes.

    Returns:
        The terms of the loss.
    """
    if task.accumulation == "summed":
        return summed_step(task, forward, batches, autocast)
    (batch,) = batches
    if train.accumulation == 1:
        with autocast():
            terms = task.losses(forward, batch)
        torch.stack(list(terms.values())).sum().backward()
    else:
        partial = PartialForward(forward, train.accumulation, len(batch["row"]))
        with autocast():
            terms = task.losses(partial, batch)
        torch.stack(list(terms.values())).sum().backward()
        partial.backward(autocast)
    return {name: term.detach() for name, term in terms.items()}


def wrap_model(task: Task, model: nn.Module, worker: Worker) -> nn.Module:
    """Returns what a step calls: the model, quickened, its gradients averaged over the workers."""
    forward = task.quicken(model, torch.device(worker.device))
    return task.parallelise(forward, worker) if worker.world_size > 1 else forward


def trains_in_bf16(train: TrainConfig, device: torch.device) -> bool:
    """Returns whether models are trained under bf16 autocast on a device that is here."""
    if train.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return train.precision == "bf16"


def autocast_of(train: TrainConfig, device: torch.device) -> Autocast:
    """Returns a maker of the contexts that training runs in: bf16 if asked for or, by default, where a GPU has it."""
    attend_at_any_length(device)
    if not trains_in_bf16(train, device):
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def parameters_without_gradient(
    task: Task, order: TrainingOrder, config: RunConfig, worker: Worker, loader: Loader
) -> list[str]:
    """Runs one forward and backward pass and returns the trainable parameters that got no gradient."""
    model = task.new_model().to(worker.device)
    stream = TrainingStream(order, task.transform(training=True), config.data, worker, loader)
    parts = num_batches(task)
    batches = stream.steps(0, 1, parts)
    task.begin_step(0)
    first = [next(batches) for _ in range(parts)]
    train_step(task, model.train(), first, config.train, autocast_of(config.train, torch.device(worker.device)))
    batches.close()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def evaluate_split(
    task: Task, config: RunConfig, model: nn.Module, split: str, *, worker: Worker, loader: Loader
) -> Evaluation:
    """Evaluates a model on a split.

    Args:
        task: What is evaluated.
        config: Settings; ``data.path`` is the data set.
        model: The unwrapped model; it is moved to the worker's device.
        split: Name of the split.
        worker: This worker.
        loader: Makes batches of rows.
    """
    model.to(worker.device)
    stream = EvaluationStream(open_split(config.data.path, split), config.data, worker, loader)
    return evaluate_stream(task, config, model, stream, worker)


def evaluate_stream(
    task: Task, config: RunConfig, model: nn.Module, stream: EvaluationStream, worker: Worker
) -> Evaluation:
    """Evaluates a model on the worker's device, which may be spread over the workers; all get worker 0's metrics."""
    model.eval()
    plainly = torch.compiler.set_stance("force_eager") if config.train.compile else contextlib.nullcontext()
    with plainly, whole_model(model), evaluating(config.train.eval_precision, torch.device(worker.device)):
        found = task.evaluate(model, stream)
    metrics = broadcast_object(found.metrics)
    return found if worker.rank == 0 else Evaluation(metrics)


class Meter:
    """Rates since the last reading."""

    def __init__(self, pairs_per_step: int, num_workers: int = 1):
        """Starts measuring."""
        self._pairs_per_step, self._num_workers = pairs_per_step, num_workers
        self._lap_started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Forgets what was measured, the lap too."""
        self._forget()
        self._lap_started = self._started

    def count(self, amounts: Iterable[Mapping[str, Tensor]] = ()) -> None:
        """Counts a step.

        Args:
            amounts: What each of its batches on this worker holds, see `Task.amounts`.
        """
        self._steps += 1
        for held in amounts:
            for name, amount in held.items():
                self._amounts.setdefault(name, []).append(amount)

    def lap(self) -> float:
        """Returns the seconds since the last lap or reset."""
        now = time.perf_counter()
        seconds, self._lap_started = now - self._lap_started, now
        return seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a wait for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def read(self, device: torch.device) -> dict[str, float]:
        """Returns the rates since the last reading, and memory peaks in MiB (of this process, and of its GPU)."""
        elapsed = time.perf_counter() - self._started
        values = {
            "pairs_per_second": self._steps * self._pairs_per_step / elapsed,
            "data_wait_fraction": self._waited / elapsed,
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        for name, amounts in self._amounts.items():  # of this worker, of whose peers the shares are as large on average
            values[f"{name}_per_second"] = float(torch.stack(amounts).sum()) * self._num_workers / elapsed
        if device.type == "cuda":
            # what it takes from other programs; recorded passes hold memory that is not "allocated"
            values["gpu_memory_mb"] = torch.cuda.max_memory_reserved(device) / 2**20
        self._forget()
        return values

    def _forget(self) -> None:
        self._started, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._amounts: dict[str, list[Tensor]] = {}


def timed(batches: Iterator[Any], meter: Meter) -> Iterator[Any]:
    """Yields batches and tells the meter how long each was waited for."""
    while True:
        with meter.waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def local_worker(config: RunConfig) -> Worker:
    """Returns the only worker, which is this process, with all CPUs: on a GPU if there is one and it is not refused.

    Raises:
        UserError: If a GPU is asked for and there is none.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    use_gpu = torch.cuda.is_available() if config.scaling.use_gpu is None else config.scaling.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise UserError("`scaling.use_gpu` is true, but torch finds no GPU here; use --cpu")
    return Worker(device="cuda" if use_gpu else "cpu", decode_threads=use_threads(num_cpus, config))
