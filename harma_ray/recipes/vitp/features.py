"""The vector of an image: the vision transformer's hidden states, pooled; and Top-1 by class with such vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.images import check_sides, decode_stored, to_rgb
from harma_ray.data.kinds.images import IMAGES
from harma_ray.data.samples import Array, RowTransform
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import EvaluationStream
from harma_ray.data.transforms import to_tensor
from harma_ray.distributed import gather_rows
from harma_ray.errors import UserError, first_few
from harma_ray.models.internvl.vision import VisionVectors
from harma_ray.models.precision import evaluating
from harma_ray.recipes.vitp.config import FeatureConfig
from harma_ray.retrieval.by_class import ByClassRetrieval, rank_by_class
from harma_ray.retrieval.classes import Classes, same_images
from harma_ray.retrieval.encoding import Encoder

if TYPE_CHECKING:
    from transformers import InternVLVisionModel

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class SquareTransform(RowTransform):
    """An image as its vector is made of it."""

    size: int
    interpolation: Literal["bilinear", "bicubic"]
    max_pixels: int

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns an image squashed to a square: uint8[3, S, S]."""
        return to_tensor(to_rgb(image).resize((self.size, self.size), _RESAMPLING[self.interpolation]))

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``image`` uint8[3, S, S], and ``content``, int64, which tells files apart; nothing is random."""
        digest = hashlib.sha256(row["image"]).digest()
        return {
            "image": self.prepare(decode_stored(row["image"], max_pixels=self.max_pixels)),
            "content": np.int64(int.from_bytes(digest[:8], "big", signed=True)),
        }


def vision_encoder(
    vision_tower: InternVLVisionModel, settings: FeatureConfig, transform: SquareTransform, precision: str
) -> Encoder:
    """Returns what makes unit vectors with a vision transformer, on the device that it is on.

    Args:
        vision_tower: The transformer.
        settings: Layer and pooling.
        transform: How images become its input.
        precision: See `evaluating`.
    """
    device = vision_tower.embeddings.cls_token.device
    vectors = VisionVectors(vision_tower.eval(), settings.layer, settings.pooling)

    @evaluating(precision, device)
    def encode_images(images: Tensor) -> Tensor:
        return vectors(images.to(device)).cpu()

    def prepare(image: Image.Image) -> Tensor:
        check_sides(image)
        return transform.prepare(image)

    depends_on = {
        "layer": settings.layer,
        "pooling": settings.pooling,
        "image_size": transform.size,
        "interpolation": transform.interpolation,
    }
    return Encoder(vision_tower.config.hidden_size, prepare, encode_images, depends_on=depends_on)


def labelled_splits(settings: FeatureConfig, queries: str) -> tuple[Split, Split]:
    """Returns the gallery on which Top-1 is measured, and the split of some name, whose images are asked for.

    Raises:
        UserError: If they are not there, are no images, have no classes, or one that the gallery lacks.
    """
    splits = open_split(settings.data, settings.gallery), open_split(settings.data, queries)
    for split in splits:
        split.require_kind([IMAGES], "`features.data`")
        if split.read(["label_name"]).column("label_name").null_count:
            raise UserError(f"{split.path} has images without a class, by which Top-1 is measured; convert it with one")
    gallery, asked = ({*split.read(["label_name"]).column("label_name").to_pylist()} for split in splits)
    if asked - gallery:
        raise UserError(
            f"`features.gallery` must hold images of every class that is asked for, but {splits[0].path} has none of "
            f"{first_few(sorted(asked - gallery))}; convert both with all classes"
        )
    return splits


def measure_features(
    encoder: Encoder, transform: SquareTransform, labelled: Sequence[Split], data: EvaluationStream, batch_size: int
) -> ByClassRetrieval:
    """Ranks the gallery's images for each query by their vectors; called on every worker, each encodes its share.

    An image that is the query itself, byte for byte, is left out of its ranking.

    Args:
        encoder: Makes the vectors.
        transform: How images become its input.
        labelled: See `labelled_splits`.
        data: A stream whose workers share the images.
        batch_size: Images at a time.
    """
    vectors, names, contents = [], [], []
    for split in labelled:
        stream = data.over(split)
        encoded, seen = [torch.empty(0, encoder.width)], [torch.empty(0, dtype=torch.int64)]
        for batch in stream.batches(transform, batch_size=batch_size):
            encoded.append(encoder.encode_images(batch["image"]))
            seen.append(batch["content"].cpu())
        vectors.append(gather_rows(torch.cat(encoded)))
        contents.append(gather_rows(torch.cat(seen)).tolist())
        names.append(stream.table(["label_name"]).column("label_name").to_pylist())
    excluded = same_images(contents[1], contents[0])
    result = rank_by_class(vectors[1], vectors[0], Classes.of(names[1], names[0]), excluded=excluded)
    return ByClassRetrieval(vectors[1], vectors[0], excluded, result, torch.arange(len(vectors[1])))
