import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harma_ray import files
from harma_ray.data.convert import contents, examination, rows, shards, staging
from harma_ray.data.convert.commands import convert_folder, convert_harma, convert_karpathy, convert_scenes
from harma_ray.data.convert.duplicates import HASHES_NAME
from harma_ray.data.convert.shards import pack_shards, write_shard
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.images import decode_image
from harma_ray.data.kinds.images import IMAGE_SCHEMA
from harma_ray.data.splits import index_rows, list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import TEMPORARY_PREFIX
from harma_ray.on_ray.tasks import map_with_ray

NUM_IMAGES = 30
SMALL = {"shard_bytes": 20_000, "row_group_bytes": 4_000}
COLUMNS = ["image_id", "image", "height", "width", "captions", "label", "label_name", "source"]


@pytest.fixture
def raw(tmp_path):
    """A folder of noise images and an evaluation-shaped annotation file."""
    root = tmp_path / "raw"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_IMAGES):
        kind = ("jpg", "png", "tif")[number % 3]
        pixels = rng.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.{kind}")
        rows.append({"image": f"{number}.{kind}", "caption": [f"Caption {number}.", "A road"]})
    (root / "val.json").write_text(json.dumps(rows))
    return root


def _convert(raw, out, **settings):
    return convert_harma(
        raw / "val.json",
        raw / "images",
        "val",
        out,
        settings=WriteSettings(**{**SMALL, **settings}),
    )


def _read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _fail_at(position, error):
    """Returns a serial map whose task at one position raises; earlier ones are complete."""

    def map_tasks(function, plans):
        for number, plan in enumerate(plans):
            if number == position:
                raise error
            yield function(plan)

    return map_tasks


def test_split_holds_every_image_once_byte_for_byte(raw, tmp_path):
    manifest = _convert(raw, tmp_path / "data")
    split = open_split(tmp_path / "data", "val")
    assert split.manifest == manifest
    assert (manifest.rows, manifest.captions, manifest.bad) == (NUM_IMAGES, 2 * NUM_IMAGES, ())
    assert len(manifest.shards) > 1
    rows = split.read(COLUMNS).to_pylist()
    assert sorted(row["image_id"] for row in rows) == list(range(NUM_IMAGES))
    for row in rows:
        assert row["image"] == (raw / "images" / row["source"]).read_bytes()
        assert (row["width"], row["height"]) == decode_image(row["image"]).size
        assert row["captions"] == [f"caption {row['image_id']}", "a road"]
        assert (row["label"], row["label_name"]) == (None, None)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"val"}
    assert {path.name for path in split.path.iterdir()} == {
        "manifest.json",
        HASHES_NAME,
        *(s.file for s in manifest.shards),
    }


def test_parquet_has_the_schema_small_row_groups_and_no_compression(raw, tmp_path):
    _convert(raw, tmp_path)
    split = open_split(tmp_path, "val")
    for path in split.shard_paths():
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow.equals(IMAGE_SCHEMA)
            assert file.num_row_groups > 1
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                image = metadata.column(IMAGE_SCHEMA.get_field_index("image"))
                assert image.compression == "UNCOMPRESSED"
                assert metadata.num_rows == 1 or image.total_uncompressed_size < SMALL["row_group_bytes"] + 500
    index = index_rows(split)
    assert len(index) == NUM_IMAGES
    assert (index.num_samples == 2).all()


