import contextlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from disk import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from harma_ray.config import OptimConfig
from harma_ray.data.order import planned_order
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.import_export import load_model
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.recording import RecordedEncoder
from harma_ray.recipes import changed_settings, make_task, recipe_config
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints, load_state, load_weights, read_meta
from harma_ray.training.divergence import GuardedOptimizer, TrainingDiverged
from harma_ray.training.loop import _Training, run_training
from harma_ray.training.optim import build_optimizer, build_schedule, learning_rate_factor
from harma_ray.training.sinks import Label
from harma_ray.training.step import evaluate_split, parameters_without_gradient
from harma_ray.training.tracking import read_records

SMALL = {
    "train.global_batch_size": 20,
    "train.epochs": 2,
    "train.log_every_steps": 1,
    "adapter.width": 16,
    "adapter.shared_width": 8,
    "adapter.num_heads": 4,
    "optim.learning_rate": 1e-3,
}


def settings(scenes, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return build_config(recipe_config("harma-scenes"), {**SMALL, "data.path": str(scenes), **dotted})


def run(config, path, callback=lambda metrics: None, loader=local_batches):
    return run_training(make_task(config), config, Path(path), worker=Worker(), loader=loader, callback=callback)


def weights(config, path):
    return dict(Run(Path(path), config).load_model().named_parameters())


class Stop(Exception):
    pass


def stop_after(epoch):
    def callback(metrics):
        if metrics["epoch"] == epoch:
            raise Stop

    return callback


@pytest.fixture(scope="module")
def begun(scenes, tmp_path_factory):
    """A run that was stopped after its first epoch."""
    path = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stop):
        run(settings(scenes), path, stop_after(1))
    return path


