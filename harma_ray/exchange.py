"""Weights in and out: released HarMA and CLIP4Cir files, open_clip state dicts, plain adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harma_ray.checkpoint import (
    META_NAME,
    WEIGHTS_NAME,
    CheckpointMeta,
    list_checkpoints,
    load_weights,
    read_meta,
    save_checkpoint,
    trainable_tensors,
)
from harma_ray.composed_exchange import (
    BACKBONE_NAME,
    COMBINER_MARK,
    Imported,
    describe_combiner,
    import_combiner,
    write_composed,
)
from harma_ray.config import build_config, config_hash, flat_settings, show_override, to_dict
from harma_ray.errors import UserError
from harma_ray.files import making, output_path, replacing
from harma_ray.models.backbones import check_file_activation, knows_activation
from harma_ray.models.clip import DualEncoder, build_clip
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.foreign import describe_tensors, guess_architecture, read_foreign
from harma_ray.models.released import from_released, to_released
from harma_ray.models.weights import backbone_fingerprint, check_fit, read_metadata, read_state_dict, save_clip
from harma_ray.recipes import make_task
from harma_ray.recipes.harma_config import HarmaConfig
from harma_ray.runs import CONFIG_NAME, Run, create_run, open_run
from harma_ray.shell import command_line, launch_command

FORMATS = ("released", "adapter", "open_clip")
_UNSEEN = ("model.text_tokens", "adapter.num_heads", "adapter.share_across_modalities")
"""Settings that no shape shows."""
_ADAPTER_FORMAT = "harma_ray adapter"
_ADAPTER_MARK = ".mmadapter."
_OWN_ADAPTER_MARK = ".mlp.adapter."


def export_checkpoint(
    run: Run, format: str, out_file: str | Path, *, metric: str | None = None, overwrite: bool = False
) -> Path:
    """Writes a run's best weights for other programs.

    Args:
        run: The run.
        format: ``released`` (HarMA's layout), ``adapter`` (the trainable tensors), ``open_clip`` (a whole CLIP).
        out_file: The file; written whole or not at all.
        metric: What the best weights are the best by; None = the recipe's objective.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: If the format does not fit the run, or the file exists or cannot be written.
    """
    path = output_path(out_file)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another file, or replace it with --overwrite")
    if format not in FORMATS:
        raise UserError(f"the format must be one of {', '.join(FORMATS)}, got `{format}`")
    checkpoint, model, config = run.best_checkpoint(metric), run.load_model(metric), run.config
    if isinstance(model, ComposedRetriever):
        with replacing(path) as partial:
            write_composed(model, run, format, read_meta(checkpoint).epoch, partial)
        return path
    assert isinstance(model, DualEncoder)
    assert isinstance(config, HarmaConfig)
    if format == "open_clip" and config.model.tuning == "adapters":
        raise UserError("a model with adapters is no plain CLIP; export it as `released` or `adapter`")
    if format == "adapter" and config.model.tuning == "none":
        raise UserError(f"run {run.path} trained nothing (model.tuning is none); export it as `open_clip`")
    with replacing(path) as partial:
        if format == "released":
            state = {name: tensor.clone() for name, tensor in to_released(model).items()}
            torch.save({"model": state, "config": to_dict(config)}, partial)
        elif format == "adapter":
            metadata = {
                "format": _ADAPTER_FORMAT,
                "recipe": config.recipe,
                "architecture": config.model.architecture,
                "backbone": read_meta(checkpoint).backbone,
                "config": json.dumps(to_dict(config)),
            }
            save_file({name: t.clone() for name, t in trainable_tensors(model).items()}, partial, metadata=metadata)
        else:
            save_clip(model.clip, partial)
    return path


def import_checkpoint(file: str | Path, config: Any, out: str | Path, clip: str | Path | None = None) -> Imported:
    """Turns a file of others into something this program uses.

    A released HarMA file or Combiner becomes a run; GeoRSCLIP's, CLIP4Cir's or another CLIP becomes a backbone file.

    Args:
        file: What to read; nothing in it is executed.
        config: Settings of the recipe it belongs to; the adapters' sizes are taken from the file.
        out: Folder to make; written whole or not at all.
        clip: The CLIP that a Combiner was trained on; see `import_combiner`.

    Raises:
        UserError: If the file does not fit, listing what does not, or the folder exists.
    """
    path, folder = Path(file).expanduser(), output_path(out)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    state = read_foreign(path)
    if clip is not None and COMBINER_MARK not in state:
        raise UserError(f"`--clip` is for a Combiner, which {path} is not; leave it out")
    if _has(state, _ADAPTER_MARK):
        return _import_released(path, state, config, folder)
    if COMBINER_MARK in state:
        return import_combiner(path, state, config, folder, clip)
    if _has(state, _OWN_ADAPTER_MARK):
        way_out = f"evaluate it with {command_line('--checkpoint', path)}"
        raise UserError(f"{path} is an adapter file, which needs no import; {way_out}")
    model = build_clip(config.model.architecture, str(path))
    with making(folder) as made:
        made.mkdir()
        save_clip(model, made / BACKBONE_NAME, says_activation=knows_activation(path))
    return Imported(
        folder / BACKBONE_NAME,
        f"{len(state)} tensors of `{config.model.architecture}`, fingerprint {backbone_fingerprint(model)[:12]}\n"
        f"use it with {command_line('--set', show_override('model.pretrained', str(folder / BACKBONE_NAME)))}",
    )


def _import_released(path: Path, state: dict[str, Tensor], config: Any, folder: Path) -> Imported:
    model, config = _released_model(path, state, config)
    config = build_config(config, {"model.pretrained": str(folder / BACKBONE_NAME)})
    backbone = backbone_fingerprint(model)
    with making(folder) as made:
        run = create_run(made.parent, made.name, config)
        save_clip(model.clip, made / BACKBONE_NAME, without=_OWN_ADAPTER_MARK, says_activation=False)
        meta = CheckpointMeta(0, 0, {}, {}, config_hash(config), config.recipe, backbone)
        save_checkpoint(run.path, meta, model, {})
    return Imported(
        folder,
        f"{len(state)} tensors; adapters of width {config.adapter.width}, shared width {config.adapter.shared_width}; "
        f"backbone fingerprint {backbone[:12]}\n"
        f"use it with {launch_command('evaluate', '--run', folder, '--data', 'DATA')}",
    )


def load_model(file: str | Path | None, config: Any) -> nn.Module:
    """Builds a recipe's model with the weights of a file.

    Args:
        file: A run's folder (its best checkpoint), a checkpoint's folder, an adapter file (``.safetensors``), or a
            released HarMA ``.pth``, which holds its own backbone and says how wide its adapters are. None = no file:
            the recipe's backbone as it is, see `Task.build_untrained`.
        config: Settings that the weights were trained with.

    Returns:
        The model on CPU, in evaluation mode.

    Raises:
        UserError: If the file does not fit, listing what does not, or belongs to another backbone.
    """
    if file is None:
        return make_task(config).build_untrained().eval()
    path = Path(file).expanduser()
    if (path / CONFIG_NAME).is_file():
        path = open_run(path).best_checkpoint()
    if (path / META_NAME).is_file():
        run = path.absolute().parent.parent
        if (run / CONFIG_NAME).is_file():
            _check_settings(to_dict(open_run(run).config), config, path)
        model = make_task(config).build_model()
        load_weights(path, model, backbone=backbone_fingerprint(model))
        return model.eval()
    state = read_foreign(path)
    if COMBINER_MARK in state:
        way_out = f"import both first: {launch_command('checkpoint', 'import', path, '--clip', 'FILE')}"
        raise UserError(f"{path} is a Combiner without its CLIP; {way_out}")
    if "visual.conv1.weight" in state:
        raise UserError(f"{path} is a plain CLIP; evaluate it with --zero-shot --set model.pretrained={path}")
    if path.suffix != ".safetensors" or _has(state, _ADAPTER_MARK):
        return _released_model(path, state, config)[0].eval()
    model = make_task(config).build_model()
    own, metadata, backbone = trainable_tensors(model), read_metadata(path), backbone_fingerprint(model)
    _check_settings(json.loads(metadata.get("config", "{}")), config, path)
    if metadata.get("backbone", backbone) != backbone:
        raise UserError(
            f"{path} was trained on a backbone with fingerprint {metadata['backbone'][:12]}, but this model's is "
            f"{backbone[:12]}; set model.architecture and model.pretrained to those it was trained with"
        )
    check_fit(own, state, str(path))
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model.eval()


def describe_file(path: str | Path) -> str:
    """Says what a file or folder is: ours or another program's, its tensors, sizes and where it stood.

    Raises:
        UserError: If it is no checkpoint, is damaged, or could be read only by running code from it.
    """
    path = Path(path).expanduser()
    if (path / CONFIG_NAME).is_file():
        run = open_run(path)
        state = "finished" if run.report else "not finished"
        best = describe_file(run.best_checkpoint()) if list_checkpoints(run.path) else "no checkpoint yet"
        return f"run {run.path} of recipe {run.config.recipe}, {state}\n{best}"
    if (path / META_NAME).is_file():
        meta = read_meta(path)
        figures = ", ".join(f"{name} {value:.2f}" for name, value in meta.metrics.items())
        return "\n".join([
            f"checkpoint {path} of recipe {meta.recipe}, epoch {meta.epoch:g}, step {meta.step}",
            f"metrics     {figures or 'none'}",
            f"backbone    fingerprint {meta.backbone[:12]}",
            describe_tensors(read_state_dict(path / WEIGHTS_NAME)),
        ])  # fmt: skip
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} does not exist, or is a folder that is neither a run nor a checkpoint")
    state, metadata = read_foreign(path), read_metadata(path)
    if metadata.get("format") == _ADAPTER_FORMAT:
        title = (
            f"adapter file {path} of recipe {metadata.get('recipe')}, for {metadata.get('architecture')} with "
            f"fingerprint {metadata.get('backbone', 'unknown')[:12]}"
        )
    elif _has(state, _ADAPTER_MARK):
        title = f"released HarMA file {path}: {guess_architecture(state)}"
    elif COMBINER_MARK in state:
        title = f"released CLIP4Cir Combiner {path}: {describe_combiner(state)}"
    elif "visual.conv1.weight" in state and "token_embedding.weight" in state:
        title = f"open_clip state dict {path}: {guess_architecture(state)}"
    else:
        title = f"state dict {path}, not of a CLIP"
    return f"{title}\n{describe_tensors(state)}"


def _released_model(path: Path, state: dict[str, Tensor], config: Any) -> tuple[DualEncoder, Any]:
    """Builds the model of a released file, and settings with the sizes that the file's shapes show."""
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
    check_file_activation(config.model.architecture, path)
    model = make_task(config).build_model()
    assert isinstance(model, DualEncoder)
    try:
        from_released(state, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model, config


def _check_settings(trained: dict[str, Any], config: Any, path: Path) -> None:
    """Raises UserError if weights were trained with settings that change what they compute but not their shapes."""
    theirs, ours = flat_settings(trained), flat_settings(to_dict(config))
    wrong = [name for name in _UNSEEN if name in theirs and theirs[name] != ours.get(name)]
    if wrong:
        changes = " ".join(command_line("--set", show_override(name, theirs[name])) for name in wrong)
        raise UserError(f"{path} was trained with other settings; add {changes}")


def _has(state: dict[str, Tensor], mark: str) -> bool:
    return any(mark in name for name in state)
