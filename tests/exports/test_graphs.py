"""ONNX graphs, run by onnxruntime from what stands beside them, against the models."""

import json

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image
from random_runs import make_random_run
from torch import nn

from harma_ray.api import load_run
from harma_ray.data.captions import clean_caption
from harma_ray.errors import UserError
from harma_ray.exports import graphs
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.exports.graphs import write_graphs
from harma_ray.models.architectures import configuration, tokenizer_of
from harma_ray.models.towers import Tower
from harma_ray.recipes import recipe_config
from harma_ray.recipes.clip4cir.released import Clip4CirFile
from harma_ray.settings import build_config

TEXTS = ["Two roads; a plane.", "a harbour", "many small planes stand beside a long runway", "cars"]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """Name of an architecture whose towers have one layer: graphs are made quickly."""
    settings = configuration("scenes-tiny")
    for part in ("vision_cfg", "text_cfg"):
        settings[part]["layers"] = 1
    file = tmp_path_factory.mktemp("architecture") / "one-layer.json"
    file.write_text(json.dumps(settings))
    open_clip.add_model_config(file)
    return {"model.architecture": file.stem, "model.pretrained": "random"}


def pictures(count):
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40 + i, 60, 3), np.uint8)) for i in range(count)]


def pixels_of(images, said):
    """Returns what a reader of the facts makes of images that need no crop."""
    size = (said["size"],) * 2
    arrays = [np.asarray(image.resize(size, RESAMPLING[said["interpolation"]]), np.float32) / 255 for image in images]
    return ((np.stack(arrays) - said["mean"]) / said["std"]).transpose(0, 3, 1, 2).astype(np.float32)


def run_graph(folder, name, **inputs):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def facts_of(folder):
    return json.loads((folder / "onnx.json").read_text())


def assert_near(found, expected):
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5, rtol=0)


def test_graphs_give_the_vectors_of_an_adapted_model(shallow, tmp_path):
    changes = {**shallow, "adapter.share_across_modalities": True}
    run = make_random_run(tmp_path, "run", build_config(recipe_config("harma-scenes"), changes))
    made = export_checkpoint(run, "onnx", tmp_path / "graphs")
    told, own = facts_of(made.path), load_run(run.path, "cpu")
    assert_near(run_graph(made.path, "image", pixels=pixels_of(pictures(5), told["towers"]["image"]))[0],
                own.encode_images(pictures(5)))  # fmt: skip
    tokens = tokenizer_of("scenes-tiny")([clean_caption(text) for text in TEXTS])
    assert tokens.shape[1] == told["towers"]["text"]["context_length"]
    assert_near(run_graph(made.path, "text", tokens=tokens.numpy())[0], own.encode_texts(TEXTS))
    assert "largest difference to the model on a test batch: image" in made.describe()
    assert max(told["largest_differences"].values()) < told["tolerance"]
    assert not [file for file in made.path.iterdir() if b"/python3" in file.read_bytes()]  # no paths of this machine


def test_graphs_of_a_combiner_make_queries_of_the_towers_features(shallow, tmp_path):
    changes = {**shallow, "combiner.projection_dim": 64, "combiner.hidden_dim": 64}
    run = make_random_run(tmp_path, "run", build_config(recipe_config("scenes-cir-combiner"), changes))
    model, tokens, folder = run.load_model(), tokenizer_of("scenes-tiny")(TEXTS), tmp_path / "graphs"
    image, text, combiner = Clip4CirFile().towers(model, run)
    write_graphs([image, combiner], {}, folder)  # the other tower's is made in the test above
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    vectors, images = run_graph(folder, "image", pixels=pixels.numpy())
    with torch.no_grad():
        _, texts = text.module(tokens)
        (query,) = run_graph(folder, "combiner", image_features=images, text_features=texts.numpy())
        features = model.image_features(pixels)
        assert_near(query, model.compose(features, model.text_features(tokens)))
        assert_near(vectors, nn.functional.normalize(features))
    assert "padded with black until the sides' ratio is 1.25" in facts_of(folder)["towers"]["image"]["first"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_graph_of_a_vision_transformer_gives_the_vectors_of_the_run(tmp_path):
    changes = {"features.layer": 1, "features.pooling": "cls"}
    run = make_random_run(tmp_path, "run", build_config(recipe_config("scenes-vitp"), changes))
    folder = export_checkpoint(run, "onnx", tmp_path / "graphs").path
    said = facts_of(folder)["towers"]["image"]
    assert (said["layer"], said["pooling"], said["interpolation"]) == (1, "cls", "bilinear")
    found = run_graph(folder, "image", pixels=pixels_of(pictures(4), said))[0]
    assert_near(found, load_run(run.path, "cpu").encode_images(pictures(4)))
    assert sorted(file.name for file in folder.iterdir()) == [".harma_ray-export.json", "image.onnx", "onnx.json"]


def test_a_graph_that_is_not_the_model_is_refused(tmp_path):
    class Fickle(nn.Linear):
        def forward(self, x):
            return super().forward(x) + (0 if torch.compiler.is_exporting() else 0.001)

    tower = Tower("odd", Fickle(2, 2).eval(), {"x": torch.ones(3, 2)})
    with pytest.raises(UserError, match=r"odd\.onnx computes something else than the model: numbers differ"):
        write_graphs([tower], {}, tmp_path / "graphs")


def test_missing_packages_are_told_in_a_line(random_run, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None if "onnx" in name else name)
    with pytest.raises(UserError, match=r'need onnx and onnxscript; run: pip install "harma-ray\[onnx\]"'):
        export_checkpoint(random_run, "onnx", tmp_path / "graphs")
