import shutil

import pytest

from harma_ray.config import OnDisk
from harma_ray.data.identity import data_identity, require_same_data, used_splits
from harma_ray.errors import UserError
from harma_ray.recipes import RECIPES, recipe_config
from harma_ray.settings import build_config, marked_settings


def settings(data, **changes):
    return build_config(recipe_config("harma-scenes"), {"data.path": str(data), **changes})


def check(known, data):
    require_same_data(known, settings(data), subject="run one", way_out="start a new run")


def test_a_data_set_is_known_by_what_is_in_it_wherever_it_lies(scenes, tmp_path):
    known = data_identity(settings(scenes, **{"data.test_split": "absent"}))
    assert {name: split["rows"] for name, split in known.items()} == {"train": 40, "val": 13}
    check(known, shutil.copytree(scenes, tmp_path / "elsewhere"))


def test_all_splits_that_changed_are_told_with_their_rows(scenes, tmp_path):
    known = data_identity(settings(scenes))
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
    assert list(used_splits(config)) == ["train", "test"]
    assert list(used_splits(recipe_config("harma-scenes"))) == ["train", "val", "test"]


def test_data_of_another_setting_is_part_of_a_run_too(scenes, tmp_path):
    """Talks come from one data set, Top-1 from another: the one that changed is named, by its setting."""
    labelled = shutil.copytree(scenes, tmp_path / "labelled")
    changes = {"data.path": str(scenes), "features.data": str(labelled), "features.gallery": "test"}
    config = build_config(recipe_config("scenes-vitp"), changes)
    known = data_identity(config)
    assert {name: split["rows"] for name, split in known.items()} == {
        "train": 40, "val": 13, "test": 11, "features.data/test": 11, "features.data/val": 13,
    }  # fmt: skip
    assert data_identity(build_config(config, {"features.data": ""})).keys() == {"train", "val", "test"}
    shutil.rmtree(labelled / "train")  # nobody looks at it
    require_same_data(known, config, subject="run one", way_out="start a new run")
    shutil.rmtree(labelled / "val")
    shutil.copytree(labelled / "test", labelled / "val")
    with pytest.raises(UserError) as caught:
        require_same_data(known, config, subject="run one", way_out="start a new run")
    assert str(caught.value).startswith(
        f"run one was begun on other data than lies in {labelled} now: `features.data/val` held 13 rows (fingerprint "
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_folder_that_is_no_model_is_known_as_a_data_set(recipe):
    """A setting that names a data set is in `data_sets`; those of ``model`` are known by the weights' fingerprint."""
    config = recipe_config(recipe)
    named = [name for name in marked_settings(config, OnDisk) if not name.startswith("model.")]
    config = build_config(config, dict.fromkeys(named, "folder"))
    assert config.data_sets.keys() == {"data.path", *named}
