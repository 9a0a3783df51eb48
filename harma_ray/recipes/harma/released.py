"""HarMA's released files in and out.

A released file is `{"model": state dict, "config": ...}`. The names in the state dict are `model.`, open_clip's own
names, `...resblocks.{i}.mmadapter.` and `...resblocks.{i}.gate1`, and `temp`: 650 tensors for ViT-B/32, and the
temperature. The released code knows one size (width 128, shared width 64, 8 heads) and attends to all 77 positions
(`text_tokens: full`); the number of heads is not in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.formats import ForeignFormat, Reading
from harma_ray.models.adapters import GatedAdapter
from harma_ray.models.architectures import guess_architecture, image_size, pixel_statistics, tokenizer_of
from harma_ray.models.backbones import check_file_activation
from harma_ray.models.clip import DualEncoder
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.foreign import CLIP_MARK, ForeignWeights, fitted
from harma_ray.models.towers import Preparation, Tower, clip_towers
from harma_ray.models.weights import check_fit
from harma_ray.recipes.harma.config import HarmaConfig
from harma_ray.recipes.harma.task import HarmaTask
from harma_ray.settings import build_config, to_dict
from harma_ray.task import StoredRun

_MARK = ".mmadapter."
"""In names of released weights, and no others."""
_PREFIX = "model."
_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_LINEAR = ("weight", "bias")
_SHARED = "mmadapter.BiShareAdapterxx"

# Names inside a block: after `mlp.adapter.` here, after `resblocks.{i}.` there.
_NAMES = {
    "gate": "gate1",
    "bottleneck.gate": "mmadapter.gate1",
    **{f"bottleneck.down.{part}": f"mmadapter.img_proj_down.{part}" for part in _LINEAR},
    **{f"bottleneck.up.{part}": f"mmadapter.img_proj_up.{part}" for part in _LINEAR},
    **{f"bottleneck.attention.{part}": f"mmadapter.multihead_attention.{part}" for part in _ATTENTION},
    "bottleneck.shared.gate": f"{_SHARED}.gate1",
    **{f"bottleneck.shared.l1.{part}": f"{_SHARED}.l1.{part}" for part in _LINEAR},
    **{f"bottleneck.shared.l2.{part}": f"{_SHARED}.l2.{part}" for part in _LINEAR},
    **{f"bottleneck.shared.attention.{part}": f"{_SHARED}.multihead_attention1.{part}" for part in _ATTENTION},
}
_TEXTS = "cleaned as by harma_ray.data.captions.clean_caption: lower case, no punctuation, 30 words"
_TEMPERATURES = {"temperature": "temp", "affiliation_temperature": "temp2"}


class HarmaFile(ForeignFormat):
    """A CLIP with HarMA's adapters under ``model``: its own backbone, of a width that its shapes show."""

    settings = HarmaConfig
    tags = ("image-text-retrieval", "clip", "harma", "remote-sensing")

    def claim(self, weights: ForeignWeights) -> ForeignWeights | None:
        """Returns a CLIP with HarMA's adapters under the released names, the temperatures beside it with it."""
        if weights.mark != CLIP_MARK or not any(_MARK in name for name in weights.tensors):
            return None
        tensors = {_PREFIX + name: tensor for name, tensor in weights.tensors.items()}
        for name, tensor in weights.beside.items():  # nothing may be left over
            leaf = name.rpartition(".")[2]
            tensors[leaf if leaf in _TEMPERATURES.values() else name] = tensor
        prefix = weights.prefix.removesuffix(_PREFIX).removesuffix("clip.")
        found = replace(weights, tensors=tensors, prefix=prefix, beside={})
        config = weights.entries.get("config")
        model = config.get("model") if isinstance(config, Mapping) and "recipe" in config else None
        name = model.get("architecture") if isinstance(model, Mapping) else None
        if weights.quick_gelu is not None or not isinstance(name, str):
            return found
        return replace(found, quick_gelu=name.endswith("-quickgelu"), activation_source="names its architecture")

    def describe(self, weights: ForeignWeights) -> str:
        """Says which architectures it can be."""
        return f"released HarMA file {weights.path}: {guess_architecture(weights.tensors)}"

    def sizes(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Returns how many adapters there are, and their widths."""

        def widths(pattern: str) -> list[int]:
            return [len(tensor) for name, tensor in tensors.items() if re.search(pattern, name)]

        adapters = widths(r"(img_proj_down|bottleneck\.down)\.weight$")
        shared = widths(r"(BiShareAdapterxx|shared)\.l1\.weight$")
        width, inner = ("/".join(str(width) for width in sorted(set(found))) for found in (adapters, shared))
        return [f"adapters    {len(adapters)}, width {width}, shared width {inner or 'none'}"] if adapters else []

    def load(self, weights: ForeignWeights, config: RunConfig) -> DualEncoder:
        """Builds the dual encoder, adapters and all."""
        return _build(weights, config)[0]

    def read(self, weights: ForeignWeights, config: RunConfig, kept: Path, clip: StoredRun | str | None) -> Reading:
        """Builds the dual encoder and the settings with its sizes."""
        model, config, notes = _build(weights, config)
        fingerprint, adapter = backbone_fingerprint(model), config.adapter
        told = (
            f"{len(weights.tensors)} tensors; adapters of width {adapter.width}, shared width {adapter.shared_width}; "
            f"backbone fingerprint {fingerprint[:12]}"
        )
        return Reading(
            model,
            build_config(config, {"model.pretrained": str(kept)}),
            fingerprint,
            "\n".join([*weights.notes, *notes, told]),
            knows_activation=weights.quick_gelu is not None or bool(config.model.activation),
        )

    def preparation(self, model: DualEncoder, run: StoredRun) -> Preparation:
        """Returns the evaluation's: squashed to a square."""
        return Preparation(image_size(model), *pixel_statistics(model))

    def towers(self, model: DualEncoder, run: StoredRun) -> list[Tower]:
        """Returns the image tower and the text tower, adapters and all."""
        assert isinstance(run.config, HarmaConfig)
        tokenizer = tokenizer_of(run.config.model.architecture)
        return clip_towers(model, tokenizer, self.preparation(model, run), _TEXTS)

    def write(self, model: DualEncoder, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes the ``.pth``: all weights, and the settings."""
        state = {name: tensor.clone() for name, tensor in to_released(model).items()}
        torch.save({"model": state, "config": to_dict(run.config)}, path)


def _build(weights: ForeignWeights, config: RunConfig) -> tuple[DualEncoder, HarmaConfig, list[str]]:
    """Builds the model of a file, settings with the sizes that its shapes show, and what was left out."""
    if not isinstance(config, HarmaConfig):
        raise UserError(f"{weights.path} is a released HarMA file; give a recipe of HarMA, got {config.recipe}")
    adapters = {n.rpartition(_MARK)[2]: t for n, t in weights.tensors.items() if _MARK in n}
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


def to_released(model: DualEncoder) -> dict[str, Tensor]:
    """Return a model's tensors under the released names.

    Args:
        model: a dual encoder with adapters, S in the text tower only.

    Returns:
        Name to tensor; the tensors are the model's own, detached, not copies.

    Raises:
        UserError: the model has no adapters, or shares S across modalities, which the released layout cannot say.
    """
    names = _released_names(model)
    return {names[name]: tensor.detach() for name, tensor in model.state_dict().items()}


def from_released(state_dict: Mapping[str, Tensor], model: DualEncoder) -> list[str]:
    """Load released weights, the backbone included; nothing may be missing and nothing left over.

    Args:
        state_dict: the `model` part of a released file; names under `model.` and `temp`.
        model: a dual encoder with adapters of the same size; changed in place, only if everything fits.

    Returns:
        What was left out because it is no weight of this model, such as the temperature of a loss that is off.

    Raises:
        UserError: lists the missing, the left-over and the misshapen tensors by their released names.
    """
    names = _released_names(model)
    own = model.state_dict()
    expected = {names[name]: tensor for name, tensor in own.items()}
    unused = [name for name in _TEMPERATURES.values() if name in state_dict and name not in expected]
    given, notes = fitted(expected, {name: tensor for name, tensor in state_dict.items() if name not in unused})
    check_fit(expected, given, "the released state dict")
    with torch.no_grad():
        model.load_state_dict({name: given[names[name]] for name in own})
    return [*notes, *(f"left out, as no loss here uses it: {name}" for name in unused)]


def _released_names(model: DualEncoder) -> dict[str, str]:
    """Map every name of the model's state dict to its released name."""
    names = {name: name for name in model.state_dict()}
    stages = [(name, stage) for name, stage in model.named_modules() if isinstance(stage, GatedAdapter)]
    if not stages:
        raise UserError("released weights belong to a model with adapters, got one without; insert them first")
    for path, stage in stages:
        if path.startswith("clip.visual.") and stage.bottleneck.shared is not None:
            raise UserError(
                "the released layout has no shared adapter in the image tower, but this model has "
                "`share_across_modalities`; build it without"
            )
        block = path.removesuffix(".mlp.adapter")
        names.update({f"{path}.{part}": f"{block}.{_NAMES[part]}" for part in stage.state_dict()})
    renamed = {name: _PREFIX + new.removeprefix("clip.") for name, new in names.items()}
    return renamed | {name: new for name, new in _TEMPERATURES.items() if name in renamed}
