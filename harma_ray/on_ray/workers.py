"""Runs the loop on the workers of a Ray cluster, with Ray Train."""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harma_ray.compiler import defer_compiler
from harma_ray.config import OnDisk, RunConfig
from harma_ray.data.splits import open_split
from harma_ray.data.stream import Worker
from harma_ray.errors import UserError, WorkerDied, WorkerFailed, find_user_error
from harma_ray.evaluation import Evaluation
from harma_ray.import_export import load_model
from harma_ray.on_ray.cluster import node_cpus, require_shared_folder, require_visible
from harma_ray.on_ray.deaths import drop_notes, leave_note, leave_trace, what_happened
from harma_ray.on_ray.interruption import fit
from harma_ray.preflight import Prepared
from harma_ray.recipes import changed_settings, make_task
from harma_ray.resources import Cluster, WorkerPlan, plan_workers
from harma_ray.runs import Run
from harma_ray.settings import marked_settings
from harma_ray.training.interruption import TrainingStopped, ask_to_stop, withdraw_stop
from harma_ray.training.loop import run_training
from harma_ray.training.run_files import META_NAME
from harma_ray.training.services import adopt_variables, service_variables
from harma_ray.training.sinks import Label
from harma_ray.training.step import evaluate_split
from harma_ray.training.threads import use_threads
from harma_ray.training.tracking import METRICS_NAME

WORK_FOLDER = "ray"
"""Ray Train's own files, inside the run's folder."""
WORKERS_FOLDER = "workers"
"""What the workers tell of themselves, inside the run's folder; see `harma_ray.on_ray.deaths`."""


