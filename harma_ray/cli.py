"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import harma_ray
from harma_ray.errors import UserError

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 the user's mistake, 130 interrupted, 1 anything else.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    options = _parser().parse_args(arguments)
    try:
        options.run_command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 1
    return 0


def _interrupt(signal_number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Train, evaluate and search vision-language models for overhead imagery, on one machine or a Ray "
        "cluster. Every command has --help.",
    )
    parser.add_argument("--version", action="version", version=f"harma_ray {harma_ray.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_convert(commands)
    _add_inspect(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_embed(commands)
    _add_checkpoint(commands)
    return parser


def _command(commands: Any, name: str, function: Any, text: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text[0].lower() + text[1:].rstrip("."), description=text, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run_command=function)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", help="Ray cluster to join, such as auto (default: RAY_ADDRESS, or a cluster of "
        "this machine's own for as long as the command runs)",
    )  # fmt: skip


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="workers (default: one a GPU, or two on CPUs)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu", action="store_true", help="every worker takes a GPU (default: if there is one)")
    device.add_argument("--cpu", action="store_true", help="no worker takes a GPU")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a setting, such as optim.learning_rate=2e-4; may be repeated",
    )  # fmt: skip


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", _demo,
        "Draw scenes, train a tiny CLIP on one style, adapt it to another with HarMA, print a results table.",
    )  # fmt: skip
    parser.add_argument("--out", default="demo", help="folder for data, runs and picture (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and training (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="workers of the adaptation (default: two)")


def _demo(options: argparse.Namespace) -> None:
    from harma_ray.demo import run_demo

    run_demo(Path(options.out), seed=options.seed, num_workers=options.workers or 0)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a raw data set into Parquet shards",
        description="Turn a raw data set into Parquet shards.",
    )
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        made = _command(kinds, name, _convert, text)
        made.set_defaults(kind=name)
        made.add_argument("--out", required=True, help="folder of the data set; each split becomes a folder in it")
        made.add_argument("--resize", type=int, metavar="PIXELS", help="make images smaller: shorter side (default: "
                          "keep every file byte for byte)")  # fmt: skip
        made.add_argument("--max-bad", type=int, default=0, metavar="N", help="missing or unreadable images that may "
                          "be left out, each listed in the manifest (default: 0)")  # fmt: skip
        made.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 100 million)")
        made.add_argument("--overwrite", action="store_true", help="replace a split that was made from other inputs")
        made.add_argument("--seed", type=int, default=0, help="seed of the order of rows (default: 0)")
        _add_address(made)
        return made

    harma = kind("harma", "HarMA's JSON annotations of one split (training or evaluation rows) and an image folder.")
    harma.add_argument("--annotations", required=True, help="JSON file")
    harma.add_argument("--images", required=True, help="folder that the file's image paths start from")
    harma.add_argument("--split", required=True, help="name of the split: train, val, test")
    karpathy = kind("karpathy", "Karpathy-style JSON (dataset_rsicd.json and the like) and an image folder.")
    karpathy.add_argument("--annotations", required=True, help="JSON file")
    karpathy.add_argument("--images", required=True, help="folder that the file's image names start from")
    folder = kind("folder", "A folder of class folders, split at random or in folders train, val, test.")
    folder.add_argument("--images", required=True, help="folder of class folders")
    folder.add_argument("--caption-template", metavar="TEXT", help='such as "an aerial photograph of {label}"')
    folder.add_argument("--fractions", type=float, nargs=3, default=[0.8, 0.1, 0.1], metavar=("TRAIN", "VAL", "TEST"),
                        help="shares, if there are no split folders (default: 0.8 0.1 0.1)")  # fmt: skip
    scenes = kind("scenes", "Drawn scenes with true captions: data for trials without a data set.")
    scenes.add_argument("--style", default="summer", help="summer, infrared or winter (default: summer)")
    scenes.add_argument("--size", type=int, default=96, help="height and width in pixels (default: 96)")
    scenes.add_argument("--counts", type=int, nargs=3, default=[2000, 200, 200], metavar=("TRAIN", "VAL", "TEST"),
                        help="scenes of each split (default: 2000 200 200)")  # fmt: skip


