"""Commands run as a user types them, in a process of their own or in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harma_ray.cli import main

ROOT = Path(__file__).parent.parent
SMALL_SPACE = """
recipe: harma-scenes
fixed: {train.epochs: 2, train.global_batch_size: 20, adapter.shared_width: 8,
        model.pretrained: random}
space:
  optim.learning_rate: {type: float, low: 1e-3, high: 1e-2, log: true}
  adapter.width: {type: int, low: 16, high: 128, step: 16}
limits: {trials: 3}
"""
"""The file of a search of three short trials."""


ray_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
"""For commands that use Ray in this process, which warns of its own settings."""


def alone():
    """Returns the environment in which commands start a cluster of their own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def launch(*arguments, timeout=280):
    """Runs a command in a process of its own, with a cluster of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=alone())


def done(capsys, *arguments):
    """Returns what a command printed that ends well."""
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out


def refused(capsys, *arguments):
    """Returns the one line in which a command told a user's mistake."""
    status = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert error.startswith("error: ")
    assert "\n" not in error
    return error
