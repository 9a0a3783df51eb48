"""``demo``."""

import argparse
from pathlib import Path

from harma_ray.cli import shared

_RECIPES = {"harma": "harma-scenes", "vitp": "scenes-vitp", "cir": "scenes-cir-combiner"}


def add_commands(commands: shared.Commands) -> None:
    """Adds ``demo``."""
    parser = shared.make_command(
        commands,
        "demo",
        _demo,
        "Show a paper in minutes, on scenes that are drawn: train tiny models and print a results table.",
        "papers:\n  harma  a tiny CLIP is trained on one style and adapted to another\n"
        "  vitp   a tiny vision transformer is pretrained on talks, with and without token drop, and finds images by "
        "image\n"
        "  cir    a tiny CLIP is fine-tuned and given a Combiner, and finds scenes by a scene and a sentence, beside a "
        "Combiner on a random CLIP",
    )
    parser.add_argument("paper", nargs="?", choices=["harma", "vitp", "cir"], default="harma", help="default: harma")
    parser.add_argument("--out", default="demo", help="folder for data, runs and picture (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and training (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="workers (default: two)")


def _demo(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    shared.require_workers(options.workers)
    early_checks.check_demo(_RECIPES[options.paper], options.seed, options.out)
    from harma_ray.cli.demo_composed import run_demo_of_queries
    from harma_ray.cli.demo_run import run_demo
    from harma_ray.cli.demo_talks import run_demo_of_talks

    run = {"harma": run_demo, "vitp": run_demo_of_talks, "cir": run_demo_of_queries}[options.paper]
    run(Path(options.out), seed=options.seed, num_workers=options.workers or 0)
