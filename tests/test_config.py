import math
from typing import get_args

import pytest

from harma_ray.errors import UserError
from harma_ray.recipes import RECIPES, load_config, recipe_config
from harma_ray.recipes.harma.config import Criterion
from harma_ray.retrieval.image_text import RetrievalResult
from harma_ray.settings import build_config, config_hash, load_yaml, parse_overrides, to_yaml


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


def test_a_number_that_equals_nothing_is_told_as_a_wrong_value_of_its_setting():
    with pytest.raises(UserError, match=r"`loss\.margin`.*nan"):
        build_config(recipe_config("harma-scenes"), parse_overrides(["loss.margin=.nan"]))


def test_a_template_that_nobody_filled_in_is_told_as_yaml_that_is_no_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: harma-scenes\n{{ seed }}: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_yaml(tmp_path / "config.yaml")


def test_all_unknown_keys_are_listed_with_the_nearest_valid_one():
    with pytest.raises(UserError, match=r"optim\.learnig_rate.*learning_rate.*`sed`.*seed"):
        build_config(recipe_config("harma-scenes"), {"optim.learnig_rate": 1, "sed": 3})


def test_all_wrong_values_are_listed_with_path_rule_and_value():
    changes = {
        "train.epochs": -1,
        "train.precision": "fp8",
        "train.accumulation": 1.5,
        "optim.learning_rate": -1,
        "optim.betas": [0.9, 1],
        "scaling.gpus_per_worker": 2,
        "loss.gamma": float("nan"),
        "data.chunk_mb": float("inf"),
        "seed": "many",
    }
    with pytest.raises(UserError) as caught:
        build_config(recipe_config("harma-scenes"), changes)
    origin, _, told = str(caught.value).partition(": ")
    assert origin == "--set"
    assert sorted(told.split("; ")) == [
        "`data.chunk_mb` must be a finite number, got inf",
        "`loss.gamma` must be a finite number, got nan",
        "`optim.betas.1` must be below 1, got 1",
        "`optim.learning_rate` must be above 0, got -1",
        "`scaling.gpus_per_worker` must be at most 1, got 2",
        "`seed` must be a valid integer, unable to parse string as an integer, got 'many'",
        "`train.accumulation` must be a valid integer, got a number with a fractional part, got 1.5",
        "`train.epochs` must be at least 0, got -1",
        "`train.precision` must be 'auto', 'fp32' or 'bf16', got 'fp8'",
    ]


LIMITS = {
    "seed": (0, None), "data.shuffle_window_mb": (0.01, None), "data.chunk_mb": (0.01, None),
    "data.decode_threads": (0, None), "data.prefetch_batches": (1, None), "data.max_pixels": (0, None),
    "optim.weight_decay": (0, None), "optim.clip_grad_norm": (0, None), "optim.warmup_fraction": (0, 1),
    "train.epochs": (0, None), "train.global_batch_size": (2, None), "train.accumulation": (1, None),
    "train.eval_every_epochs": (1, None), "train.early_stopping_patience": (0, None),
    "train.keep_checkpoints": (1, None), "train.eval_batch_size": (1, None), "train.checkpoint_every_steps": (0, None),
    "train.captions_per_image": (1, None), "train.log_every_steps": (1, None), "train.threads": (0, None),
    "scaling.num_workers": (0, None),
    "scaling.cpus_per_worker": (0, None), "scaling.max_failures": (0, None), "scaling.start_timeout_seconds": (1, None),
    "loss.margin": (0, None), "loss.gamma": (0, None), "loss.center_factor": (0, None),
    "augmentation.max_aspect_ratio": (1, None), "augmentation.flip_probability": (0, 1),
    "augmentation.operation_probability": (0, 1), "augmentation.num_operations": (0, None),
    "augmentation.level": (0, 10),
}  # fmt: skip
"""Smallest and largest values of HarMA's settings that have a range whose ends belong to it."""
ABOVE_ZERO = [
    "data.task_cpus", "optim.learning_rate", "optim.epsilon", "scaling.gpus_per_worker", "model.temperature",
    "adapter.width", "adapter.shared_width", "adapter.num_heads", "augmentation.max_scale", "augmentation.min_scale",
]  # fmt: skip
CLIP4CIR_LIMITS = {
    "preparation.target_ratio": (1, None),
    "combiner.projection_dim": (1, None),
    "combiner.hidden_dim": (1, None),
    "combiner.dropout": (0, 0.99),
}


