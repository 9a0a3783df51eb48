"""CLIP4Cir's released files, in and out: a fine-tuned CLIP under ``CLIP``, a Combiner under ``Combiner``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from harma_ray.checkpoint import CheckpointMeta, save_checkpoint
from harma_ray.config import build_config, config_hash
from harma_ray.errors import UserError
from harma_ray.files import making
from harma_ray.models.backbones import has_quick_twin, knows_activation
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.containers import read_container
from harma_ray.models.weights import backbone_fingerprint, check_fit, save_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.clip4cir_config import CombinerConfig, FinetuneConfig
from harma_ray.runs import CONFIG_NAME, Run, create_run, open_run
from harma_ray.shell import launch_command

BACKBONE_NAME = "backbone.safetensors"
"""The file of a CLIP in the folder of what was imported."""
_TRAINED_ON = "trained_on"
"""Where a Combiner's file names the CLIP that it was trained on, by its fingerprint."""


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


def settings_after(run: Run, recipe: str, metric: str | None = None) -> dict[str, Any]:
    """Returns the settings by which a recipe of the second stage builds on the best model of a run of the first.

    Args:
        run: Of the first stage, finished.
        recipe: Of the second.
        metric: What the model is the best by; None = the run's objective.

    Raises:
        UserError: If the run is of another kind, the recipe builds on no other, or the best model by that metric is
            not there.
    """
    if not isinstance(recipe_config(recipe), CombinerConfig):
        raise UserError(f"recipe {recipe} does not build on another run; leave out --from")
    first = run.config
    if not isinstance(first, FinetuneConfig):
        raise UserError(f"recipe {recipe} builds on a fine-tuned CLIP, but {run.path} is a run of {first.recipe}")
    if run.report is None:  # going on with it could delete the checkpoint
        way_out = f"finish it first: {launch_command('train', '--resume', run.path)}"
        raise UserError(f"run {run.path} is not finished; {way_out}")
    return {
        "model.architecture": first.model.architecture,
        "model.pretrained": first.model.pretrained,
        "model.activation": first.model.activation,
        "model.tuned": str(run.best_checkpoint(metric)),
        "model.tuned_seed": first.seed,
        **{f"preparation.{name}": value for name, value in dataclasses.asdict(first.preparation).items()},
    }


def import_combiner(
    path: Path, state: Mapping[str, Tensor], config: Any, folder: Path, clip: str | Path | None
) -> Imported:
    """Makes a run of a released Combiner and the CLIP that it was trained on; both go into its folder.

    Args:
        path: The file.
        state: What it holds.
        config: Settings of a Combiner's recipe; the sizes are the file's.
        folder: The run's folder.
        clip: The CLIP: a file, a run of the first stage, or a tag of open_clip (then the tag is kept, no weights).

    Raises:
        UserError: If the settings are of another recipe, no CLIP is given, the Combiner does not fit it, or says that
            it was trained on another.
    """
    if not isinstance(config, CombinerConfig):
        raise UserError(f"{path} is a CLIP4Cir Combiner; import it with --recipe clip4cir-combiner")
    if clip is None:
        raise UserError(
            f"{path} is a Combiner without its CLIP, and another CLIP's features mean nothing to it: give the one that "
            "it was trained on with --clip FILE (published beside it: cirr_clip_RN50x4_fullft.pt, "
            "fiq_clip_RN50x4_fullft.pt), --clip RUN (a first stage), or --clip openai if that CLIP was not fine-tuned"
        )
    config, source = _paired(config, clip)
    layers = {"combiner.projection_dim": "text_projection_layer.bias", "combiner.hidden_dim": "combiner_layer.bias"}
    sizes = {name: len(state[layer]) for name, layer in layers.items() if layer in state and state[layer].ndim}
    config = build_config(config, sizes, origin=str(path))
    model = make_task(config).new_model()
    assert isinstance(model, ComposedRetriever)
    assert model.combiner is not None
    architecture, backbone = config.model.architecture, backbone_fingerprint(model)
    taken, given = len(state.get("output_layer.bias", ())), model.encoder.embedding_width
    if taken and taken != given:
        raise UserError(
            f"{path} combines features of width {taken}, but {source} (`{architecture}`) gives {given}; give the CLIP "
            "that it was trained on, and its name with --set model.architecture=NAME"
        )
    named = _trained_on(path)
    if named and named != backbone:
        raise UserError(
            f"{path} was trained on a CLIP with fingerprint {named[:12]}, but {source} has {backbone[:12]}; give "
            "the one that it was trained on"
        )
    check_fit(model.combiner.state_dict(), state, f"{path} (for `{architecture}`)")
    model.combiner.load_state_dict(dict(state))
    weights = folder / BACKBONE_NAME
    is_copied = not open_clip.is_pretrained_cfg(architecture, config.model.pretrained) or bool(config.model.tuned)
    if is_copied:
        config = build_config(config, {"model.pretrained": str(weights), "model.tuned": "", "model.tuned_seed": 0})
    with making(folder) as made:
        run = create_run(made.parent, made.name, config)
        if is_copied:
            known = not Path(clip).expanduser().is_file() or knows_activation(Path(clip).expanduser())
            save_clip(model.clip, made / BACKBONE_NAME, says_activation=known)
        save_checkpoint(run.path, CheckpointMeta(0, 0, {}, {}, config_hash(config), config.recipe, backbone), model, {})
    proof = "as the file says" if named else "the file does not say which CLIP it was trained on; their widths fit"
    return Imported(
        folder,
        f"{describe_combiner(state)}\n"
        f"paired with {source} (`{architecture}`, fingerprint {backbone[:12]}): {proof}\n"
        f"use it with {launch_command('evaluate', '--run', folder, '--data', 'DATA')}",
    )


