"""Parts of a batch with a model of one weight: what can be put together from them, and what is refused."""

import contextlib

import pytest
import torch
from torch import nn

from harma_ray.errors import UserError
from harma_ray.training.accumulation import PartialForward

BATCH = torch.tensor([[1.0], [2.0], [3.0], [6.0], [8.0]])


class Model(nn.Module):
    """``rows`` is the weight times each sample; the scalar is what a test says."""

    def __init__(self, scalar):
        super().__init__()
        self.weight, self.log_scale = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0.0))
        self._scalar = scalar

    def forward(self, x):
        rows = self.weight * x
        self.seen += 1
        return {"rows": rows, "scalar": self._scalar(self, rows)}


def gradients(scalar, parts, batch=BATCH):
    model = Model(scalar)
    forward = PartialForward(model, parts, len(batch))
    outputs = forward(batch)
    (outputs["scalar"] * outputs["rows"].sum()).backward()
    forward.backward(contextlib.nullcontext)
    return model.weight.grad, model.log_scale.grad


@pytest.mark.parametrize(
    ("scalar", "by_weight", "by_log_scale"),
    [  # loss = scalar * weight * 20
        (lambda model, rows: model.log_scale.exp(), 20.0, 40.0),
        (lambda model, rows: model.log_scale, 0.0, 40.0),
        (lambda model, rows: 3 * model.log_scale + model.weight**2, 240.0, 120.0),
        (lambda model, rows: torch.tensor(3.0), 60.0, None),
        (lambda model, rows: model.log_scale.detach() + 1, 20.0, None),
    ],
    ids=["exp of a parameter", "a parameter", "of two parameters", "a constant", "detached"],
)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_scalar_of_the_parameters_gets_the_gradient_of_the_whole_batch(scalar, by_weight, by_log_scale, parts):
    assert gradients(scalar, parts) == (by_weight, by_log_scale)


@pytest.mark.parametrize(
    "scalar",
    [
        lambda model, rows: rows.mean(),
        lambda model, rows: rows.detach().mean(),
        lambda model, rows: model.log_scale.exp() * rows.detach().norm(),
        lambda model, rows: torch.tensor(float(len(rows))),
        lambda model, rows: model.log_scale + model.seen,
    ],
    ids=["mean", "detached mean", "product", "size", "what the model counts"],
)
def test_a_scalar_whose_value_depends_on_the_samples_is_refused(scalar):
    with pytest.raises(UserError, match=r"other values of `scalar` in other parts.*train\.accumulation=1"):
        gradients(scalar, 2)


@pytest.mark.parametrize(
    "scalar",
    [
        lambda model, rows: model.log_scale * rows.detach().sum(),  # 0 as long as the parameter is, its slope is not
        lambda model, rows: rows.mean() - rows.detach().mean(),
        lambda model, rows: model.log_scale if rows[0] < 5 else model.log_scale.detach() + 0 * model.weight,
    ],
    ids=["times zero", "straight through", "another graph"],
)
def test_a_scalar_that_is_equal_by_chance_is_refused_by_its_gradient(scalar):
    with pytest.raises(UserError, match=r"other gradients of `scalar` in other parts"):
        gradients(scalar, 3)


def test_an_argument_that_is_not_cut_by_samples_is_refused():
    forward = PartialForward(Model(lambda model, rows: model.log_scale), 2, num_samples=3)
    with pytest.raises(UserError, match=r"what the model is called with, got shape \(5, 1\) for 3 samples"):
        forward(BATCH)


def test_samples_that_are_all_alike_are_no_reason_to_refuse_nothing_is_wrong_then():
    assert gradients(lambda model, rows: rows.mean(), 2, torch.full((4, 1), 3.0)) == (144.0, None)


def test_a_value_that_is_not_finite_is_left_to_the_loop_which_names_step_and_worker():
    by_weight, _ = gradients(lambda model, rows: model.log_scale * float("nan"), 2)
    assert by_weight.isnan()


@pytest.mark.parametrize("shape", [(1,), (7, 1)])
def test_an_output_without_a_row_for_each_sample_is_refused(shape):
    with pytest.raises(UserError, match=r"a row for each sample in the model's output `scalar`, got shape \("):
        gradients(lambda model, rows: model.log_scale.exp().expand(shape), 2)
