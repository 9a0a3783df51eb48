"""Captions grouped by image: the terms against loops written from the formulas, and what of it pairs are."""

import math

import pytest
import torch
import torch.nn.functional as F

from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.step import check_batch

TEMPERATURE, MARGIN, GAMMA = 0.1, 0.2, 2.0
IDS = [4, 7, 4, 9]
"""Two of the images are one and the same."""


def task(captions="grouped", group=5, batch=20, **changes):
    grouping = {"train.captions": captions, "train.captions_per_image": group, "train.global_batch_size": batch}
    return make_task(build_config(recipe_config("harma-scenes"), {**grouping, **changes}))


def features(images, group, seed=0):
    """Unit vectors of images [M, E], and of their captions [M, K, E], near them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 6, generator=generator, dtype=torch.float64)
    text = image[:, None] + 0.8 * torch.randn(images, group, 6, generator=generator, dtype=torch.float64)
    return tuple(F.normalize(x, dim=-1).requires_grad_() for x in (image, text))


def terms_and_gradients(task, image, text, ids):
    """What the task makes of a batch whose features are given, and the gradients of the terms' sum."""
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    batch = {"image": image, "text": text, "image_id": torch.tensor(ids), "label": torch.tensor(ids)}
    terms = task.losses(
        lambda image, text: {
            "image": image, "text": text, "temperature": temperature, "affiliation_temperature": temperature
        },
        batch,
    )  # fmt: skip
    gradients = torch.autograd.grad(sum(terms.values()), (image, text, temperature))
    return {name: term.detach() for name, term in terms.items()}, gradients


def log_softmax(scores, place):
    return scores[place] - math.log(sum(map(math.exp, scores)))


