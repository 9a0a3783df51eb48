"""The precision of a computation, whatever surrounds it."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Computes in fp32 on a device: no autocast, and no TF32 in a GPU's convolutions, where torch has it by default."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = allowed


def attend_at_any_length(device: torch.device) -> None:
    """Leaves cuDNN's attention out in this process: it plans anew for every length, each of which then waits.

    On an H200 the first bf16 step at each new length of captions took 0.7-0.8 s with it and 0.1-0.3 s without; other
    steps took 0.1-0.3 s either way, by how busy the host was (``benchmarks/RESULTS.md``).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def evaluating(precision: str, device: torch.device) -> Iterator[None]:
    """Computes as models are evaluated: without gradients, in "fp32" or, by autocast, in "bf16"."""
    is_rough, planned = precision == "bf16", torch.backends.cuda.cudnn_sdp_enabled()
    attend_at_any_length(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if is_rough else full_precision(device):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(planned)
