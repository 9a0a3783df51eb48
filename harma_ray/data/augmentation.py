"""The settings of the random changes of training images, which `transforms` and `batch_transforms` make."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harma_ray.config import Count, Fraction

MAX_LEVEL = 10
_Part = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Augmentation:
    """The random changes of a training image; the defaults are the published ones (HarMA's code)."""

    min_scale: _Part = 0.5
    """Smallest part of the image's area that a crop keeps; 1 = no crop, the whole image is resized."""
    max_scale: _Part = 1.0
    """Largest part of the area that a crop keeps."""
    max_aspect_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4 / 3
    """A crop's width over height lies between 1 / this and this, log-uniformly."""
    flip_probability: Fraction = 0.5
    """How often the image is mirrored left to right."""
    num_operations: Count = 2
    """Operations drawn for an image, with replacement, from ``OPERATIONS``; 0 = none."""
    operation_probability: Fraction = 0.5
    """How often a drawn operation is really applied."""
    level: Annotated[float, Field(ge=0, le=MAX_LEVEL)] = 7.0
    """Strength of the operations: at 7, brightness and sharpness 1.36, shear 0.21, shift 7/224, 21 degrees."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ValueError(f"`min_scale` must not be above `max_scale`, got {self.min_scale} and {self.max_scale}")
