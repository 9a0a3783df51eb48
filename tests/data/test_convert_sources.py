import json
import os
import re

import pytest
from PIL import Image

from harma_ray.data.convert.examination import NeededImages
from harma_ray.data.convert.folders import list_scenes, read_class_folders
from harma_ray.data.convert.records import SceneSpec
from harma_ray.data.convert.sources import read_harma, read_karpathy
from harma_ray.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write_json(content, name="rows.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_json


def _train_row(number, caption, **changes):
    row = {"caption": caption, "image": f"train/{number}.jpg", "image_id": number, "label_name": "park", "label": 2}
    return {**row, **changes}


def _eval_row(number, captions=("A road.",), **changes):
    return {"image": f"val/{number}.jpg", "caption": list(captions), **changes}


def _karpathy(*rows):
    return {"images": [{"filename": f, "split": s, "sentences": [{"raw": t} for t in texts]} for f, s, texts in rows]}


# --- HarMA ---


def test_training_rows_of_an_image_are_joined_in_order(write, tmp_path):
    rows = [_train_row(7, "First."), _train_row(3, "Other"), _train_row(7, "Second"), _train_row(7, "First")]
    records = read_harma(write(rows), tmp_path)
    assert [(r.image_id, r.captions) for r in records] == [(7, ("first", "second", "first")), (3, ("other",))]
    first = records[0]
    assert (first.source, first.image, first.label, first.label_name) == (
        "train/7.jpg",
        tmp_path / "train/7.jpg",
        2,
        "park",
    )
    assert first.origin == "rows.json row 1"


def test_evaluation_rows_are_numbered_from_zero_and_may_lack_labels(write, tmp_path):
    records = read_harma(write([_eval_row(9, ["A Road.", "A-B"]), _eval_row(4, label=5, label_name="pond")]), tmp_path)
    assert [(r.image_id, r.captions, r.label, r.label_name) for r in records] == [
        (0, ("a road", "a b"), None, None),
        (1, ("a road",), 5, "pond"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "rows.json is not JSON"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "is not JSON"),
        ({"images": []}, "rows.json must be a JSON list of rows.*an object with keys images"),
        ([], "rows.json must be a JSON list of rows.*an empty list"),
        ([1], r"rows.json row 1 must look like .*got 1"),
        ([_train_row(0, "a"), "x"], r"row 2 must look like \{\"caption\": text.*got 'x'"),
        ([_train_row(0, "a"), _eval_row(1)], r"row 2 must look like \{\"caption\": text.*`caption` = a list of 1"),
        ([_eval_row(1), _train_row(0, "a")], r"row 2 must look like \{\"image\": path.*`caption` = 'a'"),
        ([{"caption": "a", "image": "a.jpg"}], r"row 1 .*no `image_id` \(keys: caption, image\)"),
        ([_train_row("7", "a")], r"row 1 .*`image_id` = '7'"),
        ([_train_row(True, "a")], r"row 1 .*`image_id` = True"),
        ([_train_row(-1, "a")], r"row 1: `image_id` must lie in 0\.\.2147483647, got -1"),
        ([_train_row(0, "a", label="2")], r"row 1 .*`label` = '2'"),
        ([_train_row(0, "a", label=2**40)], r"`label` must lie in 0\.\.2147483647"),
        ([_train_row(0, " .,!")], r"row 1: the caption ' \.,!' is empty after cleaning"),
        ([_eval_row(0, ["ok", ""])], r"row 1: the caption '' is empty after cleaning"),
        ([_eval_row(0, ["ok", None])], r"row 1: captions must be texts, got None"),
        ([_eval_row(0, [])], r"row 1: `caption` is an empty list"),
        ([_eval_row(0), _eval_row(0)], r"row 2: image 'val/0.jpg' is also in rows.json row 1"),
        (
            [_train_row(0, "a"), _train_row(0, "b", image="other.jpg")],
            r"row 2: rows of one image_id .*'other.jpg' here and 'train/0.jpg' in rows.json row 1",
        ),
        ([_train_row(0, "a"), _train_row(0, "b", label=3)], r"row 2: rows of one image_id .*3 here and 2 in"),
        ([_train_row(0, "a"), _train_row(1, "b", image="train/0.jpg")], "row 2: image 'train/0.jpg' is also in"),
        ([_train_row(0, "a"), _train_row(1, "b", label=3)], "a class has one number and one name"),
        ([_train_row(0, "a"), _train_row(1, "b", label_name="pond")], "a class has one number and one name"),
    ],
)
def test_wrong_shape_names_file_row_and_what_was_expected(write, tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_harma(write(content), tmp_path)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once_and_those_alike_in_one_line(write, tmp_path):
    rows = [_train_row(number, "a") for number in range(9)]
    for number in (2, 4, 6):
        rows[number]["image_id"] = f"{number}"
    rows[1]["caption"] = " . "
    rows[3]["label"] = 7
    rows[5]["image"] = "../5.jpg"
    rows[8]["image"] = "train/7.jpg"
    with pytest.raises(UserError) as caught:
        read_harma(write(rows), tmp_path)
    title, *lines = str(caught.value).splitlines()
    assert title == "rows.json has 7 mistakes:"
    assert len(lines) == 5
    for line, part in zip(
        lines,
        [
            "row 2: the caption ' . ' is empty after cleaning",
            "row 3 must look like",
            "row 6: image paths must lie under",
            "row 9: image 'train/7.jpg' is also in rows.json row 8",
            "row 4: a class has one number and one name, got 7 = 'park'",
        ],
        strict=True,
    ):
        assert f"  rows.json {part}" in line
    assert lines[1].endswith("write the number without quotes or decimal point: 2 (and 2 more like this)")


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([_train_row("7", "a")], r"`image_id` = '7'; write the number without quotes or decimal point: 7$"),
        ([_train_row(7.0, "a")], r"`image_id` = 7\.0; write the number without quotes or decimal point: 7$"),
        ([_train_row("bridge_9", "a")], "number the images from 0, the same number in all rows of one image$"),
        ([_train_row(0, "a", label=float("nan"))], "`label` = nan; leave it out or write null$"),
        ([_eval_row(0), {"image": "b.jpg", "caption": "A road."}], r'write it as a list: \["A road\."\]$'),
        ([{"image": "b.jpg", "caption": "A road."}, _eval_row(0), _eval_row(1)], r'row 1 .* list: \["A road\."\]$'),
        ([{"image": "b.jpg", "caption": "A road."}], r'no `image_id` .*which does not, has a list: .*\["A road\."\]$'),
        (_karpathy(("a", "train", ["a"])), "such a file is read by `convert karpathy`$"),
        ({"farm": [{"filename": "a", "split": "train", "raw": "a"}]}, "such a file is read by `convert karpathy`$"),
    ],
)
def test_advice_fits_the_mistake(write, tmp_path, rows, advice):
    with pytest.raises(UserError, match=advice):
        read_harma(write(rows), tmp_path)


