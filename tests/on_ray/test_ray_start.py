"""What goes wrong as Ray starts, without Ray."""

import os
import signal
import subprocess
import sys

import pytest

from harma_ray.on_ray.start import _heeding_interruptions


def lost(self):
    """Interrupts in a place from which Python lets no exception out."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):
        pass


def test_a_ctrl_c_that_python_loses_on_the_way_is_raised_in_the_end_and_prints_nothing(capfd):
    went_on = []

    def start():
        with _heeding_interruptions():
            instance = type("Lost", (), {"__del__": lost})()
            del instance
            went_on.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert went_on
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_happens_and_all_is_as_before():
    before = sys.unraisablehook
    with _heeding_interruptions():
        subprocess.run(["true"], check=True)
    assert sys.unraisablehook is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
