import shutil

import pytest

from harma_ray.data.identity import data_identity, require_same_data, used_splits
from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config


def check(known, data):
    require_same_data(known, str(data), subject="run one", way_out="start a new run")


def test_a_data_set_is_known_by_what_is_in_it_wherever_it_lies(scenes, tmp_path):
    known = data_identity(str(scenes), ["train", "val", "absent"])
    assert {name: split["rows"] for name, split in known.items()} == {"train": 40, "val": 13}
    check(known, shutil.copytree(scenes, tmp_path / "elsewhere"))


def test_all_splits_that_changed_are_told_with_their_rows(scenes, tmp_path):
    known = data_identity(str(scenes), ["train", "val", "test"])
    data = shutil.copytree(scenes, tmp_path / "data")
    shutil.rmtree(data / "val")
    shutil.copytree(data / "test", data / "val")
    shutil.rmtree(data / "test")
    with pytest.raises(UserError) as caught:
        check(known, data)
    marks = {name: split["fingerprint"][:12] for name, split in known.items()}
    assert str(caught.value) == (
        f"run one was begun on other data than lies in {data} now: `val` held 13 rows (fingerprint {marks['val']}) and "
        f"holds 11 rows (fingerprint {marks['test']}); `test` held 11 rows (fingerprint {marks['test']}) and holds "
        "nothing; put the data back as it was, or start a new run"
    )


def test_what_nobody_looks_at_is_no_part_of_a_run():
    config = build_config(recipe_config("harma-scenes"), {"train.select_on": "test-as-in-released-code"})
    assert used_splits(config) == ("train", "test")
    assert used_splits(recipe_config("harma-scenes")) == ("train", "val", "test")
