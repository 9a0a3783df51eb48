"""What turns images and texts into vectors, what tells its vectors from others, and encoding shared by all workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.captions import clean_caption
from harma_ray.data.order import worker_rows
from harma_ray.distributed import gather_rows, rank, world_size
from harma_ray.models.clip import DualEncoder
from harma_ray.models.precision import evaluating

_TEXTS_AT_ONCE = 256
_TEXTS_SORTED = 8192
"""So many captions, of about as many letters, are put into order by their tokens, which lie in memory meanwhile."""

Compose = Callable[[Tensor, Sequence[Sequence[str]]], Tensor]
"""Turns reference images uint8[B, 3, S, S], with one or two captions each, into unit vectors fp32[B, F] on CPU."""


@dataclass(frozen=True)
class Encoder:
    """A model that images, and maybe texts, become vectors by."""

    width: int
    """F, of the vectors."""
    prepare: Callable[[Image.Image], Tensor]
    """Turns an image of any mode and size into uint8[3, S, S]."""
    encode_images: Callable[[Tensor], Tensor]
    """Turns uint8[B, 3, S, S] into fp32[B, F] on CPU."""
    encode_texts: Callable[[list[str]], Tensor] | None = None
    """Turns texts into fp32[B, F] on CPU; None = it takes none."""
    prepare_text: Callable[[str], str] = clean_caption
    """Turns a caption as people write it into what the model reads; empty: it holds no word."""
    compose: Mapping[str, Compose] = field(default_factory=dict)
    """Ways to make query vectors of composed retrieval, the model's own first; none: it makes none."""
    depends_on: Mapping[str, str | float | bool] = field(default_factory=dict)
    """What vectors depend on beside the weights, by name, such as the layer."""


@dataclass(frozen=True)
class VectorIdentity:
    """What vectors depend on: those of equal identities lie in one space."""

    values: Mapping[str, str | float | bool]
    """By name: the weights' fingerprint, the run, how images become inputs, ..., as a manifest holds them."""

    def differing(self, other: VectorIdentity) -> str:
        """Returns the names of what another one has otherwise, for messages; empty if vectors may be compared."""
        return ", ".join(name for name, value in self.values.items() if other.values.get(name) != value)


def clip_encoder(
    model: DualEncoder,
    tokenizer: Callable[..., Tensor],
    prepare: Callable[[Image.Image], Tensor],
    device: str,
    *,
    precision: str = "fp32",
    normalize: bool = True,
) -> Encoder:
    """Returns what encodes with a CLIP, which is moved to a device, as evaluation does.

    Args:
        model: The CLIP.
        tokenizer: Its backbone's.
        prepare: See `Encoder`.
        device: Such as ``cuda``.
        precision: See `evaluating`.
        normalize: Give unit vectors.
    """
    place = torch.device(device)
    model.to(place).eval()

    @evaluating(precision, place)
    def encode_images(images: Tensor) -> Tensor:
        return model.encode_image(images.to(place), normalize=normalize).float().cpu()

    @evaluating(precision, place)
    def encode_captions(texts: list[str]) -> Tensor:
        return encode_texts(model, tokenizer, texts, _TEXTS_AT_ONCE, normalize=normalize)

    return Encoder(model.embedding_width, prepare, encode_images, encode_captions)


@torch.no_grad()
def encode_texts(
    model: DualEncoder, tokenizer: Callable[..., Tensor], texts: list[str], batch_size: int, *, normalize: bool = True
) -> Tensor:
    """Encodes captions, equal ones once, those of about as many tokens together, the work shared by all workers.

    Args:
        model: The unwrapped model.
        tokenizer: Its backbone's; cuts captions that are too long.
        texts: M captions, the same on every worker.
        batch_size: Captions at a time.
        normalize: Give unit vectors.

    Returns:
        fp32[M, E] on CPU, the same on every worker.
    """
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    place = {text: number for number, text in enumerate(distinct)}
    own = [distinct[i] for i in worker_rows(len(distinct), rank(), world_size())]
    encoded = torch.empty(len(own), model.embedding_width, device=model.temperature.device)
    for start in range(0, len(own), _TEXTS_SORTED):
        tokens = tokenizer(own[start : start + _TEXTS_SORTED])
        for rows in tokens.argmax(dim=-1).argsort(stable=True).split(batch_size):
            encoded[start + rows] = model.encode_text(tokens[rows], normalize=normalize).float()
    return gather_rows(encoded).cpu()[[place[text] for text in texts]]
