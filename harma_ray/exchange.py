"""Weights in and out: released HarMA and CLIP4Cir files, open_clip state dicts, plain adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

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
    Imported,
    describe_combiner,
    import_combiner,
    write_composed,
)
from harma_ray.config import build_config, config_hash, flat_settings, show_override, to_dict
from harma_ray.errors import UserError
from harma_ray.files import making, output_path, replacing
from harma_ray.models.backbones import check_file_activation, load_clip
from harma_ray.models.clip import DualEncoder
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.foreign import ADAPTER_MARK, OWN_FORMAT, ForeignWeights, read_foreign, read_models
from harma_ray.models.released import from_released, to_released
from harma_ray.models.shapes import describe_tensors, guess_architecture
from harma_ray.models.weights import backbone_fingerprint, check_fit, save_clip
from harma_ray.recipes import make_task
from harma_ray.recipes.harma_config import HarmaConfig
from harma_ray.runs import CONFIG_NAME, Run, create_run, open_run
from harma_ray.shell import command_line, launch_command

FORMATS = ("released", "adapter", "open_clip")
_UNSEEN = ("model.text_tokens", "adapter.num_heads", "adapter.share_across_modalities")
"""Settings that no shape shows."""
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
                "format": OWN_FORMAT,
                "recipe": config.recipe,
                "architecture": config.model.architecture,
                "backbone": read_meta(checkpoint).backbone,
                "config": json.dumps(to_dict(config)),
            }
            save_file({name: t.clone() for name, t in trainable_tensors(model).items()}, partial, metadata=metadata)
        else:
            save_clip(model.clip, partial)
    return path


def import_checkpoint(
    file: str | Path, config: Any, out: str | Path, clip: str | Path | None = None, *, section: str = ""
) -> Imported:
    """Turns a file of others into something this program uses.

    A released HarMA file or Combiner becomes a run; GeoRSCLIP's, CLIP4Cir's or another CLIP becomes a backbone file.

    Args:
        file: What to read; nothing in it is executed.
        config: Settings of the recipe it belongs to; the adapters' sizes are taken from the file.
        out: Folder to make; written whole or not at all.
        clip: The CLIP that a Combiner was trained on; see `import_combiner`.
        section: Which of several models in the file, see `harma_ray.models.foreign.read_foreign`.

    Raises:
        UserError: If the file does not fit, listing what does not, or the folder exists.
    """
    path, folder = Path(file).expanduser(), output_path(out)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    weights = read_foreign(path, section=section)
    if clip is not None and weights.kind != "combiner":
        raise UserError(f"`--clip` is for a Combiner, which {path} is not; leave it out")
    if weights.kind == "released":
        return _import_released(weights, config, folder)
    if weights.kind == "combiner":
        return import_combiner(path, weights.tensors, config, folder, clip)
    if _has(weights, _OWN_ADAPTER_MARK):
        way_out = f"evaluate it with {command_line('--checkpoint', path)}"
        raise UserError(f"{path} is an adapter file, which needs no import; {way_out}")
    model, notes = load_clip(config.model.architecture, weights, activation=config.model.activation)
    with making(folder) as made:
        made.mkdir()
        save_clip(model, made / BACKBONE_NAME, says_activation=_knows_activation(weights, config))
    return Imported(
        folder / BACKBONE_NAME,
        _told([*weights.notes, *notes])
        + f"{len(model.state_dict())} tensors of `{config.model.architecture}`, fingerprint "
        f"{backbone_fingerprint(model)[:12]}\n"
        f"use it with {command_line('--set', show_override('model.pretrained', str(folder / BACKBONE_NAME)))}",
    )


def _import_released(weights: ForeignWeights, config: Any, folder: Path) -> Imported:
    model, config, notes = _released_model(weights, config)
    config = build_config(config, {"model.pretrained": str(folder / BACKBONE_NAME)})
    backbone = backbone_fingerprint(model)
    knows = _knows_activation(weights, config)
    with making(folder) as made:
        run = create_run(made.parent, made.name, config)
        save_clip(model.clip, made / BACKBONE_NAME, without=_OWN_ADAPTER_MARK, says_activation=knows)
        meta = CheckpointMeta(0, 0, {}, {}, config_hash(config), config.recipe, backbone)
        save_checkpoint(run.path, meta, model, {})
    return Imported(
        folder,
        _told([*weights.notes, *notes])
        + f"{len(weights.tensors)} tensors; adapters of width {config.adapter.width}, shared width "
        f"{config.adapter.shared_width}; backbone fingerprint {backbone[:12]}\n"
        f"use it with {launch_command('evaluate', '--run', folder, '--data', 'DATA')}",
    )


def load_model(file: str | Path | None, config: Any) -> nn.Module:
    """Builds a recipe's model with the weights of a file.

    Args:
        file: A run's folder (its best checkpoint), a checkpoint's folder, an adapter file (``.safetensors``), or a
            released HarMA ``.pth``, which holds its own backbone and says how wide its adapters are. None = no file:
            the recipe's backbone as it is, see `Task.untrained_model`.
        config: Settings that the weights were trained with.

    Returns:
        The model on CPU, in evaluation mode.

    Raises:
        UserError: If the file does not fit, listing what does not, or belongs to another backbone.
    """
    if file is None:
        make_task(config).require_backbone()
        return make_task(config).untrained_model().eval()
    path = Path(file).expanduser()
    if (path / CONFIG_NAME).is_file():
        path = open_run(path).best_checkpoint()
    if (path / META_NAME).is_file():
        run = path.absolute().parent.parent
        if (run / CONFIG_NAME).is_file():
            _check_settings(to_dict(open_run(run).config), config, path)
        model = make_task(config).new_model()
        load_weights(path, model, backbone=backbone_fingerprint(model))
        return model.eval()
    weights = read_foreign(path)
    if weights.kind == "combiner":
        words = ("--recipe", "clip4cir-combiner", "--clip", "FILE", "--out", "FOLDER")
        way_out = f"import both first: {launch_command('checkpoint', 'import', path, *words)}"
        raise UserError(f"{path} is a Combiner without its CLIP; {way_out}")
    if weights.kind == "clip":
        way_out = command_line("--zero-shot", "--set", show_override("model.pretrained", str(path)))
        raise UserError(f"{path} is a plain CLIP; evaluate it with {way_out}")
    if weights.kind == "released":
        return _released_model(weights, config)[0].eval()
    metadata = weights.metadata
    if metadata.get("format") != OWN_FORMAT:
        raise UserError(
            f"{path} is neither a released HarMA file (no name has `{ADAPTER_MARK}`) nor an adapter file of this "
            "program"
        )
    model = make_task(config).new_model()
    own, backbone = trainable_tensors(model), backbone_fingerprint(model)
    _check_settings(json.loads(metadata.get("config", "{}")), config, path)
    if metadata.get("backbone", backbone) != backbone:
        raise UserError(
            f"{path} was trained on a backbone with fingerprint {metadata['backbone'][:12]}, but this model's is "
            f"{backbone[:12]}; set model.architecture and model.pretrained to those it was trained with"
        )
    check_fit(own, weights.tensors, str(path))
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
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
            describe_tensors(read_foreign(path / WEIGHTS_NAME).tensors),
        ])  # fmt: skip
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} does not exist, or is a folder that is neither a run nor a checkpoint")
    models = read_models(path)
    several = [f"{path} holds {len(models)} models that differ; checkpoint import takes one with --section"]
    return "\n".join((several if len(models) > 1 else []) + [_describe_weights(model) for model in models])


def _describe_weights(weights: ForeignWeights) -> str:
    """Says what one model of a file is, what was done to read it, its tensors and its activation."""
    path, state, metadata = weights.path, weights.tensors, weights.metadata
    lines = [f"read        {note}" for note in weights.notes]
    if metadata.get("format") == OWN_FORMAT:
        title = (
            f"adapter file {path} of recipe {metadata.get('recipe')}, for {metadata.get('architecture')} with "
            f"fingerprint {metadata.get('backbone', 'unknown')[:12]}"
        )
    elif weights.kind == "combiner":
        title = f"released CLIP4Cir Combiner {path}: {describe_combiner(state)}"
    elif weights.kind == "other":
        title = f"state dict {path}, not of a CLIP"
    else:
        kind = "released HarMA file" if weights.kind == "released" else "open_clip state dict"
        title = f"{kind} {path}: {guess_architecture(state)}"
        told = {None: "not told by the file", True: "quick GELU", False: "GELU"}[weights.quick_gelu]
        lines.append(
            f"activation  {told}" + (f" (it {weights.activation_source})" if weights.activation_source else "")
        )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    lines += [f"BROKEN      NaN or infinity in {len(broken)} tensors, such as {broken[0]}"] if broken else []
    return "\n".join([title, describe_tensors(state), *lines])


def _released_model(weights: ForeignWeights, config: Any) -> tuple[DualEncoder, Any, list[str]]:
    """Builds the model of a released file, settings with the sizes that its shapes show, and what was left out."""
    adapters = {n.rpartition(ADAPTER_MARK)[2]: t for n, t in weights.tensors.items() if ADAPTER_MARK in n}
    sizes = {name: len(tensor) for name, tensor in adapters.items() if tensor.ndim}
    changes = {
        "model.pretrained": "random",
        "model.tuning": "adapters",
        "adapter.width": sizes.get("img_proj_down.weight", config.adapter.width),
        "adapter.shared_width": sizes.get("BiShareAdapterxx.l1.weight", config.adapter.shared_width),
    }
    config = build_config(config, changes, origin=str(weights.path))
    check_file_activation(config.model.architecture, weights, config.model.activation)
    model = make_task(config).new_model()
    assert isinstance(model, DualEncoder)
    try:
        notes = from_released(weights.tensors, model)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from error
    return model, config, notes


def _check_settings(trained: dict[str, Any], config: Any, path: Path) -> None:
    """Raises UserError if weights were trained with settings that change what they compute but not their shapes."""
    theirs, ours = flat_settings(trained), flat_settings(to_dict(config))
    wrong = [name for name in _UNSEEN if name in theirs and theirs[name] != ours.get(name)]
    if wrong:
        changes = " ".join(command_line("--set", show_override(name, theirs[name])) for name in wrong)
        raise UserError(f"{path} was trained with other settings; add {changes}")


def _has(weights: ForeignWeights, mark: str) -> bool:
    return any(mark in name for name in weights.tensors)


def _knows_activation(weights: ForeignWeights, config: Any) -> bool:
    return weights.quick_gelu is not None or bool(config.model.activation)


def _told(notes: list[str]) -> str:
    return "".join(f"{note}\n" for note in notes)
