"""What the readers of FashionIQ and CIRR keep with a warning, and what they refuse by file and row."""

import logging

import pytest
from raw_composed import cirr_split, draw_cirr, draw_fashioniq, edit_json, fashioniq_split

from harma_ray.data.convert.composed import read_cirr, read_fashioniq
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError


@pytest.fixture
def fashioniq(tmp_path):
    return draw_fashioniq(tmp_path / "fashionIQ_dataset")


@pytest.fixture
def cirr(tmp_path):
    return draw_cirr(tmp_path / "cirr_dataset")


# --- odd but kept ---


def test_odd_rows_are_kept_with_a_warning(fashioniq, tmp_path, caplog):
    def change(rows):
        rows[1]["captions"] = ["", " . "]
        rows[2]["captions"] = ["is Only one"]
        rows[3]["target"] = rows[3]["candidate"]

    edit_json(fashioniq / "captions" / "cap.dress.val.json", change)
    with caplog.at_level(logging.WARNING):
        fashioniq_split(fashioniq, "val", tmp_path, categories=["dress"])
    assert "dress val: 2 of 11 relative captions are empty, the first in cap.dress.val.json row 2" in caplog.text
    assert "dress val: 1 of 6 targets are the reference itself, the first in cap.dress.val.json row 4" in caplog.text
    captions = open_split(tmp_path, "val").queries().column("captions").to_pylist()
    assert captions[1:3] == [["", " . "], ["is Only one"]]


def test_training_images_of_fashioniq_need_not_be_in_the_index(fashioniq, tmp_path):
    edit_json(fashioniq / "image_splits" / "split.dress.train.json", lambda names: names[:1])
    assert fashioniq_split(fashioniq, "train", tmp_path, categories=["dress"]).rows == 6


# --- refused ---


