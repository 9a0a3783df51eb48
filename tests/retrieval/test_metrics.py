import itertools
import math
import random

import pytest
import torch
from call_count import num_calls
from chunks import scores_at_a_time

from harma_ray.errors import UserError
from harma_ray.retrieval.image_text import (
    RetrievalResult,
    bootstrap_interval,
    ceiling_recalls,
    chance_recall_at,
    chance_recalls,
    image_text_recalls,
    recall_at,
)

NAMES = ["txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean"]
NAMES += [f"{name}_text" for name in NAMES]


def brute_force_recalls(scores, image_of_text, keys):
    """Recalls from the plain definition: `scores[i][t]` of image i and text t."""
    num_images, num_texts = len(scores), len(scores[0])
    owned = [{keys[text] for text in range(num_texts) if image_of_text[text] == image} for image in range(num_images)]

    def recall(rows, is_right, k):
        hits = 0
        for query, row in enumerate(rows):
            best = max(score for item, score in enumerate(row) if is_right(query, item))
            hits += sum(score >= best for item, score in enumerate(row) if not is_right(query, item)) < k
        return 100 * hits / len(rows)

    columns = [list(column) for column in zip(*scores, strict=True)]
    metrics = {}
    for k in (1, 5, 10):
        metrics[f"txt_r{k}"] = recall(scores, lambda image, text: image_of_text[text] == image, k)
        metrics[f"img_r{k}"] = recall(columns, lambda text, image: image_of_text[text] == image, k)
        metrics[f"txt_r{k}_text"] = recall(scores, lambda image, text: keys[text] in owned[image], k)
        metrics[f"img_r{k}_text"] = recall(columns, lambda text, image: keys[text] in owned[image], k)
    for suffix in ("", "_text"):
        means = [sum(metrics[f"{way}_r{k}{suffix}"] for k in (1, 5, 10)) / 3 for way in ("txt", "img")]
        metrics[f"r_mean{suffix}"] = sum(means) / 2
    return metrics


