"""How many threads a process has, decided in one place for workers, trials, evaluations and what encodes vectors."""

from __future__ import annotations

import torch

from harma_ray.config import RunConfig


def use_threads(config: RunConfig, num_cpus: float) -> int:
    """Gives torch as many threads as this process has CPUs, unless ``train.threads`` says otherwise.

    Args:
        config: Settings.
        num_cpus: CPUs of this process: its share of a machine, or what Ray has reserved for it.

    Returns:
        Threads that decode: as many, unless ``data.decode_threads`` says otherwise.
    """
    threads = max(1, int(num_cpus))
    torch.set_num_threads(config.train.threads or threads)
    return config.data.decode_threads or threads
