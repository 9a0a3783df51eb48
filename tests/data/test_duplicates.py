import json
import logging

import pytest
from PIL import Image
from raw_composed import draw_fashioniq, fashioniq_split

from harma_ray.cli import main
from harma_ray.data.convert.commands import convert_folder, convert_harma, convert_scenes
from harma_ray.data.convert.duplicates import HASHES_NAME, compare_captions, find_shared
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.splits import open_split

TOO_GOOD = "figures on the one are too good if the other is trained or selected on"


def _convert(folder, split, colours, *, prefix="", **settings):
    """Converts a split of plain images, one a colour."""
    rows = []
    for colour in colours:
        name = f"{prefix}{split}-{colour}.png"
        Image.new("RGB", (8, 8), (20 * colour, 0, 0)).save(folder / name)
        rows.append({"image": name, "caption": ["A road."]})
    path = folder / f"{split}.json"
    path.write_text(json.dumps(rows))
    settings = WriteSettings(**settings)
    return convert_harma(path, folder, split, folder / "data", settings=settings)


def _found(folder, *splits):
    return [(each.split, each.other, each.total, each.pairs) for each in find_shared(folder / "data", splits or None)]


def test_images_of_another_split_are_told_at_conversion_every_time(tmp_path, caplog):
    _convert(tmp_path, "train", [1, 2, 3, 4, 5])
    with caplog.at_level(logging.WARNING):
        _convert(tmp_path, "val", [7, 8])
    assert caplog.text == ""
    for _ in range(2):  # the second finds the work done
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _convert(tmp_path, "test", [3, 9, 5, 8])
        assert "2 of 4 different images of test are byte for byte in train too" in caplog.text
        assert "(test: test-3.png = train: train-3.png, test: test-5.png = train: train-5.png)" in caplog.text
        assert "1 of 4 different images of test are byte for byte in val too" in caplog.text
        assert caplog.text.count(TOO_GOOD) == 2


@pytest.mark.parametrize("kept", [True, False])
def test_splits_are_compared_two_by_two_with_and_without_kept_hashes(tmp_path, kept):
    for split, colours in (("train", [1, 2, 3]), ("val", [2, 4]), ("test", [3, 4, 5, 5])):
        _convert(tmp_path, split, list(dict.fromkeys(colours)))
        if not kept:
            (tmp_path / "data" / split / HASHES_NAME).unlink()
    expected = [
        ("val", "train", 2, [("val-2.png", "train-2.png")]),
        ("test", "train", 3, [("test-3.png", "train-3.png")]),
        ("test", "val", 3, [("test-4.png", "val-4.png")]),
    ]
    assert _found(tmp_path) == expected
    assert _found(tmp_path, "train") == expected[:2]


def test_images_are_compared_as_they_came_however_they_are_stored(tmp_path):
    _convert(tmp_path, "train", [1, 2])
    _convert(tmp_path, "val", [2], resize=4)
    assert _found(tmp_path) == [("val", "train", 1, [("val-2.png", "train-2.png")])]


def test_smaller_images_without_kept_hashes_are_compared_as_they_are_stored(tmp_path):
    for split, colours in (("train", [1, 2]), ("val", [2, 3])):
        _convert(tmp_path, split, colours, resize=4)
    (tmp_path / "data" / "train" / HASHES_NAME).unlink()  # as older versions wrote them
    assert _found(tmp_path) == [("val", "train", 2, [("val-2.png", "train-2.png")])]


def test_splits_that_are_overwritten_together_are_compared_when_all_are_new(tmp_path, caplog):
    for number in range(30):
        path = tmp_path / "raw" / "farm" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 8, 200, 0)).save(path)
    rows = []
    for seed in (0, 1):  # another seed moves images into other splits
        settings = WriteSettings(seed=seed, overwrite=True)
        made = convert_folder(tmp_path / "raw", tmp_path / "data", fractions=(0.5, 0.25, 0.25), settings=settings)
        rows.append(
            {
                split: sorted(open_split(tmp_path / "data", split).read(["source"])["source"].to_pylist())
                for split in made
            }
        )
    assert set(rows[1]["train"]) & set(rows[0]["val"])
    assert _found(tmp_path) == []
    assert caplog.text == ""


