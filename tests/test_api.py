import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from random_runs import make_random_run

from harma_ray.api import find_rendering, load_encoder, load_run
from harma_ray.data.identity import data_identity
from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.models.fingerprints import file_fingerprint
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import META_NAME, WEIGHTS_NAME
from harma_ray.training.step import evaluate_split

COMBINER = {"combiner.projection_dim": 32, "combiner.hidden_dim": 16, "model.pretrained": "random"}


@pytest.fixture(scope="module")
def details(random_run):
    evaluation = evaluate_split(
        random_run.task, random_run.config, random_run.load_model(), "test", worker=Worker(), loader=local_batches
    )
    return evaluation.retrieval


def images_of(scenes):
    return [
        row for path in open_split(scenes, "test").shard_paths() for row in pq.read_table(path)["image"].to_pylist()
    ]


def test_the_api_encodes_as_evaluation_does(random_run, details, scenes, tmp_path):
    retriever = load_run(random_run.path, device="cpu")
    data = images_of(scenes)
    torch.testing.assert_close(retriever.encode_images(data, batch_size=3), details.image_embeddings)
    torch.testing.assert_close(
        retriever.encode_texts([text.upper() + "!" for text in details.texts]), details.text_embeddings
    )
    (tmp_path / "a.png").write_bytes(data[0])
    same = retriever.encode_images([tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(data[0]))])
    torch.testing.assert_close(same, details.image_embeddings[:1].expand(3, -1))
    scores = retriever.similarity(data[:2], details.texts[:3])
    torch.testing.assert_close(scores, details.image_embeddings[:2] @ details.text_embeddings[:3].T)


def test_the_readme_example_runs(random_run, scenes, tmp_path, monkeypatch):
    import re

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "load_run" in block)
    for name, data in zip(("bridge.tif", "farm.png"), images_of(scenes), strict=False):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(random_run.path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["scores"].shape == (2, 2)


def test_arrays_are_images(random_run, scenes):
    retriever, data = load_run(random_run.path, device="cpu"), images_of(scenes)[:2]
    pictures = [Image.open(io.BytesIO(each)).convert("RGB") for each in data]
    arrays = [np.asarray(picture) for picture in pictures]
    expected = retriever.encode_images(data)
    torch.testing.assert_close(retriever.encode_images(arrays), expected)
    torch.testing.assert_close(retriever.encode_images(np.stack(arrays)[:, ::-1, ::-1][:, ::-1, ::-1]), expected)
    grey = pictures[0].convert("L")
    torch.testing.assert_close(retriever.encode_images([np.asarray(grey)]), retriever.encode_images([grey]))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.zeros((8, 8, 3)), r"array must be uint8\[H, W, 3\] in RGB or uint8\[H, W\], got float64\[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got uint8\[3, 8, 8\]"),
        (np.zeros((0, 8), np.uint8), r"got uint8\[0, 8\]"),
        (torch.zeros(3, 8, 8), "Tensor image: an image must be a path, an encoded file, a PIL image or a NumPy array"),
        (None, "NoneType image: an image must be"),
    ],
)
def test_what_is_no_image_is_told_in_one_line(random_run, bad, told):
    with pytest.raises(UserError, match=told) as caught:
        load_run(random_run.path).encode_images([bad])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="put it in brackets"):
        load_run(random_run.path).encode_images(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("bad", [b"", b"not an image", "missing.png"])
def test_images_that_cannot_be_read_are_named(random_run, bad):
    with pytest.raises(UserError, match=r"image|missing"):
        load_run(random_run.path).encode_images([bad])


def test_a_caption_without_words_is_refused(random_run):
    with pytest.raises(UserError, match="holds no word"):
        load_run(random_run.path).encode_texts(["a road", " ?! "])
    with pytest.raises(UserError, match="a caption must be a text, got 3"):
        load_run(random_run.path).encode_texts(["a road", 3])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["turned", "palette"])
def test_an_open_image_is_read_like_its_file(random_run, kind):
    rng, file = np.random.default_rng(0), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8))
    image = image.quantize(16) if kind == "palette" else image
    image.save(file, "PNG", exif=exif)
    from_bytes, from_image = load_run(random_run.path, "cpu").encode_images(
        [file.getvalue(), Image.open(io.BytesIO(file.getvalue()))]
    )
    assert torch.equal(from_bytes, from_image)


