"""Retrieval over many vectors: exact ranking, FAISS flat and HNSW, their time, recall and peak memory, in one run.

Each way runs in a process of its own, so that its peak of memory is its own; before it, the process holds the vectors.

Run: python benchmarks/retrieve.py [--gallery 100000] [--queries 1000] [--width 768] [--threads 2]
"""

import argparse
import resource
import sys
import time
from multiprocessing import get_context
from typing import Literal

import torch

from harma_ray.data.order import iterate_slices
from harma_ray.retrieval.by_class import judge_neighbours, rank_by_class
from harma_ray.retrieval.classes import Classes
from harma_ray.vectors.index import IndexKind, build_index, recall_against

NUM_CLASSES = 100
LATENT = 32
Way = IndexKind | Literal["exact"]
WAYS: tuple[Way, ...] = ("exact", "flat", "hnsw")


def peak_mib() -> float:
    """Returns the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def draw(count: int, width: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Returns unit vectors around the centres of classes, mostly in a few dimensions as embeddings are, and classes."""
    generator, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    centres, directions = (torch.randn(*size, generator=shared) for size in ((NUM_CLASSES, LATENT), (LATENT, width)))
    numbers = torch.randint(NUM_CLASSES, (count,), generator=generator)
    vectors = torch.empty(count, width)
    for part in iterate_slices(count, 4096):  # so that drawing is not what needs most memory
        near = centres[numbers[part]]
        moved = (near + 1.2 * torch.randn(near.shape, generator=generator)) @ directions
        noise = torch.randn(moved.shape, generator=generator)
        vectors[part] = torch.nn.functional.normalize(moved + noise, dim=1)
    return vectors, [f"{n}" for n in numbers.tolist()]


def measure(way: Way, options: argparse.Namespace, exact: torch.Tensor | None) -> dict:
    """Runs one way in this process."""
    torch.set_num_threads(options.threads)
    gallery, labels = draw(options.gallery, options.width, 1)
    queries, own = draw(options.queries, options.width, 2)
    classes, before = Classes.of(own, labels), peak_mib()
    started = time.perf_counter()
    index = None if way == "exact" else build_index(way, gallery)
    built = time.perf_counter() - started
    started = time.perf_counter()
    items = None
    if index is None:
        result = rank_by_class(queries, gallery, classes)
    else:
        scores, items = index.search(queries, 5)
        result = judge_neighbours(scores, items, classes)
    seconds = time.perf_counter() - started
    recall = recall_against(items, exact) if items is not None and exact is not None else None
    return {"way": way, "built": built, "seconds": seconds, "before": before, "peak": peak_mib(), "items": items,
            "metrics": result.metrics, "recall": recall}  # fmt: skip


def main() -> None:
    """Prints seconds, queries a second, recall and memory of each way, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    stored = options.gallery * options.width * 4 / 2**20
    print(f"{options.queries} queries, gallery {options.gallery} x {options.width} ({stored:.0f} MiB), "
          f"{options.threads} threads")  # fmt: skip
    found, exact = {}, None
    for way in WAYS:
        with get_context("spawn").Pool(1) as pool:
            found[way] = pool.apply(measure, (way, options, exact))
        one = found[way]
        exact = one["items"] if way == "flat" else exact
        told = "" if one["recall"] is None else f", recall@5 against flat {one['recall']:.1f} %"
        figures = ", ".join(f"{name} {value:.1f}" for name, value in one["metrics"].items())
        print(f"{way:5}  built in {one['built']:6.1f} s, searched in {one['seconds']:6.2f} s "
              f"({options.queries / one['seconds']:7.0f} queries/s), peak {one['peak']:5.0f} MiB "
              f"({one['peak'] - one['before']:5.0f} above the start); {figures}{told}", flush=True)  # fmt: skip
    flat, hnsw, ranked = found["flat"], found["hnsw"], found["exact"]
    print(f"search, flat to hnsw: {flat['seconds'] / hnsw['seconds']:.1f}; exact ranking with mAP to flat: "
          f"{ranked['seconds'] / flat['seconds']:.1f}; peak, hnsw to flat: {hnsw['peak'] / flat['peak']:.2f}; "
          f"queries after which hnsw's building has paid: "
          f"{hnsw['built'] / max(1e-9, flat['seconds'] - hnsw['seconds']) * options.queries:,.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
