import open_clip
import pytest
import torch
from reference_harma import reference_encodings
from small_clip import ADAPTERS, adapted, captions, images, randomised, small_clip
from torch import nn
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.adapters import GatedAdapter, insert_adapters, set_tuning
from harma_ray.models.clip import DualEncoder
from harma_ray.models.kernels import SelfAttention

LENGTHS = (5, 12, 3, 8)


def vit_b_32_on_meta():
    with torch.device("meta"):
        model = DualEncoder(open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")))
        return model, set_tuning(model, "adapters")


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_adapted_model_equals_base_at_init(quick_gelu, share):
    model = small_clip(quick_gelu=quick_gelu).requires_grad_(False)
    image, text = model.encode_image(images(3)), model.encode_text(captions((4, 12, 7)))
    insert_adapters(model, **ADAPTERS, share_across_modalities=share)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images(3)), image)
        assert torch.equal(model.encode_text(captions((4, 12, 7))), text)


def test_gelu_variants_differ():
    plain, quick = small_clip(), small_clip(quick_gelu=True)
    assert (plain.encode_image(images(1)) - quick.encode_image(images(1))).abs().max() > 1e-5


def test_vit_b_32_trains_exactly_the_released_parameters():
    model, names = vit_b_32_on_meta()
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert tuple(trainable) == names
    assert sum(trainable.values()) - 1 == 5_934_396
    assert trainable["temperature"] == 1
    assert sum(p.numel() for p in model.parameters()) == 157_211_709 + 1


def test_gates_of_vit_b_32():
    model, names = vit_b_32_on_meta()
    gates = [name for name in names if name.endswith(".gate")]
    assert len(gates) == 12 * 2 + 12 * 3
    assert all(model.get_parameter(name).shape == () for name in gates)


def test_gates_start_at_the_given_value():
    model = small_clip()
    names = insert_adapters(model, **ADAPTERS, gate_init=0.25)
    gates = [model.get_parameter(name).item() for name in names if name.endswith(".gate")]
    assert gates == [0.25] * (2 * 2 + 2 * 3)


def test_base_keys_stay_and_only_new_parameters_train():
    model = small_clip()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = insert_adapters(model, **ADAPTERS)
    after = model.state_dict()
    assert set(after) == set(before) | set(names)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
    assert not model.logit_scale.requires_grad


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("text_tokens", ["full", "trim"])
def test_encodings_follow_the_formulas(text_tokens, share):
    model, _ = adapted(text_tokens=text_tokens, share_across_modalities=share)
    image, text = images(4), captions(LENGTHS)
    padding = torch.arange(12)[None] >= torch.tensor(LENGTHS)[:, None] if text_tokens == "trim" else None
    expected = reference_encodings(model.clip, image, text, padding)
    torch.testing.assert_close(model.encode_image(image), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(text), expected[1], atol=1e-5, rtol=1e-5)


def test_full_and_trimmed_text_differ_once_adapters_are_trained():
    full, trim = adapted(text_tokens="full")[0], adapted(text_tokens="trim")[0]
    assert (full.encode_text(captions(LENGTHS)) - trim.encode_text(captions(LENGTHS))).abs().max() > 1e-3


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
def test_batch_items_are_independent(text_tokens):
    model, _ = adapted(text_tokens=text_tokens)
    image, text = images(4), captions(LENGTHS)
    with torch.no_grad():
        together = model.encode_image(image), model.encode_text(text)
        for index in range(4):
            torch.testing.assert_close(model.encode_image(image[index : index + 1]), together[0][index : index + 1])
            torch.testing.assert_close(model.encode_text(text[index : index + 1]), together[1][index : index + 1])
        order = [2, 0, 2]
        torch.testing.assert_close(model.encode_text(text[order]), together[1][order])


def test_adapters_attend_across_tokens():
    model, _ = adapted()
    stage = model.clip.transformer.resblocks[0].mlp.adapter
    m = torch.randn(1, 5, 24)
    changed = m.clone()
    changed[0, 4] += 1
    assert (stage(m) - stage(changed))[0, 0].abs().max() > 1e-4


def test_no_storage_is_shared_between_two_models():
    first, _ = adapted()
    second, _ = adapted()
    storages = [{p.untyped_storage().data_ptr() for p in model.parameters()} for model in (first, second)]
    assert not storages[0] & storages[1]
    assert len({id(m) for model in (first, second) for m in model.modules() if isinstance(m, GatedAdapter)}) == 8


def test_insertion_is_deterministic_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = small_clip(), small_clip(), small_clip()
    names = insert_adapters(first, **ADAPTERS, seed=1)
    insert_adapters(same, **ADAPTERS, seed=1)
    insert_adapters(other, **ADAPTERS, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.get_parameter(name), same.get_parameter(name)) for name in names)
    down = next(name for name in names if name.endswith("down.weight"))
    assert not torch.equal(first.get_parameter(down), other.get_parameter(down))


