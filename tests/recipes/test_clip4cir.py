"""CLIP4Cir's two stages: what is trained, what is fed, what is measured."""

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from harma_ray.data.manifest import QUERIES_NAME
from harma_ray.data.order import planned_order
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.relative_captions import evaluation_text, training_texts
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import EvaluationStream, TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.models.backbones import build_clip
from harma_ray.models.clip import DualEncoder
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.clip4cir.inputs import Inputs, TripletTransform
from harma_ray.retrieval.composed import composed_recalls
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints
from harma_ray.training.loop import run_training
from harma_ray.training.state import TrainState
from harma_ray.training.step import evaluate_split, parameters_without_gradient

COMBINER = {"combiner.projection_dim": 64, "combiner.hidden_dim": 32}
INPUTS = Inputs("scenes-tiny", 64, 10**8, "target", 1.25)


def settings(composed, recipe="scenes-cir-finetune", **changes):
    small = {"data.path": str(composed), "train.global_batch_size": 8, "train.epochs": 1}
    sizes = COMBINER if recipe.endswith("combiner") else {}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return build_config(recipe_config(recipe), {**small, **sizes, **named})


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_published_settings_are_the_defaults():
    first, second = recipe_config("clip4cir-finetune"), recipe_config("clip4cir-combiner")
    assert (first.optim.name, first.optim.learning_rate, first.optim.betas) == ("adamw", 2e-6, (0.9, 0.999))
    assert (first.optim.epsilon, first.optim.weight_decay, first.optim.no_decay) == (1e-7, 0.01, ())
    assert (second.optim.name, second.optim.learning_rate, second.optim.weight_decay) == ("adam", 2e-5, 0)
    for config, batch, epochs in ((first, 128, 100), (second, 4096, 300)):
        assert (config.train.global_batch_size, config.train.epochs) == (batch, epochs)
        assert (config.optim.schedule, config.optim.warmup_fraction, config.optim.clip_grad_norm) == ("constant", 0, 0)
        assert (config.model.architecture, config.model.pretrained) == ("RN50x4-quickgelu", "openai")
        assert (config.preparation.padding, config.preparation.target_ratio) == ("target", 1.25)
    assert (second.combiner.projection_dim, second.combiner.hidden_dim, second.combiner.dropout) == (2560, 5120, 0.5)


@pytest.mark.parametrize("encoder", ["both", "text", "image"])
def test_fine_tuning_trains_the_encoders_asked_for_and_no_scale(composed, encoder):
    config = settings(composed, tuning__encoder=encoder)
    model = make_task(config).new_model()
    trained = {name.removeprefix("encoder.clip.") for name, p in model.named_parameters() if p.requires_grad}
    every = {name for name, _ in model.clip.named_parameters() if name != "logit_scale"}
    image = {name for name in every if name.startswith("visual.")}
    assert trained == {"both": every, "text": every - image, "image": image}[encoder]
    assert parameters_without_gradient(make_task(config), planned_order(config), config, Worker(), local_batches) == []


def test_batch_normalisation_stays_as_it_was_and_its_weights_are_trained():
    """A ResNet tower, as of RN50x4: CLIP4Cir's code never leaves evaluation mode."""
    import open_clip

    clip = open_clip.CLIP(
        16,
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        {"width": 16, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50},
    )
    model = ComposedRetriever(DualEncoder(clip), trained="both").train()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items() if "running" in name}
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    outputs = model(images, torch.tensor([[1, 2, 49, 0, 0, 0, 0, 0]] * 3), images.flip(0))
    (outputs["query"] * outputs["target"]).sum().backward()
    assert not clip.training
    assert model.training
    assert len(before) > 10
    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in before.items())
    assert clip.visual.bn1.weight.grad.abs().sum() > 0


