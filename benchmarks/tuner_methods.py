"""Tuners on simulated trainings (see benchmarks/curve_table.py), each called as those who wrote it show it.

All of them search the same ranges, as orders, steps or choices as each takes them, begin with the setting nearest the
published one, and are told the best value up to each epoch, which
is what a kept checkpoint is worth. One trial runs at a time.
"""

import datetime
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from curve_table import GAMMA, MARGIN, RATE, WIDTH, CurveTable, Trainings

from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.tune.scheduling import PROGRESS, VALUE, make_scheduler
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.study import Report, SearchStudy

PUBLISHED = {RATE: 4e-3, MARGIN: 0.2, GAMMA: 2.0, WIDTH: 128}
"""What ``harma-scenes`` sets."""
_METRIC, _TIME = "value", "training_iteration"


@dataclass(frozen=True)
class Search:
    """One repetition of a tuner."""

    table: CurveTable
    trainings: Trainings
    seed: int
    """Of the tuner."""

    @property
    def first(self) -> dict[str, Any]:
        """The setting to begin with."""
        return self.table.published(PUBLISHED)

    @property
    def epochs(self) -> int:
        """Epochs of a training."""
        return self.table.epochs


def ours(search: Search, **changes: Any) -> None:
    """The package's own search, as ``launch.py tune`` runs it: its study and its scheduler, without Ray's processes.

    Args:
        search: What is searched.
        changes: Of the definition.
    """
    low, high = search.table.rates
    steps = [(name, search.table.grid[name]) for name in (MARGIN, GAMMA, WIDTH)]
    parameters = [Range(name=RATE, kind="float", low=low, high=high, log=True)]
    for name, values in steps:
        kind = "int" if name == WIDTH else "float"
        first, last = (round(value, 6) for value in (values[0], values[-1]))
        step = round((last - first) / (len(values) - 1), 6)
        parameters.append(Range(name=name, kind=kind, low=first, high=last, step=step))
    fixed = {"train.epochs": search.epochs, **{name: round(value, 6) for name, value in search.first.items()}}
    definition = SearchDefinition(
        config=build_config(recipe_config("harma-scenes"), fixed),
        parameters=tuple(parameters),
        sampler=Sampler(seed=search.seed),
        scheduler=Scheduler(),
        limits=Limits(epochs=search.trainings.budget + search.epochs),
    )
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        _run_study(replace(definition, **changes), Path(folder), search.trainings)


def _run_study(definition: SearchDefinition, folder: Path, trainings: Trainings) -> None:
    study, scheduler = SearchStudy(folder, definition), make_scheduler(definition)
    while (assignment := study.next()) is not None:
        trial, report = SimpleNamespace(config={"number": assignment.number}), None
        for epoch, value in trainings.walk(assignment.params):
            report = Report(progress=epoch, value=value, values=(value,), trained=epoch)
            study.report(assignment.number, report)
            decision = scheduler.on_trial_result(None, trial, {PROGRESS: epoch, VALUE: value})  # pyright: ignore[reportArgumentType]
            if decision == scheduler.STOP:
                break
        assert report is not None
        if report.progress == definition.length:
            report = replace(report, finished=True)
            result = {PROGRESS: report.progress, VALUE: report.value, "finished": True}
            scheduler.on_trial_complete(None, trial, result)  # pyright: ignore[reportArgumentType]
        study.close(assignment.number, report)


def random_asha(search: Search, factor: int = 3) -> None:
    """Random settings and Ray Tune's ASHA, which lets one trial in `factor` go on."""
    rng, (low, high) = np.random.default_rng(search.seed), search.table.rates

    def propose(number: int) -> dict[str, Any]:
        if not number:
            return search.first
        others = {name: rng.choice(search.table.grid[name]) for name in (MARGIN, GAMMA, WIDTH)}
        return {RATE: low * (high / low) ** rng.random(), **others}

    _with_ray_asha(search, propose, factor=factor)


def ray_optuna_asha(search: Search, factor: int = 3) -> None:
    """Ray Tune's OptunaSearch and ASHA."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    low, high = search.table.rates
    space = {RATE: tune.loguniform(low, high)}
    space |= {name: tune.choice(search.table.grid[name]) for name in (MARGIN, GAMMA, WIDTH)}
    space = OptunaSearch.convert_search_space(space)
    searcher = OptunaSearch(space, metric=_METRIC, mode="max", seed=search.seed, points_to_evaluate=[search.first])

    def propose(number: int) -> Mapping[str, Any]:
        found = searcher.suggest(str(number))
        assert found is not None
        return found

    _with_ray_asha(search, propose, searcher, factor)


def _with_ray_asha(
    search: Search, propose: Callable[[int], Mapping[str, Any]], searcher: Any = None, factor: int = 3
) -> None:
    from ray.tune.schedulers import ASHAScheduler

    asha: Any = ASHAScheduler(
        _TIME, metric=_METRIC, mode="max", max_t=search.epochs, grace_period=1, reduction_factor=factor
    )
    number = 0
    while True:
        trial, result = SimpleNamespace(trial_id=str(number)), {}
        params = propose(number)
        asha.on_trial_add(None, trial)
        for epoch, value in search.trainings.walk(params):
            result = {_TIME: epoch, _METRIC: value}
            if searcher is not None:
                searcher.on_trial_result(trial.trial_id, result)
            if asha.on_trial_result(None, trial, result) == asha.STOP:
                break
        asha.on_trial_complete(None, trial, result)
        if searcher is not None:
            searcher.on_trial_complete(trial.trial_id, result)
        number += 1


def optuna_tpe(search: Search, pruner: optuna.pruners.BasePruner) -> None:
    """Optuna's TPE and one of its pruners."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    low, high = search.table.rates
    sampler = optuna.samplers.TPESampler(seed=search.seed)
    study = optuna.create_study(study_name="study", direction="maximize", sampler=sampler, pruner=pruner)
    study.enqueue_trial(search.first)
    while True:
        trial = study.ask()
        params: dict[str, Any] = {RATE: trial.suggest_float(RATE, low, high, log=True)}
        for name in (MARGIN, GAMMA, WIDTH):
            params[name] = trial.suggest_categorical(name, search.table.grid[name])
        value, pruned = -math.inf, False
        for epoch, value in search.trainings.walk(params):
            trial.report(value, epoch)
            pruned = epoch < search.epochs and trial.should_prune()
            if pruned:
                break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)


