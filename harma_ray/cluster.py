"""The one place that starts or joins Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harma_ray.config import RunConfig
from harma_ray.errors import UserError

OBJECT_STORE_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Cluster:
    """What the cluster offers."""

    cpus: float
    """CPUs that Ray may give out."""
    gpus: float
    """GPUs that Ray may give out."""
    nodes: int
    """Machines."""
    address: str
    """``local``, or the address that was joined."""
    dashboard: str
    """Address of Ray's dashboard, or nothing."""
    shapes: tuple[tuple[float, float, float], ...] = ()
    """CPUs, GPUs and GiB of memory of every machine."""


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers a job gets, and what each is given."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def use_gpu(self) -> bool:
        """Whether the workers use GPUs."""
        return self.gpus_per_worker > 0

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return {"CPU": self.cpus_per_worker, **({"GPU": self.gpus_per_worker} if self.use_gpu else {})}

    def describe(self) -> str:
        """Returns one line for the user."""
        share = "a GPU" if self.gpus_per_worker == 1 else f"{self.gpus_per_worker:g} of a GPU"
        device = share if self.use_gpu else "no GPU"
        return f"{self.num_workers} worker(s), each {self.cpus_per_worker:g} CPU and {device}"


@contextlib.contextmanager
def ray_cluster(
    address: str | None = None, *, num_cpus: int | None = None, dashboard: bool = False
) -> Iterator[Cluster]:
    """Joins a cluster, or starts one on this machine, and leaves or stops it at the end.

    Args:
        address: Of a cluster to join; None takes ``RAY_ADDRESS``, and without that a cluster of this machine's own.
        num_cpus: CPUs of a cluster that is started; None = all.
        dashboard: Whether a cluster that is started has Ray's dashboard: a dozen processes and a GiB of memory more.

    Raises:
        UserError: If the cluster cannot be reached or started.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    prepare_environment(own_cluster=not address)
    import ray
    import ray.exceptions

    options: dict = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "num_cpus": num_cpus,  # None: Ray counts them, and heeds a container's limit
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": min(OBJECT_STORE_LIMIT, int(0.2 * _memory_bytes())),
        }
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(**options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} wants a token that this program does not have or has wrong; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as on the cluster's head"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot reach or start Ray ({reason}); check --address and RAY_ADDRESS") from error
    if on_termination is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own there
    try:
        resources = ray.cluster_resources()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        yield Cluster(
            cpus=resources.get("CPU", 0),
            gpus=resources.get("GPU", 0),
            nodes=len(nodes),
            address=address or "local",
            dashboard=context.dashboard_url or "",
            shapes=tuple(_shape(node["Resources"]) for node in nodes),
        )
    finally:
        ray.shutdown()


def quiet_data() -> None:
    """Keeps Ray Data's own chatter in its log files; it sets up its loggers when it is imported."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def plan_workers(config: RunConfig, cluster: Cluster) -> WorkerPlan:
    """Divides the cluster: workers, their CPUs, and a share for the data tasks of each.

    Raises:
        UserError: If the workers and one data task each do not fit; Ray itself would wait for ever.
    """
    scaling, task_cpus = config.scaling, config.data.task_cpus
    use_gpu = _use_gpu(config, cluster)
    num_workers = scaling.num_workers
    if not num_workers and scaling.gpus_per_worker < 1 and use_gpu:
        num_workers = 1
    if not num_workers:
        num_workers = int(cluster.gpus) if use_gpu else max(1, min(2, int(cluster.cpus)))
        while num_workers > 1 and config.train.global_batch_size % num_workers:
            num_workers -= 1
    if use_gpu and num_workers > cluster.gpus:
        raise UserError(f"{num_workers} workers need a GPU each, but the cluster has {cluster.gpus:g}; use --workers")
    cpus = scaling.cpus_per_worker
    if not cpus:
        share = cluster.cpus / num_workers
        cpus = min(4.0, share / 2) if use_gpu else max(0.5, share - max(task_cpus, share / 2))
    need = num_workers * (cpus + task_cpus)
    if need > cluster.cpus + 1e-6:
        raise UserError(
            f"{num_workers} workers of {cpus:g} CPU and their data tasks of {task_cpus:g} CPU need {need:g} CPUs, but "
            f"the cluster has {cluster.cpus:g}; use fewer --workers, or lower scaling.cpus_per_worker or data.task_cpus"
        )
    return WorkerPlan(num_workers, cpus, scaling.gpus_per_worker if use_gpu else 0)


@dataclass(frozen=True)
class TrialPlan:
    """How many trials of a search run at a time, and what each is given."""

    workers: WorkerPlan
    """The workers of each trial."""
    concurrent: int
    reason: str
    """Why not more, for the user."""

    def describe(self) -> str:
        """Returns one line for the user."""
        return f"{self.concurrent} at a time, each with {self.workers.describe()}: {self.reason}"


TRIAL_MEMORY = 2
"""GiB that a trial's worker on CPUs is taken to need, when nobody says how many run at a time."""
DRIVER_CPUS = 0.01
"""CPUs that Ray reserves for a trial with workers of its own, beside these."""


