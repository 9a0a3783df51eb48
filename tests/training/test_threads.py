import os

import pytest
import torch

from harma_ray.data.stream import Worker
from harma_ray.recipes import recipe_config
from harma_ray.resources import WorkerPlan
from harma_ray.settings import build_config
from harma_ray.training.step import local_worker
from harma_ray.training.threads import use_threads
from harma_ray.tune.trial import single_worker


def settings(**threads):
    return build_config(recipe_config("harma-scenes"), {"scaling.use_gpu": False, **threads})


@pytest.mark.parametrize(("num_cpus", "threads"), [(3, 3), (2.5, 2), (0.25, 1), (0, 1)])
def test_torch_and_decoding_have_a_thread_for_each_cpu_of_the_process(num_cpus, threads):
    assert use_threads(num_cpus, settings()) == threads
    assert torch.get_num_threads() == threads


def test_settings_say_otherwise_each_for_its_own():
    chosen = {"train.threads": 2, "data.decode_threads": 5}
    assert use_threads(3, settings(**chosen)) == 5
    assert torch.get_num_threads() == 2
    assert use_threads(3, settings(**{"train.threads": 2})) == 3
    assert (use_threads(2.5), torch.get_num_threads()) == (2, 2)
    assert torch.get_num_threads() == 2


def test_a_worker_of_this_process_has_the_machine_and_a_trial_what_ray_reserves_for_it():
    cpus = len(os.sched_getaffinity(0))
    assert local_worker(settings()) == Worker(decode_threads=cpus)
    assert torch.get_num_threads() == cpus
    assert single_worker(settings(), WorkerPlan(1, 3, 0)) == Worker(decode_threads=3)
    assert torch.get_num_threads() == 3
