"""The end of a Ray data set's execution: nothing of it is left running (Ray 2.60)."""

import contextlib
import itertools
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_starting = threading.Lock()


@contextlib.contextmanager
def closing_batches(iterable: Iterable[T]) -> Iterator[Iterator[T]]:
    """Gives the batches of a Ray data set; on leaving, ends its execution and waits for the threads that served it.

    Ray 2.60 does not wait for them, and one that asks for a block after Ray was shut down ends the whole process on
    the spot. It starts them with the first batch: the data sets of a process have to do so one after another, so that
    nobody waits for another's threads.
    """
    batches, own = iter(iterable), set[threading.Thread]()
    assert isinstance(batches, Generator)

    def served() -> Iterator[T]:
        with _starting:
            before = set(threading.enumerate())
            try:
                first = list(itertools.islice(batches, 1))
            finally:
                own.update(set(threading.enumerate()) - before)
        yield from first
        yield from batches

    try:
        yield served()
    finally:
        batches.close()
        for thread in own:
            if thread.name == "iter_threaded":
                thread.join(timeout=10)
