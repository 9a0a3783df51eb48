"""Where a run's figures go beside its record, and under which names: those in ``main`` are looked at first."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image
from tabulate import tabulate

from harma_ray.evaluation import Metrics, Projection

KEY_SETTINGS = ("optim.learning_rate", "train.global_batch_size", "train.epochs", "seed")
"""Settings by which runs are told apart, beside those that were changed."""


@dataclass(frozen=True)
class Label:
    """What a run is called where it is one of many."""

    name: str
    home: Path
    """The folder that it lies in with others."""
    group: str = ""
    """The search that it is part of."""
    repeats: str = ""
    """The same for runs that differ in the seed alone."""
    settings: tuple[str, ...] = ()
    """Dotted names of the settings that were searched, or set by hand."""

    @classmethod
    def of(cls, run_dir: Path, settings: tuple[str, ...] = ()) -> Self:
        """Returns the label of a run that stands by itself."""
        return cls(run_dir.name, run_dir.parent, settings=settings)

    @property
    def shown(self) -> tuple[str, ...]:
        """The settings by which it is compared with others."""
        return tuple(dict.fromkeys((*self.settings, *KEY_SETTINGS)))


class Sink:
    """A place that figures go to; it leaves what it has no use for."""

    def log(self, curves: Mapping[str, float], step: int) -> None:
        """Adds a point to each of some curves, after so many optimiser steps."""

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, in Markdown."""

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Adds a picture."""

    def log_embeddings(self, points: Projection, step: int) -> None:
        """Adds points."""

    def log_results(self, figures: Mapping[str, float], step: int) -> None:
        """Takes the final figures, by names such as ``final/test_r_mean``."""

    def close(self, *, done: bool) -> None:
        """Writes what is left; `done`: the training has ended, else it may go on later."""


def step_curves(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the curves of what is recorded of a step; a loss of a single term is not shown a second time."""
    terms = [name for name in values if name.startswith("loss_")]
    left_out = set(terms) if len(terms) == 1 else set()
    main = ("loss", "learning_rate")
    return {f"{'main' if name in main else 'train'}/{name}": v for name, v in values.items() if name not in left_out}


def weight_curves(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the curves of what a task watches of its model."""
    return {f"weights/{name}": value for name, value in values.items()}


def evaluation_curves(split: str, found: Mapping[str, float], metrics: Metrics, best: float) -> dict[str, float]:
    """Returns the curves of an evaluation: the metrics that select checkpoints are in ``main``.

    Args:
        split: What was evaluated.
        found: Its figures.
        metrics: What they are.
        best: The best objective so far: at the end, that of the weights that are picked.
    """
    named = {(f"main/{split}_" if name in metrics.kept else f"{split}/") + name: found[name] for name in found}
    return {f"main/best_{split}_{metrics.objective}": best, **named}


def final_points(split: str, found: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
    """Returns what is shown among the curves of a split that is evaluated once."""
    return {f"main/{split}_{name}": found[name] for name in metrics.kept if name in found}


def final_table(results: Mapping[str, Mapping[str, float]], metrics: Metrics) -> str:
    """Returns the final figures as a table in Markdown: a row for each metric, a column for each split."""
    names = dict.fromkeys(name for found in results.values() for name in found)
    rows = []
    for name in names:
        figures = [metrics.show(name, found[name]) if name in found else "" for found in results.values()]
        rows.append([name, metrics.labels.get(name, ""), *figures])
    align = ["left", "left", *["right"] * len(results)]
    return tabulate(rows, ["metric", "", *results], tablefmt="github", disable_numparse=True, colalign=align)
