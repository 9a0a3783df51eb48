import time

import pytest

from harma_ray import progress


def test_a_bar_prints_lines_where_it_cannot_be_redrawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.01)
    for _ in progress.progress_bar(iterable=range(2), total=2, desc="vectors", unit=" batches", leave=False):
        time.sleep(0.02)
    with progress.progress_bar(total=9, desc="writing", unit=" images") as bar:
        time.sleep(0.02)
        bar.update(4)

    told = capsys.readouterr().err
    assert [line.split(",")[0] for line in told.split("\n")] == [
        "vectors: 1 of 2 batches",
        "vectors: 2 of 2 batches",
        "writing: 4 of 9 images",
        "",
    ]
    assert not set("\r\x1b") & set(told)


def test_a_short_step_prints_nothing_where_no_bar_can_be_redrawn(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