def test_more_than_eight_bits_need_a_rule_and_are_shown_by_it(random_run):
    numbers, file = np.random.default_rng(0).integers(0, 16, (40, 64), dtype=np.uint16), io.BytesIO()
    Image.fromarray(numbers * 256).save(file, "PNG")
    wide, shown = file.getvalue(), Image.fromarray((numbers * 17).astype(np.uint8))
    for image in (wide, Image.open(io.BytesIO(wide))):
        with pytest.raises(UserError, match="more than 8 bits"):
            load_run(random_run.path, "cpu").encode_images([image])
    by_rule = load_run(random_run.path, "cpu", rendering=Rendering.parse(stretch="minmax:0,3840"))
    from_bytes, from_image = by_rule.encode_images([wide, shown])
    assert torch.equal(from_bytes, from_image)


def test_the_rule_of_a_data_set_is_the_runs_only_if_it_was_trained_on_it(random_run, tmp_path, caplog):
    train = tmp_path / "data" / "train"
    shutil.copytree(Path(random_run.config.data.path) / "train", train)
    manifest, rule = json.loads((train / MANIFEST_NAME).read_text()), Rendering.parse(stretch="bits:11")
    manifest["rendered"] = {"images": {"3 x uint16": 1}, "nodata_percent": 0, "rule": rule.to_dict()}
    (train / MANIFEST_NAME).write_text(json.dumps(manifest))
    config = build_config(random_run.config, {"data.path": str(tmp_path / "data")})
    run = make_random_run(tmp_path, "trained", config)
    checkpoint = run.best_checkpoint() / META_NAME
    meta = json.loads(checkpoint.read_text()) | {"data": data_identity(config)}
    checkpoint.write_text(json.dumps(meta))
    assert find_rendering(run) == rule
    (train / MANIFEST_NAME).write_text(json.dumps(manifest | {"captions": 0}))
    assert find_rendering(run) is None
    assert "was converted anew since run" in caplog.text


def test_one_thing_in_place_of_a_list_is_refused(random_run):
    retriever = load_run(random_run.path, "cpu")
    with pytest.raises(UserError, match="`texts` must be a list"):
        retriever.encode_texts("a road")
    with pytest.raises(UserError, match="`images` must be a list"):
        retriever.similarity("a.png", ["a road"])
    with pytest.raises(UserError, match="`batch_size`"):
        retriever.encode_images([], batch_size=0)
    assert retriever.similarity([], ["a road"]).shape == (0, 1)


def test_composed_queries_are_those_of_evaluation(composed, tmp_path):
    config = build_config(recipe_config("scenes-cir-combiner"), {"data.path": str(composed), **COMBINER})
    run = make_random_run(tmp_path, "run", config)
    found = evaluate_split(run.task, config, run.load_model(), "test", worker=Worker(), loader=local_batches)
    retriever, queries, gallery = load_run(run.path, "cpu"), found.retrieval.queries, images_of(composed)
    references = [gallery[row] for row in queries.reference.tolist()]
    vectors = retriever.compose(references, [own if place else own[0] for place, own in enumerate(queries.captions)])
    torch.testing.assert_close(vectors, found.retrieval.query_embeddings)
    torch.testing.assert_close(retriever.encode_images(gallery), found.retrieval.gallery_embeddings)
    for query, other in found.others.items():
        torch.testing.assert_close(
            retriever.compose(references, queries.captions, query), other.retrieval.query_embeddings
        )
    texts = [own[0] for own in queries.captions]
    torch.testing.assert_close(retriever.encode_texts(texts), found.others["text"].retrieval.query_embeddings)
    for captions, query, message in (
        (texts[:1], None, "got 4 images and 1 relative caption$"),
        ([*texts[:3], " "], None, "relative caption ' ' holds no word"),
        ([*texts[:3], ["a", "b", "c"]], None, "one or two relative captions, got 3"),
        ([*texts[:3], 3], None, "a relative caption must be a text, got 3"),
        (texts, "product", "must be one of combiner, sum, image, text for this model, got product"),
    ):
        with pytest.raises(UserError, match=message):
            retriever.compose(references, captions, query)


def test_a_model_of_another_recipe_composes_nothing(random_run):
    with pytest.raises(UserError, match="recipe harma-scenes composes no queries; give a run of CLIP4Cir"):
        load_run(random_run.path, "cpu").compose(["a.png"], ["add a boat"])


def test_vectors_name_the_weights_that_made_them_also_while_the_run_goes_on(random_run, monkeypatch):
    """Asked again, a run that is trained at that moment may answer with another checkpoint."""
    checkpoint = random_run.best_checkpoint()
    monkeypatch.delattr(Run, "best_checkpoint")
    _, identity = load_encoder(random_run, checkpoint, "cpu")
    assert identity.values["weights"] == file_fingerprint(checkpoint / WEIGHTS_NAME)
