"""Composed retrieval: a query vector out of a reference image and a text, in the space of the gallery's images.

Shape letters: B batch, F features of CLIP.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harma_ray.models.clip import DualEncoder, unit
from harma_ray.models.combiner import Combiner
from harma_ray.models.precision import full_precision

Encoders = Literal["both", "text", "image", "none"]


class ComposedRetriever(nn.Module):
    """CLIP's two encoders and what makes one vector of their outputs: the sum, or a Combiner.

    The encoders stay in evaluation mode while they are trained, as in CLIP4Cir's code: the running statistics of batch
    normalisation are frozen, its weights are not. Where neither is trained, they run in chunks, without gradients, and
    in fp32: in training whatever autocast says, so that features computed once or in every step are the same; in
    evaluation unless autocast is on.

    Args:
        encoder: CLIP's encoders.
        combiner: What combines; None: the features are added.
        trained: Which encoders are trained.
        chunk_size: Images or texts that frozen encoders take at a time.

    Attributes:
        encoder: As given.
        combiner: As given.
    """

    def __init__(
        self, encoder: DualEncoder, combiner: Combiner | None = None, *, trained: Encoders = "none",
        chunk_size: int = 64,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.combiner = encoder, combiner
        self._is_frozen, self._chunk_size = trained == "none", chunk_size
        for name, parameter in encoder.named_parameters():
            is_image = name.startswith("clip.visual.")
            used = name.startswith("clip.") and not name.startswith("clip.logit_")  # the loss has a fixed scale
            parameter.requires_grad_(used and (trained == "both" or trained == ("image" if is_image else "text")))
        encoder.eval()

    @property
    def clip(self) -> nn.Module:
        """open_clip's model."""
        return self.encoder.clip

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of the image encoder."""
        visual: Any = self.clip.visual
        return visual.parameters()

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
        return self._encode(self.encoder.encode_image, image) if image.ndim == 4 else image

    def text_features(self, text: Tensor) -> Tensor:
        """Return [B, F], not normalised, of tokens int64[B, L], or of features fp32[B, F], which stay.

        Both may lie on the CPU; tokens that are cut (`text_tokens`) then spare a GPU from being waited for.
        """
        if text.is_floating_point():
            return text.to(self.device, non_blocking=True)
        return self._encode(self.encoder.encode_text, text)

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        """Return query vectors [B, F], L2-normalised, of features [B, F] that are not."""
        return self.add(image, text) if self.combiner is None else self.combiner(image, text)

    @staticmethod
    def add(image: Tensor, text: Tensor) -> Tensor:
        """Return the normalised sum of features [B, F], the query vectors of a model without a Combiner."""
        return unit(image.float() + text.float())

    def _encode(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        if not self._is_frozen:
            return encode(inputs, normalize=False)
        as_asked = not self.training and torch.is_autocast_enabled(self.device.type)
        with torch.no_grad(), contextlib.nullcontext() if as_asked else full_precision(self.device):
            return torch.cat([encode(part, normalize=False) for part in inputs.split(self._chunk_size)])
