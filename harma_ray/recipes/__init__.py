"""Recipes: a name, published settings, and the task they train. To add one, add a module and name it here."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.config import PublishedFigures, RunConfig
from harma_ray.errors import UserError
from harma_ray.formats import ForeignFormat, Submission
from harma_ray.recipes.clip4cir import config as clip4cir_config
from harma_ray.recipes.clip4cir import queries as clip4cir_queries
from harma_ray.recipes.clip4cir.released import Clip4CirFile
from harma_ray.recipes.clip4cir.submission import CIRR_TEST
from harma_ray.recipes.clip4cir.task import Clip4CirTask
from harma_ray.recipes.harma import config as harma_config
from harma_ray.recipes.harma.released import HarmaFile
from harma_ray.recipes.harma.task import HarmaTask
from harma_ray.recipes.vitp import config as vitp_config
from harma_ray.recipes.vitp.released import InternVLFile
from harma_ray.recipes.vitp.task import VitpTask
from harma_ray.settings import build_config, load_yaml
from harma_ray.task import Task

RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    **harma_config.RECIPES,
    **clip4cir_config.RECIPES,
    **vitp_config.RECIPES,
}
"""Functions that return a recipe's published settings."""

PUBLISHED: Mapping[str, Sequence[PublishedFigures]] = {**harma_config.PUBLISHED, **clip4cir_config.PUBLISHED}
"""What the papers say that recipes reach, by recipe; those that are left out have no published figures."""

_TASKS: Mapping[type[RunConfig], Callable[[Any], Task]] = {
    harma_config.HarmaConfig: HarmaTask,
    clip4cir_config.FinetuneConfig: Clip4CirTask,
    clip4cir_config.CombinerConfig: Clip4CirTask,
    vitp_config.VitpConfig: VitpTask,
}

FORMATS: Sequence[ForeignFormat] = (HarmaFile(), Clip4CirFile(), InternVLFile())
"""The files and folders of other programs, asked in this order."""

QUERIES: Mapping[str, str] = {**clip4cir_queries.QUERIES}
"""Ways in which queries can be made, and what they are; see `harma_ray.task.Task.queries`."""

SUBMISSIONS: Sequence[Submission] = (CIRR_TEST,)
"""What ``predict`` writes."""


def recipe_config(name: str) -> RunConfig:
    """Returns a recipe's settings.

    Raises:
        UserError: If there is no such recipe.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2) or list(RECIPES)
        raise UserError(f"unknown recipe `{name}`; did you mean {' or '.join(near)}? (all: {', '.join(RECIPES)})")
    return RECIPES[name]()


def load_config(path: str | Path) -> RunConfig:
    """Reads a configuration file, such as the ``config.yaml`` of a run; what it leaves out is the recipe's.

    Raises:
        UserError: If the file names no recipe, or for any key or value that does not fit.
    """
    raw = load_yaml(path)
    if not isinstance(raw.get("recipe"), str):
        raise UserError(f"{path} must name its `recipe`; there are {', '.join(RECIPES)}")
    return build_config(recipe_config(raw["recipe"]), raw, origin=str(path))


def make_task(config: RunConfig) -> Task:
    """Returns the task that a configuration describes."""
    return _TASKS[type(config)](config)
