import numpy as np
import pyarrow.parquet as pq
import pytest

from harma_ray.data.order import (
    IndexedSplit,
    TrainingChunk,
    captions_of_group,
    read_samples,
    training_order,
    worker_rows,
)
from harma_ray.data.splits import index_rows, open_split
from harma_ray.errors import UserError


def make_order(scenes, *, seed=0, batch=8, window=256.0):
    return training_order(open_split(scenes, "train"), seed=seed, global_batch_size=batch, shuffle_window_mb=window)


@pytest.mark.parametrize("window", [256.0, 0.02])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_pair_is_visited_once_an_epoch_but_for_the_last_incomplete_batch(scenes, window, epoch):
    order = make_order(scenes, batch=7, window=window)
    pairs = [tuple(pair) for pair in order.epoch(epoch)]
    assert len(pairs) == len(set(pairs)) == 200 - 200 % 7
    assert set(pairs) <= {(row, caption) for row in range(40) for caption in range(5)}


def test_the_order_is_a_function_of_seed_and_epoch(scenes):
    first, again = make_order(scenes), make_order(scenes)
    assert np.array_equal(first.epoch(3), again.epoch(3))
    assert not np.array_equal(first.epoch(3), first.epoch(4))
    assert not np.array_equal(first.epoch(3), make_order(scenes, seed=1).epoch(3))


@pytest.mark.parametrize("window", [256.0, 0.02])
def test_one_caption_of_every_image_is_visited_each_drawn_as_often(scenes, window):
    split = open_split(scenes, "train")
    order = training_order(split, seed=0, global_batch_size=8, shuffle_window_mb=window, one_caption=True)
    assert (order.num_samples, order.steps_per_epoch) == (40, 5)
    visits = np.zeros((40, 5), int)
    for epoch in range(200):
        samples = order.epoch(epoch)
        assert sorted(samples[:, 0]) == list(range(40))
        np.add.at(visits, tuple(samples.T), 1)
    assert abs(visits / 200 - 0.2).max() < 0.15  # five standard deviations of a draw of 200
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert np.array_equal(order.epoch(1), order.epoch(1))


@pytest.mark.parametrize(("group", "samples"), [(5, 1), (2, 3), (3, 2), (1, 5)])
def test_groups_of_captions_show_every_caption_once_an_epoch_but_for_those_that_fill_the_last_up(
    scenes, group, samples
):
    order = training_order(
        open_split(scenes, "train"),
        seed=0,
        global_batch_size=8 * group,
        shuffle_window_mb=0.02,
        captions_per_sample=group,
    )
    assert (order.num_samples, order.steps_per_epoch) == (40 * samples, 40 * samples // 8)
    filled = np.zeros(5, int)
    for epoch in range(5):
        shown = np.zeros((40, 5), int)
        assert len(order.epoch(epoch)) == 40 * samples
        for row, number in order.epoch(epoch):
            np.add.at(shown[row], captions_of_group(number, group, num_captions=5, epoch=epoch), 1)
        assert (shown == shown[0]).all()
        assert shown.min() == 1
        assert (shown == 2).sum(axis=1).tolist() == [group * samples - 5] * 40
        filled += shown[0] - 1
    assert len(set(filled)) == 1  # each fills as often as any other


def test_an_image_with_fewer_captions_than_a_group_shows_them_in_turn():
    assert captions_of_group(0, 5, num_captions=2, epoch=0) == [0, 1, 0, 1, 0]
    assert captions_of_group(0, 5, num_captions=2, epoch=1) == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_workers(scenes, world_size):
    order = make_order(scenes)
    alone = order.worker_samples(2, 0, 1)
    together = np.concatenate([order.worker_samples(2, rank, world_size) for rank in range(world_size)], axis=1)
    assert np.array_equal(together, alone)


def test_captions_of_an_image_do_not_stay_together(scenes):
    rows = make_order(scenes).epoch(0)[:, 0]
    assert (rows[1:] == rows[:-1]).mean() < 0.2


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 13, 20])
def test_every_row_is_evaluated_once(world_size, num_rows):
    rows = np.concatenate([worker_rows(num_rows, rank, world_size) for rank in range(world_size)])
    assert sorted(rows) == list(range(num_rows))


def test_reading_samples_gives_the_rows_of_the_shards_in_the_asked_order(scenes):
    split = open_split(scenes, "train")
    source = IndexedSplit(split, index_rows(split))
    whole = [row for path in split.shard_paths() for row in pq.read_table(path).to_pylist()]
    samples = np.array([[39, 0], [0, 4], [17, 2], [0, 1]])
    table = read_samples(source, samples, epoch=9).to_pylist()
    for sample, row in zip(samples, table, strict=True):
        assert {key: row[key] for key in whole[0]} == whole[sample[0]]
        assert (row["row"], row["caption"], row["epoch"]) == (*sample, 9)


def test_a_chunk_reads_its_steps(scenes):
    order = make_order(scenes)
    chunk = TrainingChunk(epoch=1, rank=1, world_size=2, start=3, stop=5, num_rows=8)
    table = chunk.read(order)
    expected = order.worker_samples(1, 1, 2)[3:5].reshape(-1, 2)
    assert np.array_equal(np.stack([table["row"], table["caption"]], axis=1), expected)


def test_a_batch_larger_than_the_data_is_refused_with_the_way_out(scenes):
    with pytest.raises(UserError, match=r"200 pairs.*got 201.*use 200 or less"):
        make_order(scenes, batch=201)


def test_a_missing_shard_is_named(scenes_copy):
    split = open_split(scenes_copy, "train")
    split.shard_paths()[0].unlink()
    with pytest.raises(UserError, match="part-00000"):
        open_split(scenes_copy, "train")


def test_a_missing_split_is_named_with_those_there(scenes):
    with pytest.raises(UserError, match=r"no split `nope`.*train, val, test"):
        open_split(scenes, "nope")


def test_a_damaged_shard_is_named(scenes_copy):
    split = open_split(scenes_copy, "train")
    path = split.shard_paths()[0]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match=r"cannot read shard .*part-00000"):
        index_rows(split)
