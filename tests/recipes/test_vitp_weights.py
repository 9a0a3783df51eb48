"""Weights of ViTP's models: the vision transformer taken out, folders and files of others that become runs."""

import copy
import json
import shutil

import pytest
import torch
from command_line import done, refused
from original_internvl import (
    ORIGINAL,
    ORIGINAL_VISION,
    PUBLISHED,
    inner_of,
    language_config,
    original_loss,
    original_states,
    published_shapes,
    write_original,
)
from PIL import Image
from random_runs import make_random_run
from safetensors.torch import load_file, save_file
from small_internvl import IMAGE, small_config, small_core, talks, tiles

from harma_ray.api import load_run
from harma_ray.data.convert.commands import convert_scenes_talk
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.import_export import load_model
from harma_ray.models.internvl.files import read_vision
from harma_ray.models.internvl.keys import to_original, vision_to_original
from harma_ray.models.internvl.marks import IMAGE_TOKEN
from harma_ray.models.internvl.tokens import with_special_tokens
from harma_ray.models.internvl.vision import hidden_states, normalise
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.vitp.vocabulary import vocabulary
from harma_ray.runs import open_run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL_SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
SCENES_VISION = ORIGINAL_VISION | SMALL_SIZES | {"image_size": 64, "patch_size": 16}
"""The original's configuration of the drawn scenes' vision transformer, but for its own numbers of 0.1."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_random_run(tmp_path_factory.mktemp("runs"), "vitp", recipe_config("scenes-vitp"))


@pytest.fixture(scope="module")
def tower(run):
    return run.load_model().vision_tower


@pytest.fixture(scope="module")
def alone(run, tower, tmp_path_factory):
    """What ViTP's extract_vit writes: the original's names, in bf16."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in vision_to_original(tower.state_dict()).items()}
    return write_original(tmp_path_factory.mktemp("alone"), state, SCENES_VISION)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole small model with the drawn scenes' tokenizer, and its folder in the original's layout."""
    tokenizer = with_special_tokens(vocabulary())
    text = language_config().to_dict() | {"vocab_size": len(tokenizer)}
    core = small_core(config=small_config(text=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
    settings = ORIGINAL | {"llm_config": ORIGINAL["llm_config"] | {"vocab_size": len(tokenizer)}}
    folder = write_original(tmp_path_factory.mktemp("whole"), to_original(core.state_dict()), settings)
    tokenizer.save_pretrained(folder)
    return core, folder


def states_of(vision_tower, layers, size=64):
    pixels = normalise(tiles(2, side=size), vision_tower.embeddings.cls_token)
    with torch.no_grad():
        return pixels, [hidden_states(vision_tower, pixels, layer) for layer in range(layers + 1)]


def extract(capsys, run, out, *more):
    return done(capsys, "checkpoint", "extract-vit", "--run", run.path, "--out", out, *more)


def imported(capsys, path, out, *more, recipe="scenes-vitp"):
    told = done(capsys, "checkpoint", "import", path, "--recipe", recipe, "--out", out, *more)
    return open_run(out), told


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_the_vision_transformer_that_is_taken_out_is_the_runs(run, tower, tmp_path, capsys, layout, dtype):
    told = extract(capsys, run, tmp_path / "vit", "--layout", layout, "--dtype", dtype)
    assert "step_00000000" in told
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    state = read_vision(tmp_path / "vit")[1]
    own = tower.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], tensor.to(numbers)) for name, tensor in own.items())
    stored = load_file(tmp_path / "vit" / "model.safetensors")
    if layout == "original":
        pixels, inside = states_of(copy.deepcopy(tower).to(numbers).float(), 4)
        outside = original_states({name: tensor.float() for name, tensor in stored.items()}, pixels, heads=4)
        for one, other in zip(outside, inside, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    report = json.loads((tmp_path / "vit" / "extraction.json").read_text())
    core = run.load_model().core.state_dict()
    assert {*report["kept"]} == {f"model.vision_tower.{name}" for name in own}
    assert {*report["kept"], *report["dropped"]} == set(core)
    assert not {*report["kept"]} & {*report["dropped"]}
    expected = {"run": str(run.path), "checkpoint": "step_00000000", "layout": layout, "dtype": dtype}
    assert {name: report[name] for name in expected} == expected
    shown = done(capsys, "checkpoint", "show", tmp_path / "vit")
    kind = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert f"InternViT {tmp_path / 'vit'}: a vision transformer of 4 layers of width 128, images of 64 px" in shown
    assert f"numbers ({kind})" in shown
    assert f"fingerprint {report['fingerprint'][:12]}" in shown
    assert report["fingerprint"][:12] in told


def test_what_cannot_be_taken_out_is_refused_in_a_line_and_leaves_nothing(run, random_run, tmp_path, capsys):
    line = ("checkpoint", "extract-vit", "--run")
    assert "no vision transformer of their own" in refused(capsys, *line, random_run.path, "--out", tmp_path / "a")
    assert "has the metric `top_1`" in refused(capsys, *line, run.path, "--out", tmp_path / "a", "--metric", "top_1")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    assert "exists; choose another --out" in refused(capsys, *line, run.path, "--out", tmp_path / "there")
    (tmp_path / "full").write_text("a file")
    told = refused(capsys, *line, run.path, "--out", tmp_path / "full" / "vit")
    assert f"{tmp_path / 'full'} is no folder; choose another --out" in told


def as_original(folder, source, core):
    shutil.copytree(source, folder, dirs_exist_ok=True)


def as_bin(folder, source, core):
    as_original(folder, source, core)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_native_shards(folder, source, core):
    core.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)


@pytest.mark.parametrize("write", [as_original, as_bin, as_native_shards])
def test_a_whole_model_becomes_a_run_that_encodes_and_answers(whole, tmp_path, capsys, caplog, write):
    core, source = whole
    folder = tmp_path / "model"
    write(folder, source, core)
    run, told = imported(capsys, folder, tmp_path / "runs" / "model")
    assert f"evaluate --run {tmp_path / 'runs' / 'model'}" in told
    model = run.load_model()
    assert all(torch.equal(model.core.state_dict()[name], tensor) for name, tensor in core.state_dict().items())
    own = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    pixels, found = states_of(model.vision_tower, 3, 32)
    for one, other in zip(found, original_states(inner_of(own), pixels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()) < 10_000
    shown = done(capsys, "checkpoint", "show", folder)
    assert f"InternVL {folder}: a whole model with a vision transformer of 3 layers of width 24" in shown
    shown = done(capsys, "checkpoint", "show", run.path)
    assert f"run {run.path} of recipe scenes-vitp" in shown
    assert "tensors     0, 0 numbers\n" in shown
    named = load_model(folder, recipe_config("scenes-vitp"))
    assert all(torch.equal(named.core.state_dict()[name], tensor) for name, tensor in core.state_dict().items())
    Image.new("RGB", (40, 30), "green").save(tmp_path / "field.png")
    question = ("--image", tmp_path / "field.png", "--max-tokens", 3, "--device", "cpu", "What is it?")
    done(capsys, "generate", "--run", run.path, *question)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]


def test_a_folder_like_the_published_one_but_narrow_is_imported_and_trained_from(tmp_path, capsys):
    """All 24 layers of both transformers under their real names, in three files."""
    tokenizer = with_special_tokens(vocabulary())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    settings = PUBLISHED | {
        "vision_config": PUBLISHED["vision_config"] | narrow | {"image_size": 56},
        "llm_config": PUBLISHED["llm_config"] | narrow | {"vocab_size": len(tokenizer)},
        "force_image_size": 56,
    }
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "InternVL2_5-1B"
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        for name, shape in published_shapes(settings).items()
    }
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    files = {name: f"model-{1 + number % 3:05}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    run, _ = imported(capsys, folder, tmp_path / "run", recipe="vitp-internvl-1b")
    state = to_original(run.load_model().core.state_dict())
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    convert_scenes_talk(tmp_path / "talks", {"train": 8, "val": 3}, style="summer", size=56)
    changes = {
        "model.pretrained": str(folder), "data.path": str(tmp_path / "talks"), "train.steps": 2,
        "train.global_batch_size": 4, "train.accumulation": 2, "optim.warmup_fraction": 0,
    }  # fmt: skip
    config = build_config(recipe_config("vitp-internvl-1b"), changes)
    report = run_training(make_task(config), config, tmp_path / "trained", worker=Worker(), loader=local_batches)
    assert report["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert 0 < report["metrics"]["val"]["loss"] < 20


def test_a_model_that_was_changed_since_it_was_imported_is_refused(whole, tmp_path, capsys):
    core, source = whole
    as_original(tmp_path / "model", source, core)
    run, _ = imported(capsys, tmp_path / "model", tmp_path / "run")
    state = load_file(tmp_path / "model" / "model.safetensors")
    save_file(state | {"mlp1.1.bias": state["mlp1.1.bias"] + 1}, tmp_path / "model" / "model.safetensors")
    said = refused(capsys, "generate", "--run", run.path, "--device", "cpu", "What is it?")
    assert "was trained on a backbone with fingerprint" in said


@pytest.mark.parametrize("form", ["extract_vit", "hf", "file", "checkpoint"])
def test_a_vision_transformer_becomes_a_run_that_encodes(run, tower, alone, tmp_path, capsys, form):
    path = alone
    if form == "hf":
        extract(capsys, run, path := tmp_path / "vit", "--dtype", "bf16")
    if form == "file":
        path = alone / "model.safetensors"
    if form == "checkpoint":
        state = {f"module.vision_model.{n}": t for n, t in load_file(alone / "model.safetensors").items()}
        torch.save({"state_dict": state, "step": 3}, path := tmp_path / "vit.pth")
    new, told = imported(capsys, path, tmp_path / "run")
    assert "the rest of the model is drawn" in told
    assert f"embed --run {new.path}" in told
    expected = {name: tensor.bfloat16().float() for name, tensor in tower.state_dict().items()}
    found = new.load_model().vision_tower
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    pixels, states = states_of(found, 4)
    own = vision_to_original(expected)
    for one, other in zip(states, original_states(own, pixels, heads=4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    said = refused(capsys, "generate", "--run", new.path, "--device", "cpu", "What is it?")
    assert "answers nothing" in said
    assert "model.pretrained=FOLDER" in said
    with pytest.raises(UserError, match="is a vision transformer without the rest of a model"):
        load_model(path, recipe_config("scenes-vitp"))


def test_a_line_of_pixels_has_no_vector(run, tmp_path):
    for name, size in (("line", (1, 4000)), ("narrow", (10, 1000))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    retriever = load_run(run.path, "cpu")
    assert len(retriever.encode_images([tmp_path / "narrow.png"])) == 1
    with pytest.raises(UserError, match=r"^[^\n]*line\.png: 1 x 4000 pixels; a side may be 100 times as long"):
        retriever.encode_images([tmp_path / "narrow.png", tmp_path / "line.png"])


def test_a_vision_transformer_is_put_into_the_rest_of_a_model(whole, tmp_path, capsys):
    core, source = whole
    other = small_core(seed=5, config=core.config)
    state = vision_to_original(other.model.vision_tower.state_dict())
    path = write_original(tmp_path / "vit", state, ORIGINAL_VISION)
    rest = ("--set", f"model.pretrained={source}")
    run, told = imported(capsys, path, tmp_path / "run", *rest)
    assert "drawn" not in told
    found = run.load_model().core.state_dict()
    for name, tensor in core.state_dict().items():
        wanted = other.state_dict()[name] if name.startswith("model.vision_tower.") else tensor
        assert torch.equal(found[name], wanted)
    done(capsys, "generate", "--run", run.path, "--device", "cpu", "--max-tokens", 2, "What is it?")


def test_a_pretraining_starts_from_the_vision_transformer_that_is_named(alone, tower):
    plain, named = (build_config(recipe_config("scenes-vitp"), {"model.vision": v}) for v in ("", str(alone)))
    tasks = [make_task(config) for config in (plain, named)]
    models = [task.new_model() for task in tasks]
    for name, tensor in models[1].core.state_dict().items():
        is_vision = name.startswith("model.vision_tower.")
        own = tower.state_dict()[name.removeprefix("model.vision_tower.")] if is_vision else None
        assert torch.equal(tensor, own.bfloat16().float() if is_vision else models[0].core.state_dict()[name])
    assert all(parameter.requires_grad for parameter in models[1].vision_tower.encoder.parameters())
    fingerprints = {task.backbone.fingerprint(model) for task, model in zip(tasks, models, strict=True)}
    assert len(fingerprints) == len({task.backbone.name for task in tasks}) == 2
    assert tasks[1].backbone.notes() == (f"its vision transformer is that of {alone}",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qk_normalization": True}, r"q/k norm (no for yes)"),
        ({"norm_type": "rms_norm"}, r"norm (layer_norm for rms_norm)"),
        ({"qkv_bias": False}, r"bias of queries, keys and values (yes for no)"),
        ({"num_hidden_layers": 3}, r"layers (4 for 3)"),
    ],
)
def test_a_folder_whose_configuration_is_not_its_weights_is_refused(alone, tmp_path, capsys, change, said):
    folder = shutil.copytree(alone, tmp_path / "vit")
    (folder / "config.json").write_text(json.dumps(SCENES_VISION | change))
    for words in (("import", folder, "--recipe", "scenes-vitp", "--out", tmp_path / "run"), ("show", folder)):
        told = refused(capsys, "checkpoint", *words)
        assert f"holds another vision transformer than its configuration's: it differs in {said}" in told
    assert not (tmp_path / "run").exists()


def test_another_vision_transformer_than_the_recipes_is_refused_by_what_differs(whole, tmp_path, capsys):
    core, _ = whole
    state = vision_to_original(core.model.vision_tower.state_dict())
    write_original(tmp_path / "vit", state, ORIGINAL_VISION)
    torch.save(state, tmp_path / "vit.pth")
    differing = "width (24 for 128), layers (3 for 4)"
    for path in (tmp_path / "vit", tmp_path / "vit.pth"):
        said = refused(capsys, "checkpoint", "import", path, "--recipe", "scenes-vitp", "--out", tmp_path / "run")
        assert f"{path} holds another vision transformer" in said
        assert differing in said.replace("attention heads (3 for 4), ", "")
    convert_scenes_talk(tmp_path / "talks", {"train": 4, "val": 2}, style="summer", size=64)
    named = ("--set", f"model.vision={tmp_path / 'vit'}", "--runs", tmp_path / "runs")
    line = ("train", "--recipe", "scenes-vitp", "--data", tmp_path / "talks", *named)
    assert "holds another vision transformer than the model's" in refused(capsys, *line)


def test_files_that_are_none_are_refused_in_a_line(run, alone, whole, tmp_path, capsys):
    state = load_file(alone / "model.safetensors")
    missing = write_original(tmp_path / "missing", {n: t for n, t in state.items() if "layers.2.norm2.bias" not in n},
                             SCENES_VISION)  # fmt: skip
    cut = shutil.copytree(alone, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((alone / "model.safetensors").read_bytes()[:5000])
    empty = tmp_path / "empty"
    empty.mkdir()
    lost = shutil.copytree(whole[1], tmp_path / "lost")
    (lost / "model.safetensors").rename(lost / "weights.safetensors")
    words = shutil.copytree(whole[1], tmp_path / "words")
    (words / "tokenizer.json").unlink()
    line = ("--recipe", "scenes-vitp", "--out", tmp_path / "run")
    for path, told in [
        (missing, "1 missing (encoder.layer.2.layernorm_after.bias)"),
        (cut, "cut off or damaged"),
        (cut / "model.safetensors", "cut off or damaged"),
        (empty, "must be a file of weights, or a Hugging Face folder of an InternVL or InternViT"),
        (lost, "must hold weights in model.safetensors"),
        (words, "must hold a tokenizer that transformers can read by itself"),
        (tmp_path / "nothing", "does not exist"),
    ]:
        assert told in refused(capsys, "checkpoint", "import", path, *line)
    assert not (tmp_path / "run").exists()
    said = refused(capsys, "checkpoint", "import", alone, "--recipe", "harma-scenes", "--out", tmp_path / "run")
    assert "is an InternViT; give a recipe of ViTP" in said
    said = refused(capsys, "checkpoint", "import", alone, *line[:2], "--out", run.path)
    assert "exists; choose another --out" in said
    said = refused(capsys, "checkpoint", "import", alone, *line, "--clip", "openai")
    assert "`--clip` is for a Combiner" in said


def test_a_model_is_exported_as_the_originals_and_comes_back_equal(run, whole, tmp_path, capsys):
    small, _ = imported(capsys, whole[1], tmp_path / "small")
    for number, source in enumerate((run, small)):
        folder = tmp_path / f"released{number}"
        told = done(capsys, "checkpoint", "export", "--run", source.path, "--format", "released", "--out", folder)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        assert told.endswith(f"wrote {folder} ({size:.1f} MB)\n")
        again, _ = imported(capsys, folder, tmp_path / f"again{number}")
        found, own = (each.load_model().core.state_dict() for each in (again, source))
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert state.keys() == to_original(whole[0].state_dict()).keys()
    model, batch, pixels = small.load_model(), talks([2, 1]), tiles(3)
    image_token = model.core.config.image_token_id
    batch["input_ids"][batch["input_ids"] == IMAGE] = image_token
    with torch.no_grad():
        expected = original_loss(state, normalise(pixels, next(iter(state.values()))), batch, image_token)
        torch.testing.assert_close(model(pixels, **batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    written, before = (json.loads((path / "config.json").read_text()) for path in (folder, whole[1]))
    for part, ignored in (
        ("vision_config", ("initializer_factor", "drop_path_rate")),
        ("llm_config", ("sliding_window",)),
    ):
        same = {name for name in before[part] if name not in (*ignored, "torch_dtype", "attn_implementation")}
        assert {name: written[part].get(name) for name in same} == {name: before[part][name] for name in same}
    assert "exists; choose another --out" in refused(
        capsys, "checkpoint", "export", "--run", run.path, "--format", "released", "--out", folder
    )


def test_of_other_exports_there_are_what_was_trained_and_no_clip(run, tmp_path, capsys):
    line = ("checkpoint", "export", "--run", run.path, "--out", tmp_path / "x", "--format")
    assert "is not built on a CLIP" in refused(capsys, *line, "open_clip")
    done(capsys, *line, "adapter")
    assert load_file(tmp_path / "x").keys() == {n for n, p in run.load_model().named_parameters() if p.requires_grad}
