import hashlib
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from random_runs import make_random_run

from harma_ray.api import load_run
from harma_ray.data.splits import open_split
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.step import evaluate_split
from harma_ray.vectors import parts
from harma_ray.vectors.embed import embed
from harma_ray.vectors.job import JobSettings
from harma_ray.vectors.store import open_store, require_comparable

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:.*use_(polars|push_based_shuffle|arrow_tensor_v2):DeprecationWarning"),
]


def images_of(scenes):
    return [
        row for path in open_split(scenes, "test").shard_paths() for row in pq.read_table(path)["image"].to_pylist()
    ]


@pytest.fixture(scope="module")
def embedded(random_run, scenes, tmp_path_factory, ray_cluster):
    """The vectors of the test split, and what was said of them."""
    out = tmp_path_factory.mktemp("embedded") / "vectors"
    return out, embed(random_run, scenes, out, JobSettings(4), split="test")


def test_vectors_are_those_of_evaluation_in_its_order(random_run, scenes, embedded):
    out, summary = embedded
    evaluation = evaluate_split(
        random_run.task, random_run.config, random_run.load_model(), "test", worker=Worker(), loader=local_batches
    )
    details, retriever = evaluation.retrieval, load_run(random_run.path, "cpu")
    assert "11 image and 55 text vectors of width 128" in summary
    table = pq.read_table(out / "vectors.parquet")
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 128)
    rows = table.to_pylist()
    images = torch.tensor([row["vector"] for row in rows if row["kind"] == "image"])
    texts = torch.tensor([row["vector"] for row in rows if row["kind"] == "text"])
    torch.testing.assert_close(images, details.image_embeddings)
    torch.testing.assert_close(texts, details.text_embeddings)
    torch.testing.assert_close(images, retriever.encode_images(images_of(scenes)))
    assert [row["text"] for row in rows if row["kind"] == "text"] == details.texts
    assert len({row["id"] for row in rows}) == 66
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"image": 11, "text": 55}
    assert manifest["width"] == 128
    assert manifest["encoder"]["precision"] == "fp32"
    assert manifest["unit"] is True
    with pytest.raises(UserError, match="exists"):
        embed(random_run, scenes, out, JobSettings())


@pytest.mark.usefixtures("encode_here")
def test_bf16_vectors_are_made_where_they_are_asked_for_and_said(random_run, scenes, tmp_path, ray_cluster):
    rough = Run(random_run.path, build_config(random_run.config, {"train.eval_precision": "bf16"}))
    assert "of width 128, in bf16, to" in embed(rough, scenes, tmp_path / "vectors", JobSettings(), split="test")
    rows = pq.read_table(tmp_path / "vectors" / "vectors.parquet").to_pylist()
    found = torch.tensor([row["vector"] for row in rows if row["kind"] == "image"])
    exact = load_run(random_run.path, "cpu").encode_images(images_of(scenes))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
    assert not torch.allclose(found, exact, atol=1e-5)


