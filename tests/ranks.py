"""Processes of a group: forked from one that has imported everything, instead of importing it each."""

import multiprocessing

import torch


def run_on_ranks(work, num_ranks, *arguments):
    """Calls ``work(rank, *arguments)`` in a process a rank, and raises what one of them raises."""
    multiprocessing.set_forkserver_preload(["harma_ray.training.loop", "harma_ray.recipes", "pytest"])
    torch.multiprocessing.start_processes(work, arguments, num_ranks, start_method="forkserver")
