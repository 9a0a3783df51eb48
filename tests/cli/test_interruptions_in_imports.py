"""Ctrl-C and SIGTERM in the middle of an import."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from harma_ray.cli import interruptions, main
from harma_ray.cli.interruptions import raised_between_imports

MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
for _ in range(30):
    time.sleep(0.01)  # in which Python heeds signals
done = True
"""


def forgetful(name):
    """Imports as some libraries do in C: what it raises is forgotten."""
    with contextlib.suppress(BaseException):
        __import__(name)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module that interrupts its own import; it goes when the test is over."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, signal_name):
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=signal_name))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_is_raised_when_the_import_is_done(module, name):
    with raised_between_imports():
        forgetful(made := module(f"interrupted_by_{name}", name))
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
    assert sys.modules[made].done


def test_otherwise_it_would_be_lost(module):
    forgetful(made := module("lost_in_itself", "SIGINT"))
    time.sleep(3 * interruptions._AGAIN_SECONDS)
    assert made not in sys.modules


def test_outside_of_imports_it_is_raised_at_once_and_all_is_as_before_in_the_end(monkeypatch):
    monkeypatch.setattr(interruptions, "_AGAIN_SECONDS", 60)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with raised_between_imports(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_ctrl_c_that_is_ignored_stays_so():
    code = "import signal; signal.raise_signal(signal.SIGINT); print(signal.getsignal(signal.SIGINT).name)"
    program = f"from harma_ray.cli.interruptions import raised_between_imports as r\nwith r():\n    {code}"
    result = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", program], capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("SIG_IGN\n", "")


def test_a_command_that_imports_is_interrupted_in_one_line(module, monkeypatch, capsys):
    def imports(options):
        forgetful(module("imported_by_a_command", "SIGINT"))
        time.sleep(5)

    threads = threading.active_count()
    monkeypatch.setattr("harma_ray.cli.make_parser", lambda: Parser(imports))
    assert main([]) == 2
    assert capsys.readouterr().err == "interrupted: what was finished is kept; run the same command again\n"
    assert threading.active_count() == threads


class Parser:
    """Stands for the parser of all commands."""

    def __init__(self, run_command):
        self.run_command = run_command

    def parse_args(self, arguments):
        return self
