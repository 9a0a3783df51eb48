"""Parts of models by themselves, as other programs run them: tensors in, vectors out.

Shape letters: B batch, S side of the images, L tokens, E embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harma_ray.models.clip import DualEncoder, unit

EXAMPLES = 3
"""Rows of a tower's examples."""
_TEXTS = ("a harbour", "many small planes stand beside a long runway", "two roads meet in a green field near a river")


@dataclass(frozen=True)
class Preparation:
    """How an image becomes what a model takes, in open_clip's words as far as it has any."""

    size: int
    """Side of the square, in pixels."""
    mean: Sequence[float]
    """Of the RGB channels, in [0, 1]; it is taken off."""
    std: Sequence[float]
    """What they are divided by after that."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["squash", "shortest"] = "squash"
    """Whether the whole image becomes the square, or the centre of the image whose shorter side has this length."""
    first: str = ""
    """What is done before, for which open_clip has no word; empty: nothing."""


@dataclass(frozen=True)
class Tower:
    """A part of a model by itself."""

    name: str
    """Such as ``image``."""
    module: nn.Module
    """On CPU, in evaluation mode; returns one tensor, or as many as there are outputs."""
    inputs: Mapping[str, Tensor]
    """`EXAMPLES` rows of each input, by its name; any number of rows may be given."""
    outputs: Sequence[str] = ("vectors",)
    """What is returned: ``vectors`` are unit vectors."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What one must know to use it, as JSON can say it."""


class ClipTower(nn.Module):
    """One of the two towers of a dual encoder.

    Args:
        encoder: The dual encoder.
        side: Which tower.
        with_features: Whether the features from which the unit vectors are made are returned beside them.
    """

    def __init__(self, encoder: DualEncoder, side: Literal["image", "text"], *, with_features: bool = False):
        super().__init__()
        self.encoder, self.side, self.with_features = encoder, side, with_features

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return unit vectors [B, E] of normalised pixels fp32[B, 3, S, S] or tokens int64[B, L]; maybe features."""
        encode = self.encoder.encode_image if self.side == "image" else self.encoder.encode_text
        features = encode(inputs, normalize=False)
        return (unit(features), features) if self.with_features else unit(features)


def clip_towers(
    encoder: DualEncoder,
    tokenizer: Callable[..., Tensor],
    preparation: Preparation,
    texts: str,
    *,
    with_features: bool = False,
) -> list[Tower]:
    """Returns both towers of a dual encoder.

    Args:
        encoder: The dual encoder, on CPU.
        tokenizer: Its backbone's.
        preparation: How its images are prepared.
        texts: What is done to texts before they become tokens, in words.
        with_features: See `ClipTower`.
    """
    outputs = ("vectors", "features") if with_features else ("vectors",)
    ids = tokenizer(list(_TEXTS))
    said = {
        "context_length": ids.shape[1],
        "tokenizer": f"open_clip.{type(tokenizer).__name__}(context_length={ids.shape[1]})",
        "texts": texts,
    }
    towers = {side: ClipTower(encoder, side, with_features=with_features).eval() for side in ("image", "text")}
    return [
        image_tower(towers["image"], preparation, outputs),
        Tower("text", towers["text"], {"tokens": ids}, outputs, said),
    ]


def image_tower(module: nn.Module, preparation: Preparation, outputs: Sequence[str] = ("vectors",)) -> Tower:
    """Returns the tower that takes ``pixels``, prepared and normalised."""
    pixels = torch.randn(EXAMPLES, 3, preparation.size, preparation.size, generator=torch.Generator().manual_seed(0))
    said = {
        "size": preparation.size,
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "interpolation": preparation.interpolation,
        "resize_mode": preparation.resize_mode,
        "first": preparation.first,
        "pixels": "RGB, resized, divided by 255, minus mean, divided by std",
    }
    return Tower("image", module.eval(), {"pixels": pixels}, outputs, said)
