"""Recipes: a name, published settings, and the task they train.

To add one, add a folder, and name its settings here and its task in `harma_ray.recipes.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harma_ray.config import Incidental, RunConfig
from harma_ray.errors import UserError
from harma_ray.evaluation import PublishedFigures
from harma_ray.formats import Submission
from harma_ray.recipes.clip4cir import commands as clip4cir_commands
from harma_ray.recipes.clip4cir import config as clip4cir_config
from harma_ray.recipes.harma import config as harma_config
from harma_ray.recipes.vitp import config as vitp_config
from harma_ray.settings import (
    build_config,
    explain_unknown,
    flat_settings,
    load_yaml,
    marked_settings,
    require_effect,
    to_dict,
)

if TYPE_CHECKING:
    from harma_ray.task import Task

RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    **harma_config.RECIPES,
    **clip4cir_config.RECIPES,
    **vitp_config.RECIPES,
}
"""Functions that return a recipe's published settings."""

PUBLISHED: Mapping[str, Sequence[PublishedFigures]] = {**harma_config.PUBLISHED, **clip4cir_config.PUBLISHED}
"""What the papers say that recipes reach, by recipe; those that are left out have no published figures."""

QUERIES: Mapping[str, str] = {**clip4cir_commands.QUERIES}
"""Ways in which queries can be made, and what they are; see `harma_ray.task.Task.queries`."""

SUBMISSIONS: Sequence[Submission] = (clip4cir_commands.CIRR_TEST,)
"""What ``predict`` writes."""


def recipe_config(name: str) -> RunConfig:
    """Returns a recipe's settings.

    Raises:
        UserError: If there is no such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe `{name}`; {explain_unknown(name, RECIPES)} (`launch.py recipes` lists all)")
    return RECIPES[name]()


def load_config(path: str | Path) -> RunConfig:
    """Reads a configuration file, such as the ``config.yaml`` of a run; what it leaves out is the recipe's.

    Raises:
        UserError: If the file names no recipe, or for any key or value that does not fit.
    """
    raw = load_yaml(path)
    if not isinstance(raw.get("recipe"), str):
        raise UserError(f"{path} must name its `recipe`; there are {', '.join(RECIPES)}")
    config = build_config(recipe_config(raw["recipe"]), raw, origin=str(path))
    require_effect(config, raw, origin=str(path))
    return config


def changed_settings(config: RunConfig) -> tuple[str, ...]:
    """Returns the dotted names of settings that are not the recipe's, without those that change no figure."""
    published = flat_settings(to_dict(recipe_config(config.recipe)))
    incidental = tuple(f"{name}." for name in marked_settings(config, Incidental))
    return tuple(
        name
        for name, value in flat_settings(to_dict(config)).items()
        if value != published[name] and not f"{name}.".startswith(incidental)
    )


def make_task(config: RunConfig) -> Task:
    """Returns the task that a configuration describes."""
    from harma_ray.recipes.tasks import TASKS  # torch: what is wrong with settings is told without

    return TASKS[type(config)](config)
