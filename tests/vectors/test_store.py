import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harma_ray.errors import UserError
from harma_ray.vectors.store import image_keys, open_store, require_comparable, store_schema, write_npz

IDENTITY = {"run": "one", "backbone": "abc", "pool": "mean", "size": 448.0}
ROWS = [
    {"id": "test/0", "source": "images/farm/1.png", "label_name": "farm", "content": "aa"},
    {"id": "test/1", "source": "scene/2", "label_name": "sea", "content": "bb"},
    {"id": "test/2", "source": "3.png", "label_name": None, "content": "aa"},
]


def table(vectors, rows=ROWS):
    lines = [{"kind": "image", **row, "vector": vector} for row, vector in zip(rows, vectors, strict=True)]
    text = {"id": "test/0#0", "kind": "text", "source": "images/farm/1.png", "text": "a farm", "vector": vectors[0]}
    return pa.Table.from_pylist([lines[0], text, *lines[1:]], store_schema(len(vectors[0])))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder, vectors, rows=ROWS, identity=IDENTITY, **more):
    folder.mkdir()
    pq.write_table(table(vectors, rows), folder / "vectors.parquet")
    manifest = {"encoder": identity, "width": len(vectors[0]), **more}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def test_both_layouts_read_back_equal_and_programs_find_the_class_in_the_path(tmp_path, vectors):
    folder, file = write(tmp_path / "store", vectors), tmp_path / "store.npz"
    write_npz(table(vectors), file)
    (tmp_path / "store.npz.json").write_text((folder / "manifest.json").read_text())
    one, other = open_store(folder), open_store(file)
    torch.testing.assert_close(one.vectors, torch.from_numpy(unit(vectors)))
    assert torch.equal(one.vectors, other.vectors)
    for name in ("ids", "sources", "labels", "contents", "manifest", "identity"):
        assert getattr(one, name) == getattr(other, name)
    assert one.ids == ["test/0", "test/1", "test/2"]
    assert one.labels == ["farm", "sea", None]
    require_comparable(one, other)
    with np.load(file, allow_pickle=False) as held:
        assert held["features"].dtype == np.float32
        assert held["image_paths"].tolist() == ["images/farm/1.png", "sea/2", "3.png"]


def test_an_npz_and_the_manifest_of_other_vectors_are_never_read_together(tmp_path, vectors):
    manifests = {}
    for name, found in (("one", vectors), ("other", vectors[::-1]), ("short", vectors[:2])):
        sealed = write_npz(table(found, ROWS[: len(found)]), tmp_path / f"{name}.npz")
        manifests[name] = {"encoder": IDENTITY, "features": sealed}
    assert sealed == {"shape": [2, 4], "sha256": hashlib.sha256(vectors[:2].tobytes()).hexdigest()}
    beside = tmp_path / "one.npz.json"
    for name, manifest in manifests.items():
        beside.write_text(json.dumps(manifest))
        if name == "one":
            assert open_store(tmp_path / "one.npz").identity is not None
            continue
        with pytest.raises(UserError, match=r"npz\.json was written with other vectors than .*one\.npz holds; put"):
            open_store(tmp_path / "one.npz")
    beside.write_text(json.dumps({"encoder": IDENTITY}))  # of an earlier version
    assert open_store(tmp_path / "one.npz").identity is not None
    beside.unlink()
    assert open_store(tmp_path / "one.npz").identity is None


def test_images_rendered_by_different_rules_are_refused(tmp_path, vectors, caplog):
    one, other, unknown = (
        open_store(write(tmp_path / name, vectors, rendering=rule))
        for name, rule in (("one", {"stretch": "bits"}), ("other", {"stretch": "none"}), ("unknown", None))
    )
    require_comparable(one, one)
    assert not caplog.text
    require_comparable(one, unknown)
    assert "says how images were rendered" in caplog.text
    with pytest.raises(UserError, match=r"one and .*other were rendered by different rules \(.*bits.*none.*\); embed"):
        require_comparable(one, other)


