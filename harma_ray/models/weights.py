"""Weights on disk and in memory: reading them without running code, fitting them strictly, fingerprinting them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harma_ray.errors import UserError

_ACTIVATION, _KEYS_SHOWN = "activation", 5
CLIP_SECTION = "CLIP"
SECTIONS = ("state_dict", CLIP_SECTION, "Combiner")
"""Where training programs put tensors: many under the first, CLIP4Cir under the others."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a plain state dict; nothing in the file is ever executed.

    Accepted are `.safetensors` and torch files (any other suffix) that hold names and tensors, bare or under one of
    `SECTIONS`, with or without a `module.` before every name (as `DistributedDataParallel` writes it).

    Args:
        path: the file.

    Returns:
        Name to tensor, on the CPU, in the file's own dtypes.

    Raises:
        UserError: the file is missing, damaged, holds code, or is no state dict.
    """
    return read_section(path)[1]


def read_section(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Read as `read_state_dict`, and also return the section that the tensors lie in, or nothing."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the weights file must exist, got {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path, device="cpu")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights without running code from it ({reason.strip()}); "
            "give a file that holds only a state dict, best as .safetensors"
        ) from error
    section = ""
    if isinstance(content, Mapping):
        section = next((name for name in SECTIONS if isinstance(content.get(name), Mapping)), "")
        content = content[section] if section else content
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} must hold a state dict (names to tensors), got {type(content).__name__}")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise UserError(
            f"{path} must hold names and tensors only, got other things under {_few(strangers)}; "
            "save the state dict alone"
        )
    if all(name.startswith("module.") for name in content):
        return section, {name.removeprefix("module."): value for name, value in content.items()}
    return section, dict(content)


def save_clip(model: nn.Module, path: str | Path, *, without: str = "", says_activation: bool = True) -> None:
    """Write a CLIP's state dict as `.safetensors`.

    Args:
        model: an open_clip model.
        path: the file.
        without: names that contain this are left out; empty: none.
        says_activation: keep with it that the model's activation is the one that it was trained with.
    """
    state = {name: t.contiguous() for name, t in model.state_dict().items() if not (without and without in name)}
    activation = {_ACTIVATION: "quick GELU" if has_quick_gelu(model) else "GELU"}
    save_file(state, path, metadata=activation if says_activation else None)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the texts that a safetensors file carries beside its tensors; of other files, nothing."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights ({error})") from error


def says_quick_gelu(path: str | Path) -> bool | None:
    """Return whether a file says that its weights were trained with quick GELU; None: it says nothing."""
    found = read_metadata(path).get(_ACTIVATION)
    return None if found is None else found == "quick GELU"


def has_quick_gelu(model: nn.Module) -> bool:
    """Return whether a CLIP computes quick GELU."""
    return any(isinstance(module, QuickGELU) for module in model.modules())


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless both hold the same names with the same shapes.

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
    added = tuple(f"{name}." for name, module in clip_model.named_modules() if getattr(module, "is_added", False))
    digest = hashlib.sha256(b"quick GELU" if has_quick_gelu(clip_model) else b"")
    for name, tensor in sorted(clip_model.state_dict().items()):
        if not name.startswith(added):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _few(names: list[str]) -> str:
    """Join the first few names, and say that there are more."""
    return ", ".join(names[:_KEYS_SHOWN]) + (", ..." if len(names) > _KEYS_SHOWN else "")
