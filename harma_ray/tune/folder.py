"""The folder of a search: its definition, its study, the runs of its trials, what was concluded."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harma_ray.config import EmptyMeant
from harma_ray.errors import UserError
from harma_ray.files import kept_path, write_text
from harma_ray.runs import ENVIRONMENT_NAME, describe_environment, make_folder
from harma_ray.settings import marked_settings
from harma_ray.settings import to_yaml as config_yaml
from harma_ray.training.checkpoint import FOLDER as CHECKPOINTS
from harma_ray.training.tracking import REPORT_NAME, read_records
from harma_ray.tune.results import Axis, Confirmation, SearchResults, State, TrialResult
from harma_ray.tune.space.definition import SearchDefinition, Target
from harma_ray.tune.space.file import load_search, to_yaml
from harma_ray.tune.space.parameters import Choices
from harma_ray.tune.storage import open_study, require_file, require_new_study
from harma_ray.tune.study import DUPLICATE, REASON, RESULT, SECONDS, TRIALS_FOLDER, trial_folder

SEARCH_NAME = "search.yaml"
BEST_NAME = "best.yaml"
UNTRAINED_NAME = "untrained.json"
CONFIRM_FOLDER = "confirm"
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}  # fmt: skip


def create_search(runs: str | Path, name: str | None, definition: SearchDefinition) -> Path:
    """Makes the folder of a new search and writes its definition and environment.

    Args:
        runs: Folder of all runs; made if missing.
        name: Name of the search; None makes one of recipe and time.
        definition: The search.

    Raises:
        UserError: If the name is taken or no folder name, or the folder cannot be written.
    """
    name = name or f"tune-{definition.config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if definition.storage:
        definition = dataclasses.replace(definition, study=name)  # stays when the folder is renamed
        require_new_study(definition)
    folder = make_folder(runs, name, "search")
    write_text(folder / ENVIRONMENT_NAME, json.dumps(describe_environment(sys.argv), indent=1))
    write_definition(folder, definition)
    return folder


def write_definition(folder: Path, definition: SearchDefinition) -> None:
    """Writes what a search looks for."""
    write_text(folder / SEARCH_NAME, to_yaml(definition))


def open_search(folder: str | Path) -> tuple[Path, SearchDefinition]:
    """Opens the folder of a search.

    Raises:
        UserError: If it is none, or its trials' study is gone.
    """
    folder = kept_path(folder, "the search")
    if not (folder / SEARCH_NAME).is_file():
        raise UserError(f"{folder} is not the folder of a search (it has no {SEARCH_NAME})")
    definition = load_search(folder / SEARCH_NAME)
    empty = {n: mark.value for n, (value, mark) in marked_settings(definition.config, EmptyMeant).items() if not value}
    if empty:
        definition = load_search(folder / SEARCH_NAME, overrides=empty)
    if definition.storage is None and (folder / TRIALS_FOLDER).is_dir():
        require_file(folder)
    return folder, definition


def read_search(folder: Path, definition: SearchDefinition, study: optuna.Study | None = None) -> SearchResults:
    """Reads what a search has found so far.

    Args:
        folder: The search's folder.
        definition: The search.
        study: Its study; None opens it.
    """
    study = study or open_study(folder, definition)
    trials = tuple(
        _read_trial(folder, definition, trial)
        for trial in study.get_trials(deepcopy=False)
        if trial.state in _STATES and DUPLICATE not in trial.user_attrs
    )
    objectives = definition.objectives
    best = best_of(trials, objectives[0])
    scheduler = definition.scheduler
    details = {
        "asha": f"grace {scheduler.grace_epochs}, reduction {scheduler.reduction_factor:g}",
        "hyperband": f"grace {scheduler.grace_epochs}, reduction {scheduler.reduction_factor:g}, "
                     f"{scheduler.brackets} brackets",
        "median": f"grace {scheduler.grace_epochs}",
    }.get(scheduler.name)  # fmt: skip
    return SearchResults(
        folder=folder,
        recipe=definition.config.recipe,
        data=definition.config.data.path,
        axes=tuple(_axis(parameter) for parameter in definition.parameters),
        objectives=objectives,
        sampler=definition.sampler.name,
        scheduler=f"{scheduler.name} ({details})" if details else scheduler.name,
        trials=trials,
        best=best,
        front=tuple(sorted(trial.number for trial in study.best_trials)) if len(objectives) > 1 else (),
        untrained=_read_json(folder / UNTRAINED_NAME),
        final=_read_json(trial_folder(folder, -1 if best is None else best) / REPORT_NAME).get("metrics", {}),
        confirmations=_read_confirmations(folder, best),
        seeds=definition.seeds,
        seconds=float(study.user_attrs.get(SECONDS, 0)),
    )


def best_of(trials: tuple[TrialResult, ...], objective: Target) -> int | None:
    """Returns the trial with the best first objective among the complete ones, or, without any, the stopped ones."""
    for state in ("complete", "stopped"):
        rated = [trial for trial in trials if trial.state == state and trial.values]
        if rated:
            return max(rated, key=lambda trial: objective.merit(trial.values[0] if trial.values else 0.0)).number
    return None


def write_best(folder: Path, definition: SearchDefinition, results: SearchResults) -> Path | None:
    """Writes the best setting as a configuration that can be trained; returns the file."""
    best = results.best_trial
    if best is None:
        return None
    write_text(folder / BEST_NAME, config_yaml(definition.settings(best.params)))
    return folder / BEST_NAME


def drop_checkpoints(folder: Path, definition: SearchDefinition, results: SearchResults) -> None:
    """Deletes the checkpoints of trials that have ended and are neither the best nor on the Pareto front."""
    keep = {results.best, *results.front}
    for trial in results.trials:
        if trial.state != "running" and trial.number not in keep:
            for seed in range(definition.seeds):
                shutil.rmtree(trial_folder(folder, trial.number, seed) / CHECKPOINTS, ignore_errors=True)


def confirmation_folder(folder: Path, number: int, seed: int) -> Path:
    """Returns the run folder in which a trial's setting is trained with a fresh seed."""
    return folder / CONFIRM_FOLDER / f"{number:05d}-seed{seed}"


