"""``evaluate``, ``embed`` and ``predict``."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harma_ray.cli import shared
from harma_ray.config import ScalingConfig
from harma_ray.errors import UserError


def add_commands(commands: shared.Commands) -> None:
    """Adds ``evaluate``, ``embed`` and ``predict``."""
    _add_evaluate(commands)
    _add_embed(commands)
    _add_predict(commands)


def _add_evaluate(commands: shared.Commands) -> None:
    parser = shared.make_command(
        commands, "evaluate", _evaluate, "Evaluate a run or a checkpoint file on a split.",
        "examples:\n  launch.py evaluate --run runs/NAME --split test --report report\n"
        "  launch.py evaluate --run runs/NAME --compare runs/OTHER runs/THIRD --report report\n"
        "  launch.py evaluate --checkpoint FILE --recipe harma-rsitmd-vit --data data/rsitmd --split test",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("--data", help="folder of the converted data set (default: the run's)")
    parser.add_argument("--split", default="test", help="split (default: test)")
    _add_query(parser, "all")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--report", metavar="FOLDER", help="write a page with failures, t-SNE and parameters")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="measure these runs too, on the same "
                        "split, and tell how they differ, with paired intervals")  # fmt: skip
    shared.add_scaling(parser, default="1")
    shared.add_address(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is meant."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="folder of a run; its best checkpoint is taken")
    source.add_argument(
        "--checkpoint", help="adapter file, released .pth file or checkpoint folder; needs --recipe or --config"
    )
    source.add_argument(
        "--zero-shot",
        action="store_true",
        help="the recipe's backbone as it is (model.pretrained); of composed retrieval the sum of its features",
    )
    built = parser.add_mutually_exclusive_group()
    built.add_argument("--recipe", help="recipe of the checkpoint or backbone")
    built.add_argument("--config", metavar="FILE", help="YAML settings of the checkpoint, instead of --recipe")
    shared.add_metric(parser)
    shared.add_precision(parser)
    shared.add_settings(parser)


def _add_query(parser: argparse.ArgumentParser, *more: str) -> None:
    """Adds ``--query``."""
    from harma_ray.recipes import QUERIES

    known = ", ".join(f"{name} = {text}" for name, text in QUERIES.items())
    parser.add_argument(
        "--query", choices=[*QUERIES, *more], help=f"composed retrieval: how queries are made, by {known} "
        "(default: the first of these that the model has)"
        + ("; all = beside these figures a table of all kinds" if more else ""),
    )  # fmt: skip


def _read_model(options: argparse.Namespace) -> tuple[Any, str | None]:
    """Returns the settings and the weights (None: none but the backbone's) of the model that is meant."""
    from harma_ray.runs import open_run
    from harma_ray.settings import build_config

    weights = options.run or options.checkpoint
    if options.metric and not options.run:
        raise UserError("`--metric` chooses among the checkpoints of a run; give it with --run")
    if options.run:
        if options.recipe or options.config:
            raise UserError("`--run` brings its own settings; leave out --recipe and --config")
        run = open_run(options.run)
        if options.metric:
            weights = str(run.best_checkpoint(options.metric))
        config = build_config(replace(run.config, scaling=ScalingConfig()), shared.changes_from(options))
    elif options.recipe or options.config:
        config = shared.config_from(options)
    else:
        raise UserError("`--checkpoint` and `--zero-shot` need --recipe or --config: how the model is built")
    return config, weights


def _evaluate(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    config, weights = _read_model(options)
    early_checks.require_gpu(options.gpu, options.address if (options.workers or 1) > 1 else "local")
    outputs = {"--json": options.json, "--report": options.report}
    early_checks.check_model(config, options.run, options.checkpoint, options.split, outputs)
    for run in options.compare or ():
        early_checks.open_usable(run)
    from harma_ray.cli.evaluate_run import evaluate_and_print

    evaluate_and_print(
        config, weights, split=options.split, json_file=options.json, report=options.report,
        num_workers=options.workers or 1, address=options.address, query=options.query,
        metric=options.metric, compare=options.compare,
    )  # fmt: skip


def _add_predict(commands: shared.Commands) -> None:
    from harma_ray.recipes import SUBMISSIONS

    parser = commands.add_parser(
        "predict", help="answer queries whose targets are not public", description="Files for evaluation servers."
    )
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")
    for kind in SUBMISSIONS:
        made = shared.make_command(kinds, kind.name, _predict, kind.text, kind.examples)
        _add_model(made)
        made.add_argument("--data", required=True, help="converted data set")
        made.add_argument("--split", default=kind.split, help=f"split with the queries (default: {kind.split})")
        made.add_argument("--out", default=kind.out, help=f"folder to write (default: {kind.out})")
        made.add_argument("--name", help="last part of the files' names (default: that of the run or file)")
        made.set_defaults(write_submission=kind.write)
        _add_query(made)
        shared.add_device(made)


def _predict(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    config, weights = _read_model(options)
    early_checks.require_gpu(options.gpu, "local")
    early_checks.check_model(config, options.run, options.checkpoint, options.split, {"--out": options.out})
    from harma_ray.import_export import load_model
    from harma_ray.recipes import make_task
    from harma_ray.runs import absolute_paths

    run_name = Path(options.run).expanduser().absolute().name if options.run else ""
    name = options.name or run_name or Path(options.checkpoint or "").stem
    settings = absolute_paths(config)
    load = partial(load_model, weights, settings)
    files, note = options.write_submission(
        make_task(settings), load, options.split, options.out, name, query=options.query
    )
    print(f"{note}; {config.train.eval_precision}")
    for path in files:
        print(f"wrote {path}")


def _add_embed(commands: shared.Commands) -> None:
    parser = shared.make_command(
        commands, "embed", _embed, "Write the vectors of a data set's images and captions, or of a folder's images, "
        "as Parquet (or of images as .npz); of composed retrieval those of the queries too. What was cut off goes on.",
    )  # fmt: skip
    parser.add_argument("--run", required=True, help="folder of the run whose best model embeds")
    parser.add_argument("--data", required=True, help="converted data set, or a folder of images")
    parser.add_argument("--out", required=True, help="folder to write; or a file NAME.npz: features and image_paths")
    parser.add_argument("--split", help="one split (default: all)")
    _add_query(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--max-bad", type=int, default=0, help="unreadable images that may be left out (default: 0)")
    shared.add_precision(parser)
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: the run's setting "
                        "data.max_pixels, or 100 million in a folder)")  # fmt: skip
    shared.add_settings(parser)
    shared.add_rendering(parser, split=False)
    shared.add_scaling(parser, default="1")
    shared.add_address(parser)


def _embed(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks
    from harma_ray.runs import Run
    from harma_ray.settings import build_config, parse_overrides

    shared.require_workers(options.workers)
    found = early_checks.check_embedded(options.run, options.data, options.split, options.out)
    early_checks.require_gpu(options.gpu, options.address)
    changes = parse_overrides(options.overrides)
    fixed = [name for name in changes if name not in found.task.vector_settings]
    if fixed:
        known = ", ".join(found.task.vector_settings) or "nothing in this recipe"
        raise UserError(f"`--set` of embed says how vectors are made ({known}), got `{fixed[0]}`")
    if options.precision:
        changes["train.eval_precision"] = options.precision
    if options.max_pixels is not None:
        changes["data.max_pixels"] = options.max_pixels
    run = Run(found.path, build_config(found.config, changes))
    rendering = shared.rendering_from(options)
    from harma_ray.on_ray.cluster import ray_cluster, require_visible
    from harma_ray.vectors.embed import embed
    from harma_ray.vectors.job import JobSettings

    with ray_cluster(options.address) as cluster:
        require_visible([run.path, Path(options.data).expanduser()], cluster)
        use_gpu = options.gpu or (not options.cpu and cluster.gpus >= 1)
        settings = JobSettings(options.batch_size, options.workers or 1, use_gpu, options.max_bad)
        told = embed(
            run, options.data, options.out, settings, split=options.split, rendering=rendering, query=options.query
        )
        print(told)
