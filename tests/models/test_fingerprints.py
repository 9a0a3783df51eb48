"""Fingerprints of weights, and when one may be remembered."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from small_clip import ADAPTERS, small_clip

from harma_ray import files
from harma_ray.errors import UserError
from harma_ray.models import fingerprints
from harma_ray.models.adapters import insert_adapters
from harma_ray.models.backbones import ClipBackbone, build_clip
from harma_ray.models.clip import DualEncoder
from harma_ray.models.fingerprints import backbone_fingerprint, folder_fingerprint
from harma_ray.models.weights import save_clip

TINY = "scenes-tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "harma_ray" / "fingerprints"


@pytest.fixture
def hashed(monkeypatch):
    """Counts how often all weights were hashed."""
    calls = []

    def counting(model, compute=fingerprints.backbone_fingerprint):
        calls.append(model)
        return compute(model)

    monkeypatch.setattr(fingerprints, "backbone_fingerprint", counting)
    return calls


def write_clip(path, seed):
    save_clip(build_clip(TINY, "random", seed=seed), path)
    return path


def started(path):
    """Returns the fingerprint as a new process has it."""
    backbone = ClipBackbone(TINY, str(path))
    return backbone.fingerprint(backbone.build())


def test_that_of_a_file_is_computed_once_and_is_that_of_its_weights(tmp_path, cache, hashed):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    expected = backbone_fingerprint(build_clip(TINY, "random", seed=3))
    assert [started(path), started(path)] == [expected, expected]
    assert len(hashed) == 1
    assert [file.read_text() for file in cache.iterdir()] == [expected]
    assert {entry.name for entry in tmp_path.iterdir()} == {"cache", "clip.safetensors"}


def test_other_weights_never_pass_for_those_that_were_there(tmp_path, cache, hashed):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    before, times = started(path), path.stat()
    other = write_clip(tmp_path / "other.safetensors", seed=4).read_bytes()
    expected = backbone_fingerprint(build_clip(TINY, "random", seed=4))
    assert len(other) == times.st_size
    with path.open("r+b") as file:  # the same file, of the same size, which says that it is as old
        file.write(other)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert started(path) == expected != before
    assert len(hashed) == 2


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, cache, hashed, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_SECONDS", 60.0)
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    assert started(path) == started(path)
    assert len(hashed) == 2
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, cache, hashed):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)

    def build():
        clip = build_clip(TINY, str(path))
        write_clip(path, seed=4)
        return clip

    model = fingerprints.built_from([path], build)
    assert fingerprints.fingerprint_as_built(model) == backbone_fingerprint(build_clip(TINY, "random", seed=3))
    assert not cache.exists()


def test_a_model_is_hashed_once_whatever_is_put_around_it(hashed):
    backbone = ClipBackbone(TINY, "random")
    model = DualEncoder(backbone.build())
    insert_adapters(model.clip, **ADAPTERS)
    expected = backbone_fingerprint(build_clip(TINY, "random"))
    assert [backbone.fingerprint(model), backbone.fingerprint(model)] == [expected, expected]
    assert len(hashed) == 1


def test_the_dtype_of_a_built_model_counts(tmp_path, cache):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    backbone = ClipBackbone(TINY, str(path))
    backbone.fingerprint(backbone.build())
    half = backbone.build().half()
    assert backbone.fingerprint(half) == backbone_fingerprint(half)


@pytest.mark.parametrize("content", ["", "f" * 63, "not a fingerprint", "\xff"])
def test_a_damaged_memory_is_none(tmp_path, cache, content):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    expected = started(path)
    next(cache.iterdir()).write_text(content, "latin-1")
    assert started(path) == expected
    assert next(cache.iterdir()).read_text() == expected


def test_a_cache_that_cannot_be_written_is_none(tmp_path, cache):
    path = write_clip(tmp_path / "clip.safetensors", seed=3)
    (tmp_path / "cache").write_text("a file stands where the folder would be")
    assert started(path) == backbone_fingerprint(build_clip(TINY, "random", seed=3))


WEIGHTS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.zeros((), dtype=torch.int64),
}


def write_folder(folder, *shards):
    folder.mkdir()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{number}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_that_of_a_hugging_face_folder_is_the_same_however_it_is_split(tmp_path, cache):
    whole = folder_fingerprint(write_folder(tmp_path / "whole", WEIGHTS))
    digest = hashlib.sha256()
    for name in sorted(WEIGHTS):
        tensor = WEIGHTS[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    assert whole == digest.hexdigest()
    parts = [{"c": WEIGHTS["c"], "a": WEIGHTS["a"]}, {"b.weight": WEIGHTS["b.weight"]}]
    assert folder_fingerprint(write_folder(tmp_path / "split", *parts)) == whole
    for name, other in (("a", torch.ones(3)), ("b.weight", WEIGHTS["b.weight"].T.contiguous())):
        assert folder_fingerprint(write_folder(tmp_path / name, {**WEIGHTS, name: other})) != whole


def test_a_hugging_face_folder_is_read_once(tmp_path, cache, monkeypatch):
    folder = write_folder(tmp_path / "split", {"a": WEIGHTS["a"]}, {"c": WEIGHTS["c"]})
    first = folder_fingerprint(folder)
    monkeypatch.setattr(fingerprints, "safe_open", None)
    assert folder_fingerprint(folder) == first
    save_file({"c": WEIGHTS["c"] + 1}, folder / "model-1.safetensors")
    with pytest.raises(TypeError):  # it is read again
        folder_fingerprint(folder)


def test_a_folder_whose_weights_cannot_be_told_is_refused(tmp_path, cache):
    with pytest.raises(UserError, match=r"must hold weights in model\.safetensors"):
        folder_fingerprint(tmp_path)
    folder = write_folder(tmp_path / "split", {"a": WEIGHTS["a"]}, {"c": WEIGHTS["c"]})
    save_file({"d": WEIGHTS["c"]}, folder / "model-1.safetensors")
    with pytest.raises(UserError, match="they differ in 2 tensors"):
        folder_fingerprint(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="must hold weights"):
        folder_fingerprint(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="must hold weights"):
        folder_fingerprint(folder)


def test_fingerprint_follows_the_backbone_alone():
    model = small_clip()
    before = backbone_fingerprint(model)
    assert len(before) == 64
    assert backbone_fingerprint(small_clip()) == before
    assert backbone_fingerprint(small_clip(seed=9)) != before
    insert_adapters(model, **ADAPTERS)
    assert backbone_fingerprint(model) == before == backbone_fingerprint(DualEncoder(model))
    with torch.no_grad():
        model.logit_scale += 1e-6
    assert backbone_fingerprint(model) != before


def test_fingerprint_tells_the_activations_apart():
    plain, quick = small_clip(), small_clip(quick_gelu=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), quick.parameters(), strict=True))
    assert backbone_fingerprint(plain) != backbone_fingerprint(quick)
