"""What a recipe's pretrained part is, known before any of its weights are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Backbone(ABC):
    """A pretrained part: how it is called, built and fed, and what tells it from others."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is: backbones of equal names are built equal."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square images that it takes, in pixels."""

    @property
    @abstractmethod
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the RGB channels, in [0, 1], by which images are normalised."""

    @abstractmethod
    def tokenizer(self) -> Callable[..., Any]:
        """Returns what turns a list of B texts into int64[B, L]."""

    @abstractmethod
    def build(self, *, writable: bool = True) -> nn.Module:
        """Returns it on CPU, before anything is added or frozen.

        Args:
            writable: Whether its weights are going to be trained; where they are not they may be shared, read-only.

        Raises:
            UserError: If its weights cannot be read, or do not fit.
        """

    @abstractmethod
    def outline(self) -> nn.Module:
        """Returns it without its weights, on torch's meta device: names and sizes alone."""

    @abstractmethod
    def fingerprint(self, model: nn.Module) -> str:
        """Returns what tells its weights, as a built model holds them, from all others."""

    def check(self) -> None:  # noqa: B027
        """Raises UserError for weights that cannot be its own, as far as shows without loading them."""

    def require_named(self, recipe: str) -> None:  # noqa: B027
        """Raises UserError unless somebody said which weights it has; for recipes that keep it frozen."""

    def notes(self) -> tuple[str, ...]:
        """Returns what is done to find it in its file."""
        return ()