def test_the_query_is_the_normalised_sum_of_raw_features(composed):
    config = settings(composed)
    model = make_task(config).new_model()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = INPUTS.tokens(["add a plane", "remove the road and one of the two sheds"])
    with torch.no_grad():
        found = model(images[:1].expand(2, -1, -1, -1), tokens, images)
        reference, target = (
            model.clip.encode_image((x / 255 - model.encoder.pixel_mean) / model.encoder.pixel_std)
            for x in (images[:1].expand(2, -1, -1, -1), images)
        )
        text = model.clip.encode_text(tokens)
    torch.testing.assert_close(found["query"], F.normalize(reference + text, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["target"], F.normalize(target, dim=1), rtol=1e-4, atol=1e-5)


def test_captions_are_joined_as_published():
    captions = ["Is SHINY and silver?", " fit, and flare. "]
    texts = training_texts(captions)
    assert texts == (
        "Is shiny and silver and fit, and flare",
        "Fit, and flare and Is SHINY and silver",
        "Is shiny and silver",
        "Fit, and flare",
    )
    assert evaluation_text(captions) == texts[0]
    assert training_texts(["As It Is."]) == ("As It Is.",)
    assert training_texts(["", "x"]) == (" and x", "X and ", "", "X")
    with pytest.raises(ValueError, match="one or two"):
        training_texts(["a", "b", "c"])


def test_training_draws_the_four_texts_alike_and_only_if_asked():
    captions = ["is red", "has sleeves"]
    image = png(Image.new("RGB", (8, 8)))
    row = {"captions": captions, "reference_image": image, "target_image": image, "reference": "a", "target": "b"}
    tokens = [tuple(INPUTS.tokens([text])[0].tolist()) for text in training_texts(captions)]
    drawn = [
        tuple(TripletTransform(INPUTS, True)(row, np.random.default_rng(seed))["text"].tolist()) for seed in range(400)
    ]
    counts = [drawn.count(text) for text in tokens]
    assert sum(counts) == 400
    assert min(counts) > 60
    fixed = {tuple(TripletTransform(INPUTS, False)(row, np.random.default_rng(s))["text"].tolist()) for s in range(20)}
    assert fixed == {tokens[0]}


def test_a_long_caption_is_cut_in_training_and_in_evaluation_alike(composed, tmp_path):
    long = "two planes " * 200
    assert INPUTS.tokens([long]).shape == (1, 40)
    texts = ["add a plane", long]
    model = make_task(settings(composed)).new_model()
    with torch.no_grad():
        both = model.text_features(INPUTS.tokens(texts))
        cut = model.text_features(INPUTS.tokens(["two planes " * 30]))
    assert both.isfinite().all()
    torch.testing.assert_close(both[1], cut[0])


def test_a_broken_image_is_named():
    row = {
        "captions": ["x"],
        "reference_image": png(Image.new("RGB", (8, 8))),
        "target_image": b"no image",
        "reference": "B001",
        "target": "B002",
    }
    with pytest.raises(UserError, match="image B002: not an image"):
        TripletTransform(INPUTS, True)(row, np.random.default_rng(0))


def test_figures_of_an_evaluation_are_those_of_a_plain_loop(composed):
    config = settings(composed)
    task = make_task(config)
    model = task.new_model()
    evaluation = evaluate_split(task, config, model, "val", worker=Worker(), loader=local_batches)
    split = open_split(composed, "val")
    table, names = split.queries().to_pylist(), split.read(["source"]).column("source").to_pylist()
    with torch.no_grad():
        gallery = torch.stack([INPUTS.image(data) for data in split.read(["image"]).column("image").to_pylist()])
        gallery = model.image_features(gallery)
        queries = [
            model.compose(
                gallery[names.index(row["reference"])][None], model.text_features(INPUTS.tokens(row["captions"]))
            )[0]
            for row in table
        ]
    hits, among = [], []
    for query, row in zip(queries, table, strict=True):
        scores = {name: float(query @ F.normalize(vector, dim=0)) for name, vector in zip(names, gallery, strict=True)}
        del scores[row["reference"]]
        order = sorted(scores, key=lambda name: -scores[name])
        hits.append(order.index(row["target"]))
        among.append([name for name in order if name in row["members"]].index(row["target"]))
    metrics = evaluation.metrics
    for k in (1, 5, 10, 50):
        assert metrics[f"recall_at{k}"] == pytest.approx(100 * np.mean(np.array(hits) < k))
    for k in (1, 2, 3):
        assert metrics[f"group_recall_at{k}"] == pytest.approx(100 * np.mean(np.array(among) < k))
    queries = ComposedQueries.of(split)
    unit = F.normalize(gallery, dim=1)
    alone = composed_recalls(unit[queries.reference], unit, queries)
    assert metrics["image_only_r_mean"] == pytest.approx(alone.metrics["r_mean"])
    assert 0 < metrics["text_only_r_mean"] < 100
    assert evaluation.chance()["group_recall_at1"] == pytest.approx(20)
    low, high = evaluation.intervals()["r_mean"]
    assert low <= metrics["r_mean"] <= high


def test_the_criterion_picks_and_others_are_kept_too(composed, tmp_path):
    config = settings(
        composed,
        selection__criterion="geometric_mean",
        selection__also_keep=["recall_at1"],
        train__epochs=4,
        train__log_every_steps=1,
    )
    seen = []
    report = run_training(
        make_task(config), config, tmp_path, worker=Worker(), loader=local_batches, callback=seen.append
    )
    assert report["objective"] == "geometric_mean"
    best = {
        name: max(seen, key=lambda metrics, key=name: metrics[key])["step"] for name in ("geometric_mean", "recall_at1")
    }
    kept = {int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)}
    assert kept == {*best.values(), seen[-1]["step"]}
    assert report["best_step"] == best["geometric_mean"]


