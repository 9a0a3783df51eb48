"""Weights of files: this program's adapter files, plain CLIPs, and the formats that the recipes know."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harma_ray.errors import UserError, count
from harma_ray.files import making, new_path
from harma_ray.formats import ForeignFormat, Reading
from harma_ray.models.architectures import guess_architecture
from harma_ray.models.backbones import load_clip
from harma_ray.models.fingerprints import backbone_fingerprint, folder_fingerprint
from harma_ray.models.foreign import CLIP_MARK, ForeignWeights, read_foreign, read_models
from harma_ray.models.names import OWN_FORMAT
from harma_ray.models.weights import check_fit, save_clip
from harma_ray.recipes import make_task
from harma_ray.recipes.tasks import FORMATS, clip_backbone
from harma_ray.runs import CONFIG_NAME, create_run, open_run
from harma_ray.settings import config_hash, flat_settings, show_override, to_dict
from harma_ray.shell import command_line, launch_command
from harma_ray.task import Task
from harma_ray.training.checkpoint import (
    META_NAME,
    WEIGHTS_NAME,
    CheckpointMeta,
    list_checkpoints,
    load_weights,
    read_meta,
    save_checkpoint,
    trainable_tensors,
)
from harma_ray.training.run_files import FOLDER

BACKBONE_NAME = "backbone.safetensors"
"""The file of a CLIP in the folder of what was imported."""
_MARKS = (CLIP_MARK, *(mark for known in FORMATS for mark in known.marks))


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    path: Path
    """A run's folder, or a backbone file."""
    text: str
    """What it holds and how to use it."""

    def describe(self) -> str:
        """Returns what was made and how to use it."""
        return f"wrote {self.path}\n{self.text}"


def import_checkpoint(
    file: str | Path, config: Any, out: str | Path, clip: str | Path | None = None, *, section: str = ""
) -> Imported:
    """Turns a file of others into something this program uses.

    What a recipe's format knows becomes a run, another CLIP a backbone file.

    Args:
        file: What to read, a file or a folder; nothing in it is executed.
        config: Settings of the recipe it belongs to; sizes are taken from the file.
        out: Folder to make; written whole or not at all.
        clip: The CLIP that a part of a model was trained on: a run, a file, or a tag; see `ForeignFormat.read`.
        section: Which of several models in the file, see `harma_ray.models.foreign.read_foreign`.

    Raises:
        UserError: If the file does not fit, listing what does not, or the folder exists.
    """
    path, folder = Path(file).expanduser(), new_path(out)
    known, weights = _find(path, section)
    if clip is not None and not (known and known.part):
        parts = " or ".join(other.part for other in FORMATS if other.part)
        raise UserError(f"`--clip` is for {parts}, which {path} is not; leave it out")
    if known:
        is_run = (Path(clip or "").expanduser() / CONFIG_NAME).is_file()
        beneath = open_run(clip) if clip and is_run else clip and str(clip)
        return _make_run(folder, known.read(weights, config, folder / BACKBONE_NAME, beneath))
    if weights.entries.get("format") == OWN_FORMAT:
        way_out = f"evaluate it with {command_line('--checkpoint', path)}"
        raise UserError(f"{path} is an adapter file, which needs no import; {way_out}")
    backbone = clip_backbone(config)
    model, notes = load_clip(backbone.architecture, weights, activation=backbone.activation)
    with making(folder) as made:
        made.mkdir()
        knows_activation = weights.quick_gelu is not None or bool(backbone.activation)
        save_clip(model, made / BACKBONE_NAME, says_activation=knows_activation)
    kept = folder / BACKBONE_NAME
    size, fingerprint = count(len(model.state_dict()), "tensor"), backbone_fingerprint(model)[:12]
    told = f"{size} of `{backbone.architecture}`, fingerprint {fingerprint}"
    way_on = f"use it with {command_line('--set', show_override('model.pretrained', str(kept)))}"
    return Imported(kept, "\n".join([*weights.notes, *notes, told, way_on]))


def _make_run(folder: Path, found: Reading) -> Imported:
    """Makes the folder of a run of a model that was read."""
    config = found.config
    with making(folder) as made:
        run = create_run(made.parent, made.name, config)
        if found.keeps_clip:
            clip = found.model.clip
            assert isinstance(clip, nn.Module)
            save_clip(clip, made / BACKBONE_NAME, says_activation=found.knows_activation)
        meta = CheckpointMeta(0, 0, {}, {}, config_hash(config), config.recipe, found.backbone)
        save_checkpoint(run.path, meta, found.model, {})
    command, *rest = found.use
    return Imported(folder, f"{found.text}\nuse it with {launch_command(command, '--run', folder, *rest)}")


def load_model(file: str | Path | None, config: Any) -> nn.Module:
    """Builds a recipe's model with the weights of a file.

    Args:
        file: A run's folder (its best checkpoint), a checkpoint's folder, an adapter file (``.safetensors``), or a
            file or folder that a recipe's format knows. None = no file: the recipe's backbone as it is, see
            `Task.baseline_model`.
        config: Settings that the weights were trained with.

    Returns:
        The model on CPU, in evaluation mode.

    Raises:
        UserError: If the file does not fit, listing what does not, or belongs to another backbone.
    """
    task = make_task(config)
    if file is None:
        config.require_named()
        return task.baseline_model().eval()
    path = Path(file).expanduser()
    if (path / CONFIG_NAME).is_file():
        path = open_run(path).best_checkpoint()
    if (path / META_NAME).is_file() or path.parent.name == FOLDER:
        run = path.absolute().parent.parent
        if (run / CONFIG_NAME).is_file():
            _check_settings(to_dict(open_run(run).config), config, path)
        model = task.new_model()
        load_weights(path, model, backbone=task.backbone.fingerprint(model))
        return model.eval()
    known, weights = _find(path)
    if known:
        return known.load(weights, config).eval()
    if weights.mark == CLIP_MARK:
        way_out = command_line("--zero-shot", "--set", show_override("model.pretrained", str(path)))
        raise UserError(f"{path} is a plain CLIP; evaluate it with {way_out}")
    return _load_adapters(weights, task).eval()