def test_rows_are_in_a_seeded_random_order(raw, tmp_path):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _convert(raw, tmp_path / name, seed=seed)
        orders.append(open_split(tmp_path / name, "val").read(["image_id"]).column(0).to_pylist())
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_second_run_finds_the_work_done(raw, tmp_path):
    manifest = _convert(raw, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "val").iterdir()}
    assert _convert(raw, tmp_path, map_tasks=_fail_at(0, AssertionError("nothing is to be done"))) == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "val").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"), [("seed", "seed"), ("image", "images"), ("annotation", "images, val.json")]
)
def test_split_of_other_inputs_is_kept_unless_overwritten(raw, tmp_path, change, named):
    _convert(raw, tmp_path)
    before = _read_files(tmp_path / "val")
    settings = {"seed": 3} if change == "seed" else {}
    if change == "image":
        Image.new("RGB", (5, 5), "red").save(raw / "images" / "0.jpg")
    elif change == "annotation":
        rows = json.loads((raw / "val.json").read_text())
        (raw / "val.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(UserError, match=rf"was made differently \({named}\); choose .*overwrite"):
        _convert(raw, tmp_path, **settings)
    assert _read_files(tmp_path / "val") == before
    with pytest.raises(KeyboardInterrupt):
        _convert(raw, tmp_path, overwrite=True, map_tasks=_fail_at(1, KeyboardInterrupt()), **settings)
    assert _read_files(tmp_path / "val") == before  # the old one stays usable until the new one is complete
    assert list_splits(tmp_path) == ["val"]
    _convert(raw, tmp_path, overwrite=True, **settings)
    open_split(tmp_path, "val")
    assert _read_files(tmp_path / "val") != before
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "val"}


def test_a_broken_split_is_made_again_only_when_asked_to_overwrite(raw, tmp_path):
    manifest = _convert(raw, tmp_path)
    (tmp_path / "val" / manifest.shards[1].file).unlink()
    with pytest.raises(UserError, match="overwrite"):
        _convert(raw, tmp_path)
    assert _convert(raw, tmp_path, overwrite=True) == manifest
    open_split(tmp_path, "val")


def test_folders_that_are_no_splits_are_never_deleted(raw, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists but is no converted split"):
        _convert(raw, tmp_path, overwrite=True)
    (tmp_path / "val" / "thesis.txt").rename(tmp_path / "thesis.txt")
    _convert(raw, tmp_path)  # an empty folder is no obstacle
    (tmp_path / "thesis.txt").rename(tmp_path / "val" / "thesis.txt")
    with pytest.raises(UserError, match=r"also holds thesis\.txt"):
        _convert(raw, tmp_path, overwrite=True, seed=5)
    assert (tmp_path / "val" / "thesis.txt").read_text() == "precious"


# --- images that cannot be used ---


def _spoil(raw):
    """Removes one image and damages four; returns what the message must say of each."""
    images = raw / "images"
    (images / "0.jpg").unlink()
    for name in ("2.tif", "3.jpg"):
        data = (images / name).read_bytes()
        (images / name).write_bytes(data[: len(data) // 2])
    (images / "4.png").write_text("no image")
    (images / "5.tif").write_bytes(b"")
    return {
        "0.jpg": "cannot be found",
        "2.tif": "damaged or incomplete",
        "3.jpg": "damaged or incomplete",
        "4.png": "not an image",
        "5.tif": "the file is empty",
    }


def test_bad_images_are_listed_together_and_nothing_is_written(raw, tmp_path):
    reasons = _spoil(raw)
    with pytest.raises(UserError, match=r"1 of 30 images is missing under .*images: 0\.jpg; .*--max-bad 1, now 0"):
        _convert(raw, tmp_path)  # what is missing is known before anything is decoded
    with pytest.raises(UserError, match="5 of 30 images cannot be used, at most 4 may be left out") as caught:
        _convert(raw, tmp_path, max_bad=4)
    assert "\n" not in str(caught.value)
    for name, reason in reasons.items():
        assert f"{name} ({reason}" in str(caught.value)
    assert list_splits(tmp_path) == []
    with pytest.raises(UserError, match="has no split"):
        open_split(tmp_path, "val")


def test_allowed_bad_images_are_in_the_manifest(raw, tmp_path):
    reasons = _spoil(raw)
    manifest = _convert(raw, tmp_path, max_bad=5)
    assert manifest.rows == NUM_IMAGES - 5
    assert {row.source: reasons[row.source] in row.reason for row in manifest.bad} == dict.fromkeys(reasons, True)
    with pytest.raises(UserError, match="5 of 30 images cannot be used"):
        _convert(raw, tmp_path, max_bad=2)  # the split is there, but is not what is asked for now


def test_mended_image_is_read_again(raw, tmp_path):
    path = raw / "images" / "6.jpg"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))  # same size
    with pytest.raises(UserError, match=r"6\.jpg \(not an image"):
        _convert(raw, tmp_path)
    path.write_bytes(whole)
    assert _convert(raw, tmp_path).rows == NUM_IMAGES


def test_missing_images_are_a_number_the_first_five_and_a_file_with_all(raw, tmp_path):
    for number in range(0, 21, 3):
        (raw / "images" / f"{number}.jpg").unlink()
    (raw / "images" / "00.png").write_bytes((raw / "images" / "1.png").read_bytes())
    with pytest.raises(UserError, match=r"^7 of 30 images are missing under .*images: 0\.jpg, ") as caught:
        _convert(raw, tmp_path / "data", max_bad=6)
    assert str(caught.value).count(".jpg") == 5
    listed = tmp_path / "data" / "missing-val.txt"
    assert f"(all: {listed}); mend that, or leave them out (--max-bad 7, now 6)" in str(caught.value)
    assert listed.read_text().split() == [f"{number}.jpg" for number in range(0, 21, 3)]
    assert _convert(raw, tmp_path / "data", max_bad=7).rows == 23
    assert not listed.exists()


@pytest.mark.parametrize("place", ["raw/images/all/of/them", "elsewhere/images", "raw"])
def test_all_images_missing_means_that_the_folder_is_wrong(raw, tmp_path, place):
    """Too few folders, others, and too many: the folder that would do is named."""
    there = tmp_path / place
    if place == "raw":
        rows = json.loads((raw / "val.json").read_text())
        (raw / "val.json").write_text(json.dumps([{**row, "image": f"images/{row['image']}"} for row in rows]))
    else:
        (raw / "images").rename(tmp_path / "moved")
        (raw / "images").mkdir()
        there.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "moved").rename(there)
    with pytest.raises(UserError, match=rf"none of the 30 images is there, .* no {raw}/images/.*0\.jpg; give {there} "):
        _convert(raw, tmp_path / "data", max_bad=30)
    assert not (tmp_path / "data").exists()


