"""The tasks of the recipes, and the files that their papers' own programs write."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harma_ray.config import RunConfig
from harma_ray.formats import ForeignFormat, require_clip
from harma_ray.models.backbones import ClipBackbone
from harma_ray.recipes.clip4cir.config import CombinerConfig, FinetuneConfig
from harma_ray.recipes.clip4cir.released import Clip4CirFile
from harma_ray.recipes.clip4cir.task import Clip4CirTask
from harma_ray.recipes.harma.config import HarmaConfig
from harma_ray.recipes.harma.released import HarmaFile
from harma_ray.recipes.harma.task import HarmaTask
from harma_ray.recipes.vitp.config import VitpConfig
from harma_ray.recipes.vitp.released import InternVLFile
from harma_ray.recipes.vitp.task import VitpTask
from harma_ray.task import Task

TASKS: Mapping[type[RunConfig], Callable[[Any], Task]] = {
    HarmaConfig: HarmaTask,
    FinetuneConfig: Clip4CirTask,
    CombinerConfig: Clip4CirTask,
    VitpConfig: VitpTask,
}
"""What is built from settings of a kind."""

FORMATS: Sequence[ForeignFormat] = (HarmaFile(), Clip4CirFile(), InternVLFile())
"""The files and folders of other programs, asked in this order."""


def clip_backbone(config: RunConfig) -> ClipBackbone:
    """Returns the CLIP that a recipe is built on.

    Raises:
        UserError: If it is built on something else.
    """
    require_clip(config)
    backbone = TASKS[type(config)](config).backbone
    assert isinstance(backbone, ClipBackbone)
    return backbone
