"""What several commands share: options, and the configuration that they add up to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from harma_ray.errors import UserError

if TYPE_CHECKING:
    from harma_ray.config import RunConfig
    from harma_ray.data.rendering import Rendering

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `argparse` adds commands to."""


def make_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], None], text: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """Adds a command that calls `function` with the parsed options."""
    parser = commands.add_parser(
        name, help=text[0].lower() + text[1:].rstrip("."), description=text, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run_command=function)
    return parser


def add_address(parser: argparse.ArgumentParser) -> None:
    """Adds ``--address``."""
    parser.add_argument(
        "--address",
        help="Ray cluster to join, such as auto (default: RAY_ADDRESS, or a cluster of "
        "this machine's own for as long as the command runs)",
    )


def add_rendering(parser: argparse.ArgumentParser, *, split: bool) -> None:
    """Adds the options that say how images of more than 8 bits are shown; `split`: statistics of a split may be."""
    group = parser.add_argument_group("images of more than 8 bits (or of five and more bands)")
    group.add_argument(
        "--stretch", metavar="RULE", help="how their numbers become 0..255: none (they are already), bits (0 to "
        "2^n - 1; n as the split's, or train's, largest number needs, or bits:11), minmax (each band between its "
        "smallest and largest number, or minmax:0,3000), percentile (each band between its 2nd and 98th, or "
        "percentile:1,99)"
    )  # fmt: skip
    group.add_argument("--bands", metavar="R,G,B", help="which bands are red, green, blue, counted from 1, such as "
                       "3,2,1 (default: as the file says, or its only one or three)")  # fmt: skip
    group.add_argument("--nodata", metavar="VALUES", help="numbers that stand for no data, beside NaN and what a "
                       "file's tag says, such as --nodata=-9999; they take no part in statistics and become black; "
                       "none: values such as -9999 are measurements")  # fmt: skip
    if split:
        group.add_argument("--statistics", choices=["image", "split"], help="what minmax and percentile are taken of: "
                           "each image, or all images of the split, or of train if that is converted by the same rule "
                           "before (default: image)")  # fmt: skip


def rendering_from(options: argparse.Namespace) -> Rendering | None:
    """Returns the rule that the options of `add_rendering` make, None if none is given."""
    from harma_ray.data.rendering import Rendering

    statistics = getattr(options, "statistics", None)
    return Rendering.parse(bands=options.bands, stretch=options.stretch, nodata=options.nodata, statistics=statistics)


def add_scaling(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Adds ``--workers``, ``--gpu`` and ``--cpu``; `default` says how many workers there are without."""
    parser.add_argument("--workers", type=int, metavar="N", help=f"workers (default: {default})")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--gpu`` and ``--cpu``."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu", action="store_true", help="every worker takes a GPU (default: if there is one)")
    device.add_argument("--cpu", action="store_true", help="no worker takes a GPU")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds ``--precision``."""
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="precision of the figures (default: the settings' "
        "train.eval_precision, which is fp32 unless they say otherwise); bf16 is faster on GPUs and moves ranks",
    )  # fmt: skip


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Adds ``--metric``."""
    parser.add_argument(
        "--metric", metavar="NAME", help="take the run's checkpoint that is best by this metric on val (default: the "
        "recipe's; selection.also_keep keeps others)",
    )  # fmt: skip


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds ``--set``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a setting, such as optim.learning_rate=2e-4; may be repeated",
    )  # fmt: skip


def require_workers(workers: int | None) -> None:
    """Raises UserError for a number of ``--workers`` that is none."""
    if workers is not None and workers < 1:
        raise UserError(f"`--workers` must be at least 1, got {workers}")


def config_from(options: argparse.Namespace) -> RunConfig:
    """Returns the configuration of ``--config`` or ``--recipe`` with the changes asked for."""
    from harma_ray.recipes import load_config, recipe_config
    from harma_ray.settings import build_config, require_effect

    base = load_config(options.config) if options.config else recipe_config(options.recipe)
    if getattr(options, "source", None):
        base = build_config(base, source_changes(options, base), origin="--from")
    changes = changes_from(options)
    config = build_config(base, changes)
    require_effect(config, changes)
    return config


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds ``--from``."""
    parser.add_argument(
        "--from", metavar="RUN", dest="source", help="start from the weights of a run: its best ones, or the best by "
        "--metric; a run of the recipe's earlier stage is built on",
    )  # fmt: skip
    add_metric(parser)


def source_changes(options: argparse.Namespace, base: RunConfig) -> dict[str, Any]:
    """Returns the settings by which a new run builds on the run of ``--from``, or starts from its weights."""
    from harma_ray.runs import open_run

    run, adopts = open_run(options.source), not getattr(options, "config", None)
    run.best_start(options.metric)
    earlier = base.after(run, options.metric)
    if earlier:
        return earlier
    run.require_related(base)
    from harma_ray.preflight import starting_from  # torch

    return starting_from(run, base, options.metric, adopts=adopts)


def changes_from(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that options change, by dotted name.

    Raises:
        UserError: If an assignment of ``--set`` or the number of ``--workers`` is none.
    """
    from harma_ray.settings import add_setting, parse_overrides

    changes = parse_overrides(options.overrides)
    if getattr(options, "workers", None) is not None:
        require_workers(options.workers)
        add_setting(changes, "scaling.num_workers", options.workers, "--workers")
    if options.gpu or options.cpu:
        add_setting(changes, "scaling.use_gpu", options.gpu, "--gpu" if options.gpu else "--cpu")
    if getattr(options, "precision", None):
        add_setting(changes, "train.eval_precision", options.precision, "--precision")
    if options.data:
        add_setting(changes, "data.path", str(Path(options.data).expanduser().absolute()), "--data")
    return changes
