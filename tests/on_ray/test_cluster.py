"""The files in ``cluster/``, and how a cluster is divided."""

import contextlib
import re
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from harma_ray.errors import UserError
from harma_ray.on_ray.cluster import ray_cluster, require_shared_folder, require_visible
from harma_ray.recipes import recipe_config
from harma_ray.resources import DRIVER_CPUS, Cluster, plan_trials, plan_workers
from harma_ray.settings import build_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.sh")))
def test_scripts_are_valid_and_executable(script):
    subprocess.run(["bash", "-n", FOLDER / script], check=True)
    assert (FOLDER / script).stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kubernetes_files_describe_a_cluster_of_the_locked_ray(name):
    raw = yaml.safe_load((FOLDER / "kuberay" / f"{name}.yaml").read_text())
    assert raw["apiVersion"] == "ray.io/v1"
    spec = raw["spec"] if raw["kind"] == "RayCluster" else raw["spec"]["rayClusterSpec"]
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M).group(1)
    assert spec["rayVersion"] == locked
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert {volume["name"] for volume in pod["volumes"]} == {"storage", "shm"}
        assert pod["containers"][0]["resources"]["requests"] == pod["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" in groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_launcher_file_fits_rays_own_schema():
    import json

    import jsonschema
    import ray

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(yaml.safe_load((FOLDER / "launcher.yaml").read_text()), json.loads(schema.read_text()))


def config(**changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return build_config(recipe_config("harma-scenes"), dotted)


def cluster(cpus, gpus=0):
    return Cluster(cpus=cpus, gpus=gpus, nodes=1, address="local", dashboard="")


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (3, 0), (4, 0), (16, 1), (64, 8), (7, 2)])
def test_workers_and_their_data_tasks_always_fit(cpus, gpus):
    settings = config(train__global_batch_size=128)
    plan = plan_workers(settings, cluster(cpus, gpus))
    assert plan.num_workers * (plan.cpus_per_worker + settings.data.task_cpus) <= cpus
    assert plan.num_workers >= 1
    assert plan.use_gpu == bool(gpus)
    if gpus:
        assert plan.num_workers == gpus
    assert 128 % plan.num_workers == 0


@pytest.mark.ray
def test_a_folder_that_a_machine_does_not_see_is_refused(tmp_path, monkeypatch):
    """Two nodes on this machine; what the second one sees is told for it, because both have the same disk."""
    import ray
    from ray.cluster_utils import Cluster as LocalNodes

    nodes = LocalNodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        two = Cluster(cpus=2, gpus=0, nodes=2, address=nodes.address, dashboard="")
        require_shared_folder(tmp_path / "runs", two)
        head = nodes.head_node.node_id
        monkeypatch.setattr(
            "harma_ray.on_ray.cluster._exists", lambda path: ray.get_runtime_context().get_node_id() == head
        )
        with pytest.raises(UserError, match=r"runs is not shared: 1 of 2 machines do not see it"):
            require_shared_folder(tmp_path / "runs", two)
        with pytest.raises(UserError, match=r"data is not shared"):
            require_visible([tmp_path / "data"], two)
        assert not list((tmp_path / "runs").iterdir())
    finally:
        ray.shutdown()
        nodes.shutdown()


