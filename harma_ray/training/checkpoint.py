"""Checkpoints of runs: what is trained, not the frozen backbone; written whole or not at all; data, never code.

A checkpoint is a folder ``checkpoints/step_00000420``: ``trainable.safetensors`` (the trainable tensors), ``state.pt``
(optimiser, schedule, random states; read with ``weights_only=True``) and ``checkpoint.json`` (where the run stood, the
hash of its configuration, the fingerprint of the backbone). It is written beside its place and renamed, so a killed
run or a full disk leaves the previous checkpoint as it was.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harma_ray.config import StartConfig
from harma_ray.distributed import rank
from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics
from harma_ray.files import atomic
from harma_ray.models.fingerprints import file_fingerprint
from harma_ray.models.weights import check_fit
from harma_ray.parallel import gather_tensors, spread_like
from harma_ray.training.run_files import (
    META_NAME,
    WEIGHTS_NAME,
    CheckpointMeta,
    checkpoint_path,
    list_checkpoints,
    read_meta,
)

STATE_NAME = "state.pt"


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trainable parameters of an (unwrapped) model by name, detached; shared ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(run_dir: Path, meta: CheckpointMeta, model: nn.Module, state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint; called on every worker if the model is spread over them, worker 0 writes.

    Args:
        run_dir: The run's folder.
        meta: Where the run stands; ``trainable`` is filled in here.
        model: The unwrapped model.
        state: Tensors and plain values: optimiser, schedule, random states.

    Raises:
        UserError: If the disk is full or the folder cannot be written; older checkpoints are untouched.
    """
    final = checkpoint_path(run_dir, meta.step)
    tensors = {name: tensor.contiguous() for name, tensor in gather_tensors(trainable_tensors(model)).items()}
    if rank() != 0:
        return final
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    try:
        with atomic(final, overwrite=True) as partial:
            partial.mkdir()
            save_file(tensors, partial / WEIGHTS_NAME)
            torch.save(dict(state), partial / STATE_NAME)
            (partial / META_NAME).write_text(json.dumps({**asdict(meta), "trainable": shapes}, indent=1))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is told in all three ways
        raise _write_error(final, error) from error
    return final


def load_weights(path: Path, model: nn.Module, *, backbone: str) -> CheckpointMeta:
    """Loads the trainable tensors of a checkpoint into an (unwrapped) model, strictly.

    Args:
        path: The checkpoint's folder.
        model: The model as the task builds it.
        backbone: Fingerprint of the model's base.

    Raises:
        UserError: If the checkpoint belongs to another backbone, or names or shapes differ.
    """
    meta = read_meta(path)
    if meta.backbone != backbone:
        raise UserError(
            f"checkpoint {path} was trained on a backbone with fingerprint {meta.backbone[:12]}, but this model's is "
            f"{backbone[:12]}; build it with the settings in the run's config.yaml"
        )
    own = trainable_tensors(model)
    try:
        tensors = load_file(path / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS_NAME} cannot be read ({error}); use an older checkpoint") from error
    check_fit(own, tensors, str(path))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(spread_like(tensor, own[name]))
    return meta


def load_start(start: StartConfig, model: nn.Module, *, backbone: str) -> list[str]:
    """Loads the weights that a run starts from, if it does from any, into an (unwrapped) model, strictly.

    Args:
        start: Where they are.
        model: The model as the task builds it.
        backbone: Fingerprint of the model's base; of no account if all of the model is trained.

    Returns:
        What the user should know of it, one line each.

    Raises:
        UserError: If they are not there any more, are others, or do not fit.
    """
    path = start.path
    if not start.weights:
        return []
    if not (path / WEIGHTS_NAME).is_file():
        raise UserError(f"the weights that this run starts from are not there: {path}; name their run with --from")
    if file_fingerprint(path / WEIGHTS_NAME) != start.weights:
        raise UserError(f"{path} holds other weights than those that this run starts from; name its run with --from")
    load_weights(path, model, backbone=backbone if keeps_weights(model) else read_meta(path).backbone)
    return [f"it starts from the weights in {path}"]


def keeps_weights(model: nn.Module) -> bool:
    """Tells whether weights of a model stay as they are; a single number, such as CLIP's unused scale, is none."""
    return any(parameter.dim() and not parameter.requires_grad for parameter in model.parameters())


def load_state(path: Path) -> dict[str, Any]:
    """Opens the optimiser's and the loop's state of a checkpoint, whose tensors are read as they are used.

    Nothing in the file is executed.

    Raises:
        UserError: If the file is damaged or holds code.
    """
    try:
        return torch.load(path / STATE_NAME, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path / STATE_NAME} cannot be read ({reason}); use an older checkpoint") from error


def prune_checkpoints(run_dir: Path, metrics: Metrics, num_best: int) -> None:
    """Deletes all checkpoints but the last and, of those that were evaluated, the `num_best` best by each metric.

    Of equals the earlier one is kept.
    """
    checkpoints = list_checkpoints(run_dir)
    figures = {path: read_meta(path).metrics for path in checkpoints}
    keep = set(checkpoints[-1:])
    for metric in metrics.kept:
        rated = [path for path in checkpoints if metric in figures[path]]
        keep |= {*metrics.ranked(metric, rated, figures.__getitem__)[:num_best]}
    for path in checkpoints:
        if path not in keep:
            shutil.rmtree(path)


def _write_error(path: Path, error: Exception) -> UserError:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "free some space" if full else "check the folder's permissions and free space"
    return UserError(f"cannot write checkpoint {path} ({reason}); {way_out} and resume from the previous checkpoint")
