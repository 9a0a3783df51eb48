"""HarMA's released weights: their names for the tensors of an adapted `DualEncoder`, in both directions.

A released file is `{"model": state dict, "config": ...}`; this module maps the state dict. Its names are `model.`,
open_clip's own names, `...resblocks.{i}.mmadapter.` and `...resblocks.{i}.gate1`, and `temp`: 650 tensors for ViT-B/32,
and the temperature. The released code knows one size (width 128, shared width 64, 8 heads) and attends to all 77
positions (`text_tokens: full`); the number of heads is not in the file.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.models.adapters import GatedAdapter
from harma_ray.models.clip import DualEncoder
from harma_ray.models.foreign import fitted
from harma_ray.models.weights import check_fit

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
_TEMPERATURES = {"temperature": "temp", "affiliation_temperature": "temp2"}


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
    given, notes = fitted(expected, state_dict)
    check_fit(expected, given, "the released state dict")
    with torch.no_grad():
        model.load_state_dict({name: given[names[name]] for name in own})
    return notes


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