def named_processes(text):
    """Command lines of this machine's processes that hold a text."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if text in line]


@pytest.mark.ray
@pytest.mark.parametrize("failures", [1, 2])
def test_a_start_of_ray_that_fails_is_tried_once_more_and_leaves_nothing(monkeypatch, caplog, failures):
    """Ray's processes are real; that they came up is denied, in the words of Ray on a busy machine."""
    from ray._private import services

    get_node, asked = services.get_node, []

    def get_node_late(*arguments):
        asked.append(arguments)
        if len(asked) <= failures:
            raise Exception("The current node timed out during startup. This could happen because ...")
        return get_node(*arguments)

    monkeypatch.setattr(services, "get_node", get_node_late)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        sessions = Path(folder, "ray")
        if failures == 1:
            with ray_cluster(num_cpus=1) as started:
                assert started.cpus == 1
                assert len(list(sessions.glob("session_2*"))) == 1
            assert "trying once more" in caplog.text
        else:
            told = pytest.raises(UserError, match=r"two tries \(The current node timed out.*look into .*/logs$")
            with told, ray_cluster(num_cpus=1):
                raise AssertionError
            (session,) = sessions.glob("session_2*")
            assert list((session / "logs").iterdir())
        deadline = time.monotonic() + 60
        while named_processes(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not named_processes(folder)


def test_two_cores_give_two_workers():
    assert plan_workers(config(), cluster(2)).num_workers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling__use_gpu": True}, "no GPU"),
        ({"scaling__num_workers": 5}, "need 5 CPUs"),
        ({"scaling__num_workers": 2, "scaling__cpus_per_worker": 1}, "need 3 CPUs"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_hangs(changes, message):
    with pytest.raises(UserError, match=message):
        plan_workers(config(**changes), cluster(2))


def several(*shapes):
    return Cluster(
        cpus=sum(cpus for cpus, *_ in shapes),
        gpus=sum(gpus for _, gpus, _ in shapes),
        nodes=len(shapes),
        address="local",
        dashboard="",
        shapes=shapes,
    )


def fits(plan, shapes, data_cpus):
    """Places all workers of all trials one by one where there is room, as Ray's placement groups do."""
    free = [[cpus, gpus] for cpus, gpus, _ in shapes]
    workers = plan.workers
    if workers.num_workers > 1:
        free[0][0] -= DRIVER_CPUS * plan.concurrent
    for _ in range(plan.concurrent * workers.num_workers):
        for place in free:
            if place[0] >= workers.cpus_per_worker + data_cpus - 1e-9 and place[1] >= workers.gpus_per_worker - 1e-9:
                place[0] -= workers.cpus_per_worker + data_cpus
                place[1] -= workers.gpus_per_worker
                break
        else:
            return False
    return True


SHAPES = [((2, 0, 8),), ((1, 0, 4),), ((16, 1, 64),), ((64, 8, 256),), ((4, 0, 16), (8, 2, 32)),
          ((3, 1, 16), (3, 1, 16))]  # fmt: skip
TRIALS = [(0, 1), (0, 0.5), (0, 0.25), (0, 0.3), (1, 1), (1, 0.5), (1, 0.25), (1, 0.3), (2, 1), (3, 1)]
"""Workers of a trial, and GPUs of a worker; several workers take whole ones."""
TOO_SMALL = {(2, SHAPES[1]), (3, SHAPES[0]), (3, SHAPES[1]), (2, SHAPES[2]), (3, SHAPES[2]), (3, SHAPES[4]),
             (3, SHAPES[5])}  # fmt: skip
"""Workers of a trial, and machines that have no room for it: too few GPUs, or CPUs beside the driver's."""


@pytest.mark.parametrize("decode", ["worker", "tasks"])
@pytest.mark.parametrize(("workers", "shapes"), sorted(TOO_SMALL, key=str))
def test_a_trial_that_no_cluster_of_this_size_holds_is_refused(workers, shapes, decode):
    with pytest.raises(UserError, match="room for"):
        plan_trials(config(scaling__num_workers=workers, data__decode=decode), several(*shapes))


@pytest.mark.parametrize("decode", ["auto", "worker", "tasks"])
@pytest.mark.parametrize(
    ("workers", "fraction", "shapes"),
    [(*trial, shapes) for trial in TRIALS for shapes in SHAPES if (trial[0], shapes) not in TOO_SMALL],
)
def test_trials_fill_the_cluster_and_always_fit(workers, fraction, decode, shapes):
    settings = config(scaling__num_workers=workers, scaling__gpus_per_worker=fraction, data__decode=decode)
    plan = plan_trials(settings, several(*shapes))
    in_tasks = decode == "tasks" or (decode == "auto" and plan.workers.use_gpu)
    data_cpus = settings.data.task_cpus if workers > 1 or in_tasks else 0
    assert plan.concurrent >= 1
    assert plan.workers.num_workers == max(1, workers)
    assert fits(plan, shapes, data_cpus)
    if plan.workers.use_gpu and plan.workers.num_workers == 1 and all(cpus >= 3 * gpus for cpus, gpus, _ in shapes):
        assert plan.concurrent >= sum(gpus for _, gpus, _ in shapes)


def test_a_trial_takes_one_core_of_a_cluster_without_gpus():
    plan = plan_trials(config(), several((2, 0, 8)))
    assert (plan.concurrent, plan.workers.cpus_per_worker) == (2, 1)
    assert plan_trials(config(), several((2, 0, 8)), concurrent=1).workers.cpus_per_worker == 2
    assert "CPUs of the cluster (2 CPUs, 0 GPUs) hold no more" in plan.describe()


def test_gpus_are_shared_by_as_many_trials_as_the_fraction_says():
    plan = plan_trials(config(scaling__gpus_per_worker=0.25), several((16, 2, 64)))
    assert (plan.concurrent, plan.workers.gpus_per_worker, plan.workers.cpus_per_worker) == (8, 0.25, 1)
    alone = plan_trials(config(scaling__gpus_per_worker=0.25, data__decode="worker"), several((16, 2, 64)))
    assert alone.workers.cpus_per_worker == 2  # nobody decodes for it
    assert "0.25 of a GPU" in plan.describe()


def test_little_memory_limits_the_trials_unless_the_user_says_how_many():
    assert plan_trials(config(), several((32, 0, 8))).concurrent == 4
    assert "memory" in plan_trials(config(), several((32, 0, 8))).describe()
    assert plan_trials(config(), several((32, 0, 8)), concurrent=16).concurrent == 16


@pytest.mark.parametrize(
    ("changes", "concurrent", "message"),
    [
        ({"scaling__cpus_per_worker": 4}, 0, "room for 0"),
        ({}, 9, "room for"),
        ({"scaling__num_workers": 8, "scaling__cpus_per_worker": 1}, 0, "room for 0"),
        ({"scaling__use_gpu": True}, 0, "no GPU"),
    ],
)
def test_trials_that_do_not_fit_are_refused_before_they_hang(changes, concurrent, message):
    with pytest.raises(UserError, match=message):
        plan_trials(config(**changes), several((2, 0, 8)), concurrent)
