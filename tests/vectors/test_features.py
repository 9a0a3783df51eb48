"""Features computed once are what encoding anew gives, for training and for evaluation."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from raw_composed import draw_fashioniq, fashioniq_split

from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.order import planned_order
from harma_ray.data.relative_captions import training_texts
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.step import evaluate_split
from harma_ray.vectors.features import FOLDER, with_features

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:.*use_(polars|push_based_shuffle|arrow_tensor_v2):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`use_push_based_shuffle:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def config(composed):
    small = {"combiner.projection_dim": 64, "combiner.hidden_dim": 32, "combiner.dropout": 0}
    more = {"train.global_batch_size": 20, "train.eval_batch_size": 16, "data.path": str(composed)}
    return build_config(recipe_config("scenes-cir-combiner"), {**small, **more})


@pytest.fixture(scope="module")
def cached(config, ray_cluster, tmp_path_factory):
    return with_features(config, tmp_path_factory.mktemp("run"), ray_cluster)


def first_batch(config):
    transform = make_task(config).transform(training=True)
    batches = TrainingStream(planned_order(config), transform, config.data, Worker(), local_batches).steps(0, 1)
    batch = next(batches)
    batches.close()
    return batch


def test_a_batch_gives_the_outputs_of_the_images_and_texts(config, cached):
    model = make_task(config).new_model().eval()
    images, vectors = first_batch(config), first_batch(cached)
    assert torch.equal(images["row"], vectors["row"])
    assert vectors["reference"].shape == (20, 128)
    with torch.no_grad():
        expected = model(images["reference"], images["text"], images["target"])
        found = model(vectors["reference"], vectors["text"], vectors["target"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_an_evaluation_gives_the_figures_of_the_images(config, cached):
    model = make_task(config).new_model()
    for split in ("val", "test"):
        expected, found = (
            evaluate_split(make_task(which), which, model, split, worker=Worker(), loader=local_batches)
            for which in (config, cached)
        )
        torch.testing.assert_close(found.retrieval.query_embeddings, expected.retrieval.query_embeddings)
        assert found.metrics == expected.metrics


def test_features_are_pictured_by_the_images_they_came_from(cached, composed, tmp_path):
    split = open_split(cached.data.path, "val")
    assert split.pictured == open_split(composed, "val")
    task = make_task(cached)
    evaluation = evaluate_split(task, cached, task.new_model(), "val", worker=Worker(), loader=local_batches)
    assert evaluation.picture(split).width > 500
    assert evaluation.projection(split).thumbnails.shape == (30, 3, 32, 32)
    assert evaluation.sections(split)
    manifest = replace(split.manifest, options={**split.manifest.options, "source": str(tmp_path)})
    moved = Split(split.path, manifest)
    assert moved.pictured is None
    assert evaluation.picture(moved) is None
    damaged = Path(shutil.copytree(composed / "val", tmp_path / "val"))
    next(damaged.glob("*.parquet")).unlink()
    assert Split(split.path, replace(manifest, options={"source": str(damaged)})).pictured is None
    changed = Split(split.path, replace(split.manifest, inputs={"manifest": "of other data"}))
    assert changed.pictured is None


@pytest.mark.usefixtures("encode_here")
def test_a_query_with_two_captions_keeps_its_four_texts(ray_cluster, tmp_path):
    """FashionIQ, by category: vectors give the figures of the images, and training draws all four texts."""
    data = tmp_path / "data"
    root = draw_fashioniq(tmp_path / "raw")
    for split in ("train", "val"):
        fashioniq_split(root, split, data)
    changes = {"data.path": str(data), "train.global_batch_size": 6, "combiner.dropout": 0}
    config = build_config(recipe_config("scenes-cir-combiner"), changes)
    cached = with_features(config, tmp_path / "run", ray_cluster)
    model = make_task(config).new_model().eval()
    rows = open_split(cached.data.path, "train").read(["captions", "text_vectors"]).to_pylist()
    inputs = make_task(config)._inputs
    with torch.no_grad():
        for row in rows[:3]:
            texts = model.text_features(inputs.tokens(list(training_texts(row["captions"]))))
            kept = torch.stack(
                [torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in row["text_vectors"]]
            )
            torch.testing.assert_close(kept, texts, rtol=1e-4, atol=1e-5)
    assert {len(row["text_vectors"]) for row in rows} == {4}
    expected, found = (
        evaluate_split(make_task(which), which, model, "val", worker=Worker(), loader=local_batches)
        for which in (config, cached)
    )
    assert found.metrics == expected.metrics
    for category in ("dress", "toptee", "shirt"):
        assert f"{category}_recall_at10" in found.metrics
    gallery = open_split(data, "val").read(["label_name"]).column("label_name").to_pylist()
    assert found.chance()["toptee_recall_at50"] == 100  # of 8 images
    assert gallery.count("dress") == 9


def test_weights_that_do_not_fit_are_one_clear_mistake(config, ray_cluster, tmp_path):
    torch.save({"ln_final.weight": torch.zeros(3)}, tmp_path / "wrong.pt")
    wrong = build_config(config, {"model.pretrained": str(tmp_path / "wrong.pt")})
    with pytest.raises(UserError, match=r"^[^\n]*wrong\.pt must hold a CLIP [^\n]* such as ln_final\.weight"):
        with_features(wrong, tmp_path / "run", ray_cluster)
    assert not list((tmp_path / "run").rglob(MANIFEST_NAME))


def test_a_second_call_keeps_what_is_there(config, cached, ray_cluster):
    folder = open_split(cached.data.path, "train").path.parent.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert len(before) >= 5
    assert with_features(config, folder, ray_cluster) == cached
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before


def test_every_image_is_encoded_once(config, cached):
    table = open_split(cached.data.path, "train").read(["reference", "target", "reference_vector", "target_vector"])
    by_name = {}
    for row in table.to_pylist():
        for side in ("reference", "target"):
            by_name.setdefault(row[side], set()).add(row[f"{side}_vector"])
    assert Counter(map(len, by_name.values())) == {1: len(by_name)}


def test_vectors_of_other_encoders_are_refused(cached):
    other = build_config(cached, {"seed": 1})
    task = make_task(other)
    with pytest.raises(UserError, match=r"come from other encoders or settings than the model's \(backbone differ\)"):
        evaluate_split(task, other, task.new_model(), "val", worker=Worker(), loader=local_batches)


def test_vectors_are_not_fine_tuned_on(cached):
    config = build_config(recipe_config("scenes-cir-finetune"), {"data.path": cached.data.path})
    with pytest.raises(UserError, match=r"recipe scenes-cir-finetune needs triplets, but .* holds triplet vectors"):
        make_task(config).check(open_split(cached.data.path, "train"))


def test_features_of_other_data_are_refused(config, cached, composed, ray_cluster, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(composed, data)
    shutil.copytree(cached.data.path, run / FOLDER)
    manifest = data / "val" / MANIFEST_NAME
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match="holds features of other data"):
        with_features(build_config(config, {"data.path": str(data)}), run, ray_cluster)


def test_on_the_fly_nothing_is_written(config, ray_cluster, tmp_path):
    wanted = build_config(config, {"features.cached": False})
    assert with_features(wanted, tmp_path, ray_cluster) == wanted
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("encode_here")
def test_an_unreadable_image_is_named_and_leaves_nothing(config, cached, composed, ray_cluster, tmp_path):
    """The split before it is whole, and what it was the first time to the bit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tmp_path / "data"
    shutil.copytree(composed, data)
    split = open_split(data, "val")
    path = split.shard_paths()[0]
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["image"] = b"not an image"
    pq.write_table(
        pa.Table.from_pylist(rows, schema=table.schema),
        path,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    shards = [
        replace(shard, bytes=file.stat().st_size)
        for shard, file in zip(split.manifest.shards, split.shard_paths(), strict=True)
    ]
    (split.path / MANIFEST_NAME).write_text(replace(split.manifest, shards=tuple(shards)).to_json())
    with pytest.raises(UserError, match=f"val: image {rows[1]['source']}: not an image"):
        with_features(build_config(config, {"data.path": str(data)}), tmp_path / "run", ray_cluster)
    assert [path.parent.name for path in (tmp_path / "run").rglob(MANIFEST_NAME)] == ["train"]
    again, first = (open_split(folder, "train") for folder in (tmp_path / "run" / FOLDER, cached.data.path))
    assert [path.read_bytes() for path in again.shard_paths()] == [path.read_bytes() for path in first.shard_paths()]
