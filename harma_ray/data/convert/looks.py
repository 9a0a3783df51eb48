"""How images look in a few numbers: enough to tell that something went wrong with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

SIDE = 8
"""An image is looked at as the means of this many squares each way."""
DARK = 16
"""An image is black if all its squares are below this, of 255."""
BRIGHT = 239
"""An image is white if all its squares are above this, of 255."""
SPREAD = 4.0
"""Images are alike if a square differs by less than this from image to image, of 255 (root mean square)."""
FEWEST = 8
"""Fewer images are not said to be alike."""
WARN_FRACTION = 0.05
"""A warning comes when more than this part of the images is black, or white."""

_NUMBERS = SIDE * SIDE * 3


@dataclass
class Looks:
    """Sums over images; cheap to make, and those of parts can be added."""

    images: int = 0
    """Number of images."""
    black: int = 0
    """Number of those that are black."""
    white: int = 0
    """Number of those that are white."""
    total: list[int] = field(default_factory=lambda: [0] * _NUMBERS)
    """Sums of each square's red, green and blue."""
    squared: list[int] = field(default_factory=lambda: [0] * _NUMBERS)
    """Sums of their squares."""

    def add(self, image: Image.Image) -> None:
        """Counts an RGB image."""
        squares = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.int64).ravel()
        self.images += 1
        self.black += bool(squares.max() < DARK)
        self.white += bool(squares.min() > BRIGHT)
        self.total = (np.array(self.total) + squares).tolist()
        self.squared = (np.array(self.squared) + squares**2).tolist()

    def __add__(self, other: Looks) -> Looks:
        return Looks(
            self.images + other.images,
            self.black + other.black,
            self.white + other.white,
            [a + b for a, b in zip(self.total, other.total, strict=True)],
            [a + b for a, b in zip(self.squared, other.squared, strict=True)],
        )

    @property
    def spread(self) -> float:
        """How much a square differs from image to image: root mean square over squares and colours, 0 to 127.5."""
        if not self.images:
            return 0.0
        total, squared = np.array(self.total, np.float64), np.array(self.squared, np.float64)
        return math.sqrt(max(0.0, float((squared / self.images - (total / self.images) ** 2).mean())))

    def warnings(self) -> list[str]:
        """Returns what a user should look at."""
        found = []
        for count, name, limit in ((self.black, "black", f"below {DARK}"), (self.white, "white", f"above {BRIGHT}")):
            if count > WARN_FRACTION * self.images:
                found.append(f"{count:,} of {self.images:,} images look {name} (all parts {limit} of 255)")
        if self.images >= FEWEST and self.spread < SPREAD:
            found.append(
                f"all {self.images:,} images look alike (their parts differ by {self.spread:.1f} of 255; "
                f"below {SPREAD:g} is suspicious)"
            )
        return found
