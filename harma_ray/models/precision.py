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


@contextlib.contextmanager
def evaluating(precision: str, device: torch.device) -> Iterator[None]:
    """Computes as models are evaluated: without gradients, in "fp32" or, by autocast, in "bf16"."""
    is_rough = precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if is_rough else full_precision(device):
        yield