def test_attention_starts_as_torchs():
    model = small_clip()
    insert_adapters(model, width=64, num_heads=8, shared_width=64)
    attention = model.transformer.resblocks[0].mlp.adapter.bottleneck.attention
    reference = nn.MultiheadAttention(64, 8, batch_first=True)
    assert {n: p.shape for n, p in attention.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }
    for name, parameter in attention.named_parameters():
        assert parameter.std().item() == pytest.approx(dict(reference.named_parameters())[name].std().item(), rel=0.1)


def test_sharing_gives_both_towers_one_module_a_block():
    model = small_clip(layers=(3, 2))
    names = insert_adapters(model, **ADAPTERS, share_across_modalities=True)
    image = [block.mlp.adapter.bottleneck.shared for block in model.visual.transformer.resblocks]
    text = [block.mlp.adapter.bottleneck.shared for block in model.transformer.resblocks]
    assert image[0] is text[0]
    assert image[1] is text[1]
    assert image[2] is None
    assert text[0] is not text[1]
    assert len(names) == len(set(names)) == 3 * 10 + 2 * 10 + 2 * 9
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)


def test_sharing_leaves_deeper_text_blocks_their_own_adapter():
    model = small_clip(layers=(1, 2))
    insert_adapters(model, **ADAPTERS, share_across_modalities=True)
    assert model.transformer.resblocks[1].mlp.adapter.bottleneck.shared is not None


@pytest.mark.parametrize("share", [False, True])
def test_gradients_reach_every_trainable_parameter(share):
    model, names = adapted(text_tokens="trim", share_across_modalities=share)
    outputs = model(images(4), captions(LENGTHS))
    F.cross_entropy(outputs["image"] @ outputs["text"].T / outputs["temperature"], torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_first_step_reaches_the_zero_layers():
    model = DualEncoder(small_clip())
    set_tuning(model, "adapters", **ADAPTERS)
    model(images(2), captions((4, 5)))["image"][:, 0].sum().backward()
    assert model.clip.visual.transformer.resblocks[0].mlp.adapter.bottleneck.up.weight.grad.abs().max() > 0


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
def test_activation_checkpointing_gives_the_same_gradients(text_tokens):
    gradients = []
    for enable in (False, True):
        model, names = adapted(text_tokens=text_tokens)
        model.set_grad_checkpointing(enable)
        # Two encodings before one backward pass: each must be repeated with its own mask.
        first, second = model(images(4), captions(LENGTHS)), model(images(2), captions((9, 4), seed=7))
        logits = [o["image"] @ o["text"].T / o["temperature"] for o in (first, second)]
        sum(F.cross_entropy(logit, torch.arange(len(logit))) for logit in logits).backward()
        gradients.append({name: model.get_parameter(name).grad for name in names})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_mask_does_not_outlive_the_encoding():
    model, _ = adapted(text_tokens="trim")
    model.encode_text(captions(LENGTHS))
    stages = [module for module in model.modules() if isinstance(module, GatedAdapter)]
    assert all(stage.padding is None for stage in stages)
    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    assert attentions
    assert all(attention.packing is None for attention in attentions)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_tuning_modes(mode):
    model = DualEncoder(small_clip(), affiliation_temperature=0.07)
    everything = {name for name, _ in model.named_parameters()}
    names = set_tuning(model, mode)
    expected = everything - {"clip.logit_scale"} if mode == "full" else set()
    assert set(names) == expected == {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapter_mode_trains_both_temperatures():
    _, names = adapted(affiliation_temperature=0.05)
    assert {"temperature", "affiliation_temperature"} < set(names)


def test_second_insertion_is_refused():
    model = small_clip()
    insert_adapters(model, **ADAPTERS)
    with pytest.raises(UserError, match="has an adapter already"):
        insert_adapters(model, **ADAPTERS)


def test_other_towers_are_refused_by_name():
    with pytest.raises(UserError, match="ModifiedResNet"):
        insert_adapters(small_clip(layers=([1, 1, 1, 1], 2), image_size=32), **ADAPTERS)
    with pytest.raises(UserError, match="Linear"):
        insert_adapters(nn.Linear(2, 2), **ADAPTERS)
    model = small_clip()
    model.transformer.batch_first = False
    with pytest.raises(UserError, match="text tower must run batch-first"):
        insert_adapters(model, **ADAPTERS)


def test_low_precision_towers_get_adapters_of_their_dtype():
    model = small_clip().to(torch.bfloat16)
    names = insert_adapters(model, **ADAPTERS)
    assert {model.get_parameter(name).dtype for name in names} == {torch.bfloat16}
    assert randomised(model, names).encode_text(captions((4,))).dtype == torch.bfloat16
