"""The folder of a search: its definition, its study, the runs of its trials, what was concluded."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harma_ray.config import EmptyMeant
from harma_ray.evaluation import FIGURES
from harma_ray.files import write_text
from harma_ray.runs import make_folder, timed_name
from harma_ray.settings import marked_settings
from harma_ray.settings import to_yaml as config_yaml
from harma_ray.training.run_files import FOLDER as CHECKPOINTS
from harma_ray.training.run_files import REPORT_NAME, read_records
from harma_ray.tune.results import Confirmation, SearchResults, State, TrialResult
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.space.file import load_search, to_yaml
from harma_ray.tune.space.places import SEARCH_NAME, search_folder
from harma_ray.tune.storage import open_study, require_file, require_new_study
from harma_ray.tune.study import DUPLICATE, REASON, RESULT, SECONDS, STATES, TRIALS_FOLDER, trial_folder

BEST_NAME = "best.yaml"
BASELINE_NAME = "untrained.json"
CONFIRM_FOLDER = "confirm"
_STATES: dict[TrialState, State] = {known: state for state, known in STATES.items()}


def create_search(runs: str | Path, name: str | None, definition: SearchDefinition) -> Path:
    """Makes the folder of a new search and writes its definition; arguments and errors of `make_folder`."""
    name = name or timed_name(f"tune-{definition.config.recipe}")
    if definition.storage:
        definition = dataclasses.replace(definition, study=name)  # stays when the folder is renamed
        require_new_study(definition)
    folder = make_folder(runs, name, "search")
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
    folder = search_folder(folder)
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
    best = SearchResults(folder, definition, trials).best
    report = {} if best is None else _read_json(trial_folder(folder, best) / REPORT_NAME)
    return SearchResults(
        folder,
        definition,
        trials,
        front=tuple(sorted(trial.number for trial in study.best_trials)) if len(definition.objectives) > 1 else (),
        baseline=_read_json(folder / BASELINE_NAME),
        final=report.get("metrics", {}),
        beside={key: report.get(key, {}) for key in FIGURES[1:]},
        confirmations=_read_confirmations(folder, best, definition.first_name),
        seconds=float(study.user_attrs.get(SECONDS, 0)),
    )


def write_best(folder: Path, results: SearchResults) -> Path | None:
    """Writes the best setting as a configuration that can be trained; returns the file."""
    best = results.best_trial
    if best is None:
        return None
    write_text(folder / BEST_NAME, config_yaml(results.definition.settings(best.params)))
    return folder / BEST_NAME


def drop_checkpoints(results: SearchResults) -> None:
    """Deletes the checkpoints of trials that have ended and are neither the best nor on the Pareto front."""
    keep = {results.best, *results.front}
    for trial in results.trials:
        if trial.state != "running" and trial.number not in keep:
            for seed in range(results.definition.seeds):
                shutil.rmtree(trial_folder(results.folder, trial.number, seed) / CHECKPOINTS, ignore_errors=True)


def confirmation_folder(folder: Path, number: int, seed: int) -> Path:
    """Returns the run folder in which a trial's setting is trained with a fresh seed."""
    return folder / CONFIRM_FOLDER / f"{number:05d}-seed{seed}"


def _read_trial(folder: Path, definition: SearchDefinition, trial: FrozenTrial) -> TrialResult:
    own = trial_folder(folder, trial.number)
    result: dict[str, Any] = trial.user_attrs.get(RESULT, {})
    metric = definition.objectives[0].metric
    evaluations = [record for record in read_records(own) if record["kind"] == "evaluation"]
    selecting = [record for record in evaluations if record["split"] == definition.config.selecting_split]
    curve = tuple((record[definition.unit], record[metric]) for record in selecting if record.get(metric) is not None)
    return TrialResult(
        number=trial.number,
        state=_STATES[trial.state],
        params=definition.read(trial.params),
        curve=curve,
        values=tuple(result["values"]) if result.get("values") else None,
        trained=result.get("trained", 0),
        seconds=result.get("seconds", 0),
        reason=trial.user_attrs.get(REASON),
        folder=own,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_confirmations(folder: Path, best: int | None, first: str) -> tuple[Confirmation, ...]:
    confirmations = []
    for number in dict.fromkeys((best or 0, 0)):
        paths = sorted(folder.glob(f"{CONFIRM_FOLDER}/{number:05d}-seed*/{REPORT_NAME}"))
        reports = [json.loads(path.read_text())["metrics"] for path in paths]
        if reports:
            names = [(split, name) for split, metrics in reports[0].items() for name in metrics]
            metrics = {f"{split} {name}": tuple(report[split][name] for report in reports) for split, name in names}
            title = f"trial {number} ({'best' if number == best else first})"
            confirmations.append(Confirmation(title, number, metrics))
    return tuple(confirmations)
