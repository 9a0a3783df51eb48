import open_clip
import pytest
import torch
from small_clip import adapted, captions, images, small_clip

from harma_ray.errors import UserError
from harma_ray.models.adapters import set_tuning
from harma_ray.models.clip import DualEncoder
from harma_ray.models.foreign import read_foreign
from harma_ray.recipes.harma.released import HarmaFile, from_released, to_released

ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


def expected_names(base_names, layers):
    """The released layout, written out independently of the mapping."""
    names = {f"model.{name}" for name in base_names} | {"temp"}
    for tower, depth in (("visual.transformer", layers[0]), ("transformer", layers[1])):
        for index in range(depth):
            block = f"model.{tower}.resblocks.{index}"
            adapter = f"{block}.mmadapter"
            names |= {f"{block}.gate1", f"{adapter}.gate1"}
            names |= {f"{adapter}.img_proj_{way}.{part}" for way in ("down", "up") for part in ("weight", "bias")}
            names |= {f"{adapter}.multihead_attention.{part}" for part in ATTENTION}
            if tower == "transformer":
                shared = f"{adapter}.BiShareAdapterxx"
                names |= {f"{shared}.{layer}.{part}" for layer in ("l1", "l2") for part in ("weight", "bias")}
                names |= {f"{shared}.multihead_attention1.{part}" for part in ATTENTION} | {f"{shared}.gate1"}
    return names


def random_released(seed=5):
    """A released-style state dict whose tensors are all different."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in to_released(adapted()[0]).items()}


def test_vit_b_32_has_650_released_tensors_and_the_temperature():
    with torch.device("meta"):
        clip_model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        base_names = set(clip_model.state_dict())
        model = DualEncoder(clip_model)
        set_tuning(model, "adapters")
    released = to_released(model)
    assert len(base_names) == 302
    assert len(released) == 650 + 1
    assert set(released) == expected_names(base_names, (12, 12))
    assert released["model.transformer.resblocks.11.mmadapter.BiShareAdapterxx.l1.weight"].shape == (64, 128)
    assert released["model.visual.transformer.resblocks.0.mmadapter.img_proj_down.weight"].shape == (128, 768)
    assert released["temp"].shape == ()


def test_every_tensor_lands_in_its_place():
    model, _ = adapted()
    released = random_released()
    from_released(released, model)
    image, text = model.clip.visual.transformer.resblocks[1], model.clip.transformer.resblocks[0]
    bottleneck, shared = text.mlp.adapter.bottleneck, text.mlp.adapter.bottleneck.shared
    places = {
        "temp": model.temperature,
        "model.logit_scale": model.clip.logit_scale,
        "model.token_embedding.weight": model.clip.token_embedding.weight,
        "model.visual.transformer.resblocks.1.mlp.c_fc.weight": image.mlp.c_fc.weight,
        "model.visual.transformer.resblocks.1.gate1": image.mlp.adapter.gate,
        "model.visual.transformer.resblocks.1.mmadapter.gate1": image.mlp.adapter.bottleneck.gate,
        "model.visual.transformer.resblocks.1.mmadapter.img_proj_up.bias": image.mlp.adapter.bottleneck.up.bias,
        "model.transformer.resblocks.0.gate1": text.mlp.adapter.gate,
        "model.transformer.resblocks.0.mmadapter.gate1": bottleneck.gate,
        "model.transformer.resblocks.0.mmadapter.img_proj_down.weight": bottleneck.down.weight,
        "model.transformer.resblocks.0.mmadapter.img_proj_up.weight": bottleneck.up.weight,
        "model.transformer.resblocks.0.mmadapter.BiShareAdapterxx.gate1": shared.gate,
        "model.transformer.resblocks.0.mmadapter.BiShareAdapterxx.l1.bias": shared.l1.bias,
        "model.transformer.resblocks.0.mmadapter.BiShareAdapterxx.l2.weight": shared.l2.weight,
    }
    for part in ATTENTION:
        base = "model.transformer.resblocks.0.mmadapter"
        places[f"{base}.multihead_attention.{part}"] = bottleneck.attention.get_parameter(part)
        places[f"{base}.BiShareAdapterxx.multihead_attention1.{part}"] = shared.attention.get_parameter(part)
    for name, parameter in places.items():
        assert torch.equal(released[name], parameter), name


@pytest.mark.parametrize("affiliation_temperature", [None, 0.05])
def test_round_trip(affiliation_temperature):
    source, _ = adapted(affiliation_temperature=affiliation_temperature)
    target, _ = adapted(affiliation_temperature=affiliation_temperature)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    from_released(to_released(source), target)
    exported = to_released(target)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in to_released(source).items())
    with torch.no_grad():
        ours, theirs = (model(images(2), captions((4, 9))) for model in (source, target))
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["text"], theirs["text"])


@pytest.mark.parametrize("prefix", ["model.", "clip.", "module.model.", "module._orig_mod.clip."])
def test_a_released_file_is_understood_under_other_prefixes(tmp_path, prefix):
    model, _ = adapted()
    released = random_released()
    outer = prefix.removesuffix("model.").removesuffix("clip.")
    wrapped = {prefix + n.removeprefix("model.") if n != "temp" else f"{outer}temp": t for n, t in released.items()}
    torch.save({"model": wrapped, "config": {"batch_size": 4}}, tmp_path / "harma.pth")
    found = HarmaFile().claim(read_foreign(tmp_path / "harma.pth"))
    assert found.prefix == outer
    assert not any("left out: temp" in note or "model." in note for note in found.notes)
    from_released(found.tensors, model)
    assert torch.equal(to_released(model)["model.visual.proj"], released["model.visual.proj"])


def test_the_temperature_of_a_loss_that_is_off_is_left_out():
    model, _ = adapted()
    released = random_released() | {"temp2": torch.tensor(0.07)}
    assert "temp2" in from_released(released, model)[0]
    assert "temp2" not in to_released(model)


def test_import_is_strict_and_changes_nothing_when_refused():
    model, _ = adapted()
    before = model.clip.visual.proj.clone()
    released = random_released()
    del released["temp"]
    del released["model.transformer.resblocks.0.gate1"]
    released["model.stray"] = torch.zeros(1)
    released["model.logit_scale"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        from_released(released, model)
    message = str(error.value)
    assert "2 missing (" in message
    assert "temp" in message
    assert "model.transformer.resblocks.0.gate1" in message
    assert "1 unexpected (model.stray)" in message
    assert "model.logit_scale: (3,) for ()" in message
    assert torch.equal(model.clip.visual.proj, before)


def test_models_the_layout_cannot_hold_are_refused():
    with pytest.raises(UserError, match="without; insert them first"):
        to_released(DualEncoder(small_clip()))
    with pytest.raises(UserError, match="share_across_modalities"):
        to_released(adapted(share_across_modalities=True)[0])
