"""Recalls of an image-text retrieval, their level by chance and their bootstrap intervals; the ranking is `ranking`'s.

Shapes: Q queries, E embedding width, N images, M texts.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups, hashable_keys
from harma_ray.retrieval.ranking import rank_together

RECALL_KS = (1, 5, 10)
_TAILS = ((1 - 0.95) / 2, (1 + 0.95) / 2)


def recall_at(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Share of queries whose 0-based rank (int64 [Q], Q > 0) is below k, in percent, for each k."""
    return {k: 100.0 * float((ranks < k).double().mean()) for k in ks}


def chance_recall_at(num_relevant: Tensor, gallery_size: int | Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Expected `recall_at` of rankings drawn at random, in percent.

    The first k of G items hold none of the r relevant ones with the hypergeometric probability C(G-r, k) / C(G, k).

    Args:
        num_relevant: r of each query, int64 [Q].
        gallery_size: G, or that of each query, int64 [Q].
        ks: cut-offs; one above G counts as G.
    """
    sizes = torch.as_tensor(gallery_size).double().expand(len(num_relevant))[:, None]
    misses = sizes - num_relevant.double()[:, None]
    expected = {}
    for k in ks:
        drawn = torch.arange(k, dtype=torch.float64)
        missed = torch.where(drawn < sizes, (misses - drawn).clamp(min=0) / (sizes - drawn), 1.0)
        expected[k] = 100.0 * float((1 - missed.prod(dim=1)).mean())
    return expected


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of an image-text retrieval, 0-based, int64, on the CPU.

    Attributes:
        image_to_text_ranks: [N], of the image's best-placed own caption.
        text_to_image_ranks: [M], of the text's own image.
        image_to_text_ranks_by_text: [N], a caption equal to one of the image's own counts as right.
        text_to_image_ranks_by_text: [M], an image that owns an equal caption counts as right.
        image_index_of_text: [M], the image that each text belongs to.
    """

    image_to_text_ranks: Tensor
    text_to_image_ranks: Tensor
    image_to_text_ranks_by_text: Tensor
    text_to_image_ranks_by_text: Tensor
    image_index_of_text: Tensor

    METRICS: ClassVar[tuple[str, ...]] = tuple(
        f"{name}{suffix}"
        for suffix in ("", "_text")
        for name in (*(f"{side}_r{k}" for side in ("txt", "img") for k in RECALL_KS), "r_mean")
    )
    """Names of `metrics`, in their order."""
    LABELS: ClassVar[Mapping[str, str]] = {
        **{f"txt_r{k}": f"image to text R@{k}" for k in RECALL_KS},
        **{f"img_r{k}": f"text to image R@{k}" for k in RECALL_KS},
        "r_mean": "mean of the six",
    }
    """What they stand for."""

    @property
    def metrics(self) -> dict[str, float]:
        """Recalls in percent: `txt_r1 txt_r5 txt_r10 img_r1 img_r5 img_r10 r_mean`, and the same ending in `_text`.

        `txt` is image to text, `img` text to image, `r_mean` their mean; `_text` counts equal captions as right.
        """
        return _named_recalls([recall_at(ranks, RECALL_KS) for ranks in self._all_ranks()])

    def _all_ranks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.image_to_text_ranks,
            self.text_to_image_ranks,
            self.image_to_text_ranks_by_text,
            self.text_to_image_ranks_by_text,
        )