def test_without_any_such_file_nearby_the_path_that_was_tried_is_told(raw, tmp_path):
    (raw / "other").mkdir()
    (raw / "images" / "0.jpg").rename(raw / "other" / "0.jpg")
    rows = json.loads((raw / "val.json").read_text())
    (raw / "val.json").write_text(json.dumps([{**row, "image": f"rsitmd/{row['image']}"} for row in rows]))
    with pytest.raises(UserError, match=rf"no {raw}/images/rsitmd/0\.jpg, but {raw}/other/0\.jpg is; give or make"):
        _convert(raw, tmp_path / "data")
    (raw / "other" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"no .*/rsitmd/0\.jpg; give the folder that image names such as rsitmd/0"):
        _convert(raw, tmp_path / "data")


def test_images_that_stay_as_they_are_are_not_read_again(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.0)
    read, original = [], contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda path: read.append(path.name) or original(path))
    manifest = _convert(raw, tmp_path / "data")
    assert len(read) == NUM_IMAGES
    monkeypatch.setattr(examination, "read_header", None)
    assert _convert(raw, tmp_path / "data") == manifest
    assert len(read) == NUM_IMAGES
    path = raw / "images" / "4.png"
    content, found = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long, and of the same age
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(UserError, match=r"made differently \(images\)"):
        _convert(raw, tmp_path / "data")
    assert read[NUM_IMAGES:] == ["4.png"]


def test_images_that_changed_just_now_are_read_again(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_SECONDS", 60.0)
    read, original = [], contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda path: read.append(path) or original(path))
    for _ in range(2):
        _convert(raw, tmp_path / "data")
    assert len(read) == 2 * NUM_IMAGES


def test_folder_in_place_of_an_image_is_bad(raw, tmp_path):
    (raw / "images" / "0.jpg").unlink()
    (raw / "images" / "0.jpg").mkdir()
    with pytest.raises(UserError, match=r"0\.jpg \(not a file\)"):
        _convert(raw, tmp_path)


