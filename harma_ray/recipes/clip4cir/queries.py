"""How query vectors of CLIP4Cir are made of features, and of images and captions.

Shape letters: Q queries, F features of CLIP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.relative_captions import evaluation_text
from harma_ray.models.clip import unit
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.precision import evaluating
from harma_ray.retrieval import composed
from harma_ray.retrieval.encoding import Encoder, clip_encoder

BASELINE_METRICS: Mapping[str, str] = {
    "sum": "sum_r_mean",
    "image": "image_only_r_mean",
    "text": "text_only_r_mean",
}
"""Where an evaluation of the model's own queries has the `r_mean` of others."""
LABELS: Mapping[str, str] = {
    **composed.LABELS,
    "sum_r_mean": "by the sum of both",
    "image_only_r_mean": "by the reference alone",
    "text_only_r_mean": "by the text alone",
}
"""What metrics stand for."""


def compose(model: ComposedRetriever, images: Tensor, texts: Tensor, query: str, *, batch_size: int) -> Tensor:
    """Returns query vectors fp32[Q, F] on CPU, L2-normalised.

    Args:
        model: Whose Combiner may be used.
        images: Features of the references fp32[Q, F], not normalised.
        texts: Features fp32[Q, F], not normalised.
        query: One of `QUERIES` that the model can make.
        batch_size: Queries at a time.
    """
    if query in ("image", "text"):
        return unit(images if query == "image" else texts)
    made = model.compose if query == "combiner" else model.add
    parts = [
        made(some.to(model.device), part.to(model.device)).float().cpu()
        for some, part in zip(images.split(batch_size), texts.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def composing_encoder(
    model: ComposedRetriever,
    tokenizer: Callable[..., Tensor],
    prepare: Callable[[Image.Image], Tensor],
    device: str,
    ways: Sequence[str],
    *,
    precision: str,
    depends_on: Mapping[str, str | float | bool],
) -> Encoder:
    """Returns what encodes gallery, texts and queries as evaluation does, with a model that is moved to a device.

    Args:
        model: The model.
        tokenizer: Its backbone's.
        prepare: See `Encoder`.
        device: Such as ``cuda``.
        ways: Those of `QUERIES` that the model can make, its own first.
        precision: See `evaluating`.
        depends_on: See `Encoder`.
    """
    place = torch.device(device)
    model.to(place).eval()
    raw = clip_encoder(model.encoder, tokenizer, prepare, device, precision=precision, normalize=False)
    encode_features = raw.encode_texts
    assert encode_features is not None

    @evaluating(precision, place)
    def make(query: str, images: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
        texts = encode_features([evaluation_text(own) for own in captions])
        return compose(model, raw.encode_images(images), texts, query, batch_size=len(images))

    return replace(
        raw,
        encode_images=lambda images: unit(raw.encode_images(images)),
        encode_texts=lambda texts: unit(encode_features(texts)),
        prepare_text=str.strip,
        compose={query: partial(make, query) for query in ways},
        depends_on=depends_on,
    )
