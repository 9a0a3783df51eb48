"""Two and three gloo workers with the real task: gradients and figures as with one."""

import datetime
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from harma_ray.config import build_config
from harma_ray.data.order import planned_order
from harma_ray.data.stream import Place, TrainingStream, local_batches
from harma_ray.engine import autocast_of, evaluate_split, train_step, wrap_model
from harma_ray.recipes import make_task, recipe_config

BATCH = 24
CASES = {
    "adapters": {},
    "accumulated": {"train.accumulation": 3},
    "full": {"model.tuning": "full", "loss.triplet": "plain"},
    "no same-image negatives": {"loss.same_image_negatives": False, "adapter.share_across_modalities": True},
}


def settings(scenes, case):
    small = {"train.global_batch_size": BATCH, "adapter.width": 16, "adapter.shared_width": 8, "adapter.num_heads": 4,
             "data.path": scenes}  # fmt: skip
    return build_config(recipe_config("harma-scenes"), {**small, **CASES[case]})


def moved_model(task):
    """The model with noise on what is trained: at step 0 the gradients of most adapters are zero."""
    model = task.build_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def losses_and_gradients(config, place):
    task = make_task(config)
    stream = TrainingStream(planned_order(config), task.transform(training=True), config.data, place, local_batches)
    batches = stream.steps(3, 1)
    model = moved_model(task)
    forward = wrap_model(model, config.train, place)
    terms = train_step(task, forward, next(batches), config.train, autocast_of(config.train, torch.device("cpu")))
    batches.close()
    return terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def figures(config, place, batch_size=4):
    config = replace(config, train=replace(config.train, eval_batch_size=batch_size))
    task = make_task(config)
    return evaluate_split(task, config, moved_model(task), "val", place=place, reader=local_batches).metrics


def work(rank, num_workers, folder, scenes):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers,
        timeout=datetime.timedelta(seconds=90),
    )  # fmt: skip
    place = Place(rank=rank, world_size=num_workers)
    result = {case: losses_and_gradients(settings(scenes, case), place) for case in CASES}
    result["figures"] = figures(settings(scenes, "adapters"), place)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory, scenes):
    folder = tmp_path_factory.mktemp(f"workers{request.param}")
    torch.multiprocessing.spawn(work, args=(request.param, str(folder), str(scenes)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_workers_give_the_losses_and_gradients_of_one(results, scenes, case):
    config = settings(str(scenes), case)
    terms, gradients = losses_and_gradients(replace(config, train=replace(config.train, accumulation=1)), Place())
    for result in results:
        found_terms, found = result[case]
        assert found.keys() == gradients.keys()
        for name, term in terms.items():
            torch.testing.assert_close(found_terms[name], term, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-4 * scale, msg=lambda m, n=name: n + m)


def test_workers_give_the_figures_of_one(results, scenes):
    expected = figures(settings(str(scenes), "adapters"), Place(), batch_size=13)
    assert len(expected) >= 14
    for result in results:
        assert result["figures"] == expected
