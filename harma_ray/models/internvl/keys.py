"""Names of InternVL's tensors: those of its own code, and those of transformers.

The original keeps queries, keys and values of the vision transformer in one matrix, transformers in three; nothing else
differs but names. Both ways are exact: there and back gives the same names and numbers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from harma_ray.errors import UserError, first_few

Names = Sequence[tuple[str, str]]
"""How names begin: in the original, and in transformers."""

_VISION: Names = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
)
_LAYER: Names = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("attn.proj.", "attention.projection_layer."),
    ("attn.q_norm.", "attention.q_norm."),
    ("attn.k_norm.", "attention.k_norm."),
    ("mlp.", "mlp."),
)
_WHOLE: Names = (
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
_SAVED: Names = (
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
"""As transformers writes names to files, and as it calls them in memory."""
ORIGINAL_VISION, NATIVE_VISION = "vision_model.", "model.vision_tower."
"""What stands before the vision transformer's names in a whole model."""
VISION_MARKS = ("encoder.layers.0.ls1", "encoder.layer.0.lambda_1")
"""A tensor that every InternViT has, in the original and in transformers; a CLIP has none of these names."""
_QKV = ("q_proj", "k_proj", "v_proj")


def is_original(names: Iterable[str]) -> bool:
    """Returns whether names are those of InternVL's own code, of a whole model or a vision transformer alone."""
    return any(re.match(r"(vision_model\.)?(encoder\.layers\.|embeddings\.class_embedding)", name) for name in names)


def to_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a whole model under transformers' names, from those of the original or of a file of transformers.

    Raises:
        UserError: If queries, keys and values cannot be told apart.
    """
    if not is_original(tensors):
        return {_renamed(name, _SAVED): tensor for name, tensor in tensors.items()}
    inner, others = _split(tensors, ORIGINAL_VISION)
    vision = {NATIVE_VISION + name: tensor for name, tensor in vision_to_native(inner).items()}
    return vision | {_renamed(name, _WHOLE): tensor for name, tensor in others.items()}


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a whole model under the original's names, from those of transformers.

    Raises:
        UserError: If one of queries, keys and values is missing.
    """
    inner, others = _split(tensors, NATIVE_VISION)
    vision = {ORIGINAL_VISION + name: tensor for name, tensor in vision_to_original(inner).items()}
    return vision | {_renamed(name, _turned(_WHOLE)): tensor for name, tensor in others.items()}


def vision_to_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a vision transformer under transformers' names, without what stands before them in a whole model.

    Raises:
        UserError: As `to_native`.
    """
    native: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if not layer:
            native[_renamed(name, _VISION)] = tensor
            continue
        start, rest = f"encoder.layer.{layer[1]}.", layer[2]
        if rest not in ("attn.qkv.weight", "attn.qkv.bias"):
            native[start + _renamed(rest, _LAYER)] = tensor
            continue
        if len(tensor) % 3:
            raise UserError(f"`{name}` must hold queries, keys and values, got {len(tensor)} rows, no multiple of 3")
        leaf = rest.rpartition(".")[2]
        native |= {f"{start}attention.{part}.{leaf}": third for part, third in zip(_QKV, tensor.chunk(3), strict=True)}
    return native


def vision_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a vision transformer under the original's names, without what stands before them in a whole model.

    Raises:
        UserError: As `to_original`.
    """
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if not layer:
            original[_renamed(name, _turned(_VISION))] = tensor
            continue
        start, rest = f"encoder.layers.{layer[1]}.", layer[2]
        part = re.fullmatch(r"attention\.[qkv]_proj\.(weight|bias)", rest)
        if not part:
            original[start + _renamed(rest, _turned(_LAYER))] = tensor
            continue
        wanted = [f"encoder.layer.{layer[1]}.attention.{each}.{part[1]}" for each in _QKV]
        missing = [each for each in wanted if each not in tensors]
        if missing:
            raise UserError(f"queries, keys and values go together, but there is no {first_few(missing)}")
        original[f"{start}attn.qkv.{part[1]}"] = torch.cat([tensors[each] for each in wanted])
    return original


def vision_part(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the vision transformer among tensors under any of the names, under transformers', and what is left.

    Raises:
        UserError: As `to_native`.
    """
    for prefix in (NATIVE_VISION, "vision_tower.", ORIGINAL_VISION):
        inner, others = _split(tensors, prefix)
        if inner:
            return vision_to_native(inner), list(others)
    return vision_to_native(tensors), []


def _split(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what a prefix was taken off from, and the rest."""
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inner, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _renamed(name: str, names: Names) -> str:
    """Returns a name with its beginning replaced; one that is not known stays, for a strict check to find."""
    for old, new in names:
        if name.startswith(old) and (old.endswith(".") or name == old):
            return new + name.removeprefix(old)
    return name


def _turned(names: Names) -> Names:
    return [(new, old) for old, new in names]
