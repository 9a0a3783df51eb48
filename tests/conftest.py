"""Shared fixtures: a Ray cluster, small data sets that the tests draw themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from sqlalchemy import event
from sqlalchemy.engine import Engine

from harma_ray.on_ray.cluster import prepare_environment

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # else torch's threads, waiting for one another, keep others from the cores
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # else a process more for every training
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that the tests start compiles the package anew
prepare_environment(own_cluster=True)  # before anything imports Ray
QUICK_START = Path(__file__).parent / "quick_start"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(QUICK_START), os.environ.get("PYTHONPATH"))))

from random_runs import make_random_run  # noqa: E402

from harma_ray.data.convert.commands import convert_scenes, convert_scenes_cir  # noqa: E402
from harma_ray.recipes import recipe_config  # noqa: E402
from harma_ray.settings import build_config  # noqa: E402

torch.set_num_threads(1)


@event.listens_for(Engine, "connect")
def _leave_writing_to_the_system(connection, record):
    """No test takes the power away, so that studies need not wait for the disk."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What commands remember of weights is not put among the user's; matplotlib's list of fonts stays where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster on one thread, and bit-for-bit comparisons need a fixed number: commands take more."""
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Puts modules that start Ray first, the longest before all: none is left to run alone in the end."""
    ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        if item.get_closest_marker("ray"):  # which does not wait for the processes that it has ended
            item.add_marker(pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"))
    longest = ("test_workers_in_trials.py", "test_interrupted_runs.py", "test_interrupted_stages.py")
    items.sort(key=lambda item: (item.path not in ray, item.path.name not in longest))


@pytest.fixture(scope="session")
def cluster_address():
    """Address of a cluster of two CPUs, in a process of its own, for all modules."""
    code = """
import ray
from harma_ray.on_ray.cluster import ray_cluster
with ray_cluster(num_cpus=2):
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    address = process.stdout.readline().strip()
    assert address, process.communicate()[1]
    yield address
    process.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def ray_cluster(cluster_address):
    """The cluster of `cluster_address`, joined for the tests of a module."""
    from harma_ray.on_ray.cluster import ray_cluster

    with ray_cluster(cluster_address) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def joined(cluster_address):
    """The environment in which commands join the cluster of `cluster_address`."""
    return {**os.environ, "RAY_ADDRESS": cluster_address}


@pytest.fixture
def joined_here(cluster_address, monkeypatch):
    """Has commands that run in this process join the cluster of `cluster_address`."""
    monkeypatch.setenv("RAY_ADDRESS", cluster_address)


@pytest.fixture
def encode_here(monkeypatch):
    """Has this process encode, in tests of what does not depend on which process does."""

    def map_here(build, plans, *, num_actors, use_gpu):
        yield from map(build(), plans)

    monkeypatch.setattr("harma_ray.vectors.job.map_in_actors", map_here)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A data set of drawn scenes: 40 train, 13 val, 11 test images of 64 px with 5 captions each."""
    out = tmp_path_factory.mktemp("scenes")
    convert_scenes(out, {"train": 40, "val": 13, "test": 11}, style="summer", size=64)
    return out


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory) -> Path:
    """A smaller one, for searches, whose every trial trains: 16 train, 8 val, 6 test images; 80 pairs an epoch."""
    out = tmp_path_factory.mktemp("few_scenes")
    convert_scenes(out, {"train": 16, "val": 8, "test": 6}, style="summer", size=64)
    return out


@pytest.fixture(scope="session")
def composed(tmp_path_factory) -> Path:
    """A data set of composed retrieval: 40 train, 5 val, 4 test queries of drawn scenes of 64 px, 6 images each."""
    out = tmp_path_factory.mktemp("composed")
    convert_scenes_cir(out, {"train": 40, "val": 5, "test": 4}, style="summer", size=64)
    return out


@pytest.fixture
def scenes_copy(scenes, tmp_path) -> Path:
    """A copy of the scenes that a test may damage."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture(scope="session")
def random_run(scenes, tmp_path_factory):
    """A run whose adapters are random, so that nothing is the identity."""
    config = build_config(recipe_config("harma-scenes"), {"data.path": str(scenes)})
    return make_random_run(tmp_path_factory.mktemp("runs"), "random", config)
