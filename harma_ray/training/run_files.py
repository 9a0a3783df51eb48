"""What a training leaves in its run's folder, as it is found there: its record, its report, and what checkpoints are.

Imports no torch: what is wrong with a run that a command names is told without.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError

METRICS_NAME = "metrics.jsonl"
REPORT_NAME = "report.json"
FOLDER = "checkpoints"
META_NAME = "checkpoint.json"
WEIGHTS_NAME = "trainable.safetensors"


@dataclass(frozen=True)
class CheckpointMeta:
    """Where a run stood."""

    step: int
    """Optimiser steps done."""
    epoch: float
    """Epochs done."""
    metrics: dict[str, float]
    """The last evaluation's metrics."""
    progress: dict[str, Any]
    """The loop's own state: best value, its step, evaluations without improvement."""
    config_hash: str
    """`harma_ray.settings.config_hash` of the run."""
    recipe: str
    """Name of the recipe."""
    backbone: str
    """Fingerprint of the frozen base (`backbone_fingerprint`)."""
    trainable: dict[str, list[int]] = field(default_factory=dict)
    """Names and shapes of the trainable tensors."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`harma_ray.data.identity.data_identity` of the run; empty in old checkpoints and imports."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return run_dir / FOLDER / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / FOLDER).glob(f"step_*/{META_NAME}"))


def read_meta(path: Path) -> CheckpointMeta:
    """Reads what a checkpoint says of itself.

    Raises:
        UserError: If the folder is no checkpoint, or is gone.
    """
    try:
        return CheckpointMeta(**json.loads((path / META_NAME).read_text()))
    except FileNotFoundError as error:
        others = [other.name for other in list_checkpoints(path.parent.parent)] if path.parent.name == FOLDER else []
        if not others:
            raise UserError(f"{path} is not a checkpoint of a run") from error
        raise UserError(
            f"checkpoint {path} is not there; a training replaces its checkpoints by better ones, now by "
            f"{', '.join(others)}: repeat the command"
        ) from error
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of a run ({error})") from error


def read_records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a run; a last line that was cut off by a kill is left out."""
    path = run_dir / METRICS_NAME
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
