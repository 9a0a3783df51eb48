"""Configurations of InternVL: transformers' own, and the original's, which are translated; what makes two differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.models.internvl.configs import require_transformers
from harma_ray.models.internvl.folders import CONFIG, require_config

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLVisionConfig

UNKNOWN_TOKEN = -1
"""The image token of a configuration of the original, where the tokenizer alone knows it."""
_ORIGINAL_VISION = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
"""What the original's `InternVisionConfig` takes for what a file leaves out: InternViT-6B."""
_MODEL_TYPES = ("internvl", "internvl_chat", "internvl_vision", "intern_vit_6b")
"""As transformers and the original call whole models and vision transformers."""
_RENAMED = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}
_SPOKEN = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "intermediate_size": "width within the MLPs",
    "image_size": "image size",
    "patch_size": "patch size",
    "num_channels": "channels",
    "attention_bias": "bias of queries, keys and values",
    "use_qk_norm": "q/k norm",
    "norm_type": "norm",
    "use_mean_pooling": "going without a final norm",
    "hidden_act": "activation",
    "layer_norm_eps": "epsilon of the norms",
}
"""Settings of a vision transformer that make weights fit or mean something else."""


def is_internvl(folder: Path) -> bool:
    """Tells whether a folder says that it holds an InternVL or an InternViT, in either layout."""
    try:
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
        return settings.get("model_type") in _MODEL_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def read_config(folder: Path) -> InternVLConfig:
    """Reads the configuration of a whole model, in either layout, as transformers'.

    Raises:
        UserError: If there is none, it cannot be read, or it is one that transformers' InternVL cannot compute.
    """
    settings = _read_settings(folder)
    if settings.get("model_type") == "internvl":
        from transformers import InternVLConfig

        config = _made(InternVLConfig, settings, folder)
    elif all(isinstance(settings.get(part), dict) for part in ("llm_config", "vision_config")):
        config = _translated(settings, folder)
    else:
        raise UserError(
            f"{folder / CONFIG} must be of an InternVL (model_type internvl, or internvl_chat of its own code), got "
            f"{settings.get('model_type')!r}"
        )
    return in_full_precision(config)


def read_vision_config(folder: Path) -> InternVLVisionConfig:
    """Reads the configuration of a vision transformer, alone or within a whole model's, in either layout.

    Raises:
        UserError: As `read_config`.
    """
    settings = _read_settings(folder)
    if "vision_config" in settings:
        whole: Any = read_config(folder)
        return whole.vision_config
    if settings.get("model_type") == "internvl_vision":
        from transformers import InternVLVisionConfig

        return in_full_precision(_made(InternVLVisionConfig, settings, folder))
    if "qkv_bias" in settings or "qk_normalization" in settings or settings.get("model_type") == "intern_vit_6b":
        return in_full_precision(_vision(settings, folder))
    raise UserError(
        f"{folder / CONFIG} must be of an InternViT (model_type internvl_vision, or intern_vit_6b of its own code), "
        f"got {settings.get('model_type')!r}"
    )