def smac_multi_fidelity(search: Search) -> None:
    """SMAC3's multi-fidelity facade: random forests, hyperband; a longer training goes on from the shorter one."""
    from ConfigSpace import (  # pyright: ignore[reportMissingImports]
        ConfigurationSpace,
        Float,
        OrdinalHyperparameter,
    )
    from smac import MultiFidelityFacade, Scenario  # pyright: ignore[reportMissingImports]
    from smac.runhistory.dataclasses import TrialValue  # pyright: ignore[reportMissingImports]

    space, grid = ConfigurationSpace(seed=search.seed), search.table.grid
    space.add(Float(RATE, search.table.rates, log=True))
    for name in (MARGIN, GAMMA, WIDTH):
        space.add(OrdinalHyperparameter(name, grid[name], default_value=search.first[name]))
    space[RATE].default_value = search.first[RATE]
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            space, deterministic=True, min_budget=1, max_budget=search.epochs, n_trials=500, seed=search.seed,
            output_directory=Path(folder), use_default_config=True,
        )  # fmt: skip
        facade = MultiFidelityFacade(scenario, lambda config, seed, budget: 0.0, logging_level=False, overwrite=True)
        trained: dict[Any, int] = {}
        while True:
            wanted = facade.ask()
            assert wanted.budget is not None
            epochs, walk = (
                round(wanted.budget),
                search.trainings.walk(dict(wanted.config), trained.get(wanted.config, 0)),
            )
            value = next(value for epoch, value in walk if epoch == epochs)
            trained[wanted.config] = epochs
            facade.tell(wanted, TrialValue(cost=-value), save=False)


def syne_tune(search: Search, name: str) -> None:
    """One of Syne Tune's multi-fidelity schedulers."""
    from syne_tune.backend.trial_status import Trial  # pyright: ignore[reportMissingImports]
    from syne_tune.config_space import finrange, loguniform  # pyright: ignore[reportMissingImports]
    from syne_tune.optimizer import baselines  # pyright: ignore[reportMissingImports]
    from syne_tune.optimizer.scheduler import SchedulerDecision  # pyright: ignore[reportMissingImports]

    space = {RATE: loguniform(*search.table.rates)}
    for place in (MARGIN, GAMMA, WIDTH):
        values = search.table.grid[place]
        space[place] = finrange(values[0], values[-1], len(values), cast_int=place == WIDTH)
    np.random.seed(search.seed)
    scheduler = getattr(baselines, name)(
        space, metric=_METRIC, do_minimize=False, time_attr="epoch", max_t=search.epochs, random_seed=search.seed,
        points_to_evaluate=[search.first],
    )  # fmt: skip
    number = 0
    while True:
        trial = Trial(number, scheduler.suggest().config, datetime.datetime.now())
        scheduler.on_trial_add(trial)
        for epoch, value in search.trainings.walk(trial.config):
            result = {"epoch": epoch, _METRIC: value}
            if epoch == search.epochs:
                scheduler.on_trial_complete(trial, result)
            elif scheduler.on_trial_result(trial, result) != SchedulerDecision.CONTINUE:
                scheduler.on_trial_remove(trial)
                break
        number += 1


METHODS: dict[str, Callable[[Search], None]] = {
    "ours": ours,
    "ours, a third goes on": lambda search: ours(search, scheduler=Scheduler(reduction_factor=3)),
    "random + ASHA": random_asha,
    "random + ASHA, a half goes on": lambda search: random_asha(search, 2),
    "Optuna TPE + hyperband": lambda search: optuna_tpe(
        search, optuna.pruners.HyperbandPruner(min_resource=1, max_resource=search.epochs, reduction_factor=3)
    ),
    "Optuna TPE + median": lambda search: optuna_tpe(search, optuna.pruners.MedianPruner()),
    "Ray OptunaSearch + ASHA": ray_optuna_asha,
    "Ray OptunaSearch + ASHA, a half goes on": lambda search: ray_optuna_asha(search, 2),
    "SMAC3 multi-fidelity": smac_multi_fidelity,
    "Syne Tune BOHB": lambda search: syne_tune(search, "BOHB"),
    "Syne Tune CQR + ASHA": lambda search: syne_tune(search, "ASHACQR"),
}
"""The tuners, by the names that they are shown under."""