def _set(*path, to):
    """Returns a change of one value of a JSON file."""

    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("cap", lambda rows: {"a": 1}, r"cap\.dress\.val\.json must be a JSON list of rows \{\"candidate\".*keys a$"),
        ("cap", lambda rows: [1], r"cap\.dress\.val\.json row 1 must look like .*got 1"),
        ("cap", lambda rows: rows[1].pop("target") and None, r"row 2 must look like .*no `target` \(keys: candidate"),
        ("cap", _set(0, "candidate", to=7), r"row 1 must look like .*`candidate` = 7"),
        ("cap", _set(0, "captions", to="is red"), r"row 1 must look like .*`captions` = 'is red'"),
        ("cap", _set(0, "captions", to=["a", 3]), r"row 1: `captions` must look like .*got 3"),
        ("cap", _set(0, "captions", to=["a", "b", "c"]), "row 1: `captions` must be 1 or 2 texts, got 3"),
        ("cap", _set(0, "captions", to=[]), "row 1: `captions` must be 1 or 2 texts, got 0"),
        ("cap", _set(0, "captions", to=["\ud800"]), "row 1: `captions` holds half a character"),
        ("cap", _set(2, "target", to="X9"), r"split\.dress\.val\.json lacks 1 .*'X9' of cap\.dress\.val\.json row 3"),
        ("split", lambda names: {"a": 1}, r"split\.dress\.val\.json must be a JSON list of rows that are each"),
        ("split", _set(3, to=None), r"split\.dress\.val\.json row 4 must look like the name of an image, got None"),
        ("split", lambda names: [*names, "Dv0", "B0"], r"lists 2 names \(Dv0, B0\) more than once"),
        ("split", lambda names: [*names, "../../secret"], r"row 10: image paths must lie under .*'\.\./\.\./secret'"),
        ("split", lambda names: [*names, ""], "row 10: image paths must lie under"),
        ("split", lambda names: names[7:], r"lacks 7 names \('Dv0' of cap.dress.val.json row 1, .*row 4, \.\.\.\)"),
    ],
)
def test_wrong_fashioniq_names_file_and_row(fashioniq, tmp_path, file, change, message):
    folder = {"cap": "captions", "split": "image_splits"}[file]
    edit_json(fashioniq / folder / f"{file}.dress.val.json", change)
    with pytest.raises(UserError, match=message) as caught:
        fashioniq_split(fashioniq, "val", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("cap", lambda rows: [], r"cap\.rc2\.val\.json must be a JSON list of rows \{\"pairid\".*an empty list"),
        ("cap", _set(0, "pairid", to="12"), "row 1 must look like .*`pairid` = '12'"),
        ("cap", _set(1, "pairid", to=100), r"row 2: `pairid` 100 is also in cap\.rc2\.val\.json row 1"),
        ("cap", lambda rows: rows[1].pop("target_hard") and None, "row 2 must look like .*no `target_hard`"),
        ("cap", _set(0, "caption", to=["a"]), "row 1 must look like .*`caption` = a list of 1"),
        ("cap", _set(0, "img_set", to=[]), "row 1 must look like .*`img_set` = an empty list"),
        ("cap", _set(0, "img_set", "members", to=["a"] * 6), "row 1: `members` must be 6 different names.*got a, a"),
        ("cap", _set(0, "target_hard", to="val-9-img0"), "row 1: `members` must be 6 .*for val-0-img0 and val-9-img0"),
        ("cap", _set(0, "target_hard", to="val-0-img0"), "row 1: the target must not be the reference"),
        ("split", lambda places: list(places), r"split\.rc2\.val\.json must look like \{name: path, .*got a list"),
        ("split", _set("val-1-img0", to=3), r"split\.rc2\.val\.json `val-1-img0` must look like .*got 3"),
        ("split", _set("val-1-img0", to="../x.png"), "`val-1-img0`: image paths must lie under"),
        ("split", lambda places: places.pop("val-5-img0") and None, r"lacks 1 name \('val-5-img0' of .* row 1\) that"),
    ],
)
def test_wrong_cirr_names_file_and_row(cirr, tmp_path, file, change, message):
    folder = {"cap": "captions", "split": "image_splits"}[file]
    edit_json(cirr / "cirr" / folder / f"{file}.rc2.val.json", change)
    with pytest.raises(UserError, match=message) as caught:
        cirr_split(cirr, "val", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_all_mistakes_of_both_files_are_told_at_once(fashioniq, cirr):
    edit_json(fashioniq / "captions" / "cap.dress.val.json", _set(0, "captions", to=[]))
    edit_json(fashioniq / "captions" / "cap.shirt.val.json", _set(2, "target", to="X9"))
    (fashioniq / "image_splits" / "split.toptee.val.json").unlink()
    with pytest.raises(UserError) as caught:
        read_fashioniq(fashioniq, "val")
    title, *lines = str(caught.value).splitlines()
    assert title == "FashionIQ's split val has 3 mistakes:"
    for line, part in zip(
        lines, ["cap.dress.val.json row 1", "split.toptee.val.json does not exist", "'X9'"], strict=True
    ):
        assert part in line
    edit_json(cirr / "cirr" / "captions" / "cap.rc2.val.json", _set(1, "pairid", to=100))
    edit_json(cirr / "cirr" / "image_splits" / "split.rc2.val.json", _set("val-1-img0", to="../x.png"))
    with pytest.raises(UserError, match=r"CIRR's split val has 2 mistakes:\n.*val-1-img0.*\n.*`pairid` 100"):
        read_cirr(cirr, "val")


def test_files_that_are_empty_are_not_told_as_there(fashioniq):
    source = read_fashioniq(fashioniq, "val")
    assert source.report().endswith("25 distinct images are needed in all\nall images are there")
    (fashioniq / "images" / "Dv3.jpg").write_bytes(b"")
    (fashioniq / "images" / "Sv1.jpg").write_bytes(b"")
    (fashioniq / "images" / "Tv1.jpg").unlink()
    *_, missing, first, empty, second, third = source.report().splitlines()
    assert missing.startswith("1 of 25 images are missing under ")
    assert empty.startswith("2 of 25 images are empty (0 bytes) under ")
    assert [first, second, third] == ["images/Tv1.jpg", "images/Dv3.jpg", "images/Sv1.jpg"]


def test_name_that_is_listed_twice_by_cirr_is_refused(cirr):
    path = cirr / "cirr" / "image_splits" / "split.rc2.val.json"
    path.write_text(path.read_text().replace("{", '{"val-0-img0": "./dev/other.png", ', 1))
    with pytest.raises(UserError, match=r"split\.rc2\.val\.json lists 1 name \(val-0-img0\) more than once"):
        read_cirr(cirr, "val")


def test_training_of_cirr_needs_references_and_targets_in_the_split_file_but_no_members(cirr, tmp_path):
    path = cirr / "cirr" / "image_splits" / "split.rc2.train.json"
    edit_json(path, lambda places: places.pop("train-10-img0") and None)
    assert cirr_split(cirr, "train", tmp_path).rows == 6
    edit_json(path, lambda places: places.pop("train-7-img0") and None)
    with pytest.raises(UserError, match=r"lacks 1 name \('train-7-img0' of cap\.rc2\.train\.json row 6\)"):
        cirr_split(cirr, "train", tmp_path)


def test_unknown_splits_and_folders_are_refused(fashioniq, cirr, tmp_path):
    with pytest.raises(UserError, match="train and val can be converted; the answers of test were never published"):
        read_fashioniq(fashioniq, "test")
    with pytest.raises(UserError, match="can be converted; got 'test1'"):
        read_fashioniq(fashioniq, "test1")
    with pytest.raises(UserError, match="categories are dress, toptee, shirt, got hat"):
        read_fashioniq(fashioniq, "val", ["dress", "hat"])
    with pytest.raises(UserError, match="splits are train, val, test1, got 'test'"):
        read_cirr(cirr, "test")
    with pytest.raises(UserError, match="none does not exist"):
        read_cirr(tmp_path / "none", "val")
    with pytest.raises(UserError, match=r"cap\.rc2\.val\.json cannot be read"):
        read_cirr(fashioniq, "val")
