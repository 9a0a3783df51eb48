"""A machine of the cluster goes away while a search runs on it."""

import pytest
import ray
from ray.cluster_utils import Cluster as LocalNodes

from harma_ray.recipes import recipe_config
from harma_ray.resources import Cluster, plan_trials
from harma_ray.settings import build_config
from harma_ray.training.tracking import read_records
from harma_ray.tune.search import prepare_trials, run_search
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range

RATE = Range(name="optim.learning_rate", kind="float", low=1e-3, high=1e-2, log=True)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_trials_of_a_lost_machine_go_on_elsewhere_from_their_checkpoints(few_scenes, tmp_path):
    config = build_config(recipe_config("harma-scenes"), {
        "model.pretrained": "random",
        "data.path": str(few_scenes), "train.epochs": 10, "train.global_batch_size": 20, "adapter.width": 16,
        "adapter.shared_width": 8, "scaling.cpus_per_worker": 1,
    })  # fmt: skip
    space = SearchDefinition(
        config=config,
        parameters=(RATE,),
        sampler=Sampler(name="random"),
        scheduler=Scheduler(name="none"),
        limits=Limits(trials=2),
        concurrent=2,
    )
    nodes = LocalNodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = []
    try:
        second = nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        two = Cluster(cpus=2, gpus=0, nodes=2, address=nodes.address, dashboard="", shapes=((1, 0, 8), (1, 0, 8)))

        def on_event(event):
            reports = [e for e in (*told, event) if e.report is not None and e.report.progress >= 1]
            told.append(event)
            if len({e.number for e in reports}) == 2 and not lost:  # both have a checkpoint
                lost.append(second)
                nodes.remove_node(second, allow_graceful=False)

        told = []
        plan = plan_trials(config, two, 2)
        assert plan.concurrent == 2
        results = run_search(tmp_path, space, plan, prepare_trials(space, plan), on_event)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert lost
    assert [trial.state for trial in results.trials] == ["complete", "complete"]
    starts = []
    for trial in results.trials:
        records = list(read_records(trial.folder))
        steps = [record["step"] for record in records if record["kind"] == "step"]
        assert steps == sorted(set(steps))
        assert [epoch for epoch, _ in trial.curve] == list(range(1, 11))
        starts.append([record["step"] for record in records if record["kind"] == "start"])
    again = [own for own in starts if len(own) > 1]
    assert len(again) == 1  # the one that was there
    assert again[0][0] == 0
    assert again[0][1] in range(4, 40, 4)  # after an epoch, of which each has 4 steps
