"""The weighted triplet term against the contrastive one, by batch, for a weak and a strong backbone.

Embeddings are drawn: a text is its image's direction with noise, much of it (weak) or little (strong). Printed are the
norms of both terms' gradients for the embeddings, and what the terms are now and would be at equal scores. A second or
two on one core.

    python benchmarks/triplet.py
"""

import math

import torch
from tabulate import tabulate
from torch.nn.functional import normalize

from harma_ray.models.losses import contrastive_loss, equal_scores_triplet_loss, weighted_triplet_loss

WIDTH, TEMPERATURE, MARGIN, GAMMA = 64, 0.07, 0.2, 2.0
BACKBONES = {"none": 0.0, "weak": 0.3, "strong": 2.0}
"""How much of an image's direction is in its text, against noise of length 1."""


def main() -> None:
    """Measures and prints."""
    rows = []
    for name, signal in BACKBONES.items():
        for size in (32, 128, 428):
            generator = torch.Generator().manual_seed(size)
            image = normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
            noise = normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
            text = normalize(signal * image + noise, dim=1)
            pair = (image.requires_grad_(), text.requires_grad_())
            terms = [contrastive_loss(*pair, TEMPERATURE), weighted_triplet_loss(*pair, margin=MARGIN, gamma=GAMMA)]
            norms = [torch.cat([g.flatten() for g in torch.autograd.grad(term, pair)]).norm() for term in terms]
            excess = MARGIN + image @ text.T - (image * text).sum(dim=1)[:, None]
            violated = (int((excess > 0).sum()) - size) / (size * (size - 1))
            equal = [math.log(size), equal_scores_triplet_loss(size, margin=MARGIN, gamma=GAMMA)]
            told = [f"{term.item():.3g} / {value:.3g}" for term, value in zip(terms, equal, strict=True)]
            rows.append([name, size, violated, *map(float, norms), float(norms[1] / norms[0]), *told])
    headers = ["backbone", "batch", "violated", "|grad contrastive|", "|grad triplet|", "ratio",
               "contrastive / equal", "triplet / equal"]  # fmt: skip
    print(tabulate(rows, headers=headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
