"""Printed commands mean the same to a shell as to us."""

import subprocess

import pytest

from harma_ray.settings import parse_overrides, show_override
from harma_ray.shell import command_line, launch_command

ODD = ("a b", "?", "#x", "100%20", "it's", '"quoted"', "$HOME", "`ls`", "~/x", "[x]{y}*", "é\u4e2d", "a\nb", "-x", "")


def words_of(line):
    """Lets a real shell take a line apart."""
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return shown.stdout.split("\0")[:-1]


def test_a_shell_reads_the_words_back():
    assert words_of(command_line(*ODD)) == list(ODD)
    assert words_of(launch_command("train", "--resume", "/runs/a b?")) == [
        "python",
        "launch.py",
        "train",
        "--resume",
        "/runs/a b?",
    ]


@pytest.mark.parametrize("value", [*ODD, "1e-3", "true", "null", "a: b", "x #y", True, None, 3, 0.5, [1, "a b"]])
def test_a_shown_setting_is_read_back_as_the_same_value(value):
    (shown,) = words_of(command_line(show_override("model.pretrained", value)))
    assert parse_overrides([shown]) == {"model.pretrained": value}
