"""Runs the loop on the workers of a Ray cluster, with Ray Train."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from harma_ray.cluster import Cluster, WorkerPlan, plan_workers, require_shared_folder
from harma_ray.config import RunConfig, build_config, to_dict
from harma_ray.data.stream import Place
from harma_ray.engine import evaluate_split
from harma_ray.errors import UserError
from harma_ray.exchange import load_model
from harma_ray.loop import check_batch, run_training
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import Run
from harma_ray.task import Evaluation
from harma_ray.tracking import METRICS_NAME

WORK_FOLDER = "ray"
"""Ray Train's own files, inside the run's folder."""


def train(run: Run, cluster: Cluster, *, on_record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if it has one.

    Args:
        run: The run.
        cluster: Where; see `harma_ray.cluster.ray_cluster`.
        on_record: Hears of every new line of the run's record while the workers work.

    Returns:
        The final report.

    Raises:
        UserError: For what the user can mend, wherever it was found.
    """
    plan = plan_workers(run.config, cluster)
    check_batch(run.config, plan.num_workers)
    require_shared_folder(run.path, cluster)
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(run.path / METRICS_NAME, done, on_record), daemon=True)
    follower.start()
    try:
        return _on_workers(_train_worker, {"run": str(run.path)}, run.config, plan, run.path)
    finally:
        done.set()
        follower.join()


def evaluate_on_workers(config: RunConfig, file: str | Path | None, split: str, cluster: Cluster) -> Evaluation:
    """Evaluates on several workers; the figures are those of one worker.

    Args:
        config: Settings; ``data.path`` is the data set.
        file: The weights; see `harma_ray.exchange.load_model`. Ray Train's own files lie beside them meanwhile.
        split: Name of the split.
        cluster: Where.

    Raises:
        UserError: For what the user can mend.
    """
    plan = plan_workers(config, cluster)
    weights = Path(file).expanduser().absolute() if file else None
    beside = weights or Path.cwd()
    beside = beside if beside.is_dir() else beside.parent
    try:
        work = Path(tempfile.mkdtemp(prefix=".evaluate-", dir=beside))
    except OSError as error:
        raise UserError(f"cannot write into {beside} ({error.strerror}); evaluate with --workers 1") from error
    try:
        require_shared_folder(work, cluster)
        return _on_workers(_evaluation_worker, {"file": weights and str(weights), "split": split}, config, plan, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _on_workers(
    function: Callable[[dict], Any], settings: Mapping[str, Any], config: RunConfig, plan: WorkerPlan, folder: Path
) -> Any:
    """Runs a function on every worker and returns what worker 0 returns."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.scaling.start_timeout_seconds)
    failures = folder / "failures"
    shutil.rmtree(failures, ignore_errors=True)
    resources = {"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})}
    trainer = TorchTrainer(
        function,
        train_loop_config={**settings, "config": to_dict(config), "failures": str(failures)},
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if plan.use_gpu else "gloo", timeout_s=600),
        run_config=RayRunConfig(
            name=WORK_FOLDER,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures, controller_failure_limit=3),
        ),
    )
    try:
        return trainer.fit().return_value
    except SystemExit as error:  # how Ray Train ends after Ctrl-C, once its workers are stopped
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        messages = sorted(failures.glob("worker-*.txt"))
        if messages:
            raise UserError(messages[0].read_text()) from error
        raise


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    import ray.train

    from harma_ray.data.ray_stream import ray_batches

    config, place = _enter(settings)
    with _leaving_word(settings, place):
        return run_training(
            make_task(config),
            config,
            Path(settings["run"]),
            place=place,
            reader=ray_batches,
            reporter=ray.train.report,
        )


def _evaluation_worker(settings: dict[str, Any]) -> Evaluation:
    from harma_ray.data.ray_stream import ray_batches

    config, place = _enter(settings)
    with _leaving_word(settings, place):
        model = load_model(settings["file"], config)
        return evaluate_split(make_task(config), config, model, settings["split"], place=place, reader=ray_batches)


def _enter(settings: dict[str, Any]) -> tuple[RunConfig, Place]:
    """Sets up a worker's process: its threads, its device."""
    import ray.train
    from ray.train.torch import get_device

    config = build_config(recipe_config(settings["config"]["recipe"]), settings["config"], origin="configuration")
    context = ray.train.get_context()
    device = get_device()
    neighbours = context.get_local_world_size()
    threads = max(1, (os.cpu_count() or 1) // neighbours)
    torch.set_num_threads(config.train.threads or threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(device),
        decode_threads=config.data.decode_threads or threads,
    )
    return config, place


@contextlib.contextmanager
def _leaving_word(settings: dict[str, Any], place: Place) -> Iterator[None]:
    """Leaves a user's error in a file before it ends the worker, so that the driver can show it as it is."""
    try:
        yield
    except BaseException as raised:
        error: BaseException | None = raised
        while error is not None and not isinstance(error, UserError):
            error = error.__cause__
        if error is not None:
            file = Path(settings["failures"]) / f"worker-{place.rank:04d}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(str(error))
        raise


def _follow(path: Path, done: threading.Event, on_record: Callable[[dict[str, Any]], None]) -> None:
    """Reads new whole lines of the record as they are written."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        last = done.wait(0.5)
        if path.exists():
            position = min(position, path.stat().st_size)
            with path.open() as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    on_record(json.loads(line))
                    position = file.tell()
        if last:
            return
