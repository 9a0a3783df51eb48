"""A run as a folder for the Hugging Face hub: small enough to share, complete enough to be loaded as the run was.

The folder is that of a run, without its records, with a model card. Paths in its settings lead into it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from harma_ray.config import OnDisk, RunConfig
from harma_ray.errors import UserError
from harma_ray.exports.card import Card, CardFigures
from harma_ray.exports.request import BackboneChoice, HubOptions
from harma_ray.files import write_text
from harma_ray.formats import Carried, ForeignFormat
from harma_ray.models.backbones import ClipBackbone
from harma_ray.models.foreign import read_foreign
from harma_ray.models.names import FOLDER
from harma_ray.models.weights import save_clip
from harma_ray.runs import CONFIG_NAME, Run
from harma_ray.settings import build_config, config_hash, flat_settings, marked_settings, to_dict, to_yaml
from harma_ray.training.checkpoint import STATE_NAME, CheckpointMeta, checkpoint_path, read_meta, save_checkpoint
from harma_ray.training.run_files import REPORT_NAME

CARD_NAME = "README.md"
BACKBONE_NAME = "backbone.safetensors"


def write_hub_folder(
    run: Run, model: nn.Module, checkpoint: Path, own: ForeignFormat | None, folder: Path, options: HubOptions
) -> tuple[str, ...]:
    """Writes settings, weights, report and card.

    Args:
        run: The run.
        model: With the weights of the checkpoint, on CPU; parts may be frozen here.
        checkpoint: Its checkpoint that is exported.
        own: The recipe's format, if it has one.
        folder: Is made.
        options: What was chosen.

    Returns:
        Notes for the user.

    Raises:
        UserError: If the model cannot be carried as asked for, or figures are of other weights.
    """
    meta = read_meta(checkpoint)
    figures = _known_figures(run, meta) + [_read_figures(Path(file), run, checkpoint) for file in options.figures]
    folder.mkdir()
    carried = (own and own.carry(model, folder, run)) or _carry_clip(run, meta, folder, options.backbone)
    if not carried.is_trained_further:
        model.requires_grad_(False)
    config = build_config(run.config, {**_bare_paths(run.config), **carried.changes}, origin="export")
    write_text(folder / CONFIG_NAME, to_yaml(config))
    kept = replace(meta, config_hash=config_hash(config), backbone=carried.backbone)
    (save_checkpoint(folder, kept, model, {}) / STATE_NAME).unlink()
    report = run.report
    if report is not None:
        told = {**_bare(report), "checkpoint": str(checkpoint_path(Path(), meta.step))}
        if report["best_step"] != meta.step:
            told |= {"metrics": {report["selected_on"]: meta.metrics}, "interval_95": {}}
        write_text(folder / REPORT_NAME, json.dumps(told, indent=1))
    card = _card(run, meta, own, carried, [*{(f.data, f.split): f for f in figures}.values()])
    write_text(folder / CARD_NAME, card.render(run.task.metrics))
    missing = [] if all(found.intervals for found in card.figures) else [
        "the card has figures without intervals; evaluate --json FILE computes them, --figures FILE takes them in"
    ]  # fmt: skip
    return (carried.text, *missing)


def _carry_clip(run: Run, meta: CheckpointMeta, folder: Path, choice: BackboneChoice | None) -> Carried:
    """Puts the CLIP that a run started from into a folder, or names it."""
    backbone, fingerprint = run.task.backbone, f"fingerprint {meta.backbone[:12]}"
    found = marked_settings(run.config, OnDisk).items()
    on_disk = {name: value for name, (value, mark) in found if mark.is_there(Path(value).expanduser())}
    if not isinstance(backbone, ClipBackbone):
        if choice or on_disk:
            raise UserError(f"recipe {run.config.recipe} has no CLIP to be carried along; export it as `adapter`")
        return Carried({}, meta.backbone, f"It starts from {backbone.name} ({fingerprint}).")
    if backbone.architecture.startswith(FOLDER):
        raise UserError(
            f"the CLIP of `{backbone.architecture}` is known by a folder of this machine alone, so that no other could "
            "read what is exported; name it by a repository (hf-hub:ORG/NAME), or export it as `open_clip` or `adapter`"
        )
    named = f"{backbone.architecture}, {PurePath(backbone.pretrained or 'random').name}"
    if choice == "include" or (on_disk and choice is None):
        file = backbone.pretrained if "model.pretrained" in on_disk else ""
        says = not file or bool(backbone.activation) or read_foreign(file, data=False).quick_gelu is not None
        save_clip(backbone.build(), folder / BACKBONE_NAME, says_activation=says)
        changes = {**dict.fromkeys(on_disk, ""), "model.pretrained": f"./{BACKBONE_NAME}"}
        return Carried(changes, meta.backbone, f"{BACKBONE_NAME} is what it started from: {named} ({fingerprint}).")
    if on_disk.keys() - {"model.pretrained"}:
        raise UserError("a CLIP that an earlier run has tuned has no name; leave out --backbone name")
    changes = {name: f"./{PurePath(value).name}" for name, value in on_disk.items()}
    where = "put this file into this folder" if on_disk else "loaded or drawn by its name"
    return Carried(changes, meta.backbone, f"It starts from {named} ({fingerprint}), which is not in here: {where}.")


def _bare_paths(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that lead to places of this machine, their last names in place of the paths."""
    settings = flat_settings(to_dict(config))
    return {name: _bare(value) for name, value in settings.items() if _bare(value) != value}


