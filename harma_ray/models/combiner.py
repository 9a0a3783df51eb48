"""CLIP4Cir's Combiner: one query vector out of a reference image's and a caption's CLIP features.

Shape letters: B batch, F features of CLIP, P projection, H hidden layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harma_ray.models.clip import unit


class Combiner(nn.Module):
    """Adds a learnt correction to a learnt mixture of image and text features.

    With t and i the raw features of the caption and of the reference image, s the sigmoid and Drop a dropout::

        z = [Drop(ReLU(W_t t)), Drop(ReLU(W_i i))]                  text first
        v = W_o Drop(ReLU(W_c z))
        share = s(w_2 Drop(ReLU(W_1 z)))                            one scalar a query
        query = normalize(v + share * t + (1 - share) * i)

    All W have biases. Source: CLIP4Cir (Baldrati et al., CVPR 2022); concatenation order, names and the order in which
    the layers draw their weights and the dropouts their masks are those of the released code, so a published state
    dict loads strictly.

    Args:
        feature_dim: F, CLIP's embedding width.
        projection_dim: P; the published models have 4 F.
        hidden_dim: H; the published models have 8 F.
        dropout: Share of activations dropped while training, at each of the four places, 0 <= dropout < 1.
    """

    def __init__(self, feature_dim: int, projection_dim: int = 2560, hidden_dim: int = 5120, dropout: float = 0.5):
        super().__init__()
        self.feature_dim = feature_dim
        self.dropout = nn.Dropout(dropout)
        self.text_projection_layer = nn.Linear(feature_dim, projection_dim)
        self.image_projection_layer = nn.Linear(feature_dim, projection_dim)
        self.combiner_layer = nn.Linear(2 * projection_dim, hidden_dim)
        self.output_layer = nn.Linear(hidden_dim, feature_dim)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projection_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1)
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Combine pairs; rows do not see each other.

        Args:
            image: [B, F] features of the reference images as CLIP gives them, NOT normalised.
            text: [B, F] features of the captions, NOT normalised.

        Returns:
            [B, F], L2-normalised. The mixture and the norm are computed in fp32 or finer, under autocast too.

        Raises:
            ValueError: Shapes that do not fit.
        """
        if image.ndim != 2 or image.shape != text.shape or image.shape[1] != self.feature_dim:
            raise ValueError(
                f"`image` and `text` must both be features [B, {self.feature_dim}], "
                f"got {list(image.shape)} and {list(text.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        image, text = image.to(dtype), text.to(dtype)
        projected_text = self.dropout(F.relu(self.text_projection_layer(text)))
        projected_image = self.dropout(F.relu(self.image_projection_layer(image)))
        both = torch.cat([projected_text, projected_image], dim=1)
        correction = self.output_layer(self.dropout(F.relu(self.combiner_layer(both))))
        text_share = torch.sigmoid(self.dynamic_scalar(both).to(dtype))
        return unit(correction + text_share * text + (1 - text_share) * image)