def original_vision_settings(config: InternVLVisionConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what `InternVisionModel` of the original reads from its ``config.json``."""
    own: Any = config
    named = {name: getattr(own, _RENAMED.get(name, name)) for name in _ORIGINAL_VISION}
    sides = {name: named[name][0] for name in ("image_size", "patch_size")}
    rest = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "drop_path_rate": 0.0,
        "use_flash_attn": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return {**named, **sides, **rest}


def original_settings(config: InternVLConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what `InternVLChatModel` of the original reads from its ``config.json``.

    Raises:
        UserError: If the language model's positions are scaled, which the original has other words for.
    """
    own: Any = config
    llm, said = own.text_config.to_dict(), str(dtype).removeprefix("torch.")
    positions = llm.pop("rope_parameters")
    if positions["rope_type"] != "default":
        raise UserError(f"the original's layout has no words for positions of type {positions['rope_type']}")
    beside = {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": positions["rope_theta"],
        "tie_word_embeddings": own.tie_word_embeddings,
        "torch_dtype": said,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": own.downsample_ratio,
        "ps_version": "v2",
        "select_layer": own.vision_feature_layer,
        "force_image_size": own.vision_config.image_size[0],
        "template": "internvl2_5",
        "torch_dtype": said,
        "vision_config": original_vision_settings(own.vision_config, dtype),
        "llm_config": {name: value for name, value in llm.items() if name not in ("dtype", "layer_types")} | beside,
    }


def in_full_precision(config: Any) -> Any:
    """Returns a configuration by which models are built in fp32, whatever its files hold."""
    for each in (config, *(getattr(config, part, None) for part in ("vision_config", "text_config"))):
        if each is not None:
            each.dtype = torch.float32
    return config


def check_same_vision(found: InternVLVisionConfig, wanted: InternVLVisionConfig, source: str) -> None:
    """Raises UserError if the weights of one vision transformer do not fit another, by what differs."""
    there, here = found.to_dict(), wanted.to_dict()
    _require_equal({name: (there[name], here[name]) for name in _SPOKEN}, source, "the model's")


def check_tensors(config: InternVLVisionConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError if a vision transformer's tensors are not those of its configuration, by what differs.

    Args:
        config: What is said of them.
        tensors: Under transformers' names; their shapes suffice.
        source: Names their origin.

    Raises:
        UserError: If so, or they are none of an InternViT.
    """
    found, said = vision_facts(tensors, source), config.to_dict()
    _require_equal({name: (value, said[name]) for name, value in found.items()}, source, "its configuration's")


def vision_facts(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Returns what a vision transformer's tensors show of its settings, under transformers' names.

    Args:
        tensors: Under transformers' names; their shapes suffice.
        source: Names their origin.

    Raises:
        UserError: If they are none of an InternViT.
    """
    first = "encoder.layer.0."
    kernel, positions = (
        tensors.get(f"embeddings.{name}") for name in ("patch_embeddings.projection.weight", "position_embeddings")
    )
    inner = tensors.get(f"{first}mlp.fc1.weight")
    if kernel is None or positions is None or inner is None:
        raise UserError(f"{source} must hold an InternViT, but lacks its patch embedding, positions or first layer")
    side = round((positions.shape[1] - 1) ** 0.5) * kernel.shape[-1]
    numbers = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")}
    return {
        "hidden_size": kernel.shape[0],
        "num_hidden_layers": len(numbers),
        "intermediate_size": inner.shape[0],
        "image_size": [side, side],
        "patch_size": list(kernel.shape[2:]),
        "num_channels": kernel.shape[1],
        "attention_bias": f"{first}attention.q_proj.bias" in tensors,
        "use_qk_norm": f"{first}attention.q_norm.weight" in tensors,
        "norm_type": "layer_norm" if f"{first}layernorm_before.bias" in tensors else "rms_norm",
        "use_mean_pooling": "layernorm.weight" not in tensors,
    }


def _require_equal(pairs: Mapping[str, tuple[Any, Any]], source: str, other: str) -> None:
    def spoken(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return "x".join(map(str, value))
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

    differing = [
        f"{_SPOKEN[name]} ({spoken(one)} for {spoken(two)})"
        for name, (one, two) in pairs.items()
        if spoken(one) != spoken(two)
    ]
    if differing:
        raise UserError(f"{source} holds another vision transformer than {other}: it differs in {', '.join(differing)}")


def _read_settings(folder: Path) -> dict[str, Any]:
    require_transformers()
    require_config(folder)
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a mapping, got a {type(settings).__name__}")
    return settings


def _made(kind: Any, settings: Mapping[str, Any], folder: Path) -> Any:
    """Makes a configuration of transformers."""
    try:
        return kind.from_dict(dict(settings))
    except Exception as error:  # what a library says of settings of any kind has any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / CONFIG} cannot be understood ({reason})") from error


def _translated(settings: Mapping[str, Any], folder: Path) -> InternVLConfig:
    """Translates a configuration of the original's `InternVLChatModel`."""
    from transformers import InternVLConfig

    path, llm = folder / CONFIG, settings["llm_config"]
    vision: Any = _vision(settings["vision_config"], folder)
    shuffle = settings.get("ps_version", "v1")  # the original's own default
    if shuffle != "v2":
        raise UserError(
            f"{path} asks for pixel shuffle {shuffle}, which puts tokens in another order; only v2 is known"
        )
    kind = llm.get("model_type") or (llm.get("architectures") or [None])[0]
    if kind not in ("qwen2", "Qwen2ForCausalLM"):
        raise UserError(f"{path} must name Qwen2 as its language model, got {kind!r}; others are not known")
    size = settings.get("force_image_size") or vision.image_size[0]
    if size != vision.image_size[0]:
        raise UserError(f"{path} must name one image size, got {size} and {vision.image_size[0]}; resize its positions")
    ratio = settings.get("downsample_ratio", 0.5)
    native = {
        "vision_config": vision.to_dict(),
        "text_config": _language(llm),
        "image_token_id": UNKNOWN_TOKEN,
        "image_seq_length": int((size // vision.patch_size[0] * ratio) ** 2),
        "downsample_ratio": ratio,
        "vision_feature_layer": settings.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(llm.get("tie_word_embeddings", False)),
    }
    return _made(InternVLConfig, native, folder)


def _language(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what Qwen2's configuration knows of an ``llm_config``, which says much that is no property of a model."""
    from transformers import Qwen2Config

    known = {*Qwen2Config().to_dict(), "rope_theta", "rope_scaling"} - {"dtype", "transformers_version"}
    return {"model_type": "qwen2"} | {name: value for name, value in llm.items() if name in known}


def _vision(settings: Mapping[str, Any], folder: Path) -> InternVLVisionConfig:
    """Translates a configuration of the original's `InternVisionModel`."""
    from transformers import InternVLVisionConfig

    whole = {name: settings.get(name, default) for name, default in _ORIGINAL_VISION.items()}
    native = {_RENAMED.get(name, name): value for name, value in whole.items()}
    return _made(InternVLVisionConfig, native | {"use_mean_pooling": True}, folder)
