import pytest

from harma_ray.config import build_config, config_hash, load_yaml, parse_overrides, to_yaml
from harma_ray.errors import UserError
from harma_ray.recipes import RECIPES, load_config, recipe_config


@pytest.mark.parametrize("name", RECIPES)
def test_written_settings_read_back_the_same(name, tmp_path):
    config = recipe_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "architecture", "pretrained"),
    [
        ("harma-rsitmd-vit", 4e-4, 50, "ViT-B-32", "laion2b_s34b_b79k"),
        ("harma-rsicd-vit", 4e-4, 10, "ViT-B-32", "laion2b_s34b_b79k"),
        ("harma-rsitmd-geo", 4e-6, 80, "ViT-B-32-quickgelu", "RS5M_ViT-B-32_RET-2.pt"),
        ("harma-rsicd-geo", 4e-6, 80, "ViT-B-32-quickgelu", "RS5M_ViT-B-32_RET-2.pt"),
    ],
)
def test_recipes_hold_the_published_settings(name, rate, epochs, architecture, pretrained):
    config = recipe_config(name)
    assert (config.optim.learning_rate, config.train.epochs) == (rate, epochs)
    assert (config.model.architecture, config.model.pretrained) == (architecture, pretrained)
    assert (config.optim.betas, config.optim.epsilon, config.optim.weight_decay) == ((0.9, 0.98), 1e-8, 0.04)
    assert (config.optim.schedule, config.optim.warmup_fraction, config.optim.clip_grad_norm) == ("linear", 0.1, 0)
    assert (config.train.global_batch_size, config.loss.margin, config.loss.gamma) == (428, 0.2, 2.0)
    assert (config.adapter.width, config.adapter.num_heads, config.adapter.shared_width) == (128, 8, 64)
    assert (config.adapter.gate_init, config.model.temperature, config.loss.triplet) == (0.6, 0.07, "weighted")


def test_numbers_that_yaml_reads_as_strings_are_repaired():
    config = build_config(recipe_config("harma-rsitmd-vit"), parse_overrides(["optim.learning_rate=4e-6"]))
    assert config.optim.learning_rate == 4e-6


def test_all_unknown_keys_are_listed_with_the_nearest_valid_one():
    with pytest.raises(UserError, match=r"optim\.learnig_rate.*learning_rate.*`sed`.*seed"):
        build_config(recipe_config("harma-scenes"), {"optim.learnig_rate": 1, "sed": 3})


def test_all_wrong_values_are_listed_with_their_paths():
    changes = {"train.epochs": "many", "train.precision": "fp8", "optim.learning_rate": -1, "loss.gamma": float("nan")}
    with pytest.raises(UserError) as caught:
        build_config(recipe_config("harma-scenes"), changes)
    for part in ("train.epochs", "train.precision", "learning_rate", "gamma"):
        assert part in str(caught.value)


@pytest.mark.parametrize("changes", [{"train": 3}, {"train.epochs.x": 3}, {"adapter.width": 100}, {"seed": 1.5}])
def test_values_in_the_wrong_place_are_refused(changes):
    with pytest.raises(UserError):
        build_config(recipe_config("harma-scenes"), changes)


@pytest.mark.parametrize("text", ["novalue", "=3", "a=[1"])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(UserError):
        parse_overrides([text])


def test_yaml_mistakes_name_line_and_column(tmp_path):
    (tmp_path / "bad.yaml").write_text("recipe: harma-scenes\ntrain: {epochs: [}\n")
    with pytest.raises(UserError, match="line 2, column"):
        load_yaml(tmp_path / "bad.yaml")


def test_the_hash_changes_with_what_is_computed_and_not_with_where():
    base = recipe_config("harma-scenes")
    same = build_config(base, {"scaling.num_workers": 3, "data.path": "/elsewhere", "data.decode": "tasks"})
    assert config_hash(same) == config_hash(base)
    for changes in ({"seed": 1}, {"loss.gamma": 1.0}, {"data.shuffle_window_mb": 1.0}, {"train.epochs": 7}):
        assert config_hash(build_config(base, changes)) != config_hash(base)


def test_unknown_recipes_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="harma-rsitmd-vit"):
        recipe_config("harma-rsitmd")


def test_runs_made_before_later_settings_came_go_on():
    """Hashes as checkpoints of version 0.1 hold them; other values of the later settings make another run."""
    told = {
        "harma-rsitmd-vit": "dcf56efdc1491abb4cd03a5059158b9bf11ebdcb6b3d8dcc94f03d252bc0698b",
        "clip4cir-finetune": "55d0a50802874bb3a7bc724de3f896666f8a0c1287c9fa7941a77c1bc1ab07ee",
        "clip4cir-combiner": "5c97e833fd560ebbe5fe025984008769d08efcf403c2321db4752a0fa33d7efa",
    }
    assert {name: config_hash(recipe_config(name)) for name in told} == told
    later = build_config(recipe_config("harma-rsitmd-vit"), {"train.eval_precision": "bf16"})
    assert config_hash(later) not in told.values()
