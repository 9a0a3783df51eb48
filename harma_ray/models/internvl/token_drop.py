"""Token mask augmentation: the language model is shown some of an image's tokens, chosen anew for each sample.

Source: ViTP's "visual robustness learning" drops r = 75 % of the tokens after the projector and keeps the positions of
the rest. Its released code and an older description of it do other things, which have presets of their own.

Shape letters: B batch, L tokens, K tokens that are left of the longest sample.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harma_ray.errors import UserError


@dataclass(frozen=True)
class TokenDrop:
    """How many image tokens a sample loses, how often, and how."""

    ratio: float
    """Share of a sample's image tokens, in [0, 1): int(ratio * n) of n, so ceil((1 - ratio) * n) stay."""
    probability: float
    """Share of the steps in which it happens, in [0, 1]; all workers of a step do the same."""
    mode: Literal["drop", "zero"] = "drop"
    """``drop``: the sequence gets shorter and the rest keeps its positions; ``zero``: features become zero."""

    def __post_init__(self):
        if not 0 <= self.ratio < 1 or not 0 <= self.probability <= 1:
            raise UserError(
                "token drop needs a ratio in [0, 1) and a probability in [0, 1], got "
                f"{self.ratio} and {self.probability}"
            )


def released_drop(number: float) -> TokenDrop:
    """Returns what the released code does with its one ``TMAug_prob``: a ratio, and how often it does *not* happen."""
    return TokenDrop(number, 1 - number)


TOKEN_DROPS = {
    "none": TokenDrop(0.0, 0.0),
    "paper": TokenDrop(0.75, 1.0),
    "released": released_drop(0.75),
    # said to be before the projector, which would turn zeros into its biases: here it is after
    "guide": TokenDrop(0.3, 0.75, "zero"),
}
"""By name; ``paper`` is the default."""


@dataclass(frozen=True)
class Remaining:
    """Where the tokens that stay lie, each sample's moved to the left, in their order."""

    index: Tensor
    """int64[B, K], among the sample's L tokens; 0 in padding."""
    mask: Tensor
    """bool[B, K], False in padding."""
    position_ids: Tensor
    """int64[B, K], the tokens' positions before the drop, counted without padding; 0 in padding."""

    def take(self, values_BL: Tensor, padding: int) -> Tensor:
        """Returns the values [B, K] of the tokens that stay, and `padding` in padding."""
        return values_BL.gather(1, self.index).masked_fill(~self.mask, padding)


def choose_tokens(image_mask_BL: Tensor, ratio: float, scores_BL: Tensor) -> Tensor:
    """Returns which image tokens are lost, as bool[B, L]: in each sample the int(ratio * n) with the lowest scores.

    Args:
        image_mask_BL: Whether a token is an image's.
        ratio: In [0, 1).
        scores_BL: Drawn independently for every token, in [0, 1).
    """
    lost_B = (image_mask_BL.sum(1).double() * ratio).long()
    order = scores_BL.masked_fill(~image_mask_BL, torch.inf).argsort(dim=1, stable=True)
    return order.argsort(1) < lost_B[:, None]  # the order of the order: each token's rank


def remaining_tokens(attention_mask_BL: Tensor, lost_BL: Tensor) -> Remaining:
    """Returns where the tokens lie that are neither padding nor lost; K is as large as it must be, at least 1."""
    present = attention_mask_BL.bool()
    kept = present & ~lost_BL
    counts_B = kept.sum(1)
    length = max(1, int(counts_B.max()))
    index = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    mask = torch.arange(length, device=kept.device) < counts_B[:, None]
    index = index.masked_fill(~mask, 0)
    positions = (present.cumsum(1) - 1).gather(1, index).masked_fill(~mask, 0)
    return Remaining(index, mask, positions)
