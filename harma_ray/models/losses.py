"""Losses between the features of one global batch: of images and texts, or of composed queries and target images.

Pure functions. They take features that are L2-normalised already and gathered over all workers, and return one scalar
tensor. Where the batch is spread over W workers every worker calls them on the same gathered rows; see
``harma_ray.distributed.gather_with_gradient`` for why the parameter gradients then equal those of a single worker.

Arithmetic is float32 or better whatever autocast says: float16 and bfloat16 inputs are promoted, float64 stays.

Shape letters: N global rows (W x B), B rows of one worker, E embedding. Row i of the images and row i of the texts are
a pair; several rows may show the same image with different captions.

What the sum in `weighted_triplet_loss` means: beside the contrastive mean, its gradient grows with about N^1.8 while
pairs are violated, and not at all once they are not. On drawn embeddings (``benchmarks/triplet.py``; margin 0.2, gamma
2, temperature 0.07) it is 2.8, 25 and 345 times the contrastive term's at N = 32, 128 and 428 where 29 % of the pairs
are violated, 11, 164 and 1,900 times where scores are noise, and 0 where the backbone ranks well. So at the paper's 428
a weak backbone learns from this term alone; at 128 it weighs a fourteenth of that. Adam takes no notice of the common
scale, only of the direction: the weight (1 - exp(-c))^gamma makes the hinge convex, so noise in the scores costs more
than equal scores (276 against 107 at N = 128), and a model that ranks like chance is drawn towards these. Own pairs
that lead a little outweigh that (14 against 107). The contrastive term has the same pull (6.3 against 4.9).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from harma_ray.errors import UserError


def contrastive_loss(
    image: Tensor, text: Tensor, temperature: Tensor | float, image_ids: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy between images and texts with soft targets (InfoNCE where every image is there once).

    With ``logits = image @ text.T / temperature`` and, for row i, the n_i rows j of equal image id (i itself among
    them), the target of row i is 1/n_i on each of these and 0 elsewhere. The loss is the mean over the rows of the
    cross-entropy, image to text and text to image (rows of the transposed logits, same targets), averaged over the two
    directions. Source: HarMA (arXiv 2404.18253), contrastive term, as in the released code.

    Args:
        image: [N, E] image features, L2-normalised.
        text: [N, E] text features, L2-normalised.
        temperature: Scalar > 0 that the logits are divided by; may carry a gradient.
        image_ids: [N] integers; rows of equal id are positives of each other. None: only the diagonal is positive.

    Returns:
        Scalar >= 0, float32 (float64 for float64 features).

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    image, text = _as_pairs(image, text)
    with _no_autocast(image):
        logits = image @ text.T / _as_temperature(temperature, image)
        if image_ids is None:
            target = torch.arange(len(image), device=image.device)
        else:
            same_image = _same_id(image_ids, image, "image_ids").to(logits.dtype)
            target = same_image / same_image.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def weighted_triplet_loss(
    image: Tensor,
    text: Tensor,
    *,
    margin: float = 0.2,
    gamma: float = 2.0,
    image_ids: Tensor | None = None,
    same_image_negatives: bool = True,
) -> Tensor:
    """Hinge loss over all in-batch negatives, each weighted by how hard it is.

    With ``S = image @ text.T`` and for every i != j::

        c_ij = max(0, margin + S_ij - S_ii)      text j against image i's own text      (rows)
        d_ij = max(0, margin + S_ij - S_jj)      image i against text j's own image     (columns)
        loss = 1/2 * sum over i != j of  (1 - exp(-c_ij))^gamma * c_ij  +  (1 - exp(-d_ij))^gamma * d_ij

    It is a SUM and grows with the number of pairs, N * (N - 1). Gradients flow through the weights as well. Source:
    HarMA (arXiv 2404.18253), adaptive triplet term; the sum and the factor 1/2 are those of the released code. What the
    sum means for a training is said at the top of this file.

    A term's derivative tends to 0 as c -> 0 for every gamma > 0, but differentiating the weight alone divides by
    c^(1 - gamma), which is infinite at c = 0 when gamma < 1, and 0 * inf is NaN. Therefore entries with no violation
    (and the excluded ones) are replaced by a constant before the power is taken and their terms by 0 after it: they
    carry exactly zero gradient. At gamma = 0 (the plain hinge, halved) the derivative at c = 0 is taken as 0.

    Args:
        image: [N, E] image features, L2-normalised.
        text: [N, E] text features, L2-normalised.
        margin: Required lead of the own pair, in cosine similarity, >= 0.
        gamma: Exponent of the weight, >= 0. Larger: easy violations count for less.
        image_ids: [N] integers, one id an image; needed when ``same_image_negatives`` is False, else unused.
        same_image_negatives: True: other captions of the same image count as negatives, as in the released code.
            False: pairs of equal image id are left out.

    Returns:
        Scalar >= 0, float32 (float64 for float64 features); 0 for N = 1.

    Raises:
        UserError: ``margin`` or ``gamma`` is negative or not finite.
        ValueError: Shapes or dtypes do not fit, or ids are needed and missing.
    """
    _require_not_negative("gamma", gamma)
    row_excess, column_excess = _hinge_arguments(image, text, margin, image_ids, same_image_negatives)
    return (_weighted_hinge_sum(row_excess, gamma) + _weighted_hinge_sum(column_excess, gamma)) / 2


def triplet_loss(
    image: Tensor,
    text: Tensor,
    *,
    margin: float = 0.2,
    hardest_only: bool = False,
    image_ids: Tensor | None = None,
    same_image_negatives: bool = True,
) -> Tensor:
    """Plain hinge loss over in-batch negatives: the sum of both directions, not halved.

    With c and d as in ``weighted_triplet_loss``, the loss is the sum of all c_ij and d_ij, or with ``hardest_only``
    the sum over the rows of max_j c_ij plus the sum over the columns of max_i d_ij (VSE++, arXiv 1707.05612). Negatives
    that tie for hardest share the gradient evenly, so that the order of the batch does not matter.

    Args:
        image: [N, E] image features, L2-normalised.
        text: [N, E] text features, L2-normalised.
        margin: Required lead of the own pair, in cosine similarity, >= 0.
        hardest_only: Keep only the hardest negative of every image and of every text.
        image_ids: [N] integers, one id an image; needed when ``same_image_negatives`` is False, else unused.
        same_image_negatives: False leaves out pairs of equal image id.

    Returns:
        Scalar >= 0, float32 (float64 for float64 features); 0 for N = 1.

    Raises:
        UserError: ``margin`` is negative or not finite.
        ValueError: Shapes or dtypes do not fit, or ids are needed and missing.
    """
    row_excess, column_excess = _hinge_arguments(image, text, margin, image_ids, same_image_negatives)
    row_cost, column_cost = F.relu(row_excess), F.relu(column_excess)
    if hardest_only:
        return row_cost.amax(dim=1).sum() + column_cost.amax(dim=0).sum()
    return row_cost.sum() + column_cost.sum()


def equal_scores_triplet_loss(num_rows: int, *, margin: float, gamma: float = 0.0) -> float:
    """Return the weighted triplet loss of N rows whose scores are all equal, every other row being a negative.

    All hinges are then the margin: ``N * (N - 1) * (1 - exp(-margin))^gamma * margin``. The plain loss is twice that at
    gamma 0, with the hardest negatives alone ``2 * N * margin``. The cross-entropies are ln N, whatever their targets.

    Args:
        num_rows: N.
        margin: See ``weighted_triplet_loss``.
        gamma: See ``weighted_triplet_loss``.
    """
    return num_rows * (num_rows - 1) * (-math.expm1(-margin)) ** gamma * margin


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Return, for every sample, the mean of the features of its class in this batch.

    Row i is the mean over all rows j with ``labels[j] == labels[i]``, i itself among them. The mean is not normalised
    again. It carries gradients. For ``affiliation_loss`` it is taken over one worker's own rows, before the gather.

    Args:
        features: [B, E] features of one modality, L2-normalised.
        labels: [B] integer class labels.

    Returns:
        [B, E], float32 (float64 for float64 features).

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    _require_features("features", features)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with _no_autocast(features):
        same_class = _same_id(labels, features, "labels").to(features.dtype)
        return same_class @ features / same_class.sum(dim=1, keepdim=True)


def affiliation_loss(
    image: Tensor, text: Tensor, image_class_means: Tensor, text_class_means: Tensor, temperature: Tensor | float
) -> Tensor:
    """Cross-entropy that ties every sample to the class mean of the other modality at its own row.

    Exactly::

        P = image @ text_class_means.T / temperature       P_ij: image i against the text mean at row j
        Q = text @ image_class_means.T / temperature       Q_ij: text i against the image mean at row j
        loss = 1/2 * (mean_i -log softmax(P_i.)_i  +  mean_j -log softmax(Q_.j)_j)

    The first term asks each image for the right mean among all N means (softmax over a row of P). The second is taken
    on the transposed matrix: it asks each image mean for the right text among all N texts (softmax over a column of
    Q). Targets are the diagonal alone, although the means at rows of one class and one worker are equal; so the loss
    does not reach 0 when a class repeats. Neither means nor logits are normalised again.

    The means are those of each worker's own rows, ``gather_with_gradient(class_means(local_features, local_labels))``;
    unlike the other losses this one therefore depends on how the batch is split over the workers.

    Source: the affiliation loss of PIR (Pan et al., ACM MM 2023) in the form of HarMA's released code.

    Args:
        image: [N, E] image features, L2-normalised.
        text: [N, E] text features, L2-normalised.
        image_class_means: [N, E] means of image features, row i belonging to sample i.
        text_class_means: [N, E] means of text features, row i belonging to sample i.
        temperature: Scalar > 0 that the logits are divided by, a separate one from the contrastive loss's; may carry
            a gradient.

    Returns:
        Scalar >= 0, float32 (float64 for float64 features).

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    image, text = _as_pairs(image, text)
    for name, means in (("image_class_means", image_class_means), ("text_class_means", text_class_means)):
        _require_features(name, means)
        if means.shape != image.shape:
            raise ValueError(
                f"`{name}` must have the features' shape {list(image.shape)}, got {list(means.shape)}; "
                "gather the means over the workers as the features were."
            )
    with _no_autocast(image):
        temperature = _as_temperature(temperature, image)
        image_logits = image @ text_class_means.to(image.dtype).T / temperature
        text_logits = text @ image_class_means.to(image.dtype).T / temperature
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits.T, target)) / 2


