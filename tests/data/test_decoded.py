"""Batches are made ahead of their use, no further than asked for, in order; what goes wrong is told in its turn."""

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pyarrow as pa
import pytest

from harma_ray.data import decoding
from harma_ray.data.decoding import Ahead, DecodeInThreads, DecodeRows, decoded
from harma_ray.data.samples import RowTransform
from harma_ray.errors import UserError


class Slow(RowTransform):
    """Takes longer for earlier rows; refuses row 20; knows what is being done at a time."""

    def __init__(self):
        self.lock, self.running, self.most, self.done = threading.Lock(), 0, 0, []

    def __call__(self, row, rng):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.03 - 0.001 * row["row"])
        with self.lock:
            self.running -= 1
            self.done.append(row["row"])
        if row["row"] == 20:
            raise UserError("is the twentieth")
        return {"number": row["row"], "drawn": rng.random(2)}


def tables(*sizes):
    for start, stop in itertools.pairwise(np.cumsum((0, *sizes))):
        numbers = np.arange(start, stop)
        zeros = np.zeros_like(numbers)
        yield pa.table({"row": numbers, "caption": zeros, "epoch": zeros, "source": list(map(str, numbers))})


def in_threads(transform, num_threads=3):
    decode = DecodeRows(transform, seed=1)
    return decoded(tables(3, 1, 4, 5, 2), decode.collate, DecodeInThreads(decode, num_threads), ahead=2)


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_threads_yield_all_batches_in_order_and_are_not_more_than_asked_for(num_threads):
    transform = Slow()
    found = list(in_threads(transform, num_threads))
    assert [batch["number"].tolist() for batch in found] == [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    expected = [DecodeRows(Slow(), seed=1)(table) for table in tables(3, 1, 4, 5, 2)]
    for left, right in zip(expected, found, strict=True):
        np.testing.assert_array_equal(left["drawn"], right["drawn"])
    assert transform.most <= num_threads
    assert (transform.most > 1) == (num_threads > 1)


def test_a_mistake_is_told_after_the_batches_before_it():
    decode, found = DecodeRows(Slow(), seed=1), []
    batches = decoded(tables(10, 10, 10, 10), decode.collate, DecodeInThreads(decode, 2), ahead=1)
    with pytest.raises(UserError, match=r"^row 20 \(20\): is the twentieth$"):
        found.extend(batches)
    assert [batch["row"][0] for batch in found] == [0, 10]


def test_tables_that_cannot_be_read_are_told_after_the_batches_before_them():
    def broken():
        yield from tables(2, 2)
        raise UserError("the shard is gone")

    decode, found = DecodeRows(Slow(), seed=1), []
    with pytest.raises(UserError, match="the shard is gone"):
        found.extend(decoded(broken(), decode.collate, DecodeInThreads(decode, 2), ahead=1))
    assert len(found) == 2


class Gated(RowTransform):
    """Rows after the third wait."""

    def __init__(self):
        self.gate, self.begun = threading.Event(), []

    def __call__(self, row, rng):
        self.begun.append(row["row"])
        if row["row"] > 2:
            self.gate.wait()
        return {"number": row["row"]}


def test_a_closed_stream_leaves_no_thread_and_begins_no_other_row():
    before, transform = set(threading.enumerate()), Gated()
    decode = DecodeRows(transform, seed=1)
    batches = decoded(tables(3, 1, 1, 1, 1, 1), decode.collate, DecodeInThreads(decode, 1), ahead=2)
    next(batches)
    while 3 not in transform.begun:
        time.sleep(0.001)
    threading.Timer(0.5, transform.gate.set).start()  # the row that is being decoded is waited for
    batches.close()
    assert transform.gate.is_set()
    assert transform.begun == [0, 1, 2, 3]
    assert not [thread for thread in set(threading.enumerate()) - before if not isinstance(thread, threading.Timer)]


def test_a_stream_ends_soon_though_its_next_table_never_comes(monkeypatch):
    monkeypatch.setattr(decoding, "CLOSING_SECONDS", 0.5)
    gate, closed = threading.Event(), threading.Event()

    def stalled():
        try:
            yield from tables(2)
            gate.wait()
            yield from tables(2)
        finally:
            closed.set()

    decode = DecodeRows(Slow(), seed=1)
    batches = decoded(stalled(), decode.collate, DecodeInThreads(decode, 1), ahead=2)
    next(batches)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        batches.throw(KeyboardInterrupt)
    assert time.monotonic() - begun < 5
    assert not closed.is_set()
    gate.set()
    assert closed.wait(10)  # by the thread, once it is out


def test_a_process_ends_though_a_table_never_comes():
    script = """
import threading
from harma_ray.data.decoding import Ahead
def values():
    yield 1
    threading.Event().wait()
values = Ahead(values(), lambda: 1)
print(next(values))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_nothing_is_asked_for_further_ahead_than_allowed_at_the_time():
    taken, allowed = [], 1

    def numbers():
        for number in range(30):
            taken.append(number)
            yield number

    values = Ahead(numbers(), lambda: allowed)
    for number in range(30):
        assert next(values) == number
        until = time.monotonic() + 10
        while len(taken) < min(30, number + 1 + allowed) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(taken) == min(30, max(number + 1 + allowed, 14 if number > 9 else 0))  # 14 were allowed by then
        allowed = 3 if number < 10 else 1
    assert next(values, None) is None


def test_what_has_been_taken_is_held_by_nobody():
    class Value:
        pass

    def values():
        for _ in range(3):
            yield Value()

    ahead = Ahead(values(), lambda: 2)
    first = weakref.ref(next(ahead))
    ahead.join(0.2)
    gc.collect()
    assert first() is None
    ahead.close()
