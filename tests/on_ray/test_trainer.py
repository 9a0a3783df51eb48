"""What Ray Train 2.60 starts beside the workers, and a training here does without."""

import os

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from harma_ray.on_ray.trainer import PREEMPTION_VARIABLE, Trainer


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv(PREEMPTION_VARIABLE, "")  # is put back at the end
    monkeypatch.delenv(PREEMPTION_VARIABLE)
    how = {"scaling_config": ScalingConfig(num_workers=2), "run_config": RunConfig(storage_path=str(tmp_path))}
    return lambda kind, **more: kind(print, **how, **more)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("own_cluster", "unused"),
    [(False, {DatasetsCallback}), (True, {DatasetsCallback, PlacementGroupCleanerCallback})],
    ids=["joined", "own"],
)
def test_processes_that_ray_train_starts_for_every_training_are_left_out_where_they_have_nothing_to_do(
    make, own_cluster, unused
):
    theirs = [type(callback) for callback in make(TorchTrainer)._create_default_callbacks()]
    assert unused <= set(theirs)
    ours = [type(callback) for callback in make(Trainer, own_cluster=own_cluster)._create_default_callbacks()]
    assert ours == [kind for kind in theirs if kind not in unused]


def given_policy(trainer, monkeypatch):
    """Returns the scaling policy that the controller is given, and what it reads of watching for reclaimed nodes."""
    given = {}

    def run(self, **settings):
        given.update(settings, watches=os.environ.get(PREEMPTION_VARIABLE))

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", run)
    trainer._initialize_and_run_controller(scaling_policy="Ray's")
    return given["scaling_policy"], given["watches"]


def test_on_a_cluster_of_its_own_the_workers_places_are_asked_of_nobody(make, monkeypatch):
    policy, watches = given_policy(make(Trainer, own_cluster=True), monkeypatch)
    assert watches == "0"
    assert PREEMPTION_VARIABLE not in os.environ  # a cluster that is joined later is Ray's as it is
    policy.after_controller_start(None)
    theirs = FixedScalingPolicy(policy.scaling_config)
    with pytest.raises(AssertionError):  # it has nobody to ask before the controller has started a process for that
        theirs.make_decision_for_non_running_worker_group()
    monkeypatch.setattr(theirs, "_maybe_send_resource_request", lambda: None)
    expected = theirs.make_decision_for_non_running_worker_group()
    assert policy.make_decision_for_non_running_worker_group() == expected


def test_on_a_cluster_that_was_joined_all_is_as_ray_has_it(make, monkeypatch):
    assert given_policy(make(Trainer, own_cluster=False), monkeypatch) == ("Ray's", None)


def test_what_the_user_wants_of_the_watcher_stays(make, monkeypatch):
    monkeypatch.setenv(PREEMPTION_VARIABLE, "1")
    assert given_policy(make(Trainer, own_cluster=True), monkeypatch)[1] == "1"
    assert os.environ[PREEMPTION_VARIABLE] == "1"


def test_the_controller_reads_the_variable():
    assert PREEMPTION_VARIABLE == ENABLE_PREEMPTION_WATCHER_ENV_VAR
    assert PREEMPTION_VARIABLE in ENV_VARS_TO_PROPAGATE