def _bare(value: Any) -> Any:
    """Returns plain data with the last names of paths in place of those that are absolute."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_bare(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _card(
    run: Run, meta: CheckpointMeta, own: ForeignFormat | None, carried: Carried, figures: Sequence[CardFigures]
) -> Card:
    """Returns what is told of a run."""
    backbone = run.task.backbone
    is_clip = isinstance(backbone, ClipBackbone)
    started: Any = backbone if is_clip else getattr(run.config, "model", None)
    pretrained = PurePath(getattr(started, "pretrained", "")).name
    return Card(
        name=run.path.name,
        recipe=f"A run of recipe `{run.config.recipe}`",
        tags=own.tags if own else (run.config.recipe,),
        pretrained=(backbone.architecture if is_clip else "", pretrained),
        backbone=carried.text,
        data=meta.data,
        data_name=Path(run.config.data.path).name,
        figures=figures,
        stood=f"epoch {meta.epoch:g}, step {meta.step:,}",
        settings=to_yaml(build_config(run.config, _bare_paths(run.config), origin="export")),
    )


def _known_figures(run: Run, meta: CheckpointMeta) -> list[CardFigures]:
    """Returns the figures of the run's own report, or of the checkpoint alone if the report is of another one."""
    report, name = run.report, Path(run.config.data.path).name
    by_split: Mapping[str, Any] = {run.config.selecting_split: meta.metrics} if meta.metrics else {}
    intervals: Mapping[str, Any] = {}
    if report and report["best_step"] == meta.step:
        by_split, intervals = report["metrics"], report.get("interval_95", {})
    return [
        CardFigures(split, name, metrics, **_identity(meta.data.get(split, {})), intervals=intervals.get(split, {}))
        for split, metrics in by_split.items()
    ]


def _identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("fingerprint", "rows") if key in facts}


def _read_figures(file: Path, run: Run, checkpoint: Path) -> CardFigures:
    """Reads what ``evaluate --json`` wrote; UserError if it is something else, or of other weights."""
    try:
        found = json.loads(file.expanduser().read_text("utf-8"))
        place, identity = Path(found["data"]), _identity(found)
        name = place.parent.name if place.name == found["split"] else place.name
        figures = CardFigures(found["split"], name, found["metrics"], intervals=found["interval_95"], **identity)
        weights = Path(found["weights"] or "").expanduser().resolve()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} must be what `evaluate --run {run.path} --json FILE` writes ({error})") from error
    of_run = weights == run.path.resolve() and checkpoint == run.best_checkpoint()
    if not of_run and weights != checkpoint.resolve():
        raise UserError(
            f"{file} holds figures of {found['weights']}, but {checkpoint} is exported; evaluate that and name its file"
        )
    return figures