def test_an_image_that_was_left_out_is_in_no_split(tmp_path):
    (tmp_path / "bad.json").write_text(
        json.dumps([{"image": f"{n}.png", "caption": ["A road."]} for n in ("bad", "good")])
    )
    (tmp_path / "bad.png").write_bytes(b"bad")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for split in ("train", "val"):
        settings = WriteSettings(max_bad=1)
        convert_harma(tmp_path / "bad.json", tmp_path, split, tmp_path / "data", settings=settings)
    assert _found(tmp_path) == [("val", "train", 1, [("good.png", "good.png")])]


def test_triplets_and_galleries_are_compared(tmp_path):
    raw = draw_fashioniq(tmp_path / "raw")
    fashioniq_split(raw, "train", tmp_path / "data")
    (raw / "images" / "Dv3.jpg").write_bytes((raw / "images" / "Tt1.jpg").read_bytes())
    fashioniq_split(raw, "val", tmp_path / "data")
    expected = [("val", "train", 25, [("Dv3", "Tt1")])]
    assert _found(tmp_path) == expected
    for split in ("train", "val"):
        (tmp_path / "data" / split / HASHES_NAME).unlink()
    assert _found(tmp_path) == expected


def test_captions_that_splits_share_are_counted(tmp_path):
    for split, captions in (("train", "abbc"), ("val", "bbbd"), ("test", "xyz")):
        rows = []
        for number, caption in enumerate(captions):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{split}{number}.png")
            rows.append({"image": f"{split}{number}.png", "caption": [caption.upper()]})
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        convert_harma(tmp_path / f"{split}.json", tmp_path, split, tmp_path / "data")
    found = compare_captions(tmp_path / "data")
    assert [(each.split, each.other) for each in found] == [("val", "train"), ("test", "train"), ("test", "val")]
    assert (found[0].different_shared, found[0].different, found[0].shared, found[0].captions) == (1, 2, 3, 4)
    assert [each.shared for each in found[1:]] == [0, 0]
    assert len(compare_captions(tmp_path / "data", ["val"])) == 2


def test_a_split_that_cannot_be_compared_stops_no_conversion(tmp_path, caplog):
    _convert(tmp_path, "train", [1, 2])
    next((tmp_path / "data" / "train").glob("part-*")).unlink()
    with caplog.at_level(logging.WARNING):
        assert _convert(tmp_path, "val", [2]).rows == 1
    assert "split train is not compared with the others: shard" in caplog.text


def test_drawn_scenes_are_in_one_split_each(tmp_path):
    convert_scenes(tmp_path / "data", {"train": 3, "val": 2}, style="summer", size=32)
    assert _found(tmp_path) == []
    assert not list((tmp_path / "data").rglob(HASHES_NAME))


def test_inspect_tells_all_splits_where_no_sheet_can_be_written(tmp_path, capsys):
    for split, colours in (("train", [1, 2, 3]), ("val", [2, 4])):
        _convert(tmp_path, split, colours)
        (tmp_path / "data" / f"contact-sheet-{split}.png").mkdir()
    data = str(tmp_path / "data")
    assert main(["inspect", data]) == 0
    printed = capsys.readouterr().out
    assert printed.count("contact sheet: none: cannot write the contact sheet") == 2
    assert "split train" in printed
    assert "split val" in printed
    assert "WARNING: 1 of 2 different images of val are byte for byte in train too, 50.0% (" in printed
    assert "\n2 of 2 captions of val are word for word in train too, 100.0% (1 of 1 different ones, 100.0%)" in printed
    assert "told apart by chance: I2T R@1/5/10 50.0 / 100.0 / 100.0, T2I R@1/5/10 50.0 / 100.0 / 100.0, " in printed
    (tmp_path / "file").write_text("")
    assert main(["inspect", data, "--sheet", str(tmp_path / "file")]) == 2
    told = capsys.readouterr()
    assert "split val" in told.out
    assert "choose another folder (--sheet)" in told.err
    _convert(tmp_path, "val", [4], prefix="new-", overwrite=True)
    assert main(["inspect", data, "--sheet", str(tmp_path / "sheets"), "--split", "val"]) == 0
    assert "no image is in two splits" in capsys.readouterr().out
    assert open_split(data, "val").manifest.rows == 1
