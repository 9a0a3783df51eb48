"""What is wrong with a command, as far as it shows without torch and Ray, whose imports take seconds: told before them.

Where a check returns what it opened, the work goes on with that; else nothing relies on these checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from harma_ray.config import RunConfig
from harma_ray.data.identity import require_same_data
from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.splits import has_splits, open_split, open_used, require_batch
from harma_ray.errors import UserError
from harma_ray.files import (
    did_you_mean,
    figures_path,
    near_folders,
    near_paths,
    new_path,
    output_path,
    require_writable,
)
from harma_ray.models.names import OWN_FORMAT
from harma_ray.on_ray.address import starts_own
from harma_ray.recipes import recipe_config
from harma_ray.resources import has_driver
from harma_ray.runs import CONFIG_NAME, Run, absolute_paths, lock_folder, new_folder, open_run, timed_name
from harma_ray.settings import build_config
from harma_ray.shell import launch_command
from harma_ray.training.run_files import META_NAME, list_checkpoints, read_meta
from harma_ray.tune.space.places import search_folder

if TYPE_CHECKING:
    from harma_ray.tune.space.definition import SearchDefinition


def check_new(runs: str, names: Sequence[str | None], kind: str) -> None:
    """Raises UserError if the folders of new runs or searches cannot be made; None: a name is made up."""
    for name in names:
        new_folder(runs, name or timed_name(kind), kind)


def check_training(config: RunConfig, address: str | None) -> None:
    """Raises UserError if a training's splits or weights are not there, it wants a GPU that is not, or has no batch."""
    config = absolute_paths(config)
    training, evaluated, _ = open_used(config)
    require_gpu(config.scaling.use_gpu, address)
    config.require_named()
    require_parts(config)
    most = training.kind.most_samples(training.manifest, one_caption=config.train.captions == "one")
    fits = training.kind.name in config.trained_kinds and not any(split.kind.is_encoded for split in evaluated)
    if most is not None and fits and config.train.captions != "grouped":  # else that it is the wrong data is told first
        require_batch(training, most, config.train.global_batch_size)


def require_parts(config: RunConfig) -> None:
    """Raises UserError if weights or further data sets that a model is built from and measured on are not there."""
    config.require_weights()
    for name, (folder, splits) in config.data_sets.items():
        if name != "data.path":
            open_split(folder, splits[0])


def open_usable(path: str) -> Run:
    """Opens the folder of a run; raises UserError if it is none, or the weights that it was built on are gone."""
    run = open_run(path)
    run.config.require_weights()
    return run


def check_resumed(path: str, changes: Mapping[str, Any], address: str | None) -> None:
    """Raises UserError if a run cannot go on: its data is gone or changed, or another process trains it."""
    run = open_run(path)
    if run.report is not None:
        return  # is shown
    run = Run(run.path, build_config(run.config, changes))
    check_same_data(run)
    require_parts(run.config)
    require_gpu(run.config.scaling.use_gpu, address)
    with lock_folder(run.path):
        pass


def check_same_data(run: Run) -> None:
    """Raises UserError unless a run that goes on does so with the data that it was begun on."""
    require_data(run.config, f"run {run.path}", launch_command("train", "--resume", run.path))
    checkpoints = list_checkpoints(run.path)
    if checkpoints:
        known = read_meta(checkpoints[-1]).data
        require_same_data(known, run.config, subject=f"run {run.path}", way_out="start a new run")


def require_data(config: RunConfig, subject: str, command: str) -> None:
    """Raises UserError unless the data set of what is gone on with, by some command, is there."""
    data = Path(config.data.path)
    if not has_splits(data):
        near = did_you_mean(near_folders(data, has_splits))
        raise UserError(
            f"the data set {data} of {subject} is not there; if it was moved, say where it is: {command} --data "
            f"FOLDER{near}"
        )


def check_resumed_search(path: str, changes: Mapping[str, Any], address: str | None) -> tuple[Path, SearchDefinition]:
    """Returns folder and definition of a search that is to go on, with some settings changed.

    Raises:
        UserError: If it is none, its data or weights are gone, or another process goes on with it.
    """
    search_folder(path)
    from harma_ray.tune.folder import open_search  # Optuna

    folder, definition = open_search(path)
    definition = replace(definition, config=build_config(definition.config, changes))
    require_data(definition.config, f"search {folder}", launch_command("tune", "--resume", folder))
    require_parts(definition.config)
    require_gpu(definition.config.scaling.use_gpu, address)
    with lock_folder(folder, "search"):
        pass
    return folder, definition


def check_model(
    config: RunConfig, run: str | None, weights: str | None, split: str, outputs: Mapping[str, str | None]
) -> None:
    """Raises UserError if weights or the split that they are to be used on are not there.

    Args:
        config: Settings of the model and the data.
        run: The run whose model it is; None: of none.
        weights: A file or a folder of others; None: none are read.
        split: Name of the split.
        outputs: Files and folders to be written, by option.
    """
    if weights:
        require_there(weights, "no weights are there; give a run, a file or a checkpoint's folder")
    open_split(config.data.path, split)
    for option, place in outputs.items():
        target = figures_path(place) if option == "--json" else output_path(place) if place else None
        if target:
            require_writable(target, option)
    if not weights or _lacks_backbone(Path(weights).expanduser()):
        absolute_paths(config).require_weights()
    if not weights and not run:
        config.require_named()


def _lacks_backbone(weights: Path) -> bool:
    """Tells whether weights are what a run trained, alone; those of others may hold the backbone."""
    if weights.is_dir():
        return (weights / META_NAME).is_file() or (weights / CONFIG_NAME).is_file()
    with suppress(SafetensorError), safe_open(weights, "numpy") as file:
        return (file.metadata() or {}).get("format") == OWN_FORMAT
    return False


def check_embedded(run: str, data: str, split: str | None, out: str) -> Run:
    """Returns the run that embeds; raises UserError if it, the data or the place to write is not there."""
    found, folder = open_usable(run), Path(data).expanduser().absolute()
    require_free(out)
    require_there(data, "give a converted data set or a folder of images")
    if split or (folder / MANIFEST_NAME).is_file():
        open_split(folder, split or folder.name)
    return found


def check_demo(recipe: str, seed: int, out: str) -> None:
    """Raises UserError if a demo cannot be: for its seed, for what is not installed, or for its folder."""
    build_config(recipe_config(recipe), {"seed": seed}, origin="--seed").require_weights()
    require_writable(output_path(out) / "data", "--out")


def require_gpu(wanted: bool | None, address: str | None) -> None:
    """Raises UserError for GPUs that are asked for on a machine without; of a cluster that is joined it knows."""
    if wanted and starts_own(address) and not has_driver():
        raise UserError(
            "`--gpu` (scaling.use_gpu) needs a GPU, but this machine has no driver of one; use --cpu, or join a "
            "cluster that has GPUs with --address"
        )


def require_free(out: str) -> None:
    """Raises UserError if what ``--out`` names is there, or cannot be made."""
    require_writable(new_path(out), "--out")


def require_there(path: str | Path, way_out: str) -> None:
    """Raises UserError unless there is a file or folder."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; {way_out}{did_you_mean(near_paths(path))}")
