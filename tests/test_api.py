import io

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from harma_ray.api import load_run
from harma_ray.data.schema import open_split
from harma_ray.data.stream import Place, local_batches
from harma_ray.embed import embed
from harma_ray.engine import run_evaluation
from harma_ray.errors import UserError


@pytest.fixture(scope="module")
def details(random_run):
    evaluation, _ = run_evaluation(
        random_run.task, random_run.config, random_run.best_checkpoint(), "test", place=Place(), reader=local_batches
    )
    return evaluation.details


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
    from pathlib import Path

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


@pytest.mark.parametrize("bad", [b"", b"not an image", "missing.png"])
def test_images_that_cannot_be_read_are_named(random_run, bad):
    with pytest.raises(UserError, match=r"image|missing"):
        load_run(random_run.path).encode_images([bad])


def test_a_caption_without_words_is_refused(random_run):
    with pytest.raises(UserError, match="holds no word"):
        load_run(random_run.path).encode_texts(["a road", " ?! "])


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_embedded_vectors_are_those_of_evaluation(random_run, details, scenes, tmp_path, ray_cluster):
    summary = embed(random_run, scenes, tmp_path / "vectors", split="test", batch_size=4)
    assert "11 image and 55 text vectors of width 128" in summary
    table = pq.read_table(tmp_path / "vectors" / "vectors.parquet")
    rows = table.to_pylist()
    images = torch.tensor([row["vector"] for row in rows if row["kind"] == "image"])
    texts = torch.tensor([row["vector"] for row in rows if row["kind"] == "text"])
    torch.testing.assert_close(images, details.image_embeddings)
    torch.testing.assert_close(texts, details.text_embeddings)
    assert [row["text"] for row in rows if row["kind"] == "text"] == details.texts
    with pytest.raises(UserError, match="exists"):
        embed(random_run, scenes, tmp_path / "vectors")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(images_of(scenes)[0])
    (folder / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.png"):
        embed(random_run, folder, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert "left out: bad.png" in embed(random_run, folder, tmp_path / "folder", max_bad=1)
