import logging

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small_clip import ADAPTERS, END_OF_TEXT, adapted, captions, images, small_clip
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.adapters import insert_adapters
from harma_ray.models.architectures import image_size, pixel_statistics, tokenizer_of
from harma_ray.models.backbones import build_clip, check_pretrained
from harma_ray.models.clip import DualEncoder
from harma_ray.models.foreign import read_foreign

TINY = "scenes-tiny"


@pytest.fixture(scope="module")
def tiny():
    return build_clip(TINY, "random", seed=3)


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_tiny_architecture(tiny):
    assert image_size(tiny) == image_size(DualEncoder(tiny)) == image_size(TINY) == 64
    assert tiny.context_length == 40
    assert tiny.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    assert len(tiny.visual.transformer.resblocks) == 4
    assert len(tiny.transformer.resblocks) == 3
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


def test_random_weights_come_from_the_seed_alone(tiny):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    same, other = build_clip(TINY, "random", seed=3), build_clip(TINY, "random", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(tiny, same)
    assert not equal(tiny, other)


def test_building_leaves_the_root_logger_alone():
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    build_clip(TINY, "random")
    assert (logging.getLogger().handlers, logging.getLogger().filters) == (handlers, filters)


def test_tokenizer_has_the_architectures_context_length():
    tokens = tokenizer_of(TINY)(["two planes", "word " * 60])
    assert tokens.shape == (2, 40)
    assert tokens[0, 0] == 49406
    assert tokens.max(dim=-1).values.tolist() == [49407, 49407]
    assert tokens[0, 4:].eq(0).all()
    assert tokens[1].argmax() == 39
    assert tokenizer_of("ViT-B/32")(["a"]).shape == (1, 77)


def test_pixel_statistics_are_clips(tiny):
    expected = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert pixel_statistics(tiny) == pixel_statistics(TINY) == pixel_statistics(small_clip()) == expected


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_load_exactly(tiny, tmp_path, suffix, prefix):
    path = tmp_path / f"weights{suffix}"
    state_dict = {prefix + name: tensor for name, tensor in tiny.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict if suffix == ".pt" else {"epoch": 3, "state_dict": state_dict}, path)
    assert equal(build_clip(TINY, str(path)), tiny)


def test_half_precision_file_is_loaded_as_fp32(tiny, tmp_path):
    torch.save({name: tensor.half() for name, tensor in tiny.state_dict().items()}, tmp_path / "half.pt")
    loaded = build_clip(TINY, str(tmp_path / "half.pt"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.visual.proj, tiny.visual.proj.half().float(), rtol=0, atol=0)


def test_file_that_does_not_fit_lists_the_keys(tiny, tmp_path):
    state_dict = dict(tiny.state_dict())
    del state_dict["ln_final.bias"]
    state_dict |= {f"stray.{index}": torch.zeros(1) for index in range(7)}
    state_dict["visual.proj"] = torch.zeros(2, 3)
    torch.save(state_dict, tmp_path / "odd.pt")
    with pytest.raises(UserError) as error:
        build_clip(TINY, str(tmp_path / "odd.pt"))
    message = str(error.value)
    assert "odd.pt" in message
    assert "1 missing (ln_final.bias)" in message
    assert "7 unexpected (stray.0, stray.1, stray.2, stray.3, stray.4, ...)" in message
    assert "1 of another shape (visual.proj: (2, 3) for (128, 128))" in message
    assert "\n" not in message


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        build_clip(TINY, str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="must exist"):
        read_foreign(tmp_path / "none.pt")


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(UserError, match="ViT-B-32"):
        build_clip("ViT-B-33", "random")
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        build_clip("ViT-B-32", "laion2b_s34b")
    with pytest.raises(UserError, match="scenes-tiny"):
        tokenizer_of("scene-tiny")


@pytest.mark.parametrize("tag", ["openai", "laion400m_e32", "metaclip_400m"])
def test_quick_gelu_weights_need_a_quick_gelu_architecture(tag):
    with pytest.raises(UserError, match="quick GELU, but `ViT-B-32` computes plain GELU; use `ViT-B-32-quickgelu`"):
        build_clip("ViT-B-32", tag)


def test_plain_gelu_weights_need_a_plain_gelu_architecture():
    with pytest.raises(UserError, match="this tag belongs to ViT-B-32"):
        build_clip("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


MARKS = {"visual.conv1.weight": torch.zeros(1), "token_embedding.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("architecture", "warning"),
    [
        ("RN50", "with plain GELU, as `RN50` computes; if it was trained with quick GELU, use `RN50-quickgelu`"),
        (
            "ViT-B-32-quickgelu",
            "with quick GELU, as `ViT-B-32-quickgelu` computes; if it was trained with plain GELU, use `ViT-B-32`",
        ),
    ],
)
def test_a_file_that_does_not_say_its_activation_warns_once_either_way(tmp_path, caplog, architecture, warning):
    torch.save(MARKS, tmp_path / "unknown.pt")
    check_pretrained(architecture, str(tmp_path / "unknown.pt"))
    with pytest.raises(UserError, match="does not fit"):
        build_clip(architecture, str(tmp_path / "unknown.pt"))
    assert [record.getMessage().count(warning) for record in caplog.records] == [1]


def test_a_stated_activation_is_held_to(tmp_path, caplog):
    torch.save(MARKS, tmp_path / "unknown.pt")
    check_pretrained("ViT-B-32", str(tmp_path / "unknown.pt"), "gelu")
    check_pretrained("ViT-B-32-quickgelu", str(tmp_path / "unknown.pt"), "quick_gelu")
    assert not caplog.text
    with pytest.raises(UserError, match=r"model\.activation=quick_gelu.*computes plain GELU; use `ViT-B-32-quickgelu`"):
        check_pretrained("ViT-B-32", str(tmp_path / "unknown.pt"), "quick_gelu")
    with pytest.raises(UserError, match="computes quick GELU; use `ViT-B-32`"):
        check_pretrained("ViT-B-32-quickgelu", str(tmp_path / "unknown.pt"), "gelu")
    torch.save({"CLIP": MARKS}, tmp_path / "tuned_clip.pt")
    with pytest.raises(UserError, match=r"it is a CLIP4Cir file.*leave it out"):
        check_pretrained("ViT-B-32-quickgelu", str(tmp_path / "tuned_clip.pt"), "gelu")


def test_weights_of_more_than_the_architecture_are_refused_before_they_are_loaded(tmp_path):
    causal = torch.full((77, 77), -torch.inf).triu(1)
    torch.save({**MARKS, "attn_mask": causal, "logit_bias": torch.tensor(1.0)}, tmp_path / "fits.pt")
    check_pretrained("ViT-B-32", str(tmp_path / "fits.pt"), "gelu")
    torch.save({**MARKS, "transformer.resblocks.0.mmadapter.gate1": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"1 unexpected tensor, such as \S+mmadapter.*checkpoint show says"):
        check_pretrained("ViT-B-32", str(tmp_path / "more.pt"), "gelu")


EXTRAS = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("RS5M_ViT-B-32_RET-2.pt", MARKS),
        ("tuned_clip_best.pt", {"epoch": 3, "CLIP": MARKS}),
        ("ViT-B-32.pt", {**MARKS, **EXTRAS}),
    ],
)
def test_a_file_that_is_known_to_need_quick_gelu_is_refused_with_plain_gelu(tmp_path, caplog, name, content):
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match="computes plain GELU; use `ViT-B-32-quickgelu`"):
        check_pretrained("ViT-B-32", str(tmp_path / name))
    check_pretrained("ViT-B-32-quickgelu", str(tmp_path / name))
    assert not caplog.text


def test_forward_gives_unit_vectors_and_temperatures():
    model = DualEncoder(small_clip(), temperature=0.1, affiliation_temperature=0.2)
    outputs = model(images(3), captions((4, 5, 6)))
    assert outputs["image"].shape == outputs["text"].shape == (3, 16)
    for side in ("image", "text"):
        torch.testing.assert_close(outputs[side].norm(dim=-1), torch.ones(3))
    assert outputs["temperature"].item() == pytest.approx(0.1)
    assert outputs["affiliation_temperature"].item() == pytest.approx(0.2)
    assert "affiliation_temperature" not in DualEncoder(small_clip())(images(1), captions((4,)))


def test_text_encoding_equals_open_clips_at_full_length():
    clip_model = small_clip()
    text = captions((4, 12, 2, 7))
    with torch.no_grad():
        ours = DualEncoder(clip_model).encode_text(text, normalize=False)
        torch.testing.assert_close(ours, clip_model.encode_text(text), rtol=0, atol=1e-6)


def test_trimming_changes_nothing_without_adapters():
    clip_model = small_clip()
    text = captions((4, 9, 2, 7))
    with torch.no_grad():
        trimmed = DualEncoder(clip_model, text_tokens="trim").encode_text(text)
        torch.testing.assert_close(trimmed, DualEncoder(clip_model).encode_text(text))


def test_trimming_runs_the_text_tower_at_the_longest_captions_length():
    clip_model, lengths = small_clip(), []
    clip_model.transformer.resblocks[0].register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    model = DualEncoder(clip_model, text_tokens="trim")
    model.packs_text = False
    model.encode_text(captions((4, 9, 2)))
    assert captions((4, 9, 2))[1, 8] == END_OF_TEXT
    model.encode_text(captions((3, 3)).int())
    assert lengths == [9, 3]


def test_raw_pixels_are_normalised_on_the_way_in():
    model = DualEncoder(small_clip())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in pixel_statistics(model))
    torch.testing.assert_close(model.encode_image(pixels), model.encode_image((pixels / 255 - mean) / std))
    with pytest.raises(ValueError, match="int64"):
        model.encode_image(pixels.long())


