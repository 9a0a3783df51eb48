"""Two and three gloo workers with the real task: gradients and figures as with one."""

import contextlib
import datetime
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import WEIGHTS_NAME, list_checkpoints, read_meta
from harma_ray.training.loop import run_training
from harma_ray.training.step import autocast_of, evaluate_split, train_step, wrap_model

BATCH = 24
ADAPTERS = {"adapter.width": 16, "adapter.shared_width": 8, "adapter.num_heads": 4}
COMBINER = {"combiner.projection_dim": 64, "combiner.hidden_dim": 32, "combiner.dropout": 0}
CASES = {
    "adapters": ("harma-scenes", ADAPTERS),
    "accumulated": ("harma-scenes", {**ADAPTERS, "train.accumulation": 3}),
    "full": ("harma-scenes", {"model.tuning": "full", "loss.triplet": "plain"}),
    "no same-image negatives": (
        "harma-scenes",
        {**ADAPTERS, "loss.same_image_negatives": False, "adapter.share_across_modalities": True},
    ),
    "grouped, accumulated": (
        "harma-scenes",
        {**ADAPTERS, "train.accumulation": 2, "train.captions": "grouped", "train.captions_per_image": 2},
    ),
    "composed": ("scenes-cir-finetune", {}),
    "composed, accumulated": ("scenes-cir-finetune", {"train.accumulation": 3, "tuning.encoder": "text"}),
    "combiner": ("scenes-cir-combiner", COMBINER),
}


MEASURED = ("adapters", "composed", "combiner")


def settings(data, case):
    """Settings of a case; `data` are the paths of a data set of captions and of one of composed retrieval."""
    recipe, changes = CASES[case]
    small = {"train.global_batch_size": BATCH, "data.path": data[recipe.startswith("scenes-cir")]}
    return build_config(recipe_config(recipe), {**small, **changes})


def moved_model(task):
    """The model with noise on what is trained: at step 0 the gradients of most adapters are zero."""
    model = task.new_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def losses_and_gradients(config, worker):
    task = make_task(config)
    stream = TrainingStream(planned_order(config), task.transform(training=True), config.data, worker, local_batches)
    batches = stream.steps(3, 5)
    model = moved_model(task)
    forward = wrap_model(task, model, worker)
    terms = train_step(task, forward, [next(batches)], config.train, autocast_of(config.train, torch.device("cpu")))
    batches.close()
    return terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def figures(config, worker, batch_size=4):
    config = replace(config, train=replace(config.train, eval_batch_size=batch_size))
    task = make_task(config)
    return evaluate_split(task, config, moved_model(task), "val", worker=worker, loader=local_batches).metrics


class Stop(Exception):
    pass


def train_in_two_parts(config, worker, folder):
    """Trains one run without a stop, and one that is stopped after its first epoch and goes on."""

    def stop(metrics):
        if metrics["epoch"] == 1:
            raise Stop

    config = replace(config, train=replace(config.train, epochs=2))
    for name, callback in (("whole", None), ("parts", stop), ("parts", None)):
        with contextlib.suppress(Stop):
            run_training(
                make_task(config),
                config,
                folder / name,
                worker=worker,
                loader=local_batches,
                callback=callback or (lambda metrics: None),
            )
        dist.barrier()


def work(rank, num_workers, folder, data):
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # here as in pytest's own process: users see what workers warn of
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=90),
    )
    worker = Worker(rank=rank, world_size=num_workers)
    result = {case: losses_and_gradients(settings(data, case), worker) for case in CASES}
    result["figures"] = {case: figures(settings(data, case), worker) for case in MEASURED}
    if num_workers == 3:  # two are told of in tests/cli/test_interrupted_runs.py
        train_in_two_parts(settings(data, "full"), worker, Path(folder))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(scenes, composed):
    return str(scenes), str(composed)


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp(f"workers{request.param}")
    run_on_ranks(work, request.param, request.param, str(folder), data)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]
    found[0]["trained"] = folder
    return found


@pytest.mark.parametrize("case", CASES)
def test_workers_give_the_losses_and_gradients_of_one(results, data, case):
    config = settings(data, case)
    terms, gradients = losses_and_gradients(replace(config, train=replace(config.train, accumulation=1)), Worker())
    for result in results:
        found_terms, found = result[case]
        assert found.keys() == gradients.keys()
        for name, term in terms.items():
            torch.testing.assert_close(found_terms[name], term, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-4 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", MEASURED)
def test_workers_give_the_figures_of_one(results, data, case):
    expected = figures(settings(data, case), Worker(), batch_size=13)
    assert len(expected) >= 14
    for result in results:
        assert result["figures"][case] == expected


@pytest.mark.parametrize("results", [3], indirect=True)
def test_workers_that_go_on_end_as_if_never_stopped_to_the_bit(results):
    whole, parts = (list_checkpoints(results[0]["trained"] / name)[-1] for name in ("whole", "parts"))
    assert read_meta(parts).step == 16
    assert (parts / WEIGHTS_NAME).read_bytes() == (whole / WEIGHTS_NAME).read_bytes()
