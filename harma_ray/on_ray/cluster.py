"""The one place that starts or joins Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError
from harma_ray.on_ray.address import find_address
from harma_ray.on_ray.folder import choose_folder
from harma_ray.on_ray.start import start_ray
from harma_ray.resources import Cluster

OBJECT_STORE_LIMIT = 2 * 2**30
LOOPBACK = "127.0.0.1"
_logger = logging.getLogger(__name__)
_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"


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
    prepare_environment(own_cluster=False)
    address = find_address(address)
    prepare_environment(own_cluster=not address)
    with _dashboard_port() if dashboard and not address else contextlib.nullcontext() as port:
        options = {"address": address} if address else _own_cluster(num_cpus, port)
        with _connection(options, address or "local") as cluster:
            yield cluster


def _own_cluster(num_cpus: int | None, dashboard_port: int | None) -> dict[str, Any]:
    """Returns how a cluster is started."""
    folder, spill = choose_folder()
    return {
        "address": "local",
        "num_cpus": num_cpus,  # None: Ray counts them, and heeds a container's limit
        "include_dashboard": dashboard_port is not None,
        "dashboard_host": LOOPBACK,
        "dashboard_port": dashboard_port,
        "object_store_memory": min(OBJECT_STORE_LIMIT, int(0.2 * _memory_bytes())),
        "_temp_dir": str(folder),
        **({"object_spilling_directory": str(spill)} if spill else {}),
    }


@contextlib.contextmanager
def _dashboard_port() -> Iterator[int]:
    """Chooses a port for a dashboard and tells it to all processes that are started in the block.

    Without being told, Ray Train's helpers look for the clusters of this machine and give up if there are two: trials
    that are stopped would then keep their places for ever (Ray 2.60).
    """
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    before = os.environ.get(_DASHBOARD_VARIABLE)
    os.environ[_DASHBOARD_VARIABLE] = f"http://{LOOPBACK}:{port}"
    try:
        yield port
    finally:
        os.environ.pop(_DASHBOARD_VARIABLE)
        if before is not None:
            os.environ[_DASHBOARD_VARIABLE] = before


@contextlib.contextmanager
def _connection(options: Mapping[str, Any], address: str) -> Iterator[Cluster]:
    import ray

    _quiet_errors()
    on_termination = signal.getsignal(signal.SIGTERM)
    context = start_ray(options, address)
    if on_termination is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own there
    try:
        resources = ray.cluster_resources()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        yield Cluster(
            cpus=resources.get("CPU", 0),
            gpus=resources.get("GPU", 0),
            nodes=len(nodes),
            address=address,
            dashboard=context.dashboard_url or "",
            shapes=tuple(_shape(node["Resources"]) for node in nodes),
        )
    finally:
        ray.shutdown()


def _quiet_errors() -> None:
    """Keeps what Ray prints of dead workers, whatever ``log_to_driver`` says, out of the terminal (Ray 2.60).

    `harma_ray.on_ray.deaths` tells it in one line.
    """
    import ray._private.worker

    def log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        _logger.info("%s", "\n".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log


def quiet_data() -> None:
    """Keeps Ray Data's own chatter in its log files; it sets up its loggers when it is imported."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


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
