"""No network is needed: a cache is laid out as the hub's library does, and what does not answer is this machine."""

import http.server
import json
import threading

import open_clip
import pytest
import torch
from huggingface_hub import constants

from harma_ray.errors import UserError
from harma_ray.models import hub
from harma_ray.models.architectures import configuration, image_size, outline_clip, pixel_statistics, tokenizer_of
from harma_ray.models.backbones import ClipBackbone, build_clip, check_pretrained
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.weights import save_clip

TINY = "scenes-tiny"
LAION, TAG = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "laion2b_s34b_b79k"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub at a port of this machine that nothing listens to."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def cached(cache, repository):
    """Returns the folder of a repository's files in a cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def fill(folder):
    """Writes a tiny CLIP into a folder, as open_clip publishes its own; returns it."""
    model = build_clip(TINY, "random", seed=5)
    save_clip(model, folder / "open_clip_model.safetensors")
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"model_cfg": configuration(TINY), "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return model


@pytest.mark.parametrize("kind", ["hub", "folder"])
def test_a_repository_or_a_folder_is_an_architecture_and_weights(cache, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    name = f"hf-hub:some/{kind}" if kind == "hub" else f"local-dir:{tmp_path / 'folder'}"
    model = fill(cached(cache, f"some/{kind}") if kind == "hub" else tmp_path / "folder")
    check_pretrained(name, name)
    built = build_clip(name, name)
    assert backbone_fingerprint(built) == backbone_fingerprint(model) == backbone_fingerprint(build_clip(TINY, name))
    assert pixel_statistics(built) == pixel_statistics(name) == ((0.5,) * 3, (0.25,) * 3)
    assert image_size(name) == image_size(TINY)
    assert outline_clip(name).state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(tokenizer_of(name)(["a road"]), tokenizer_of(TINY)(["a road"]))
    backbone = ClipBackbone(name, name)
    assert backbone.fingerprint(backbone.build()) == backbone_fingerprint(model)
    with pytest.raises(UserError, match=f"its own are `{name}`"):
        check_pretrained(name, TAG)
    with pytest.raises(UserError, match="does not fit `RN50`"):
        check_pretrained("RN50", name)


def test_a_hub_that_cannot_be_reached_is_told_with_the_file_to_fetch():
    expected = (
        f"the weights `{TAG}` of `ViT-B-32` must be fetched, but http://127.0.0.1:9 cannot be reached (Connection "
        "refused); where there is a network fetch open_clip_model.safetensors or open_clip_pytorch_model.bin of "
        f"http://127.0.0.1:9/{LAION}, and name the file here: --set model.pretrained=FILE"
    )
    for attempt in (check_pretrained, build_clip):
        with pytest.raises(UserError) as caught:
            attempt("ViT-B-32", TAG)
        assert str(caught.value) == expected
        with pytest.raises(UserError, match=r"`hf-hub:some/model` must be fetched, .* model\.pretrained=FILE"):
            attempt("ViT-B-32", "hf-hub:some/model")
    with pytest.raises(UserError, match=r"into a folder, and name that: local-dir:/FOLDER"):
        check_pretrained("hf-hub:some/model", "random")


def test_no_place_is_asked_where_the_hub_is_off(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_silence", None)
    with pytest.raises(UserError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        check_pretrained("ViT-B-32", TAG)


def test_what_is_in_the_cache_is_taken_without_asking(cache, monkeypatch):
    monkeypatch.setattr(hub, "_silence", None)
    (cached(cache, LAION) / "open_clip_pytorch_model.bin").write_bytes(b"")
    check_pretrained("ViT-B-32", TAG)
    with hub.from_cache("ViT-B-32", TAG):
        assert constants.HF_HUB_OFFLINE
    with hub.from_cache("ViT-B-32", "openai"):
        assert not constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_weights_of_another_place_than_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": "http://127.0.0.1:9/clip/RN50.pt"})
    with pytest.raises(UserError, match=r"refused\); where .* fetch http://127\.0\.0\.1:9/clip/RN50\.pt, and"):
        hub.require_tag("RN50", "some")
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "RN50.pt").write_bytes(b"")
    hub.require_tag("RN50", "some")


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch):
    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", place)
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, place)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        with pytest.raises(UserError, match=r"`hf-hub:some/model` (cannot be fetched|has no)") as caught:
            hub.find_weights("hf-hub:some/model")
        server.shutdown()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf-hub:some", "hf-hub:", "hf-hub:a/b/c", "local-dir:relative", "local-dir:/nowhere"])
def test_names_that_cannot_be_are_refused(name):
    for arguments in ((name, "random"), (TINY, name)):
        with pytest.raises(UserError, match=r"must be named hf-hub:ORG/NAME|absolute path of a folder with open_clip_"):
            check_pretrained(*arguments)


@pytest.mark.parametrize("name", ["roberta-ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-H-14-CLIPA"])
def test_architectures_with_another_text_tower_are_refused_before_anything_is_fetched(name):
    for attempt in (configuration, outline_clip, tokenizer_of):
        with pytest.raises(UserError, match=r"needs open_clip's `CLIP` with .* choose an architecture such as "):
            attempt(name)
