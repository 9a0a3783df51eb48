"""Times the ranking of images against texts, both ways, and its memory against that of a full score matrix.

With --workers N only what the first of N workers does is timed: its share of the queries, among all.
"""

import argparse
import resource
import sys
import time

import torch

from harma_ray.data.order import worker_rows
from harma_ray.retrieval import image_text
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import rank_first_relevant


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="number of images")
    parser.add_argument("--texts-per-image", type=int, default=5, help="captions of each image")
    parser.add_argument("--distinct-texts", type=int, default=30_000, help="different captions among them, at most")
    parser.add_argument("--width", type=int, default=512, help="embedding width")
    parser.add_argument("--workers", type=int, default=1, help="workers that share the queries")
    parser.add_argument("--device", default="cpu", help="device of the embeddings, such as cpu or cuda")
    return parser.parse_args()


def _rank_share(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor, workers: int) -> float:
    """Ranks as the first of some workers does; returns the seconds."""
    relevants = (
        Groups.from_pairs(image_of_text, torch.arange(len(texts)), num_queries=len(images)),
        Groups.one_each(image_of_text),
    )
    started = time.perf_counter()
    for queries, gallery, relevant in ((images, texts, relevants[0]), (texts, images, relevants[1])):
        rows = range(len(worker_rows(len(queries), 0, workers)))
        rank_first_relevant(queries, gallery, [relevant], rows=rows)
    return time.perf_counter() - started


def main() -> None:
    """Ranks random embeddings and prints seconds and peak memory."""
    arguments = _parse_arguments()
    generator = torch.Generator().manual_seed(0)
    num_texts = arguments.images * arguments.texts_per_image
    images = torch.randn(arguments.images, arguments.width, generator=generator)
    noise = torch.randn(num_texts, arguments.width, generator=generator)
    image_of_text = torch.arange(arguments.images).repeat_interleave(arguments.texts_per_image)
    keys = torch.randint(arguments.distinct_texts, (num_texts,), generator=generator)
    texts = torch.nn.functional.normalize(images[image_of_text] + 6 * noise, dim=1).to(arguments.device)
    images = torch.nn.functional.normalize(images, dim=1).to(arguments.device)
    del noise
    before = _peak_gib()
    print(
        f"{arguments.images} images x {num_texts} texts, width {arguments.width}, {arguments.device}, both directions"
    )
    if arguments.workers > 1:
        seconds = _rank_share(images, texts, image_of_text, arguments.workers)
        print(f"ranking    {seconds:8.2f} s on one of {arguments.workers} workers")
        print(f"peak RSS   {_peak_gib():8.2f} GiB, of which {before:.2f} GiB before ranking")
        return

    started = time.perf_counter()
    result = image_text.image_text_recalls(images, texts, image_of_text, keys)
    ranking_seconds = time.perf_counter() - started
    peak = _peak_gib()
    started = time.perf_counter()
    intervals = image_text.bootstrap_interval(result)
    bootstrap_seconds = time.perf_counter() - started

    low, high = intervals["r_mean"]
    print(f"ranking    {ranking_seconds:8.2f} s")
    print(f"bootstrap  {bootstrap_seconds:8.2f} s for 1000 samples")
    print(f"peak RSS   {peak:8.2f} GiB, of which {before:.2f} GiB before ranking")
    print(f"full score matrix, float32: {arguments.images * num_texts * 4 / 2**30:.2f} GiB")
    print(f"r_mean {result.metrics['r_mean']:.2f} [{low:.2f}, {high:.2f}], text {result.metrics['r_mean_text']:.2f}")


if __name__ == "__main__":
    main()
