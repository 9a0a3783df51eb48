"""``checkpoint import``, ``export`` and ``show``."""

import argparse

from harma_ray.cli import shared


def add_commands(commands: shared.Commands) -> None:
    """Adds ``checkpoint import``, ``export`` and ``show``."""
    parser = commands.add_parser("checkpoint", help="import, export or show weights", description="Weights of others.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    text = "Turn a file that a paper's program, GeoRSCLIP or open_clip wrote into a run or a backbone file."
    made = shared.make_command(verbs, "import", _import, text)
    made.add_argument("file", help=".pth, .pt or .safetensors")
    made.add_argument("--recipe", required=True, help="recipe that the weights belong to")
    made.add_argument("--out", required=True, help="folder to make")
    made.add_argument("--clip", metavar="FILE", help="for a part of a model: the CLIP that it was trained on; a file, "
                      "a run of an earlier stage, or a tag such as openai")  # fmt: skip
    made.add_argument("--section", default="", metavar="NAME", help="which of several models in the file, such as ema")
    shared.add_settings(made)
    made = shared.make_command(verbs, "export", _export, "Write a run's best weights for other programs.")
    made.add_argument("--run", required=True, help="folder of the run")
    made.add_argument("--format", required=True, choices=["released", "adapter", "open_clip"], help="layout")
    made.add_argument("--out", required=True, help="file to write")
    made.add_argument("--overwrite", action="store_true", help="replace the file")
    shared.add_metric(made)
    made = shared.make_command(verbs, "show", _show, "Print what a file or folder is.")
    made.add_argument("path", help="file, checkpoint folder or run folder")


def _import(options: argparse.Namespace) -> None:
    from harma_ray.import_export import import_checkpoint
    from harma_ray.preflight import absolute_paths
    from harma_ray.recipes import recipe_config
    from harma_ray.settings import build_config, parse_overrides

    config = absolute_paths(build_config(recipe_config(options.recipe), parse_overrides(options.overrides)))
    print(import_checkpoint(options.file, config, options.out, options.clip, section=options.section).describe())


def _export(options: argparse.Namespace) -> None:
    from harma_ray.import_export import export_checkpoint
    from harma_ray.runs import open_run

    path = export_checkpoint(
        open_run(options.run), options.format, options.out, metric=options.metric, overwrite=options.overwrite
    )
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _show(options: argparse.Namespace) -> None:
    from harma_ray.import_export import describe_file

    print(describe_file(options.path))
