"""How CLIP4Cir's triplets and galleries become inputs: images padded and cropped, texts tokenised, or vectors.

Shape letters: B batch, S side of the images, L tokens, F features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from harma_ray.data.images import BadImage, open_image
from harma_ray.data.padding import Padding, padded_transform
from harma_ray.data.relative_captions import training_texts
from harma_ray.data.samples import Array, RowTransform
from harma_ray.errors import UserError
from harma_ray.models.architectures import tokenizer_of


@dataclass(frozen=True)
class Inputs:
    """How images and texts become CLIP's inputs."""

    architecture: str
    size: int
    max_pixels: int
    padding: Padding
    target_ratio: float

    def image(self, data: bytes) -> Tensor:
        """Returns an image file as uint8[3, S, S]."""
        return self.prepare(open_image(data, max_pixels=self.max_pixels))

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns an image, as `open_image` gives it, as uint8[3, S, S]."""
        return padded_transform(
            image, self.size, padding=self.padding, target_ratio=self.target_ratio, max_pixels=self.max_pixels
        )

    def named_image(self, data: bytes, name: str) -> Tensor:
        """Returns `image` of a file; its name is told if it cannot be read."""
        try:
            return self.image(data)
        except BadImage as error:
            raise UserError(f"image {name}: {error}") from error

    def tokens(self, texts: list[str]) -> Tensor:
        """Returns texts as int64[B, L]; what is too long is cut."""
        return tokenizer_of(self.architecture)(texts)


@dataclass(frozen=True)
class TripletTransform(RowTransform):
    """A reference, one of the texts of its query, and the target; images or vectors."""

    on_cpu = frozenset({"text"})  # where it is cut without a GPU being waited for

    inputs: Inputs
    random_captions: bool

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``reference``, ``text`` and ``target``: uint8[3, S, S] and int64[L], or features fp32[F]."""
        if "text_vectors" in row:
            vectors = row["text_vectors"]
            return {
                "reference": vector_of(row["reference_vector"]),
                "text": vector_of(vectors[int(rng.integers(len(vectors)))]),
                "target": vector_of(row["target_vector"]),
            }
        texts = training_texts(row["captions"])[: None if self.random_captions else 1]
        text = texts[int(rng.integers(len(texts)))]
        return {
            "reference": self.inputs.named_image(row["reference_image"], row["reference"]),
            "text": self.inputs.tokens([text])[0],
            "target": self.inputs.named_image(row["target_image"], row["target"]),
        }


@dataclass(frozen=True)
class ItemTransform(RowTransform):
    """An image of a gallery, or its vector."""

    inputs: Inputs

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``image``, uint8[3, S, S] or fp32[F]; nothing is random."""
        return {"image": vector_of(row["vector"]) if "vector" in row else self.inputs.image(row["image"])}


def vector_of(data: bytes) -> np.ndarray:
    """Returns the vector that a data set holds as bytes: fp32[F]."""
    return np.frombuffer(data, np.float32)