def random_retrieval(seed, num_images=40, num_texts=130, num_keys=60):
    """Integer embeddings that tie often, texts in no order and in different numbers per image, repeated captions."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-1, 2, (num_images, 12), generator=generator).float()
    extra = torch.randint(num_images, (num_texts - num_images,), generator=generator)
    image_of_text = torch.cat([torch.arange(num_images), extra])[torch.randperm(num_texts, generator=generator)]
    texts = images[image_of_text] + torch.randint(-1, 2, (num_texts, 12), generator=generator).float()
    keys = [f"caption {key}" for key in torch.randint(num_keys, (num_texts,), generator=generator).tolist()]
    return images, texts, image_of_text, keys


def perfect_result(num_images=20):
    embeddings = torch.eye(num_images)
    image_of_text = torch.arange(num_images).repeat_interleave(2)
    return image_text_recalls(embeddings, embeddings[image_of_text], image_of_text, image_of_text)


def test_recalls_of_a_case_worked_out_by_hand():
    images = torch.eye(2)
    texts = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [0.5, 0.5]])
    result = image_text_recalls(images, texts, torch.tensor([0, 0, 1, 1]), ["plane", "lake", "plane", "field"])
    assert result.image_to_text_ranks.tolist() == [1, 2]  # image 0: text 2 beats its text 1; image 1: 0 and 1 beat 2
    assert result.text_to_image_ranks.tolist() == [1, 1, 1, 1]  # the last is a tie
    assert result.image_to_text_ranks_by_text.tolist() == [0, 0]  # "plane" is a caption of both images
    assert result.text_to_image_ranks_by_text.tolist() == [0, 1, 0, 1]
    metrics = result.metrics
    assert sorted(metrics) == sorted(NAMES)
    assert [metrics[name] for name in NAMES[:7]] == [0, 100, 100, 0, 100, 100, pytest.approx(400 / 6)]
    assert [metrics[name] for name in NAMES[7:]] == [100, 100, 100, 50, 100, 100, pytest.approx(550 / 6)]


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_brute_force_amid_ties_and_repeated_captions_whatever_the_chunk_size(seed):
    images, texts, image_of_text, keys = random_retrieval(seed)
    expected = brute_force_recalls((images @ texts.T).tolist(), image_of_text.tolist(), keys)
    for count in (1, 70, 640, None):
        with scores_at_a_time(count):
            metrics = image_text_recalls(images, texts, image_of_text, keys).metrics
        assert metrics == pytest.approx(expected)
    numbers = torch.tensor([int(key.split()[1]) for key in keys])
    assert image_text_recalls(images, texts, image_of_text, numbers).metrics == metrics


def test_without_repeated_captions_both_kinds_of_recall_agree():
    images, texts, image_of_text, _ = random_retrieval(7)
    metrics = image_text_recalls(images, texts, image_of_text, list(range(len(texts)))).metrics
    assert [metrics[name] for name in NAMES[:7]] == [metrics[name] for name in NAMES[7:]]


def test_r_mean_is_the_mean_of_both_directions():
    metrics = image_text_recalls(*random_retrieval(8)).metrics
    text = (metrics["txt_r1"] + metrics["txt_r5"] + metrics["txt_r10"]) / 3
    image = (metrics["img_r1"] + metrics["img_r5"] + metrics["img_r10"]) / 3
    assert metrics["r_mean"] == pytest.approx((text + image) / 2)


def test_a_collapsed_model_gets_nothing():
    image_of_text = torch.arange(30).repeat_interleave(2)
    metrics = image_text_recalls(torch.ones(30, 4), torch.ones(60, 4), image_of_text, list(range(60))).metrics
    assert set(metrics.values()) == {0.0}


def test_captions_that_do_not_fit_the_images_are_refused():
    images, texts = torch.eye(3), torch.eye(3)
    with pytest.raises(UserError, match=r"images \[1\] have none"):
        image_text_recalls(images, texts, torch.tensor([0, 0, 2]), "abc")
    with pytest.raises(UserError, match=r"must lie in 0\.\.2"):
        image_text_recalls(images, texts, torch.tensor([0, 1, 3]), "abc")
    with pytest.raises(UserError, match="2 keys, 3 images"):
        image_text_recalls(images, texts, torch.tensor([0, 1, 2]), "ab")
    with pytest.raises(UserError, match="every text needs one image, but got 2 and 3"):
        image_text_recalls(images, texts[:2], torch.tensor([0, 1, 2]), "abc")


def test_recall_at_is_the_share_of_ranks_below_k_in_percent():
    assert recall_at(torch.tensor([0, 1, 4, 5, 30]), (1, 5, 10)) == {1: 20.0, 5: 60.0, 10: 80.0}


def test_chance_is_the_hypergeometric_one():
    expected = [100 * (1 - math.comb(20 - relevant, 5) / math.comb(20, 5)) for relevant in (1, 3, 16, 20)]
    for relevant, value in zip((1, 3, 16, 20), expected, strict=True):
        assert chance_recall_at(torch.tensor([relevant]), 20, (5,)) == {5: pytest.approx(value)}
    assert chance_recall_at(torch.tensor([1, 3, 16, 20]), 20, (5,))[5] == pytest.approx(sum(expected) / 4)
    assert chance_recall_at(torch.tensor([1, 2]), 4, (1, 4, 10)) == {1: pytest.approx(37.5), 4: 100.0, 10: 100.0}


def test_equal_captions_leave_what_rankings_reach_that_know_words_alone():
    """By brute force: what is right word for word comes first, and a number drawn at random decides among it."""
    generator = torch.Generator().manual_seed(0)
    image_of_text, keys = torch.arange(12).repeat_interleave(3), [number * number % 11 for number in range(36)]
    keys[1] = keys[0]  # an image may have a caption twice
    ceiling = ceiling_recalls(image_of_text, keys, num_images=12)
    knows = torch.zeros(12, 36)
    for image, text in itertools.product(range(12), range(36)):
        knows[image, text] = keys[text] in {keys[other] for other in range(36) if image_of_text[other] == image}
    hits, trials = dict.fromkeys([f"{side}_r{k}" for side in ("txt", "img") for k in (1, 5, 10)], 0.0), 3000
    own = image_of_text == torch.arange(12)[:, None]
    for _ in range(trials):
        scores = knows + 0.5 * torch.rand(12, 36, generator=generator)
        for side, ranked, right in (("txt", scores, own), ("img", scores.T, own.T)):
            placed = right.gather(1, ranked.argsort(dim=1, descending=True))
            for k in (1, 5, 10):
                hits[f"{side}_r{k}"] += 100 * float(placed[:, :k].any(dim=1).double().mean()) / trials
    assert {name: ceiling[name] for name in hits} == pytest.approx(hits, abs=0.8)
    assert ceiling["r_mean"] == pytest.approx(sum(ceiling[name] for name in hits) / 6)
    assert ceiling["r_mean_text"] == 100
    assert ceiling_recalls(torch.arange(3), ["a", "b", "c"], num_images=3)["r_mean"] == 100


def test_chance_agrees_with_random_scores():
    _, _, image_of_text, keys = random_retrieval(9, num_images=30, num_texts=70, num_keys=40)
    chance = chance_recalls(image_of_text, keys, num_images=30)
    generator = random.Random(0)
    sums = dict.fromkeys(NAMES, 0.0)
    for _ in range(200):
        scores = [[generator.random() for _ in range(70)] for _ in range(30)]
        for name, value in brute_force_recalls(scores, image_of_text.tolist(), keys).items():
            sums[name] += value / 200
    assert sorted(chance) == sorted(NAMES)
    assert chance == pytest.approx(sums, abs=1.6)  # three standard errors of the widest, about 0.5


def test_interval_holds_the_point_estimate_and_repeats_with_the_seed():
    result = image_text_recalls(*random_retrieval(10))
    intervals = bootstrap_interval(result, num_samples=300, seed=4)
    assert list(intervals) == list(result.metrics)
    for name, (low, high) in intervals.items():
        assert low <= result.metrics[name] <= high
    assert 0 < intervals["r_mean"][1] - intervals["r_mean"][0] < 30
    assert bootstrap_interval(result, num_samples=300, seed=4) == intervals
    assert bootstrap_interval(result, num_samples=300, seed=5) != intervals


def test_interval_of_a_perfect_retrieval_has_no_width():
    assert set(bootstrap_interval(perfect_result(), num_samples=50).values()) == {(100.0, 100.0)}


def test_interval_resamples_images_with_all_their_captions():
    image_of_text = torch.arange(100).repeat_interleave(50)
    ranks = torch.where(torch.arange(100) < 50, 0, 99)
    result = RetrievalResult(ranks, ranks[image_of_text], ranks, ranks[image_of_text], image_of_text)
    low, high = bootstrap_interval(result)["img_r1"]  # captions drawn one by one would give about 2.8
    assert high - low == pytest.approx(2 * 1.96 * 5, abs=2)  # binomial: 100 sqrt(.5 x .5 / 100) = 5


def test_interval_of_a_large_split_calls_no_more_functions_than_that_of_a_small_one():
    def result(num_images):
        image_of_text = torch.arange(num_images).repeat_interleave(5)
        ranks = torch.arange(num_images) % 20
        return RetrievalResult(ranks, ranks[image_of_text], ranks, ranks[image_of_text], image_of_text)

    few, many = (num_calls(bootstrap_interval, result(size), num_samples=20) for size in (50, 5000))
    assert few <= many <= few + 50
