"""Figures in Weights & Biases, offline, and in MLflow, on a folder: read back by their own means."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics
from harma_ray.preflight import prepare
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config, config_hash
from harma_ray.training.services import STORE_NAME, check_services, service_variables
from harma_ray.training.sinks import Label
from harma_ray.training.tracking import Tracker, read_records

METRICS = Metrics(["r_mean"], objective="r_mean")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # set by what is tested, too: here it is unset again


def config(*services):
    return build_config(recipe_config("harma-scenes"), {"train.log_to": list(services), "optim.learning_rate": 2e-3})


def steps(run_dir, config, *, first, last, label=None, results=None, done=False):
    """Records some steps of a run, which goes on where it is not at its first."""
    tracker = Tracker(run_dir, first - 1 if first > 1 else None, None, config, label or Label.of(run_dir))
    for step in range(first, last + 1):
        tracker.log("step", step, {"loss": 10 / step}, {"main/loss": 10 / step})
    if results:
        tracker.log_results(last, results, METRICS, curve_of="val")
    tracker.close(done=done)


def wandb_records(path):
    """Yields the messages of a ``.wandb`` file: 7 bytes, then a log as LevelDB writes it, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if at % 2**15 > 2**15 - 7:  # no place for another header in this block
            at += -at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_wandb(run_dir):
    """Returns the rows, the summary, and the names and settings that Weights & Biases keeps of a run, in its files."""
    rows, summary, told = [], {}, []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            if record.HasField("run"):
                told.append(record.run)
    return rows, summary, told


def mlflow_client(home):
    from mlflow import MlflowClient

    return MlflowClient((home / STORE_NAME).as_uri())


def mlflow_runs(home):
    client = mlflow_client(home)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_both_get_the_curves_of_a_run_that_was_resumed_once_and_as_one_run(tmp_path):
    """After the interruption steps 4 and 5 are trained a second time."""
    run_dir, wanted = tmp_path / "mine", config("wandb", "mlflow")
    steps(run_dir, wanted, first=1, last=5)
    results = {"val": {"r_mean": 41.5}, "test": {"r_mean": 40.25}}
    steps(run_dir, wanted, first=4, last=8, results=results, done=True)
    curve = {step: pytest.approx(10 / step) for step in range(1, 9)}
    finals = {"final/val_r_mean": 41.5, "final/test_r_mean": 40.25}

    rows, summary, told = read_wandb(run_dir)
    assert {row["_step"]: row["main/loss"] for row in rows if "main/loss" in row} == curve
    assert {name: summary[name] for name in finals} == finals
    assert len({run.run_id for run in told}) == 1
    assert {(run.display_name, run.project) for run in told} == {("mine", "harma_ray")}
    settings = {item.key: json.loads(item.value_json) for item in told[0].config.update}
    assert settings["optim"]["learning_rate"] == 2e-3

    (run,) = mlflow_runs(tmp_path)
    history = mlflow_client(tmp_path).get_metric_history(run.info.run_id, "main/loss")
    assert len(history) == 8
    assert {metric.step: metric.value for metric in history} == curve
    assert {name: run.data.metrics[name] for name in finals} == finals
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["optim.learning_rate"] == "0.002"
    assert not [record for record in read_records(run_dir) if record["kind"] == "notice"]


def test_trials_of_a_search_are_a_group(tmp_path):
    folder = tmp_path / "search" / "trials" / "00003"
    label = Label("search/trials/00003", tmp_path, "search")
    steps(folder, config("wandb", "mlflow"), first=1, last=1, label=label)
    _, _, told = read_wandb(folder)
    assert (told[0].display_name, told[0].run_group) == ("search/trials/00003", "search")
    (run,) = mlflow_runs(tmp_path)
    assert (run.info.run_name, run.data.tags["group"]) == ("search/trials/00003", "search")
    assert run.info.status == "KILLED"  # it may go on


def test_a_service_that_fails_is_told_once_and_the_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    steps(tmp_path / "mine", config("mlflow"), first=1, last=3, done=True)
    records = list(read_records(tmp_path / "mine"))
    (notice,) = [record["text"] for record in records if record["kind"] == "notice"]
    assert notice.startswith("figures no longer go to mlflow (")
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3]


def test_a_missing_package_is_told_before_anything_starts(scenes, monkeypatch):
    wanted = build_config(config("wandb", "mlflow"), {"data.path": str(scenes)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UserError, match=r"`train.log_to` names wandb, which is not installed; pip install wandb \(or"):
        prepare(wanted)


def test_where_figures_go_changes_nothing_that_is_computed():
    assert config_hash(config("wandb")) == config_hash(config())
    check_services(())
    with pytest.raises(UserError, match=r"`train.log_to.0` must be 'wandb' or 'mlflow', got 'tensorbord'"):
        config("tensorbord")


def test_nothing_is_imported_that_was_not_asked_for(tmp_path):
    before = set(sys.modules)
    steps(Path(tmp_path) / "mine", config(), first=1, last=1)
    assert not {"wandb", "mlflow"} & (set(sys.modules) - before)


@pytest.mark.parametrize(("name", "member"), [("wandb", "init"), ("transformers", "AutoModel")])
def test_what_open_clip_takes_along_comes_with_no_other_import_and_can_be_imported_afterwards(name, member):
    code = f"import sys, harma_ray.api; assert '{name}' not in sys.modules; import {name}; assert {name}.{member}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_leaves_nothing_outside_the_folder_of_a_run_that_is_killed(tmp_path):
    (tmp_path / "temporary").mkdir()
    code = f"""
import os
from pathlib import Path
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.training.services import WeightsAndBiases
from harma_ray.training.sinks import Label
run = Path({str(tmp_path / "mine")!r})
WeightsAndBiases(run, build_config(recipe_config("harma-scenes"), {{}}), Label.of(run))
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert not list((tmp_path / "temporary").glob("tmp*"))


def test_workers_elsewhere_get_what_is_set_of_the_services_asked_for_but_no_secret(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    told = {"WANDB_PROJECT": "mine", "WANDB_ENTITY": "lab", "MLFLOW_TRACKING_URI": "https://there:5000/a"}
    kept = {"WANDB_API_KEY": "k", "MLFLOW_CRYPTO_KEK_PASSPHRASE": "p", "WANDB_RUN_ID": "1", "WANDB_DIR": "/here"}
    for name, value in {**told, **kept}.items():
        monkeypatch.setenv(name, value)
    assert service_variables(config("wandb", "mlflow")) == told
    for place in ("https://me:p@there", "postgresql://there/db?password=p", "sqlite:///here.db", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        assert service_variables(config("mlflow")) == {}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert service_variables(config("mlflow")) == service_variables(config()) == {}
