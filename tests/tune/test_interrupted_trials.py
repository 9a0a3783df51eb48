"""What Ctrl-C does to the trials at work: they are asked to save, and waited for."""

import threading
import time
from types import SimpleNamespace

from optuna.trial import TrialState

from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.training.interruption import STOP_NAME
from harma_ray.tune.search import _save_running
from harma_ray.tune.study import trial_folder


def test_running_trials_are_asked_to_save_and_waited_for(tmp_path):
    config = recipe_config("harma-scenes")
    asked_for, saved = [], threading.Event()
    path = trial_folder(tmp_path, 3)
    path.mkdir(parents=True)
    begun = threading.Event()

    def trial():
        with Run(path, config).locked():
            begun.set()
            while not (path / STOP_NAME).exists():
                time.sleep(0.01)
            time.sleep(0.3)
            saved.set()

    def get_trials(deepcopy, states):
        asked_for.extend(states)
        return [SimpleNamespace(number=3), SimpleNamespace(number=4)]  # of 4 there is no folder yet

    thread = threading.Thread(target=trial)
    thread.start()
    assert begun.wait(10)
    study = SimpleNamespace(study=SimpleNamespace(get_trials=get_trials))
    _save_running(tmp_path, SimpleNamespace(config=config, seeds=1), study)
    assert saved.is_set()
    assert asked_for == [TrialState.RUNNING]
    assert not (path / STOP_NAME).exists()
    thread.join()
