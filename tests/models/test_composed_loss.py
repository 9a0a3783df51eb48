import math

import pytest
import torch
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.losses import composed_loss


def unit_rows(count, seed, width=5, dtype=torch.float64):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def test_identical_features_give_the_log_of_the_number_of_targets():
    rows = F.normalize(torch.ones(8, 4), dim=1)
    assert composed_loss(rows, rows).item() == pytest.approx(math.log(8))


def test_orthonormal_pairs_have_the_closed_form():
    rows = torch.eye(6, dtype=torch.float64)
    expected = math.log(1 + 5 * math.exp(-2.5))
    assert composed_loss(rows, rows, scale=2.5).item() == pytest.approx(expected)
    assert composed_loss(rows, rows.roll(1, dims=0), scale=2.5).item() == pytest.approx(expected + 2.5)


def test_loss_is_cross_entropy_of_the_scaled_scores_in_one_direction():
    query, target = unit_rows(9, 0), unit_rows(9, 1)
    logits = 100 * torch.einsum("be,ne->bn", query, target)
    by_hand = -sum(logits[row].log_softmax(dim=0)[row] for row in range(9)) / 9
    torch.testing.assert_close(composed_loss(query, target), by_hand)
    assert not torch.isclose(composed_loss(target, query), by_hand)


def test_gradients_pass_the_numerical_check():
    query, target = unit_rows(3, 0).requires_grad_(), unit_rows(3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, t: composed_loss(q, t, scale=7.0), (query, target))


def test_a_repeated_target_is_a_negative():
    rows = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    assert composed_loss(rows, rows).item() == pytest.approx(2 / 3 * math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    query, target = unit_rows(4, 0, dtype=dtype), unit_rows(4, 1, dtype=dtype)
    expected = composed_loss(query.float(), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        for first, second in ((query, target), (query.float(), target), (query.float(), target.float())):
            loss = composed_loss(first, second)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)


def test_what_is_not_finite_reaches_the_loss():
    query = unit_rows(2, 0)
    query[0, 0] = math.nan
    assert composed_loss(query, unit_rows(2, 1)).isnan()


@pytest.mark.parametrize(
    ("query", "target", "message"),
    [
        ((3, 5), (3, 4), r"one shape, got \[3, 5\] and \[3, 4\]"),
        ((3, 5), (2, 5), r"one shape, got \[3, 5\] and \[2, 5\]"),
        ((0, 5), (6, 5), "`query`"),
        ((3, 5), (5,), "`target`"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query, target, message):
    with pytest.raises(ValueError, match=message):
        composed_loss(torch.ones(query), torch.ones(target))


def test_integer_features_and_impossible_scales_are_refused():
    rows = torch.eye(3)
    with pytest.raises(ValueError, match="`target` must be floating-point"):
        composed_loss(rows, rows.long())
    for scale in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="`scale` must be a finite number >= 0"):
            composed_loss(rows, rows, scale=scale)
