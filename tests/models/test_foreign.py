"""One small CLIP in the wrappings of other programs; what is no weights file is named."""

import argparse
import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_clip import small_clip
from torch import nn

from harma_ray.errors import UserError
from harma_ray.models.foreign import CLIP_MARK, fitted, read_foreign, read_models
from harma_ray.models.weights import check_fit

STATE = small_clip().state_dict()
OPTIMISER = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}
NAMED_OPTIMISER = {"state": {"visual.proj": {"exp_avg": torch.zeros(3)}}}


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


def equals_state(tensors):
    return tensors.keys() == STATE.keys() and all(torch.equal(tensors[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    ("content", "section", "prefix"),
    [
        (STATE, "", ""),
        (prefixed("module."), "", "module."),
        (prefixed("_orig_mod."), "", "_orig_mod."),
        (prefixed("module._orig_mod.model.clip."), "", "module._orig_mod.model.clip."),
        ({"state_dict": prefixed("model."), "optimizer_states": [OPTIMISER], "epoch": 1}, "state_dict", "model."),
        ({"model": STATE, "optimizer": OPTIMISER, "scaler": {"scale": 2.0}}, "model", ""),
        ({"model_state_dict": prefixed("module."), "optimizer_state_dict": NAMED_OPTIMISER}, "model_state_dict",
         "module."),
        ({"net": STATE}, "net", ""),
        ({"ema": {"module": STATE, "decay": 0.99}}, "ema.module", ""),
        ({"CLIP": STATE, "epoch": 3}, "CLIP", ""),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1), "best": np.float64(1), "out": Path("x")}, "state_dict",
         ""),
        ({**STATE, "epoch": 3}, "", ""),
        ({name: nn.Parameter(t) if t.is_floating_point() else t for name, t in STATE.items()}, "", ""),
    ],
)  # fmt: skip
def test_a_model_is_found_under_any_section_and_prefix(tmp_path, content, section, prefix):
    torch.save(content, tmp_path / "file.bin")
    found = read_foreign(tmp_path / "file.bin")
    assert equals_state(found.tensors)
    assert (found.mark, found.section, found.prefix) == (CLIP_MARK, section, prefix)
    told = "; ".join(found.notes)
    assert all(word in told for word in (section, prefix))
    assert all(name in told for name in content if "." not in name and name not in (*STATE, section.split(".")[0]))


def test_the_content_counts_not_the_suffix(tmp_path):
    torch.save(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pt", "old.pt"):
        assert equals_state(read_foreign(tmp_path / name).tensors)


def test_tied_and_strided_tensors_come_back_as_they_were(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.T, "c": base[1:, 2], "d": torch.zeros(0), "e": torch.tensor(True)}, tmp_path / "t")
    found = read_foreign(tmp_path / "t").tensors
    assert torch.equal(found["b"], base.T)
    assert torch.equal(found["c"], torch.tensor([6.0, 10.0]))
    assert found["d"].shape == (0,)
    assert found["e"].dtype == torch.bool
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_what_another_program_calls_activation_is_not_taken_for_ours(tmp_path):
    for said, expected in (("quick GELU", True), ("GELU", False), ("quick_gelu", None), ("relu", None)):
        save_file(STATE, tmp_path / "w.safetensors", metadata={"activation": said})
        assert read_foreign(tmp_path / "w.safetensors").quick_gelu is expected


def test_several_models_need_a_choice_unless_they_are_one(tmp_path):
    path = tmp_path / "both.pt"
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"model": other, "ema": prefixed("module.")}, path)
    with pytest.raises(UserError, match=r"2 models that differ: `model`, `ema\.module`.*--section model"):
        read_foreign(path)
    with pytest.raises(UserError, match="2 models that differ"):
        read_foreign(path, data=False)
    for name in ("ema", "ema.module"):
        assert equals_state(read_foreign(path, section=name).tensors)
    with pytest.raises(UserError, match="no single model `teacher`; there are `model`"):
        read_foreign(path, section="teacher")
    torch.save({"state_dict": {**{f"student.{n}": t for n, t in other.items()}, **prefixed("teacher.")}}, path)
    assert equals_state(read_foreign(path, section="teacher").tensors)
    torch.save({"model": STATE, "ema": dict(STATE)}, path)
    assert read_foreign(path).section == "model"
    assert len(read_models(path)) == 1
    assert read_foreign(path, data=False).tensors["visual.proj"].is_meta is False  # copies are told by their numbers


def test_tensors_beside_the_model_are_left_out_by_name(tmp_path):
    torch.save({**prefixed("clip."), "head.weight": torch.ones(2)}, tmp_path / "probe.pt")
    found = read_foreign(tmp_path / "probe.pt")
    assert equals_state(found.tensors)
    assert found.beside.keys() == {"head.weight"}
    assert "1 tensor without that prefix left out: head.weight" in found.notes


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.rand(4, 4))
        self.mlp = nn.Sequential(nn.Linear(4, 4), QuickGELU(), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.mlp(x) @ self.proj


class OpenAiLike(nn.Module):
    """What OpenAI's own files hold: modules in half precision, the sizes as tensors beside them."""

    def __init__(self):
        super().__init__()
        self.visual, self.token_embedding = Tower(), nn.Embedding(9, 4)
        self.sizes, self.name, self.unused = [1, 2], "clip", None
        for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))
        self.half().eval()

    def forward(self, image):
        return self.visual(image)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("way", ["script", "trace", "pickle"])
