"""Batches are made ahead of their use, no further than asked for, in order; what goes wrong is told in its turn."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from harma_ray.data.decoding import DecodeInThreads, DecodeRows, decoded, prefetched
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
    return decoded(tables(3, 1, 4, 5, 2), decode.collate, DecodeInThreads(decode, num_threads, 2), ahead=2)


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
    batches = decoded(tables(10, 10, 10, 10), decode.collate, DecodeInThreads(decode, 2, 2), ahead=1)
    with pytest.raises(UserError, match=r"^row 20 \(20\): is the twentieth$"):
        found.extend(batches)
    assert [batch["row"][0] for batch in found] == [0, 10]


def test_tables_that_cannot_be_read_are_told_after_the_batches_before_them():
    def broken():
        yield from tables(2, 2)
        raise UserError("the shard is gone")

    decode, found = DecodeRows(Slow(), seed=1), []
    with pytest.raises(UserError, match="the shard is gone"):
        found.extend(decoded(broken(), decode.collate, DecodeInThreads(decode, 2, 2), ahead=1))
    assert len(found) == 2


def test_a_closed_stream_leaves_no_thread_and_decodes_nothing_more():
    before, transform = set(threading.enumerate()), Slow()
    batches = in_threads(transform, 1)
    next(batches)
    batches.close()
    done = len(transform.done)
    assert not set(threading.enumerate()) - before
    assert done < 15
    time.sleep(0.1)
    assert len(transform.done) == done


def test_nothing_is_asked_for_further_ahead_than_allowed_at_the_time():
    taken, allowed = [], 1

    def numbers():
        for number in range(20):
            taken.append(number)
            yield number

    with contextlib.closing(prefetched(numbers(), lambda: allowed)) as values:
        for number in range(20):
            assert next(values) == number
            time.sleep(0.02)
            assert len(taken) == min(20, number + 1 + allowed) or 10 < number < 14  # three more were taken before
            allowed = 3 if number < 10 else 1
        assert next(values, None) is None
