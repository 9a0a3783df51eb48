"""CLIP4Cir's released files, in and out: a fine-tuned CLIP under ``CLIP``, a Combiner under ``Combiner``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harma_ray.checkpoint import CheckpointMeta, save_checkpoint
from harma_ray.config import build_config, config_hash
from harma_ray.errors import UserError
from harma_ray.files import making
from harma_ray.models.backbones import has_quick_twin
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.weights import backbone_fingerprint, check_fit, save_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.clip4cir_config import CombinerConfig, FinetuneConfig
from harma_ray.runs import Run, create_run
from harma_ray.shell import launch_command

COMBINER_MARK = "combiner_layer.weight"
"""A tensor that every Combiner has, and nothing else."""


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


def settings_after(run: Run, recipe: str) -> dict[str, Any]:
    """Returns the settings by which a recipe of the second stage builds on the best model of a run of the first.

    Raises:
        UserError: If the run is of another kind, or the recipe builds on no other.
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
        "model.tuned": str(run.best_checkpoint()),
        "model.tuned_seed": first.seed,
        **{f"preparation.{name}": value for name, value in dataclasses.asdict(first.preparation).items()},
    }


def import_combiner(path: Path, state: Mapping[str, Tensor], config: Any, folder: Path) -> Imported:
    """Makes a run of a released Combiner.

    Args:
        path: The file.
        state: What it holds.
        config: Settings of a Combiner's recipe; ``model`` says which CLIP it belongs to, the sizes are the file's.
        folder: The run's folder.

    Raises:
        UserError: If the settings are of another recipe, or the Combiner does not fit the CLIP.
    """
    if not isinstance(config, CombinerConfig):
        raise UserError(f"{path} is a CLIP4Cir Combiner; import it with --recipe clip4cir-combiner")
    layers = {"combiner.projection_dim": "text_projection_layer.bias", "combiner.hidden_dim": "combiner_layer.bias"}
    sizes = {name: len(state[layer]) for name, layer in layers.items() if layer in state and state[layer].ndim}
    config = build_config(config, sizes, origin=str(path))
    model = make_task(config).build_model()
    assert isinstance(model, ComposedRetriever)
    assert model.combiner is not None
    check_fit(model.combiner.state_dict(), state, f"{path} (for `{config.model.architecture}`)")
    model.combiner.load_state_dict(dict(state))
    with making(folder) as made:
        run = create_run(made.parent, made.name, config)
        backbone = backbone_fingerprint(model)
        save_checkpoint(run.path, CheckpointMeta(0, 0, {}, {}, config_hash(config), config.recipe, backbone), model, {})
    return Imported(
        folder,
        f"{describe_combiner(state)}; backbone fingerprint {backbone[:12]}\n"
        f"use it with {launch_command('evaluate', '--run', folder, '--data', 'DATA')}",
    )


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
        torch.save({"epoch": epoch, name: {key: value.clone() for key, value in module.state_dict().items()}}, path)
    else:
        raise UserError(f"run {run.path} has no adapters; export it as `released` or `open_clip`")
