"""How much of the difference between trials each searched parameter explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harma_ray.tune.report.scale import position
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.space.parameters import Choices, Parameter, quiet_optuna

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TRIALS_PER_PARAMETER = 10
"""So many runs an input a computer experiment should have (Loeppky, Sacks and Welch, Technometrics 51, 2009): with far
fewer trials the shares are those of chance."""
_SEED = 0


def importance(results: SearchResults) -> dict[str, float] | None:
    """Returns the share of the variance of the first objective that each parameter explains by itself, largest first.

    A random forest is fitted to the complete and stopped trials and its variance is split by parameter (functional
    ANOVA: Hutter, Hoos and Leyton-Brown, ICML 2014). A stopped trial counts with the best it had reached.

    Returns:
        Shares that sum to 1, of the parameters that all these trials have; None with fewer than
        `TRIALS_PER_PARAMETER` trials for each of these, if all have the same value, or if no such parameter varies.
    """
    trials, searched = results.measured, whole_parameters(results)
    values = np.array([trial.value for trial in trials])
    if len(trials) < TRIALS_PER_PARAMETER * max(1, len(searched)) or np.ptp(values) == 0:
        return None
    points = [{parameter.name: _coordinate(parameter, trial) for parameter in searched} for trial in trials]
    if all(point == points[0] for point in points):
        return None
    import optuna

    space = {parameter.name: _distribution(parameter) for parameter in searched}
    values = (values - values.mean()) / values.std()  # the forest takes tiny differences for none
    with quiet_optuna():
        study = optuna.create_study()
        for point, value in zip(points, values, strict=True):
            study.add_trial(optuna.create_trial(params=point, distributions=space, value=float(value)))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=_SEED)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))}


def whole_parameters(results: SearchResults) -> list[Parameter]:
    """Returns the parameters that all trials that count have."""
    partial = partial_parameters(results)
    return [parameter for parameter in results.definition.parameters if parameter.name not in partial]


def partial_parameters(results: SearchResults) -> list[str]:
    """Returns the parameters that have no share, because some trial that counts lacks them."""
    names = [parameter.name for parameter in results.definition.parameters]
    return [name for name in names if any(name not in trial.params for trial in results.measured)]


def _coordinate(parameter: Parameter, trial: TrialResult) -> float | int:
    """Returns the index of a choice, or where a number lies: the evaluator itself knows no logarithmic scale."""
    place = position(parameter, trial.params[parameter.name])
    return int(place * len(parameter.choices)) if isinstance(parameter, Choices) else place


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    is_choice = isinstance(parameter, Choices)
    return CategoricalDistribution(range(len(parameter.choices))) if is_choice else FloatDistribution(0.0, 1.0)