@pytest.mark.parametrize(
    ("recipe", "name", "low", "high"),
    [
        *(("harma-scenes", name, *ends) for name, ends in LIMITS.items()),
        *(("scenes-cir-combiner", name, *ends) for name, ends in CLIP4CIR_LIMITS.items()),
    ],
)
def test_a_range_holds_its_ends_and_nothing_beyond_them(recipe, name, low, high):
    base = recipe_config(recipe)
    build_config(base, {name: low})
    finite = "a finite number"
    beyond = [(low - 1, f"at least {low:g}"), (-math.inf, f"at least {low:g}|{finite}")]
    if high is None:
        beyond.append((math.inf, finite))
    else:
        build_config(base, {name: high})
        beyond += [(high + 1, f"at most {high:g}"), (math.inf, f"at most {high:g}|{finite}")]
    beyond.append((math.nan, f"{finite}|at most {high}"))
    for value, rule in beyond:
        with pytest.raises(UserError, match=f"^--set: `{name}` must be ({rule}), got {value}$"):
            build_config(base, {name: value})


@pytest.mark.parametrize("name", ABOVE_ZERO)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
def test_zero_less_and_no_number_are_refused_where_more_is_needed(name, value):
    with pytest.raises(UserError, match=f"^--set: `{name}` must be .*, got {value}$"):
        build_config(recipe_config("harma-scenes"), {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augmentation.min_scale": 0.9, "augmentation.max_scale": 0.8},
            "`augmentation`: `min_scale` must not be above `max_scale`, got 0.9 and 0.8",
        ),
        ({"adapter.width": 100}, "`adapter`: `width` must be a multiple of `num_heads`, got 100 and 8"),
        ({"scaling.gpus_per_worker": 0.5, "scaling.num_workers": 2}, "`scaling`: `gpus_per_worker` below 1 needs"),
        (
            {"train.captions": "grouped"},
            "`train`: `global_batch_size` must be a multiple of `captions_per_image` with `captions` grouped, two "
            "images at least, got 128 and 5; use 125 or 130",
        ),
        ({"train.captions": "grouped", "train.global_batch_size": 5}, "got 5 and 5; use 10 or 15"),
    ],
)
def test_what_relates_two_settings_is_checked_too(changes, message):
    with pytest.raises(UserError) as caught:
        build_config(recipe_config("harma-scenes"), changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("recipe", ["scenes-cir-finetune", "scenes-vitp", "clip4cir-combiner"])
def test_recipes_without_captions_of_an_image_do_not_group_them(recipe):
    size = {"train.captions": "grouped", "train.global_batch_size": 20}
    with pytest.raises(UserError, match=f"`train.captions` grouped needs images with captions.*recipe {recipe}; use"):
        build_config(recipe_config(recipe), size)


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
    for name in RECIPES:
        incidental = {"model.parallel": "fsdp2"} if "vitp" in name else {"model.activation": "quick_gelu"}
        named = build_config(recipe_config(name), {**incidental, "train.keep_checkpoints": 3})
        assert config_hash(named) == config_hash(recipe_config(name))
    for changes in ({"seed": 1}, {"loss.gamma": 1.0}, {"data.shuffle_window_mb": 1.0}, {"train.epochs": 7}):
        assert config_hash(build_config(base, changes)) != config_hash(base)


def test_unknown_recipes_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="harma-rsitmd-vit"):
        recipe_config("harma-rsitmd")


