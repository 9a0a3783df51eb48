import math

import pytest
import torch
import torch.nn.functional as F

from harma_ray.errors import UserError
from harma_ray.models.losses import affiliation_loss, class_means, contrastive_loss, triplet_loss, weighted_triplet_loss

TEMPERATURE = 0.07
IDS = [7, 3, 7, 5, 3, 7]


def make_pair(num_rows=6, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(num_rows, width, generator=generator, dtype=torch.float64), dim=1)
    # Near the images, so that some hinges are active and some are not.
    noise = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    text = F.normalize(image + 0.7 * noise, dim=1)
    return image.to(dtype), text.to(dtype)


# The closed forms: plain loops over Python numbers, written from the formulas.


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(logits, target):
    total = math.log(sum(math.exp(value) for value in logits))
    return -sum(weight * (value - total) for value, weight in zip(logits, target, strict=True))


def expected_contrastive(image, text, temperature, ids):
    image, text = image.tolist(), text.tolist()
    n = len(image)
    loss = 0.0
    for i in range(n):
        positives = [j for j in range(n) if ids[j] == ids[i]]
        target = [1 / len(positives) if j in positives else 0.0 for j in range(n)]
        loss += cross_entropy([dot(image[i], text[j]) / temperature for j in range(n)], target) / n / 2
        loss += cross_entropy([dot(image[j], text[i]) / temperature for j in range(n)], target) / n / 2
    return loss


def hinge_terms(image, text, margin, ids=None):
    image, text = image.tolist(), text.tolist()
    by_row, by_column = [], []
    for i in range(len(image)):
        negatives = [j for j in range(len(image)) if j != i and (ids is None or ids[j] != ids[i])]
        own = dot(image[i], text[i])
        by_row.append([max(0.0, margin + dot(image[i], text[j]) - own) for j in negatives])
        by_column.append([max(0.0, margin + dot(image[j], text[i]) - own) for j in negatives])
    return by_row, by_column


def expected_weighted_triplet(image, text, margin, gamma, ids=None):
    by_row, by_column = hinge_terms(image, text, margin, ids)
    return sum((1 - math.exp(-c)) ** gamma * c for costs in by_row + by_column for c in costs if c > 0) / 2


def expected_triplet(image, text, margin, hardest_only, ids=None):
    by_row, by_column = hinge_terms(image, text, margin, ids)
    reduce = (lambda costs: max(costs, default=0.0)) if hardest_only else sum
    return sum(reduce(costs) for costs in by_row + by_column)


def expected_class_means(features, labels):
    rows = features.tolist()
    means = []
    for label in labels:
        members = [row for row, other in zip(rows, labels, strict=True) if other == label]
        means.append([sum(column) / len(members) for column in zip(*members, strict=True)])
    return means


def expected_affiliation(image, text, image_means, text_means, temperature):
    image, text = image.tolist(), text.tolist()
    n = len(image)
    loss = 0.0
    for i in range(n):
        one_hot = [float(j == i) for j in range(n)]
        # Image i among all text means; then the image mean of row i among all texts.
        loss += cross_entropy([dot(image[i], text_means[j]) / temperature for j in range(n)], one_hot) / n / 2
        loss += cross_entropy([dot(text[j], image_means[i]) / temperature for j in range(n)], one_hot) / n / 2
    return loss


# Values.


@pytest.mark.parametrize("ids", [None, IDS, [4] * 6])
def test_contrastive_equals_closed_form(ids):
    image, text = make_pair()
    loss = contrastive_loss(image, text, torch.tensor(TEMPERATURE), None if ids is None else torch.tensor(ids))
    assert loss.item() == pytest.approx(expected_contrastive(image, text, TEMPERATURE, ids or list(range(6))), rel=1e-6)


def test_contrastive_without_ids_equals_distinct_ids():
    image, text = make_pair()
    distinct = contrastive_loss(image, text, TEMPERATURE, torch.arange(6))
    torch.testing.assert_close(contrastive_loss(image, text, TEMPERATURE), distinct)