def _convert(options: argparse.Namespace) -> None:
    from harma_ray.cluster import ray_cluster
    from harma_ray.data.convert import commands as convert
    from harma_ray.data.convert.writer import WriteSettings

    changes = {"max_pixels": options.max_pixels} if options.max_pixels else {}
    settings = WriteSettings(
        resize=options.resize, max_bad=options.max_bad, seed=options.seed, overwrite=options.overwrite, progress=True,
        **changes,
    )  # fmt: skip
    with ray_cluster(options.address):
        if options.kind == "harma":
            manifests = {options.split: convert.convert_harma(
                options.annotations, options.images, options.split, options.out, settings=settings)}  # fmt: skip
        elif options.kind == "karpathy":
            manifests = convert.convert_karpathy(options.annotations, options.images, options.out, settings=settings)
        elif options.kind == "folder":
            manifests = convert.convert_folder(
                options.images, options.out, caption_template=options.caption_template, fractions=options.fractions,
                settings=settings,
            )  # fmt: skip
        else:
            counts = dict(zip(("train", "val", "test"), options.counts, strict=True))
            counts = {split: count for split, count in counts.items() if count}
            manifests = convert.convert_scenes(
                options.out, counts, style=options.style, size=options.size, settings=settings
            )
    for split, manifest in manifests.items():
        left_out = f", {len(manifest.bad)} left out" if manifest.bad else ""
        shards = f"{len(manifest.shards)} shards"
        print(f"{Path(options.out) / split}: {manifest.rows} images, {manifest.captions} captions, {shards}{left_out}")
        for bad in manifest.bad:
            print(f"  left out: {bad.source}: {bad.reason}")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _inspect, "Print the facts of a converted data set and draw a contact sheet."
    )
    parser.add_argument("data", help="folder of the data set")
    parser.add_argument("--split", help="one split (default: all)")
    parser.add_argument("--sheet", metavar="FOLDER", help="folder for contact sheets (default: beside the splits)")
    parser.add_argument("--verify", action="store_true", help="decode every image")


def _inspect(options: argparse.Namespace) -> None:
    from harma_ray.data.convert.inspect import contact_sheet, describe, render_facts
    from harma_ray.data.schema import list_splits, open_split

    splits = [options.split] if options.split else list_splits(options.data)
    for name in splits or ["train"]:
        split = open_split(options.data, name)
        print(render_facts(describe(split, verify=options.verify)))
        sheet = Path(options.sheet or options.data) / f"contact-sheet-{name}.png"
        contact_sheet(split, sheet)
        print(f"contact sheet: {sheet}\n")


def _add_train(commands: Any) -> None:
    from harma_ray.recipes import RECIPES

    parser = _command(
        commands, "train", _train, "Train a recipe on a converted data set.",
        "recipes: " + ", ".join(RECIPES) + "\n\nexamples:\n"
        "  launch.py train --recipe harma-rsitmd-vit --data data/rsitmd --set optim.learning_rate=2e-4\n"
        "  launch.py train --resume runs/NAME\n"
        "  launch.py train --config runs/NAME/config.yaml --seeds 0,1,2",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="published settings to start from; see below")
    source.add_argument("--config", metavar="FILE", help="YAML settings, such as the config.yaml of a run")
    source.add_argument("--resume", metavar="RUN", help="continue a run from its last checkpoint")
    parser.add_argument("--data", help="folder of the converted data set (data.path)")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of the run (default: recipe and time)")
    parser.add_argument("--seeds", help="train once with each of these seeds, such as 0,1,2, and print mean and spread")
    parser.add_argument(
        "--check", action="store_true", help="one step only: list trainable parameters without gradient"
    )
    _add_settings(parser)
    _add_scaling(parser)
    _add_address(parser)


