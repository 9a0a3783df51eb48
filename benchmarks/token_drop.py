"""Supervised tokens per second and peak memory of ViTP's steps, with image tokens dropped and without.

Run: python benchmarks/token_drop.py [--talks 32] [--batch 8] [--tiles 36] [--steps 3] [--ratio 0.75]
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harma_ray.config import RunConfig
from harma_ray.data.convert.commands import convert_scenes_talk
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, local_batches
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.optim import build_optimizer
from harma_ray.training.step import autocast_of, local_worker, train_step


@dataclass(frozen=True)
class Measured:
    """What steps took."""

    seconds: float
    supervised: int
    """Supervised tokens."""
    dropped_percent: float
    """Tokens that the language model was spared."""
    peak_mb: float
    """Highest memory of the process, or of its GPU."""
    own_mb: float
    """Of it, what the steps took beyond the model, its optimiser and the batches."""


class Steps:
    """Training steps over batches that are read and decoded beforehand."""

    def __init__(self, config: RunConfig, steps: int):
        """Reads the batches and builds the model."""
        worker = local_worker(config)
        self._config, self._task, self._device = config, make_task(config), torch.device(worker.device)
        self._model = self._task.new_model().to(self._device).train()
        groups = self._task.parameter_groups(self._model, config.optim)
        self._optimizer = build_optimizer(groups, config.optim, self._device)
        stream = TrainingStream(
            planned_order(config), self._task.transform(training=True), config.data, worker, local_batches
        )
        batches = stream.steps(0, 1000)
        self._batches = [next(batches) for _ in range(steps)]
        batches.close()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        on_gpu = self._device.type == "cuda"
        self._held = torch.cuda.memory_allocated() if on_gpu else pages * resource.getpagesize()

    def run(self) -> Measured:
        """Takes the steps once."""
        begin, supervised, dropped = time.perf_counter(), 0, 0.0
        for number, batch in enumerate(self._batches):
            self._task.begin_step(number)
            train_step(
                self._task, self._model, [batch], self._config.train, autocast_of(self._config.train, self._device)
            )
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            supervised += int(self._task.counted(batch))
            dropped += self._task.monitor(self._model)["dropped_percent"] / len(self._batches)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        return Measured(time.perf_counter() - begin, supervised, dropped, peak, peak - self._held / 2**20)


def serve(config: RunConfig, steps: int, pipe: Any) -> None:
    """Takes the steps in a process of its own, as often as it is asked to, so that its peak memory is its own."""
    measured = Steps(config, steps)
    measured.run()  # warms up
    while pipe.recv():
        pipe.send(measured.run())


def main() -> None:
    """Measures both in turns and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("talks", 32), ("batch", 8), ("tiles", 36), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ratio", type=float, default=0.75)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        convert_scenes_talk(Path(name) / "data", {"train": options.talks}, style="summer", size=256)
        changes = {
            "data.path": str(Path(name) / "data"), "train.global_batch_size": options.batch,
            "talk.max_tiles": options.tiles, "talk.max_tokens": 4096,
        }  # fmt: skip
        ways = {"whole": {"token_drop.preset": "none"}, "dropped": {"token_drop.ratio": options.ratio}}
        ends, found = {}, {way: [] for way in ways}
        for way, own in ways.items():
            ends[way], other = context.Pipe()
            config = build_config(recipe_config("scenes-vitp"), {**changes, **own})
            context.Process(target=serve, args=(config, options.steps, other), daemon=True).start()
        for _ in range(3):  # in turns: the machine may be slower at one time than at another
            for way, end in ends.items():
                end.send(True)
                found[way].append(end.recv())
        for end in ends.values():
            end.send(False)
    rates = {}
    for way, runs in found.items():
        best = min(runs, key=lambda run: run.seconds)
        rates[way] = best.supervised / best.seconds
        print(
            f"{way:8} {rates[way]:8.0f} supervised tokens/s, {best.dropped_percent:4.1f} % of the tokens dropped, "
            f"peak {best.peak_mb:,.0f} MiB, of which the steps {best.own_mb:,.0f}"
        )
    print(f"dropped is {rates['dropped'] / rates['whole']:.2f} times as fast")


if __name__ == "__main__":
    main()
