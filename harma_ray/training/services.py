"""A run's figures in Weights & Biases and MLflow, under the names that TensorBoard has: what ``train.log_to`` asks for.

Each goes on with the run that it began, whose id lies in the run's folder. A service that fails is told once and left
alone; the training goes on.
"""

import contextlib
import importlib.util
import json
import os
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.files import write_text
from harma_ray.settings import flat_settings, to_dict
from harma_ray.training.sinks import Label, Sink

IDS_NAME = "services.json"
"""The runs that the services began, inside the run's folder: their ids by the service's name."""
STORE_NAME = "mlruns"
"""MLflow's store where ``MLFLOW_TRACKING_URI`` names no other, beside the runs."""
_PROJECT = "harma_ray"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_FEWER_WAITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # else a server that is gone holds a training up for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables of the services, unless they are set."""
_TOLD = {
    "wandb": ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_TAGS", "WANDB_NOTES"),
    "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
}
"""Environment variables that workers on other machines are told: none that holds a secret, a folder, or a run's id."""


def check_services(names: Sequence[str]) -> None:
    """Checks that the packages of services are installed.

    Raises:
        UserError: If one is not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise UserError(
            f"`train.log_to` names {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed; "
            f'pip install {packages} (or "harma-ray[tracking]"), or leave it out'
        )


def service_variables(config: RunConfig) -> dict[str, str]:
    """Returns what this process's environment says of the services that settings ask for, for workers elsewhere.

    Keys and passwords stay on their machines, and so do addresses that hold one or mean a place on this machine.
    """
    names = [name for service in config.train.log_to for name in _TOLD[service]]
    found = {name: os.environ[name] for name in names if name in os.environ}
    return {name: value for name, value in found.items() if not name.endswith(("_URI", "_URL")) or _is_open(value)}


def _is_open(address: str) -> bool:
    """Tells whether an address is a server's, and no more than that."""
    parts = urllib.parse.urlsplit(address)
    return parts.scheme in ("http", "https") and "@" not in parts.netloc and not parts.query


def adopt_variables(variables: Mapping[str, str]) -> None:
    """Sets what another process's `service_variables` were."""
    os.environ.update(variables)


def open_services(run_dir: Path, config: RunConfig, label: Label, on_failure: Callable[[str], None]) -> list[Sink]:
    """Returns the services that the settings ask for.

    Args:
        run_dir: The run's folder.
        config: Its settings.
        label: What it is called.
        on_failure: Called with what a service that failed said; nothing goes to it from then on.
    """
    makers = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    for name, value in _FEWER_WAITS.items() if config.train.log_to else ():
        os.environ.setdefault(name, value)
    return [
        _Guarded(name, lambda maker=makers[name]: maker(run_dir, config, label), on_failure)
        for name in dict.fromkeys(config.train.log_to)
    ]


class WeightsAndBiases(Sink):
    """A run in Weights & Biases; offline, it lies below the run's folder and ``wandb sync`` sends it."""

    def __init__(self, run_dir: Path, config: RunConfig, label: Label):
        """Begins a run, or goes on with it; steps that it knows already are left out, as they are computed alike."""
        with _temporary_files_in(run_dir):
            import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=run_dir,
            id=_read_ids(run_dir).get("wandb"),
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",  # offline it would warn
            name=label.name,
            group=label.group or None,
            config=to_dict(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        _keep_id(run_dir, "wandb", self._run.id)

    def log(self, curves: Mapping[str, float], step: int) -> None:
        """Adds a row."""
        if curves:
            self._run.log(dict(curves), step=step)

    def log_results(self, figures: Mapping[str, float], step: int) -> None:
        """Puts the final figures into the summary."""
        self._run.summary.update(dict(figures))

    def close(self, *, done: bool) -> None:
        """Ends the run, or leaves it as one that was broken off."""
        import wandb

        self._run.finish(exit_code=0 if done else 255)  # as after Ctrl-C
        wandb.teardown()  # else what its own process has yet to write is lost with a worker's


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Lets what an import makes for temporary files lie in a run's folder: a worker that is killed leaves it behind."""
    before, place = tempfile.tempdir, folder / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before


class MLflow(Sink):
    """A run in MLflow, by its client: of ``MLFLOW_TRACKING_URI``, or of a folder beside the runs."""

    def __init__(self, run_dir: Path, config: RunConfig, label: Label):
        """Begins a run, or goes on with it."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (label.home / STORE_NAME).as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it advises a data base, and refuses else
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        self._last: dict[str, int] = {}
        known = _read_ids(run_dir).get("mlflow")
        self._goes_on = known is not None
        self._id = known or self._begin(config, label)
        if known is None:
            _keep_id(run_dir, "mlflow", self._id)
        else:
            self._client.update_run(known, status="RUNNING")

    def _begin(self, config: RunConfig, label: Label) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"group": label.group} if label.group else {}
        begun = self._client.create_run(number, run_name=label.name, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in flat_settings(to_dict(config)).items()]
        for first in range(0, len(params), 100):  # as many as it takes at a time
            self._client.log_batch(begun, params=params[first : first + 100])
        return begun

    def log(self, curves: Mapping[str, float], step: int) -> None:
        """Adds points, unless the run has them from before it was interrupted."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(name, value, now, step) for name, value in curves.items() if step > self._last_step(name)]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def _last_step(self, name: str) -> int:
        if self._goes_on and name not in self._last:
            history = self._client.get_metric_history(self._id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last.get(name, -1)

    def log_results(self, figures: Mapping[str, float], step: int) -> None:
        """Adds the final figures, a value each."""
        self.log(figures, step)

    def close(self, *, done: bool) -> None:
        """Ends the run, or leaves it as one that was broken off."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


class _Guarded(Sink):
    """A service whose failure ends its part, not the training."""

    def __init__(self, name: str, make: Callable[[], Sink], on_failure: Callable[[str], None]):
        self._name, self._on_failure = name, on_failure
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def log(self, curves: Mapping[str, float], step: int) -> None:
        if self._sink is not None:
            self._try(self._sink.log, curves, step)

    def log_results(self, figures: Mapping[str, float], step: int) -> None:
        if self._sink is not None:
            self._try(self._sink.log_results, figures, step)

    def close(self, *, done: bool) -> None:
        if self._sink is not None:
            self._try(self._sink.close, done=done)

    def _try(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            action(*arguments, **options)
        except Exception as error:  # whatever a network, a server or a client does, hours of training outweigh it
            self._sink = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._on_failure(f"figures no longer go to {self._name} ({reason}); the training goes on without it")


def _read_ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDS_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def _keep_id(run_dir: Path, service: str, number: str) -> None:
    write_text(run_dir / IDS_NAME, json.dumps({**_read_ids(run_dir), service: number}))
