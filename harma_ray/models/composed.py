"""Composed retrieval: a query vector out of a reference image and a text, in the space of the gallery's images.

Shape letters: B batch, F features of CLIP.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from harma_ray.models.clip import DualEncoder, unit
from harma_ray.models.combiner import Combiner

Encoders = Literal["both", "text", "image", "none"]


class ComposedRetriever(nn.Module):
    """CLIP's two encoders and what makes one vector of their outputs: the sum, or a Combiner.

    The encoders stay in evaluation mode while they are trained, as in CLIP4Cir's code: the running statistics of batch
    normalisation are frozen, its weights are not.

    Args:
        encoder: CLIP's encoders.
        combiner: What combines; None: the features are added.
        trained: Which encoders are trained.

    Attributes:
        encoder: As given.
        combiner: As given.
    """

    def __init__(self, encoder: DualEncoder, combiner: Combiner | None = None, *, trained: Encoders = "none"):
        super().__init__()
        self.encoder, self.combiner = encoder, combiner
        for name, parameter in encoder.named_parameters():
            is_image = name.startswith("clip.visual.")
            used = name.startswith("clip.") and not name.startswith("clip.logit_")  # the loss has a fixed scale
            parameter.requires_grad_(used and (trained == "both" or trained == ("image" if is_image else "text")))
        encoder.eval()

    @property
    def clip(self) -> nn.Module:
        """open_clip's model."""
        return self.encoder.clip

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.encoder.temperature.device

    def train(self, mode: bool = True) -> "ComposedRetriever":
        """Sets the mode of the combiner alone."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, reference: Tensor, text: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Encode triplets.

        Args:
            reference: [B, ...], see `image_features`.
            text: [B, ...], see `text_features`.
            target: [B, ...], see `image_features`.

        Returns:
            `query` and `target`, [B, F], at least fp32, L2-normalised.
        """
        images = self.image_features(torch.cat([reference, target]))
        query = self.compose(images[: len(reference)], self.text_features(text))
        return {"query": query, "target": unit(images[len(reference) :])}

    def image_features(self, image: Tensor) -> Tensor:
        """Return [B, F], not normalised, of images uint8[B, 3, S, S], or of features fp32[B, F], which stay."""
        return self.encoder.encode_image(image, normalize=False) if image.ndim == 4 else image

    def text_features(self, text: Tensor) -> Tensor:
        """Return [B, F], not normalised, of tokens int64[B, L], or of features fp32[B, F], which stay."""
        return text if text.is_floating_point() else self.encoder.encode_text(text, normalize=False)

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        """Return query vectors [B, F], L2-normalised, of features [B, F] that are not."""
        return unit(image + text) if self.combiner is None else self.combiner(image, text)
