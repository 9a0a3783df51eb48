"""How a cluster is divided: workers of a training, trials of a search, and what each is given."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harma_ray.config import RunConfig
from harma_ray.errors import UserError, count

TRIAL_MEMORY = 2
"""GiB that a trial's worker on CPUs is taken to need, when nobody says how many run at a time."""
GPU_WORKER_CPUS = 4.0
"""CPUs of a worker on a GPU at most; the others are for the tasks that decode for it."""
DRIVER_CPUS = 0.01
"""CPUs that Ray reserves for a trial with workers of its own, beside these."""


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

    @property
    def is_own(self) -> bool:
        """Whether it was started for this command alone, on this machine."""
        return self.address == "local"


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
        return f"{count(self.num_workers, 'worker')}, each {self.cpus_per_worker:g} CPU and {device}"


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


def plan_workers(config: RunConfig, cluster: Cluster) -> WorkerPlan:
    """Divides the cluster: workers, their CPUs, and a share for the data tasks of each.

    Raises:
        UserError: If the workers and one data task each do not fit; Ray itself would wait for ever.
    """
    scaling, task_cpus = config.scaling, config.data.task_cpus
    use_gpu = uses_gpu(config, cluster)
    num_workers = scaling.num_workers
    if not num_workers and scaling.gpus_per_worker < 1 and use_gpu:
        num_workers = 1
    if not num_workers:
        num_workers = int(cluster.gpus) if use_gpu else max(1, min(2, int(cluster.cpus)))
        while num_workers > 1 and config.train.samples_per_step % num_workers:
            num_workers -= 1
    if use_gpu and num_workers > cluster.gpus:
        raise UserError(
            f"{count(num_workers, 'worker')} cannot have a GPU each: the cluster has {cluster.gpus:g}; use --workers"
        )
    cpus = scaling.cpus_per_worker
    if not cpus:
        share = cluster.cpus / num_workers
        cpus = min(GPU_WORKER_CPUS, share / 2) if use_gpu else max(0.5, share - max(task_cpus, share / 2))
    need = num_workers * (cpus + task_cpus)
    if need > cluster.cpus + 1e-6:
        raise UserError(
            f"{count(num_workers, 'worker')} of {cpus:g} CPU and their data tasks of {task_cpus:g} CPU need {need:g} "
            f"CPUs, but the cluster has {cluster.cpus:g}; use fewer --workers, or lower scaling.cpus_per_worker or "
            "data.task_cpus"
        )
    return WorkerPlan(num_workers, cpus, scaling.gpus_per_worker if use_gpu else 0)


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
    gpus = scaling.gpus_per_worker if uses_gpu(config, cluster) else 0
    num_workers = scaling.num_workers or 1
    in_tasks = config.data.decodes_in_tasks(on_gpu=gpus > 0)
    data_cpus = config.data.task_cpus if num_workers > 1 or in_tasks else 0
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
            f"{count(max(1, concurrent), 'trial')} of {count(num_workers, 'worker')} at a time, each worker with "
            f"{needs}, need more than the cluster has ({held}: room for {most}); use fewer --workers or --concurrent, "
            "or lower scaling.cpus_per_worker, scaling.gpus_per_worker or data.task_cpus"
        )
    reason = "as asked for" if concurrent else f"the {scarce} of the cluster ({held}) hold no more"
    return TrialPlan(WorkerPlan(num_workers, cpus, gpus), concurrent or most, reason)


def _trial_cpus(
    shapes: Sequence[tuple[float, float, float]], num_workers: int, gpus: float, data_cpus: float, concurrent: int
) -> float:
    """Returns the CPUs of a trial's worker: with GPUs a share that leaves some to data tasks, else one if there is."""
    reserve = DRIVER_CPUS if num_workers > 1 else 0
    if gpus:
        shares = [(cpus - reserve) / (int(held) * int(1 / gpus + 1e-6)) for cpus, held, _ in shapes if held]
        share = min(shares, default=0)
        share = min(GPU_WORKER_CPUS, share / 2, share - data_cpus) if data_cpus else share
    else:
        share = (sum(cpus for cpus, _, _ in shapes) - reserve) / (num_workers * max(1, concurrent)) - data_cpus
        share = share if concurrent and len(shapes) == 1 else min(1, share)
    return int(share) if share >= 1 else max(0.25, int(share * 100) / 100)


def has_driver() -> bool:
    """Tells whether this machine has the driver of a GPU, NVIDIA's or AMD's; without it there is none to be used."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def uses_gpu(config: RunConfig, cluster: Cluster) -> bool:
    """Tells whether processes take GPUs: if the settings say so, or say nothing and there are some."""
    wanted = config.scaling.use_gpu
    if wanted and cluster.gpus < 1:
        raise UserError("`scaling.use_gpu` is true, but the cluster has no GPU; use --cpu, or join another cluster")
    return cluster.gpus >= 1 if wanted is None else wanted
