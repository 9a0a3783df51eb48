"""A model spread over two workers trains as one that is whole on each; either goes on from the other."""

import contextlib
import datetime
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from toy_language import FirstLetters, Letters, PackedTask, SpreadTask, toy_config

from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.parallel import gather_tensors, shard
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import STATE_NAME, WEIGHTS_NAME, list_checkpoints, load_state
from harma_ray.training.loop import run_training
from harma_ray.training.tracking import read_records

WATCHED = ("sum", "mean", "largest")


class Watched:
    """Watches values that need all of a parameter, of one in a block and of one outside."""

    def monitor(self, model):
        head, block = model.head.weight, model.blocks[0].weight
        return dict(
            zip(WATCHED, (float(head.square().sum()), block.mean().item(), float(head.abs().max())), strict=True)
        )


class Whole(Watched, PackedTask):
    pass


class Spread(Watched, SpreadTask):
    pass


class Drawing(Spread):
    """Draws in each step, disagrees on what it found, and stops where worker 0 says so."""

    drawn = ()

    def losses(self, model, batch):
        self.drawn = (*self.drawn, self.random.random())
        return super().losses(model, batch)

    def evaluate(self, model, data):
        return Evaluation({"loss": [1.0, -len(self.drawn)][dist.get_rank()]})


class WithScalar(Letters):
    """Its temperature is an output."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, letters):
        return {**super().forward(letters), "temperature": self.temperature[0]}


class Compared(SpreadTask):
    accumulation = "cached"

    def build_model(self, backbone):
        return WithScalar()

    def transform(self, *, training):
        return FirstLetters()

    def losses(self, model, batch):
        outputs = model(batch["letters"])
        return {"letters": (outputs["scores"] * outputs["temperature"]).mean()}

    def evaluate(self, model, data):
        return Evaluation({"loss": 1.0})


class Stop(Exception):
    pass


def stop(metrics):
    if metrics["epoch"] == 1:
        raise Stop


RUNS = {
    "whole": [(Whole, None)],
    "spread": [(Spread, None)],
    "whole, then spread": [(Whole, stop), (Spread, None)],
    "spread, then whole": [(Spread, stop), (Whole, None)],
}


def settings(data):
    return build_config(toy_config(), {"data.path": data, "train.accumulation": 2, "optim.clip_grad_norm": 1.0})


def work(rank, folder, data):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    worker = Worker(rank=rank, world_size=2)
    for name, parts in RUNS.items():
        for kind, callback in parts:
            with contextlib.suppress(Stop):
                run_training(
                    kind(settings(data)),
                    settings(data),
                    Path(folder) / name,
                    worker=worker,
                    loader=local_batches,
                    callback=callback or (lambda metrics: None),
                )
            dist.barrier()
    found = {}
    found["gathered"] = gather_tensors(dict(shard(Letters(), (), "cpu").named_parameters()))
    config = build_config(settings(data), {"train.early_stopping_patience": 1, "train.epochs": 5})
    task, found["metrics"] = Drawing(config), []
    report = run_training(
        task, config, Path(folder) / "drawn", worker=worker, loader=local_batches, callback=found["metrics"].append
    )
    found["drawn"], found["report"] = task.drawn, report["metrics"]
    with pytest.raises(UserError) as refused:
        run_training(
            Compared(settings(data)), settings(data), Path(folder) / "compared", worker=worker, loader=local_batches
        )
    found["cached"] = str(refused.value)
    model = WithScalar()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError) as refused:
        shard(model, (), "cpu")
    found["scalar"] = str(refused.value)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    run_on_ranks(work, 2, str(folder), str(scenes))
    return folder


def losses(folder, kind="step"):
    return [record["loss"] for record in read_records(folder) if record["kind"] == kind]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "whole"])
def test_a_spread_model_has_the_losses_of_a_whole_one_and_each_goes_on_from_the_other(trained, name):
    assert len(losses(trained / name)) == 20
    for kind in ("step", "evaluation"):
        assert losses(trained / name, kind) == pytest.approx(losses(trained / "whole", kind), rel=1e-4)


def test_workers_have_the_losses_of_one(trained, scenes, tmp_path):
    config = settings(str(scenes))
    run_training(PackedTask(config), config, tmp_path, worker=Worker(), loader=local_batches)
    for kind in ("step", "evaluation"):
        assert losses(trained / "whole", kind) == pytest.approx(losses(tmp_path, kind), rel=1e-4)
    own, both = (
        [step for step in read_records(folder) if step["kind"] == "step"] for folder in (tmp_path, trained / "whole")
    )
    assert [step["grad_norm"] for step in both] == pytest.approx([step["grad_norm"] for step in own], rel=1e-3)
    tokens = [sum(step["tokens_per_second"] / step["pairs_per_second"] for step in steps) for steps in (own, both)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.1)  # that of worker 0, as often as there are workers


def test_what_is_watched_of_a_spread_model_is_that_of_a_whole_one(trained):
    whole, spread = (
        [[record[name] for name in WATCHED] for record in read_records(trained / run) if record["kind"] == "monitor"]
        for run in ("whole", "spread")
    )
    assert len(whole) == 20
    for expected, found in zip(whole, spread, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def found(trained):
    return [torch.load(trained / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_a_checkpoint_is_gathered_on_one_worker_alone(found):
    whole = {name: parameter.detach() for name, parameter in Letters().named_parameters()}
    torch.testing.assert_close(found[0]["gathered"], whole, rtol=0, atol=0)
    assert not found[1]["gathered"]


def test_workers_draw_alike_and_heed_the_metrics_of_the_first(found):
    first, second = found
    assert first["drawn"] == second["drawn"]
    assert len({*first["drawn"]}) == 20  # one epoch that is not better, in two parts a step
    assert first["metrics"] == second["metrics"]
    assert first["report"] == second["report"]


def test_what_cannot_be_spread_over_workers_is_refused_by_name(found):
    for worker in found:
        assert "got the scalar `temperature`" in worker["cached"]
        assert "which these have not: temperature; give" in worker["scalar"]


def test_a_state_is_not_read_into_memory_before_it_is_used(trained):
    file = list_checkpoints(trained / "whole")[-1] / STATE_NAME
    state = load_state(file.parent)
    assert str(file) in Path("/proc/self/maps").read_text()
    assert state["optimizer"]["state"]


def test_checkpoints_of_both_have_one_form(trained):
    whole, spread = (list_checkpoints(trained / name)[-1] for name in ("whole", "spread"))
    assert (whole / WEIGHTS_NAME).stat().st_size == (spread / WEIGHTS_NAME).stat().st_size
    first, second = (load_state(path)["optimizer"] for path in (whole, spread))
    assert first["param_groups"] == second["param_groups"]
    for number, moments in first["state"].items():
        torch.testing.assert_close(second["state"][number], moments, rtol=1e-2, atol=1e-5)