def test_state_dict_holds_parameters_only():
    model = DualEncoder(small_clip())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_resnet_towers_work_without_adapters():
    model = DualEncoder(small_clip(layers=([1, 1, 1, 1], 2), image_size=32)).eval()
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert image_size(model) == 32


def test_bf16_autocast_returns_fp32_unit_vectors():
    model = DualEncoder(small_clip(), text_tokens="trim")
    insert_adapters(model.clip, **ADAPTERS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        outputs = model(images(2), captions((4, 6)))
    assert outputs["image"].dtype == outputs["text"].dtype == torch.float32
    with torch.no_grad():
        exact = model(images(2), captions((4, 6)))
    assert F.cosine_similarity(outputs["text"], exact["text"]).min() > 0.99


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
def test_too_long_captions_are_refused(text_tokens):
    with pytest.raises(UserError, match="at most 12 tokens, got 13"):
        DualEncoder(small_clip(), text_tokens=text_tokens).encode_text(captions((4,), context_length=13))


def test_unsuitable_models_and_modes_are_refused():
    with pytest.raises(UserError, match="CustomTextCLIP"):
        DualEncoder(open_clip.CustomTextCLIP(16, {"width": 64, "layers": 1}, {"width": 16, "heads": 2, "layers": 1}))
    model = small_clip()
    model.attn_mask = None
    with pytest.raises(UserError, match="causal"):
        DualEncoder(model, text_tokens="trim")


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled: graphs of torch's operators, run as they stand."""
    compiled, compile_module = [], torch.nn.Module.compile

    def keep(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=keep))
    yield compiled
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("text_tokens", ["full", "trim"])
def test_compiled_blocks_give_the_vectors_and_gradients_of_the_model(graphs, text_tokens):
    found = []
    for compiles in (False, True):
        model, names = adapted(text_tokens=text_tokens, layers=(4, 4))
        if compiles:
            model.compile_blocks()
        outputs = [model(images(4), captions(lengths)) for lengths in ((5, 8, 3, 2), (7, 12, 3, 8), (3, 6, 3, 4))]
        sum((out["image"] @ out["text"].T).diag().sum() for out in outputs).backward()
        found.append(
            [*outputs, *(p.grad for name, p in model.named_parameters() if name in names and p.grad is not None)]
        )
    torch.testing.assert_close(found[1], found[0])
    # Of each tower the first block, whose input needs no gradient, and the others; of captions again for any length.
    assert len(graphs) == (4 if text_tokens == "full" else 6)


def test_compiled_blocks_run_as_they_are_where_compilers_are_off(graphs):
    model, _ = adapted()
    expected = model(images(4), captions((5, 8, 3, 2)))
    model.compile_blocks()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(images(4), captions((5, 8, 3, 2))), expected)
    assert not graphs
