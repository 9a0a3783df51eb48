"""The folder of a run: settings, environment, record, checkpoints, report.

Is imported without torch: what is wrong with a run that a command names is told at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import harma_ray
from harma_ray.config import OnDisk, RunConfig
from harma_ray.errors import UserError, warn_once
from harma_ray.files import (
    CONFIG_NAME,
    RUNS,
    SEARCH_NAME,
    did_you_mean,
    kept_path,
    near_folders,
    output_path,
    require_writable,
    write_text,
)
from harma_ray.models.names import is_elsewhere
from harma_ray.recipes import load_config, make_task
from harma_ray.settings import build_config, marked_settings, to_yaml
from harma_ray.shell import command_line, launch_command
from harma_ray.training.run_files import (
    METRICS_NAME,
    REPORT_NAME,
    CheckpointMeta,
    list_checkpoints,
    read_meta,
    read_records,
)

if TYPE_CHECKING:
    from torch import nn

    from harma_ray.task import Task

ENVIRONMENT_NAME = "environment.json"
LOCK_NAME = ".lock"
_logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "ray", "optuna", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    path: Path
    """Absolute folder."""
    config: RunConfig
    """Its full settings."""

    @property
    def task(self) -> Task:
        """The task that the settings describe."""
        return make_task(self.config)

    @property
    def report(self) -> dict[str, Any] | None:
        """The final report; None while the run is not finished."""
        path = self.path / REPORT_NAME
        return json.loads(path.read_text()) if path.is_file() else None

    def best_checkpoint(self, metric: str | None = None) -> Path:
        """Returns the checkpoint with the best objective so far; the last one if none was evaluated (an import).

        Of a run whose training is not at its end it is logged which one that is, once for each.

        Args:
            metric: What to judge by; None = the recipe's objective.

        Raises:
            UserError: If there is none, none with that metric, or the best by it was not kept.
        """
        checkpoints = list_checkpoints(self.path)
        if not checkpoints:
            raise UserError(f"run {self.path} has no checkpoint yet")
        metrics = self.config.metrics
        objective = metric or metrics.objective
        rated = [path for path in checkpoints if objective in read_meta(path).metrics]
        if metric and not rated:
            known = ", ".join(read_meta(checkpoints[-1]).metrics) or "none"
            raise UserError(f"no checkpoint of {self.path} has the metric `{metric}` (there are {known})")
        best = [*metrics.ranked(objective, rated, lambda path: read_meta(path).metrics), checkpoints[-1]][0]
        if metric:
            self._require_kept(metric, read_meta(best))
        self._tell_unfinished(read_meta(best), read_meta(checkpoints[-1]))
        return best

    def _tell_unfinished(self, best: CheckpointMeta, last: CheckpointMeta) -> None:
        """Logs which checkpoint is the best so far, unless the training is at its end (imports were not trained)."""
        train = self.config.train
        done, planned, unit = (last.step, train.steps, "step") if train.steps else (last.epoch, train.epochs, "epoch")
        if self.report is not None or done >= planned or not (self.path / METRICS_NAME).is_file():
            return
        untrained = "" if best.step else f", {self.config.started_from.title}"
        warn_once(
            _logger,
            f"run {self.path} is not finished ({unit} {done:.4g} of {planned}): used is its best checkpoint so far, "
            f"step {best.step} (epoch {best.epoch:.4g}{untrained})",
        )

    def best_finished(self, metric: str | None = None) -> Path:
        """Returns `best_checkpoint` of a run whose training will not go on, which could delete it.

        Raises:
            UserError: As `best_checkpoint`, or if the run is not finished.
        """
        if self.report is None:
            way_out = f"finish it first: {launch_command('train', '--resume', self.path)}"
            raise UserError(f"run {self.path} is not finished; {way_out}")
        return self.best_checkpoint(metric)

    def best_start(self, metric: str | None = None) -> Path:
        """Returns the checkpoint that a new run starts from: `best_finished`, or what an import has.

        Raises:
            UserError: As `best_finished`.
        """
        if not (self.path / METRICS_NAME).is_file():
            return self.best_checkpoint(metric)
        best = self.best_finished(metric)
        if not read_meta(best).step and len(list_checkpoints(self.path)) > 1:
            by = f" by {metric}" if metric else ""
            warn_once(
                _logger,
                f"the best checkpoint of {self.path}{by} is that of step 0, {self.config.started_from.title}: its "
                "training made nothing better, and the new run starts from there",
            )
        return best

    def require_related(self, config: RunConfig) -> None:
        """Raises UserError if runs of some settings are of another kind of recipe than this one."""
        if type(self.config) is not type(config):
            raise UserError(
                f"recipe {config.recipe} cannot start from {self.path}, which is a run of {self.config.recipe}: their "
                "models have nothing in common"
            )

    def _require_kept(self, metric: str, kept: CheckpointMeta) -> None:
        """Raises UserError if a checkpoint that was better by a metric is not there any more."""
        evaluations = [record for record in read_records(self.path) if record["kind"] == "evaluation"]
        seen = [record for record in evaluations if record.get(metric) is not None]
        metrics = self.config.metrics
        best = next(iter(metrics.ranked(metric, seen, lambda record: record)), None)
        if best is not None and metrics.is_better(metric, best[metric], kept.metrics[metric]):
            raise UserError(
                f"the checkpoint of {self.path} that was best by `{metric}` "
                f"({metrics.show(metric, best[metric])}, epoch {best['epoch']:g}) was not kept; "
                f"of those kept the best has {metrics.show(metric, kept.metrics[metric])} (epoch {kept.epoch:g}): "
                f"leave out --metric, or train again with --set 'selection.also_keep=[{metric}]'"
            )

    @contextlib.contextmanager
    def locked(self, *, wait_seconds: float = 0) -> Iterator[None]:
        """Keeps other processes from training this run for the length of a block.

        Args:
            wait_seconds: How long another one, such as what an interruption left behind, may need to end.

        Raises:
            UserError: If another one does.
        """
        with lock_folder(self.path, wait_seconds=wait_seconds):
            yield

    def load_model(self, metric: str | None = None) -> nn.Module:
        """Returns the model with the best weights, see `best_checkpoint`, on CPU, in evaluation mode."""
        return self.load_checkpoint(self.best_checkpoint(metric))

    def load_checkpoint(self, checkpoint: Path) -> nn.Module:
        """Returns the model with the weights of one of its checkpoints, on CPU, in evaluation mode."""
        from harma_ray.training.checkpoint import load_weights

        model = self.task.new_model()
        load_weights(checkpoint, model, backbone=self.task.backbone.fingerprint(model))
        return model.eval()


@contextlib.contextmanager
def lock_folder(path: Path, kind: Literal["run", "search"] = "run", *, wait_seconds: float = 0) -> Iterator[None]:
    """Keeps other processes from training the run, or the search, of a folder; arguments and errors of `Run.locked`."""
    deadline = time.monotonic() + wait_seconds
    try:
        file = (path / LOCK_NAME).open("wb")
    except OSError as error:
        raise UserError(f"cannot write into {kind} {path} ({error.strerror})") from error
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                does = "trains it" if kind == "run" else "goes on with it"
                raise UserError(f"{kind} {path} is in use: another process {does}; wait for its end") from error
            except OSError as error:  # some network file systems have no locks
                _logger.warning("%s cannot be locked (%s): train it in one process only", path, error.strerror)
            break
        yield


def create_run(runs: str | Path, name: str | None, config: RunConfig) -> Run:
    """Makes the folder of a new run and writes its settings and environment; arguments and errors of `make_folder`."""
    path = make_folder(runs, name or timed_name(config.recipe), "run")
    write_text(path / CONFIG_NAME, to_yaml(config))
    return Run(path, config)


def timed_name(what: str) -> str:
    """Returns a name for a run that is given none."""
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def make_folder(runs: str | Path, name: str, kind: str) -> Path:
    """Makes the folder of a new run or search, with what it was made by.

    Args:
        runs: Folder of all runs; made if missing.
        name: Name of the new one.
        kind: ``run`` or ``search``, for messages.

    Raises:
        UserError: If the name is taken or no folder name, or the folder cannot be written.
    """
    path = new_folder(runs, name, kind)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the {kind}'s folder {path} ({error.strerror}); choose another --runs") from error
    write_text(path / ENVIRONMENT_NAME, describe_environment())
    return path


def new_folder(runs: str | Path, name: str, kind: str) -> Path:
    """Returns the absolute folder of a new run or search, which can be made; arguments and errors of `make_folder`."""
    if name != Path(name).name or name.startswith("."):
        raise UserError(f"a {kind}'s name must be a plain folder name, got `{name}`")
    path = output_path(runs) / name
    if path.exists():
        way_out = f"choose another --name, or continue it with {command_line('--resume', path)}"
        raise UserError(f"{kind} {path} exists; {way_out}")
    require_writable(path, "--runs")
    return path


def open_run(path: str | Path) -> Run:
    """Opens the folder of a run.

    Raises:
        UserError: If it is none, or its settings cannot be read.
    """
    path = kept_path(path, "the run")
    if not (path / CONFIG_NAME).is_file():
        if (path / SEARCH_NAME).is_file():
            way_out = f"go on with it: {launch_command('tune', '--resume', path)}; the folders in it of trials are runs"
            raise UserError(f"{path} is not the folder of a run, but of a search; {way_out}")
        near = did_you_mean(near_folders(path, lambda folder: (folder / CONFIG_NAME).is_file(), RUNS))
        raise UserError(f"{path} is not the folder of a run (it has no {CONFIG_NAME}){near}")
    return Run(path, _placed(load_config(path / CONFIG_NAME), path))


def _placed(config: RunConfig, folder: Path) -> RunConfig:
    """Returns settings whose paths into the run's own folder (``./``) lead to where that lies now."""
    found = marked_settings(config, OnDisk).items()
    inside = {name: str(folder / value) for name, (value, _) in found if value.startswith("./")}
    return build_config(config, inside)


def describe_environment() -> str:
    """Returns versions, machine, git commit and command line as JSON, so that a result can be traced."""
    import torch

    environment = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "harma_ray": harma_ray.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    return json.dumps(environment, indent=1)


def _git_commit() -> str | None:
    """Returns the commit of the source tree this package runs from, with a plus if it was changed; None outside git."""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns settings whose paths do not depend on the working folder.

    Raises:
        UserError: If one leads into the copy of a working folder that a Ray job runs in.
    """
    changes: dict[str, Any] = {}
    if config.data.path:
        changes["data.path"] = str(kept_path(config.data.path, "the data set"))
    for name, (value, mark) in marked_settings(config, OnDisk).items():
        has_suffix = bool(Path(value).suffix)  # no tag of open_clip's has one
        if value and not is_elsewhere(value) and (has_suffix or mark.is_there(Path(value).expanduser())):
            path = kept_path(value, f"`{name}`")
            if mark.is_there(path):
                changes[name] = str(path)
    return build_config(config, changes)
