"""What a generative task needs of the loop, with a toy: steps, ragged batches, groups, sums, shared draws, tokens."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_language import PackedTask, SpreadTask, ToyTask, toy_config

from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.settings import build_config, config_hash, to_dict
from harma_ray.training.checkpoint import list_checkpoints, load_state
from harma_ray.training.loop import run_training
from harma_ray.training.optim import build_optimizer
from harma_ray.training.step import autocast_of, check_batch, train_step
from harma_ray.training.tracking import read_records


def settings(scenes, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return build_config(toy_config(), {"data.path": str(scenes), **dotted})


def run(task, folder, **more):
    return run_training(task, task.config, folder, worker=Worker(), loader=local_batches, **more)


def steps_and_epochs(folder):
    return [(r["step"], r["epoch"]) for r in read_records(folder) if r["kind"] == "evaluation"]


def test_steps_end_a_training_within_an_epoch_and_shape_its_schedule(scenes, tmp_path):
    config = settings(scenes, train__steps=13, train__eval_every_steps=5, train__epochs=0)
    report = run(ToyTask(config), tmp_path)
    assert (report["steps"], report["planned_steps"]) == (13, 13)
    assert steps_and_epochs(tmp_path) == [(0, 0), (5, 0.5), (10, 1), (13, 1.3)]
    rates = [record["learning_rate"] for record in read_records(tmp_path) if record["kind"] == "step"]
    assert rates == pytest.approx([0.01 * (1 - step / 13) for step in range(13)])


def test_without_their_own_count_steps_are_evaluated_at_the_ends_of_epochs(scenes, tmp_path):
    run(ToyTask(settings(scenes, train__steps=23)), tmp_path)
    assert steps_and_epochs(tmp_path) == [(0, 0), (10, 1), (20, 2), (23, 2.3)]


def test_a_run_of_steps_goes_on_to_the_bit(scenes, tmp_path):
    class Stop(Exception):
        pass

    def callback(metrics):
        if metrics["step"] == 5:
            raise Stop

    config = settings(scenes, train__steps=13, train__eval_every_steps=5)
    whole = run(ToyTask(config), tmp_path / "whole")
    with pytest.raises(Stop):
        run(ToyTask(config), tmp_path / "parts", callback=callback)
    assert run(ToyTask(config), tmp_path / "parts")["metrics"] == whole["metrics"]


def test_a_setting_that_older_runs_lack_changes_their_identity_only_where_it_is_used(scenes):
    config = settings(scenes)
    raw = to_dict(config)
    assert {"steps", "eval_every_steps"} <= raw["train"].keys()
    assert config_hash(config) != config_hash(settings(scenes, train__steps=20))


class OwnRates(PackedTask):
    """Every block learns slower than the one after it."""

    def parameter_groups(self, model, optim):
        groups = [
            {"params": [*block.parameters()], "lr": optim.learning_rate * 0.5 ** (2 - number)}
            for number, block in enumerate(model.blocks)
        ]
        return [*groups, {"params": [*model.embedding.parameters(), *model.head.parameters()]}]


def test_a_task_groups_its_parameters_as_it_likes(scenes, tmp_path):
    task = OwnRates(settings(scenes))
    groups = task.parameter_groups(task.new_model(), task.config.optim)
    optimizer = build_optimizer(groups, task.config.optim)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.005, 0.01]
    assert run(task, tmp_path)["steps"] == 20
    trained = load_state(list_checkpoints(tmp_path)[-1])["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in trained] == [0.0025, 0.005, 0.01]
    first = next(record for record in read_records(tmp_path) if record["kind"] == "step")
    assert first["learning_rate"] == 0.01


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            lambda model: [{"params": model.head.parameters()}],
            r"hold for embedding\.weight, blocks.*; mend",
        ),
        (
            lambda model: [{"params": model.parameters()}, {"params": [model.head.bias]}],
            r"not hold for head\.bias; mend",
        ),
        (
            lambda model: [{"params": [*model.parameters(), nn.Parameter(torch.zeros(1))]}],
            "1 that are none of the model",
        ),
    ],
    ids=["some are left out", "one is there twice", "one is another's"],
)
def test_groups_that_are_not_what_is_trainable_are_refused(scenes, tmp_path, groups, message):
    task = ToyTask(settings(scenes))
    task.parameter_groups = lambda model, optim: groups(model)
    with pytest.raises(UserError, match=message):
        run(task, tmp_path)


def test_gradients_are_cut_to_the_norm_that_is_asked_for(scenes, tmp_path):
    task = ToyTask(settings(scenes, train__steps=1, optim__clip_grad_norm=0.01))
    run(task, tmp_path)
    (step,) = [record for record in read_records(tmp_path) if record["kind"] == "step"]
    assert step["grad_norm"] > 0.1
    moments = load_state(list_checkpoints(tmp_path)[-1])["optimizer"]["state"].values()
    norm = torch.stack([moment["exp_avg"].norm() for moment in moments]).norm()  # (1 - 0.9) of the first gradient
    assert float(norm) == pytest.approx((1 - task.config.optim.betas[0]) * 0.01, rel=1e-3)


class Silent(PackedTask):
    """Counts nothing in its first steps."""

    def losses(self, model, batch):
        loss = super().losses(model, batch)["letters"]
        return {"letters": loss * self.counted(batch).sign()}

    def counted(self, batch):
        self.asked = getattr(self, "asked", 0) + 1
        return super().counted(batch) * (self.asked > 6)


def test_a_step_that_counts_nothing_changes_nothing_and_goes_on(scenes, tmp_path):
    class Told(Silent):
        def evaluate(self, model, data):
            return Evaluation({"loss": 1.0})

    run(Told(settings(scenes, train__steps=5, optim__weight_decay=0.0)), tmp_path)
    norms = [record["grad_norm"] for record in read_records(tmp_path) if record["kind"] == "step"]
    assert [norm > 0 for norm in norms] == [False, False, False, True, True]


def first_parts(task, parts):
    stream = TrainingStream(
        planned_order(task.config), task.transform(training=True), task.config.data, Worker(), local_batches
    )
    batches = stream.steps(3, 1, parts)
    found = [next(batches) for _ in range(parts)]
    batches.close()
    return found


def test_samples_of_different_lengths_make_batches_without_a_dimension_for_them(scenes):
    (whole,) = first_parts(PackedTask(settings(scenes)), 1)
    lengths = np.diff(np.flatnonzero(whole["targets"].numpy() == -100), prepend=-1)
    assert len(whole["row"]) == len(lengths) == 20
    assert len(set(lengths)) > 1
    parts = first_parts(PackedTask(settings(scenes)), 4)
    assert [len(part["row"]) for part in parts] == [5] * 4
    assert torch.equal(torch.cat([part["letters"] for part in parts]), whole["letters"])


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_sums_over_parts_are_the_loss_and_the_gradient_of_the_whole_batch(scenes, parts):
    task = PackedTask(settings(scenes, train__accumulation=parts))
    (whole,) = first_parts(task, 1)
    plain = task.new_model()
    loss = nn.functional.cross_entropy(plain(whole["letters"])["scores"], whole["targets"], ignore_index=-100)
    loss.backward()
    model = task.new_model()
    terms = train_step(
        task, model, first_parts(task, parts), task.config.train, autocast_of(task.config.train, torch.device("cpu"))
    )
    torch.testing.assert_close(terms, {"letters": loss.detach()})
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_samples_end_to_end_are_not_cut_by_the_length_of_the_batch(scenes, tmp_path):
    class Compared(PackedTask):
        accumulation = "cached"

    with pytest.raises(UserError, match=r"a row for each sample in what the model is called with.*for 20 samples"):
        run(Compared(settings(scenes, train__accumulation=2)), tmp_path)


def test_what_only_whole_models_can_is_refused_before_anything_starts(scenes):
    compiled = settings(scenes, train__compile=True)
    with pytest.raises(UserError, match=r"recipe toy spreads its own over them; use train\.compile=false"):
        check_batch(SpreadTask(compiled), 2)
    check_batch(SpreadTask(compiled), 1)
    check_batch(PackedTask(compiled), 2)


def test_a_share_that_does_not_divide_into_its_parts_is_refused(scenes):
    with pytest.raises(UserError, match=r"must divide a worker's share of the batch, got 3 and 10"):
        check_batch(PackedTask(settings(scenes, train__accumulation=3)), 2)
    check_batch(ToyTask(settings(scenes, train__accumulation=3)), 2)


class Drawing(PackedTask):
    """Writes down what it draws."""

    def __init__(self, config):
        super().__init__(config)
        self.drawn = []

    def losses(self, model, batch):
        self.drawn.append(float(self.random.random()))
        return super().losses(model, batch)


def test_shared_draws_are_those_of_the_seed_and_the_step_alone(scenes, tmp_path):
    first = Drawing(settings(scenes, train__steps=4, train__checkpoint_every_steps=2, train__accumulation=2))
    run(first, tmp_path / "first")
    assert len(set(first.drawn)) == 8
    again = Drawing(replace(first.config, train=replace(first.config.train, accumulation=1)))
    run(again, tmp_path / "again")
    assert again.drawn == first.drawn[::2]
    other = Drawing(replace(first.config, seed=1))
    run(other, tmp_path / "other")
    assert not {*other.drawn} & {*first.drawn}


def test_shared_draws_are_there_from_the_start_and_are_no_other_draws(scenes):
    task = ToyTask(settings(scenes))
    first = task.random.random()
    task.begin_step(0)
    assert task.random.random() == first
    for seed in (0, 2**40):
        task.config = replace(task.config, seed=seed)
        for step in range(3):
            task.begin_step(step)
            sequences = [[seed], [seed, step], *([seed, step, row, k] for row in range(4) for k in range(4))]
            assert task.random.random() not in {np.random.default_rng(numbers).random() for numbers in sequences}


def test_tokens_a_second_are_told_where_a_task_counts_them(scenes, tmp_path):
    for task in (PackedTask(settings(scenes)), ToyTask(settings(scenes))):
        run(task, tmp_path / type(task).__name__)
    packed, plain = (
        [r for r in read_records(tmp_path / name) if r["kind"] == "step"] for name in ("PackedTask", "ToyTask")
    )
    assert "tokens_per_second" not in plain[0]
    (whole,) = first_parts(PackedTask(settings(scenes)), 1)
    told = packed[3]["tokens_per_second"] / packed[3]["pairs_per_second"]
    assert told == pytest.approx(len(whole["letters"]) / 20)
    assert json.dumps(packed[3])