@pytest.fixture
def stopped(begun, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(begun, tmp_path / "stopped")


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    config, path = settings(scenes), tmp_path_factory.mktemp("run")
    return config, path, run(config, path)


def test_a_run_leaves_its_record_report_and_checkpoints(finished):
    _, path, report = finished
    assert json.loads((path / "report.json").read_text()) == report
    assert report["steps"] == report["planned_steps"] == 20
    assert set(report["metrics"]) == {"val", "test"}
    records = list(read_records(path))
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["epoch"] for record in evaluations] == [0, 1, 2]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 21))
    best = max(evaluations, key=lambda record: record["r_mean"])
    assert report["best_step"] == best["step"]
    assert report["metrics"]["val"]["r_mean"] == pytest.approx(best["r_mean"])
    assert 1 <= len(list_checkpoints(path)) <= 2
    assert list((path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_chosen_metric_picks_the_best_epoch_and_others_keep_theirs(scenes, tmp_path):
    chosen = {"selection.criterion": "r_mean_text", "selection.also_keep": ["img_r1"], "train.captions": "one"}
    seen = []
    report = run(
        build_config(settings(scenes), {**chosen, "train.epochs": 5, "optim.learning_rate": 0.03}),
        tmp_path,
        seen.append,
    )
    steps = {name: max(seen, key=lambda found: found[name])["step"] for name in ("r_mean_text", "img_r1", "r_mean")}
    assert len(set(steps.values())) > 1
    assert (report["objective"], report["best_step"]) == ("r_mean_text", steps["r_mean_text"])
    kept = {int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)}
    assert kept == {steps["r_mean_text"], steps["img_r1"], seen[-1]["step"]}


def read_events(path):
    accumulator = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def test_tensorboard_shows_what_the_record_tells(finished):
    _, path, _ = finished
    events, records = read_events(path), list(read_records(path))
    steps = [record for record in records if record["kind"] == "step"]
    for group, keys in (("main", ("loss", "learning_rate")),
                        ("train", ("grad_norm", "loss_contrastive", "loss_triplet", "pairs_per_second", "memory_mb",
                                   "data_wait_fraction"))):  # fmt: skip
        for key in keys:
            shown = [(event.step, event.value) for event in events.Scalars(f"{group}/{key}")]
            assert shown == [(record["step"], pytest.approx(record[key], rel=1e-6)) for record in steps], key
    evaluations = {r["step"]: r for r in records if r["kind"] == "evaluation"}
    for tag, key in (("main/val_r_mean", "r_mean"), ("val/img_r1_text", "img_r1_text")):
        assert scalars(events, tag) == {step: pytest.approx(r[key]) for step, r in evaluations.items()}
    best = np.maximum.accumulate([r["r_mean"] for r in evaluations.values()])
    assert scalars(events, "main/best_val_r_mean") == dict(zip(evaluations, map(pytest.approx, best), strict=True))
    assert len(events.Scalars("weights/temperature")) == len(steps)
    gates = [tag for tag in events.Tags()["scalars"] if tag.startswith("weights/gate/")]
    assert len(gates) == 2 * len({tag.rpartition("/")[0] for tag in gates}) > 0
    assert [event.step for event in events.Images("retrievals")] == [0, 10, 20]
    assert list((path / "tensorboard").rglob("metadata.tsv"))


def test_tensorboard_has_curves_where_there_are_curves_and_final_figures_in_a_table(finished):
    """Only what was evaluated once, test, is a point, by what selects epochs alone."""
    _, path, report = finished
    events = read_events(path)
    curves = {tag: tuple(scalars(events, tag).items()) for tag in events.Tags()["scalars"]}
    assert [tag for tag, points in curves.items() if len(points) == 1] == ["main/test_r_mean"]
    assert curves["main/test_r_mean"] == ((20, pytest.approx(report["metrics"]["test"]["r_mean"])),)
    assert curves["main/best_val_r_mean"][-1][1] == pytest.approx(report["metrics"]["val"]["r_mean"])
    recorded = [points for tag, points in curves.items() if not tag.startswith(("main/best_", "val/", "weights/gate/"))]
    assert len(set(recorded)) == len(recorded)  # none stands twice
    assert sorted(tag for tag in curves if tag.startswith("main/")) == [
        "main/best_val_r_mean", "main/learning_rate", "main/loss", "main/test_r_mean", "main/val_r_mean",
    ]  # fmt: skip
    (table,) = events.Tensors("final figures/text_summary")
    rows = [re.split(r" *\| *", line) for line in table.tensor_proto.string_val[0].decode().splitlines()]
    assert rows[0][1:-1] == ["metric", "", "val", "test"]
    found = {row[1]: row[3:-1] for row in rows[2:]}
    assert found == {
        name: [f"{report['metrics'][split][name]:.2f}" for split in ("val", "test")]
        for name in report["metrics"]["val"]
    }


def scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


def test_the_hparams_page_shows_what_was_set_by_hand_then_key_settings(finished, scenes, tmp_path):
    """A run has no table of its own, which TensorBoard would take for all runs of a folder."""
    _, path, _ = finished
    config = settings(scenes, train__captions="one")  # five times fewer steps
    label = Label.of(tmp_path / "mine", changed_settings(config))
    run_training(make_task(config), config, tmp_path / "mine", worker=Worker(), loader=local_batches, label=label)
    by_hand = {key: SMALL[key] for key in SMALL if "log_every" not in key} | {"train.captions": "one"}
    for folder, changed in ((path, {}), (tmp_path / "mine", by_hand)):
        metadata = read_events(folder).summary_metadata
        assert not [tag for tag in metadata if "experiment" in tag]
        content = metadata["_hparams_/session_start_info"].plugin_data.content
        start = HParamsPluginData.FromString(content).session_start_info
        shown = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
        key = {"optim.learning_rate": 1e-3, "train.global_batch_size": 20, "train.epochs": 2, "seed": 0}
        assert shown == {**changed, **key}
        assert "_hparams_/session_end_info" in metadata


def test_the_backbone_is_not_copied_into_checkpoints(finished):
    config, path, report = finished
    model = make_task(config).new_model()
    trainable = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert read_meta(list_checkpoints(path)[-1]).trainable == trainable
    backbone_bytes = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    assert report["checkpoint_bytes"] < backbone_bytes / 20


def test_a_resumed_run_ends_bit_for_bit_like_one_never_stopped(finished, stopped):
    config, path, report = finished
    resumed = run(config, stopped)
    assert resumed["metrics"] == report["metrics"]
    last, expected = list_checkpoints(stopped)[-1], list_checkpoints(path)[-1]
    assert (last / "trainable.safetensors").read_bytes() == (expected / "trainable.safetensors").read_bytes()
    moments, others = load_state(last)["optimizer"]["state"], load_state(expected)["optimizer"]["state"]
    assert all(torch.equal(moments[key]["exp_avg_sq"], others[key]["exp_avg_sq"]) for key in others)
    steps = [record["step"] for record in read_records(stopped) if record["kind"] == "step"]
    assert steps == list(range(1, 21))
    assert [event.step for event in read_events(stopped).Scalars("main/loss")] == steps


def test_a_run_that_starts_anew_forgets_its_first_attempt(finished, stopped):
    config, path, _ = finished
    shutil.rmtree(stopped / "checkpoints")
    run(config, stopped)
    kinds = [[record["kind"] for record in read_records(folder)] for folder in (path, stopped)]
    assert kinds[0] == kinds[1]
    assert [event.step for event in read_events(stopped).Scalars("main/loss")] == list(range(1, 21))


def last_seconds(path):
    """What the last checkpoint knows of the time spent in training."""
    return read_meta(list_checkpoints(path)[-1]).progress["seconds"]


def test_a_run_resumes_inside_an_epoch_bit_for_bit(finished, scenes, tmp_path):
    config, path, _ = finished
    often = replace(config, train=replace(config.train, checkpoint_every_steps=3))

    def ends_after_13_steps(source, chunks, how):
        for step, batch in enumerate(local_batches(source, chunks, how)):
            if how.batch_size == 20 and step == 13:
                raise Stop
            yield batch

    told = []
    with pytest.raises(Stop):
        run(often, tmp_path, lambda _: told.append(last_seconds(tmp_path)), loader=ends_after_13_steps)
    assert read_meta(list_checkpoints(tmp_path)[-1]).step == 12
    assert last_seconds(tmp_path) > told[-1] > told[0] == 0  # those of steps 11 and 12 too
    run(often, tmp_path)
    last, expected = list_checkpoints(tmp_path)[-1], list_checkpoints(path)[-1]
    assert (last / "trainable.safetensors").read_bytes() == (expected / "trainable.safetensors").read_bytes()


def test_training_moves_the_trainable_parameters_and_nothing_else(scenes, tmp_path):
    config = settings(scenes, train__epochs=1)
    before = {name: p.detach().clone() for name, p in make_task(config).new_model().named_parameters()}
    run(config, tmp_path, lambda metrics: None)
    task = make_task(config)
    model = task.new_model()
    load_weights(list_checkpoints(tmp_path)[-1], model, backbone=backbone_fingerprint(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_exact_accumulation_gives_the_gradients_of_the_whole_batch(scenes):
    from harma_ray.data.order import training_order
    from harma_ray.data.splits import open_split
    from harma_ray.data.stream import TrainingStream
    from harma_ray.training.step import autocast_of, train_step

    config = settings(scenes, loss__center_factor=0.1)
    task = make_task(config)
    order = training_order(open_split(scenes, "train"), seed=0, global_batch_size=20, shuffle_window_mb=256)
    batch = next(TrainingStream(order, task.transform(training=True), config.data, Worker(), local_batches).steps(0, 1))
    gradients = []
    for parts in (1, 3):
        model = task.new_model()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel()).view(parameter.shape)))
        train = replace(config.train, accumulation=parts)
        train_step(task, model, [batch], train, autocast_of(train, torch.device("cpu")))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=float(1e-4 * scale))


