"""A run's best weights, written for other programs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from harma_ray.errors import UserError, first_few
from harma_ray.exports.card import is_own_card
from harma_ray.exports.clip_folder import CONFIG_NAME as CLIP_NAME
from harma_ray.exports.clip_folder import WEIGHTS_NAME as CLIP_WEIGHTS
from harma_ray.exports.clip_folder import write_clip_folder
from harma_ray.exports.graphs import FACTS_NAME as GRAPHS_NAME
from harma_ray.exports.graphs import require_packages, write_graphs
from harma_ray.exports.hub import BACKBONE_NAME, CARD_NAME, HubOptions, write_hub_folder
from harma_ray.files import making, output_path
from harma_ray.formats import ForeignFormat
from harma_ray.models.backbones import ClipBackbone
from harma_ray.models.foreign import OWN_FORMAT
from harma_ray.models.weights import save_clip
from harma_ray.recipes import make_task
from harma_ray.recipes.tasks import FORMATS, clip_backbone
from harma_ray.runs import CONFIG_NAME, Run
from harma_ray.settings import to_dict
from harma_ray.training.checkpoint import META_NAME, WEIGHTS_NAME, read_meta, trainable_tensors
from harma_ray.training.run_files import REPORT_NAME

EXPORTS = ("released", "adapter", "open_clip", "onnx", "huggingface")
_TOKENIZER = ("tokeniz*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*")
_INTERNVL = ("config.json", "model.safetensors", *_TOKENIZER)
_CHECKPOINT = "checkpoints/step_*"
_TOWERS = ("image", "text", "combiner")
_MADE = {
    (CARD_NAME,): (
        *(CARD_NAME, CONFIG_NAME, REPORT_NAME, BACKBONE_NAME),
        *(f"{_CHECKPOINT}/{META_NAME}", f"{_CHECKPOINT}/{WEIGHTS_NAME}"),
        *(f"*/{name}" for name in _INTERNVL),
    ),
    (GRAPHS_NAME,): (GRAPHS_NAME, *(f"{tower}.onnx{part}" for tower in _TOWERS for part in ("", ".data"))),
    (CLIP_NAME,): (CLIP_NAME, CLIP_WEIGHTS),
    ("config.json", "model.safetensors"): _INTERNVL,
}
"""Files by which a folder is known to be an export, and patterns of all that such an export writes."""
_OTHER_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt")


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
        format: One of `EXPORTS`.
        out: The file, or the folder, as the format has it; written whole or not at all.
        metric: What the best weights are the best by; None = the recipe's objective.
        overwrite: Whether what is there may be replaced.
        hub: What was chosen for ``huggingface``.

    Raises:
        UserError: If the format does not fit the run, a package is missing, or `out` exists or cannot be written.
    """
    path = output_path(out)
    _require_free(path, overwrite=overwrite)
    if format not in EXPORTS:
        raise UserError(f"the format must be one of {', '.join(EXPORTS)}, got `{format}`")
    own = next((own for own in FORMATS if isinstance(run.config, own.settings)), None)
    hub = hub or HubOptions()
    if format != "huggingface" and hub != HubOptions():
        raise UserError("`--backbone` and `--figures` are for --format huggingface; leave them out")
    checkpoint = run.best_checkpoint(metric)
    meta = read_meta(checkpoint)
    _check(run, format, own, path, is_trained=bool(meta.trainable))
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
    return Exported(path, notes)


def _require_free(path: Path, *, overwrite: bool) -> None:
    """Raises UserError if what is there may not be replaced; of folders those alone that hold what an export made."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out, or replace it with --overwrite")
    if not path.is_dir() or not any(path.iterdir()):
        return
    known = next((patterns for names, patterns in _MADE.items() if _is_marked(path, names)), None)
    if known is None:
        raise UserError(f"{path} is a folder that no export made, which is not replaced; choose another --out")
    found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())
    others = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in known)]
    if others:
        raise UserError(
            f"{path} holds what no such export writes ({first_few(others)}) and is not replaced; choose another --out"
        )


def _is_marked(path: Path, names: Sequence[str]) -> bool:
    """Tells whether a folder holds the files by which an export is known; a card must be of ours."""
    return all((path / name).is_file() and (name != CARD_NAME or is_own_card(path / name)) for name in names)


def _check(run: Run, format: str, own: ForeignFormat | None, path: Path, *, is_trained: bool) -> None:
    """Raises UserError if a format does not fit a run, as far as shows without its model."""
    if own is not None:
        own.check_export(run, format)
    elif format in ("released", "onnx"):
        what = "files of its own" if format == "released" else "graphs"
        raise UserError(f"the paper of recipe {run.config.recipe} has no {what} here; export it as `adapter`")
    if format == "adapter" and not is_trained:
        raise UserError(f"run {run.path} trained nothing; export it as `open_clip`")
    if format == "open_clip":
        clip_backbone(run.config)
        if path.suffix in _OTHER_WEIGHTS:
            raise UserError(f"a CLIP is written as .safetensors, or as a folder, got `{path.name}`; name it otherwise")
    if format == "onnx":
        require_packages()


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
