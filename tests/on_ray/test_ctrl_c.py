"""What Ctrl-C does while Ray Train is at work; a stand-in for its trainer, real signals."""

import contextlib
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from harma_ray.on_ray import interruption, workers
from harma_ray.on_ray.interruption import fit
from harma_ray.resources import Cluster


def interrupt_soon(seconds=0.1):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()


def trainer(work):
    return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=work()))


def test_ray_train_works_beside_the_main_thread_and_its_result_and_errors_are_handed_on():
    assert fit(trainer(threading.current_thread)) is not threading.main_thread()

    def fails():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fit(trainer(fails))


def test_the_first_ctrl_c_asks_the_workers_to_end_and_waits_for_them():
    asked, handler = threading.Event(), signal.getsignal(signal.SIGINT)

    def work():
        interrupt_soon()
        return "saved" if asked.wait(20) else "never asked"

    assert fit(trainer(work), asked.set) == "saved"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("again", [True, False])
def test_a_second_one_or_the_end_of_patience_leaves_at_once(monkeypatch, again):
    monkeypatch.setattr(interruption, "GRACE_SECONDS", 20 if again else 0.1)
    never, asked = threading.Event(), []

    def work():
        interrupt_soon()
        never.wait(20)

    def ask():
        asked.append(True)
        if again:
            interrupt_soon()

    with pytest.raises(KeyboardInterrupt):
        fit(trainer(work), ask)
    assert asked == [True]
    never.set()


def test_without_anyone_to_ask_and_where_workers_die_of_the_same_signal_it_is_an_interruption():
    never = threading.Event()

    def work():
        interrupt_soon()
        never.wait(20)
        raise OSError("killed with the rest")

    with pytest.raises(KeyboardInterrupt):
        fit(trainer(work))
    never.set()
    never = threading.Event()
    with pytest.raises(KeyboardInterrupt) as left:
        fit(trainer(work), never.set)
    assert isinstance(left.value.__cause__, OSError)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_training_that_ends_although_it_was_asked_to_stop_begins_nothing_after_it(monkeypatch, tmp_path, is_asked):
    def on_workers(*arguments, on_interrupt, **options):
        if is_asked:
            on_interrupt()
        return {"steps": 3}

    monkeypatch.setattr(workers, "on_workers", on_workers)
    for name in ("require_shared_folder", "require_visible", "read_paths"):
        monkeypatch.setattr(workers, name, lambda *arguments: None)
    run, prepared, told = SimpleNamespace(path=tmp_path), SimpleNamespace(config=None, workers=1), []
    with pytest.raises(KeyboardInterrupt) if is_asked else contextlib.nullcontext():
        assert workers.train(run, prepared, Cluster(2, 0, 1, "local", ""), on_record=told.append) == {"steps": 3}
    assert [record["kind"] for record in told] == ["notice"] * is_asked
    assert not any(tmp_path.iterdir())
