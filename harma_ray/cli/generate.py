"""``generate``: a trained model answers questions about images."""

import argparse
import sys

from harma_ray.cli import shared


def add_commands(commands: shared.Commands) -> None:
    """Adds ``generate``."""
    parser = shared.make_command(
        commands,
        "generate",
        _generate,
        "Answer questions about images with a trained vision-language model.",
        "examples:\n  launch.py generate --run runs/NAME --image town.png 'How many houses are there?'\n"
        "  launch.py generate --run runs/NAME --image town.png     (asks for questions, a line each)",
    )
    parser.add_argument("question", nargs="?", help="the question (default: the lines of standard input)")
    parser.add_argument("--run", required=True, help="folder of a run; its best checkpoint is taken")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image of the question; may be repeated"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    shared.add_rendering(parser, split=False)


def _generate(options: argparse.Namespace) -> None:
    from harma_ray.cli import early_checks
    from harma_ray.errors import UserError

    early_checks.open_usable(options.run)
    for image in options.image:
        early_checks.require_there(image, "give an image file")
    from harma_ray.api import load_run

    asked = None if options.question is None else [options.question]
    model = load_run(options.run, options.device, rendering=shared.rendering_from(options))
    is_talk = asked is None and sys.stdin.isatty()
    if is_talk:
        print("Ask about the image, a line each; an empty line ends the talk.", file=sys.stderr)
    for line in sys.stdin if asked is None else asked:
        question = line.strip()
        if not question and is_talk:
            return
        if not question:
            raise UserError("the question is empty")
        print(model.ask(options.image, question, options.max_tokens), flush=True)
