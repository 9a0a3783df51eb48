"""Commands that are printed for a person to paste."""

import shlex


def command_line(*words: object) -> str:
    """Returns words as one line for a shell, each quoted where that is needed."""
    return shlex.join(map(str, words))


def launch_command(*words: object) -> str:
    """Returns a command of this program as it is typed in the working folder of the project."""
    return command_line("python", "launch.py", *words)
