"""Where an InternVL comes from: sizes, seeds, folders and their tokenizers."""

import json
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from original_internvl import PUBLISHED, published_shapes
from small_internvl import small_config, talks, tiles

from harma_ray.errors import UserError
from harma_ray.models.internvl.backbone import InternVLBackbone
from harma_ray.models.internvl.configs import SIZES
from harma_ray.models.internvl.keys import to_original
from harma_ray.models.internvl.layouts import UNKNOWN_TOKEN, read_config
from harma_ray.models.internvl.marks import IMAGE_TOKEN, SPECIAL_TOKENS
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.vision import set_drop_path

WORDS = ["a", "small", "house", "and", "three", "large", "trees", "beside", "the", "river"]


def make_tokenizer(special=(), turns=("<|im_start|>", "<|im_end|>")):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", *WORDS])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([*turns, *special], special_tokens=True)
    return tokenizer


def scenes(seed=0):
    return InternVLBackbone("random", "scenes-tiny", seed, make_tokenizer)


def test_a_random_model_is_drawn_by_its_seed_alone():
    state = torch.get_rng_state()
    first, same, other = scenes().build(), scenes().build(), scenes(1).build()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert scenes().fingerprint(VisualInstructionModel(first)) == scenes().fingerprint(same)
    assert scenes().fingerprint(first) != scenes(1).fingerprint(other)
    assert scenes().name != scenes(1).name


def test_class_token_and_positions_of_a_random_model_are_drawn():
    embeddings = scenes().build().model.vision_tower.embeddings
    for tensor in (embeddings.cls_token, embeddings.position_embeddings):
        assert 0.01 < tensor.std().item() < 0.03


def test_the_scenes_model_is_small_and_answers():
    backbone = scenes()
    model = VisualInstructionModel(backbone.build())
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert backbone.tokens_per_tile == model.tokens_per_tile == model.encode_tiles(tiles(1, side=64)).shape[1] == 4
    assert backbone.image_size == 64
    tokenizer = backbone.tokenizer()
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(tokenizer) - 9, len(tokenizer)))
    assert tokenizer.encode(f"house {IMAGE_TOKEN}")[-1] == model.core.config.image_token_id
    assert model.core.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = f"a house <img>{IMAGE_TOKEN * 4}</img> and"
    ids = torch.tensor([tokenizer.encode(text)])
    assert model.answer(tiles(1, side=64), ids, torch.ones_like(ids), 3).shape[0] == 1


def test_an_outline_has_the_names_and_shapes_of_what_is_built():
    built, outline = scenes().build().state_dict(), scenes().outline().state_dict()
    assert {name: t.shape for name, t in built.items()} == {name: t.shape for name, t in outline.items()}
    assert all(tensor.is_meta for tensor in outline.values())


def test_the_published_size_has_the_published_number_of_parameters():
    outline = InternVLBackbone("random", "internvl2.5-1b", 0, make_tokenizer).outline()
    parts = {
        "vision": outline.model.vision_tower,
        "projector": outline.model.multi_modal_projector,
        "language": outline.model.language_model,
        "head": outline.lm_head,
    }
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    # Qwen2.5-0.5B's own vocabulary has 151,936 rows, InternVL2.5-1B's 151,674: .2 million less, twice
    assert millions == pytest.approx({"vision": 304.0, "projector": 4.5, "language": 493.8, "head": 135.9}, abs=0.3)
    assert SIZES["internvl2.5-1b"].tokens_per_tile == 256
    assert outline.config.vision_config.attention_bias
    assert not outline.config.vision_config.use_qk_norm


def test_the_published_size_has_the_published_configuration_and_tensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    read = read_config(tmp_path)
    outline = InternVLBackbone("random", "internvl2.5-1b", 0, make_tokenizer).outline()
    unsaid = {"architectures", "dtype", "initializer_factor", "max_window_layers", "transformers_version"}

    def told(config):
        return {name: value for name, value in config.to_dict().items() if name not in unsaid}

    for part in ("vision_config", "text_config"):
        assert told(getattr(read, part)) == told(getattr(outline.config, part))
    for name in ("downsample_ratio", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"):
        assert getattr(read, name) == getattr(outline.config, name)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_original(outline.state_dict()).items()}
    assert shapes == published_shapes(PUBLISHED)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(938.2e6, abs=0.3e6)


