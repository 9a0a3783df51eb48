"""ViTP as a recipe: what a batch is, what training does with it, on one worker and on two, and what is measured."""

import contextlib
import datetime
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import run_on_ranks

from harma_ray.api import load_encoder, load_run
from harma_ray.cli.evaluate_run import evaluate_and_print
from harma_ray.data.convert.commands import convert_scenes, convert_scenes_talk
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.order import IndexedSplit, planned_order, read_samples
from harma_ray.data.splits import index_rows, open_split
from harma_ray.data.stream import EvaluationStream, TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.recipes import make_task, recipe_config
from harma_ray.recipes.vitp.evaluation import Answer, answer_table
from harma_ray.recipes.vitp.talks import TalkTransform, compress, reader_of
from harma_ray.recipes.vitp.task import token_drop_of
from harma_ray.recipes.vitp.vocabulary import vocabulary
from harma_ray.runs import Run, create_run, open_run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import META_NAME, list_checkpoints, load_state
from harma_ray.training.loop import run_training
from harma_ray.training.step import autocast_of, parameters_without_gradient, train_step
from harma_ray.training.tracking import read_records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    convert_scenes_talk(folder / "talks", {"train": 32, "val": 12}, style="summer", size=64)
    convert_scenes(folder / "scenes", {"train": 60, "val": 60}, style="summer", size=64)
    return folder


def settings(data, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    base = {"data.path": str(data / "talks"), "train.steps": 3, "train.eval_every_steps": 3, "selection.answers": 0}
    sizes = {"train.global_batch_size": 8, "train.log_every_steps": 1, "optim.warmup_fraction": 0}
    return build_config(recipe_config("scenes-vitp"), {**base, **sizes, **dotted})


def rows_of(config, name="train", count=8):
    split = open_split(config.data.path, name)
    samples = np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)
    return read_samples(IndexedSplit(split, index_rows(split)), samples, epoch=0).to_pylist()


def batch_of(config, rows, training=False):
    transform = TalkTransform(reader_of(config), training)
    samples = [transform(row, np.random.default_rng(0)) for row in rows]
    return {name: torch.as_tensor(value) for name, value in transform.collate(samples).items()}


def test_a_batch_holds_tiles_in_the_order_of_their_marks(data):
    config = settings(data)
    rows = rows_of(config, count=20)
    batch = batch_of(config, rows)
    image_id = vocabulary().convert_tokens_to_ids("<IMG_CONTEXT>")
    tokens = (batch["ids"] == image_id).sum(1).tolist()
    assert tokens == [4 * len(row["images"]) for row in rows]
    assert {0, 4, 8} <= set(tokens)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for row in rows for data in row["images"]]
    assert torch.equal(batch["pixels"], torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]))
    for place, row in enumerate(rows):
        written = vocabulary().decode(batch["ids"][place][batch["mask"][place].bool()])
        supervised = vocabulary().decode(batch["labels"][place][batch["labels"][place] != IGNORED])
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert supervised == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert written.count("<img>") == len(row["images"])
        assert vocabulary().encode(written) == batch["ids"][place][batch["mask"][place].bool()].tolist()
    assert not batch["ids"][batch["mask"] == 0].any()


def test_a_batch_of_texts_alone_carries_a_white_tile(data):
    config = settings(data)
    row = next(row for row in rows_of(config, count=32) if not row["images"])
    batch = batch_of(config, [row, row])
    assert (batch["pixels"].shape, int(batch["pixels"].min())) == ((1, 3, 64, 64), 255)


def test_several_images_share_the_tiles_of_a_talk(data):
    config = settings(data, talk__max_tiles=4)
    rows = rows_of(config, count=20)
    two = next(row for row in rows if len(row["images"]) == 2)
    wide = [Image.new("RGB", (128, 64)), Image.new("RGB", (64, 64))]
    reader = reader_of(config)
    assert [len(tiles) for tiles in reader.cut(wide, two["max_tiles"])] == [2 + 1, 1]
    assert [len(tiles) for tiles in reader.cut(wide[:1], 1)] == [1]


def test_some_data_sets_are_compressed_anew_in_training_alone(data):
    config = settings(data)
    row = {**next(row for row in rows_of(config) if row["images"]), "augment": True}
    plain, trained = (batch_of(config, [row], training)["pixels"] for training in (False, True))
    quality = int(np.random.default_rng(0).integers(75, 101))
    picture = Image.fromarray(plain[0].permute(1, 2, 0).numpy())
    assert torch.equal(trained[0], torch.from_numpy(np.array(compress(picture, quality))).permute(2, 0, 1))
    assert not torch.equal(plain, trained)
    assert torch.equal(batch_of(config, [{**row, "augment": False}], training=True)["pixels"], plain)


