"""Weights in and out: released HarMA files, open_clip state dicts, plain adapter files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from harma_ray.checkpoint import (
    META_NAME,
    WEIGHTS_NAME,
    CheckpointMeta,
    load_weights,
    read_meta,
    save_checkpoint,
    trainable_tensors,
)
from harma_ray.config import build_config, config_hash, to_dict
from harma_ray.errors import UserError
from harma_ray.models.clip import DualEncoder, build_clip
from harma_ray.models.released import from_released, to_released
from harma_ray.models.weights import backbone_fingerprint, check_fit, read_state_dict
from harma_ray.recipes import make_task
from harma_ray.recipes.harma import HarmaConfig
from harma_ray.runs import CONFIG_NAME, Run, create_run, open_run

FORMATS = ("released", "adapter", "open_clip")
BACKBONE_NAME = "backbone.safetensors"
_ADAPTER_MARK = ".mmadapter."


def export_checkpoint(run: Run, format: str, out_file: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a run's best weights for other programs.

    Args:
        run: The run.
        format: ``released`` (HarMA's layout), ``adapter`` (the trainable tensors), ``open_clip`` (a whole CLIP).
        out_file: The file; written whole or not at all.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: If the format does not fit the run, or the file exists or cannot be written.
    """
    path = Path(out_file).expanduser().absolute()
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another file, or replace it with --overwrite")
    if format not in FORMATS:
        raise UserError(f"the format must be one of {', '.join(FORMATS)}, got `{format}`")
    model, config = run.load_model(), run.config
    assert isinstance(model, DualEncoder)
    assert isinstance(config, HarmaConfig)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "released":
            state = {name: tensor.clone() for name, tensor in to_released(model).items()}
            torch.save({"model": state, "config": to_dict(config)}, partial)
        elif format == "adapter":
            tensors = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
            save_file(tensors, partial, metadata=_describe_adapter(model, config))
        else:
            if config.model.tuning == "adapters":
                raise UserError("a model with adapters is no plain CLIP; export it as `released` or `adapter`")
            save_file({name: t.contiguous() for name, t in model.clip.state_dict().items()}, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); check the folder and its free space") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    path: Path
    """A run's folder, or a backbone file."""
    text: str
    """How to use it."""

    def describe(self) -> str:
        """Returns what was made and how to use it."""
        return f"wrote {self.path}\n{self.text}"


def import_checkpoint(file: str | Path, config: Any, out: str | Path) -> Imported:
    """Turns a file of others into something this program uses.

    A released HarMA file becomes a run; a GeoRSCLIP or other open_clip state dict becomes a backbone file.

    Args:
        file: What to read; nothing in it is executed.
        config: Settings of the recipe it belongs to; the adapters' sizes are taken from the file.
        out: Folder to make.

    Raises:
        UserError: If the file does not fit, listing what does not, or the folder exists.
    """
    path, folder = Path(file).expanduser(), Path(out).expanduser().absolute()
    content = _read(path)
    if isinstance(content.get("model"), dict):
        return _import_released(path, content["model"], config, folder)
    state = read_state_dict(path)
    if any(_ADAPTER_MARK in name for name in state):
        return _import_released(path, state, config, folder)
    model = build_clip(config.model.architecture, str(path))
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    folder.mkdir(parents=True)
    backbone = folder / BACKBONE_NAME
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, backbone)
    return Imported(
        backbone,
        f"{len(state)} tensors of `{config.model.architecture}`, fingerprint {backbone_fingerprint(model)[:12]}\n"
        f"use it with --set model.pretrained={backbone}",
    )