def _read_trial(folder: Path, definition: SearchDefinition, trial: FrozenTrial) -> TrialResult:
    own = trial_folder(folder, trial.number)
    result: dict[str, Any] = trial.user_attrs.get(RESULT, {})
    metric = definition.objectives[0].metric
    evaluations = [record for record in read_records(own) if record["kind"] == "evaluation"]
    selecting = [record for record in evaluations if record["split"] == definition.config.selecting_split]
    curve = tuple((record["epoch"], record[metric]) for record in selecting if record.get(metric) is not None)
    return TrialResult(
        number=trial.number,
        state=_STATES[trial.state],
        params=definition.read(trial.params),
        curve=curve,
        values=tuple(result["values"]) if result.get("values") else None,
        epochs=result.get("trained", 0),
        planned_epochs=definition.config.train.epochs * definition.seeds,
        seconds=result.get("seconds", 0),
        reason=trial.user_attrs.get(REASON),
        folder=own,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _axis(parameter: Any) -> Axis:
    if isinstance(parameter, Choices):
        return Axis(parameter.name, log=False, choices=parameter.choices)
    return Axis(parameter.name, log=parameter.log, choices=None, low=parameter.low, high=parameter.high)


def _read_confirmations(folder: Path, best: int | None) -> tuple[Confirmation, ...]:
    found: dict[int, list[dict[str, Any]]] = {}
    for report in sorted((folder / CONFIRM_FOLDER).glob(f"*/{REPORT_NAME}")):
        match = re.fullmatch(r"(\d+)-seed\d+", report.parent.name)
        if match:
            found.setdefault(int(match[1]), []).append(json.loads(report.read_text())["metrics"])
    confirmations = []
    for number in [number for number in dict.fromkeys((best, 0)) if number in found]:
        title = {best: f"trial {number} (best)"}.get(number, f"trial {number} (published)")
        reports = found[number]
        metrics = {
            f"{split} {name}": tuple(report[split][name] for report in reports)
            for split in reports[0] for name in reports[0][split]
        }  # fmt: skip
        confirmations.append(Confirmation(title, number, metrics))
    return tuple(confirmations)
