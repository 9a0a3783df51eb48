"""``demo``."""

import argparse
from pathlib import Path

from harma_ray.cli import shared


def add_commands(commands: shared.Commands) -> None:
    """Adds ``demo``."""
    parser = shared.make_command(
        commands, "demo", _demo,
        "Draw scenes, train a tiny CLIP on one style, adapt it to another with HarMA, print a results table.",
    )  # fmt: skip
    parser.add_argument("--out", default="demo", help="folder for data, runs and picture (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and training (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="workers of the adaptation (default: two)")


def _demo(options: argparse.Namespace) -> None:
    from harma_ray.cli.demo_run import run_demo

    run_demo(Path(options.out), seed=options.seed, num_workers=options.workers or 0)
