"""What a recipe says of the files in which other programs keep its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from harma_ray.config import RunConfig
from harma_ray.models.foreign import ForeignWeights
from harma_ray.task import StoredRun


@dataclass(frozen=True)
class Reading:
    """What is to become a run."""

    model: nn.Module
    """With the file's weights, on CPU."""
    config: RunConfig
    """The run's settings."""
    backbone: str
    """Fingerprint of the model's backbone."""
    text: str
    """What was read."""
    keeps_clip: bool = True
    """Whether the model's CLIP is written into the run's folder."""
    knows_activation: bool = True
    """Whether it is known which activation this CLIP was trained with."""


class ForeignFormat(ABC):
    """The files of a paper's own program."""

    settings: type[RunConfig]
    """Of runs that are written in this format."""
    needs_clip = False
    """Whether a file holds a part of a model alone, which goes on top of a CLIP that is given beside it."""

    @abstractmethod
    def recognise(self, weights: ForeignWeights) -> bool:
        """Tells whether a file is one of these."""

    @abstractmethod
    def describe(self, weights: ForeignWeights) -> str:
        """Says in a line what a file is."""

    @abstractmethod
    def load(self, weights: ForeignWeights, config: RunConfig) -> nn.Module:
        """Builds the model of a file, on CPU.

        Raises:
            UserError: If it does not fit, is part of a model alone, or the settings are of another recipe.
        """

    @abstractmethod
    def read(self, weights: ForeignWeights, config: RunConfig, kept: Path, clip: StoredRun | str | None) -> Reading:
        """Builds what an import makes a run of.

        Args:
            weights: The file's.
            config: Settings, of any recipe; sizes are taken from the file.
            kept: Where the model's CLIP will lie if the run is to keep it.
            clip: The CLIP beneath, for a format that needs one: a run, a file, or a tag of open_clip.

        Raises:
            UserError: As `load`, or if the CLIP is missing or another one.
        """

    @abstractmethod
    def check_export(self, run: StoredRun, format: str) -> None:
        """Raises UserError if a run cannot be written as ``released``, ``adapter`` or ``open_clip``."""

    @abstractmethod
    def write(self, model: Any, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes a model of a run, as it was after some epochs, as ``released``.

        Raises:
            UserError: If the paper's program could not read it right.
        """


def as_lines(notes: list[str]) -> str:
    """Returns notes as lines."""
    return "".join(f"{note}\n" for note in notes)
