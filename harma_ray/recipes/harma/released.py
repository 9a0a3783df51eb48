"""HarMA's released files in and out; their tensors' names are `harma_ray.models.released`'s."""

from __future__ import annotations

from pathlib import Path

import torch

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.formats import ForeignFormat, Reading, as_lines
from harma_ray.models.architectures import guess_architecture
from harma_ray.models.backbones import check_file_activation
from harma_ray.models.clip import DualEncoder
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.foreign import ADAPTER_MARK, ForeignWeights
from harma_ray.models.released import from_released, to_released
from harma_ray.recipes.harma.config import HarmaConfig
from harma_ray.recipes.harma.task import HarmaTask
from harma_ray.settings import build_config, to_dict
from harma_ray.task import StoredRun


class HarmaFile(ForeignFormat):
    """A CLIP with HarMA's adapters under ``model``: its own backbone, of a width that its shapes show."""

    settings = HarmaConfig

    def recognise(self, weights: ForeignWeights) -> bool:
        """Tells whether a file is one of these."""
        return weights.kind == "released"

    def describe(self, weights: ForeignWeights) -> str:
        """Says which architectures it can be."""
        return f"released HarMA file {weights.path}: {guess_architecture(weights.tensors)}"

    def load(self, weights: ForeignWeights, config: RunConfig) -> DualEncoder:
        """Builds the dual encoder, adapters and all."""
        return _build(weights, config)[0]

    def read(self, weights: ForeignWeights, config: RunConfig, kept: Path, clip: StoredRun | str | None) -> Reading:
        """Builds the dual encoder and the settings with its sizes."""
        model, config, notes = _build(weights, config)
        fingerprint = backbone_fingerprint(model)
        return Reading(
            model,
            build_config(config, {"model.pretrained": str(kept)}),
            fingerprint,
            as_lines([*weights.notes, *notes])
            + f"{len(weights.tensors)} tensors; adapters of width {config.adapter.width}, shared width "
            f"{config.adapter.shared_width}; backbone fingerprint {fingerprint[:12]}",
            knows_activation=weights.quick_gelu is not None or bool(config.model.activation),
        )

    def check_export(self, run: StoredRun, format: str) -> None:
        """Raises UserError for a plain CLIP of a model with adapters, and for what was trained of none."""
        assert isinstance(run.config, HarmaConfig)
        tuning = run.config.model.tuning
        if format == "open_clip" and tuning == "adapters":
            raise UserError("a model with adapters is no plain CLIP; export it as `released` or `adapter`")
        if format == "adapter" and tuning == "none":
            raise UserError(f"run {run.path} trained nothing (model.tuning is none); export it as `open_clip`")

    def write(self, model: DualEncoder, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes the ``.pth``: all weights, and the settings."""
        state = {name: tensor.clone() for name, tensor in to_released(model).items()}
        torch.save({"model": state, "config": to_dict(run.config)}, path)


def _build(weights: ForeignWeights, config: RunConfig) -> tuple[DualEncoder, HarmaConfig, list[str]]:
    """Builds the model of a file, settings with the sizes that its shapes show, and what was left out."""
    if not isinstance(config, HarmaConfig):
        raise UserError(f"{weights.path} is a released HarMA file; give a recipe of HarMA, got {config.recipe}")
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
    model = HarmaTask(config).new_model()
    try:
        return model, config, from_released(weights.tensors, model)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from error
