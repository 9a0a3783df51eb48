"""Parameters in groups: which of them decay, and how much slower the vision transformer's first layers learn."""

import re
from typing import Any

from torch import nn

from harma_ray.errors import UserError
from harma_ray.models.internvl.model import VisualInstructionModel


def parameter_groups(
    model: VisualInstructionModel,
    learning_rate: float,
    weight_decay: float,
    *,
    released_groups: bool = False,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in groups that torch's optimisers take.

    Args:
        model: The model, frozen as it is to be trained.
        learning_rate: The peak, of all that is not slowed down.
        weight_decay: Of what decays: all but norms and biases.
        released_groups: Decay as ViTP's released training does, by the rule of the library that it uses: RMS norms
            decay, too, which are all norms of the language model.
        layer_decay: In (0, 1]. A vision transformer of n layers learns at rates that are multiplied by
            ``layer_decay ** (n + 1 - k)``, where k = 0 for its embeddings and i + 1 for layer i; 1: all alike, as in
            ViTP's pretraining. Below 1 groups have names, such as ``vision_layer_0`` and ``rest``.

    Raises:
        UserError: If the layer decay is none.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"the layer decay must be in (0, 1], got {layer_decay}")
    undecayed = _undecayed(model, released_groups)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        distance, decays = _distance(model, name), name not in undecayed
        scale = layer_decay**distance
        group = groups.setdefault(
            (scale, decays),
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr": learning_rate * scale},
        )
        if layer_decay < 1:
            group["name"] = _name(model, distance)
        group["params"].append(parameter)
    return list(groups.values())


def _undecayed(model: nn.Module, released_groups: bool) -> set[str]:
    """Returns the names of biases and of what belongs to norms."""
    names = {name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2]}
    for at, module in model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) or (
            type(module).__name__.endswith("RMSNorm") and not released_groups
        )
        if is_norm:
            names |= {f"{at}.{name}" for name, _ in module.named_parameters()}
    return names


def _distance(model: VisualInstructionModel, name: str) -> int:
    """Returns how far a parameter is below what follows the vision transformer's layers; 0: it is not below."""
    num_layers = len(model.vision_tower.encoder.layer)
    if ".vision_tower.embeddings." in name:
        return num_layers + 1
    layer = re.search(r"\.vision_tower\.encoder\.layer\.(\d+)\.", name)
    return num_layers - int(layer[1]) if layer else 0


def _name(model: VisualInstructionModel, distance: int) -> str:
    """Returns what the parameters at a distance are called, the first layer ``vision_layer_0``."""
    layer = len(model.vision_tower.encoder.layer) - distance
    return "vision_embeddings" if layer < 0 else f"vision_layer_{layer}" if distance else "rest"
