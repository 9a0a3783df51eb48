"""The one place that starts or joins Ray."""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError
from harma_ray.on_ray.address import find_address, needs_token
from harma_ray.on_ray.folder import choose_folder
from harma_ray.on_ray.own_cluster import few_processes
from harma_ray.on_ray.quirks import (
    announced_dashboard,
    end_failed_start,
    heeding_interruptions,
    is_late_start,
    is_stranger,
    keeping_handler,
    machine_cpus,
    machine_memory,
    quiet_errors,
    set_variables,
)
from harma_ray.resources import Cluster

STORE_BYTES = 2 * 2**30
"""Of the object store of a cluster that is started, unless it has many CPUs; at most a fifth of the memory."""
STORE_BYTES_OF_A_CPU = 256 * 2**20
"""Of a larger one, a quarter of which is for what tasks have decoded (`harma_ray.on_ray.decoding`)."""
_SHARED_MEMORY = Path("/dev/shm")
LOOPBACK = "127.0.0.1"
_Surroundings = Callable[[], contextlib.AbstractContextManager[None]]
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_cluster(
    address: str | None = None, *, num_cpus: int | None = None, dashboard: bool = False, for_tasks: bool = False
) -> Iterator[Cluster]:
    """Joins a cluster, or starts one on this machine, and leaves or stops it at the end.

    Args:
        address: Of a cluster to join; None takes ``RAY_ADDRESS``, and without that a cluster of this machine's own.
        num_cpus: CPUs of a cluster that is started; None = all.
        dashboard: Whether a cluster that is started has Ray's dashboard: a dozen processes and a GiB of memory more.
        for_tasks: Whether a cluster that is started is for tasks, not actors: a process for each CPU waits for them.

    Raises:
        UserError: If the cluster cannot be reached or started.
    """
    prepare_environment(own_cluster=False)
    address = find_address(address)
    prepare_environment(own_cluster=not address)
    with announced_dashboard(LOOPBACK) if dashboard and not address else contextlib.nullcontext() as port:
        options = {"address": address} if address else _own_cluster(num_cpus, port)
        lean = functools.partial(few_processes, dashboard=dashboard, for_tasks=for_tasks)
        with _connection(options, address or "local", contextlib.nullcontext if address else lean) as cluster:
            yield cluster


def require_reachable(address: str | None) -> None:
    """Raises UserError if a cluster is to be joined, see `ray_cluster`, and none answers; starts and joins none."""
    prepare_environment(own_cluster=False)
    find_address(address)


def _own_cluster(num_cpus: int | None, dashboard_port: int | None) -> dict[str, Any]:
    """Returns how a cluster is started."""
    folder, spill = choose_folder()
    num_cpus = num_cpus or machine_cpus()
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "include_dashboard": dashboard_port is not None,
        "dashboard_host": LOOPBACK,
        "dashboard_port": dashboard_port,
        "object_store_memory": _object_store_bytes(num_cpus),
        "_temp_dir": str(folder),
        **({"object_spilling_directory": str(spill)} if spill else {}),
    }


def _object_store_bytes(num_cpus: int) -> int:
    """Returns how large a store a cluster is given; above 2 GiB only as shared memory allows, else Ray takes a disk."""
    shared = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
    wanted = max(STORE_BYTES, min(num_cpus * STORE_BYTES_OF_A_CPU, int(0.9 * shared)))
    return min(wanted, int(0.2 * machine_memory()))


@contextlib.contextmanager
def _connection(options: Mapping[str, Any], address: str, starting: _Surroundings) -> Iterator[Cluster]:
    import ray

    quiet_errors()
    with keeping_handler(signal.SIGTERM), heeding_interruptions():
        context = _initialise(options, address, starting)
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


def _initialise(options: Mapping[str, Any], address: str, starting: _Surroundings) -> Any:
    """Returns Ray's context; a start of its own that fails, as on a busy machine, is tried once more.

    Args:
        options: Arguments of ``ray.init``.
        address: ``local``, or the cluster's.
        starting: What Ray is started in.

    Raises:
        UserError: If Ray is not there then.
    """
    import ray
    import ray.exceptions

    for tries_left in (1, 0):
        try:
            with starting():
                return ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except ray.exceptions.AuthenticationError as error:
            raise needs_token(address) from error
        except ValueError as error:
            raise UserError(f"Ray does not take its settings ({_reason(error)}); check those named RAY_...") from error
        except Exception as error:
            if not isinstance(error, OSError | RuntimeError | ray.exceptions.RayError) and not is_late_start(error):
                raise
            failure = error
        if address != "local":
            raise _cannot_join(failure, address) from failure
        if ray.is_initialized():
            raise failure
        logs = end_failed_start(failure, keep_logs=not tries_left)
        if tries_left:
            _logger.warning("Ray did not start (%s); trying once more", _reason(failure))
            continue
        raise UserError(
            f"Ray did not start on this machine in two tries ({_reason(failure)}); it may be too busy, or short of "
            f"memory or disk: try again{f', or look into {logs}' if logs else ''}"
        ) from failure
    raise AssertionError


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")


def _cannot_join(error: BaseException, address: str) -> UserError:
    if is_stranger(error):
        return UserError(
            f"this machine does not belong to the Ray cluster at {address}; run the command on one that does, or "
            "submit it with `ray job submit`"
        )
    return UserError(f"cannot join the Ray cluster at {address} ({_reason(error)}); check --address and RAY_ADDRESS")


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


def prepare_environment(*, own_cluster: bool) -> None:
    """Sets what Ray reads when it is first imported; what the user has set stays.

    Args:
        own_cluster: Whether a cluster will be started here. It gets a random access token, or Ray would write one to
            the home folder; too late once Ray is imported.
    """
    set_variables()
    chosen = any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if own_cluster and not chosen and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
