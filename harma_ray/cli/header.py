"""What a training is about to do, in lines for its header: the backbone, what trains, how fast and how exactly."""

import torch

from harma_ray.config import RunConfig, TrainConfig
from harma_ray.errors import count
from harma_ray.preflight import Prepared
from harma_ray.task import Task
from harma_ray.training.optim import warmup_steps
from harma_ray.training.step import trains_in_bf16


def header_lines(prepared: Prepared) -> list[str]:
    """Returns what a training is, a line each, known without loading weights.

    Args:
        prepared: The training, divided among workers.
    """
    config, order, task, plan = prepared.config, prepared.order, prepared.task, prepared.workers
    assert plan is not None
    train, start, batch = config.train, config.started_from, config.train.samples_per_step
    samples = "samples" if train.captions != "grouped" else f"images with {train.captions_per_image} captions each"
    share = f", {batch // plan.num_workers} a worker" if plan.num_workers > 1 else ""
    parts = f", each in {train.accumulation} parts" if train.accumulation > 1 else ""
    length = f"{count(train.epochs, 'epoch')} x {count(order.steps_per_epoch, 'step')}"
    if train.steps:
        length = f"{count(train.steps, 'step')} ({train.steps / order.steps_per_epoch:.3g} epochs)"
    return [
        f"recipe     {config.recipe}, seed {config.seed}",
        f"backbone   {'; '.join((task.backbone.name, *task.backbone.notes()))}",
        *([f"from       {start.path}"] if start.weights else []),
        f"trains     {describe_count(task)}",
        f"data       {config.data.path}: {order.split.describe()}, {count(order.num_samples, 'sample')} an epoch",
        f"steps      {length} of {batch} {samples}{share}{parts}",
        f"optimiser  {describe_rate(config, prepared.total_steps)}",
        f"precision  {describe_precision(train, use_gpu=plan.use_gpu)}; figures in {train.eval_precision}",
        f"workers    {plan.describe()}",
    ]


def start_line(num_workers: int) -> str:
    """Returns what is said while workers start, which takes seconds."""
    return f"starting {count(num_workers, 'worker')}: each imports torch and builds the model"


def describe_count(task: Task) -> str:
    """Returns how many of a model's parameters train; no weights are made or read for it."""
    parameters = list(task.build_model(task.backbone.outline()).parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if not trained:
        return f"nothing of {total:,} parameters"
    return f"{trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)"


def describe_rate(config: RunConfig, total_steps: int) -> str:
    """Returns optimiser, peak learning rate and schedule."""
    optim = config.optim
    warmup = warmup_steps(total_steps, optim)
    climb = f"reached after {count(warmup, 'step')} of warm-up, " if warmup else ""
    falls = {"linear": "falls along a line to 0", "cosine": "falls along a half cosine to 0", "constant": "stays"}
    return f"{optim.name}, learning rate {optim.learning_rate:g}, {climb}then {falls[optim.schedule]}"


def describe_precision(train: TrainConfig, *, use_gpu: bool) -> str:
    """Returns the precision of the steps on the workers' devices, as far as this machine can know it."""
    device = "GPU" if use_gpu else "CPU"
    if train.precision == "auto" and use_gpu and not torch.cuda.is_available():
        return "bf16 where a worker's GPU has it, else fp32, losses in fp32"
    if trains_in_bf16(train, torch.device("cuda" if use_gpu else "cpu")):
        return f"bf16 autocast on {device}, losses in fp32"
    return f"fp32 on {device}"
