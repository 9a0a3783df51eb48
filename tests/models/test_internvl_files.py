"""Folders of InternVL in every layout, against a forward pass over the original's names; what does not fit."""

import json
import re
import shutil

import pytest
import torch
from original_internvl import (
    ORIGINAL,
    ORIGINAL_VISION,
    inner_of,
    language_config,
    original_loss,
    original_states,
    write_original,
)
from safetensors.torch import load_file, save_file
from small_internvl import IMAGE, VISION, small_config, small_core, talks, tiles

from harma_ray.errors import UserError
from harma_ray.models.internvl.files import build_empty, read_internvl, read_vision, write_vision
from harma_ray.models.internvl.keys import to_native, to_original, vision_to_native, vision_to_original
from harma_ray.models.internvl.layouts import check_same_vision, read_config
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.vision import hidden_states, normalise


@pytest.fixture(scope="module")
def core():
    return small_core(config=small_config(text=language_config().to_dict()))


@pytest.fixture(scope="module")
def original(core):
    return to_original(core.state_dict())


def loaded(folder):
    config, state, _ = read_internvl(folder)
    config.image_token_id = IMAGE
    model = build_empty(config)
    model.load_state_dict(state)
    return VisualInstructionModel(model).eval()


def test_the_originals_names_come_back_equal(core, original):
    native = core.state_dict()
    back = to_native(original)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)
    patterns = (
        r"vision_model\.embeddings\.(class_embedding|position_embedding|patch_embedding\.(weight|bias))",
        r"vision_model\.encoder\.layers\.\d\.(ls[12]|(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias))",
        r"mlp1\.[013]\.(weight|bias)",
        r"language_model\.(lm_head\.weight|model\..+)",
    )
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in original)
    assert original["vision_model.encoder.layers.0.attn.qkv.weight"].shape == (72, 24)


