"""How large an object store a cluster of one machine is given."""

from collections import namedtuple

import pytest

from harma_ray.on_ray import cluster
from harma_ray.on_ray.quirks import machine_cpus

GIB = 2**30
USAGE = namedtuple("USAGE", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("cpus", "memory", "shared", "expected"),
    [
        (2, 24, 24, 2),
        (2, 5, 24, 1),  # a fifth of the memory
        (16, 128, 64, 4),  # one GPU
        (128, 2000, 1000, 32),  # eight
        (128, 100, 1000, 20),
        (128, 2000, 10, 9),  # a container's: what it has free
        (128, 2000, 0.0625, 2),  # as a container is given that asks for nothing
        (128, 2000, None, 2),
    ],
)
def test_the_store_grows_with_the_cpus_as_far_as_memory_goes(monkeypatch, tmp_path, cpus, memory, shared, expected):
    monkeypatch.setattr(cluster, "_SHARED_MEMORY", tmp_path if shared is not None else tmp_path / "none")
    monkeypatch.setattr(cluster, "machine_memory", lambda: memory * GIB)
    if shared is not None:
        monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: USAGE(0, 0, int(shared * GIB)))
    assert cluster._object_store_bytes(cpus) == expected * GIB


@pytest.mark.parametrize(("limit", "cpus"), [(64, 64), (17.5, 17), (0.5, 1)])
def test_a_containers_cpus_count_not_the_machines(monkeypatch, caplog, limit, cpus):
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: limit)
    monkeypatch.setattr(cluster, "machine_memory", lambda: 2000 * GIB)
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: USAGE(0, 0, 1000 * GIB))
    assert machine_cpus() == cpus
    options = cluster._own_cluster(None, None)
    assert (options["num_cpus"], options["object_store_memory"]) == (cpus, max(2 * GIB, cpus * GIB // 4))
    options = cluster._own_cluster(32, None)
    assert (options["num_cpus"], options["object_store_memory"]) == (32, 8 * GIB)
    assert not caplog.records
