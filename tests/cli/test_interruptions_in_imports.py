"""Ctrl-C and SIGTERM in the middle of an import."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from harma_ray.cli import interruptions, main
from harma_ray.cli.interruptions import raised_between_imports

MODULE = """
import os, signal, time
for turn in range(30):
    time.sleep(0.01)  # in which Python heeds signals
    if turn in {at}:
        os.kill(os.getpid(), signal.{name})
done = True
"""

SOON = 4 * interruptions._AGAIN_SECONDS
LATER = 0.5
"""Seconds in which what follows an import is surely over, on a busy machine too."""


def forgetful(name):
    """Imports as some libraries do in C: what it raises is forgotten."""
    with contextlib.suppress(BaseException):
        __import__(name)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module that interrupts its own import, which takes 0.3 s; it goes when the test is over."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, signal_name="SIGINT", at=(0,)):
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=signal_name, at=at))
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


def test_several_in_one_import_are_one(module):
    with raised_between_imports():
        forgetful(module("interrupted_twice", at=(0, 10, 29)))
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
        time.sleep(SOON)


def test_an_import_that_takes_long_is_interrupted(module, monkeypatch):
    monkeypatch.setattr(interruptions, "PATIENCE_SECONDS", 0.1)
    with raised_between_imports():
        with pytest.raises(KeyboardInterrupt):
            __import__(made := module("takes_long"))
        time.sleep(SOON)
    assert made not in sys.modules


def test_one_that_still_waits_in_the_end_is_raised_then_and_never_again(module, monkeypatch):
    monkeypatch.setattr(interruptions, "_AGAIN_SECONDS", LATER)
    with pytest.raises(KeyboardInterrupt), raised_between_imports():
        forgetful(module("interrupted_last", at=(29,)))
    time.sleep(2 * LATER)


def test_an_error_is_not_replaced(module, monkeypatch):
    monkeypatch.setattr(interruptions, "_AGAIN_SECONDS", LATER)

    def fails():
        with raised_between_imports():
            forgetful(module("interrupted_before_an_error", at=(29,)))
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fails()
    time.sleep(2 * LATER)


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
    class Parser:
        """Stands for the parser of all commands."""

        def parse_args(self, arguments):
            return self

        def run_command(self, options):
            forgetful(module("imported_by_a_command"))
            time.sleep(5)

    monkeypatch.setattr("harma_ray.cli.make_parser", Parser)
    assert main([]) == 2
    assert capsys.readouterr().err == "interrupted: what was finished is kept; run the same command again\n"


ARROW = """
import contextlib, importlib.abc, os, signal, struct, sys, time
import pyarrow
from harma_ray.cli.interruptions import raised_between_imports

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "pandas.core.api":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3):
                time.sleep(0.001)

sys.meta_path.insert(0, Interrupts())
numbers = pyarrow.Array.from_buffers(pyarrow.float64(), 1, [None, pyarrow.py_buffer(struct.pack("d", 1))])
try:
    with {block}:
        numbers.to_numpy()
        time.sleep(1)
        print("went on", "pandas" in sys.modules)
except KeyboardInterrupt:
    print("interrupted", "pandas" in sys.modules)
"""


@pytest.mark.parametrize(
    ("block", "ends"),
    [("contextlib.nullcontext()", "went on False"), ("raised_between_imports()", "interrupted True")],
)
def test_arrow_forgets_one_that_comes_while_it_imports_pandas(block, ends):
    """When it does not any more, this workaround can go."""
    result = subprocess.run([sys.executable, "-c", ARROW.format(block=block)], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == (ends, "")
