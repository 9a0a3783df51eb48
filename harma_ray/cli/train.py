"""``train``."""

import argparse

from harma_ray.cli import shared
from harma_ray.errors import UserError
from harma_ray.files import RUNS


def add_commands(commands: shared.Commands) -> None:
    """Adds ``train``."""
    from harma_ray.recipes import RECIPES

    parser = shared.make_command(
        commands, "train", _train, "Train a recipe on a converted data set.",
        "recipes: " + ", ".join(RECIPES) + "\n\nexamples:\n"
        "  launch.py train --recipe harma-rsitmd-vit --data data/rsitmd --set optim.learning_rate=2e-4\n"
        "  launch.py train --resume runs/NAME\n"
        "  launch.py train --recipe harma-rsitmd-vit --from runs/NAME --data data/rsicd\n"
        "  launch.py train --config runs/NAME/config.yaml --seeds 0,1,2",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="published settings to start from; see below")
    source.add_argument("--config", metavar="FILE", help="YAML settings, such as the config.yaml of a run")
    source.add_argument("--resume", metavar="RUN", help="continue a run from its last checkpoint")
    shared.add_source(parser)
    parser.add_argument("--data", help="folder of the converted data set (data.path); with --resume: where it lies now")
    parser.add_argument("--runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of the run (default: recipe and time)")
    parser.add_argument("--seeds", help="train once with each of these seeds, such as 0,1,2, and print mean and spread")
    parser.add_argument(
        "--check", action="store_true", help="one step only: list trainable parameters without gradient"
    )
    shared.add_settings(parser)
    shared.add_scaling(parser, default="one a GPU, or two on CPUs")
    shared.add_address(parser)


def _train(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    if options.resume:
        changed = ("source", "metric", "overrides", "seeds", "name", "runs", "check")
        if any(getattr(options, name) for name in changed):
            raise UserError(
                "`--resume` continues a run with its own settings; to change some, or to train a finished run further, "
                "start a new run: --recipe NAME --from RUN starts from its weights"
            )
        changes = shared.changes_from(options)
        early_checks.check_resumed(options.resume, changes, options.address)
        from harma_ray.cli.train_run import resume_and_train  # torch and Ray: mistakes are told without

        resume_and_train(options.resume, changes, address=options.address, started=options.started)
        return
    if options.metric and not options.source:
        raise UserError("`--metric` chooses among the checkpoints of an earlier run; give it with --from")
    seeds = _parse_seeds(options.seeds) if options.seeds else []
    if not options.check and len(seeds) < 2:  # several go on with those of the name that were begun
        early_checks.check_new(options.runs or RUNS, [options.name], "run")
    config = shared.config_from(options)
    early_checks.check_training(config, options.address)
    from harma_ray.cli.train_run import check_gradients, train_seeds

    if options.check:
        check_gradients(config)
        return
    train_seeds(
        config, seeds or [config.seed], runs=options.runs or RUNS, name=options.name, address=options.address,
        started=options.started,
    )  # fmt: skip


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"`--seeds` takes whole numbers with commas between, such as 0,1,2, got `{text}`") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"`--seeds` must be different and not negative, got {text}")
    return seeds