def plan_trials(config: RunConfig, cluster: Cluster, concurrent: int = 0) -> TrialPlan:
    """Fills the cluster with trials: as many as fit with all their workers and data tasks.

    Args:
        config: Settings of the trials.
        cluster: Where.
        concurrent: Trials at a time that are asked for; 0 = as many as fit.

    Raises:
        UserError: If not one trial, or not as many as asked for, fit; Ray itself would wait for ever.
    """
    scaling = config.scaling
    gpus = scaling.gpus_per_worker if _use_gpu(config, cluster) else 0
    num_workers = scaling.num_workers or 1
    data_cpus = config.data.task_cpus if num_workers > 1 or config.data.decode == "tasks" else 0
    shapes = cluster.shapes or ((cluster.cpus, cluster.gpus, 0),)
    cpus = scaling.cpus_per_worker or _trial_cpus(shapes, num_workers, gpus, data_cpus, concurrent)
    slots, scarce = 0, "CPUs"
    for node_cpus, node_gpus, memory in shapes:
        fits = {"CPUs": int((node_cpus - (DRIVER_CPUS if num_workers > 1 else 0)) / (cpus + data_cpus) + 1e-6)}
        if gpus:
            fits["GPUs"] = int(node_gpus) * int(1 / gpus + 1e-6)
        elif not concurrent and memory:
            fits["memory"] = max(1, int(memory / TRIAL_MEMORY))
        least = min(fits, key=lambda name: fits[name])
        slots += fits[least]
        scarce = least if fits[least] < fits["CPUs"] else scarce
    most = slots // num_workers
    held = f"{cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
    needs = f"{cpus + data_cpus:g} CPUs" + (f" and {gpus:g} GPU" if gpus else "")
    if most < max(1, concurrent):
        raise UserError(
            f"{max(1, concurrent)} trial(s) of {num_workers} worker(s) at a time, each worker with {needs}, need more "
            f"than the cluster has ({held}: room for {most}); use fewer --workers or --concurrent, or lower "
            "scaling.cpus_per_worker, scaling.gpus_per_worker or data.task_cpus"
        )
    reason = "as asked for" if concurrent else f"the {scarce} of the cluster ({held}) hold no more"
    return TrialPlan(WorkerPlan(num_workers, cpus, gpus), concurrent or most, reason)


def _trial_cpus(
    shapes: Sequence[tuple[float, float, float]], num_workers: int, gpus: float, data_cpus: float, concurrent: int
) -> float:
    """Returns the CPUs of a trial's worker: with GPUs an equal share beside the data tasks, else one if it is there."""
    reserve = DRIVER_CPUS if num_workers > 1 else 0
    if gpus:
        shares = [(cpus - reserve) / (int(held) * int(1 / gpus + 1e-6)) for cpus, held, _ in shapes if held]
        share = min(shares, default=0) - data_cpus
    else:
        share = (sum(cpus for cpus, _, _ in shapes) - reserve) / (num_workers * max(1, concurrent)) - data_cpus
        share = share if concurrent and len(shapes) == 1 else min(1, share)
    return int(share) if share >= 1 else max(0.25, int(share * 100) / 100)


def _use_gpu(config: RunConfig, cluster: Cluster) -> bool:
    wanted = config.scaling.use_gpu
    if wanted and cluster.gpus < 1:
        raise UserError("`scaling.use_gpu` is true, but the cluster has no GPU; use --cpu, or join another cluster")
    return cluster.gpus >= 1 if wanted is None else wanted


def _shape(resources: Mapping[str, float]) -> tuple[float, float, float]:
    return resources.get("CPU", 0), resources.get("GPU", 0), resources.get("memory", 0) / 2**30


def require_shared_folder(folder: Path, cluster: Cluster) -> None:
    """Checks on every machine of the cluster that it sees a folder of this one, which is made if missing.

    Raises:
        UserError: If a machine does not see it.
    """
    if cluster.nodes < 2:
        return
    marker = folder / f".shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); choose another folder") from error
    try:
        require_visible([marker], cluster)
    finally:
        marker.unlink()


def require_visible(paths: Sequence[Path], cluster: Cluster) -> None:
    """Checks on every machine of the cluster that it sees files or folders of this one.

    Raises:
        UserError: If a machine does not see one of them.
    """
    if cluster.nodes < 2:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    sees = ray.remote(num_cpus=0)(_exists)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    for path in paths:
        answers = ray.get([sees.options(scheduling_strategy=place).remote(str(path)) for place in places])
        blind = [node["NodeManagerAddress"] for node, sees_it in zip(nodes, answers, strict=True) if not sees_it]
        if blind:
            folder = path.parent if path.name.startswith(".shared-") else path
            raise UserError(
                f"{folder} is not shared: {len(blind)} of {len(nodes)} machines do not see it "
                f"({', '.join(blind[:3])}); use storage that all machines mount"
            )


def _exists(path: str) -> bool:
    return os.path.exists(path)


def node_cpus() -> int:
    """Returns the CPUs of this process's node as Ray counts them, which heeds a container's limit; at least 1."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return max(1, int(next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == own)))


def _memory_bytes() -> int:
    """Returns this machine's memory, or its container's limit if that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.isfile(file):
            limit = Path(file).read_text().strip()
            memory = min(memory, int(limit)) if limit.isdigit() else memory
    return memory


def prepare_environment(*, own_cluster: bool) -> None:
    """Sets what Ray reads when it is first imported; what the user has set stays.

    Args:
        own_cluster: Whether a cluster will be started here. It gets a random access token, or Ray would write one to
            the home folder; too late once Ray is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for the controller's next poll
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a search as it ends a training
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial keeps the record of any run
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced whole
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that failed has no metrics
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")  # a search goes on from its own records
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, Ray warns of it
    chosen = any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if own_cluster and not chosen and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