@pytest.mark.parametrize("defers", [False, True], ids=["told at once", "told later, as on a GPU"])
@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, 0),
        ({"train__log_every_steps": 1000}, 0),
        ({"train__log_every_steps": 1000, "train__checkpoint_every_steps": 1}, 1),
    ],
    ids=["logged", "between", "saved"],
)
def test_a_loss_that_is_not_finite_stops_with_step_worker_and_terms(
    scenes, tmp_path, defers, changes, last, monkeypatch
):
    """The second step's: the first has moved the weights too far."""
    begin = GuardedOptimizer.__init__

    def begin_deferring(guarded, *arguments):
        begin(guarded, *arguments)
        guarded._defers = defers

    monkeypatch.setattr(GuardedOptimizer, "__init__", begin_deferring)
    config = settings(scenes, optim__learning_rate=1e30, optim__warmup_fraction=0, **changes)
    with pytest.raises(TrainingDiverged, match=r"step 2 on worker 0 \(contrastive=.*triplet="):
        run(config, tmp_path)
    assert read_meta(list_checkpoints(tmp_path)[-1]).step == last


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_train_as_they_do_otherwise_and_evaluate_uncompiled(scenes, tmp_path, monkeypatch):
    """Compiled into graphs that run as they stand, which count their calls."""
    calls, compile_module = {True: 0, False: 0}, torch.nn.Module.compile

    def keep(graph, inputs):
        def call(*arguments):
            calls[torch.is_grad_enabled()] += 1
            return graph.forward(*arguments)

        return call

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=keep))
    curves = []
    for compiles in (False, True):
        path = tmp_path / str(compiles)
        run(settings(scenes, train__compile=compiles, train__epochs=1), path)
        curves.append([(record["step"], record.get("loss"), record.get("r_mean")) for record in read_records(path)])
    torch.compiler.reset()
    assert calls[True] > 0
    assert calls[False] == 0
    assert [row[0] for row in curves[1]] == [row[0] for row in curves[0]]
    numbers = [[value for row in curve for value in row[1:] if value is not None] for curve in curves]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)