def _train(options: argparse.Namespace) -> None:
    from harma_ray.session import check_gradients, resume_and_train, train_seeds

    if options.resume:
        if options.overrides or options.data or options.seeds or options.name:
            raise UserError("`--resume` continues a run with its own settings; start a new run to change some")
        resume_and_train(options.resume, _scaling_changes(options), address=options.address)
        return
    config = _config(options)
    if options.check:
        check_gradients(config)
        return
    seeds = _seeds(options.seeds) if options.seeds else [config.seed]
    train_seeds(config, seeds, runs=options.runs, name=options.name, address=options.address)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "Evaluate a run or a checkpoint file on a split.",
        "examples:\n  launch.py evaluate --run runs/NAME --split test --report report\n"
        "  launch.py evaluate --checkpoint FILE --recipe harma-rsitmd-vit --data data/rsitmd --split test",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="folder of a run; its best checkpoint is evaluated")
    source.add_argument(
        "--checkpoint", help="adapter file, released .pth file or checkpoint folder; needs --recipe or --config"
    )
    source.add_argument("--zero-shot", action="store_true", help="the recipe's backbone as it is")
    built = parser.add_mutually_exclusive_group()
    built.add_argument("--recipe", help="recipe of the checkpoint or backbone")
    built.add_argument("--config", metavar="FILE", help="YAML settings of the checkpoint, instead of --recipe")
    parser.add_argument("--data", help="folder of the converted data set (default: the run's)")
    parser.add_argument("--split", default="test", help="split (default: test)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--report", metavar="FOLDER", help="write a page with failures, t-SNE and parameters")
    _add_settings(parser)
    _add_scaling(parser)
    _add_address(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from harma_ray.config import build_config
    from harma_ray.runs import open_run
    from harma_ray.session import evaluate_and_print

    if options.run:
        config = build_config(open_run(options.run).config, _changes(options))
    elif options.recipe or options.config:
        config = _config(options)
    else:
        raise UserError("`--checkpoint` and `--zero-shot` need --recipe or --config: how the model is built")
    evaluate_and_print(
        config, options.run or options.checkpoint, split=options.split, json_file=options.json, report=options.report,
        num_workers=options.workers or 1, address=options.address,
    )  # fmt: skip


def _add_embed(commands: Any) -> None:
    parser = _command(
        commands, "embed", _embed, "Write the vectors of a data set's images and captions, or of a folder's images, "
        "as Parquet.",
    )  # fmt: skip
    parser.add_argument("--run", required=True, help="folder of the run whose best model embeds")
    parser.add_argument("--data", required=True, help="converted data set, or a folder of images")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", help="one split (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--max-bad", type=int, default=0, help="unreadable images that may be left out (default: 0)")
    _add_scaling(parser)
    _add_address(parser)


def _embed(options: argparse.Namespace) -> None:
    from harma_ray.cluster import ray_cluster
    from harma_ray.embed import embed
    from harma_ray.runs import open_run

    run = open_run(options.run)
    with ray_cluster(options.address) as cluster:
        summary = embed(
            run, options.data, options.out, split=options.split, batch_size=options.batch_size,
            num_actors=options.workers or 1, use_gpu=options.gpu or (not options.cpu and cluster.gpus >= 1),
            max_bad=options.max_bad,
        )  # fmt: skip
    print(summary)


def _add_checkpoint(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="import, export or show weights", description="Weights of others.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    made = _command(verbs, "import", _checkpoint_import, "Turn a released HarMA, GeoRSCLIP or open_clip file into a "
                    "run or a backbone file.")  # fmt: skip
    made.add_argument("file", help=".pth, .pt or .safetensors")
    made.add_argument("--recipe", required=True, help="recipe that the weights belong to")
    made.add_argument("--out", required=True, help="folder to make")
    _add_settings(made)
    made = _command(verbs, "export", _checkpoint_export, "Write a run's best weights for other programs.")
    made.add_argument("--run", required=True, help="folder of the run")
    made.add_argument("--format", required=True, choices=["released", "adapter", "open_clip"], help="layout")
    made.add_argument("--out", required=True, help="file to write")
    made.add_argument("--overwrite", action="store_true", help="replace the file")
    made = _command(verbs, "show", _checkpoint_show, "Print what a file or folder is.")
    made.add_argument("path", help="file, checkpoint folder or run folder")


def _checkpoint_import(options: argparse.Namespace) -> None:
    from harma_ray.config import build_config, parse_overrides
    from harma_ray.exchange import import_checkpoint
    from harma_ray.recipes import recipe_config

    config = build_config(recipe_config(options.recipe), parse_overrides(options.overrides))
    print(import_checkpoint(options.file, config, options.out).describe())


def _checkpoint_export(options: argparse.Namespace) -> None:
    from harma_ray.exchange import export_checkpoint
    from harma_ray.runs import open_run

    path = export_checkpoint(open_run(options.run), options.format, options.out, overwrite=options.overwrite)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _checkpoint_show(options: argparse.Namespace) -> None:
    from harma_ray.exchange import describe_file

    print(describe_file(options.path))


def _config(options: argparse.Namespace) -> Any:
    from harma_ray.config import build_config
    from harma_ray.recipes import load_config, recipe_config

    base = load_config(options.config) if options.config else recipe_config(options.recipe)
    return build_config(base, _changes(options))


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    from harma_ray.config import parse_overrides

    changes = {**parse_overrides(options.overrides), **_scaling_changes(options)}
    if options.data:
        changes["data.path"] = str(Path(options.data).expanduser().absolute())
    return changes


def _scaling_changes(options: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if options.workers is not None:
        if options.workers < 1:
            raise UserError(f"`--workers` must be at least 1, got {options.workers}")
        changes["scaling.num_workers"] = options.workers
    if options.gpu or options.cpu:
        changes["scaling.use_gpu"] = options.gpu
    return changes


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"`--seeds` takes whole numbers with commas between, such as 0,1,2, got `{text}`") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"`--seeds` must be different and not negative, got {text}")
    return seeds
