"""What a training's header says before anything starts."""

import pytest
import torch

from harma_ray.cli.header import describe_count, describe_precision, describe_rate, header_lines
from harma_ray.data.order import planned_order
from harma_ray.models.backbones import build_clip
from harma_ray.preflight import Prepared
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import WorkerPlan
from harma_ray.settings import build_config


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("harma-scenes", {}),
        ("harma-scenes", {"adapter.share_across_modalities": True, "loss.center_factor": 1}),
        ("scenes-pretrain", {}),
        ("scenes-cir-finetune", {"tuning.encoder": "text"}),
        ("scenes-cir-combiner", {}),
    ],
)
def test_counts_without_weights_are_those_of_the_model(recipe, changes):
    config = build_config(recipe_config(recipe), changes)
    parameters = list(make_task(config).new_model().parameters())
    total, trained = (
        sum(p.numel() for p in chosen) for chosen in (parameters, [p for p in parameters if p.requires_grad])
    )
    assert describe_count(make_task(config)).startswith(f"{trained:,} of {total:,} parameters (")


def test_the_published_harma_trains_the_papers_share_and_nothing_is_downloaded_for_it():
    config = recipe_config("harma-rsitmd-vit")
    assert describe_count(make_task(config)) == "5,934,397 of 157,211,710 parameters (3.77 %)"


def test_a_training_of_nothing_says_so():
    config = build_config(recipe_config("harma-scenes"), {"model.tuning": "none", "loss.contrastive": False})
    assert describe_count(make_task(config)).startswith("nothing of ")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "adamw, learning rate 0.004, reached after 10 steps of warm-up, then falls along a line to 0"),
        ({"optim.schedule": "constant", "optim.warmup_fraction": 0}, "adamw, learning rate 0.004, then stays"),
    ],
)
def test_rate_and_schedule_are_told(changes, told):
    assert describe_rate(build_config(recipe_config("harma-scenes"), changes), 100) == told


@pytest.mark.parametrize(
    ("precision", "told"),
    [("auto", "fp32 on CPU"), ("fp32", "fp32 on CPU"), ("bf16", "bf16 autocast on CPU, losses in fp32")],
)
def test_precision_is_told_as_it_will_be(precision, told):
    train = build_config(recipe_config("harma-scenes"), {"train.precision": precision}).train
    assert describe_precision(train, use_gpu=False) == told


def announced(config, workers):
    return header_lines(Prepared(config, make_task(config), planned_order(config), (), workers))


def test_backbone_batch_and_device_are_told(scenes):
    changes = {"data.path": str(scenes), "train.global_batch_size": 20, "train.epochs": 2}
    lines = announced(build_config(recipe_config("harma-scenes"), changes), WorkerPlan(2, 0.5, 0))
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["backbone"].startswith("scenes-tiny, random of seed 0")
    assert told["steps"] == "2 epochs x 10 steps of 20 samples, 10 a worker"
    assert told["workers"] == "2 workers, each 0.5 CPU and no GPU"


def test_images_that_are_encoded_once_for_their_captions_are_told(scenes):
    changes = {"data.path": str(scenes), "train.global_batch_size": 20, "train.captions": "grouped"}
    lines = announced(build_config(recipe_config("harma-scenes"), changes), WorkerPlan(2, 0.5, 0))
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["data"].endswith("40 images, 200 captions, 40 samples an epoch")
    assert told["steps"] == "3 epochs x 10 steps of 4 images with 5 captions each, 2 a worker"


def test_what_was_taken_out_of_a_weights_file_is_told(scenes, tmp_path):
    state = build_clip("scenes-tiny", "random").state_dict()
    torch.save({"epoch": 3, "ema": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "w.pt")
    changes = {"data.path": str(scenes), "model.pretrained": str(tmp_path / "w.pt")}
    lines = announced(build_config(recipe_config("harma-scenes"), changes), WorkerPlan(1, 1, 0))
    backbone = next(line for line in lines if line.startswith("backbone"))
    assert backbone.endswith("w.pt; section `ema`; left out beside it: epoch; prefix `module.` taken off the names")
