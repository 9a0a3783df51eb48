"""``tune``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harma_ray.cli import shared
from harma_ray.errors import UserError
from harma_ray.files import RUNS
from harma_ray.tune.space.places import find_space, search_folder

if TYPE_CHECKING:
    from harma_ray.cli.search_options import SearchOptions
    from harma_ray.tune.space.definition import SearchDefinition


def add_commands(commands: shared.Commands) -> None:
    """Adds ``tune``."""
    parser = shared.make_command(
        commands, "tune", _tune, "Search for better settings: Ray Tune runs trials, Optuna proposes them.",
        "examples:\n  launch.py tune search_spaces/harma.yaml --data data/rsitmd --hours 8\n"
        "  launch.py tune --resume runs/NAME --trials 80\n"
        "  launch.py tune --resume runs/NAME --confirm 3\n"
        "  launch.py tune report runs/NAME --out report",
    )  # fmt: skip
    parser.usage = "%(prog)s FILE --data FOLDER [options] | --resume SEARCH [options] | report SEARCH"
    parser.add_argument(
        "what",
        nargs="*",
        metavar="FILE",
        help="YAML search space, or the name of one of search_spaces, such as harma; or the word `report` and a "
        "search's folder: write its report as it stands",
    )
    parser.add_argument("--resume", metavar="SEARCH", help="go on with a search; limits may be raised")
    shared.add_source(parser)
    parser.add_argument("--data", help="folder of the converted data set (data.path); with --resume, where it lies now")
    parser.add_argument("--runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of the search (default: recipe and time)")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all (default: the file's)")
    parser.add_argument("--hours", type=float, metavar="H", help="end after so many hours (default: the file's)")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="end after so many epochs over all trials (default: the file's)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="end after so many steps over all trials, where "
                        "`train.steps` is set (default: the file's)")  # fmt: skip
    parser.add_argument("--concurrent", type=int, metavar="K", help="trials at a time (default: as many as fit)")
    parser.add_argument("--confirm", type=int, metavar="N", help="train the best and the default setting (trial 0) "
                        "with N fresh seeds at the end, and print mean and spread")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="where `report` writes, instead of the search's folder, which "
                        "is then left as it is")  # fmt: skip
    parser.add_argument("--no-dashboard", action="store_true", help="start Ray without its dashboard: a GiB less")
    shared.add_settings(parser)
    shared.add_scaling(parser, default="one a trial")
    shared.add_address(parser)


def _tune(options: argparse.Namespace) -> None:
    limits = {name: getattr(options, name) for name in ("trials", "hours", "epochs", "steps", "concurrent", "confirm")}
    for name, value in limits.items():
        if value is not None and value <= 0:
            raise UserError(f"`--{name}` must be above 0, got {value}")
    if options.metric and not options.source:
        raise UserError("`--metric` chooses among the checkpoints of an earlier run; give it with --from")
    overrides = shared.changes_from(options)
    if options.out and options.what[:1] != ["report"]:
        raise UserError("`--out` is the place of a `report`; a search lies in the folder of `--runs`")
    starts = len(options.what) == 1 and not options.resume
    from harma_ray.cli import early_checks
    from harma_ray.cli.search_options import SearchOptions, with_limits

    how = SearchOptions(**limits, address=options.address, dashboard=not options.no_dashboard, started=options.started)
    early_checks.require_gpu(options.gpu, options.address)
    is_report = len(options.what) == 2 and options.what[0] == "report"
    if options.resume:
        if options.what or overrides.keys() - {"data.path"} or options.runs or options.name or options.source:
            raise UserError("`--resume` goes on with a search and its own settings; start a new one to change some")
        folder, definition = early_checks.check_resumed_search(options.resume, overrides, options.address)
        _go_on(folder, with_limits(definition, how), how)
    elif is_report:
        if overrides or any(value is not None for value in limits.values()):
            raise UserError("`tune report` only reads; use --resume to go on")
        search_folder(options.what[1])
        from harma_ray.tune.folder import open_search  # Optuna

        open_search(options.what[1])
        from harma_ray.cli.tune_run import report_search  # torch

        report_search(options.what[1], options.out)
    elif starts:
        file = find_space(options.what[0])
        early_checks.check_new(options.runs or RUNS, [options.name], "search")
        definition = with_limits(_read_search(file, overrides, options), how)
        early_checks.check_training(definition.config, options.address)
        _start(definition, options, how)
    else:
        raise UserError("give a search space, such as search_spaces/harma.yaml; or --resume SEARCH; or report SEARCH")


def _read_search(file: Path, overrides: Mapping[str, Any], options: argparse.Namespace) -> SearchDefinition:
    """Reads a search space, with what ``--from`` gives its recipe."""
    from harma_ray.recipes import recipe_config
    from harma_ray.settings import require_effect
    from harma_ray.tune.space.file import load_search, read_recipe

    given = overrides
    recipe = read_recipe(file) if options.source else ""
    if recipe:  # else the search tells what is wrong with its file
        overrides = {**shared.source_changes(options, recipe_config(recipe)), **overrides}
    definition = load_search(file, overrides=overrides)
    require_effect(definition.config, given)
    return definition


def _start(definition: SearchDefinition, options: argparse.Namespace, how: SearchOptions) -> None:
    _tell_loading(how)
    from harma_ray.cli.tune_run import start_search

    start_search(definition, runs=options.runs or RUNS, name=options.name, options=how)


def _go_on(folder: Path, definition: SearchDefinition, how: SearchOptions) -> None:
    _tell_loading(how)
    from harma_ray.cli.tune_run import resume_search

    resume_search(folder, definition, how)


def _tell_loading(how: SearchOptions) -> None:
    print(f"[{time.perf_counter() - how.started:7.1f} s] loading PyTorch, Ray and Optuna", flush=True)