def _paired(config: CombinerConfig, clip: str | Path) -> tuple[CombinerConfig, str]:
    """Returns the settings with a CLIP, and what it is in words."""
    folder = Path(clip).expanduser()
    if (folder / CONFIG_NAME).is_file():
        changes = settings_after(open_run(folder), config.recipe)
        return build_config(config, changes, origin="--clip"), f"run {folder}"
    is_file = folder.is_file()
    changes = {"model.pretrained": str(folder.absolute()) if is_file else str(clip), "model.tuned": ""}
    return build_config(config, changes, origin="--clip"), f"{folder if is_file else clip}"


def _trained_on(path: Path) -> str:
    """Returns the fingerprint of the CLIP that a Combiner's file names; files of CLIP4Cir's own program name none."""
    content = read_container(path, data=False).content
    named = content.get(_TRAINED_ON) if isinstance(content, Mapping) else None
    return named if isinstance(named, str) else ""


def describe_combiner(state: Mapping[str, Tensor]) -> str:
    """Returns the sizes of a Combiner's state dict."""
    features = state["output_layer.bias"].shape[0] if "output_layer.bias" in state else 0
    projection, hidden = (len(state.get(f"{name}.bias", ())) for name in ("text_projection_layer", "combiner_layer"))
    return f"Combiner of {features} features, projection {projection}, hidden {hidden}"


def write_composed(model: ComposedRetriever, run: Run, format: str, epoch: float, path: Path) -> None:
    """Writes a composed retriever for other programs.

    Args:
        model: With weights of the run.
        run: The run.
        format: ``released`` (the ``.pt`` of CLIP4Cir: a CLIP, or the Combiner), or ``open_clip`` (the CLIP).
        epoch: When the weights were so.
        path: The file.

    Raises:
        UserError: If the format does not fit.
    """
    if format == "open_clip":
        save_clip(model.clip, path)
    elif format == "released":
        architecture = run.config.model.architecture  # type: ignore[attr-defined]
        if model.combiner is None and has_quick_twin(architecture):
            raise UserError(
                f"CLIP4Cir's own program takes every CLIP for one with quick GELU, but `{architecture}` computes plain "
                "GELU; export it as `open_clip`"
            )
        name, module = ("CLIP", model.clip) if model.combiner is None else ("Combiner", model.combiner)
        content: dict[str, Any] = {"epoch": epoch, name: {k: value.clone() for k, value in module.state_dict().items()}}
        if model.combiner is not None:
            content[_TRAINED_ON] = backbone_fingerprint(model)
        torch.save(content, path)
    else:
        raise UserError(f"run {run.path} has no adapters; export it as `released` or `open_clip`")