def test_a_talk_whose_image_would_be_cut_is_refused_by_name(data):
    config = settings(data, talk__max_tokens=12)
    stream = TrainingStream(planned_order(config), make_task(config).transform(training=True), config.data, Worker(),
                            local_batches)  # fmt: skip
    with pytest.raises(
        UserError, match=r"row \d+ \(summer scene \d+ of seed 0\): has \d+ tokens, of which 12 are read"
    ):
        next(stream.steps(0, 1))


def test_the_presets_of_token_drop(data):
    drop = {preset: token_drop_of(settings(data, token_drop__preset=preset, token_drop__ratio=0.75).token_drop)
            for preset in ("paper", "released", "guide", "none")}  # fmt: skip
    shown = {name: (found.ratio, found.probability, found.mode) for name, found in drop.items()}
    assert shown["paper"] == (0.75, 1, "drop")
    assert shown["released"] == (0.75, 0.25, "drop")
    assert shown["guide"] == (0.3, 0.75, "zero")
    assert shown["none"][:2] == (0, 0)
    half = token_drop_of(settings(data, token_drop__preset="released", token_drop__ratio=0.6).token_drop)
    assert (half.ratio, half.probability) == (0.6, pytest.approx(0.4))


def test_every_parameter_learns_from_any_batch(data):
    config = settings(data)
    task = make_task(config)
    found = parameters_without_gradient(task, planned_order(config), config, Worker(), local_batches)
    assert found == []


@pytest.mark.parametrize("preset", ["paper", "guide"])
def test_a_step_asks_its_device_for_nothing(data, preset):
    """Whoever asks torch's ``meta`` device for a value fails; a GPU would have to be waited for."""
    config = settings(data, train__accumulation=2, model__activation_checkpointing=True, token_drop__preset=preset)
    task = make_task(config)
    model = task.new_model().to("meta").train()
    worker = Worker(device="meta")
    stream = TrainingStream(
        planned_order(config), task.transform(training=True), config.data, worker, local_batches
    ).steps(0, 1, 2)
    parts = [next(stream) for _ in range(2)]
    train_step(task, model, parts, config.train, autocast_of(config.train, torch.device("cpu")))
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.requires_grad)
    assert [name for name, tensor in parts[0].items() if tensor.is_meta] == ["pixels"]
    assert int(task.amounts(parts[0])["tokens"]) > 4


