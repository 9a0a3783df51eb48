"""Weights on disk and in memory: written, and fitted strictly."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harma_ray.errors import UserError, count, first_few
from harma_ray.models.foreign import ACTIVATION, GELU, QUICK_GELU
from harma_ray.models.openclip import QuickGELU


def save_clip(model: nn.Module, path: str | Path, *, says_activation: bool = True) -> None:
    """Write a CLIP's own state dict, without modules that say `is_added`, as `.safetensors`.

    Args:
        model: an open_clip model.
        path: the file.
        says_activation: keep with it that the model's activation is the one that it was trained with.
    """
    state = {name: tensor.contiguous() for name, tensor in own_tensors(model).items()}
    activation = {ACTIVATION: QUICK_GELU if has_quick_gelu(model) else GELU}
    save_file(state, path, metadata=activation if says_activation else None)


def has_quick_gelu(model: nn.Module) -> bool:
    """Return whether a CLIP computes quick GELU."""
    return any(isinstance(module, QuickGELU) for module in model.modules())


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless both hold the same names with the same shapes, and numbers that can be computed with.

    Args:
        expected: what the model has.
        given: what is to be loaded.
        source: names the origin of `given` in the message.
    """
    problems = []
    missing = [name for name in expected if name not in given]
    if missing:
        problems.append(f"{len(missing)} missing ({first_few(missing)})")
    unexpected = [name for name in given if name not in expected]
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({first_few(unexpected)})")
    misshapen = [
        f"{name}: {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape ({first_few(misshapen)})")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}; choose the model it was made for")
    quantised = [n for n, tensor in expected.items() if tensor.is_floating_point() > given[n].is_floating_point()]
    if quantised:
        kinds = sorted({str(given[name].dtype).removeprefix("torch.") for name in quantised})
        raise UserError(
            f"{source} must hold floating-point weights, got {', '.join(kinds)} in {count(len(quantised), 'tensor')} "
            f"({first_few(quantised)}); give the weights from before they were quantised"
        )
    broken = [n for n, tensor in expected.items() if not torch.isfinite(given[n].to(tensor.dtype)).all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinity in {len(broken)} of {len(expected)} tensors ({first_few(broken)}): its "
            "training diverged, or the file is damaged; use an earlier one"
        )


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a CLIP's state dict without modules that say `is_added`."""
    added = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "is_added", False))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(added)}