def test_what_can_be_recorded_on_a_gpu_is_unless_it_is_not_wanted(scenes):
    cases = [
        ({}, "cuda", True), ({}, "cpu", False), ({"train__cuda_graphs": False}, "cuda", False),
        ({"train__accumulation": 2}, "cuda", False), ({"model__activation_checkpointing": True}, "cuda", False),
    ]  # fmt: skip
    for changes, device, expected in cases:
        task = make_task(settings(scenes, **changes))
        model = task.new_model()
        found = task.quicken(model, torch.device(device))
        assert isinstance(found, RecordedEncoder) == expected, changes
        assert expected or found is model


def test_a_gradient_that_is_not_finite_leaves_the_weights(scenes, tmp_path):
    config = settings(scenes)
    task = make_task(config)

    class Spoiled:
        def __getattr__(self, name):
            return getattr(task, name)

        def losses(self, model, batch):
            terms = task.losses(model, batch)
            return {**terms, "spoiled": terms["contrastive"].sub(terms["contrastive"].detach()).sqrt()}  # 0, slope inf

    with pytest.raises(TrainingDiverged, match=r"step 1 on worker 0 \(.*spoiled=0\.0, grad_norm=(nan|inf)"):
        run_training(Spoiled(), config, tmp_path, worker=Worker(), loader=local_batches)


def test_an_import_cannot_be_trained_on(random_run):
    with pytest.raises(UserError, match="weights alone"):
        run(random_run.config, random_run.path)


def test_the_released_way_of_picking_on_test_touches_no_val(scenes, tmp_path):
    config = settings(scenes, train__select_on="test-as-in-released-code", train__epochs=1)
    report = run(config, tmp_path)
    assert report["selected_on"] == "test"
    assert set(report["metrics"]) == {"test"}
    assert {r["split"] for r in read_records(tmp_path) if r["kind"] == "evaluation"} == {"test"}


def test_bf16_follows_fp32(finished, scenes, tmp_path):
    _, path, _ = finished
    run(settings(scenes, train__precision="bf16", train__epochs=1), tmp_path)
    exact, rounded = ([r["loss"] for r in read_records(p) if r["kind"] == "step"][:3] for p in (path, tmp_path))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_patience_stops_a_run_early(scenes, tmp_path):
    config = settings(scenes, optim__learning_rate=1e-12, train__epochs=9, train__early_stopping_patience=2)
    report = run(config, tmp_path)
    assert report["stopped_early"]
    assert report["steps"] == 20
    assert run(config, tmp_path)["steps"] == 20