@pytest.mark.usefixtures("encode_here")
def test_folders_are_walked_as_in_conversion_and_bad_images_listed_and_limited(
    random_run, scenes, tmp_path, ray_cluster
):
    image = images_of(scenes)[0]
    folder, disk = tmp_path / os.fsdecode(b"images \xff"), tmp_path / "disk"
    names = [
        os.fsdecode(b"farm/\xc5\xa91\xff.png"),
        "farm/2.GIF",
        "farm/.ipynb_checkpoints/2-checkpoint.png",
        "farm/_.txt",
    ]
    empty, spoiled = folder / os.fsdecode(b"farm/\xc5\xa90\xff.png"), disk / "4.png"
    for path in [*(folder / name for name in names), disk / "3.png", empty, spoiled]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (folder / "lake").symlink_to(disk)
    empty.write_bytes(b"")
    spoiled.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"farm/ũ0\\xff\.png: .*the file is empty"):
        embed(random_run, folder, tmp_path / "out", JobSettings(batch_size=2))
    assert sorted(tmp_path.iterdir()) == [disk, folder]
    summary = embed(random_run, folder, tmp_path / "out", JobSettings(batch_size=2, max_bad=2))
    assert "left out: farm/ũ0\\xff.png: " in summary
    assert "left out: lake/4.png: " in summary
    rows = pq.read_table(tmp_path / "out" / "vectors.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["farm/2.GIF", "farm/ũ1\\xff.png", "lake/3.png"]
    assert {(row["kind"], row["text"]) for row in rows} == {("image", None)}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == {"hidden": 1, "no images": 1}


@pytest.mark.usefixtures("encode_here")
def test_a_line_of_pixels_is_told_of_and_may_be_left_out(tmp_path, ray_cluster):
    run = make_random_run(tmp_path / "runs", "vitp", recipe_config("scenes-vitp"))
    for name, size in (("farm/1", (30, 20)), ("farm/2", (1, 4000)), ("lake/3", (10, 1000))):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    summary = embed(run, tmp_path / "images", tmp_path / "out", JobSettings(max_bad=1))
    assert re.search(r"^  left out: farm/2\.png: 1 x 4000 pixels; [^\n]*$", summary, re.MULTILINE)
    assert open_store(tmp_path / "out").ids == ["farm/1.png", "lake/3.png"]


@pytest.mark.usefixtures("encode_here")
def test_a_damaged_shard_is_one_clear_line(random_run, scenes_copy, tmp_path, ray_cluster):
    shard = open_split(scenes_copy, "test").shard_paths()[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="cannot read"):
        embed(random_run, scenes_copy, tmp_path / "out", JobSettings(), split="test")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_gpu": True}, "has 0"), ({"num_actors": 0}, "`num_actors`"), ({"batch_size": 0}, "`batch_size`")],
)
def test_what_could_never_run_is_refused_at_once(random_run, scenes, tmp_path, ray_cluster, options, message):
    with pytest.raises(UserError, match=message):
        embed(random_run, scenes, tmp_path / "out", JobSettings(**options))


def test_triplets_are_refused_before_ray_works(random_run, composed, tmp_path, ray_cluster):
    with pytest.raises(UserError, match=r"embed needs images, but .*train holds triplets"):
        embed(random_run, composed, tmp_path / "out", JobSettings(), split="train")


@pytest.mark.usefixtures("encode_here")
def test_a_store_of_either_layout_reads_back_equal_with_classes_and_hashes(random_run, scenes, embedded, tmp_path):
    split = open_split(scenes, "test")
    summary = embed(random_run, scenes, tmp_path / "store.npz", JobSettings(4), split="test")
    assert summary.startswith("wrote 11 image vectors of width 128")
    one, other = open_store(embedded[0]), open_store(tmp_path / "store.npz")
    torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=0)
    assert (one.ids, one.sources, one.labels, one.contents) == (other.ids, other.sources, other.labels, other.contents)
    assert one.identity == other.identity
    assert one.labels == split.read(["label_name"])["label_name"].to_pylist()
    assert one.contents == [hashlib.sha256(image).hexdigest() for image in images_of(scenes)]
    assert one.manifest["splits"] == {"test": split.fingerprint}
    folder = tmp_path / "images"
    (folder / "farm").mkdir(parents=True)
    for name in ("farm/1.png", "2.png"):
        (folder / name).write_bytes(images_of(scenes)[0])
    embed(random_run, folder, tmp_path / "folder", JobSettings())
    third = open_store(tmp_path / "folder")
    assert (third.ids, third.labels) == (["2.png", "farm/1.png"], [None, "farm"])
    assert third.contents == [one.contents[0]] * 2
    require_comparable(one, third)


def test_a_job_that_was_cut_off_goes_on_and_gives_what_one_that_was_not_does(
    random_run, scenes_copy, embedded, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "_BATCHES", 1)
    written, write = [], parts._write

    def cut_off(folder, number, found, queries):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write(folder, number, found, queries)

    monkeypatch.setattr(parts, "_write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        embed(random_run, scenes_copy, tmp_path / "out", JobSettings(4), split="test")
    assert not (tmp_path / "out").exists()
    written.clear()
    embed(random_run, scenes_copy, tmp_path / "out", JobSettings(4), split="test")
    assert written == [2]
    one, other = (pq.read_table(path / "vectors.parquet") for path in (embedded[0], tmp_path / "out"))
    assert one.equals(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scenes"]


def test_a_place_that_cannot_be_written_to_is_one_line_before_anything_is_encoded(
    random_run, scenes, tmp_path, ray_cluster
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write [^\n]*file/out [^\n]*$"):
        embed(random_run, scenes, tmp_path / "file" / "out", JobSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