TEXT = json.dumps([_eval_row(0, ["Café road"])], ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_annotations_may_be_in_any_unicode_encoding(tmp_path, encoding):
    (tmp_path / "rows.json").write_bytes(TEXT.encode(encoding))
    assert read_harma(tmp_path / "rows.json", tmp_path)[0].captions == ("café road",)


def test_json_lines_are_read(tmp_path):
    rows = [_eval_row(0), _eval_row(1)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [r.source for r in read_harma(tmp_path / "rows.json", tmp_path)] == ["val/0.jpg", "val/1.jpg"]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]))
    assert len(read_harma(tmp_path / "one.jsonl", tmp_path)) == 1
    split_by_others = [_eval_row(number, ["A road\u2028to\x85town"]) for number in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in split_by_others)
    (tmp_path / "separators.jsonl").write_text(lines, newline="")
    assert [r.captions for r in read_harma(tmp_path / "separators.jsonl", tmp_path)] == [("a road to town",)] * 2
    (tmp_path / "bad.json").write_text(f"{json.dumps(rows[0])}\n{{'a': 1}}\n")
    with pytest.raises(UserError, match="looks like JSON Lines, but line 2 is not JSON"):
        read_harma(tmp_path / "bad.json", tmp_path)


def test_blank_lines_of_json_lines_are_skipped_but_counted(tmp_path):
    for name, encoding in (("rows.json", "utf-8"), ("rows.jsonl", "utf-8-sig"), ("wide.jsonl", "utf-16")):
        text = f"\n{json.dumps(_eval_row(0))}\n \n\n{json.dumps(_eval_row(1))}\n\n"
        (tmp_path / name).write_text(text, encoding=encoding)
        assert [r.origin for r in read_harma(tmp_path / name, tmp_path)] == [f"{name} line 2", f"{name} line 5"]
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "one.jsonl").write_text(f"\n\n {json.dumps(_eval_row(0))}\n", encoding=encoding)
        assert read_harma(tmp_path / "one.jsonl", tmp_path)[0].origin == "one.jsonl line 3"
    (tmp_path / "rows.json").write_text(f"\n{json.dumps(_eval_row(0))}\n\n{json.dumps([])}\n")
    with pytest.raises(UserError, match=r"rows\.json line 4 must look like"):
        read_harma(tmp_path / "rows.json", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            TEXT.encode("latin-1"),
            r"may be WINDOWS-1252; convert it: iconv -f WINDOWS-1252 -t UTF-8 '.*/my rows\.json' > ",
        ),
        (TEXT.replace("é", "农田").encode("gbk"), "may be GB18030"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*`git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04\xff\xff", "zip archive"),
        (TEXT.encode()[:-2], "is not JSON .*complete download"),
        (TEXT.encode()[:-40], "is not JSON .*complete download"),
        (TEXT.encode("utf-16")[:-3], "is not JSON .*complete download"),
        (b"[{'image': 1}]", "is not JSON .*line 1 column 3.*correct it there"),
    ],
)
def test_files_that_are_no_json_are_named_as_what_they_are(tmp_path, content, message):
    (tmp_path / "my rows.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_harma(tmp_path / "my rows.json", tmp_path)
    assert "\n" not in str(caught.value)


def test_absolute_paths_under_the_image_folder_are_taken(write, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    for given, named in ((root, root), (tmp_path / "link", tmp_path / "link"), (tmp_path / "link", root)):
        (record,) = read_harma(write([_eval_row(0, image=str(named / "val" / "a.jpg"))]), given)
        assert (record.source, record.image) == ("val/a.jpg", given / "val" / "a.jpg")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("val\\A.jpg", "val/A.jpg"),
        ("VAL/a.JPG", "val/A.jpg"),
        ("val/A.tif", "val/A.jpg"),
        ("val/A", "val/A.jpg"),
        ("images/val/A.jpg", "val/A.jpg"),
        ("C:\\data\\images\\val\\A.jpg", "val/A.jpg"),
        ("A.jpg", "val/A.jpg"),
        ("val/e\u0301.png", "val/\u00e9.png"),
        ("val/B.jpg", None),
        ("val", None),
        ("val/A.txt", None),
    ],
)
def test_the_file_that_may_be_meant_is_named(write, tmp_path, name, meant):
    root = tmp_path / "images"
    _make_images(root, "val/A.jpg", "val/\u00e9.png")
    (record,) = read_harma(write([_eval_row(0, image=name)]), root)
    (bad,) = NeededImages.of([record]).examine().unreadable
    assert bad.reason.endswith(f"; is {meant!r} meant, which is there?") == (meant is not None)


def test_files_that_may_be_meant_are_looked_for_a_hundred_times(write, tmp_path):
    """Of a hundred thousand images on a network drive it would take hours."""
    _make_images(tmp_path, "val/A.jpg")
    records = read_harma(write([_eval_row(number, image=f"{number}/val/a.jpg") for number in range(120)]), tmp_path)
    missing = NeededImages.of(records).examine().unreadable
    assert len(missing) == 120
    assert [bad.reason.endswith("is 'val/A.jpg' meant, which is there?") for bad in missing] == [True] * 100 + [
        False
    ] * 20


def test_the_file_that_may_be_meant_by_a_path_of_another_machine_is_named(write, tmp_path):
    _make_images(tmp_path, "val/A.jpg")
    with pytest.raises(UserError, match=r"got '/home/you/rsitmd/val/A\.jpg'; is 'val/A\.jpg' meant, which is there\?$"):
        read_harma(write([_eval_row(0, image="/home/you/rsitmd/val/A.jpg")]), tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "", ".", "a\0b"])
def test_paths_that_leave_the_image_folder_are_refused(write, tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    with pytest.raises(UserError, match="row 1: image paths must lie under the image folder"):
        read_harma(write([_eval_row(0, image=name)]), root)


def test_dots_inside_the_image_folder_are_fine(write, tmp_path):
    records = read_harma(write([_eval_row(0, image="a/../b.jpg")]), tmp_path)
    assert records[0].image == tmp_path / "b.jpg"


def test_missing_files_and_folders_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"annotation file .*none.json cannot be read"):
        read_harma(tmp_path / "none.json", tmp_path)
    with pytest.raises(UserError, match=r"image folder .*none does not exist"):
        read_harma(write([_eval_row(0)]), tmp_path / "none")


def test_deeply_nested_json_is_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"nested too deeply|is not JSON"):
        read_harma(write("[" * 200_000), tmp_path)


def test_class_numbers_come_from_names_where_missing(write, tmp_path):
    named = [_eval_row(n, label_name=name) for n, name in enumerate(["pond", "airport", "pond"])]
    assert [r.label for r in read_harma(write(named), tmp_path)] == [1, 0, 1]
    mixed = [_eval_row(0, label_name="pond", label=8), _eval_row(1, label_name="pond"), _eval_row(2)]
    assert [r.label for r in read_harma(write(mixed), tmp_path)] == [8, 8, None]
    with pytest.raises(UserError, match="class 'park' has no `label`"):
        read_harma(write([*mixed, _eval_row(3, label_name="park")]), tmp_path)


def test_caption_of_ten_thousand_words_is_cut(write, tmp_path):
    records = read_harma(write([_eval_row(0, ["house " * 10_000])]), tmp_path)
    assert records[0].captions == (" ".join(["house"] * 30),)


# --- Karpathy ---


def test_karpathy_splits_are_read_with_their_sentences(write, tmp_path):
    content = _karpathy(("a.tif", "train", ["One.", "Two"]), ("b.tif", "test", ["B"]), ("c.tif", "train", ["C"]))
    splits = read_karpathy(write(content), tmp_path)
    assert list(splits) == ["train", "test"]
    assert [(r.image_id, r.source, r.captions) for r in splits["train"]] == [
        (0, "a.tif", ("one", "two")),
        (2, "c.tif", ("c",)),
    ]
    assert splits["test"][0].origin == "rows.json image 2"


def test_karpathy_filepath_goes_before_the_file_name(write, tmp_path):
    content = _karpathy(("a.tif", "train", ["One."]))
    content["images"][0]["filepath"] = "sub"
    assert read_karpathy(write(content), tmp_path)["train"][0].source == "sub/a.tif"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"rows.json must look like \{\"images\".*got an empty list"),
        ({"image": 1}, "got an object with keys image"),
        ({"images": []}, "must look like"),
        ({"images": [3]}, r"rows.json image 1 must look like .*got 3"),
        ({"images": [{"filename": "a"}]}, "image 1 .*no `split`"),
        ({"images": [{"filename": "a", "split": "train", "sentences": [{"tokens": []}]}]}, "image 1 .*no `raw`"),
        ({"images": [{"filename": "a", "split": "train", "sentences": []}]}, "image 1: `sentences` is empty"),
        (_karpathy(("a", "train", ["."])), r"image 1: the caption '\.' is empty"),
        (_karpathy(("../a", "train", ["a"])), "image 1: image paths must lie under"),
        (_karpathy(("a", "train", ["a"]), ("a", "train", ["b"])), "image 2: image 'a' is also in rows.json image 1"),
        (_karpathy(("a", "restval", ["a"])), "has no images of split train, val, test; it has restval"),
    ],
)
def test_wrong_karpathy_shape_names_file_image_and_what_was_expected(write, tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_karpathy(write(content), tmp_path)


def _nwpu_row(name, split, *texts):
    captions = {f"raw_{number}" if number else "raw": text for number, text in enumerate(texts)}
    return {"filename": name, "imgid": 0, "split": split, "sentids": [0], **captions}


def test_nwpu_captions_are_read_by_class_wherever_their_images_lie(write, tmp_path):
    content = {
        "lake": [_nwpu_row("lake_1.jpg", "train", "One.", *(f"{n}" for n in range(1, 12)))],
        "farm": [_nwpu_row("farm_1.jpg", "test", "B", "C"), _nwpu_row("farm_2.jpg", "train", "D")],
    }
    _make_images(tmp_path, "farm_1.jpg", "farm/farm_2.jpg")
    splits = read_karpathy(write(content), tmp_path)
    told = {
        split: [(r.image_id, r.source, r.label, r.label_name, len(r.captions)) for r in splits[split]]
        for split in splits
    }
    assert told == {
        "train": [(0, "lake/lake_1.jpg", 1, "lake", 12), (2, "farm/farm_2.jpg", 0, "farm", 1)],
        "test": [(1, "farm_1.jpg", 0, "farm", 2)],
    }
    assert splits["train"][0].captions == ("one", *(f"{n}" for n in range(1, 12)))


def test_wrong_nwpu_rows_are_told_together(write, tmp_path):
    rows = [
        _nwpu_row("1.jpg", "train", "A"),
        {"filename": "2.jpg", "split": "train"},
        _nwpu_row("3.jpg", "train", "A", 5),
    ]
    with pytest.raises(UserError) as caught:
        read_karpathy(write({"farm": rows, "lake": "none"}), tmp_path)
    title, *lines = str(caught.value).splitlines()
    assert title == "rows.json has 3 mistakes:"
    for line, part in zip(
        lines, ["farm row 2 must .*no `raw` ", "farm row 3 .*`raw_1` = 5", "lake row 1 must .*'none'"], strict=True
    ):
        assert re.search(part, line)


def test_mistakes_of_karpathy_rows_are_told_together(write, tmp_path):
    content = _karpathy(("a", "train", ["."]), ("b", "train", ["b"]), ("b", "train", ["c"]), ("../a", "val", ["d"]))
    with pytest.raises(UserError, match=r"^rows\.json has 3 mistakes:\n.*image 1.*\n.*image 4.*\n.*image 3.*image 2"):
        read_karpathy(write(content), tmp_path)
    with pytest.raises(UserError, match=r"such rows are read by `convert harma`$"):
        read_karpathy(write([_eval_row(0)]), tmp_path)


# --- class folders ---


def _make_images(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def test_folders_of_splits_share_their_class_numbers(tmp_path):
    _make_images(tmp_path, "train/pond/b.png", "train/pond/a.png", "test/airport/x.png", "test/pond/deep/y.jpg")
    (tmp_path / "train/pond/.hidden.png").write_text("")
    (tmp_path / "train/pond/notes.txt").write_text("")
    splits = read_class_folders(tmp_path)
    assert {split: [(r.source, r.label, r.label_name) for r in rows] for split, rows in splits.items()} == {
        "train": [("train/pond/a.png", 1, "pond"), ("train/pond/b.png", 1, "pond")],
        "test": [("test/airport/x.png", 0, "airport"), ("test/pond/deep/y.jpg", 1, "pond")],
    }
    assert len({r.image_id for rows in splits.values() for r in rows}) == 4
    assert all(r.captions == () for rows in splits.values() for r in rows)


def test_class_folders_are_split_by_hash(tmp_path):
    names = [f"{label}/{number}.png" for label in ("a", "b") for number in range(100)]
    _make_images(tmp_path, *names)

    def places(**options):
        return {r.source: split for split, rows in read_class_folders(tmp_path, **options).items() for r in rows}

    first = places()
    assert set(first) == set(names)
    shares = [list(first.values()).count(split) / 200 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert first == places()
    assert first != places(seed=1)
    _make_images(tmp_path, "b/new.png")
    later = places()
    assert {name: later[name] for name in first} == first
    assert set(places(fractions=(1, 0, 0)).values()) == {"train"}
    assert set(places(fractions=(0.5, 0.5, 0)).values()) == {"train", "val"}


def test_caption_template_names_the_class(tmp_path):
    _make_images(tmp_path, "train/tennis_court/a.png")
    records = read_class_folders(tmp_path, caption_template="An aerial photograph of {label}.")["train"]
    assert records[0].captions == ("an aerial photograph of tennis court",)
    with pytest.raises(UserError, match=re.escape("must contain {label}")):
        read_class_folders(tmp_path, caption_template="a photo")


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, -0.1), (0.8, 0.1, 0.2)])
def test_fractions_must_add_up(tmp_path, fractions):
    with pytest.raises(UserError, match="fractions of train, val, test must be 3 numbers"):
        read_class_folders(tmp_path, fractions=fractions)


def test_folders_that_are_no_class_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no class folders with images"):
        read_class_folders(tmp_path)
    _make_images(tmp_path, "a/1.png", "train/a/1.png")
    with pytest.raises(UserError, match=r"mixes splits .* and other folders \(a\)"):
        read_class_folders(tmp_path)
    _make_images(tmp_path, "loose.png")
    (tmp_path / "a/1.png").unlink()
    (tmp_path / "a").rmdir()
    _make_images(tmp_path, "train/loose.png")
    with pytest.raises(UserError, match=r"2 images lie in no class folder .*loose\.png"):
        read_class_folders(tmp_path)


def test_top_folder_of_an_archive_is_named_instead_of_becoming_the_only_class(tmp_path):
    _make_images(tmp_path, "My UCM/Images/farm/1.tif", "My UCM/Images/lake/2.tif")
    with pytest.raises(UserError, match=r"one class, 'My UCM', .*2 folders of My UCM/Images \(farm, lake\)") as caught:
        read_class_folders(tmp_path)
    assert f"--images '{tmp_path}/My UCM/Images';" in str(caught.value)
    assert len(read_class_folders(tmp_path / "My UCM" / "Images", fractions=(1, 0, 0))["train"]) == 2
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "My UCM" / "Images").rename(tmp_path / "train" / "Images")
    _make_images(tmp_path, "test/Images/lake/3.tif")
    with pytest.raises(
        UserError, match=r"2 folders of Images \(farm, lake\).*move them up, into the folders of the splits"
    ):
        read_class_folders(tmp_path)


def test_one_class_may_have_folders_if_it_has_images_of_its_own(tmp_path):
    _make_images(tmp_path, "farm/1.tif", "farm/part2/2.tif")
    assert [r.label_name for r in read_class_folders(tmp_path, fractions=(1, 0, 0))["train"]] == ["farm", "farm"]


def test_classes_that_hold_nothing_but_folders_are_told(tmp_path, caplog):
    _make_images(tmp_path, *(f"{kind}/{label}/1.tif" for kind in ("Images", "Masks") for label in "fedcba"))
    rows = read_class_folders(tmp_path, fractions=(1, 0, 0))["train"]
    assert {row.label_name for row in rows} == {"Images", "Masks"}
    assert "the 2 classes are Images, Masks; the folders inside them, a, b, c, d, e, ..., are no classes" in caplog.text
    caplog.clear()
    _make_images(tmp_path, "Masks/0.tif")
    read_class_folders(tmp_path, fractions=(1, 0, 0))
    assert caplog.text == ""


def test_folders_of_splits_with_other_names_are_no_classes(tmp_path):
    _make_images(tmp_path, "Train/farm/1.tif", "valid/farm/2.tif")
    with pytest.raises(UserError, match=r"look like splits \(Train, valid\) but are not named train, val, test"):
        read_class_folders(tmp_path)


def test_an_image_that_links_bring_into_two_classes_is_in_one_split(tmp_path):
    root = tmp_path / "classes"
    _make_images(tmp_path / "disk", *(f"{number}.png" for number in range(40)))
    _make_images(root, "own/0.png")
    for name in ("farm", "forest"):
        (root / name).symlink_to(tmp_path / "disk")
    splits = read_class_folders(root, fractions=(0.5, 0.25, 0.25))
    where = {r.source: split for split, rows in splits.items() for r in rows}
    assert len(where) == 81
    assert all(where[f"farm/{number}.png"] == where[f"forest/{number}.png"] for number in range(40))
    assert set(where.values()) == {"train", "val", "test"}


def test_class_folders_with_names_that_are_not_utf8_are_read_without_captions_of_them(tmp_path):
    name = os.fsdecode(b"farm\xc5\xa9\xff")
    _make_images(tmp_path, f"{name}/a\udcff.png", "lake/b.png")
    rows = read_class_folders(tmp_path, fractions=(1, 0, 0))["train"]
    assert [(r.source, r.label_name) for r in rows] == [("farmũ\\xff/a\\xff.png", "farmũ\\xff"), ("lake/b.png", "lake")]
    assert rows[0].image.is_file()
    with pytest.raises(UserError, match=r"farmũ\\xff has a name that is not UTF-8.*rename it or leave out"):
        read_class_folders(tmp_path, caption_template="a {label}")


# --- scenes ---


def test_scenes_of_a_split_do_not_depend_on_the_other_counts():
    settings = {"style": "summer", "size": 32, "seed": 4}
    small = list_scenes({"train": 3, "val": 2}, **settings)
    large = list_scenes({"train": 5, "val": 2, "test": 1}, **settings)
    assert large["train"][:3] == small["train"]
    assert large["val"] == small["val"]
    indices = [record.image.index for rows in large.values() for record in rows]
    assert len(set(indices)) == len(indices)
    assert small["val"][0].image == SceneSpec(seed=4, index=1, style="summer", size=32)
    assert [record.image_id for record in large["train"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", [{"style": "moon"}, {"size": 0}, {"seed": -1}, {"counts": {"train": 0}}])
def test_impossible_scenes_are_refused(change):
    settings = {"counts": {"train": 1}, "style": "summer", "size": 32, "seed": 0, **change}
    with pytest.raises(UserError):
        list_scenes(settings.pop("counts"), **settings)