def test_zero_shot_trains_nothing_and_reports_the_backbone(scenes, tmp_path):
    report = run(settings(scenes, model__tuning="none"), tmp_path)
    assert (report["steps"], report["trainable_parameters"]) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__tuning": "full"},
        {"loss__triplet": "hardest"},
        {"loss__triplet": "plain", "loss__contrastive": False},
        {"loss__center_factor": 0.5},
        {"model__text_tokens": "full"},
        {"adapter__share_across_modalities": True},
        {"model__activation_checkpointing": True},
        {"loss__same_image_negatives": False},
    ],
)
def test_every_trainable_parameter_gets_a_gradient(scenes, changes):
    config = settings(scenes, **changes)
    assert parameters_without_gradient(make_task(config), planned_order(config), config, Worker(), local_batches) == []


def test_a_parameter_without_a_gradient_is_found(scenes):
    config = settings(scenes)
    task = make_task(config)

    class Careless:
        def __getattr__(self, name):
            return getattr(task, name)

        def new_model(self):
            model = task.new_model()
            model.forgotten = torch.nn.Parameter(torch.zeros(1))
            return model

    assert parameters_without_gradient(Careless(), planned_order(config), config, Worker(), local_batches) == [
        "forgotten"
    ]


def test_resuming_with_other_settings_is_refused(scenes, stopped):
    with pytest.raises(UserError, match="other settings"):
        run(settings(scenes, loss__gamma=1.0), stopped)


def test_a_checkpoint_of_another_backbone_is_refused(finished):
    config, path, _ = finished
    other = replace(config, seed=1)
    with pytest.raises(UserError, match=r"fingerprint"):
        load_model(list_checkpoints(path)[-1], other)


def test_recall_does_not_depend_on_the_batch_size(finished):
    config, path, report = finished
    for size in (1, 5):
        sized = replace(config, train=replace(config.train, eval_batch_size=size))
        model = load_model(path / report["checkpoint"], sized)
        evaluation = evaluate_split(make_task(sized), sized, model, "test", worker=Worker(), loader=local_batches)
        assert evaluation.metrics == report["metrics"]["test"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread of TensorBoard
def test_a_full_disk_leaves_the_older_checkpoint_whole(scenes, tmp_path):
    with contextlib.ExitStack() as limits:

        def fill(metrics):
            limits.enter_context(file_size_limit(60_000))

        with pytest.raises(UserError, match=r"^cannot write"):
            run(settings(scenes), tmp_path, fill)
    assert [read_meta(path).step for path in list_checkpoints(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("linear", 0, 0.0), ("linear", 5, 0.5), ("linear", 10, 1.0), ("linear", 55, 0.5), ("linear", 100, 0.0),
        ("cosine", 10, 1.0), ("cosine", 55, 0.5), ("cosine", 100, 0.0), ("constant", 99, 1.0), ("constant", 1, 0.1),
    ],
)  # fmt: skip
def test_schedule_values(schedule, step, factor):
    config = OptimConfig(schedule=schedule, warmup_fraction=0.1)
    assert math.isclose(learning_rate_factor(step, 100, config), factor, abs_tol=1e-12)


def test_the_scheduler_follows_the_schedule_and_biases_are_not_decayed(scenes):
    task = make_task(settings(scenes))
    model = task.new_model()
    config = OptimConfig(learning_rate=0.5, warmup_fraction=0.1, schedule="linear")
    optimizer = build_optimizer(task.parameter_groups(model, config), config)
    schedule = build_schedule(optimizer, config, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rise, fall = [0.05 * step for step in range(10)], [(100 - step) / 180 for step in range(10, 100)]
    assert rates == pytest.approx([*rise, *fall], abs=1e-12)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (id(parameter) in decayed) == ("bias" not in name)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04, 0.0]


@pytest.mark.parametrize(
    ("left", "finished", "fails"),
    [(False, True, False), (True, True, False), (True, False, False), (False, False, True)],
)
def test_a_run_is_told_done_only_if_it_ended_and_nothing_failed_after_its_last_step(left, finished, fails):
    """A search's best trial is finished where it stands, with steps left."""
    told = []

    class Trained(_Training):
        can_train = left

        def __init__(self):
            self._is_finished = finished
            self._tracker = SimpleNamespace(close=lambda *, done: told.append(done))

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext(), Trained():
        if fails:
            raise RuntimeError("no memory for test")
    assert told == [finished]