def test_contrastive_targets_are_uniform_over_the_positives():
    # The gradient of cross-entropy with respect to the logits is softmax - target: read the targets off it.
    image = torch.eye(3, dtype=torch.float64)
    text = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    contrastive_loss(image, text, 1.0, torch.tensor([1, 1, 2])).backward()
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(1 / 3 - 3 * text.grad.T, target)


def test_contrastive_of_equal_features_is_log_of_the_batch_size():
    features = F.normalize(torch.ones(6, 4), dim=1)
    assert contrastive_loss(features, features, TEMPERATURE, torch.zeros(6, dtype=torch.int64)).item() == pytest.approx(
        math.log(6), rel=1e-5
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.3])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_weighted_triplet_equals_closed_form(margin, gamma):
    image, text = make_pair()
    loss = weighted_triplet_loss(image, text, margin=margin, gamma=gamma)
    assert loss.item() == pytest.approx(expected_weighted_triplet(image, text, margin, gamma), rel=1e-9)
    loss = weighted_triplet_loss(
        image, text, margin=margin, gamma=gamma, image_ids=torch.tensor(IDS), same_image_negatives=False
    )
    assert loss.item() == pytest.approx(expected_weighted_triplet(image, text, margin, gamma, IDS), rel=1e-9)


def test_weighted_triplet_defaults_are_the_papers():
    image, text = make_pair()
    expected = expected_weighted_triplet(image, text, margin=0.2, gamma=2.0)
    assert weighted_triplet_loss(image, text, image_ids=torch.tensor(IDS)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("hardest_only", [False, True])
def test_triplet_equals_closed_form(hardest_only):
    image, text = make_pair()
    loss = triplet_loss(image, text, margin=0.2, hardest_only=hardest_only)
    assert loss.item() == pytest.approx(expected_triplet(image, text, 0.2, hardest_only), rel=1e-9)
    ids = torch.tensor(IDS)
    loss = triplet_loss(image, text, margin=0.2, hardest_only=hardest_only, image_ids=ids, same_image_negatives=False)
    assert loss.item() == pytest.approx(expected_triplet(image, text, 0.2, hardest_only, IDS), rel=1e-9)


def test_plain_triplet_is_twice_the_weighted_one_at_gamma_zero():
    image, text = make_pair()
    torch.testing.assert_close(triplet_loss(image, text) / 2, weighted_triplet_loss(image, text, gamma=0.0))


def test_class_means_equal_closed_form():
    image, _ = make_pair()
    expected = torch.tensor(expected_class_means(image, IDS), dtype=torch.float64)
    torch.testing.assert_close(class_means(image, torch.tensor(IDS)), expected)


def test_affiliation_equals_closed_form():
    image, text = make_pair()
    # Means of two halves, as two workers would make them.
    image_means = expected_class_means(image[:3], IDS[:3]) + expected_class_means(image[3:], IDS[3:])
    text_means = expected_class_means(text[:3], IDS[:3]) + expected_class_means(text[3:], IDS[3:])
    means = [torch.tensor(rows, dtype=torch.float64) for rows in (image_means, text_means)]
    loss = affiliation_loss(image, text, *means, torch.tensor(0.1, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected_affiliation(image, text, image_means, text_means, 0.1), rel=1e-9)


def test_affiliation_with_a_class_for_every_sample_is_contrastive():
    image, text = make_pair()
    labels = torch.arange(6)
    loss = affiliation_loss(image, text, class_means(image, labels), class_means(text, labels), TEMPERATURE)
    logits = image @ text.T / TEMPERATURE
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


# Gradients.


def gradients_fit(function, *inputs):
    return torch.autograd.gradcheck(function, tuple(x.clone().requires_grad_() for x in inputs))


def test_contrastive_gradients_equal_finite_differences():
    temperature = torch.tensor(0.3, dtype=torch.float64)
    ids = torch.tensor(IDS)
    assert gradients_fit(lambda i, t, tau: contrastive_loss(i, t, tau, ids), *make_pair(), temperature)
    assert gradients_fit(contrastive_loss, *make_pair(), temperature)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("same_image_negatives", [True, False])
def test_weighted_triplet_gradients_equal_finite_differences(gamma, same_image_negatives):
    options = {
        "margin": 0.3,
        "gamma": gamma,
        "image_ids": torch.tensor(IDS),
        "same_image_negatives": same_image_negatives,
    }
    assert gradients_fit(lambda i, t: weighted_triplet_loss(i, t, **options), *make_pair())


@pytest.mark.parametrize("hardest_only", [False, True])
def test_triplet_gradients_equal_finite_differences(hardest_only):
    assert gradients_fit(lambda i, t: triplet_loss(i, t, margin=0.3, hardest_only=hardest_only), *make_pair())


def test_affiliation_gradients_equal_finite_differences():
    labels = torch.tensor(IDS)

    def loss(image, text, temperature):
        return affiliation_loss(image, text, class_means(image, labels), class_means(text, labels), temperature)

    assert gradients_fit(loss, *make_pair(), torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_weighted_triplet_gradients_are_finite_where_the_hinge_is_exactly_zero(margin, gamma):
    # One-hot rows: scores are exactly 0 or 1. Margin 1 gives c = 0 for the unlike pairs; margin 0 gives it for the
    # equal rows and for the last pair, whose own score is 0.
    image = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
    text = torch.eye(4)[[0, 0, 1, 3]].requires_grad_()
    scores = image @ text.T
    excess = margin + scores - scores.diagonal()[:, None]
    assert (excess[~torch.eye(4, dtype=torch.bool)] == 0).any()
    weighted_triplet_loss(image, text, margin=margin, gamma=gamma).backward()
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()
    if margin == 0:
        assert not image.grad.any()
    else:
        assert image.grad.any()


def test_the_formula_taken_literally_has_no_finite_gradient_there():
    # Shows that the test above can fail.
    cost = torch.zeros(1, requires_grad=True)
    ((1 - torch.exp(-cost)) ** 0.5 * cost).sum().backward()
    assert cost.grad.isnan().all()


@pytest.mark.parametrize("excess", [1e-45, 2e-38, 1e-30, 1e-9])
@pytest.mark.parametrize("gamma", [1e-4, 0.01, 0.5])
def test_weighted_triplet_gradients_are_finite_for_the_smallest_violations(excess, gamma):
    # Images orthogonal to all texts: every score is 0 and the hinge's argument is the margin itself.
    image = torch.eye(4)[[0, 1]].requires_grad_()
    text = torch.eye(4)[[2, 3]].requires_grad_()
    weighted_triplet_loss(image, text, margin=excess, gamma=gamma).backward()
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()


def test_a_batch_of_one_image_has_no_negatives_when_they_are_left_out():
    image, text = (x.requires_grad_() for x in make_pair(dtype=torch.float32))
    ids = torch.full((6,), 9)
    loss = weighted_triplet_loss(image, text, gamma=0.5, image_ids=ids, same_image_negatives=False)
    loss = loss + triplet_loss(image, text, hardest_only=True, image_ids=ids, same_image_negatives=False)
    loss.backward()
    assert loss.item() == 0
    assert not image.grad.any()
    assert not text.grad.any()
    as_released = weighted_triplet_loss(image, text, image_ids=ids)
    torch.testing.assert_close(as_released, weighted_triplet_loss(image, text))
    assert as_released > 0


# Properties of every loss.

LOSSES = {
    "contrastive": lambda i, t, ids: contrastive_loss(i, t, TEMPERATURE),
    "contrastive, ids": lambda i, t, ids: contrastive_loss(i, t, TEMPERATURE, ids),
    "weighted triplet": lambda i, t, ids: weighted_triplet_loss(i, t),
    "weighted triplet, ids": lambda i, t, ids: weighted_triplet_loss(i, t, image_ids=ids, same_image_negatives=False),
    "triplet": lambda i, t, ids: triplet_loss(i, t),
    "triplet, hardest": lambda i, t, ids: triplet_loss(i, t, hardest_only=True),
    "affiliation": lambda i, t, ids: affiliation_loss(i, t, class_means(i, ids), class_means(t, ids), TEMPERATURE),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@each_loss
def test_order_of_the_batch_does_not_matter(loss):
    image, text = make_pair()
    ids = torch.tensor(IDS)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(loss(image[order], text[order], ids[order]), loss(image, text, ids))


@each_loss
def test_autocast_and_half_precision_do_not_reach_the_arithmetic(loss):
    image, text = make_pair(num_rows=32, width=64, dtype=torch.bfloat16)
    ids = torch.arange(32) % 9
    expected = loss(image.float(), text.float(), ids)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(image, text, ids), expected)
        assert torch.equal(loss(image.float(), text.float(), ids), expected)


@each_loss
def test_precision_of_the_input_is_kept_from_float32_up(loss):
    for dtype in (torch.float32, torch.float64):
        assert loss(*make_pair(dtype=dtype), torch.tensor(IDS)).dtype == dtype


@each_loss
def test_not_a_number_reaches_the_loss(loss):
    image, text = make_pair()
    image[2, 1] = math.nan
    assert loss(image, text, torch.tensor(IDS)).isnan()


@each_loss
def test_a_single_pair_is_enough(loss):
    image, text = make_pair(num_rows=1)
    assert loss(image, text, torch.tensor([5])).item() == pytest.approx(0)


@each_loss
def test_features_of_wrong_shape_are_refused(loss):
    image, text = make_pair()
    ids = torch.tensor(IDS)
    for bad_image, bad_text in [
        (image[:5], text),
        (image, text[:, :4]),
        (image[0], text[0]),
        (image[:0], text[:0]),
        (image.long(), text.long()),
    ]:
        with pytest.raises(ValueError, match="must"):
            loss(bad_image, bad_text, ids[: len(bad_image)])


# Refusals.


def test_ids_of_wrong_shape_or_dtype_are_refused():
    image, text = make_pair()
    with pytest.raises(ValueError, match=r"`image_ids` must have shape \[6\]"):
        contrastive_loss(image, text, TEMPERATURE, torch.arange(5))
    with pytest.raises(ValueError, match="`image_ids` must be integers"):
        contrastive_loss(image, text, TEMPERATURE, torch.arange(6.0))
    with pytest.raises(ValueError, match="`labels` must have shape"):
        class_means(image, torch.zeros(6, 1, dtype=torch.int64))


def test_leaving_out_same_image_pairs_needs_ids():
    with pytest.raises(ValueError, match="`image_ids` must be given"):
        weighted_triplet_loss(*make_pair(), same_image_negatives=False)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_margin_and_gamma_out_of_range_are_the_users_mistake(bad):
    with pytest.raises(UserError, match="`margin`"):
        triplet_loss(*make_pair(), margin=bad)
    with pytest.raises(UserError, match="`margin`"):
        weighted_triplet_loss(*make_pair(), margin=bad)
    with pytest.raises(UserError, match="`gamma`"):
        weighted_triplet_loss(*make_pair(), gamma=bad)


def test_class_means_must_be_gathered_like_the_features():
    image, text = make_pair()
    with pytest.raises(ValueError, match="`text_class_means` must have the features' shape"):
        affiliation_loss(image, text, image, text[:3], TEMPERATURE)


def test_temperature_must_be_a_scalar():
    with pytest.raises(ValueError, match="`temperature` must be a scalar"):
        contrastive_loss(*make_pair(), torch.ones(6))
