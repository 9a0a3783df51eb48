from dataclasses import replace

import pytest
import torch

from harma_ray.errors import UserError
from harma_ray.retrieval.by_class import rank_by_class
from harma_ray.retrieval.classes import Classes, same_images
from harma_ray.vectors.comparison import Method, Problem, Wanted, measure
from harma_ray.vectors.store import Store

pytest.importorskip("faiss")


def problem(seed, num_queries, num_items, width, *, tied):
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda *size: torch.randint(-1, 2, size, generator=generator).float())
        if tied
        else (lambda *size: torch.nn.functional.normalize(torch.randn(*size, generator=generator), dim=1))
    )
    queries, gallery = draw(num_queries, width), draw(num_items, width)
    if tied:
        gallery[num_items // 2 :] = gallery[: num_items - num_items // 2]
    labels = [f"{n % 7}" for n in torch.randperm(num_items, generator=generator).tolist()]
    own = [f"{n % 7}" for n in range(num_queries)]
    excluded = same_images([n % 50 for n in range(num_queries)], [n % 60 for n in range(num_items)])
    return Problem(queries, gallery, Classes.of(own, labels), excluded, torch.arange(num_queries), [])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ks", [(1,), (1, 3, 5), (2, 30)])
def test_a_flat_index_gives_the_figures_of_the_exact_ranking_amid_ties_and_duplicates(seed, ks):
    one = problem(seed, 80, 300, 4, tied=True)
    exact = rank_by_class(one.queries, one.gallery, one.classes, excluded=one.excluded, ks=ks)
    found = measure(one, Method("plain"), Wanted(ks=ks, index="flat"))[0].result
    for k in ks:
        assert torch.equal(found.ranks < k, exact.ranks < k)
        assert found.metrics[f"top_{k}"] == exact.metrics[f"top_{k}"]
    assert torch.equal(found.nearest, exact.nearest)


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw", "ivfpq"])
def test_a_page_draws_what_was_found_in_the_way_that_was_measured(kind):
    one = problem(5, 60, 600, 32, tied=False)
    retrieval = measure(one, Method("plain"), Wanted(index=kind))[0]
    _, items = retrieval.neighbours(range(60), 5)
    right = one.classes.gallery[items.clamp(min=0)] == one.classes.queries[:, None]
    for k in (1, 3, 5):
        assert retrieval.result.metrics[f"top_{k}"] == pytest.approx(100 * right[:, :k].any(dim=1).double().mean())
    exact = measure(one, Method("plain"), Wanted())[0].neighbours(range(60), 5)[1]
    assert torch.equal(items, exact) == (kind != "ivfpq")


def test_queries_of_composed_retrieval_are_not_measured_by_class(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    names = [f"{row}" for row in range(4)]
    store = Store(tmp_path, names, names, ["dress", "shirt"] * 2, names, vectors, {})
    assert len(Problem.of(store, store).queries) == 4
    with pytest.raises(UserError, match=r"holds queries of composed retrieval, .* measure them with `launch.py eval"):
        Problem.of(replace(store, manifest={"query": "sum"}), store)
