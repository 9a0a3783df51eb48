import argparse
import pickle
import shutil

import pytest
import torch
from random_runs import make_random_run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy_language import register, toy_config

from harma_ray.errors import UserError
from harma_ray.exports import checkpoint
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.import_export import describe_file, import_checkpoint, load_model
from harma_ray.models import weights
from harma_ray.models.backbones import build_clip
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.foreign import read_foreign
from harma_ray.models.weights import save_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import create_run, open_run
from harma_ray.settings import build_config, config_hash
from harma_ray.training.checkpoint import WEIGHTS_NAME, CheckpointMeta, list_checkpoints, save_checkpoint

IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def released(random_run, tmp_path_factory):
    return export_checkpoint(random_run, "released", tmp_path_factory.mktemp("released") / "harma.pth").path


def features(model):
    with torch.no_grad():
        return model.encode_image(IMAGES)


def test_a_released_file_comes_back_with_the_same_embeddings(random_run, released, tmp_path):
    imported = import_checkpoint(released, recipe_config("harma-scenes"), tmp_path / "back")
    run = open_run(imported.path)
    torch.testing.assert_close(features(run.load_model()), features(random_run.load_model()), atol=1e-6, rtol=0)
    again = export_checkpoint(run, "released", tmp_path / "again.pth").path
    first, second = (torch.load(path, weights_only=True)["model"] for path in (released, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_released_file_that_does_not_fit_is_refused_by_name(released, tmp_path, change):
    content = torch.load(released, weights_only=True)
    name = "model.visual.transformer.resblocks.2.mmadapter.img_proj_up.weight"
    if change == "missing":
        del content["model"][name]
    else:
        name = "model.stranger.weight"
        content["model"][name] = torch.zeros(1)
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        import_checkpoint(tmp_path / "bad.pth", recipe_config("harma-scenes"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_file_fits_its_own_backbone_alone(random_run, tmp_path):
    path = export_checkpoint(random_run, "adapter", tmp_path / "adapter.safetensors").path
    model = load_model(path, random_run.config)
    assert torch.equal(features(model), features(random_run.load_model()))
    assert sum(t.numel() for t in load_file(path).values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    with pytest.raises(UserError, match="fingerprint"):
        load_model(path, build_config(random_run.config, {"seed": 5}))


def test_a_whole_clip_is_exported_and_read_as_a_backbone(random_run, tmp_path):
    with pytest.raises(UserError, match="GELU and attention"):
        export_checkpoint(random_run, "open_clip", tmp_path / "no.safetensors")
    model = random_run.task.new_model()
    base = {name: t.contiguous() for name, t in model.clip.state_dict().items() if ".mlp.adapter." not in name}
    save_file(base, tmp_path / "clip.safetensors")
    imported = import_checkpoint(tmp_path / "clip.safetensors", random_run.config, tmp_path / "backbone")
    assert "model.pretrained=" in imported.describe()
    assert "open_clip state dict" in describe_file(imported.path)
    del base["ln_final.weight"]
    save_file(base, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"ln_final\.weight"):
        import_checkpoint(tmp_path / "short.safetensors", random_run.config, tmp_path / "nothing")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_with_code_is_refused_and_not_run(random_run, tmp_path, capfd):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    for function in (
        lambda: import_checkpoint(tmp_path / "evil.pth", random_run.config, tmp_path / "out"),
        lambda: load_model(tmp_path / "evil.pth", random_run.config),
        lambda: describe_file(tmp_path / "evil.pth"),
    ):
        with pytest.raises(UserError, match="plain pickle, which cannot be read without running code"):
            function()
    assert "executed" not in capfd.readouterr().out


def test_an_existing_file_is_kept_unless_told_otherwise(random_run, tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export_checkpoint(random_run, "adapter", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    export_checkpoint(random_run, "adapter", tmp_path / "a.safetensors", overwrite=True)


def test_show_says_what_a_path_is(random_run, released, tmp_path):
    adapter = export_checkpoint(random_run, "adapter", tmp_path / "a.safetensors").path
    assert "released HarMA" in describe_file(released)
    assert "adapter file" in describe_file(adapter)
    assert "of recipe harma-scenes, not finished" in describe_file(random_run.path)
    assert "r_mean 1.00" in describe_file(list_checkpoints(random_run.path)[0])
    with pytest.raises(UserError, match="does not exist"):
        describe_file(tmp_path / "nothing")


def test_show_tells_sizes_and_architecture(random_run, released, tmp_path):
    assert "scenes-tiny by its shapes" in describe_file(released)
    assert "adapters    7, width 128, shared width 64" in describe_file(released)
    assert "adapters    7, width 128, shared width 64" in describe_file(random_run.path)
    empty = create_run(tmp_path, "empty", random_run.config)
    assert "no checkpoint yet" in describe_file(empty.path)
    shutil.copytree(list_checkpoints(random_run.path)[0], tmp_path / "damaged")
    (tmp_path / "damaged" / WEIGHTS_NAME).write_bytes(b"xx")
    with pytest.raises(UserError, match=r"trainable\.safetensors is a text"):
        describe_file(tmp_path / "damaged")


def test_a_released_file_brings_its_sizes_and_its_backbone(random_run, released):
    other = build_config(random_run.config, {"adapter.width": 32, "adapter.shared_width": 16, "seed": 7})
    assert torch.equal(features(load_model(released, other)), features(random_run.load_model()))


def test_a_runs_folder_and_its_checkpoint_give_the_same_model(random_run):
    for path in (random_run.path, random_run.best_checkpoint()):
        model = load_model(path, random_run.config)
        assert torch.equal(features(model), features(random_run.load_model()))


@pytest.mark.parametrize("format", ["adapter", "open_clip"])
def test_a_model_trained_whole_comes_back(random_run, tmp_path, format):
    run = create_run(tmp_path, "full", build_config(random_run.config, {"model.tuning": "full"}))
    model = run.task.new_model()
    backbone = backbone_fingerprint(model)
    with torch.no_grad():
        for parameter in model.clip.visual.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    meta = CheckpointMeta(0, 0, {}, {}, config_hash(run.config), run.config.recipe, backbone)
    save_checkpoint(run.path, meta, model, {})
    path = export_checkpoint(run, format, tmp_path / "weights.safetensors").path
    if format == "adapter":
        again = load_model(path, run.config)
    else:
        with pytest.raises(UserError, match="plain CLIP"):
            load_model(path, run.config)
        zero_shot = build_config(run.config, {"model.tuning": "none", "model.pretrained": str(path)})
        again = make_task(zero_shot).new_model().eval()
    assert torch.equal(features(again), features(model.eval()))  # training mode rounds otherwise


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"model.x.mmadapter.a": 3}}, "must hold tensors under their names"),
        (
            {"layers": {"a": torch.zeros(1)}, "config": argparse.Namespace(a=1)},
            "must hold a CLIP under open_clip's names",
        ),
    ],
)
def test_a_file_with_other_things_names_the_way_out(random_run, tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "odd.pth", random_run.config, tmp_path / "out")


def test_a_full_disk_leaves_nothing_half_made(random_run, released, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in (checkpoint, weights):
        monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        import_checkpoint(released, random_run.config, tmp_path / "imported")
    with pytest.raises(UserError, match="No space left"):
        export_checkpoint(random_run, "adapter", tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_import_onto_a_folder_is_refused(random_run, released, tmp_path):
    with pytest.raises(UserError, match="choose another --out"):
        import_checkpoint(released, random_run.config, tmp_path)


def test_weights_trained_with_settings_that_no_shape_shows_are_refused_with_others(random_run, tmp_path):
    adapter = export_checkpoint(random_run, "adapter", tmp_path / "adapter.safetensors").path
    other = build_config(random_run.config, {"adapter.num_heads": 4, "model.text_tokens": "full"})
    for file in (adapter, random_run.best_checkpoint()):
        with pytest.raises(UserError, match=r"--set model\.text_tokens=trim --set adapter\.num_heads=8"):
            load_model(file, other)


def test_an_imported_backbone_says_no_more_of_its_activation_than_its_file(random_run, tmp_path):
    """Plain GELU was only assumed: the other architecture must stay open. Where it is known it is held to."""
    clip = build_clip("scenes-tiny", "random")
    for known in (False, True):
        save_clip(clip, tmp_path / "clip.safetensors", says_activation=known)
        path = import_checkpoint(tmp_path / "clip.safetensors", random_run.config, tmp_path / f"out{known}").path
        assert read_foreign(path).quick_gelu is (False if known else None)
    stated = build_config(random_run.config, {"model.activation": "gelu"})
    save_clip(clip, tmp_path / "clip.safetensors", says_activation=False)
    path = import_checkpoint(tmp_path / "clip.safetensors", stated, tmp_path / "stated").path
    assert read_foreign(path).quick_gelu is False


def test_one_of_several_models_is_taken_out(random_run, tmp_path):
    clips = [build_clip("scenes-tiny", "random", seed=seed) for seed in (1, 2)]
    file = tmp_path / "epoch_3.pt"
    torch.save({"model": clips[0].state_dict(), "ema": clips[1].state_dict()}, file)
    assert "2 models that differ" in describe_file(file)
    with pytest.raises(UserError, match="--section model"):
        import_checkpoint(file, random_run.config, tmp_path / "out")
    imported = import_checkpoint(file, random_run.config, tmp_path / "out", section="ema")
    assert "section `ema`" in imported.describe()
    assert torch.equal(load_file(imported.path)["visual.proj"], clips[1].visual.proj)
    assert "activation  not told by the file" in describe_file(imported.path)


def test_show_names_broken_weights(tmp_path):
    state = build_clip("scenes-tiny", "random").state_dict()
    state["visual.proj"][0, 0] = float("inf")
    torch.save(state, tmp_path / "broken.pt")
    assert "NaN or infinity in 1 tensor, such as visual.proj" in describe_file(tmp_path / "broken.pt")


def test_show_knows_a_hugging_face_folder(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    told = describe_file(tmp_path)
    assert told.startswith(f"Hugging Face folder {tmp_path}\nweights     fingerprint ")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert describe_file(tmp_path) != told


def test_a_recipe_without_files_of_its_paper_exports_what_it_trained(monkeypatch, tmp_path, random_run):
    register(monkeypatch)
    run = make_random_run(tmp_path, "toy", toy_config())
    path = export_checkpoint(run, "adapter", tmp_path / "toy.safetensors").path
    trained, again = run.load_model().state_dict(), load_model(path, run.config).state_dict()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert f"adapter file {path} of recipe toy, for letters with fingerprint letters" in describe_file(path)
    with pytest.raises(UserError, match="recipe toy has no files of its own here; export it as `adapter`"):
        export_checkpoint(run, "released", tmp_path / "toy.pth")
    with pytest.raises(UserError, match="recipe toy is not built on a CLIP"):
        export_checkpoint(run, "open_clip", tmp_path / "clip.safetensors")
    zero_shot = make_random_run(tmp_path, "none", build_config(random_run.config, {"model.tuning": "none"}))
    with pytest.raises(UserError, match="trained nothing; export it as `open_clip`"):
        export_checkpoint(zero_shot, "adapter", tmp_path / "nothing.safetensors")


def test_a_released_file_says_its_activation_by_the_architecture_that_it_names(released, tmp_path):
    content = torch.load(released, weights_only=True)
    assert "activation  GELU (it names its architecture)" in describe_file(released)
    content["config"]["model"]["architecture"] = "ViT-B-32-quickgelu"
    torch.save(content, tmp_path / "quick.pth")
    assert "activation  quick GELU (it names its architecture)" in describe_file(tmp_path / "quick.pth")
