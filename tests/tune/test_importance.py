from dataclasses import replace

import numpy as np
import pytest
from synthetic_search import KIND, MARGIN, RATE, draw_point, make_results, make_trial, make_trials

from harma_ray.tune.report.importance import importance
from harma_ray.tune.report.scale import position


def test_importance_finds_the_parameter_that_matters():
    for seed in range(3):
        shares = importance(make_results(make_trials(60, seed=seed)))
        assert next(iter(shares)) == RATE.name
        assert shares[RATE.name] > 0.8
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_importance_sees_a_logarithmic_parameter_at_small_values():
    """Below the middle of the logarithmic range lie three percent of the plain one."""
    random = np.random.default_rng(0)
    points = [draw_point(random, (RATE, MARGIN)) for _ in range(80)]
    trials = [
        make_trial(i, value=10.0 * (position(RATE, p[RATE.name]) < 0.5) + 2 * p[MARGIN.name], params=p)
        for i, p in enumerate(points)
    ]
    shares = importance(make_results(trials, parameters=(RATE, MARGIN)))
    assert shares[RATE.name] == pytest.approx(25 / (25 + 1 / 3), abs=0.03)  # variances: 10^2 / 4, 2^2 / 12


def test_importance_leaves_out_parameters_that_some_trials_lack():
    trials = list(make_trials(20))
    trials[4] = replace(trials[4], params={RATE.name: 1e-4, KIND.name: True})
    assert set(importance(make_results(trials))) == {RATE.name, KIND.name}


def test_importance_needs_ten_trials_a_parameter_that_differ():
    trials = make_trials(30)
    assert importance(make_results(trials)) is not None
    assert importance(make_results([*trials[:29], make_trial(29, "failed", None), make_trial(30, "running")])) is None
    assert importance(make_results([replace(trial, values=(1.0,)) for trial in trials])) is None
    assert importance(make_results([replace(trial, params=trials[0].params) for trial in trials])) is None
    assert importance(make_results([replace(trial, params={}) for trial in trials])) is None


def test_importance_does_not_hang_on_the_unit():
    trials = make_trials(30)
    tiny = [replace(trial, values=(trial.values[0] * 1e-9,)) for trial in trials]
    assert importance(make_results(tiny)) == pytest.approx(importance(make_results(trials)), abs=0.02)


def test_importance_says_nothing(capfd):
    assert importance(make_results(make_trials(30)))
    assert capfd.readouterr() == ("", "")