def test_runs_made_before_later_settings_came_go_on():
    """Hashes as checkpoints of version 0.1 hold them; other values of the later settings make another run."""
    told = {
        "harma-rsitmd-vit": "dcf56efdc1491abb4cd03a5059158b9bf11ebdcb6b3d8dcc94f03d252bc0698b",
        "harma-rsitmd-geo": "b32d2471803bdea65eba9abb70a79a8bbd9aeb238ed29c896105db7c7b5f6bc4",
        "harma-rsicd-vit": "540caf8ad6b0594dfa819fef9e5a01ec04a6c16ba3ac987e85d8784b202d289b",
        "harma-rsicd-geo": "674f2db6fcd6849d87762016211f058a4b3acdffd35ed25b609540a1b328c048",
        "scenes-pretrain": "1d9152762cebf1e2e803de691bc02e0aa5da6d21b0544cbe6f425a1fe8f8e469",
        "harma-scenes": "661a97bf55984435f57a587c4b4c96ce48a9fb89c853b1ff763662a389c46c28",
        "clip4cir-finetune": "55d0a50802874bb3a7bc724de3f896666f8a0c1287c9fa7941a77c1bc1ab07ee",
        "clip4cir-combiner": "5c97e833fd560ebbe5fe025984008769d08efcf403c2321db4752a0fa33d7efa",
        "scenes-cir-finetune": "1cf688b5069e22381bc096c428eb915909d0ffc360a7e4f5936ca1c46cd65b4a",
        "scenes-cir-combiner": "716cdcdce81f99b7164fee551a67eec6cf5728e975ee4c657f33d45afb95b92d",
    }
    assert {name: config_hash(recipe_config(name)) for name in told} == told
    later = build_config(recipe_config("harma-rsitmd-vit"), {"train.eval_precision": "bf16"})
    assert config_hash(later) not in told.values()


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        (
            "harma-rsitmd-vit",
            {"optim.betas": [0.9, 0.99]},
            "b2e118ec92eaf727480603985464cb36924993d23282778e8e9feab58969152f",
        ),  # other coefficients of Adam
        (
            "harma-rsitmd-vit",
            {"optim.learning_rate": 1},
            "c36a92e8461811f9fc69e653b3f380176b509f1a85e1930702298204a1cee54d",
        ),  # a whole number for a rate
        (
            "harma-rsicd-geo",
            {"model.pretrained": "/a/b.pt"},
            "fda715ece0cfd303bcde751f988f0e1be2287ae0808f8b89ee8781cad677cb43",
        ),  # weights from a file
        (
            "harma-scenes",
            {"train.captions": "one"},
            "f354e317c89001e085b8c6bb268809d983e6c2c0d01b1bbf82b592f512e3adab",
        ),  # one caption an epoch
        (
            "scenes-cir-finetune",
            {"seed": 3},
            "3f3f6fe2a833f37ff82f70644d10f1fc6e0c181ae891b750cc757d8a4ae6b934",
        ),  # another seed
        (
            "harma-rsitmd-vit",
            {"train.eval_precision": "bf16"},
            "3a35846aae28ee98c825279f370e368fc0dc9ee28c59fa54c8be70afca6d7bd2",
        ),  # bf16 in evaluations
        (
            "scenes-cir-combiner",
            {"model.tuned": "/q/w"},
            "7c7b5c453461ec32aa6bbaf8b41cfe4fc7e75cedec6d7b2d8c8814fdb9462b45",
        ),  # a combiner over a fine-tuned CLIP
        (
            "scenes-cir-combiner",
            {"features.cached": False},
            "0d52ae33e6bffda4761ffe2482e1e29004bf9d7f1f159ef2c730edad1228abd8",
        ),  # features that are not kept
        (
            "clip4cir-combiner",
            {"selection.also_keep": ["r_mean"]},
            "3479d51785e3889d2dcaf81ce17be33ac48f79b50e3b3040dcdc4abcfbc7e520",
        ),  # one more best checkpoint
        (
            "scenes-pretrain",
            {"data.prefetch_batches": 1, "data.chunk_mb": 1},
            "1d9152762cebf1e2e803de691bc02e0aa5da6d21b0544cbe6f425a1fe8f8e469",
        ),  # nothing but incidental settings
    ],
)
def test_runs_with_settings_of_their_own_go_on(recipe, changes, told):
    """Hashes that the code before steps, tasks of six members and shared ranges made of these settings."""
    assert config_hash(build_config(recipe_config(recipe), changes)) == told


def test_a_metric_that_picks_the_best_epoch_is_one_that_is_measured_and_makes_another_run():
    assert get_args(Criterion) == RetrievalResult.METRICS
    base = recipe_config("harma-scenes")
    assert config_hash(build_config(base, {"selection.criterion": "r_mean_text"})) != config_hash(base)
    for name in ("harma-scenes", "scenes-cir-finetune", "scenes-vitp"):
        with pytest.raises(UserError, match=r"`selection.criterion` must be '.*', '.*' or '.*', got 'r_meen'"):
            build_config(recipe_config(name), {"selection.criterion": "r_meen"})


@pytest.mark.parametrize(("select_on", "split"), [("val", "dev"), ("test-as-in-released-code", "test")])
def test_the_split_that_selects_the_best_epoch_is_val_or_as_in_the_released_code_test(select_on, split):
    config = build_config(recipe_config("harma-scenes"), {"data.val_split": "dev", "train.select_on": select_on})
    assert config.selecting_split == split


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("recipe: harma-scenes\ntrain: {epochs: 1}\noptim: {}\ntrain: {epochs: 2}\n")
    with pytest.raises(UserError, match=r"a key stands once, got `train` again .* line 4, column 1"):
        load_config(file)
