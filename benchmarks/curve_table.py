"""The table of learning curves that benchmarks/curves.py makes, as trainings that cost nothing but counted epochs.

A tuner searches a continuous learning rate and the grid's other values; the table answers with the nearest setting that
was trained: by the logarithm of the rate and the other values, each in parts of its range. So a table of part of the
grid serves too; what is called the grid's best is then that of the settings that were trained.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

RATE, MARGIN, GAMMA, WIDTH = NAMES = ("optim.learning_rate", "loss.margin", "loss.gamma", "adapter.width")


class BudgetSpent(Exception):
    """All epochs of a search are trained."""


class CurveTable:
    """Learning curves of settings."""

    def __init__(self, path: Path):
        """Reads the settings that the first seed has, and the seeds that have them all."""
        curves: dict[int, dict[tuple, dict[int, float]]] = {}
        for row in pq.read_table(path).to_pylist():
            setting = tuple(row[name] for name in NAMES)
            curves.setdefault(row["seed"], {}).setdefault(setting, {})[row["epoch"]] = row["r_mean"]
        self.settings = sorted(curves[0])
        self.grid = {name: sorted({point[place] for point in self.settings}) for place, name in enumerate(NAMES)}
        whole = [known for _, known in sorted(curves.items()) if known.keys() >= curves[0].keys()]
        self.values = np.array([[[v for _, v in sorted(c[s].items())] for s in self.settings] for c in whole])
        """Val r_mean: float[seeds, settings, epochs]."""
        self._places = np.array([self._place(dict(zip(NAMES, point, strict=True))) for point in self.settings])

    @property
    def epochs(self) -> int:
        """Epochs of a training."""
        return self.values.shape[-1]

    @property
    def seeds(self) -> int:
        """Seeds of training."""
        return len(self.values)

    @property
    def total(self) -> int:
        """Epochs of all settings."""
        return math.prod(self.values.shape[1:])

    @property
    def reached(self) -> np.ndarray:
        """What each setting reaches, its best epoch: float[seeds, settings]."""
        return self.values.max(axis=-1)

    @property
    def rates(self) -> tuple[float, float]:
        """The range of learning rates."""
        return self.grid[RATE][0], self.grid[RATE][-1]

    def nearest(self, params: Mapping[str, Any]) -> int:
        """Returns the number of the nearest setting."""
        return int(np.square(self._places - self._place(params)).sum(axis=1).argmin())

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the published setting's values, each the nearest that the grid has."""
        return {name: min(self.grid[name], key=lambda known: abs(known - config[name])) for name in NAMES}

    def _place(self, params: Mapping[str, Any]) -> np.ndarray:
        ends = {name: (known[0], known[-1]) for name, known in self.grid.items()}
        parts = [(params[name] - ends[name][0]) / (ends[name][1] - ends[name][0]) for name in NAMES[1:]]
        low, high = ends[RATE]
        return np.array([math.log(params[RATE] / low) / math.log(high / low), *parts])


class Trainings:
    """The trainings of one search, one after another; counts epochs and keeps the best."""

    def __init__(self, table: CurveTable, seed: int, budget: int):
        """Takes the table, which of its seeds is trained with, and the most epochs."""
        self.table, self.seed, self.budget, self.spent = table, seed, budget, 0
        self.trace: list[tuple[int, float, int]] = []
        """Epochs spent, best value and its setting, whenever there was a better one."""

    def walk(self, params: Mapping[str, Any], done: int = 0) -> Iterator[tuple[int, float]]:
        """Trains a setting, as it would be trained: also if the table has answered with the same curve before.

        Args:
            params: The setting.
            done: Epochs of an earlier walk that this one goes on from.

        Yields:
            Each epoch, and the best value up to it.

        Raises:
            BudgetSpent: When another epoch would cost too much.
        """
        number = self.table.nearest(params)
        best = np.maximum.accumulate(self.table.values[self.seed, number])
        for epoch, value in enumerate(best.tolist(), 1):
            if epoch <= done:
                continue
            if self.spent >= self.budget:
                raise BudgetSpent
            self.spent += 1
            if not self.trace or value > self.trace[-1][1]:
                self.trace.append((self.spent, value, number))
            yield epoch, value
