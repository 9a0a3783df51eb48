"""The vision transformer by itself: drop path, the hidden states of its layers, and what is pooled from them.

Shape letters: T tiles, S side in pixels, N patches, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from harma_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import InternVLVisionModel

Pooling = Literal["mean_all", "mean_patch", "cls"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the RGB channels, in [0, 1]; by these tiles are normalised."""


class DropPath(nn.Module):
    """Leaves a residual branch out for some samples, in training, and scales it up for the others; timm's."""

    def __init__(self, rate: float):
        """Takes the share of samples that do without the branch, in [0, 1)."""
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Returns the branch's output [T, ...], all zero for some of the T samples."""
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Returns the rate, for torch's picture of the module."""
        return f"{self.rate:.3f}"


def set_drop_path(vision_tower: InternVLVisionModel, rate: float) -> None:
    """Sets stochastic depth on both residual branches, growing over the layers from 0 to `rate`, in place.

    transformers knows none, and what it saves does not hold it: it is set again whenever a model was built. It acts
    before the layer scale here, and after it in InternVL's own code, which is the same: one number scales a sample.

    Args:
        vision_tower: The transformer.
        rate: Of the last layer, in [0, 1).

    Raises:
        UserError: If the rate is none, or the transformer has dropout where drop path goes.
    """
    if not 0 <= rate < 1:
        raise UserError(f"the drop path rate must be in [0, 1), got {rate}")
    layers: Any = vision_tower.encoder.layer
    for layer, own_rate in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
        for place in (layer.attention.projection_dropout, layer.dropout):
            if isinstance(place, nn.Dropout) and place.p:
                raise UserError(f"drop path takes the place of the vision tower's dropout, got {place.p}; set it to 0")
        layer.attention.projection_dropout = DropPath(own_rate).train(layer.training)
        layer.dropout = DropPath(own_rate).train(layer.training)


def normalise(pixels: Tensor, like: Tensor) -> Tensor:
    """Returns tiles [T, 3, S, S] as the transformer takes them, on their device.

    Args:
        pixels: uint8 in [0, 255], or floating point and normalised already.
        like: Says the dtype.

    Raises:
        ValueError: If they are neither.
    """
    if pixels.is_floating_point():
        return pixels.to(like.dtype)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"tiles must be uint8 or floating point, got {pixels.dtype}")
    channels = [
        (channel.float() / 255 - mean) / std
        for channel, mean, std in zip(pixels.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    ]  # channel by channel: constants that are never sent to the device
    return torch.stack(channels, 1).to(like.dtype)


def hidden_states(vision_tower: InternVLVisionModel, pixels: Tensor, layer: int = -1) -> Tensor:
    """Returns the hidden states [T, N + 1, D] after a layer, the class token first; later layers do not run.

    Tiles of another size than the transformer's get positions that are interpolated bicubically.

    Args:
        vision_tower: The transformer.
        pixels: Tiles as `normalise` takes them, S a multiple of the patch size.
        layer: As InternVL's ``select_layer`` does, it picks from the list of the embeddings and what each layer gives:
            0 = the embeddings, -1 = the last, with the final norm if there is one.

    Raises:
        UserError: If there is no such layer, or the tiles cannot be cut into patches.
    """
    number = check_layer(vision_tower.config.num_hidden_layers, layer)
    embeddings: Any = vision_tower.embeddings
    side = embeddings.patch_size[0]
    if pixels.shape[-2] != pixels.shape[-1] or pixels.shape[-1] % side:
        raise UserError(f"tiles must be squares whose side divides by {side} pixels, got {tuple(pixels.shape[-2:])}")
    layers: Any = vision_tower.encoder.layer
    x_TND = embeddings(normalise(pixels, embeddings.cls_token))
    for each in layers[:number]:
        x_TND = each(x_TND)
    return vision_tower.layernorm(x_TND) if number == len(layers) else x_TND


def check_layer(num_layers: int, layer: int) -> int:
    """Returns after how many layers the hidden states are taken.

    Raises:
        UserError: If there are not so many.
    """
    if not -num_layers - 1 <= layer <= num_layers:
        raise UserError(
            f"the layer must be 0 (embeddings) to {num_layers}, or -1 (the last) to {-num_layers - 1}, got {layer}"
        )
    return layer % (num_layers + 1)


def pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    """Returns a vector [T, D] for each tile of [T, N + 1, D]: a mean over all tokens, over patches, or the first token.

    Raises:
        UserError: If `pooling` is another.
    """
    if pooling == "mean_all":
        return hidden.mean(1)
    if pooling == "mean_patch":
        return hidden[:, 1:].mean(1)
    if pooling == "cls":
        return hidden[:, 0]
    raise UserError(f"the pooling must be mean_all, mean_patch or cls, got {pooling!r}")


class VisionVectors(nn.Module):
    """The transformer with what is pooled from it: images in, unit vectors out.

    Args:
        vision_tower: The transformer.
        layer: As for `hidden_states`.
        pooling: As for `pool`.
    """

    def __init__(self, vision_tower: InternVLVisionModel, layer: int, pooling: Pooling):
        super().__init__()
        self.vision_tower, self.layer = vision_tower, layer
        self.pooling: Pooling = pooling

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns fp32[T, D], L2-normalised, of tiles as `normalise` takes them."""
        hidden = hidden_states(self.vision_tower, pixels, self.layer)
        return nn.functional.normalize(pool(hidden, self.pooling).float(), dim=-1)
