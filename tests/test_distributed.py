"""Real gloo processes: one group of two and one of three serve all tests; each rank leaves its results in a file."""

import datetime
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harma_ray import distributed
from harma_ray.errors import UserError
from harma_ray.models.losses import affiliation_loss, class_means, contrastive_loss, weighted_triplet_loss
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import rank_first_relevant, rank_together

BATCH = 4


class TwoTowers(nn.Module):
    """Two linear towers with a learnable temperature, float64, the same on every rank."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image = nn.Linear(6, 5, dtype=torch.float64)
        self.text = nn.Linear(7, 5, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        with torch.no_grad():
            for layer in (self.image, self.text):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64))

    def forward(self, image, text):
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.temperature


def make_batch(num_workers):
    generator = torch.Generator().manual_seed(11)
    rows = num_workers * BATCH
    return {
        "image": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        "text": torch.randn(rows, 7, generator=generator, dtype=torch.float64),
        # Images repeat within a worker and across workers.
        "image_ids": torch.arange(rows) * 5 % 6,
        "labels": torch.arange(rows) % 3 // 2,
    }


def pair_loss(image, text, temperature, image_ids):
    return contrastive_loss(image, text, temperature, image_ids) + weighted_triplet_loss(
        image, text, image_ids=image_ids, same_image_negatives=False
    )


def loss_and_gradients(model, loss):
    loss.backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in inner.named_parameters()}}


def pair_step(model, batch):
    image, text, temperature = model(batch["image"], batch["text"])
    image, text = distributed.gather_with_gradient(image), distributed.gather_with_gradient(text)
    image_ids = distributed.gather_with_gradient(batch["image_ids"])
    return loss_and_gradients(model, pair_loss(image, text, temperature, image_ids))


def affiliation_step(model, batch):
    gather = distributed.gather_with_gradient
    image, text, temperature = model(batch["image"], batch["text"])
    image_means, text_means = class_means(image, batch["labels"]), class_means(text, batch["labels"])
    loss = affiliation_loss(gather(image), gather(text), gather(image_means), gather(text_means), temperature)
    return loss_and_gradients(model, loss)


def affiliation_step_of_one_worker(model, batch, num_workers):
    """One process, all rows; the class means of each worker's slice on its own."""
    image, text, temperature = model(batch["image"], batch["text"])
    labels = batch["labels"].chunk(num_workers)
    image_means, text_means = (
        torch.cat([class_means(rows, own) for rows, own in zip(x.chunk(num_workers), labels, strict=True)])
        for x in (image, text)
    )
    return loss_and_gradients(model, affiliation_loss(image, text, image_means, text_means, temperature))


def error_of(function, *args):
    try:
        function(*args)
    except (ValueError, UserError) as error:
        return str(error)
    return None


def rows_of(rank):
    """Uneven rows: rank 0 has two, rank 1 none, rank 2 three."""
    return [2, 0, 3][rank]


def gradient_of_unequal_losses(rank, dtype):
    x = torch.full((2, 3), float(rank), dtype=dtype, requires_grad=True)
    gathered = distributed.gather_with_gradient(x)
    weight = torch.arange(gathered.numel(), dtype=dtype).view_as(gathered)
    ((rank + 1) * weight * gathered).sum().backward()
    return gathered.detach(), x.grad


def ranking_of(num_queries):
    """Queries, a gallery with ties, and two notions of relevance."""
    generator = torch.Generator().manual_seed(num_queries)
    queries, gallery = (torch.randn(size, 5, generator=generator).round() for size in (num_queries, 30))
    lists = [torch.randint(30, (num_queries, 2), generator=generator).tolist() for _ in range(2)]
    return queries, gallery, [Groups.from_lists(items) for items in lists]


