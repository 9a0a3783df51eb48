"""Weights on disk and in memory: written, fitted strictly, fingerprinted."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn

from harma_ray.errors import UserError
from harma_ray.models.foreign import ACTIVATION, GELU, QUICK_GELU

_KEYS_SHOWN = 5


def save_clip(model: nn.Module, path: str | Path, *, says_activation: bool = True) -> None:
    """Write a CLIP's own state dict, without modules that say `is_added`, as `.safetensors`.

    Args:
        model: an open_clip model.
        path: the file.
        says_activation: keep with it that the model's activation is the one that it was trained with.
    """
    added = _added(model)
    state = {name: t.contiguous() for name, t in model.state_dict().items() if not name.startswith(added)}
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
        problems.append(f"{len(missing)} missing ({_few(missing)})")
    unexpected = [name for name in given if name not in expected]
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_few(unexpected)})")
    misshapen = [
        f"{name}: {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape ({_few(misshapen)})")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}; choose the model it was made for")
    quantised = [n for n, tensor in expected.items() if tensor.is_floating_point() > given[n].is_floating_point()]
    if quantised:
        kinds = sorted({str(given[name].dtype).removeprefix("torch.") for name in quantised})
        raise UserError(
            f"{source} must hold floating-point weights, got {', '.join(kinds)} in {len(quantised)} tensors "
            f"({_few(quantised)}); give the weights from before they were quantised"
        )
    broken = [n for n, tensor in expected.items() if not torch.isfinite(given[n].to(tensor.dtype)).all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinity in {len(broken)} of {len(expected)} tensors ({_few(broken)}): its "
            "training diverged, or the file is damaged; use an earlier one"
        )


def backbone_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a CLIP's own weights, the same before and after adapters are inserted.

    Names, dtypes, shapes and bytes enter, in the order of the names, and whether the activation is quick GELU;
    temperatures of a `DualEncoder` do not, nor do modules that say `is_added`. Another device changes nothing, another
    dtype does. Hashing ViT-B/32 takes about a second.

    Args:
        model: an open_clip model, or a `DualEncoder` around one.

    Returns:
        64 hexadecimal digits.
    """
    clip_model = getattr(model, "clip", model)
    added = _added(clip_model)
    digest = hashlib.sha256(QUICK_GELU.encode() if has_quick_gelu(clip_model) else b"")
    for name, tensor in sorted(clip_model.state_dict().items()):
        if not name.startswith(added):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _added(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of tensors begin that are no part of the CLIP."""
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "is_added", False))


def _few(names: list[str]) -> str:
    """Join the first few names, and say that there are more."""
    return ", ".join(names[:_KEYS_SHOWN]) + (", ..." if len(names) > _KEYS_SHOWN else "")
