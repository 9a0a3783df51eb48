"""How query vectors of CLIP4Cir are made of features.

Shape letters: Q queries, G gallery, F features of CLIP.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from harma_ray.data.queries import ComposedQueries
from harma_ray.models.clip import unit
from harma_ray.models.composed import ComposedRetriever
from harma_ray.retrieval import composed

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


def compose(
    model: ComposedRetriever, gallery: Tensor, texts: Tensor, queries: ComposedQueries, query: str, *, batch_size: int
) -> Tensor:
    """Returns query vectors fp32[Q, F] on CPU, L2-normalised.

    Args:
        model: Whose Combiner may be used.
        gallery: Features fp32[G, F], not normalised.
        texts: Features fp32[Q, F], not normalised.
        queries: Where the references are in the gallery.
        query: One of `QUERIES` that the model can make.
        batch_size: Queries at a time.
    """
    if query in ("image", "text"):
        return unit(gallery[queries.reference] if query == "image" else texts)
    made = model.compose if query == "combiner" else model.add
    parts = [
        made(images.to(model.device), part.to(model.device)).float().cpu()
        for images, part in zip(gallery[queries.reference].split(batch_size), texts.split(batch_size), strict=True)
    ]
    return torch.cat(parts)