def test_too_large_image_is_bad_and_the_limit_is_a_setting(raw, tmp_path):
    Image.new("RGB", (300, 300)).save(raw / "images" / "1.png")
    with pytest.raises(UserError, match=r"1\.png \(300 x 300 pixels; the limit is 80,000"):
        _convert(raw, tmp_path, max_pixels=80_000)


@pytest.mark.parametrize("kind", ["palette", "alpha", "rotated"])
def test_unusual_images_are_kept_untouched_with_their_upright_size(raw, tmp_path, kind):
    path, exif, options = raw / "images" / "1.png", Image.Exif(), {}
    image = Image.open(raw / "images" / "4.png").resize((30, 12))
    if kind == "palette":
        image = image.quantize(8)
    elif kind == "alpha":
        image.putalpha(10)
    else:
        exif[0x0112], options = 6, {"exif": exif}
    image.save(path, **options)
    _convert(raw, tmp_path)
    row = next(r for r in open_split(tmp_path, "val").read(COLUMNS).to_pylist() if r["source"] == "1.png")
    assert row["image"] == path.read_bytes()
    assert (row["width"], row["height"]) == ((12, 30) if kind == "rotated" else (30, 12))


# --- resizing ---


def test_resize_shrinks_the_shorter_side_and_keeps_small_images(raw, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    big = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
    big.save(raw / "images" / "0.jpg", exif=exif)
    big.save(raw / "images" / "2.tif")
    _convert(raw, tmp_path, resize=30)
    rows = {row["source"]: row for row in open_split(tmp_path, "val").read(COLUMNS).to_pylist()}
    assert rows["1.png"]["image"] == (raw / "images" / "1.png").read_bytes()
    for name, kind, size in (("0.jpg", "JPEG", (30, 45)), ("2.tif", "PNG", (45, 30))):
        row = rows[name]
        assert (row["width"], row["height"]) == size
        assert decode_image(row["image"]).size == size
        assert Image.open(io.BytesIO(row["image"])).format == kind
    expected = np.asarray(big.resize((45, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(decode_image(rows["2.tif"]["image"])), expected)


@pytest.mark.parametrize("settings", [{"resize": 0}, {"max_bad": -1}, {"seed": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"`{next(iter(settings))}` must be at least"):
        WriteSettings(**settings)


# --- interruption ---


def test_interrupted_conversion_goes_on_and_gives_the_same_bytes(raw, tmp_path):
    _convert(raw, tmp_path / "clean")
    with pytest.raises(KeyboardInterrupt):
        _convert(raw, tmp_path / "data", map_tasks=_fail_at(2, KeyboardInterrupt()))
    assert list_splits(tmp_path / "data") == []
    assert not (tmp_path / "data" / "val").exists()
    written = []

    def count(function, plans):
        for plan in plans:
            before = plan.path.exists()
            result = function(plan)
            written.append(not before)
            yield result

    _convert(raw, tmp_path / "data", map_tasks=count)
    assert written[:2] == [False, False]
    assert all(written[2:])
    assert _read_files(tmp_path / "data") == _read_files(tmp_path / "clean")


def test_leftovers_of_another_plan_are_not_used(raw, tmp_path):
    _convert(raw, tmp_path / "clean", seed=1)
    with pytest.raises(KeyboardInterrupt):
        _convert(raw, tmp_path / "data", map_tasks=_fail_at(2, KeyboardInterrupt()))
    _convert(raw, tmp_path / "data", seed=1)
    assert _read_files(tmp_path / "data") == _read_files(tmp_path / "clean")


def test_killed_process_leaves_no_split_and_can_be_restarted(raw, tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal
        from harma_ray.data.convert import shards
        from harma_ray.data.convert.commands import convert_harma
        from harma_ray.data.convert.writer import WriteSettings
        make_row, calls = shards.make_row, []
        def make_row_and_die(*args, **options):
            calls.append(1)
            if len(calls) == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            return make_row(*args, **options)
        shards.make_row = make_row_and_die
        convert_harma({str(raw / "val.json")!r}, {str(raw / "images")!r}, "val", {str(tmp_path / "data")!r},
                      settings=WriteSettings(**{SMALL!r}))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = _read_files(tmp_path / "data")
    assert any(TEMPORARY_PREFIX in name for name in left)
    assert any(name.endswith("part-00000.parquet") for name in left)
    assert list_splits(tmp_path / "data") == []
    _convert(raw, tmp_path / "data")
    _convert(raw, tmp_path / "clean")
    assert _read_files(tmp_path / "data") == _read_files(tmp_path / "clean")


def test_swap_that_was_cut_off_is_undone(raw, tmp_path):
    _convert(raw, tmp_path)
    before = _read_files(tmp_path / "val")
    (tmp_path / staging.WORK_FOLDER).mkdir()
    (tmp_path / "val").rename(tmp_path / staging.WORK_FOLDER / "val.old")
    _convert(raw, tmp_path)
    assert _read_files(tmp_path / "val") == before
    assert not (tmp_path / staging.WORK_FOLDER).exists()


def test_failed_swap_puts_the_old_split_back(raw, tmp_path, monkeypatch):
    _convert(raw, tmp_path)
    before = _read_files(tmp_path / "val")
    rename, calls = os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(staging.os, "rename", fail_second)
    with pytest.raises(UserError, match="Input/output error"):
        _convert(raw, tmp_path, overwrite=True, seed=9)
    assert _read_files(tmp_path / "val") == before


def test_two_conversions_of_a_split_exclude_each_other(raw, tmp_path):
    with staging.lock(tmp_path / "val"), pytest.raises(UserError, match="another command is writing"):
        _convert(raw, tmp_path)
    _convert(raw, tmp_path)


# --- disk ---


def test_full_disk_is_one_clear_line_and_the_next_run_goes_on(raw, tmp_path):
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        from harma_ray.data.convert.commands import convert_harma
        from harma_ray.data.convert.writer import WriteSettings
        from harma_ray.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            convert_harma({str(raw / "val.json")!r}, {str(raw / "images")!r}, "val", {str(tmp_path / "data")!r},
                          settings=WriteSettings(**{SMALL!r}))
        except UserError as error:
            sys.exit(str(error))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no room to write" in done.stderr
    assert "run the same command again" in done.stderr
    assert not [name for name in _read_files(tmp_path / "data") if TEMPORARY_PREFIX in name]
    assert list_splits(tmp_path / "data") == []
    assert _convert(raw, tmp_path / "data").rows == NUM_IMAGES


def test_full_disk_keeps_the_old_split(raw, tmp_path, monkeypatch):
    _convert(raw, tmp_path)
    before = _read_files(tmp_path / "val")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(UserError, match=r"no room to write .* \(No space left on device\)"):
        _convert(raw, tmp_path, overwrite=True, seed=2)
    assert _read_files(tmp_path / "val") == before
    open_split(tmp_path, "val")


def test_too_small_disk_is_noticed_before_the_work(raw, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs about .* MB but .* MB are free"):
        _convert(raw, tmp_path)


def test_folder_that_cannot_be_written_is_named(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/data/val \(Not a directory\); check the folder"):
        _convert(raw, tmp_path / "file" / "data")


# --- the other converters ---


def test_karpathy_and_folder_and_scenes_write_their_splits(raw, tmp_path):
    images = [
        {"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"S{n}"}]}
        for n, split in ((1, "train"), (4, "val"), (7, "test"), (10, "train"))
    ]
    (raw / "k.json").write_text(json.dumps({"images": images}))
    manifests = convert_karpathy(raw / "k.json", raw / "images", tmp_path / "k")
    assert {split: manifest.rows for split, manifest in manifests.items()} == {"train": 2, "val": 1, "test": 1}
    for number, split in ((13, "train"), (16, "test")):
        (raw / "folders" / split / "pond").mkdir(parents=True)
        shutil.copy(raw / "images" / f"{number}.png", raw / "folders" / split / "pond")
    convert_folder(raw / "folders", tmp_path / "f", caption_template="a {label}")
    assert list_splits(tmp_path / "f") == ["train", "test"]
    assert open_split(tmp_path / "f", "test").read(["captions", "label", "label_name"]).to_pylist() == [
        {"captions": ["a pond"], "label": 0, "label_name": "pond"}
    ]
    settings = WriteSettings(seed=3)
    for out in ("s", "again"):
        convert_scenes(tmp_path / out, {"train": 4, "val": 2}, style="winter", size=32, settings=settings)
    assert _read_files(tmp_path / "s") == _read_files(tmp_path / "again")
    rows = open_split(tmp_path / "s", "train").read(COLUMNS).to_pylist()
    assert len(rows) == 4
    assert all(row["captions"] and row["label_name"] and decode_image(row["image"]).size == (32, 32) for row in rows)


@pytest.mark.parametrize("split", ["", "../val", ".hidden", "a/b"])
def test_name_of_a_split_is_a_plain_folder_name(raw, tmp_path, split):
    with pytest.raises(UserError, match="a split's name is a plain folder name"):
        convert_harma(raw / "val.json", raw / "images", split, tmp_path)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("minimum", [1, 8])
def test_shards_are_consecutive_and_about_equal(count, minimum):
    sizes = np.random.default_rng(count).integers(1, 100, count).tolist()
    pieces = pack_shards(sizes, target=500, minimum=minimum)
    assert [position for piece in pieces for position in piece] == list(range(count))
    assert all(len(piece) for piece in pieces)
    assert len(pieces) == min(count, max(minimum, -(-sum(sizes) // 500)))
    assert all(sum(sizes[p] for p in piece) <= sum(sizes) / len(pieces) + 2 * max(sizes) for piece in pieces)


def test_finished_shard_of_another_conversion_is_written_anew(raw, tmp_path):
    plans = []

    def catch(function, planned):
        plans.extend(planned)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        _convert(raw, tmp_path, map_tasks=catch)
    first = write_shard(plans[0])
    stamp = plans[0].path.stat().st_mtime_ns
    assert write_shard(plans[0]) == first
    assert plans[0].path.stat().st_mtime_ns == stamp
    other = shards.ShardPlan(**{**vars(plans[0]), "fingerprint": "other", "records": plans[0].records[:1]})
    assert write_shard(other).rows == 1


# --- Ray ---


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's context warns about its own settings
@pytest.mark.usefixtures("ray_cluster")
def test_ray_writes_the_same_bytes_and_raises_the_users_error(raw, tmp_path):
    _convert(raw, tmp_path / "serial")
    _convert(raw, tmp_path / "ray", map_tasks=map_with_ray)
    assert _read_files(tmp_path / "ray") == _read_files(tmp_path / "serial")

    def refuse(plan):
        raise UserError(f"no room to write {plan.path.name}")

    with pytest.raises(UserError, match=r"^no room to write part-0000\d\.parquet$"):
        _convert(raw, tmp_path / "other", map_tasks=lambda _, plans: map_with_ray(refuse, plans))
    _spoil(raw)
    with pytest.raises(UserError, match="5 of 30 images cannot be used"):
        _convert(raw, tmp_path / "bad", max_bad=4, map_tasks=map_with_ray)


def test_jpeg_files_too_large_to_be_read_at_once_are_stored_as_they_are(tmp_path, monkeypatch):
    place = tmp_path / "images" / "field"
    place.mkdir(parents=True)
    for number in range(70):  # more than a thread takes at once
        Image.fromarray(np.full((4 + number % 3, 6, 3), number, np.uint8)).save(place / f"{number}.jpg")
    found = []
    for most in (2**25, 100):
        monkeypatch.setattr(rows, "_READ_WHOLE", most)
        convert_folder(tmp_path / "images", tmp_path / str(most), fractions=(1, 0, 0))
        table = pq.read_table([*(tmp_path / str(most) / "train").glob("part-*.parquet")])
        found.append(dict(zip(table["source"].to_pylist(), table["image"].to_pylist(), strict=True)))
    assert found[0] == found[1] == {f"field/{file.name}": file.read_bytes() for file in place.iterdir()}