def test_archives_of_modules_are_read_as_data(tmp_path, way):
    """Of TorchScript, `torch.jit.load` is the independent reader."""
    model, path = OpenAiLike(), tmp_path / "RN50x4.pt"
    if way == "pickle":
        torch.save(model, path)
    elif way == "script":
        torch.jit.script(model).save(str(path))
    else:
        torch.jit.trace(model.float(), torch.zeros(2, 4)).save(str(path))
    expected = model.state_dict() if way == "pickle" else torch.jit.load(str(path)).state_dict()
    found = read_foreign(path)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert found.quick_gelu is True
    assert "its code was not run" in found.notes[0]
    lazy = read_foreign(path, data=False)
    assert {name: t.shape for name, t in lazy.tensors.items()} == {name: t.shape for name, t in expected.items()}


def test_what_is_no_weight_is_dropped_and_what_is_unused_is_filled_in():
    causal = torch.full((7, 7), -torch.inf).triu(1)
    given = {
        **STATE,
        "logit_scale": STATE["logit_scale"].reshape(1),
        "attn_mask": causal,
        "logit_bias": torch.tensor(-10.0),
        "vocab_size": torch.tensor(9),
        "text.embeddings.position_ids": torch.arange(7)[None],
    }
    kept, notes = fitted(STATE, given)
    assert equals_state(kept)
    assert "attn_mask, logit_bias, vocab_size, text.embeddings.position_ids" in notes[0]
    kept, notes = fitted(STATE, {name: tensor for name, tensor in STATE.items() if name != "logit_scale"})
    assert equals_state(kept)
    assert "logit_scale" in notes[0]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("attn_mask", torch.zeros(7, 7), r"1 unexpected \(attn_mask\)"),
        ("position_ids", torch.tensor([3, 1]), r"1 unexpected \(position_ids\)"),
        (
            "visual.proj",
            torch.full_like(STATE["visual.proj"], torch.nan),
            r"NaN or infinity in 1 of \d+ .*visual\.proj",
        ),
        ("visual.proj", STATE["visual.proj"].double() * 1e300, r"NaN or infinity in 1 of \d+ .*visual\.proj"),
        ("visual.proj", STATE["visual.proj"].char(), r"floating-point weights, got int8 in 1 tensor \(visual\.proj\)"),
    ],
)
def test_numbers_that_would_compute_something_else_are_refused(name, tensor, message):
    with pytest.raises(UserError, match=message):
        check_fit(STATE, fitted(STATE, {**STATE, name: tensor})[0], "file.pt")


def save(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return stream.getvalue()


def flipped(content):
    """Damages a storage, not the list of tensors."""
    whole = save(content)
    at = whole.index(torch.full((8,), 3.25).numpy().tobytes())
    return whole[:at] + b"\x01" + whole[at + 1 :]


SAFE = (
    b"\x40\x00\x00\x00\x00\x00\x00\x00"
    + b'{"a":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'.ljust(64)
    + b"\0" * 99
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 605143884\n", "Git LFS pointer.*605 MB"),
        (b"../../.git/annex/objects/aa/bb/SHA256E-s605143884--f.pt", "git-annex pointer"),
        (b"<!DOCTYPE html><html><title>Virus scan\n warning</title></html>", r"web page \(`Virus scan warning`\)"),
        (b'\n<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"error": "Invalid username or password."}', "JSON that begins with"),
        (b"Entry not found", "a text that begins with `Entry not found`"),
        (gzip.compress(b"x" * 99, mtime=0), "packed .gzip"),
        (tarred(), "packed .tar"),
        (zipped(), r"zip archive without weights.*weights/readme\.txt"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5"),
        (pickle.dumps({"weight": 3}), "plain pickle"),
        (save(STATE)[:9999], "cut off or damaged"),
        (flipped({"a": torch.full((8,), 3.25)}), "cut off or damaged"),
        (SAFE, "safetensors file that is cut off"),
        (bytes(range(128, 256)), "no file of weights"),
        (save({}), "an empty mapping"),
        (save([1]), "got a list"),
        (save({"epoch": 3}), "a mapping of epoch"),
        (save({"model": {}, "args": argparse.Namespace()}), "a mapping of model, args"),
        (
            save({"model": {"visual.proj": torch.zeros(1), "token_embedding.weight": torch.zeros(1), "ln.weight": 3}}),
            r"other things under ln\.weight",
        ),
        (save({"a": {"x": torch.zeros(1)}, "b": {"x": torch.zeros(1)}}), "in several sections, and no CLIP"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_foreign(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a weights file was run')",)


class Removal:
    def __reduce__(self):
        import os

        return os.system, ("echo removed",)


@pytest.mark.parametrize("thing", [Attack(), Removal()])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("place", [lambda thing: {"weight": thing}, lambda thing: {"state_dict": STATE, "args": thing}])
def test_code_is_refused_and_never_run(tmp_path, thing, new, place, capfd):
    torch.save(place(thing), tmp_path / "attack.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"holds code \(`(builtins\.|posix\.)?(exec|system)`\).*refused"):
        read_foreign(tmp_path / "attack.pt")
    assert "removed" not in capfd.readouterr().out


class Outside:
    """Pickles as a tensor that reaches beyond its storage."""

    def __reduce__(self):
        storage = torch.zeros(2).untyped_storage()
        return torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True), 0, (99,), (1,), False, {})  # fmt: skip


def test_a_tensor_beyond_its_storage_is_damage(tmp_path):
    torch.save({"a": Outside()}, tmp_path / "outside.pt")
    with pytest.raises(UserError, match="is damaged"):
        read_foreign(tmp_path / "outside.pt")
