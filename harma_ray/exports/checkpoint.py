"""A run's best weights, written for other programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from harma_ray.errors import UserError
from harma_ray.exports.clip_folder import write_clip_folder
from harma_ray.exports.graphs import write_graphs
from harma_ray.exports.hub import write_hub_folder
from harma_ray.exports.request import LIST_NAME, HubOptions, check_export, list_files, require_free
from harma_ray.files import making, write_text
from harma_ray.formats import ForeignFormat
from harma_ray.models.backbones import ClipBackbone
from harma_ray.models.names import OWN_FORMAT
from harma_ray.models.weights import save_clip
from harma_ray.recipes import make_task
from harma_ray.recipes.tasks import FORMATS, clip_backbone
from harma_ray.runs import Run
from harma_ray.settings import to_dict
from harma_ray.training.checkpoint import read_meta, trainable_tensors


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    """The file, or the folder."""
    notes: tuple[str, ...] = ()
    """What the user should know of it."""

    def describe(self) -> str:
        """Returns what was made, and how large it is."""
        size = sum(file.stat().st_size for file in (self.path, *self.path.rglob("*")) if file.is_file())
        return "\n".join([f"wrote {self.path} ({size / 1e6:.1f} MB)", *self.notes])


def export_checkpoint(
    run: Run,
    format: str,
    out: str | Path,
    *,
    metric: str | None = None,
    overwrite: bool = False,
    hub: HubOptions | None = None,
) -> Exported:
    """Writes a run's best weights for other programs.

    Args:
        run: The run.
        format: One of `harma_ray.exports.request.EXPORTS`.
        out: The file, or the folder, as the format has it; written whole or not at all.
        metric: What the best weights are the best by; None = the recipe's objective.
        overwrite: Whether what is there may be replaced.
        hub: What was chosen for ``huggingface``.

    Raises:
        UserError: If the format does not fit the run, a package is missing, or `out` exists or cannot be written.
    """
    hub = hub or HubOptions()
    path, checkpoint = check_export(run, format, out, metric=metric, overwrite=overwrite, hub=hub)
    own = next((own for own in FORMATS if isinstance(run.config, own.settings)), None)
    if own is None and format in ("released", "onnx"):
        what = "files of its own" if format == "released" else "graphs"
        raise UserError(f"the paper of recipe {run.config.recipe} has no {what} here; export it as `adapter`")
    meta = read_meta(checkpoint)
    model, notes = run.load_checkpoint(checkpoint), ()
    with making(path, overwrite=overwrite) as partial:
        if format == "adapter":
            _write_adapters(model, run, meta.backbone, partial)
        elif format == "open_clip":
            notes = tuple(note.format(path) for note in _write_clip(model, run, own, partial))
        elif format == "huggingface":
            notes = write_hub_folder(run, model, checkpoint, own, partial, hub)
        elif own and format == "released":
            own.write(model, run, meta.epoch, partial)
        elif own:
            facts = {"recipe": run.config.recipe, "backbone": meta.backbone}
            notes = (write_graphs(own.towers(model, run), facts, partial),)
        if partial.is_dir():
            write_text(partial / LIST_NAME, json.dumps(list_files(partial), indent=1))
        require_free(path, overwrite=overwrite)  # again: something may have come there meanwhile
    return Exported(path, notes)


def _write_adapters(model: nn.Module, run: Run, backbone: str, path: Path) -> None:
    """Writes what is trained, and what it belongs to."""
    of = make_task(run.config).backbone
    metadata = {
        "format": OWN_FORMAT,
        "recipe": run.config.recipe,
        "architecture": of.architecture if isinstance(of, ClipBackbone) else of.name,
        "backbone": backbone,
        "config": json.dumps(to_dict(run.config)),
    }
    save_file({name: t.clone() for name, t in trainable_tensors(model).items()}, path, metadata=metadata)


def _write_clip(model: Any, run: Run, own: ForeignFormat | None, path: Path) -> tuple[str, ...]:
    """Writes a model's CLIP, as a file or as a folder of open_clip.

    Returns:
        How the folder is opened, ``{}`` for its place, and what open_clip does otherwise.
    """
    if path.suffix == ".safetensors" or own is None:
        save_clip(model.clip, path)
        return ()
    prepared = own.preparation(model, run)
    write_clip_folder(model.clip, clip_backbone(run.config).architecture, prepared, path)
    use = 'open_clip.create_model_and_transforms("local-dir:{}")'
    return (use, f"its transform leaves out a step of this run: {prepared.first}") if prepared.first else (use,)