def _named_recalls(recalls: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
    """Names recalls (numbers, or arrays of samples) given in the order of `RetrievalResult`'s ranks."""
    named = {}
    for suffix, image_to_text, text_to_image in (("", *recalls[:2]), ("_text", *recalls[2:])):
        group = {f"txt_r{k}{suffix}": value for k, value in image_to_text.items()}
        group |= {f"img_r{k}{suffix}": value for k, value in text_to_image.items()}
        named |= group | {f"r_mean{suffix}": sum(group.values()) / len(group)}
    return named


@dataclass(frozen=True)
class ClassRecalls:
    """What was found for the images of one class and for their captions, each ranked in the whole split."""

    name: str
    num_images: int
    num_texts: int
    metrics: dict[str, float]
    """As `RetrievalResult.metrics`."""


def recalls_by_class(result: RetrievalResult, labels: Sequence[str | None]) -> list[ClassRecalls]:
    """Returns the recalls of each class, the lowest `r_mean_text` first; images without a class take no part.

    Args:
        result: ranks.
        labels: [N], class of each image.
    """
    found = []
    for name in sorted({label for label in labels if label}):
        images = torch.tensor([label == name for label in labels])
        texts = images[result.image_index_of_text]
        recalls = [
            recall_at(ranks[chosen], RECALL_KS)
            for ranks, chosen in zip(result._all_ranks(), (images, texts) * 2, strict=True)
        ]
        found.append(ClassRecalls(name, int(images.sum()), int(texts.sum()), _named_recalls(recalls)))
    return sorted(found, key=lambda row: row.metrics["r_mean_text"])


def _relevance(image_index_of_text: Tensor, text_keys: Sequence[Hashable] | Tensor, num_images: int) -> list[Groups]:
    """What is relevant, in the order of `RetrievalResult`'s ranks."""
    num_texts = len(image_index_of_text)
    if len(text_keys) != num_texts:
        raise UserError(f"every text needs one key and one image, but got {len(text_keys)} keys, {num_texts} images")
    if num_texts and not 0 <= image_index_of_text.min() <= image_index_of_text.max() < num_images:
        raise UserError(f"`image_index_of_text` must lie in 0..{num_images - 1}")
    without = (torch.bincount(image_index_of_text, minlength=num_images) == 0).nonzero()[:, 0]
    if len(without):
        raise UserError(
            f"every image needs a caption, but images {without[:5].tolist()} have none ({len(without)} in all)"
        )
    images, texts = torch.arange(num_images), torch.arange(num_texts)
    text, equal_text = Groups.from_keys(text_keys, text_keys).pairs()
    return [
        Groups.from_pairs(image_index_of_text, texts, num_queries=num_images),
        Groups.from_keys(image_index_of_text, images),
        Groups.from_pairs(image_index_of_text[text], equal_text, num_queries=num_images),
        Groups.from_pairs(text, image_index_of_text[equal_text], num_queries=num_texts),
    ]


def image_text_recalls(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_index_of_text: Tensor,
    text_keys: Sequence[Hashable] | Tensor,
) -> RetrievalResult:
    """Ranks the texts for every image and the images for every text; `.metrics` of the result holds the recalls.

    A collective: all workers share the work, each calls this with the same arguments, and gets the same result.

    Args:
        image_embeddings: [N, E], L2-normalised.
        text_embeddings: [M, E], L2-normalised.
        image_index_of_text: int64 [M], 0..N-1; every image has at least one text.
        text_keys: [M]; equal keys mean word for word equal captions after cleaning, so the caption itself will do.

    Raises:
        UserError: an image without a text, embeddings that are not finite, lengths that do not fit.
    """
    if len(text_embeddings) != len(image_index_of_text):
        raise UserError(f"every text needs one image, but got {len(text_embeddings)} and {len(image_index_of_text)}")
    image_index_of_text = image_index_of_text.cpu()
    own_texts, own_image, equal_texts, equal_images = _relevance(image_index_of_text, text_keys, len(image_embeddings))
    to_text = rank_together(image_embeddings, text_embeddings, [own_texts, equal_texts])
    to_image = rank_together(text_embeddings, image_embeddings, [own_image, equal_images])
    return RetrievalResult(to_text[0], to_image[0], to_text[1], to_image[1], image_index_of_text)


def chance_recalls(
    image_index_of_text: Tensor, text_keys: Sequence[Hashable] | Tensor, *, num_images: int
) -> dict[str, float]:
    """Expected `RetrievalResult.metrics` of rankings drawn at random; arguments as in `image_text_recalls`."""
    relevance = _relevance(image_index_of_text.cpu(), text_keys, num_images)
    sizes = (len(image_index_of_text), num_images, len(image_index_of_text), num_images)
    return _named_recalls(
        [chance_recall_at(groups.sizes, size, RECALL_KS) for groups, size in zip(relevance, sizes, strict=True)]
    )


def ceiling_recalls(
    image_index_of_text: Tensor, text_keys: Sequence[Hashable] | Tensor, *, num_images: int
) -> dict[str, float]:
    """Expected `RetrievalResult.metrics` of rankings with all that is right word for word first, in random order.

    First come, for an image, all captions equal to one of its own, and for a caption, all images that own an equal
    one: what a model reaches that makes no mistake and tells equal captions apart by chance. The metrics ending in
    `_text` are 100. From captions to images no more can be reached; from images to captions a ranking reaches more
    that puts those first which the fewest images share. Arguments as in `image_text_recalls`.
    """
    keys, images = list(hashable_keys(text_keys)), image_index_of_text.tolist()
    held = Counter(zip(images, keys, strict=True))
    texts_of, owners_of, num_equal = Counter(keys), Counter(key for _, key in held), [0] * num_images
    for image, key in held:
        num_equal[image] += texts_of[key]
    own = torch.bincount(image_index_of_text.cpu(), minlength=num_images)
    to_text = chance_recall_at(own, torch.tensor(num_equal), RECALL_KS)
    num_owners = torch.tensor([owners_of[key] for key in keys])
    to_image = chance_recall_at(torch.ones(len(keys)), num_owners, RECALL_KS)
    whole: dict[int, float] = dict.fromkeys(RECALL_KS, 100.0)
    return _named_recalls([to_text, to_image, whole, whole])


def bootstrap_interval(
    result: RetrievalResult, num_samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval of each of `result.metrics`: the spread over test sets of the same size."""
    return percentile_intervals(bootstrap_samples(result, num_samples, seed))


def bootstrap_samples(result: RetrievalResult, num_samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns `result.metrics` of bootstrap samples, each float64 [num_samples].

    Images are resampled with all their captions, because captions of one image fail and succeed together. The gallery
    is not resampled: ranks stay as they are. The spread over training seeds is not in it.

    Args:
        result: ranks to resample.
        num_samples: bootstrap samples.
        seed: of the resampling; the same seed draws the same images, whatever the model.
    """
    num_images = len(result.image_to_text_ranks)
    image_of_query = (np.arange(num_images), result.image_index_of_text.numpy()) * 2
    columns = []  # of each image: its number of queries, then their hits at each k; for each kind of ranks
    for images, ranks in zip(image_of_query, result._all_ranks(), strict=True):
        columns.append(np.bincount(images, minlength=num_images))
        columns += [np.bincount(images[ranks.numpy() < k], minlength=num_images) for k in RECALL_KS]
    sums = resampled_sums(np.stack(columns, axis=1), num_samples, np.random.default_rng(seed))
    counts = sums.reshape(-1, 4, 1 + len(RECALL_KS))
    recalls = 100.0 * counts[:, :, 1:] / counts[:, :, :1]
    return _named_recalls([dict(zip(RECALL_KS, recalls[:, kind].T, strict=True)) for kind in range(4)])


def resampled_sums(values: np.ndarray, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Column sums of bootstrap samples: as many rows as there are, drawn with replacement.

    Args:
        values: [units, columns], what each unit that is drawn adds.
        num_samples: bootstrap samples.
        generator: draws one `integers(units, size=units)` a sample.

    Returns:
        float64 [num_samples, columns].
    """
    values = values.astype(np.float64)
    num_units = len(values)
    sums = np.empty((num_samples, values.shape[1]))
    for sample in range(num_samples):
        drawn = generator.integers(num_units, size=num_units)
        sums[sample] = np.bincount(drawn, minlength=num_units) @ values
    return sums


def percentile_intervals(samples: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Bounds of the middle part of each metric's bootstrap samples that holds 95 % of them."""
    intervals = {name: np.quantile(values, _TAILS) for name, values in samples.items()}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


@dataclass(frozen=True)
class ImageTextRetrieval:
    """Embeddings of a split's images and captions, and how they rank each other."""

    image_embeddings: Tensor
    """fp32[N, E], L2-normalised, in row order."""
    text_embeddings: Tensor
    """fp32[M, E], L2-normalised, in the order of the rows' captions."""
    texts: list[str]
    """M captions."""
    image_of_text: Tensor
    """int64[M], the row of each caption's image."""
    result: RetrievalResult
    """Ranks, from which metrics and intervals follow."""

    @classmethod
    def of(
        cls,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        texts: list[str],
        image_of_text: Tensor,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Ranks embeddings; takes what the fields say, and where to rank. A collective, as `image_text_recalls` is."""
        images, captions = image_embeddings.to(device), text_embeddings.to(device)
        result = image_text_recalls(images, captions, image_of_text, texts)
        return cls(image_embeddings, text_embeddings, texts, image_of_text, result)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the metrics."""
        return bootstrap_interval(self.result)

    def resampled(self) -> dict[str, np.ndarray]:
        """Returns the metrics of bootstrap samples, from which the intervals follow."""
        return bootstrap_samples(self.result)

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return chance_recalls(self.image_of_text, self.texts, num_images=len(self.image_embeddings))

    def ceiling(self) -> dict[str, float]:
        """Returns the metrics that equal captions leave within reach, see `ceiling_recalls`."""
        return ceiling_recalls(self.image_of_text, self.texts, num_images=len(self.image_embeddings))