def _load_adapters(weights: ForeignWeights, task: Task) -> nn.Module:
    """Builds a task's model with the weights of an adapter file; UserError if it is none, or another backbone's."""
    path, metadata = weights.path, weights.entries
    if metadata.get("format") != OWN_FORMAT:
        raise UserError(
            f"{path} is neither an adapter file of this program nor a released one that a recipe knows (launch.py "
            "checkpoint show says what it holds)"
        )
    model = task.new_model()
    own, backbone = trainable_tensors(model), task.backbone.fingerprint(model)
    _check_settings(json.loads(metadata.get("config", "{}")), task.config, path)
    if metadata.get("backbone", backbone) != backbone:
        raise UserError(
            f"{path} was trained on a backbone with fingerprint {metadata['backbone'][:12]}, but this model's is "
            f"{backbone[:12]}; give the settings it was trained with"
        )
    check_fit(own, weights.tensors, str(path))
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            own[name].copy_(tensor)
    return model


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
            _describe_tensors(read_foreign(path / WEIGHTS_NAME).tensors if meta.trainable else {}),
        ])  # fmt: skip
    known = _claimed_folder(path)
    if known or any(path.glob("model*.safetensors")):
        title = _describe_weights(*known) if known else f"Hugging Face folder {path}"
        of_files = any(path.glob("model*.safetensors"))
        return title + (f"\nweights     fingerprint {folder_fingerprint(path)[:12]}" if of_files else "")
    if path.is_dir() or not path.exists():
        raise UserError(
            f"{path} does not exist, or is a folder that is neither a run, a checkpoint nor of Hugging Face"
        )
    models = read_models(path, _MARKS)
    several = [f"{path} holds {len(models)} models that differ; checkpoint import takes one with --section"]
    return "\n".join((several if len(models) > 1 else []) + [_describe_weights(*_recognised(m)) for m in models])


def _describe_weights(known: ForeignFormat | None, weights: ForeignWeights) -> str:
    """Says what one model of a file is, what was done to read it, its tensors and its activation."""
    path, state, said = weights.path, weights.tensors, weights.entries
    lines = [f"read        {note}" for note in weights.notes]
    if known:
        title = known.describe(weights)
    elif said.get("format") == OWN_FORMAT:
        title = (
            f"adapter file {path} of recipe {said.get('recipe')}, for {said.get('architecture')} with fingerprint "
            f"{said.get('backbone', 'unknown')[:12]}"
        )
    elif weights.mark == CLIP_MARK:
        title = f"open_clip state dict {path}: {guess_architecture(state)}"
    else:
        title = f"state dict {path}, not of a CLIP"
    if weights.mark == CLIP_MARK:
        activation = {None: "not told by the file", True: "quick GELU", False: "GELU"}[weights.quick_gelu]
        source = f" (it {weights.activation_source})" if weights.activation_source else ""
        lines.append(f"activation  {activation}{source}")
    broken = [name for name, tensor in state.items() if not tensor.is_meta and not torch.isfinite(tensor).all()]
    lines += [f"BROKEN      NaN or infinity in {count(len(broken), 'tensor')}, such as {broken[0]}"] if broken else []
    return "\n".join([title, _describe_tensors(state), *lines])


def _describe_tensors(state: Mapping[str, Tensor]) -> str:
    """Returns lines with counts, dtypes and the sizes of what a paper adds to its backbone."""
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    count = f"{sum(tensor.numel() for tensor in state.values()):,} numbers"
    lines = [f"tensors     {len(state)}, {count} ({kinds})" if kinds else f"tensors     {len(state)}, {count}"]
    return "\n".join([*lines, *(line for known in FORMATS for line in known.sizes(state))])


def _find(path: Path, section: str = "") -> tuple[ForeignFormat | None, ForeignWeights]:
    """Returns what `_recognised` does, of a file or a folder; of a folder it is names and shapes alone."""
    if not path.is_dir():
        return _recognised(read_foreign(path, _MARKS, section=section))
    if section or not (found := _claimed_folder(path)):
        folders = "a Hugging Face folder of an InternVL or InternViT, which has no sections"
        raise UserError(f"{path} must be a file of weights, or {folders}")
    return found


def _claimed_folder(path: Path) -> tuple[ForeignFormat, ForeignWeights] | None:
    """Returns the recipe's format that a folder has, and its tensors."""
    claims = ((known, known.claim_folder(path)) for known in FORMATS)
    return next(((known, claimed) for known, claimed in claims if claimed is not None), None)


def _recognised(weights: ForeignWeights) -> tuple[ForeignFormat | None, ForeignWeights]:
    """Returns the recipe's format that a file has (None: of none), and the weights under that format's names."""
    claims = ((known, known.claim(weights)) for known in FORMATS)
    return next(((known, claimed) for known, claimed in claims if claimed is not None), (None, weights))


def _check_settings(trained: dict[str, Any], config: Any, path: Path) -> None:
    """Raises UserError if weights were trained with settings that change what they compute but not their shapes."""
    theirs, ours = flat_settings(trained), flat_settings(to_dict(config))
    unseen = make_task(config).unseen_settings
    wrong = [name for name in unseen if name in theirs and theirs[name] != ours.get(name)]
    if wrong:
        changes = " ".join(command_line("--set", show_override(name, theirs[name])) for name in wrong)
        raise UserError(f"{path} was trained with other settings; add {changes}")
