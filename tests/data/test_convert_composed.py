"""Composed retrieval's data sets: triplets to train on, galleries with queries to evaluate on."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from raw_composed import cirr_split, draw_cirr, draw_fashioniq, edit_json, fashioniq_split

from harma_ray.data.convert import contents, shards, writer
from harma_ray.data.convert.commands import convert_scenes_cir
from harma_ray.data.convert.composed import read_fashioniq
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.images import decode_image
from harma_ray.data.kinds.queries import QUERY_SCHEMA
from harma_ray.data.kinds.triplets import TRIPLET_SCHEMA
from harma_ray.data.manifest import MANIFEST_NAME, QUERIES_NAME
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.scenes import composed_scene, draw
from harma_ray.data.splits import index_rows, list_splits, open_split
from harma_ray.errors import UserError

TRIPLET_COLUMNS = TRIPLET_SCHEMA.names


@pytest.fixture
def fashioniq(tmp_path):
    return draw_fashioniq(tmp_path / "fashionIQ_dataset")


@pytest.fixture
def cirr(tmp_path):
    return draw_cirr(tmp_path / "cirr_dataset")


def _read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written ---


def test_training_rows_of_fashioniq_are_triplets_of_all_categories(fashioniq, tmp_path):
    manifest = fashioniq_split(fashioniq, "train", tmp_path / "data")
    split = open_split(tmp_path / "data", "train")
    assert split.manifest == manifest
    assert (manifest.kind, manifest.rows, manifest.captions, manifest.queries) == ("triplets", 18, 36, None)
    assert manifest.options["categories"] == ["dress", "toptee", "shirt"]
    assert len(manifest.shards) > 1
    assert len(index_rows(split)) == 18
    rows = sorted(split.read(TRIPLET_COLUMNS).to_pylist(), key=lambda row: row["pair_id"])
    assert [row["pair_id"] for row in rows] == list(range(18))
    assert [row["category"] for row in rows[::6]] == ["dress", "toptee", "shirt"]
    assert rows[7]["source"] == "cap.toptee.train.json row 2"
    assert (rows[7]["reference"], rows[7]["target"], rows[7]["members"]) == ("Tt1", "Tt2", [])
    assert rows[7]["captions"] == ["Is T1, ", "and longer."]  # as annotated
    for row in rows:
        for side in ("reference", "target"):
            assert row[f"{side}_image"] == (fashioniq / "images" / f"{row[side]}.jpg").read_bytes()


def test_validation_of_fashioniq_is_a_gallery_with_queries_of_each_category(fashioniq, tmp_path):
    manifest = fashioniq_split(fashioniq, "val", tmp_path)
    split = open_split(tmp_path, "val")
    assert (manifest.kind, manifest.rows, manifest.captions) == ("images", 26, 0)
    assert (manifest.queries.file, manifest.queries.rows) == (QUERIES_NAME, 18)
    gallery = split.read(["image_id", "source", "label", "label_name", "captions", "image", "height", "width"])
    rows = sorted(gallery.to_pylist(), key=lambda row: row["image_id"])
    assert [row["source"] for row in rows[:9]] == ["Dv0", "Dv1", "Dv2", "B0", "Dv3", "Dv4", "Dv5", "Dv6", "Dv7"]
    assert [(row["label"], row["label_name"]) for row in rows[::9]] == [(0, "dress"), (1, "toptee"), (2, "shirt")]
    assert [row["label_name"] for row in rows if row["source"] == "B0"] == ["dress", "shirt"]
    assert all(row["captions"] == [] and (row["width"], row["height"]) == (16, 20) for row in rows)
    for row in rows:
        suffix = "png" if row["source"] == "B0" else "jpg"
        assert row["image"] == (fashioniq / "images" / f"{row['source']}.{suffix}").read_bytes()
    assert split.queries().schema.equals(QUERY_SCHEMA)
    queries = ComposedQueries.of(split)
    names, categories = np.array(queries.names), np.array(queries.gallery_categories)
    assert queries.categories == ["dress"] * 6 + ["toptee"] * 6 + ["shirt"] * 6
    assert names[queries.reference].tolist()[:4] == ["Dv0", "Dv1", "Dv2", "B0"]
    assert names[queries.target].tolist()[:4] == ["Dv1", "Dv2", "B0", "Dv3"]
    assert categories[queries.reference].tolist() == queries.categories


def test_categories_can_be_left_out_and_keep_their_numbers(fashioniq, tmp_path):
    (fashioniq / "captions" / "cap.toptee.val.json").unlink()
    with pytest.raises(UserError, match=r"cap\.toptee\.val\.json does not exist; --categories can leave toptee out"):
        fashioniq_split(fashioniq, "val", tmp_path)
    fashioniq_split(fashioniq, "val", tmp_path, categories=["shirt", "dress"])
    split = open_split(tmp_path, "val")
    assert set(split.read(["label"]).column(0).to_pylist()) == {0, 2}
    assert split.queries().column("pair_id").to_pylist() == list(range(12))
    assert split.manifest.options["categories"] == ["dress", "shirt"]
    with pytest.raises(UserError, match=r"made differently \(.*categories.*"):
        fashioniq_split(fashioniq, "val", tmp_path, categories=["dress"])


@pytest.mark.parametrize(("split", "answered"), [("val", True), ("test1", False)])
def test_evaluation_splits_of_cirr_are_galleries_with_subsets(cirr, tmp_path, split, answered):
    cirr_split(cirr, split, tmp_path)
    opened = open_split(tmp_path, split)
    rows = sorted(
        opened.read(["image_id", "source", "label", "label_name", "image"]).to_pylist(), key=lambda row: row["image_id"]
    )
    assert [row["source"] for row in rows] == [f"{split}-{n}-img0" for n in range(12)]
    folder = cirr / {"val": "dev"}.get(split, split)
    assert all(row["image"] == (folder / f"{row['source']}.png").read_bytes() for row in rows)
    assert all((row["label"], row["label_name"]) == (None, None) for row in rows)
    query = opened.queries().to_pylist()[2]
    assert query == {
        "pair_id": 104,
        "reference": f"{split}-2-img0",
        "target": f"{split}-4-img0" if answered else None,
        "category": None,
        "captions": ["Show 2!"],
        "members": [f"{split}-{n}-img0" for n in (7, 6, 5, 4, 3, 2)],
        "source": f"cap.rc2.{split}.json row 3",
    }
    queries = ComposedQueries.of(opened)
    assert [queries.names[row] for row in queries.members[2]] == query["members"]


def test_training_rows_of_cirr_are_triplets(cirr, tmp_path):
    manifest = cirr_split(cirr, "train", tmp_path)
    rows = open_split(tmp_path, "train").read(TRIPLET_COLUMNS).to_pylist()
    assert (manifest.kind, len(rows)) == ("triplets", 6)
    for row in rows:
        assert len(row["members"]) == 6
        assert row["target_image"] == (cirr / "train/7" / f"{row['target']}.png").read_bytes()


def test_drawn_queries_are_those_of_composed_scene(tmp_path):
    counts = {"train": 3, "val": 2}
    for out in ("a", "b"):
        manifests = convert_scenes_cir(tmp_path / out, counts, style="winter", size=32, settings=WriteSettings(seed=5))
    assert _read_files(tmp_path / "a") == _read_files(tmp_path / "b")
    assert {split: (m.kind, m.rows) for split, m in manifests.items()} == {
        "train": ("triplets", 3),
        "val": ("images", 12),
    }
    for row in open_split(tmp_path / "a", "train").read(TRIPLET_COLUMNS).to_pylist():
        index = int(row["reference"].split("-")[1])
        assert index % 3 == 0
        composed = composed_scene(5, index, "winter")
        assert row["captions"] == [composed.sentence]
        for side in ("reference", "target"):
            expected = draw(getattr(composed, side), "winter", 32)
            np.testing.assert_array_equal(np.asarray(decode_image(row[f"{side}_image"])), np.asarray(expected))
    split = open_split(tmp_path / "a", "val")
    images = {row["source"]: row["image"] for row in split.read(["source", "image"]).to_pylist()}
    for query in split.queries().to_pylist():
        index = int(query["reference"].split("-")[1])
        assert index % 3 == 1
        members = composed_scene(5, index, "winter").members
        assert query["members"] == [f"scene-{index:06d}-{member}" for member in range(6)]
        for name, member in zip(query["members"], members, strict=True):
            np.testing.assert_array_equal(
                np.asarray(decode_image(images[name])), np.asarray(draw(member, "winter", 32))
            )
        assert members[query["members"].index(query["target"])] == composed_scene(5, index, "winter").target
    assert ComposedQueries.of(split).members is not None


def test_drawn_queries_may_have_layouts_of_their_own(tmp_path):
    for own in (False, True):
        manifests = convert_scenes_cir(tmp_path / str(own), {"val": 2}, style="summer", size=32, own_layouts=own)
        assert manifests["val"].options.get("own_layouts", False) is own
        rows = open_split(tmp_path / str(own), "val").read(["source", "image"]).to_pylist()
        for row in rows:
            index, member = map(int, row["source"].split("-")[1:])
            expected = draw(composed_scene(0, index, "summer", own_layouts=own).members[member], "summer", 32)
            np.testing.assert_array_equal(np.asarray(decode_image(row["image"])), np.asarray(expected))


@pytest.mark.parametrize("change", [{"style": "moon"}, {"size": 0}, {"counts": {"train": 0}}, {"counts": {"x": 1}}])
def test_impossible_drawn_queries_are_refused(tmp_path, change):
    settings = {"counts": {"train": 1}, "style": "summer", "size": 32, **change}
    with pytest.raises(UserError):
        convert_scenes_cir(tmp_path, settings.pop("counts"), **settings)
    assert not list(tmp_path.iterdir())


def test_resize_makes_both_images_of_a_triplet_smaller(fashioniq, tmp_path):
    fashioniq_split(fashioniq, "train", tmp_path, resize=8)
    rows = open_split(tmp_path, "train").read(TRIPLET_COLUMNS).to_pylist()
    assert rows
    for row in rows:
        assert decode_image(row["reference_image"]).size == decode_image(row["target_image"]).size == (8, 10)


# --- images that cannot be used ---


def test_a_folder_without_any_of_the_images_is_told(fashioniq, tmp_path):
    images = fashioniq / "images"
    images.rename(fashioniq / "resized")
    images.mkdir()
    told = (
        f"none of the {{}} images is there, so that the folder is wrong: no {images}/{{}}.jpg; give {fashioniq}/resized"
    )
    with pytest.raises(UserError, match=told.format(21, "Dt0")):
        fashioniq_split(fashioniq, "train", tmp_path)
    report = read_fashioniq(fashioniq, "val").report().splitlines()
    assert report[:4] == [
        *(f"{name} val: 6 queries, {n} images in the index" for name, n in (("dress", 9), ("toptee", 8), ("shirt", 9))),
        "25 distinct images are needed in all",
    ]
    assert len(report) == 5
    assert report[4].startswith(told.format(25, "Dv0"))


def test_triplets_that_need_a_bad_image_are_left_out_but_not_counted(fashioniq, tmp_path):
    (fashioniq / "images" / "Dt2.jpg").unlink()
    (fashioniq / "images" / "Tt1.jpg").write_text("no image")
    with pytest.raises(UserError, match="2 of 21 images cannot be used, at most 1"):
        fashioniq_split(fashioniq, "train", tmp_path, max_bad=1)
    manifest = fashioniq_split(fashioniq, "train", tmp_path, max_bad=2)
    reasons = {row.source: row.reason for row in manifest.bad}
    assert manifest.rows == 18 - 4
    assert len(manifest.bad) == len(reasons) == 6
    assert "cannot be found" in reasons["Dt2"]
    assert "not an image" in reasons["Tt1"]
    assert reasons["cap.dress.train.json row 2"] == "needs Dt2, which cannot be used"
    assert reasons["cap.toptee.train.json row 1"] == "needs Tt1, which cannot be used"
    left = open_split(tmp_path, "train").read(["source"]).column(0).to_pylist()
    assert not set(left) & set(reasons)
    assert fashioniq_split(fashioniq, "train", tmp_path, max_bad=2) == manifest
    with pytest.raises(UserError, match="2 of 21 images cannot be used"):
        fashioniq_split(fashioniq, "train", tmp_path, max_bad=1)


def test_queries_that_need_a_bad_image_are_left_out(cirr, fashioniq, tmp_path):
    (cirr / "dev" / "val-9-img0.png").write_text("no image")
    manifest = cirr_split(cirr, "val", tmp_path, max_bad=1)
    assert (manifest.rows, manifest.queries.rows) == (11, 4)  # a member of the fifth and the sixth query
    assert [row.source for row in manifest.bad] == ["cap.rc2.val.json row 5", "cap.rc2.val.json row 6", "val-9-img0"]
    assert len(ComposedQueries.of(open_split(tmp_path, "val")).pair_ids) == 4
    (fashioniq / "images" / "B0.png").write_bytes(b"")
    manifest = fashioniq_split(fashioniq, "val", tmp_path / "f", max_bad=1)  # one image, of two categories
    assert (manifest.rows, manifest.queries.rows) == (24, 14)
    assert sorted(row.source for row in manifest.bad)[:2] == ["B0", "cap.dress.val.json row 3"]


def test_split_without_any_usable_row_is_refused(cirr, tmp_path):
    for number in (2, 5):
        (cirr / "dev" / f"val-{number}-img0.png").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 6 queries of .*val can be used"):
        cirr_split(cirr, "val", tmp_path, max_bad=2)
    for path in (cirr / "train/7").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match=r"none of the 6 triplets of .*train can be used"):
        cirr_split(cirr, "train", tmp_path, max_bad=20)
    assert list_splits(tmp_path) == []


def test_image_of_many_triplets_is_hashed_once(fashioniq, tmp_path, monkeypatch):
    hashed = []
    original = contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda path: hashed.append(path) or original(path))
    fashioniq_split(fashioniq, "train", tmp_path)
    assert len(hashed) == len(set(hashed)) == 21
    hashed.clear()
    fashioniq_split(fashioniq, "val", tmp_path)
    assert len(hashed) == len(set(hashed)) == 25


# --- restarting ---


@pytest.mark.parametrize("split", ["train", "val"])
def test_interrupted_conversion_goes_on_and_gives_the_same_bytes(fashioniq, tmp_path, monkeypatch, split):
    def make_row_and_die(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return make_row(*arguments, **options)

    def count(function, plans):
        for plan in plans:
            there.append(plan.path.exists())
            yield function(plan)

    calls, there, make_row = [], [], shards.make_row
    fashioniq_split(fashioniq, split, tmp_path / "clean")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_row", make_row_and_die)
        with pytest.raises(KeyboardInterrupt):
            fashioniq_split(fashioniq, split, tmp_path / "data")
    assert list_splits(tmp_path / "data") == []
    fashioniq_split(fashioniq, split, tmp_path / "data", map_tasks=count)
    assert there == sorted(there, reverse=True)
    assert set(there) == {True, False}
    assert _read_files(tmp_path / "data") == _read_files(tmp_path / "clean")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / split).iterdir()}
    fashioniq_split(fashioniq, split, tmp_path / "data", map_tasks=None)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / split).iterdir()} == before


def test_split_appears_with_its_queries_or_not_at_all(cirr, tmp_path, monkeypatch):
    def refuse(table, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_table", refuse)
        with pytest.raises(UserError, match=r"no room to write .*val \(No space left"):
            cirr_split(cirr, "val", tmp_path)
    assert list_splits(tmp_path) == []
    cirr_split(cirr, "val", tmp_path)
    assert {path.name for path in (tmp_path / "val").iterdir()} >= {MANIFEST_NAME, QUERIES_NAME}
    assert {path.name for path in tmp_path.iterdir()} == {"cirr_dataset", "val"}


def test_changed_queries_need_overwrite_and_replace_the_split(cirr, tmp_path):
    cirr_split(cirr, "val", tmp_path)
    before = _read_files(tmp_path / "val")
    path = cirr / "cirr" / "captions" / "cap.rc2.val.json"
    edit_json(path, lambda rows: rows[0].update(caption="Show another"))
    with pytest.raises(UserError, match=r"was made differently \(cap\.rc2\.val\.json, queries\)"):
        cirr_split(cirr, "val", tmp_path)
    assert _read_files(tmp_path / "val") == before
    cirr_split(cirr, "val", tmp_path, overwrite=True)
    assert open_split(tmp_path, "val").queries().column("captions").to_pylist()[0] == ["Show another"]


def test_damaged_queries_are_noticed(cirr, tmp_path):
    cirr_split(cirr, "val", tmp_path)
    (tmp_path / "val" / QUERIES_NAME).unlink()
    with pytest.raises(UserError, match=r"queries\.parquet is missing"):
        open_split(tmp_path, "val")
    with pytest.raises(UserError, match="overwrite"):
        cirr_split(cirr, "val", tmp_path)
    cirr_split(cirr, "val", tmp_path, overwrite=True)
    with pq.ParquetFile(tmp_path / "val" / QUERIES_NAME) as file:
        assert file.metadata.num_rows == 6


# --- the command ---


def test_annotations_only_lists_what_is_missing_and_writes_nothing(fashioniq, cirr, tmp_path, capsys, monkeypatch):
    from harma_ray.cli import main

    monkeypatch.setattr("harma_ray.on_ray.cluster.ray_cluster", None)
    before = sorted(tmp_path.rglob("*"))
    command = ["convert", "cirr", "--root", str(cirr), "--split", "test1", "--annotations-only"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "test1: 6 queries, 12 images in the index",
        "12 distinct images are needed in all",
        "all images are there",
    ]
    assert sorted(tmp_path.rglob("*")) == before
    gone = [f"{name}{number}" for name in ("Dt", "Tt") for number in (1, 2, 3)]
    for name in gone:
        (fashioniq / "images" / f"{name}.jpg").unlink()
    command = ["convert", "fashioniq", "--root", str(fashioniq), "--split", "train", "--categories", "dress", "toptee"]
    assert main([*command, "--annotations-only"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "14 distinct images are needed in all",
        f"6 of 14 images are missing under {fashioniq}:",
        *(f"images/{name}.jpg" for name in gone),
    ]
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.stem not in gone]
    assert main([*command, "--annotations-only", "--out", str(tmp_path / "data")]) == 0
    listed = tmp_path / "data" / "missing-train.txt"
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"6 of 14 images are missing under {fashioniq}/images: Dt1, Dt2, Dt3, Tt1, Tt2, ... (all: {listed})"
    ]
    assert listed.read_text().split() == gone
    for name in gone[:3]:
        (fashioniq / "images" / f"{name}.jpg").write_bytes((fashioniq / "images" / "Dt4.jpg").read_bytes())
    assert main([*command, "--annotations-only", "--out", str(tmp_path / "data")]) == 0
    assert "3 of 14 images are missing" in capsys.readouterr().out
    assert not listed.exists()  # it would name images that are there
    assert main(command) == 2
    assert "give the folder of the data set with --out" in capsys.readouterr().err