@pytest.mark.parametrize("name", ["criterion", "also_keep"])
def test_a_metric_of_the_other_protocol_is_refused(composed, name):
    wrong = "average_recall" if name == "criterion" else ["average_recall"]
    config = settings(composed, **{f"selection__{name}": wrong})
    with pytest.raises(UserError, match=r"`average_recall`, which is not measured on .*train"):
        make_task(config).check(open_split(composed, "train"))


def test_what_is_evaluated_later_and_compared_by_a_search_is_checked_before(composed, scenes, tmp_path):
    task, train = make_task(settings(composed)), open_split(composed, "train")
    val = open_split(composed, "val")
    task.check(train, [val], ["recall_at1"])
    with pytest.raises(UserError, match="`objective` names `average_recall`, which is not measured on"):
        task.check(train, [val], ["average_recall"])
    with pytest.raises(UserError, match=r"1 of 5 queries of .* have no target"):
        task.check(train, [without(val, tmp_path, target=None)])
    with pytest.raises(UserError, match="has no queries of composed retrieval"):
        task.check(train, [open_split(scenes, "val")])
    with pytest.raises(UserError, match=r"needs images, but .* holds triplets"):
        make_task(recipe_config("harma-scenes")).check(open_split(scenes, "train"), [train])


def test_data_of_another_kind_is_refused(scenes, composed):
    with pytest.raises(UserError, match=r"finetune needs triplets, but .* holds images"):
        make_task(settings(composed)).check(open_split(scenes, "train"))
    with pytest.raises(UserError, match=r"needs images, but .* holds triplets"):
        make_task(recipe_config("harma-scenes")).check(open_split(composed, "train"))
    with pytest.raises(UserError, match="has no queries of composed retrieval"):
        ComposedQueries.of(open_split(scenes, "val"))


def test_the_gallery_is_encoded_once_if_the_image_encoder_is_frozen(composed):
    config = settings(composed, tuning__encoder="text")
    task = make_task(config)
    model, read = task.new_model(), []

    def counting(source, chunks, how):
        read.append(source.split.name)
        return local_batches(source, chunks, how)

    first, second = (evaluate_split(task, config, model, "val", worker=Worker(), loader=counting) for _ in range(2))
    assert first.metrics == second.metrics
    assert read == ["val"]


def test_a_frozen_gallery_is_encoded_once_under_a_combiner_too(composed):
    config = settings(composed, "scenes-cir-combiner")
    task, read = make_task(config), []

    def counting(source, chunks, how):
        read.append(source.split.name)
        return local_batches(source, chunks, how)

    model = task.new_model()
    for _ in range(2):
        evaluate_split(task, config, model, "val", worker=Worker(), loader=counting)
    assert read == ["val"]


def test_frozen_encoders_give_the_same_in_any_chunk_and_whatever_autocast_says(composed):
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    tokens = INPUTS.tokens(["add a plane", "no river", "red roofs", "two tanks", "a road"])
    found = []
    for size, enabled in ((64, False), (2, False), (2, True)):
        config = settings(composed, "scenes-cir-combiner", train__eval_batch_size=size)
        model = make_task(config).new_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model.image_features(images), model.text_features(tokens)
        assert not any(part.requires_grad for part in features)
        found.append(torch.cat(features))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], found[1])


def test_workers_draw_dropout_of_their_own(composed):
    """At the same step the masks of two workers differ, and a worker's own come again in another run."""
    config = settings(composed, "scenes-cir-combiner", train__epochs=1)
    states = []
    for rank, seed in ((0, 0), (1, 0), (0, 0), (0, 1)):
        seeded = replace(config, seed=seed)
        task = make_task(seeded)
        TrainState(task.parameter_groups(task.new_model(), seeded.optim), seeded, 10, Worker(rank=rank, world_size=2))
        states.append(torch.rand(8))
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[3])