def test_accumulation_changes_nothing(data):
    config = settings(data, token_drop__preset="none", model__drop_path=0)
    rows = rows_of(config, count=8)
    gradients = []
    for parts in (1, 4):
        task = make_task(config)
        model = task.new_model().train()
        batches = [batch_of(config, rows[n * 8 // parts : (n + 1) * 8 // parts]) for n in range(parts)]
        terms = train_step(task, model, batches, config.train, autocast_of(config.train, torch.device("cpu")))
        gradients.append([float(terms["talk"]), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    (loss, *one), (other, *four) = gradients
    assert loss == pytest.approx(other, rel=1e-6)
    for whole, parts in zip(one, four, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_what_is_measured_is_recorded_and_selects(data, tmp_path):
    features = {"features.data": str(data / "scenes"), "selection.criterion": "top_1", "selection.also_keep": ["loss"]}
    config = build_config(settings(data, selection__answers=7, train__eval_batch_size=4), features)
    report = train(config, tmp_path)
    final = report["metrics"]["val"]
    assert {"loss", "token_accuracy", "answers", "top_1", "top_3", "top_5", "map"} <= set(final)
    steps = [record for record in read_records(tmp_path) if record["kind"] == "step"]
    assert {"tokens_per_second", "tiles_per_second"} <= set(steps[0])
    watched = [record for record in read_records(tmp_path) if record["kind"] == "monitor"]
    assert {"token_accuracy", "dropped_percent"} <= set(watched[0])
    assert watched[0]["dropped_percent"] > 1
    evaluations = [record for record in read_records(tmp_path) if record["kind"] == "evaluation"]
    assert final["top_1"] == max(record["top_1"] for record in evaluations)


def test_a_run_goes_on_with_the_labelled_data_it_was_begun_on(data, tmp_path):
    """A checkpoint of before, which does not say what that held, is gone on with, and that is said."""
    labelled = shutil.copytree(data / "scenes", tmp_path / "labelled")
    short = settings(data, features__data=str(labelled), train__steps=2, train__eval_every_steps=1)

    class Stop(Exception):
        pass

    def stop(metrics):
        if metrics["step"] == 1:
            raise Stop

    with pytest.raises(Stop):
        train(short, tmp_path / "run", callback=stop)
    shutil.rmtree(labelled)
    convert_scenes(labelled, {"train": 60, "val": 60}, style="summer", size=64, settings=WriteSettings(seed=1))
    with pytest.raises(UserError, match=r"`features.data/train` held 60 .*; `features.data/val` held 60 .*new run"):
        train(short, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run"):
        meta = json.loads((path / META_NAME).read_text())
        meta["data"] = {name: split for name, split in meta["data"].items() if "/" not in name}
        (path / META_NAME).write_text(json.dumps(meta))
    assert train(short, tmp_path / "run")["steps"] == 2
    (notice,) = [record["text"] for record in read_records(tmp_path / "run") if record["kind"] == "notice"]
    assert "does not say what features.data/train, features.data/val held" in notice


def test_the_learning_rate_of_every_layer_is_recorded_where_they_differ(data, tmp_path):
    train(settings(data, groups__layer_decay=0.5, optim__schedule="linear"), tmp_path)
    steps = [record for record in read_records(tmp_path) if record["kind"] == "step"]
    names = ["vision_embeddings", *(f"vision_layer_{number}" for number in range(4)), "rest"]
    for done, record in enumerate(steps):
        peak = 1e-3 * (1 - done / 3)
        found = [record[f"learning_rate_{name}"] for name in names]
        assert found == pytest.approx([peak * 0.5**distance for distance in (5, 4, 3, 2, 1, 0)])
        assert record["learning_rate"] == pytest.approx(peak)
    state = load_state(list_checkpoints(tmp_path)[-1])
    assert not any("name" in group for group in state["optimizer"]["param_groups"])


def test_answers_are_drawn_beside_the_true_ones(data):
    config = settings(data, selection__answers=5)
    task, split = make_task(config), open_split(config.data.path, "val")
    with torch.no_grad():
        found = task.evaluate(task.new_model().eval(), EvaluationStream(split, config.data, Worker(), local_batches))
    assert [answer.row for answer in found.answers] == list(range(5))
    for answer, row in zip(found.answers, rows_of(config, "val", 5), strict=True):
        assert (answer.kind, answer.truth) == (row["dataset"], row["conversations"][1]["value"])
    picture = np.asarray(found.picture(split))
    assert np.asarray(found.picture(split)).std() > 10
    assert (picture[8 : 8 + 176, 8 : 8 + 176] != 255).any()
    (section, _) = found.sections(split)
    assert "always the commonest" in section.html


def test_the_page_of_a_run_shows_classes_beside_answers(data, tmp_path):
    config = settings(data, selection__answers=9, features__data=str(data / "scenes"))
    run = create_run(tmp_path, "one", config)
    train(config, run.path)
    assert (run.path / "tensorboard" / "projector_config.pbtxt").is_file()
    evaluate_and_print(
        config, str(run.path), split="val", json_file=str(tmp_path / "found.json"), report=str(tmp_path / "page")
    )
    html = (tmp_path / "page" / "index.html").read_text()
    titles = ("Answers by kind of question", "Some queries", "Classes", "Confusion", "Embeddings")
    assert [title for title in titles if f">{title}</h2>" not in html] == []
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"answers", "top_1", "top_3", "top_5", "map"} <= set(found["metrics"])
    assert {"top_1", "map"} <= set(found["interval_95"]) & set(found["chance"])
    rows = rows_of(build_config(config, {"data.path": str(data / "scenes")}), "val", 60)
    cells = re.findall(r"<tr><td[^>]*>([^<]+)</td><td[^>]*>[^<]*</td>" + r"<td[^>]*>([\d.,]+)</td>" * 6, html)
    queries = Counter(row["label_name"] for row in rows)
    assert {name: int(count) for name, count, *_ in cells} == dict(queries)
    for place, metric in enumerate(("top_1", "top_3", "top_5", "map"), start=3):
        mean = sum(float(row[place]) * int(row[1]) for row in cells) / 60
        assert mean == pytest.approx(found["metrics"][metric], abs=0.06)


def test_an_image_does_not_find_itself(data):
    """Queries and gallery are one split: each image is ranked among the others alone."""
    config = settings(data, features__data=str(data / "scenes"), features__gallery="val")
    task = make_task(config)
    model = task.new_model().eval()
    with torch.no_grad():
        stream = EvaluationStream(open_split(config.data.path, "val"), config.data, Worker(), local_batches)
        found = task.evaluate(model, stream).metrics
    rows = rows_of(build_config(config, {"data.path": str(data / "scenes")}), "val", 60)
    encoder = task.encoder(model, "cpu")
    images = [Image.open(io.BytesIO(row["image"])) for row in rows]
    vectors = encoder.encode_images(torch.stack([encoder.prepare(image) for image in images]))
    scores = (vectors @ vectors.T).fill_diagonal_(-2)
    names = [row["label_name"] for row in rows]
    counted = [place for place, name in enumerate(names) if names.count(name) > 1]
    right = [names[int(scores[place].argmax())] == names[place] for place in counted]
    assert len(counted) == len(rows)
    assert found["top_1"] == pytest.approx(100 * sum(right) / len(right))
    assert found["top_1"] < 100


def train(config, folder, **more):
    return run_training(make_task(config), config, folder, worker=Worker(), loader=local_batches, **more)


def test_the_loss_of_an_evaluation_is_that_of_all_talks_one_by_one(data):
    config = settings(data)
    task = make_task(config)
    model = task.new_model().eval()
    found = {}
    for size in (1, 5):
        changed = build_config(config, {"train.eval_batch_size": size})
        stream = EvaluationStream(open_split(config.data.path, "val"), config.data, Worker(), local_batches)
        with torch.no_grad():
            found[size] = make_task(changed).evaluate(model, stream).metrics
    assert found[1] == pytest.approx(found[5], rel=1e-5)
    total = count = 0.0
    for row in rows_of(config, "val", 12):
        batch = batch_of(config, [row])
        with torch.no_grad():
            logits = model.core(
                input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=normalised(batch["pixels"])
            ).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != IGNORED).sum())
    assert found[1]["loss"] == pytest.approx(total / count, rel=1e-5)


def normalised(pixels):
    mean, std = (torch.tensor(values)[None, :, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.float() / 255 - mean) / std


def test_a_run_goes_on_to_the_bit(data, tmp_path):
    class Stop(Exception):
        pass

    def callback(metrics):
        if metrics["step"] == 2:
            raise Stop

    config = settings(data, train__eval_every_steps=2, train__steps=4)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", callback=callback)
    assert train(config, tmp_path / "parts")["metrics"] == whole["metrics"]


def test_answers_are_counted_by_kind_against_the_commonest():
    said = [("count", "two", "Two."), ("count", "two", "two"), ("count", "one", "two"), ("scene", "a  farm", "A farm")]
    answers = [Answer(n, kind, "?", answer, truth) for n, (kind, answer, truth) in enumerate(said)]
    count, scene = answer_table(answers)
    assert (count.kind, count.asked, scene.right) == ("count", 3, 100)
    assert count.right == pytest.approx(200 / 3)
    assert count.commonest == 100


def test_a_run_answers_questions_and_encodes_images(data, tmp_path):
    config = settings(data)
    run = create_run(tmp_path, "one", config)
    train(config, run.path)
    model = load_run(run.path, "cpu")
    images = [Image.new("RGB", (90, 64), colour) for colour in ("red", "green")]
    answers = {
        model.ask(images[0], "What kind of place is it?", 5),
        model.ask([images[0]], "What kind of place is it?", 5),
    }
    assert len(answers) == 1
    assert isinstance(model.ask(images, "<image> and <image>?", 3), str)
    with pytest.raises(UserError, match="has 2 images but only 1 mark "):
        model.ask(images, "<image>?")
    with pytest.raises(UserError, match=r"`max_tokens` must be at least 1, got 0"):
        model.ask(images[0], "Where?", 0)
    _, identity = load_encoder(run, run.best_checkpoint(), "cpu")
    assert {name: identity.values[name] for name in ("layer", "pooling", "image_size", "interpolation")} == {
        "layer": -1,
        "pooling": "mean_all",
        "image_size": 64,
        "interpolation": "bilinear",
    }
    moved = shutil.copytree(run.path, tmp_path / "moved")
    again = open_run(moved)
    assert load_encoder(again, again.best_checkpoint(), "cpu")[1] == identity
    pooled = Run(run.path, build_config(config, {"features.pooling": "cls"}))
    assert load_encoder(pooled, pooled.best_checkpoint(), "cpu")[1].differing(identity) == "pooling"
    other = create_run(tmp_path, "two", build_config(config, {"seed": 1}))
    train(other.config, other.path)
    assert load_encoder(other, other.best_checkpoint(), "cpu")[1].differing(identity) == "backbone, weights"
    vectors = model.encode_images(images)
    core = run.load_model().core.model.vision_tower
    squares = [
        torch.from_numpy(np.array(i.resize((64, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) for i in images
    ]
    with torch.no_grad():
        states = core(normalised(torch.stack(squares))).last_hidden_state.mean(1)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(states, dim=-1), rtol=1e-4, atol=1e-5)


def test_without_the_extra_one_line_says_what_to_install(data):
    program = """
import sys
sys.modules["transformers"] = sys.modules["tokenizers"] = sys.modules["faiss"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in ("transformers", "tokenizers") else find(name, *more)
from harma_ray.cli import main
sys.exit(main(sys.argv[1:]))
"""
    ran = [
        subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                "train",
                "--recipe",
                name,
                "--data",
                str(data / folder),
                "--runs",
                str(data / "runs"),
                "--set",
                "train.global_batch_size=1000000",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        for name, folder in (("scenes-vitp", "talks"), ("scenes-pretrain", "scenes"))
    ]
    assert [found.returncode for found in ran] == [2, 2]
    assert ran[0].stderr == 'error: InternVL needs the library transformers; pip install "harma-ray[vitp]"\n'
    assert "must not exceed" in ran[1].stderr


def test_settings_that_contradict_each_other_are_refused(data):
    config = settings(data, features__data=str(data / "talks"))
    train_split = open_split(config.data.path, "train")
    for named, metrics in (({"selection__criterion": "top_1"}, []), ({}, ["loss", "top_1"])):
        with pytest.raises(UserError, match=r"names top_1, which needs `features\.data`"):
            make_task(settings(data, **named)).check(train_split, [], metrics)
    with pytest.raises(UserError, match=r"names map, which needs `features\.data`"):
        make_task(settings(data, selection__also_keep=["map"])).check(train_split, [])
    with pytest.raises(UserError, match=r"`objective` names answers, which needs `selection\.answers`"):
        make_task(settings(data)).check(train_split, [], ["answers"])
    with pytest.raises(UserError, match=r"`features\.data` needs images, but .* holds talks"):
        make_task(config).check(train_split, [open_split(config.data.path, "val")])


def work(rank, folder, data):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    for name, config in both(Path(data)).items():
        worker = Worker(rank=rank, world_size=2)
        run_training(make_task(config), config, Path(folder) / name, worker=worker, loader=local_batches)
        dist.barrier()
    for name, ways in (("undisturbed", ["ddp"]), ("resumed", ALTERNATING)):
        for number, way in enumerate(ways, start=1):
            config = restless(Path(data), way)
            with contextlib.suppress(Stop):
                run_training(
                    make_task(config), config, Path(folder) / name, worker=worker, loader=local_batches,
                    callback=partial(stop_at, 2 * number if len(ways) > 1 else 6),
                )  # fmt: skip
            dist.barrier()
    dist.destroy_process_group()


class Stop(Exception):
    pass


ALTERNATING = ["ddp", "fsdp2", "ddp"]


def stop_at(step, metrics):
    if metrics["step"] == step < 6:
        raise Stop


def restless(data, way):
    """All that a checkpoint must bring back: moments of groups of parameters, of some none, and random numbers."""
    return settings(
        data, model__parallel=way, model__activation_checkpointing=True, model__drop_path=0.4,
        model__freeze_vision_layers=1, groups__layer_decay=0.6, train__accumulation=2, train__steps=6,
        train__eval_every_steps=2, optim__learning_rate=3e-3,
    )  # fmt: skip


def both(data):
    plain = {
        "token_drop__preset": "none",
        "model__drop_path": 0,
        "selection__answers": 5,
        "train__steps": 4,
        "train__eval_batch_size": 2,
    }
    return {way: settings(data, model__parallel=way, **plain) for way in ("ddp", "fsdp2")}


def test_two_workers_train_as_one_whole_or_spread_or_in_turns(data, tmp_path):
    run_on_ranks(work, 2, str(tmp_path), str(data))
    for name, config in both(data).items():
        one = train(config, tmp_path / f"one-{name}")
        two = json.loads((tmp_path / name / "report.json").read_text())
        assert two["metrics"]["val"] == pytest.approx(one["metrics"]["val"], rel=1e-4)
        losses = [
            [record["loss"] for record in read_records(folder) if record["kind"] == "step"]
            for folder in (tmp_path / name, tmp_path / f"one-{name}")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    whole, resumed = (list(read_records(tmp_path / name)) for name in ("undisturbed", "resumed"))
    for kind, count in (("step", 6), ("evaluation", 4)):
        found, expected = ([each["loss"] for each in run if each["kind"] == kind] for run in (resumed, whole))
        assert len(found) == count
        assert found == pytest.approx(expected, rel=1e-4)
    assert [each["kind"] for each in resumed].count("start") == len(ALTERNATING)