def _import_released(path: Path, state: dict[str, torch.Tensor], config: Any, folder: Path) -> Imported:
    adapters = {name.rsplit(_ADAPTER_MARK, 1)[-1]: tensor for name, tensor in state.items() if _ADAPTER_MARK in name}
    sizes = {name: len(tensor) for name, tensor in adapters.items() if tensor.ndim}
    if not sizes:
        raise UserError(f"{path} has no adapters (no name with `{_ADAPTER_MARK}`), so it is no released HarMA file")
    changes = {
        "model.pretrained": "random",
        "model.tuning": "adapters",
        "adapter.width": sizes.get("img_proj_down.weight", config.adapter.width),
        "adapter.shared_width": sizes.get("BiShareAdapterxx.l1.weight", config.adapter.shared_width),
    }
    config = build_config(config, changes, origin=str(path))
    model = make_task(config).build_model()
    assert isinstance(model, DualEncoder)
    try:
        from_released(state, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    backbone = folder / BACKBONE_NAME
    run = create_run(folder.parent, folder.name, build_config(config, {"model.pretrained": str(backbone)}))
    save_file({name: tensor.contiguous() for name, tensor in base_tensors(model).items()}, backbone)
    meta = CheckpointMeta(0, 0, {}, {}, config_hash(run.config), run.config.recipe, backbone_fingerprint(model))
    save_checkpoint(run.path, meta, model, {})
    return Imported(run.path, f"use it with launch.py evaluate --run {run.path} --data DATA")


def describe_file(path: str | Path) -> str:
    """Says what a file or folder is: ours or another program's, its tensors, sizes and where it stood."""
    path = Path(path).expanduser()
    if (path / CONFIG_NAME).is_file():
        run = open_run(path)
        state = "finished" if run.report else "not finished"
        return f"run {run.path} of recipe {run.config.recipe}, {state}\n{describe_file(run.best_checkpoint())}"
    if (path / META_NAME).is_file():
        meta = read_meta(path)
        figures = ", ".join(f"{name} {value:.2f}" for name, value in meta.metrics.items())
        return "\n".join([
            f"checkpoint {path} of recipe {meta.recipe}, epoch {meta.epoch:g}, step {meta.step}",
            f"metrics     {figures or 'none'}",
            f"backbone    fingerprint {meta.backbone[:12]}",
            _describe_tensors(load_file(path / WEIGHTS_NAME)),
        ])  # fmt: skip
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is a folder that is neither a run nor a checkpoint")
    content = _read(path)
    inner = content.get("model")
    if isinstance(inner, dict) and any(_ADAPTER_MARK in name for name in inner):
        return f"released HarMA file {path}\n{_describe_tensors(inner)}"
    state = read_state_dict(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        if "recipe" in metadata:
            return (
                f"adapter file {path} of recipe {metadata['recipe']}, for {metadata['architecture']} with fingerprint "
                f"{metadata['backbone'][:12]}\n{_describe_tensors(state)}"
            )
    if "visual.conv1.weight" in state and "token_embedding.weight" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        kind = f"CLIP with a ViT of width {width} and patch {patch}" if "visual.proj" in state else "CLIP with a ResNet"
        return f"open_clip state dict {path}: {kind}\n{_describe_tensors(state)}"
    return f"state dict {path}, not of a CLIP\n{_describe_tensors(state)}"


def base_tensors(model: DualEncoder) -> dict[str, torch.Tensor]:
    """Returns the tensors of the CLIP without its adapters, under open_clip's names."""
    return {name: tensor for name, tensor in model.clip.state_dict().items() if ".mlp.adapter." not in name}


def _describe_tensors(state: dict[str, torch.Tensor]) -> str:
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    return f"tensors     {len(state)}, {sum(tensor.numel() for tensor in state.values()):,} numbers ({kinds})"


def _read(path: Path) -> dict[str, Any]:
    """Reads a file of tensors without executing anything in it."""
    if not path.is_file():
        raise UserError(f"the file must exist, got {path}")
    if path.suffix == ".safetensors":
        return dict(read_state_dict(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read without running code from it ({reason}); if you trust it, load it yourself and "
            'save only {"model": its state dict}'
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of names to tensors, got {type(content).__name__}")
    return content


def _released_state(path: Path) -> dict[str, torch.Tensor]:
    content = _read(path)
    return content["model"] if isinstance(content.get("model"), dict) else read_state_dict(path)


def model_from_file(file: str | Path, config: Any) -> nn.Module:
    """Builds a recipe's model with the weights of a file.

    Args:
        file: A checkpoint folder of a run, an adapter file (``.safetensors``), or a released HarMA ``.pth``.
        config: Settings that the weights were trained with.

    Returns:
        The model on CPU, in evaluation mode.

    Raises:
        UserError: If the file does not fit, listing what does not, or belongs to another backbone.
    """
    path = Path(file).expanduser()
    model = make_task(config).build_model()
    if (path / META_NAME).is_file():
        load_weights(path, model, backbone=backbone_fingerprint(model))
    elif path.suffix == ".safetensors":
        _load_adapter(path, model)
    else:
        assert isinstance(model, DualEncoder)
        from_released(_released_state(path), model)
    return model.eval()


def _describe_adapter(model: nn.Module, config: Any) -> dict[str, str]:
    return {
        "format": "harma_ray adapter",
        "recipe": config.recipe,
        "architecture": config.model.architecture,
        "backbone": backbone_fingerprint(model),
        "config": json.dumps(to_dict(config)),
    }


def _load_adapter(path: Path, model: nn.Module) -> None:
    own = trainable_tensors(model)
    given = read_state_dict(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
    check_fit(own, given, str(path))
    backbone = backbone_fingerprint(model)
    if metadata.get("backbone", backbone) != backbone:
        raise UserError(
            f"{path} was trained on a backbone with fingerprint {metadata['backbone'][:12]}, but this model's is "
            f"{backbone[:12]}; set model.architecture and model.pretrained to those it was trained with"
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