def test_accumulation_draws_the_same_dropout_twice(composed):
    """With a part's masks drawn anew in the second pass, gradients would belong to other outputs than the loss."""
    whole, parts = (
        settings(composed, "scenes-cir-combiner", train__accumulation=n, combiner__dropout=0.5) for n in (1, 2)
    )
    found = []
    for config in (whole, parts):
        task = make_task(config)
        model = task.new_model().train()
        stream = TrainingStream(
            planned_order(config), task.transform(training=True), config.data, Worker(), local_batches
        )
        batches = stream.steps(0, 1)
        batch = next(batches)
        batches.close()
        found.append((config, task, model, batch))
    config, task, model, batch = found[1]
    from harma_ray.training.accumulation import PartialForward

    torch.manual_seed(3)
    partial = PartialForward(model, 2, len(batch["row"]))
    loss = task.losses(partial, batch)["contrastive"]
    loss.backward()
    partial.backward(torch.enable_grad)
    expected_state = torch.get_rng_state()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 4), slice(4, 8))]
    outputs = [model(half["reference"], half["text"], half["target"]) for half in halves]
    assert torch.equal(torch.get_rng_state(), expected_state)
    joined = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    again = task.losses(lambda *_: joined, batch)["contrastive"]
    torch.testing.assert_close(again, loss)
    again.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_combiner_builds_on_what_fine_tuning_left(composed, tmp_path):
    config = settings(composed)
    run_training(make_task(config), config, tmp_path, worker=Worker(), loader=local_batches)
    last = list_checkpoints(tmp_path)[-1]
    second = settings(composed, "scenes-cir-combiner", model__tuned=str(last))
    tuned = make_task(second).new_model()
    untuned = build_clip("scenes-tiny", "random", seed=0).state_dict()
    from safetensors.torch import load_file

    trained = {name.removeprefix("encoder.clip."): t for name, t in load_file(last / "trainable.safetensors").items()}
    for name, tensor in tuned.clip.state_dict().items():
        assert torch.equal(tensor, trained.get(name, untuned[name])), name
    assert any(not torch.equal(trained[name], untuned[name]) for name in trained)
    assert {name.split(".")[0] for name, p in tuned.named_parameters() if p.requires_grad} == {"combiner"}
    seeded = settings(composed, "scenes-cir-combiner", model__tuned=str(last), seed=1)
    assert torch.equal(make_task(seeded).new_model().clip.ln_final.weight, tuned.clip.ln_final.weight)
    fingerprint = make_task(second).backbone.fingerprint(tuned)
    assert fingerprint == backbone_fingerprint(tuned) != backbone_fingerprint(build_clip("scenes-tiny", "random"))
    other = settings(composed, "scenes-cir-combiner", model__tuned=str(last), model__tuned_seed=1)
    with pytest.raises(UserError, match="was trained on a backbone with fingerprint"):
        make_task(other).new_model()


def without(split, tmp_path, **changes):
    """A copy of a split whose queries are changed."""
    table = split.queries().to_pylist()
    for name, value in changes.items():
        table[0][name] = value
    folder = tmp_path / split.name
    folder.mkdir()
    for file in split.path.iterdir():
        if file.name != QUERIES_NAME:
            (folder / file.name).symlink_to(file)
    schema = split.queries().schema
    pq.write_table(__import__("pyarrow").Table.from_pylist(table, schema=schema), folder / QUERIES_NAME)
    shard = replace(split.manifest.queries, bytes=(folder / QUERIES_NAME).stat().st_size)
    return Split(folder, replace(split.manifest, queries=shard))


def test_queries_without_targets_or_with_unknown_images_are_told(composed, tmp_path):
    split = open_split(composed, "val")
    config = settings(composed)
    hidden = without(split, tmp_path, target=None)
    stream = EvaluationStream(hidden, config.data, Worker(), local_batches)
    task = make_task(config)
    with pytest.raises(UserError, match=r"1 of 5 queries of .* have no target.*launch.py predict"):
        task.evaluate(task.new_model(), stream)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"has 1 query with images that its gallery has not"):
        ComposedQueries.of(without(split, tmp_path / "other", reference="nobody"))
