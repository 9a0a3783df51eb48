"""The command line: parse, call, print."""

import errno
import io
import logging
import sys
import time
from collections.abc import Sequence

import harma_ray
from harma_ray.cli import checkpoint, convert, demo, evaluate, generate, recipes, retrieve, train, tune
from harma_ray.cli.interruptions import raised_between_imports
from harma_ray.cli.parser import Parser
from harma_ray.compiler import defer_compiler
from harma_ray.data.image_files import readable_name
from harma_ray.errors import UserError, WorkerFailed

EXIT_MISTAKE = 2
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
"""What is wrong with a path that was given, wherever it is noticed."""
EXIT_FAILURE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 the user's mistake or wish (an interruption), 1 anything else.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not all terminals take all names
            stream.reconfigure(errors="backslashreplace")
    started = time.perf_counter()
    defer_compiler()
    try:
        with raised_between_imports():
            _check_encoding(sys.argv[1:] if arguments is None else arguments)
            options = make_parser().parse_args(arguments)
            options.started = started
            options.run_command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt as error:
        way_out = getattr(error, "__notes__", ["run the same command again"])[0]
        print(f"interrupted: what was finished is kept; {way_out}", file=sys.stderr)
        return EXIT_MISTAKE
    except WorkerFailed as error:
        way_out = getattr(error, "__notes__", ["run the same command again"])[0]
        print(f"error: {error}; {way_out}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in _PATH_ERRORS or not error.filename:
            raise
        print(f"error: cannot use {error.filename} ({error.strerror}); name another place", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


def _check_encoding(arguments: Sequence[str]) -> None:
    """Raises UserError if an argument is not UTF-8: Ray, which keeps the command line, would not start."""
    wrong = [argument for argument in arguments if any("\udc80" <= letter <= "\udcff" for letter in argument)]
    if wrong:
        raise UserError(
            f"arguments must be UTF-8, got {readable_name(wrong[0])}; name the folder or file by a link: ln -s OLD NEW"
        )


def make_parser() -> Parser:
    """Returns the parser of all commands."""
    parser = Parser(
        prog="launch.py",
        description="Train, search and evaluate vision-language models for overhead imagery, on one machine or a Ray "
        "cluster. Every command has --help.",
    )
    parser.add_argument("--version", action="version", version=f"harma_ray {harma_ray.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, convert, recipes, train, tune, evaluate, generate, retrieve, checkpoint):
        command.add_commands(commands)
    return parser
