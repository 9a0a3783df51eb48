"""Statistics that the pictures of a split rest on: of its own rasters, or those of the data set's train split."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from harma_ray.data.convert.records import SPLITS
from harma_ray.data.convert.shards import ShardPlan, disk_error
from harma_ray.data.image_reading import measured
from harma_ray.data.images import BadImage
from harma_ray.data.raster_statistics import SplitStatistics
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.files import atomic

_TRAIN = SPLITS[0]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Where the statistics of a shard's rasters lie."""

    file: str
    """Name of the shard."""
    path: Path
    """The histograms, as `SplitStatistics.to_bytes` gives them."""


def with_statistics_of_train(rule: Rendering | None, split: Path) -> Rendering | None:
    """Returns the rule of a split: with the statistics of the train split beside it, if it rests on any.

    All splits of a data set are scaled alike then. Without a train split that was rendered by the same rule nothing is
    changed.
    """
    if rule is None or not rule.needs_split or split.name == _TRAIN:
        return rule
    try:
        rendered = open_split(split.parent, _TRAIN).manifest.rendered
    except UserError:
        return rule
    there = Rendering.from_dict(rendered.rule) if rendered is not None and rendered.rule is not None else None
    if there is None or replace(there, limits=None).to_dict() != rule.to_dict():
        return rule
    return there


def measure_shard(plan: ShardPlan) -> Measured:
    """Counts the numbers of a shard's rasters for the statistics of the split, unless an earlier run has.

    An image that cannot be read takes no part; it is told when the shard is written.
    """
    path = plan.path.with_name(f".{plan.path.name}.{plan.fingerprint[:16]}.statistics.npz")
    if path.exists():
        return Measured(plan.path.name, path)
    statistics, rule = SplitStatistics(), plan.images.rendering
    assert rule is not None
    for _, place in dict.fromkeys(image for record in plan.records for image in record.images):
        if isinstance(place, Path):
            with suppress(BadImage):
                raster = measured(place, rule, resize=plan.images.resize, max_pixels=plan.images.max_pixels)
                if raster is not None:
                    statistics.add(raster)
    try:
        with atomic(path) as file:
            file.write_bytes(statistics.to_bytes())
    except OSError as error:
        raise disk_error(path, error) from error
    return Measured(plan.path.name, path)


def resolve(rule: Rendering, split: Path, parts: Iterable[Measured]) -> Rendering:
    """Returns a rule with the limits that the statistics of all shards of a split together give it."""
    statistics = SplitStatistics()
    for part in sorted(parts, key=lambda part: part.file):
        statistics.merge(SplitStatistics.from_bytes(part.path.read_bytes()))
    if statistics.bands and split.name != _TRAIN:
        _logger.warning(
            "%s: rasters are scaled by the split's own statistics, for no split `%s` beside it was rendered by %s: "
            "convert that one first if they belong together", split, _TRAIN, rule.options,
        )  # fmt: skip
    return statistics.resolve(rule)