def work(rank, num_workers, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=90),
    )
    result = {"rank": distributed.rank(), "world_size": distributed.world_size()}

    own = slice(rank * BATCH, (rank + 1) * BATCH)
    batch = {name: values[own] for name, values in make_batch(num_workers).items()}
    result["pair"] = pair_step(DistributedDataParallel(TwoTowers()), batch)
    result["affiliation"] = affiliation_step(DistributedDataParallel(TwoTowers()), batch)

    result["unequal"] = {dtype: gradient_of_unequal_losses(rank, dtype) for dtype in (torch.float64, torch.bfloat16)}

    count = rows_of(rank)
    result["rows"] = {
        dtype: distributed.gather_rows((torch.arange(count * 2).view(count, 2) + 10 * rank).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    }
    result["ids"] = distributed.gather_rows(torch.full((count,), rank, requires_grad=False))
    result["strided"] = distributed.gather_rows(torch.arange(6.0).view(3, 2).T + rank)
    result["graph"] = distributed.gather_rows(torch.ones(1, requires_grad=True) * 2).requires_grad
    result["no rows"] = distributed.gather_rows(torch.zeros(0, 3))

    result["ranks"] = {num: rank_together(*ranking_of(num)) for num in (0, 1, 20)}
    queries, gallery, _ = ranking_of(20)
    lacking = [Groups.from_lists([[] if query == 19 else [0] for query in range(20)])]
    result["unranked"] = error_of(rank_together, queries, gallery, lacking)

    result["object"] = distributed.broadcast_object({"sent by": rank} if rank == 0 else None)

    result["errors"] = [
        error_of(distributed.gather_with_gradient, torch.zeros(rank + 1, 2)),
        error_of(distributed.gather_rows, torch.zeros(1, rank + 2)),
        error_of(distributed.gather_rows, torch.zeros(1, dtype=torch.int64 if rank == 0 else torch.int32)),
    ]
    # The group is still in step after the refusals.
    result["in step"] = distributed.gather_with_gradient(torch.tensor([rank]))
    time.sleep(0.3 * rank)
    came = time.monotonic()
    distributed.barrier()
    result["barrier"] = (came, time.monotonic())
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"workers{request.param}")
    run_on_ranks(work, request.param, request.param, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ranks_are_numbered(results):
    assert [(r["rank"], r["world_size"]) for r in results] == [(i, len(results)) for i in range(len(results))]


def test_workers_equal_one_worker_with_the_whole_batch(results):
    model, batch = TwoTowers(), make_batch(len(results))
    image, text, temperature = model(batch["image"], batch["text"])
    expected = loss_and_gradients(model, pair_loss(image, text, temperature, batch["image_ids"]))
    assert all(values.any() for values in expected.values())
    for result in results:
        assert_same(result["pair"], expected)


def test_workers_with_class_means_of_their_own_equal_one_worker_with_the_same_means(results):
    expected = affiliation_step_of_one_worker(TwoTowers(), make_batch(len(results)), len(results))
    assert all(values.any() for values in expected.values())
    for result in results:
        assert_same(result["affiliation"], expected)


def test_class_means_of_a_worker_differ_from_those_of_the_whole_batch(results):
    # Shows that the test above compares what it says.
    batch = make_batch(len(results))
    whole = affiliation_step_of_one_worker(TwoTowers(), batch, 1)
    assert not torch.isclose(results[0]["affiliation"]["loss"], whole["loss"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gather_sums_the_gradients_of_all_ranks(results, dtype):
    size = len(results)
    weight = torch.arange(size * 6, dtype=torch.float64).view(size * 2, 3)
    factor = sum(range(1, size + 1))
    for result in results:
        gathered, grad = result["unequal"][dtype]
        own = slice(2 * result["rank"], 2 * result["rank"] + 2)
        assert gathered.dtype == grad.dtype == dtype
        assert gathered[:, 0].tolist() == [rank for rank in range(size) for _ in range(2)]
        torch.testing.assert_close(grad, (factor * weight[own]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_rows_takes_uneven_and_empty_ranks_in_rank_order(results, dtype):
    values = [[0, 1], [2, 3]] + ([[20, 21], [22, 23], [24, 25]] if len(results) == 3 else [])
    for result in results:
        assert torch.equal(result["rows"][dtype], torch.tensor(values).to(dtype))
        assert result["rows"][dtype].dtype == dtype
        assert result["ids"].tolist() == [0, 0] + [2] * (3 * (len(results) == 3))


def test_gather_rows_keeps_layout_shape_and_no_graph(results):
    block = torch.arange(6.0).view(3, 2).T
    for result in results:
        assert torch.equal(result["strided"], torch.cat([block + rank for rank in range(len(results))]))
        assert result["graph"] is False
        assert result["no rows"].shape == (0, 3)


@pytest.mark.parametrize("num_queries", [0, 1, 20])
def test_queries_ranked_in_shares_have_the_ranks_of_one_worker(results, num_queries):
    expected = rank_first_relevant(*ranking_of(num_queries))
    assert num_queries < 20 or len(set(expected[0].tolist())) > 5
    for result in results:
        for ranks, wanted in zip(result["ranks"][num_queries], expected, strict=True):
            assert torch.equal(ranks, wanted)
        assert "queries 19 have none" in result["unranked"]  # on every worker


def test_objects_are_the_same_on_every_rank_which_stay_in_step(results):
    for result in results:
        assert result["object"] == {"sent by": 0}
        assert result["in step"].tolist() == list(range(len(results)))


def test_no_rank_leaves_a_barrier_before_all_have_come(results):
    assert min(result["barrier"][1] for result in results) >= max(result["barrier"][0] for result in results)


def test_ranks_that_disagree_are_refused_on_every_rank(results):
    patterns = ["as many rows", "same collective", "same collective"]
    for result in results:
        for message, pattern in zip(result["errors"], patterns, strict=True):
            assert message is not None
            assert pattern in message


def test_without_a_group_the_world_is_one():
    x = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_with_gradient(x) is x
    assert torch.equal(distributed.gather_rows(x), x)
    assert not distributed.gather_rows(x).requires_grad
    assert distributed.broadcast_object("value") == "value"
    distributed.barrier()


def test_a_scalar_has_no_rows_to_gather():
    for gather in (distributed.gather_rows, distributed.gather_with_gradient):
        with pytest.raises(ValueError, match="at least one dimension"):
            gather(torch.tensor(1.0))