def composed_loss(query: Tensor, target: Tensor, *, scale: float = 100.0) -> Tensor:
    """Cross-entropy of composed queries over the target images of the batch (one-way InfoNCE).

    With ``logits = scale * query @ target.T`` the loss is the mean over the rows i of ``-log softmax(logits_i.)_i``;
    there is no term from target to query. Source: CLIP4Cir (Baldrati et al., CVPR 2022), both stages of the released
    code.

    A target image that several rows share is a negative in all rows but its own column's, as in the released code; the
    loss then does not reach 0.

    Args:
        query: [N, E] composed queries, L2-normalised.
        target: [N, E] target images, L2-normalised.
        scale: Factor of the cosine similarities, fixed, >= 0.

    Returns:
        Scalar >= 0, float32 (float64 for float64 features).

    Raises:
        UserError: ``scale`` is negative or not finite.
        ValueError: Shapes or dtypes do not fit.
    """
    _require_not_negative("scale", scale)
    query, target = _as_pairs(query, target, names=("query", "target"))
    with _no_autocast(query):
        return F.cross_entropy(scale * query @ target.T, torch.arange(len(query), device=query.device))


def _weighted_hinge_sum(excess: Tensor, gamma: float) -> Tensor:
    """Sum (1 - exp(-c))^gamma * c over c = max(0, excess), with zero gradient wherever c is 0."""
    # The smallest normal number instead of 0: below it, the derivative of the power overflows for gamma near 0.
    # Negated, so that NaN counts as active and reaches the loss instead of vanishing.
    active = ~(excess <= torch.finfo(excess.dtype).tiny)
    cost = torch.where(active, excess, 1.0)
    weight = (-torch.expm1(-cost)) ** gamma
    return torch.where(active, weight * cost, 0.0).sum()


