"""What is checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harma_ray.config import RunConfig, build_config, disk_settings
from harma_ray.data.order import planned_order
from harma_ray.data.schema import list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import kept_path
from harma_ray.recipes import make_task


def check_data(config: RunConfig, metrics: Sequence[str] = ()) -> list[str]:
    """Checks, before any worker starts, that the splits are there and the model can be described.

    Args:
        config: Settings.
        metrics: Metrics that a search compares, beside the recipe's objective.

    Returns:
        What the user should know, a line each.

    Raises:
        UserError: If they are not, or the splits have other metrics.
    """
    data = config.data
    if not data.path:
        raise UserError("no data set is given; use --data FOLDER (made by `launch.py convert`)")
    order = planned_order(config)
    evaluated = [open_split(data.path, data.val_split if config.train.select_on == "val" else data.test_split)]
    notices: list[str] = []
    if data.test_split not in list_splits(data.path):
        notices.append(f"{data.path} has no split `{data.test_split}`, so nothing is evaluated on it at the end")
    elif data.test_split != evaluated[0].name:
        evaluated.append(open_split(data.path, data.test_split))
    make_task(config).check(order.split, evaluated, metrics)
    return notices


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns settings whose paths do not depend on the working folder.

    Raises:
        UserError: If one leads into the copy of a working folder that a Ray job runs in.
    """
    changes: dict[str, Any] = {}
    if config.data.path:
        changes["data.path"] = str(kept_path(config.data.path, "the data set"))
    for name, (value, mark) in disk_settings(config).items():
        if Path(value).suffix or mark.is_there(Path(value).expanduser()):  # no tag of open_clip's has a suffix
            path = kept_path(value, f"`{name}`")
            if mark.is_there(path):
                changes[name] = str(path)
    return build_config(config, changes)