def train(
    run: Run, prepared: Prepared, cluster: Cluster, *, on_record: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if it has one.

    Args:
        run: The run.
        prepared: What is trained; its settings may name features where the run's name the data set.
        cluster: Where; see `harma_ray.on_ray.cluster.ray_cluster`.
        on_record: Hears of every new line of the run's record while the workers work, and of restarts.

    Returns:
        The final report.

    Raises:
        UserError: For what the user can mend, wherever it was found.
        WorkerFailed: If workers failed or died, more often than ``scaling.max_failures`` allows.
        KeyboardInterrupt: If it was interrupted; where it stood is saved if that took no longer than it may.
    """

    def on_restart(text: str) -> None:
        on_record({"kind": "restart", "text": text})

    interrupted = threading.Event()

    def on_interrupt() -> None:
        interrupted.set()
        ask_to_stop(run.path)
        on_record({"kind": "notice", "text": "the step in hand is finished and saved; Ctrl-C again leaves at once"})

    config, plan = prepared.config, prepared.workers
    assert plan is not None
    require_shared_folder(run.path, cluster)
    require_visible(read_paths(config), cluster)
    withdraw_stop(run.path)
    ready, done = threading.Event(), threading.Event()
    follower = threading.Thread(target=_follow, args=(run.path / METRICS_NAME, ready, done, on_record), daemon=True)
    follower.start()
    ready.wait()
    try:
        settings = {"run": str(run.path), "prepared": prepared}
        report = on_workers(
            _train_worker, settings, config, plan, run.path, on_restart=on_restart, on_interrupt=on_interrupt,
            own_cluster=cluster.is_own,
        )  # fmt: skip
        if report is None or interrupted.is_set():  # what follows, such as another seed, is not begun
            raise KeyboardInterrupt
        return report
    finally:
        withdraw_stop(run.path)
        done.set()
        follower.join()


def evaluate_on_workers(config: RunConfig, file: str | Path | None, split: str, cluster: Cluster) -> Evaluation:
    """Evaluates on several workers; the figures are those of one worker.

    Args:
        config: Settings; ``data.path`` is the data set.
        file: The weights; see `harma_ray.import_export.load_model`. Ray Train's own files lie beside them meanwhile,
            and traces of workers that failed stay there.
        split: Name of the split.
        cluster: Where.

    Raises:
        UserError: For what the user can mend.
        WorkerFailed: If workers failed or died.
    """
    make_task(config).check_evaluated(open_split(config.data.path, split))
    plan = plan_workers(config, cluster)
    weights = Path(file).expanduser().absolute() if file else None
    beside = weights or Path.cwd()
    beside = beside if beside.is_dir() and not (beside / META_NAME).is_file() else beside.parent
    try:
        work = Path(tempfile.mkdtemp(prefix=".evaluate-", dir=beside))
    except OSError as error:
        raise UserError(f"cannot write into {beside} ({error.strerror}); evaluate with --workers 1") from error
    try:
        require_shared_folder(work, cluster)
        require_visible(read_paths(config), cluster)
        settings = {"file": weights and str(weights), "split": split}
        return on_workers(_evaluation_worker, settings, config, plan, work, own_cluster=cluster.is_own)
    finally:
        shutil.rmtree(work / WORK_FOLDER, ignore_errors=True)
        drop_notes(work / WORKERS_FOLDER)
        with contextlib.suppress(OSError):
            work.rmdir()


def on_workers(
    function: Callable[[dict], Any], settings: Mapping[str, Any], config: RunConfig, plan: WorkerPlan, folder: Path,
    *, make_callbacks: Callable[[], list[Any]] = list, max_deaths: int = 0,
    on_restart: Callable[[str], None] = lambda text: None, on_interrupt: Callable[[], None] | None = None,
    own_cluster: bool = False,
) -> Any:  # fmt: skip
    """Runs a function on every worker and returns what worker 0 returns; starts it anew after a failure.

    Ray Train's own restarts would try again what a user has to mend, too.

    Args:
        function: Called with `settings` and, under ``config``, the run's settings; see `enter_worker`.
        settings: What else the function needs.
        config: Settings.
        plan: The workers.
        folder: Ray Train's own files go into a folder in it.
        make_callbacks: Makes Ray Train's callbacks.
        max_deaths: Restarts after the death of a process, if that is more than ``scaling.max_failures``.
        on_restart: Hears a line about every restart.
        on_interrupt: See `harma_ray.on_ray.interruption.fit`.
        own_cluster: See `harma_ray.on_ray.trainer`.

    Raises:
        UserError: If a worker raised one.
        WorkerFailed: If workers failed or died and no restart is left.
    """
    restart = 0
    while True:
        restart += 1
        try:
            return _attempt(function, settings, config, plan, folder, make_callbacks(), on_interrupt, own_cluster)
        except WorkerFailed as error:
            limit = max(config.scaling.max_failures, max_deaths if isinstance(error, WorkerDied) else 0)
            if restart > limit:
                raise
            on_restart(f"{error}; starting all workers again from the last checkpoint, restart {restart} of {limit}")


def _attempt(
    function: Callable[[dict], Any], settings: Mapping[str, Any], config: RunConfig, plan: WorkerPlan, folder: Path,
    callbacks: list[Any], on_interrupt: Callable[[], None] | None, own_cluster: bool,
) -> Any:  # fmt: skip
    from ray.train import ControllerError, FailureConfig, ScalingConfig, WorkerGroupError
    from ray.train import RunConfig as RayRunConfig

    from harma_ray.on_ray.process_group import ProcessGroup
    from harma_ray.on_ray.trainer import Trainer

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.scaling.start_timeout_seconds)
    notes = folder / WORKERS_FOLDER
    drop_notes(notes)
    trainer = Trainer(
        # The controller unpickles a `train_loop_config` too, and would import all of torch for it.
        partial(function, {**settings, "config": config, "notes": str(notes), "variables": service_variables(config)}),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=plan.resources
        ),
        backend_config=ProcessGroup("nccl" if plan.use_gpu else "gloo", timeout_s=600),
        run_config=RayRunConfig(
            name=WORK_FOLDER,
            storage_path=str(folder),
            callbacks=callbacks,
            failure_config=FailureConfig(controller_failure_limit=3),
        ),
        own_cluster=own_cluster,
    )
    try:
        return fit(trainer, on_interrupt)
    except WorkerGroupError as error:
        told = [find_user_error(failure) for _, failure in sorted(error.worker_failures.items())]
        raise next(filter(None, told), None) or what_happened(error.worker_failures, notes) from error
    except ControllerError as error:
        reason = (str(error.controller_failure).splitlines() or [type(error.controller_failure).__name__])[0]
        raise WorkerFailed(f"the workers could not be started: {reason}") from error


def read_paths(config: RunConfig) -> list[Path]:
    """Returns what every worker reads: the data set, and weights that lie on a disk."""
    weights = [Path(value) for value, _ in marked_settings(config, OnDisk).values() if value]
    return [Path(config.data.path), *(path for path in weights if path.is_file() or path.is_absolute())]


def _train_worker(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the final report; None if the training was asked to end before."""
    import ray.train

    from harma_ray.on_ray.stream import ray_batches

    config, worker = enter_worker(settings)
    with plain_errors(), contextlib.suppress(TrainingStopped):
        prepared: Prepared = settings["prepared"]
        run_dir = Path(settings["run"])
        return run_training(
            prepared.task,
            config,
            run_dir,
            order=prepared.order,
            worker=worker,
            loader=ray_batches,
            callback=ray.train.report,
            label=Label.of(run_dir, changed_settings(config)),
        )


def _evaluation_worker(settings: dict[str, Any]) -> Evaluation:
    from harma_ray.on_ray.stream import ray_batches

    config, worker = enter_worker(settings)
    with plain_errors():
        model = load_model(settings["file"], config)
        return evaluate_split(make_task(config), config, model, settings["split"], worker=worker, loader=ray_batches)


def enter_worker(settings: dict[str, Any]) -> tuple[RunConfig, Worker]:
    """Sets up a worker's process: its threads, its device; returns the run's settings and which worker it is."""
    import ray.train
    from ray.train.torch import get_device

    config: RunConfig = settings["config"]
    defer_compiler()  # the process group is there already
    adopt_variables(settings["variables"])  # a cluster that was joined has those of its own start
    context = ray.train.get_context()
    leave_note(Path(settings["notes"]), context.get_world_rank())
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(device),
        decode_threads=use_threads(node_cpus() / context.get_local_world_size(), config),
    )
    return config, worker


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises a user's error bare, so that the driver finds its message at the end of the trace that it is given."""
    try:
        yield
    except Exception as raised:
        error = find_user_error(raised)
        if error is None:
            leave_trace(raised)
            raise
        raise UserError(*error.args) from None


def _follow(
    path: Path, ready: threading.Event, done: threading.Event, on_record: Callable[[dict[str, Any]], None]
) -> None:
    """Reads new whole lines of the record as they are written, also when a run that goes on has rewritten it.

    New is what comes after `ready` is set.
    """
    seen, inode, position = Counter[int](), None, 0
    told, last, is_old = Counter[int](), False, True
    while True:
        if path.exists():
            with path.open() as file:
                if (now := os.fstat(file.fileno()).st_ino) != inode:
                    inode, position, told = now, 0, Counter()
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position, key = file.tell(), hash(line)
                    told[key] += 1
                    if told[key] > seen[key]:
                        seen[key] += 1
                        if not is_old:
                            on_record(json.loads(line))
        if last:
            return
        ready.set()
        last, is_old = done.wait(0.5), False