def test_an_npz_of_another_program_has_the_parent_folders_names_as_classes(tmp_path, vectors, caplog):
    paths = ["/data/x/farm/1.png", r"D:\x\sea\2.png", r"odd\xff.png"]
    np.savez(tmp_path / "guide.npz", features=vectors, image_paths=np.array(paths))
    store = open_store(tmp_path / "guide.npz")
    assert store.labels == ["farm", "sea", None]
    assert (store.ids, store.contents, store.identity) == (paths, [], None)
    require_comparable(store, store)
    assert "guide.npz does not say what made its vectors" in caplog.text
    mine = open_store(write(tmp_path / "store", vectors))
    assert image_keys(mine, store) == (mine.ids, paths)
    assert image_keys(mine, mine) == (["aa", "bb", "aa"], ["aa", "bb", "aa"])


def test_vectors_become_units_in_any_scale(tmp_path, vectors):
    found = open_store(write(tmp_path / "store", 1e-20 * vectors)).vectors
    torch.testing.assert_close(found, torch.from_numpy(unit(vectors)))
    vectors[1] = 0
    with pytest.raises(UserError, match=r"zeros alone, which have no direction, in 1 vector \(test/1\)"):
        open_store(write(tmp_path / "zeros", vectors))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path, vectors, value):
    vectors[1, 2] = value
    with pytest.raises(UserError, match=r"NaN or infinite numbers in 1 vector \(test/1\)"):
        open_store(write(tmp_path / "store", vectors))


def test_stores_of_other_encoders_are_refused_by_what_differs(tmp_path, vectors):
    one = open_store(write(tmp_path / "one", vectors))
    narrow = open_store(write(tmp_path / "narrow", vectors[:, :3]))
    with pytest.raises(UserError, match=r"have 4 and those of .*narrow 3; embed both with one model"):
        require_comparable(one, narrow)
    other = open_store(write(tmp_path / "other", vectors, identity={**IDENTITY, "pool": "cls"}))
    with pytest.raises(UserError, match=r"not made alike \(pool: mean and cls\)"):
        require_comparable(one, other)
    more = open_store(write(tmp_path / "more", vectors, identity={**IDENTITY, "layer": -2.0}))
    for pair in ((one, more), (more, one)):
        with pytest.raises(UserError, match=r"not made alike \(layer: "):
            require_comparable(*pair)


def test_what_is_no_store_is_one_line(tmp_path, vectors):
    for place in (tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=r"is no store of vectors; give a folder that `launch\.py embed` wrote"):
            open_store(place)
    empty = write(tmp_path / "empty", vectors)
    pq.write_table(table(vectors).slice(1, 1), empty / "vectors.parquet")
    with pytest.raises(UserError, match="holds no vectors of images"):
        open_store(empty)
    wide = write(tmp_path / "wide", vectors)
    (wide / "manifest.json").write_text(json.dumps({"encoder": IDENTITY, "width": 7}))
    with pytest.raises(UserError, match="width 7, as its manifest says, but has 4"):
        open_store(wide)
    old = write(tmp_path / "old", vectors)
    pq.write_table(table(vectors).drop_columns(["content", "label_name"]), old / "vectors.parquet")
    with pytest.raises(UserError, match=r"earlier version \(it has no label_name, content\)"):
        open_store(old)
    cut = write(tmp_path / "cut", vectors)
    (cut / "vectors.parquet").write_bytes((cut / "vectors.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"^cannot read the vectors of [^\n]*cut"):
        open_store(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, r"must hold features \[N, D\] and image_paths \[N\], but holds image_paths \[3\]"),
        ({"image_paths": np.array(["a"] * 2)}, r"but holds features \[3, 4\], image_paths \[2\]"),
        ({"features": np.ones((3, 4), int)}, "features of float32 and image_paths of text, got int64"),
        ({"image_paths": np.array(["a"] * 3, object)}, "cannot read .* write them as arrays without objects"),
        ({"labels": np.array(["a"])}, "must hold 3 of labels, one an image"),
    ],
)
def test_arrays_of_another_form_are_one_line_and_never_executed(tmp_path, vectors, change, message):
    arrays = {"features": vectors, "image_paths": np.array(["a"] * 3)} | change
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        open_store(tmp_path / "a.npz")


def test_a_file_that_is_no_archive_is_one_line(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"^cannot read the vectors [^\n]*$"):
        open_store(tmp_path / "a.npz")