def test_what_cannot_be_built_is_refused_without_loading(tmp_path, monkeypatch):
    for backbone, said in [
        (InternVLBackbone("random", "huge", 0, make_tokenizer), "must be one of scenes-tiny"),
        (InternVLBackbone("random", "scenes-tiny", 0), "needs a tokenizer"),
        (InternVLBackbone(str(tmp_path / "no"), ""), "must be a folder with config.json"),
    ]:
        with pytest.raises(UserError, match=said):
            backbone.check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "harma-ray\[vitp\]"'):
        scenes().check()


@pytest.mark.timeout(120)
def test_without_transformers_everything_imports_and_says_what_is_missing():
    code = """
import sys
sys.modules["transformers"] = sys.modules["tokenizers"] = None
import harma_ray.models.internvl.backbone, harma_ray.models.internvl.groups
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_goes_to_another_process_and_computes_the_same():
    model = VisualInstructionModel(scenes().build()).eval()
    set_drop_path(model.vision_tower, 0.1)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(model.encode_tiles(tiles(1, side=64)), other.encode_tiles(tiles(1, side=64)))


@pytest.fixture
def folder(tmp_path):
    """A folder whose tokenizer lacks the special tokens and whose model has a row to spare for two."""
    tokenizer = make_tokenizer()
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(0)
    config = small_config(text={"vocab_size": len(tokenizer) + 2}, image_token_id=UNKNOWN_TOKEN)
    model = InternVLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def test_a_folder_without_the_special_tokens_gets_rows_at_the_mean(folder):
    path, model = folder
    backbone, known = InternVLBackbone(str(path), ""), len(make_tokenizer())
    backbone.check()
    built, tokenizer = backbone.build(), backbone.tokenizer()
    assert built.config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == known + 2
    for own, before in [
        (built.lm_head.weight, model.lm_head.weight),
        (built.get_input_embeddings().weight, model.get_input_embeddings().weight),
    ]:
        assert own.shape == (known + 9, 16)
        assert torch.equal(own[:known], before[:known])
        torch.testing.assert_close(own[known:], before[:known].mean(0).expand(9, 16))
    backbone.outline()
    assert backbone.build().lm_head.weight.shape == (known + 9, 16)  # once more, the same
    outline = backbone.outline().state_dict()
    assert {name: t.shape for name, t in built.state_dict().items()} == {name: t.shape for name, t in outline.items()}
    batch = talks([0])
    batch["input_ids"] = batch["input_ids"] % known
    VisualInstructionModel(built)(tiles(1), **batch | {"labels": batch["input_ids"]})["loss"].backward()


@pytest.mark.parametrize(
    ("has", "lacks"),
    [
        ({"turns": ()}, "lacks <|im_start|>, <|im_end|>; take"),
        ({"turns": ("<|im_start|>",), "special": SPECIAL_TOKENS}, "lacks <|im_end|>; take"),
    ],
)
def test_a_tokenizer_that_cannot_write_talks_is_refused(folder, has, lacks):
    path, _ = folder
    make_tokenizer(**has).save_pretrained(path)
    with pytest.raises(UserError, match=re.escape(lacks)):
        InternVLBackbone(str(path), "").check()


def test_a_model_that_knows_image_tokens_needs_a_tokenizer_that_does(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"image_token_id": 12}))
    with pytest.raises(UserError, match="lacks <img>, <IMG_CONTEXT>, </img>; take"):
        InternVLBackbone(str(path), "").check()


def test_a_folder_with_them_is_loaded_as_it_is(tmp_path):
    from transformers import InternVLForConditionalGeneration

    tokenizer = make_tokenizer(SPECIAL_TOKENS)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(small_config(text={"vocab_size": 40}, image_token_id=image))
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = InternVLBackbone(str(tmp_path), "")
    built = backbone.build()
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float())
    assert (backbone.image_size, backbone.tokens_per_tile) == (32, 4)
    assert backbone.name != scenes().name
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 1}))
    with pytest.raises(UserError, match=f"got 1 in its configuration and {image} in its tokenizer"):
        InternVLBackbone(str(tmp_path), "").check()