def test_names_of_models_with_norms_of_queries_and_without_biases_come_back_equal():
    config = small_config({"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False})
    native = small_core(config=config).model.vision_tower.state_dict()
    back = vision_to_native(vision_to_original(native))
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)
    assert "encoder.layers.1.attn.q_norm.weight" in vision_to_original(native)
    with pytest.raises(UserError, match=r"no encoder\.layer\.1\.attention\.k_proj\.weight"):
        vision_to_original({n: t for n, t in native.items() if n != "encoder.layer.1.attention.k_proj.weight"})


def test_a_folder_of_the_original_computes_what_the_original_does(tmp_path, original):
    model = loaded(write_original(tmp_path, original))
    assert model.core.config.text_config.rope_parameters["rope_theta"] == 500.0
    batch, pixels = talks([2, 1, 3]), tiles(6)
    with torch.no_grad():
        found = model(pixels, **batch)["loss"]
        torch.testing.assert_close(
            found, original_loss(original, normalise(pixels, found), batch), rtol=1e-5, atol=1e-5
        )


def as_safetensors(folder, core, original):
    write_original(folder, original)


def as_shards(folder, core, original):
    write_original(folder, {}, name="unused.safetensors")
    names = sorted(original)
    files = {name: f"model-{1 + (number % 2)}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: original[n].contiguous().clone() for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def as_bin(folder, core, original):
    write_original(folder, {}, name="unused.safetensors")
    torch.save(original, folder / "pytorch_model.bin")


def as_bin_shards(folder, core, original):
    write_original(folder, {}, name="unused.safetensors")
    names = sorted(original)
    for number in range(2):
        torch.save({n: original[n] for n in names[number::2]}, folder / f"part-{number}.bin")
    index = {"weight_map": {name: f"part-{number % 2}.bin" for number, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def as_native(folder, core, original):
    core.save_pretrained(folder)


def as_native_shards(folder, core, original):
    core.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_in_memory(folder, core, original):
    core.config.save_pretrained(folder)
    save_file({n: t.contiguous().clone() for n, t in core.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "write", [as_safetensors, as_shards, as_bin, as_bin_shards, as_native, as_native_shards, as_in_memory]
)
def test_every_layout_gives_the_same_model(tmp_path, core, original, write):
    write(tmp_path, core, original)
    config, state, notes = read_internvl(tmp_path)
    assert state.keys() == core.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in core.state_dict().items())
    assert config.vision_config.to_dict() | {"layer_scale_init_value": 0, "dtype": 0} == (
        core.config.vision_config.to_dict() | {"layer_scale_init_value": 0, "dtype": 0}
    )
    assert config.text_config.rms_norm_eps == 1e-5
    is_native = write in (as_native, as_native_shards, as_in_memory)
    assert notes == (() if is_native else ("names of InternVL's own code translated",))
    outline = read_internvl(tmp_path, data=False)[1]
    assert {n: t.shape for n, t in outline.items()} == {n: t.shape for n, t in state.items()}


def test_an_output_head_of_shared_weights_need_not_be_in_the_file(tmp_path):
    config = small_config(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    core = small_core(config=config)
    core.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    model = loaded(tmp_path)
    assert torch.equal(model.core.lm_head.weight, core.lm_head.weight)
    assert model.core.lm_head.weight is model.core.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vision_config": ORIGINAL_VISION | {"qk_normalization": True}}, r"q/k norm \(no for yes\)"),
        ({"vision_config": ORIGINAL_VISION | {"norm_type": "rms_norm"}}, r"norm \(layer_norm for rms_norm\)"),
        ({"vision_config": ORIGINAL_VISION | {"qkv_bias": False}}, r"bias of queries, keys and values \(yes for no\)"),
        (
            {"vision_config": ORIGINAL_VISION | {"num_hidden_layers": 2, "intermediate_size": 48}},
            r"layers \(3 for 2\), width within the MLPs \(40 for 48\)",
        ),
        ({"vision_config": ORIGINAL_VISION | {"image_size": 64}, "force_image_size": 64}, r"\(32x32 for 64x64\)"),
        ({"force_image_size": 448}, "one image size, got 448 and 32"),
        ({"ps_version": "v1"}, "pixel shuffle v1"),
        ({"llm_config": {"model_type": "internlm2"}}, "'internlm2'"),
        ({"llm_config": ORIGINAL["llm_config"] | {"num_hidden_layers": 1}}, r"12 unexpected \(model\.language_model"),
        ({"llm_config": ORIGINAL["llm_config"] | {"num_hidden_layers": "two"}}, "cannot be understood"),
        ({"model_type": "llava", "llm_config": None, "vision_config": None}, "got 'llava'"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused_by_what_differs(tmp_path, original, changed, said):
    write_original(tmp_path, original, ORIGINAL | changed)
    with pytest.raises(UserError, match=said) as refused:
        read_internvl(tmp_path)
    assert "\n" not in str(refused.value)


def test_tensors_that_are_missing_unexpected_or_broken_are_refused(tmp_path, original):
    some = "vision_model.encoder.layers.1.norm2.bias"
    for number, (tensors, said) in enumerate(
        [
            ({n: t for n, t in original.items() if n != some}, r"1 missing \(.*layer\.1\.layernorm_after\.bias\)"),
            (original | {"vision_model.encoder.layers.1.extra": torch.ones(2)}, "1 unexpected"),
            (original | {some: torch.full((24,), torch.nan)}, "NaN"),
            (original | {some: torch.ones(25)}, r"\(25,\) for \(24,\)"),
            ({n: t for n, t in original.items() if "embeddings" not in n}, "lacks its patch embedding"),
        ]
    ):
        folder = write_original(tmp_path / str(number), tensors)
        with pytest.raises(UserError, match=said):
            read_internvl(folder)


def test_folders_that_are_none_are_refused_in_a_line(tmp_path, original):
    folder = write_original(tmp_path / "a", original)
    index = {"weight_map": {"x": "../a/model.safetensors"}}

    def damaged(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    def unlink(copy):
        (copy / "model.safetensors").unlink()

    def name_elsewhere(copy):
        unlink(copy)
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    def put_code(copy):
        unlink(copy)
        torch.save({"a": print}, copy / "pytorch_model.bin")

    cases = [
        (tmp_path / "none", "must be a folder with config.json"),
        (damaged("b", lambda copy: (copy / "config.json").write_text("{")), "cannot be read"),
        (damaged("c", lambda copy: (copy / "config.json").write_text("[]")), "must hold a mapping"),
        (damaged("d", unlink), "must hold weights in model.safetensors"),
        (damaged("e", name_elsewhere), "lacks files of weights"),
        (damaged("f", put_code), "."),
        (damaged("g", lambda copy: (copy / "model.safetensors").write_bytes(b"x" * 100)), "."),
    ]
    for path, said in cases:
        with pytest.raises(UserError, match=said) as refused:
            read_internvl(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_vision_transformer_alone_has_the_hidden_states_it_has_inside(tmp_path, core, layout, dtype):
    from transformers import InternVLVisionModel

    found = write_vision(core, tmp_path, layout, dtype)
    names = set(core.state_dict())
    assert set(found.kept) | set(found.dropped) == names
    assert set(found.kept) == {name for name in names if name.startswith("model.vision_tower.")}
    tower = core.model.vision_tower
    config, state, notes = read_vision(tmp_path)
    check_same_vision(config, tower.config, "it")
    assert bool(notes) == (layout == "original")
    for name, tensor in tower.state_dict().items():
        assert torch.equal(state[name], tensor.to(dtype))
    pixels = normalise(tiles(2), tower.embeddings.cls_token)
    with torch.no_grad():
        inside = [hidden_states(tower, pixels, layer) for layer in range(4)]
        if layout == "original":
            own = {name: t.float() for name, t in load_file(tmp_path / "model.safetensors").items()}
            alone = original_states(own, pixels)
        else:
            model = InternVLVisionModel.from_pretrained(tmp_path, dtype=torch.float32)
            alone = model(pixels, output_hidden_states=True).hidden_states
    for one, other in zip(alone, inside, strict=True):
        torch.testing.assert_close(one, other, **({} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}))


def test_the_originals_settings_are_those_that_its_own_class_knows(tmp_path, core):
    write_vision(core, tmp_path, "original", torch.bfloat16)
    settings = json.loads((tmp_path / "config.json").read_text())
    expected = ORIGINAL_VISION | {"initializer_factor": 0.1, "drop_path_rate": 0.0}
    assert {name: settings[name] for name in expected} == expected


def test_the_original_has_no_place_for_a_final_norm(tmp_path):
    core = small_core(config=small_config({"use_mean_pooling": False}))
    with pytest.raises(UserError, match="use layout hf"):
        write_vision(core, tmp_path, "original")
    write_vision(core, tmp_path, "hf")
    assert "layernorm.weight" in read_vision(tmp_path)[1]


def test_a_vision_transformer_is_found_in_whole_models_and_bare_files(tmp_path, core, original):
    expected = core.model.vision_tower.state_dict()
    whole = write_original(tmp_path / "whole", original)
    prefixed = write_original(
        tmp_path / "prefixed", {n: t for n, t in original.items() if n.startswith("vision_model.")}, ORIGINAL_VISION
    )
    core.save_pretrained(tmp_path / "native")
    torch.save({"state_dict": {f"module.{n}": t for n, t in inner_of(original).items()}}, tmp_path / "bare.pth")
    config = core.config.vision_config
    for path in (whole, prefixed, tmp_path / "native", tmp_path / "bare.pth"):
        state = read_vision(path, config)[1]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert any("left out" in note for note in read_vision(whole)[2])
    other = small_config(VISION | {"use_qk_norm": True}).vision_config
    with pytest.raises(UserError, match=r"q/k norm \(no for yes\)"):
        read_vision(tmp_path / "bare.pth", other)
    with pytest.raises(
        UserError, match=r"it holds another vision transformer than the model's.*q/k norm \(no for yes\)"
    ):
        check_same_vision(config, other, "it")
    (prefixed / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="must be of an InternViT"):
        read_vision(prefixed)


def test_configurations_are_of_full_precision_whatever_the_files_hold(tmp_path, original):
    config = read_config(write_original(tmp_path, original))
    assert {part.dtype for part in (config, config.vision_config, config.text_config)} == {torch.float32}
    assert {p.dtype for p in build_empty(config).parameters()} == {torch.float32}
