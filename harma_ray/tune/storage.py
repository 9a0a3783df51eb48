"""Where a search's Optuna study is kept, and who proposes in it."""

import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.engine
import sqlalchemy.exc

from harma_ray.errors import UserError
from harma_ray.shell import command_line
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.space.urls import parse_url, show_url

STORAGE_NAME = "optuna.db"


def open_study(folder: Path, definition: SearchDefinition, *, read_only: bool = False) -> optuna.Study:
    """Opens the study of a search, or makes it.

    Args:
        folder: The search's folder.
        definition: The search.
        read_only: Whether nothing in the folder is written; then the study must be there.

    Raises:
        UserError: If the storage cannot be reached, or holds another kind of study under this name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url, name = storage_url(folder, definition, read_only=read_only), study_name(folder, definition)
    directions: list[Any] = [target.direction for target in definition.objectives]
    try:
        if read_only:
            study = optuna.load_study(storage=url, study_name=name)
        else:
            study = optuna.create_study(storage=url, study_name=name, directions=directions, load_if_exists=True)
        study.sampler = make_sampler(definition, len(study.get_trials(deepcopy=False)))
    except Exception as error:  # a database can fail in any way
        raise _storage_error(url, error) from error
    if [direction.name.lower() for direction in study.directions] != directions:
        raise UserError(f"{show_url(url)} has a study `{study.study_name}` of other objectives; choose another --name")
    return study


def require_new_study(definition: SearchDefinition) -> None:
    """Checks that a shared storage holds no other search of the name that a new one is to have.

    Raises:
        UserError: If it does, or cannot be reached.
    """
    assert definition.storage is not None
    try:
        known = optuna.get_all_study_names(definition.storage)
    except Exception as error:  # a database can fail in any way
        raise _storage_error(definition.storage, error) from error
    if definition.study in known:
        url = show_url(definition.storage)
        raise UserError(f"the storage {url} has a study `{definition.study}`; choose another --name")


def require_file(folder: Path) -> None:
    """Checks that the file of a search's own study is in its folder.

    Raises:
        UserError: If it is not; new trials would begin another study beside the old trials' runs.
    """
    path = folder / STORAGE_NAME
    if path.is_file():
        return
    message = f"the search {folder} has trials, but not the study that knows them, {STORAGE_NAME}"
    # versions up to 0.1.0 did not quote the path in the URL
    earlier = parse_url(f"sqlite:///{path}")
    if earlier and earlier.database != str(path) and Path(earlier.database or "").is_file():
        raise UserError(
            f"{message}; an earlier version kept it in another place, where other searches may have written too: "
            f"{command_line('mv', earlier.database, path)}"
        )
    raise UserError(f"{message}; bring the file back, or start a new search")


def _storage_error(url: str, error: Exception) -> UserError:
    return UserError(f"the Optuna storage {show_url(url)} cannot be used ({cause_of(error)}); check `storage`")


def cause_of(error: BaseException) -> str:
    """Returns in a line what went wrong in a database; of any failed write Optuna says that a value is too long."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0]


def storage_url(folder: Path, definition: SearchDefinition, *, read_only: bool = False) -> str:
    """Returns the URL of a search's Optuna storage; that of a file in its folder may be read-only.

    `?`, `#`, `%` and braces in a path, which mean something in a URL, are quoted.
    """
    path, query = folder / STORAGE_NAME, {"mode": "ro", "uri": "true"} if read_only else {}
    database = path.as_uri() if read_only else str(path)
    own = sqlalchemy.engine.URL.create("sqlite", database=database, query=query)
    return definition.storage or own.render_as_string()


def study_name(folder: Path, definition: SearchDefinition) -> str:
    """Returns the name of a search's study; a search's own storage holds no other."""
    return (definition.study or folder.name) if definition.storage else "search"


def make_sampler(definition: SearchDefinition, num_trials: int = 0) -> optuna.samplers.BaseSampler:
    """Returns the sampler; after an interruption its random numbers are others than before (`num_trials` were made)."""
    settings = definition.sampler
    seed = settings.seed + num_trials
    if settings.name in ("random", "grid"):  # the grid's settings are all among those that are tried first
        return optuna.samplers.RandomSampler(seed=seed)
    for argument in ("group", "consider_pruned_trials"):
        warnings.filterwarnings("ignore", f"Argument ``{argument}``", optuna.exceptions.ExperimentalWarning)
    if settings.name == "cmaes":
        # most trials are stopped early: without them it would know too little
        return optuna.samplers.CmaEsSampler(
            seed=seed, n_startup_trials=settings.startup_trials, consider_pruned_trials=True
        )
    several = settings.name == "tpe-multivariate"
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=settings.startup_trials, multivariate=several, group=several, constant_liar=True
    )
