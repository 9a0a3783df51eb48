"""What an export is asked for, and what is wrong with that as far as it shows without torch and the model."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harma_ray.errors import UserError, first_few
from harma_ray.files import output_path
from harma_ray.formats import require_clip
from harma_ray.runs import Run
from harma_ray.training.run_files import read_meta

EXPORTS = ("released", "adapter", "open_clip", "onnx", "huggingface")
BackboneChoice = Literal["include", "name"]
LIST_NAME = ".harma_ray-export.json"
"""Beside what was exported into a folder: the names of all its files. Only what it names is ever replaced."""
_OTHER_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt")
_FOR_GRAPHS = ("onnx", "onnxscript")
"""Packages that torch's exporter needs."""


@dataclass(frozen=True)
class HubOptions:
    """What may be chosen for ``huggingface``."""

    backbone: BackboneChoice | None = None
    """Whether the weights that a CLIP started from are in the folder; None: those of files are."""
    figures: Sequence[str | Path] = ()
    """Files of ``evaluate --json``, whose figures have intervals."""


def check_export(
    run: Run, format: str, out: str | Path, *, metric: str | None, overwrite: bool, hub: HubOptions
) -> tuple[Path, Path]:
    """Returns where an export is written and the checkpoint that it is of.

    Args: as for `harma_ray.exports.checkpoint.export_checkpoint`.

    Raises:
        UserError: If the format does not fit the run, a package is missing, or `out` exists or cannot be written.
    """
    path = output_path(out)
    require_free(path, overwrite=overwrite)
    if format not in EXPORTS:
        raise UserError(f"the format must be one of {', '.join(EXPORTS)}, got `{format}`")
    if format != "huggingface" and hub != HubOptions():
        raise UserError("`--backbone` and `--figures` are for --format huggingface; leave them out")
    checkpoint = run.best_checkpoint(metric)
    run.config.check_export(format)
    if format == "adapter" and not read_meta(checkpoint).trainable:
        raise UserError(f"run {run.path} trained nothing; export it as `open_clip`")
    if format == "open_clip":
        require_clip(run.config)
        if path.suffix in _OTHER_WEIGHTS:
            raise UserError(f"a CLIP is written as .safetensors, or as a folder, got `{path.name}`; name it otherwise")
    if format == "onnx":
        require_packages()
    return path, checkpoint


def require_packages() -> None:
    """Raises UserError if a package is missing that graphs are written with."""
    missing = [name for name in _FOR_GRAPHS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX graphs need {" and ".join(missing)}; run: pip install "harma-ray[onnx]"')


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raises UserError if what is there may not be replaced; of folders those alone that hold what an export made."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out, or replace it with --overwrite")
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        made = {LIST_NAME, *json.loads((path / LIST_NAME).read_text())}
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path} is a folder that no export made (no {LIST_NAME} in it), which is not replaced; choose "
            "another --out"
        ) from None
    others = [name for name in list_files(path) if name not in made]
    if others:
        raise UserError(
            f"{path} holds what no export wrote there ({first_few(others)}) and is not replaced; choose another --out"
        )


def list_files(folder: Path) -> list[str]:
    """Returns the names of all files in a folder and its sub-folders."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in files)
