"""``checkpoint import``, ``export``, ``extract-vit`` and ``show``."""

import argparse

from harma_ray.cli import shared


def add_commands(commands: shared.Commands) -> None:
    """Adds ``checkpoint`` and its verbs."""
    parser = commands.add_parser(
        "checkpoint", help="import, export, take apart or show weights", description="Weights of others."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    text = "Turn a file that a paper's program, GeoRSCLIP or open_clip wrote, or a folder of InternVL, into a run or a "
    made = shared.make_command(verbs, "import", _import, f"{text}backbone file.")
    made.add_argument("file", help=".pth, .pt, .bin or .safetensors; or a Hugging Face folder of an InternVL or of its "
                      "vision transformer alone")  # fmt: skip
    made.add_argument("--recipe", required=True, help="recipe that the weights belong to")
    made.add_argument("--out", required=True, help="folder to make")
    made.add_argument("--clip", metavar="FILE", help="for a part of a model: the CLIP that it was trained on; a file, "
                      "a run of an earlier stage, or a tag such as openai")  # fmt: skip
    made.add_argument("--section", default="", metavar="NAME", help="which of several models in the file, such as ema")
    shared.add_settings(made)
    _add_export(verbs)
    text = "Write the vision transformer of a run's best model alone, as a Hugging Face folder."
    made = shared.make_command(verbs, "extract-vit", _extract, text)
    made.add_argument("--run", required=True, help="folder of the run")
    made.add_argument("--out", required=True, help="folder to make")
    made.add_argument("--layout", choices=["hf", "original"], default="hf", help="names of the tensors: those of "
                      "transformers (hf, the default), or those of InternVL's own code, as ViTP's extract_vit has "
                      "them")  # fmt: skip
    made.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the numbers (default: fp32, in "
                      "which they were trained; ViTP's extract_vit writes bf16)")  # fmt: skip
    shared.add_metric(made)
    made = shared.make_command(verbs, "show", _show, "Print what a file or folder is.")
    made.add_argument("path", help="file, checkpoint folder or run folder")


def _add_export(verbs: shared.Commands) -> None:
    """Adds ``export``."""
    made = shared.make_command(verbs, "export", _export, "Write a run's best weights for other programs.")
    made.add_argument("--run", required=True, help="folder of the run")
    made.add_argument(
        "--format", required=True, choices=["released", "adapter", "open_clip", "onnx", "huggingface"],
        help="released: what the paper's own program reads; adapter: what was trained; open_clip: a plain CLIP, as a "
        "folder for local-dir:, or as a file if --out ends in .safetensors; onnx: a folder of graphs of the towers; "
        "huggingface: a folder with a model card, which load_run reads back",
    )  # fmt: skip
    made.add_argument("--out", required=True, help="file or folder to write")
    made.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote there")
    made.add_argument(
        "--backbone", choices=["include", "name"], help="huggingface: whether the weights that a CLIP started from are "
        "in the folder (default: those of a file are, others are named)",
    )  # fmt: skip
    made.add_argument(
        "--figures", action="append", default=[], metavar="FILE", help="huggingface: what evaluate --json wrote of "
        "this run: figures with intervals; may be repeated",
    )  # fmt: skip
    shared.add_metric(made)


def _import(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks
    from harma_ray.recipes import recipe_config
    from harma_ray.settings import build_config, parse_overrides

    config = build_config(recipe_config(options.recipe), parse_overrides(options.overrides))
    early_checks.require_there(options.file, "give a file or folder of weights")
    early_checks.require_free(options.out)
    from harma_ray.import_export import import_checkpoint
    from harma_ray.runs import absolute_paths

    config = absolute_paths(config)
    print(import_checkpoint(options.file, config, options.out, options.clip, section=options.section).describe())


def _export(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    run = early_checks.open_usable(options.run)
    from harma_ray.exports.request import HubOptions, check_export

    how = {"metric": options.metric, "overwrite": options.overwrite}
    how["hub"] = HubOptions(options.backbone, tuple(options.figures))
    check_export(run, options.format, options.out, **how)
    from harma_ray.exports.checkpoint import export_checkpoint  # torch

    made = export_checkpoint(run, options.format, options.out, **how)
    print(made.describe())


def _extract(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    run = early_checks.open_usable(options.run)
    early_checks.require_free(options.out)
    run.best_checkpoint(options.metric)
    from harma_ray.extraction import extract_vision

    print(extract_vision(run, options.out, layout=options.layout, dtype=options.dtype, metric=options.metric))


def _show(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks

    early_checks.require_there(options.path, "give a file, a checkpoint's folder or a run's")
    from harma_ray.import_export import describe_file

    print(describe_file(options.path))
