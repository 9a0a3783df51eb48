"""Searches through Ray Tune: real trials, made-up trials, trials that die."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toy_language
from ray import cloudpickle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import plan_trials
from harma_ray.runs import open_run
from harma_ray.settings import build_config, to_dict
from harma_ray.training.checkpoint import list_checkpoints, read_meta
from harma_ray.training.sinks import KEY_SETTINGS
from harma_ray.training.step import evaluate_split
from harma_ray.training.tensorboard import EVENTS_FOLDER
from harma_ray.training.tracking import METRICS_NAME, read_records
from harma_ray.tune.folder import _read_confirmations, read_search
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition, Target
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.study import trial_folder

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
TESTS = Path(toy_language.__file__).parent
RATE = Range(name="optim.learning_rate", kind="float", low=1e-3, high=1e-2, log=True)
WIDTH = Range(name="adapter.width", kind="int", low=16, high=128, step=16)


def definition(few_scenes, *parameters, **changes):
    config = build_config(recipe_config("harma-scenes"), {
        "model.pretrained": "random",
        "data.path": str(few_scenes), "train.epochs": 2, "train.global_batch_size": 20, "adapter.shared_width": 8,
    })  # fmt: skip
    found = SearchDefinition(config=config, parameters=parameters or (RATE, WIDTH))
    found = replace(found, sampler=Sampler(name="random"), scheduler=Scheduler(name="none"))
    return replace(found, **{"limits": Limits(trials=3), **changes})


def search(folder, space, cluster, *, trial=None, on_event=lambda event: None):
    from harma_ray.tune.search import prepare_trials, run_search

    folder.mkdir(exist_ok=True)
    plan = plan_trials(space.config, cluster, space.concurrent)
    setting = prepare_trials(space, plan)
    options = {"trial": trial} if trial else {}
    return run_search(folder, space, plan, setting, on_event, **options), setting


def learning_curve(assignment, setting, report):
    """A made-up trial: the narrower the better."""
    width = assignment["params"]["adapter.width"]
    epochs = assignment["runs"][0]["config"]["train"]["epochs"]
    record = Path(assignment["runs"][0]["folder"]) / METRICS_NAME
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("")
    for epoch in range(1, epochs + 1):
        value = 100 - width / 2 + epoch
        done = epoch == epochs
        line = {"kind": "evaluation", "step": epoch, "epoch": epoch, "split": "val", "r_mean": value}
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        report(
            {"progress": epoch, "value": value, "values": [value], "trained": epoch, "seconds": 0.1, "finished": done}
        )


def noting_its_process(assignment, setting, report):
    from harma_ray.tune.trial import run

    run(assignment, setting, report)
    (Path(assignment["runs"][0]["folder"]) / "process").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def real(few_scenes, ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches") / "real"
    space = definition(few_scenes)
    return space, *search(folder, space, ray_cluster, trial=noting_its_process)


def test_every_trial_runs_and_reports_every_epoch(real):
    _, results, _ = real
    assert [trial.state for trial in results.trials] == ["complete"] * 3
    for trial in results.trials:
        assert [epoch for epoch, _ in trial.curve] == [1, 2]
        assert trial.values == (max(value for _, value in trial.curve),)
        assert trial.trained == 2


def test_no_trial_looks_at_test(real):
    _, results, _ = real
    for trial in results.trials:
        records = list(read_records(trial.folder))
        assert {record["split"] for record in records if record["kind"] == "evaluation"} == {"val"}
        assert not [record for record in records if record["kind"] == "final"]


def test_only_the_best_keeps_its_checkpoints_and_nothing_of_rays_is_left(real):
    _, results, _ = real
    assert [bool(list_checkpoints(trial.folder)) for trial in results.trials] == [
        trial.number == results.best for trial in results.trials
    ]
    assert not (results.folder / "ray").exists()


def test_tensorboard_has_every_trial_and_its_hparams(real):
    _, results, _ = real
    for trial in results.trials:
        events = EventAccumulator(str(trial.folder / EVENTS_FOLDER)).Reload()
        values = [value for _, value in trial.curve]
        assert [event.value for event in events.Scalars("main/val_r_mean")] == pytest.approx(values)
        assert events.Scalars("main/best_val_r_mean")[-1].value == pytest.approx(trial.values[0])
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = HParamsPluginData.FromString(content).session_start_info
        assert start.group_name == f"{trial.number:05d} real/trials"
        shown = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
        assert {name: shown[name] for name in trial.params} == pytest.approx(dict(trial.params))
        assert shown.keys() == {*trial.params, "adapter.shared_width", "model.pretrained", *KEY_SETTINGS}
        assert "_hparams_/session_end_info" in events.summary_metadata


def test_a_trial_gives_the_same_alone_and_after_others(real, few_scenes, ray_cluster, tmp_path):
    """The last trial ran in a process that others had used; here it runs in one of its own, the first time."""
    import ray

    from harma_ray.tune.trial import run

    _, results, setting = real
    assert len({(trial.folder / "process").read_text() for trial in results.trials}) < 3  # one was used again
    trial = results.trials[-1]
    config = to_dict(definition(few_scenes).settings(dict(trial.params)))
    runs = [{"folder": str(tmp_path / "alone"), "config": config}]
    ray.get(ray.remote(num_cpus=1, max_calls=1)(lambda: run({"runs": runs}, setting, lambda result: None)).remote())
    told = [
        [
            {key: value for key, value in record.items() if key not in _MEASURED}
            for record in read_records(path)
            if record["kind"] in ("step", "evaluation")
        ]
        for path in (trial.folder, tmp_path / "alone")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 3  # a step and two epochs


_MEASURED = {"pairs_per_second", "data_wait_fraction", "memory_mb", "seconds"}


def test_test_is_evaluated_once_for_the_best(real, ray_cluster):
    from harma_ray.tune.search import finish_best

    space, results, setting = real
    config = space.settings(dict(results.trials[results.best].params))
    finish_best(results, setting, config)
    report = results.best_trial.folder / "report.json"
    written, found = report.stat().st_mtime_ns, read_search(results.folder, space)
    assert set(found.final) == {"val", "test"}
    assert found.final["val"]["r_mean"] == results.best_trial.values[0]
    task = make_task(config)
    expected = evaluate_split(task, config, task.new_model(), "val", worker=Worker(), loader=local_batches)
    assert found.baseline == expected.metrics
    finish_best(found, setting, config)
    assert report.stat().st_mtime_ns == written


def test_confirmation_uses_fresh_seeds_for_the_best_and_the_published_setting(real, ray_cluster):
    from harma_ray.tune.search import confirm

    space, results, setting = real
    plan, lines = plan_trials(space.config, ray_cluster), []
    published, second, *rest = results.trials
    results = replace(results, trials=(published, replace(second, values=(100.0,)), *rest))
    assert not confirm(results, plan, setting, ray_cluster, 1, lines.append)
    assert len(lines) == 2
    confirm(results, plan, setting, ray_cluster, 1, lines.append)
    assert len(lines) == 2  # they are there
    for number, name in ((1, "00001-seed1"), (0, "00000-seed1")):
        own = results.folder / "confirm" / name
        assert open_run(own).config == build_config(space.settings(dict(results.trials[number].params)), {"seed": 1})
        read = {c.number: c for c in _read_confirmations(results.folder, 1, "published")}[number]
        report = json.loads((own / "report.json").read_text())["metrics"]
        assert read.metrics["test r_mean"] == (report["test"]["r_mean"],)
        first, other = (
            next(record["loss"] for record in read_records(path) if record["kind"] == "step")
            for path in (results.trials[number].folder, own)
        )
        assert first != other  # another seed, another order


def test_a_diverging_trial_is_a_failure_with_its_reason_and_the_search_goes_on(few_scenes, ray_cluster, tmp_path):
    rate = replace(RATE, high=1e30)
    space = definition(few_scenes, rate, enqueued=({"optim.learning_rate": 1e30},), concurrent=1)
    results, _ = search(tmp_path / "diverging", space, ray_cluster)
    assert [trial.state for trial in results.trials[:2]] == ["complete", "failed"]
    assert "not finite at step" in results.trials[1].reason
    assert "TrainingDiverged" in (results.trials[1].folder / "error.txt").read_text()
    assert len(results.trials) == 3


def test_a_search_in_which_nothing_works_ends_soon_and_says_why(few_scenes, ray_cluster, tmp_path):
    space = definition(few_scenes, RATE, limits=Limits(trials=30), concurrent=1)
    space = replace(space, config=build_config(space.config, {"data.max_pixels": 10}))
    with pytest.raises(UserError, match=r"one trial after another failed, .*: row \d+ .*pixels"):
        search(tmp_path / "hopeless", space, ray_cluster)
    assert len(read_search(tmp_path / "hopeless", space).trials) <= 5


def test_asha_stops_weak_trials_but_never_the_published_setting(few_scenes, ray_cluster, tmp_path):
    space = definition(
        few_scenes,
        WIDTH,
        scheduler=Scheduler(name="asha", reduction_factor=2),
        sampler=Sampler(name="grid"),
        limits=Limits(),
        concurrent=1,
    )
    space = replace(space, config=build_config(space.config, {"train.epochs": 4}))
    results, _ = search(tmp_path / "asha", space, ray_cluster, trial=learning_curve)
    states = {trial.params["adapter.width"]: trial.state for trial in results.trials}
    assert states[16] == "complete"
    assert states[128] == "complete"  # the worst, and published
    assert list(states.values()).count("stopped") >= 4
    assert results.trials[results.best].params["adapter.width"] == 16
    assert all(trial.trained == 1 for trial in results.trials if trial.state == "stopped" and trial.number > 4)


def dies(assignment, setting, report):
    """Trial 1 dies after its first epoch, once; trial 2 dies whenever it is started."""
    from harma_ray.tune.trial import run

    folder, number = Path(assignment["runs"][0]["folder"]), assignment["number"]

    def reporting(result):
        report(result)
        mark = folder.parent / f"died-{folder.name}"
        if result["progress"] == 1 and number == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    run(assignment, setting, reporting)


def test_a_killed_trial_goes_on_from_its_checkpoint_and_is_a_failure_if_it_dies_again_and_again(
    real, few_scenes, ray_cluster, tmp_path
):
    _, undisturbed, _ = real
    results, _ = search(tmp_path / "killed", definition(few_scenes), ray_cluster, trial=dies)
    assert (results.folder / "trials" / "died-00001").exists()
    assert [trial.state for trial in results.trials] == ["complete", "complete", "failed"]
    assert results.trials[1].curve == undisturbed.trials[1].curve
    starts = [record for record in read_records(results.trials[1].folder) if record["kind"] == "start"]
    assert [record["step"] for record in starts] == [0, 4]
    assert "its process died" in results.trials[2].reason


def test_several_seeds_are_averaged_and_share_one_decision(few_scenes, ray_cluster, tmp_path):
    space = definition(few_scenes, seeds=2, limits=Limits(trials=1))
    results, _ = search(tmp_path / "seeds", space, ray_cluster)
    best = []
    for seed in (0, 1):
        records = read_records(trial_folder(results.folder, 0, seed))
        best.append(max(record["r_mean"] for record in records if record["kind"] == "evaluation"))
    assert results.trials[0].values == (pytest.approx(sum(best) / 2),)
    assert results.trials[0].trained == 4
    assert results.best == 0


def of_the_toy(assignment, setting, report):
    """Makes the toy known in the process of the trial first."""
    from harma_ray.tune.trial import run

    sys.path.insert(0, str(TESTS))
    import toy_language

    with pytest.MonkeyPatch.context() as patch:
        toy_language.register(patch)
        run(assignment, setting, report)


def test_a_search_for_the_lowest_loss_that_counts_steps(few_scenes, ray_cluster, tmp_path, monkeypatch):
    """The second trial, which learns nothing, is stopped; the best is that of the lowest loss, at its lowest."""
    toy_language.register(monkeypatch)
    changes = {"data.path": str(few_scenes), "train.steps": 9, "train.eval_every_steps": 3}
    space = SearchDefinition(
        config=build_config(toy_language.toy_config(), changes), parameters=(replace(RATE, low=1e-9, high=0.1),),
        enqueued=({"optim.learning_rate": 1e-9}, {"optim.learning_rate": 0.1}), limits=Limits(trials=3), concurrent=1,
        scheduler=Scheduler(name="asha", reduction_factor=2), objectives=(Target(metric="loss", direction="minimize"),),
    )  # fmt: skip
    results, _ = search(tmp_path / "loss", space, ray_cluster, trial=of_the_toy)
    assert [trial.state for trial in results.trials] == ["complete", "stopped", "complete"]
    curves = [dict(trial.curve) for trial in results.trials]
    assert [list(curve) for curve in curves] == [[3, 6, 9], [3], [3, 6, 9]]
    assert [trial.values for trial in results.trials] == [(min(curve.values()),) for curve in curves]
    assert results.best == min(results.trials, key=lambda trial: trial.values[0]).number
    kept = [read_meta(path).metrics["loss"] for path in list_checkpoints(results.best_trial.folder)]
    assert min(kept) == results.best_trial.value


def takes_all_memory(assignment, setting, report):
    folder = Path(assignment["runs"][0]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if assignment["number"] == 1:
        taken = []
        while True:
            taken.append(bytearray(os.urandom(1024) * 1024 * 64))
            time.sleep(0.02)
    learning_curve(assignment, setting, report)


@pytest.mark.timeout(400)
def test_a_trial_that_takes_all_memory_is_a_failure_and_the_search_goes_on(few_scenes, tmp_path):
    """In a cluster of its own, in a process of its own, whose memory Ray guards closely."""
    code = f"""
import os, sys
from pathlib import Path
memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
total, free = (int(memory[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
os.environ["RAY_memory_usage_threshold"] = str(round((total - free + min(6 * 2**20, free // 2)) / total, 3))
sys.path[:0] = {[str(Path(__file__).parent), str(TESTS)]!r}
import test_search as made
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.tune.space.definition import Limits
space = made.definition({str(few_scenes)!r}, made.WIDTH, limits=Limits(trials=3), concurrent=1)
with ray_cluster(num_cpus=2) as cluster:
    results, _ = made.search(Path({str(tmp_path / "full")!r}), space, cluster, trial=made.takes_all_memory)
print([trial.state for trial in results.trials], results.trials[1].reason)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=360)
    assert result.stdout.strip().startswith("['complete', 'failed', 'complete'] the machine ran out of memory"), (
        result.stdout + result.stderr[-3000:]
    )
