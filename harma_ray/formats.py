"""What a recipe says of the files in which other programs keep its weights.

A recipe needs a format only if its paper's own program has files: what is trained is written and read, and a plain CLIP
exported, for every recipe alike (`harma_ray.import_export`, `harma_ray.exports`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harma_ray.config import RunConfig
from harma_ray.errors import UserError

if TYPE_CHECKING:  # the parser of commands names the submissions, without torch
    import torch
    from torch import Tensor, nn

    from harma_ray.models.foreign import ForeignWeights
    from harma_ray.models.internvl.files import Extraction, Layout
    from harma_ray.models.towers import Preparation, Tower
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
    use: Sequence[str] = ("evaluate", "--data", "DATA")
    """A command for such a run, which is named behind it."""


@dataclass(frozen=True)
class Carried:
    """What a model needs that is shared as the folder of a run."""

    changes: Mapping[str, Any]
    """Settings by which it is built from the folder; paths that begin with ``./`` lie in there."""
    backbone: str
    """Fingerprint of what is built so."""
    text: str
    """What that is, in a sentence."""
    is_trained_further: bool = True
    """Whether the checkpoint's weights are to be loaded into what is built."""


@dataclass(frozen=True)
class Submission:
    """Answers to queries whose targets are not public, as files for an evaluation server."""

    name: str
    """Under which ``predict`` knows them."""
    text: str
    """What is written, in a sentence."""
    examples: str
    """Of the command."""
    split: str
    """The split that is answered unless another is named."""
    out: str
    """The folder that is written unless another is named."""
    write: Callable[..., tuple[list[Path], str]]
    """Writes them, see `harma_ray.recipes.clip4cir.submission.predict_cirr`; returns the files and a note on them."""


def require_clip(config: RunConfig) -> None:
    """Raises UserError if a recipe's backbone is no CLIP."""
    if not config.built_on_clip:
        raise UserError(f"recipe {config.recipe} is not built on a CLIP")


def no_vision() -> UserError:
    """Returns what is told of a model that no vision transformer can be taken out of."""
    return UserError(
        "the models of this run's recipe have no vision transformer of their own; export the model with launch.py "
        "checkpoint export"
    )


class ForeignFormat(ABC):
    """The files of a paper's own program."""

    settings: type[RunConfig]
    """Of runs that are written in this format."""
    marks: Sequence[str] = ()
    """Tensors one of which its models have, and nothing else; none: they are found as CLIPs."""
    tags: Sequence[str] = ()
    """What the hub should find models under; the first is the task."""
    part: str = ""
    """What of a model a file holds, if that goes on top of a CLIP which is given beside it; empty: all of it."""

    @abstractmethod
    def claim(self, weights: ForeignWeights) -> ForeignWeights | None:
        """Returns a file's weights under the names of the paper's program, if it is one of these, else None."""

    def claim_folder(self, folder: Path) -> ForeignWeights | None:
        """Returns the names and shapes of a folder's tensors if it is one of these, else None; none is by default.

        Raises:
            UserError: If it is, but its files are damaged or do not agree.
        """
        return None

    @abstractmethod
    def describe(self, weights: ForeignWeights) -> str:
        """Says in a line what a file, or a folder, is."""

    def sizes(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Returns lines on the sizes of what the paper adds, under its program's names or this one's."""
        return []

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
            weights: What `claim` returned.
            config: Settings, of any recipe; sizes are taken from the file.
            kept: Where the model's CLIP will lie if the run is to keep it.
            clip: The CLIP beneath, for a `part` that needs one: a run, a file, or a tag of open_clip.

        Raises:
            UserError: As `load`, or if the CLIP is missing or another one.
        """

    @abstractmethod
    def preparation(self, model: Any, run: StoredRun) -> Preparation:
        """Returns how the images of a run's model are prepared."""

    @abstractmethod
    def towers(self, model: Any, run: StoredRun) -> Sequence[Tower]:
        """Returns the parts of a run's model that are written as graphs, by which images and texts become vectors."""

    @abstractmethod
    def write(self, model: Any, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes a model of a run, as it was after some epochs, as ``released``.

        Raises:
            UserError: If the paper's program could not read it right.
        """

    def carry(self, model: Any, folder: Path, run: StoredRun) -> Carried | None:
        """Writes into a folder what a run's model is built from, for models on no CLIP; None, as by default: a CLIP."""
        return None

    def write_vision(self, model: Any, folder: Path, layout: Layout, dtype: torch.dtype) -> Extraction:
        """Writes the vision transformer of a run's model alone into a folder, for recipes that have one.

        Args:
            model: The model.
            folder: Is made; its configuration and weights are written into it.
            layout: Whose names they have.
            dtype: Of the numbers.

        Raises:
            UserError: If the recipe's models have none, or the layout has no place for what it has.
        """
        raise no_vision()
