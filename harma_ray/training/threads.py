"""How many threads a process has, decided in one place for workers, trials, evaluations and what encodes vectors."""

import torch

from harma_ray.config import RunConfig


def use_threads(num_cpus: float, config: RunConfig | None = None) -> int:
    """Gives torch as many threads as this process has CPUs, unless ``train.threads`` says otherwise.

    Args:
        num_cpus: CPUs of this process: its share of a machine, or what Ray has reserved for it.
        config: Settings; None: those that name no number.

    Returns:
        Threads that decode: as many, unless ``data.decode_threads`` says otherwise.
    """
    threads = max(1, int(num_cpus))
    torch.set_num_threads((config and config.train.threads) or threads)
    return (config and config.data.decode_threads) or threads
