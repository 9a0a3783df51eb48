"""Sizes of InternVL that are built without files, and the library that builds them all."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harma_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import InternVLConfig


@dataclass(frozen=True)
class Size:
    """What InternVL's configuration is made from."""

    image_size: int
    """Side of a tile, in pixels."""
    patch_size: int
    """Side of a patch, in pixels; four patches become one image token."""
    vision: tuple[int, int, int, int]
    """The vision transformer's width, layers, attention heads, and width within its MLPs."""
    language: tuple[int, int, int, int]
    """Qwen2's width, layers, attention heads, and width within its MLPs."""
    key_value_heads: int
    """Of Qwen2's attention."""
    vocabulary: int
    """Tokens, if the tokenizer has fewer."""
    rope_theta: float
    """Base of the wave lengths of Qwen2's positions."""
    max_tokens: int
    """Longest text, in tokens."""
    init_std: float
    """Standard deviation of linear layers and embeddings at the start: narrow layers of 0.02 let little through."""
    layer_scale: float
    """Factor on each branch of the vision transformer, at the start: small ones are slow to learn from nothing."""

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that stand for a tile."""
        return (self.image_size // self.patch_size // 2) ** 2


SIZES = {
    # 64 px as the drawn scenes, which four image tokens stand for; 1.4 million parameters with a vocabulary of 900
    "scenes-tiny": Size(64, 16, (128, 4, 4, 512), (128, 2, 4, 256), 2, 0, 10_000.0, 4096, 0.08, 1.0),
    # InternViT-300M-448 and Qwen2.5-0.5B with an output head of its own: 938 million
    "internvl2.5-1b": Size(
        448, 14, (1024, 24, 16, 4096), (896, 24, 14, 4864), 2, 151_674, 1_000_000.0, 32_768, 0.02, 0.1
    ),
}
"""By name."""


def require_transformers() -> None:
    """Raises UserError unless transformers is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError('InternVL needs the library transformers; pip install "harma-ray[vitp]"')


def vision_settings(size: Size) -> dict[str, Any]:
    """Returns what transformers is told of an InternViT without q/k norm, with biases and layer norms: the 300M's."""
    width, layers, heads, mlp_width = size.vision
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "attention_bias": True,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": size.layer_scale,
        "initializer_range": size.init_std,
        "use_mean_pooling": True,
    }


def internvl_config(size: Size, vocabulary: int, image_token_id: int) -> InternVLConfig:
    """Returns transformers' configuration of a size.

    Args:
        size: The size.
        vocabulary: Tokens of the tokenizer.
        image_token_id: Of the token that stands for a feature of a tile.
    """
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    width, layers, heads, mlp_width = size.language
    text = Qwen2Config(
        vocab_size=max(vocabulary, size.vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size.key_value_heads,
        intermediate_size=mlp_width,
        max_position_embeddings=size.max_tokens,
        tie_word_embeddings=False,
        initializer_range=size.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
    )
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision_settings(size)),
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=size.tokens_per_tile,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
