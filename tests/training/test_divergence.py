import copy

import pytest
import torch

from harma_ray.training.divergence import GuardedOptimizer, TrainingDiverged


def training(gradients, kind=torch.optim.AdamW):
    """Returns a parameter, its optimiser, and a function that takes the next step by a guarded one."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = kind([weight], lr=0.1, weight_decay=0.01, fused=True)
    guarded, left = GuardedOptimizer(optimizer, rank=2), iter(enumerate(gradients, 1))

    def step(loss=1.0):
        number, gradient = next(left)
        weight.grad = torch.full((5,), gradient)
        guarded.step(number, {"contrastive": torch.tensor(loss)}, weight.grad.norm())

    return weight, optimizer, guarded, step


def state_of(weight, optimizer):
    return [weight.detach().clone(), *(copy.deepcopy(value) for value in optimizer.state[weight].values())]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_finite_steps_are_the_optimisers_own_to_the_bit(kind):
    gradients = (1.0, -3.0, 0.5)
    weight, optimizer, guarded, step = training(gradients, kind)
    expected = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    plain = kind([expected], lr=0.1, weight_decay=0.01, fused=True)
    for gradient in gradients:
        step()
        expected.grad = torch.full((5,), gradient)
        plain.step()
    guarded.settle()
    torch.testing.assert_close(state_of(weight, optimizer), state_of(expected, plain), rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "gradient"), [(1.0, torch.inf), (1.0, torch.nan), (torch.nan, 1.0)])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments(loss, gradient):
    weight, optimizer, _, step = training((1.0, gradient))
    step()
    before = state_of(weight, optimizer)
    told = r"not finite at step 2 on worker 2 \(contrastive=(1\.0|nan), grad_norm=(inf|nan|2\.2\d+)\)"
    with pytest.raises(TrainingDiverged, match=told):
        step(loss)
    torch.testing.assert_close(state_of(weight, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("asks", [False, True])
def test_a_step_that_is_not_waited_for_is_told_by_the_next_or_when_it_is_asked_for(asks):
    weight, optimizer, guarded, step = training((1.0, torch.inf, 1.0))
    guarded._defers = True  # as on a GPU
    step()
    before = state_of(weight, optimizer)
    step()
    torch.testing.assert_close(state_of(weight, optimizer), before, rtol=0, atol=0)
    with pytest.raises(TrainingDiverged, match="not finite at step 2 "):
        guarded.settle() if asks else step()
    torch.testing.assert_close(state_of(weight, optimizer), before, rtol=0, atol=0)
    guarded.settle()  # told once
