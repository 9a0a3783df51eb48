"""Other spaces in which images are compared, fitted on a gallery alone, and queries moved towards what they found.

Shapes: Q queries, G gallery images, E embedding width, F width in the other space, k neighbours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import Search, top_k

_ROWS_AT_ONCE = 4096
EPSILON = 1e-6
"""This part of the largest variance is added to that along a component before whitening divides by its root."""
_NO_VARIANCE = 1e-10
"""Along components with less than this part of the largest variance a gallery does not vary: what is there is noise."""


@dataclass(frozen=True)
class Space:
    """An affine map of vectors, after which they are normalised anew."""

    mean: Tensor
    """float64 [E], taken off first."""
    matrix: Tensor
    """float64 [E, F], which multiplies then; or [E], the diagonal of one."""

    @property
    def width(self) -> int:
        """F."""
        return self.matrix.shape[-1]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Maps vectors.

        Args:
            vectors: [N, E].

        Returns:
            fp32[N, F], L2-normalised; what lies at the mean becomes zeros.
        """
        mapped = torch.empty(len(vectors), self.width)
        for part in iterate_slices(len(vectors), _ROWS_AT_ONCE):
            centred = vectors[part].double() - self.mean
            moved = centred @ self.matrix if self.matrix.ndim == 2 else centred * self.matrix
            mapped[part] = torch.nn.functional.normalize(moved, dim=1).float()
        return mapped


def fit_pca(gallery: Tensor, components: int) -> Space:
    """Returns the space of the directions along which a gallery varies most.

    Args:
        gallery: [G, E].
        components: F.

    Raises:
        UserError: If there are not as many directions.
    """
    mean, directions, _ = _components(gallery, components)
    return Space(mean, directions)


def fit_whitening(gallery: Tensor, components: int | None = None, epsilon: float = EPSILON) -> Space:
    """Returns the space in which a gallery varies alike in all directions: PCA divided by sqrt(variance + epsilon max).

    max is the largest variance, so that vectors in another scale, or closer together, are whitened alike.

    Args:
        gallery: [G, E].
        components: F, of the largest variance; None = all along which the gallery varies.
        epsilon: See `EPSILON`.

    Raises:
        UserError: If there are not as many directions.
    """
    mean, directions, variances = _components(gallery, components or min(gallery.shape))
    largest = variances.max()
    if components is None:
        varies = variances > _NO_VARIANCE * largest
        directions, variances = directions[:, varies], variances[varies]
    return Space(mean, directions / torch.sqrt(variances + epsilon * largest))


def fit_standardisation(gallery: Tensor) -> Space:
    """Returns the space in which every dimension of a gallery has mean 0 and deviation 1; one that is constant stays.

    Constant is one whose variance is less than 1e-10 of the largest.

    Paper: none; guides to ViTP's retrieval call this whitening, but dimensions stay correlated.

    Args:
        gallery: [G, E].
    """
    mean, products = _moments(gallery, lambda centred: (centred**2).sum(dim=0))
    variances = products / len(gallery)
    varies = variances > _NO_VARIANCE * variances.max()
    return Space(mean, torch.where(varies, variances, 1).rsqrt())


def expand_queries(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    alpha: float = 0.0,
    excluded: Groups | None = None,
    search: Search = top_k,
) -> Tensor:
    """Returns queries in whose place stands the weighted mean of each and of the k gallery vectors that it found.

    A neighbour weighs cosine^alpha, the query itself 1; cosines below 0 count as 0. With alpha 0 it is the plain mean
    (Chum et al., ICCV 2007), with alpha > 0 alpha query expansion (Radenovic et al., TPAMI 2019, section 3.3).

    Args:
        queries: [Q, E], L2-normalised.
        gallery: [G, E], L2-normalised.
        k: Neighbours.
        alpha: At least 0.
        excluded: Gallery images that a query must not find.
        search: How neighbours are found.

    Returns:
        fp32[Q, E], L2-normalised.

    Raises:
        UserError: If k is larger than the gallery, or alpha is negative.
    """
    if alpha < 0:
        raise UserError(f"`alpha` must be at least 0, got {alpha:g}")
    if not 1 <= k <= len(gallery):
        raise UserError(f"queries are expanded by 1..{len(gallery)} images, the size of the gallery, but got {k}")
    scores, items = search(queries, gallery, k, excluded=excluded)
    weights = scores.clamp(min=0).pow(alpha).masked_fill(items < 0, 0)
    expanded = torch.empty_like(queries, dtype=torch.float32)
    for part in iterate_slices(len(queries), max(1, _ROWS_AT_ONCE // k)):
        found = gallery[items[part].clamp(min=0)]
        moved = queries[part] + (weights[part, :, None] * found).sum(dim=1)
        expanded[part] = torch.nn.functional.normalize(moved, dim=1)
    return expanded


def _components(gallery: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean [E], directions [E, F] and variances [F] of a gallery, the largest first; all float64."""
    rows, width = gallery.shape
    if not 1 <= count <= min(rows, width):
        raise UserError(
            f"PCA needs 1 <= components <= min({rows} gallery images, {width} dimensions), got {count}; use at most "
            f"{min(rows, width)}"
        )
    if bool((gallery == gallery[0]).all()):
        raise UserError("PCA needs a gallery of different vectors, but all are equal")
    mean, products = _moments(gallery, lambda centred: centred.T @ centred)
    variances, directions = torch.linalg.eigh(products / (rows - 1))  # the smallest first
    return mean, directions.flip(1)[:, :count], variances.clamp(min=0).flip(0)[:count]


def _moments(gallery: Tensor, products: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the mean of a gallery, float64 [E], and the sum of what is made of its parts with the mean taken off."""
    parts = [*iterate_slices(len(gallery), _ROWS_AT_ONCE)]  # for float64 of all would be twice the gallery's memory
    mean = torch.stack([gallery[part].double().sum(dim=0) for part in parts]).sum(dim=0) / len(gallery)
    return mean, functools.reduce(torch.add, (products(gallery[part].double() - mean) for part in parts))
