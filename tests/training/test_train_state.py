import pytest
import torch

from harma_ray.data.stream import Worker
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.training.state import TrainState


def make(worker):
    return TrainState(
        [{"params": [*torch.nn.Linear(2, 2).parameters()]}],
        build_config(recipe_config("harma-scenes"), {"seed": 3}),
        10,
        worker,
    )


def saved_by(num_workers, step=4):
    """The state of some workers after a step, and what each would draw next."""
    states, draws = [], []
    for rank in range(num_workers):
        state = make(Worker(rank=rank, world_size=num_workers))
        torch.rand(7)
        state.progress.step = step
        states.append((state.state_dict(), state.progress_dict()))
        draws.append(torch.rand(5))
    together = {**states[0][0], "rng": torch.cat([state["rng"] for state, _ in states])}
    return together, states[0][1], draws


def next_draws(state, progress, num_workers):
    draws, told = [], []
    for rank in range(num_workers):
        told.append(make(Worker(rank=rank, world_size=num_workers)).load_state_dict(state, progress))
        draws.append(torch.rand(5))
    return draws, told


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_worker_goes_on_with_its_own_random_numbers(num_workers):
    state, progress, expected = saved_by(num_workers)
    draws, told = next_draws(state, progress, num_workers)
    assert torch.equal(torch.stack(draws), torch.stack(expected))
    assert len({tuple(draw.tolist()) for draw in draws}) == num_workers
    assert told == [[]] * num_workers


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 3)])
def test_with_other_workers_those_that_were_there_go_on_and_others_are_seeded_by_seed_rank_and_step(before, now):
    state, progress, expected = saved_by(before)
    draws, told = next_draws(state, progress, now)
    for draw, known in zip(draws, expected, strict=False):
        assert torch.equal(draw, known)
    again, _ = next_draws(state, progress, now)
    later, _ = next_draws(state, {**progress, "step": 8}, now)
    assert torch.equal(torch.stack(again), torch.stack(draws))
    for rank in range(before, now):
        assert not torch.equal(later[rank], draws[rank])
        make(Worker(rank=rank, world_size=now))
        assert not torch.equal(torch.rand(5), draws[rank])  # not what it drew at step 0
    for notices in told:
        assert len(notices) == 1
        assert notices[0].startswith(f"{now} worker{'s' * (now > 1)} took over what {before} began")


def test_a_change_between_gpu_and_cpu_is_told():
    state, progress, _ = saved_by(1)
    state["cuda_rng"] = torch.zeros(1, 16, dtype=torch.uint8)
    _, (notices,) = next_draws(state, progress, 1)
    assert notices == ["a CPU goes on with what a GPU began: the figures agree within rounding only"]