def expected_contrastive(image, text, ids):
    """SupCon's L_out between images and captions, both ways, each image once; and the constant."""
    m, k = text.shape[:2]
    scores = [[float(i @ t) / TEMPERATURE for t in text.flatten(0, 1)] for i in image]
    to_text = to_image = 0.0
    for i in range(m):
        positives = [j for j in range(m * k) if ids[j // k] == ids[i]]
        to_text -= sum(log_softmax(scores[i], j) for j in positives) / len(positives) / m
    for j in range(m * k):
        positives = [i for i in range(m) if ids[i] == ids[j // k]]
        column = [row[j] for row in scores]
        to_image -= sum(log_softmax(column, i) for i in positives) / len(positives) / (m * k)
    return (to_text + to_image + math.log(k)) / 2


def expected_triplet(image, text, ids):
    """Every pair against all texts of other images, and K times against all other images."""
    m, k = text.shape[:2]
    total = 0.0
    for i in range(m):
        for own in text[i]:
            for other in range(m):
                if ids[other] == ids[i]:
                    continue
                hinges = [MARGIN + float(image[i] @ t - image[i] @ own) for t in text[other]]
                hinges += k * [MARGIN + float(image[other] @ own - image[i] @ own)]
                total += sum((1 - math.exp(-c)) ** GAMMA * c for c in hinges if c > 0)
    return total / 2


@pytest.mark.parametrize("group", [2, 5])
def test_terms_equal_loops_in_which_own_captions_are_positives_and_never_negatives(group):
    image, text = features(len(IDS), group)
    found, _ = terms_and_gradients(task(group=group), image, text, IDS)
    image, text = image.detach(), text.detach()
    assert found["contrastive"].item() == pytest.approx(expected_contrastive(image, text, IDS), rel=1e-9)
    assert found["triplet"].item() == pytest.approx(expected_triplet(image, text, IDS), rel=1e-9)
    assert expected_triplet(image, text, IDS) > 0.01


@pytest.mark.parametrize("triplet", ["weighted", "hardest"])
def test_groups_of_one_are_pairs(triplet):
    changes = {"loss.triplet": triplet, "loss.center_factor": 0.5}
    image, text = features(6, 1)
    ids = [3, 1, 4, 2, 5, 9]
    found, gradients = terms_and_gradients(task(group=1, **changes), image, text, ids)
    alone = text.detach()[:, 0].requires_grad_()
    pairs, (by_image, by_text, by_temperature) = terms_and_gradients(task("all", **changes), image, alone, ids)
    torch.testing.assert_close(found, pairs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients, (by_image, by_text[:, None], by_temperature), rtol=1e-6, atol=1e-9)
    assert len(found) == 3


def test_groups_have_the_gradients_of_pairs_whose_images_are_encoded_again():
    changes = {"loss.triplet": "plain", "loss.center_factor": 0.5}
    image, text = features(len(IDS), 3)
    _, gradients = terms_and_gradients(task(group=3, batch=12, **changes), image, text, IDS)
    again, alone = image.detach().repeat_interleave(3, 0), text.detach().flatten(0, 1)
    ids = [number for number in IDS for _ in range(3)]
    pairs = task("all", batch=12, **changes, **{"loss.same_image_negatives": False})
    _, (by_image, by_text, by_temperature) = terms_and_gradients(
        pairs, again.requires_grad_(), alone.requires_grad_(), ids
    )
    expected = (by_image.unflatten(0, (4, 3)).sum(1), by_text.unflatten(0, (4, 3)), by_temperature)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_equal_scores_are_watched_as_with_pairs():
    image, text = (torch.ones_like(x) / x.shape[-1] ** 0.5 for x in features(4, 5))
    grouped = task(group=5)
    found, _ = terms_and_gradients(grouped, image.requires_grad_(), text.requires_grad_(), [1, 2, 3, 4])
    told = grouped.losses_at_equal_scores()
    assert told == {"contrastive": pytest.approx(found["contrastive"].item())}


def batches(data, start=0, epochs=2, **settings):
    grouped = task(**{"data.path": str(data), "data.chunk_mb": 0.05}, **settings)
    config = grouped.config
    stream = TrainingStream(
        planned_order(config), grouped.transform(training=True), config.data, Worker(), local_batches
    )
    return list(stream.steps(start, epochs))


def test_a_batch_has_each_image_once_with_its_captions_and_goes_on_at_any_step(scenes):
    whole = batches(scenes)
    assert [batch["image"].shape[0] for batch in whole] == [4] * 20  # 2 epochs of 40 images
    assert all(batch["text"].shape[:2] == (4, 5) for batch in whole)
    pairs = {
        (int(row), int(caption)): text
        for batch in batches(scenes, captions="all", epochs=1)
        for row, caption, text in zip(batch["row"], batch["caption"], batch["text"], strict=True)
    }
    for batch in whole[:10]:
        for row, texts in zip(batch["row"], batch["text"], strict=True):
            assert torch.equal(texts, torch.stack([pairs[int(row), caption] for caption in range(5)]))
    for expected, batch in zip(whole[13:], batches(scenes, start=13), strict=True):
        assert all(torch.equal(expected[name], batch[name]) for name in expected)


def test_the_first_epoch_of_groups_of_one_is_that_of_pairs_to_the_bit(scenes):
    found, pairs = (batches(scenes, epochs=1, captions=name, group=1)[:3] for name in ("grouped", "all"))
    for batch, expected in zip(found, pairs, strict=True):
        assert torch.equal(batch.pop("text")[:, 0], expected.pop("text"))
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_are_shared_out_whole():
    with pytest.raises(UserError, match=r"workers times `train\.captions_per_image`, got 20 and 15; use 15 or 30"):
        check_batch(task(batch=20), 3)
    with pytest.raises(UserError, match=r"share of the batch, got 3 and 2 images"):
        check_batch(task(batch=20, **{"train.accumulation": 3}), 2)
    check_batch(task(batch=20, **{"train.accumulation": 2}), 2)


def test_more_captions_than_any_image_has_are_refused(scenes):
    with pytest.raises(UserError, match=r"captions_per_image.*got 6; use 5 or less"):
        batches(scenes, group=6, batch=12)
