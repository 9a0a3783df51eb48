"""The driver's view of a run's record."""

import json
import threading

from harma_ray.files import write_text
from harma_ray.on_ray.workers import _follow


def lines(*steps):
    return "".join(json.dumps({"kind": "step", "step": step}) + "\n" for step in steps)


def test_new_records_are_told_once_also_after_the_record_was_cut_back(tmp_path):
    path, told = tmp_path / "metrics.jsonl", []
    ready, done = threading.Event(), threading.Event()
    path.write_text(lines(1, 2, 3, 4, 5))
    follower = threading.Thread(target=_follow, args=(path, ready, done, lambda record: told.append(record["step"])))
    follower.start()
    ready.wait()
    write_text(path, lines(1, 2))
    with path.open("a") as file:
        file.write(lines(30, 40) + '{"kind": ')
    done.set()
    follower.join()
    assert told == [30, 40]