def _hinge_arguments(
    image: Tensor, text: Tensor, margin: float, image_ids: Tensor | None, same_image_negatives: bool
) -> tuple[Tensor, Tensor]:
    """Return margin + S - own score by row and by column, [N, N] each, with -inf where a pair is not a negative."""
    _require_not_negative("margin", margin)
    image, text = _as_pairs(image, text)
    if same_image_negatives:
        excluded = torch.eye(len(image), dtype=torch.bool, device=image.device)
    elif image_ids is None:
        raise ValueError("`image_ids` must be given when `same_image_negatives` is False.")
    else:
        excluded = _same_id(image_ids, image, "image_ids")
    with _no_autocast(image):
        scores = image @ text.T
    own = scores.diagonal()
    row_excess = (margin + scores - own[:, None]).masked_fill(excluded, -math.inf)
    column_excess = (margin + scores - own[None, :]).masked_fill(excluded, -math.inf)
    return row_excess, column_excess


def _as_pairs(first: Tensor, second: Tensor, names: tuple[str, str] = ("image", "text")) -> tuple[Tensor, Tensor]:
    """Return both in their common dtype, float32 at least."""
    for name, features in zip(names, (first, second), strict=True):
        _require_features(name, features)
    if first.shape != second.shape:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have one shape, got {list(first.shape)} and {list(second.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def _as_temperature(temperature: Tensor | float, like: Tensor) -> Tensor | float:
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.numel() != 1:
        raise ValueError(f"`temperature` must be a scalar, got shape {list(temperature.shape)}.")
    return temperature.to(like.dtype).reshape(())


def _same_id(ids: Tensor, features: Tensor, name: str) -> Tensor:
    """Return a boolean [N, N] that tells which rows have equal ids."""
    if ids.shape != features.shape[:1]:
        raise ValueError(f"`{name}` must have shape [{len(features)}], one a row, got {list(ids.shape)}.")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"`{name}` must be integers, got {ids.dtype}.")
    ids = ids.to(features.device)
    return ids[:, None] == ids[None, :]


def _require_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point features [rows, embedding], at least one of each, "
            f"got {features.dtype} of shape {list(features.shape)}."
        )


def _require_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"`{name}` must be a finite number >= 0, got {value}.")


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
