"""A model that was evaluated: where it comes from, how its settings differ from its recipe's, and what it found."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import nn

from harma_ray.config import RunConfig, ScalingConfig
from harma_ray.data.identity import split_identity
from harma_ray.data.splits import Split
from harma_ray.errors import UserError, count
from harma_ray.evaluation import Evaluation, Section
from harma_ray.recipes import make_task, recipe_config
from harma_ray.report import page
from harma_ray.runs import CONFIG_NAME, ENVIRONMENT_NAME, Run, absolute_paths, describe_environment, open_run
from harma_ray.settings import build_config, flat_settings, to_dict
from harma_ray.shell import launch_command
from harma_ray.training.checkpoint import META_NAME, CheckpointMeta, read_meta

_DIGITS = 12
"""Digits of fingerprints and commits that are shown."""
_TOLD = ("recipe", "data.path", "scaling")
"""Settings, and sections, that a page tells elsewhere, or that change no figure."""


@dataclass(frozen=True)
class Source:
    """Which model is meant."""

    config: RunConfig
    """Settings of the model and the data, with paths that do not depend on the working folder."""
    file: str | None = None
    """A checkpoint's folder or another file of weights; None = as built."""
    metric: str | None = None
    """What a run's checkpoint was chosen by; None = the recipe's objective."""
    checkpoint: CheckpointMeta | None = None
    """What the checkpoint with the weights says of itself; None if they are in none."""

    @classmethod
    def find(cls, config: RunConfig, file: str | None, metric: str | None) -> Self:
        """Returns the model of a file; of a run that of its best checkpoint now: asked later, it may have a better one.

        Args:
            config: See `config`.
            file: A run's folder or another file of weights, see `harma_ray.import_export.load_model`; None = as built.
            metric: See `metric`.

        Raises:
            UserError: If the run has no such checkpoint.
        """
        path = Path(file or "").expanduser().absolute()
        if file and (path / CONFIG_NAME).is_file():
            path = open_run(path).best_checkpoint(metric)
            file = str(path)
        return cls(config, file, metric, read_meta(path) if file and (path / META_NAME).is_file() else None)

    @cached_property
    def run(self) -> Run | None:
        """The run that the weights are of; None if they are of none."""
        folder = Path(self.file or "").expanduser().absolute().parent.parent
        return open_run(folder) if self.checkpoint and (folder / CONFIG_NAME).is_file() else None

    @property
    def name(self) -> str:
        """A short name, for tables."""
        return self.run.path.name if self.run else Path(self.file).name if self.file else "zero-shot"

    def beside(self, folder: str, metric: str | None) -> Self:
        """Returns the model of another run, to be evaluated as this one is.

        Raises:
            UserError: If it is no run, or has no such checkpoint.
        """
        run = open_run(folder)
        places = {name: place for name, (place, _) in self.config.data_sets.items() if name in run.config.data_sets}
        changes = {**places, "train.eval_precision": self.config.train.eval_precision}
        config = build_config(replace(run.config, scaling=ScalingConfig()), changes)
        return self.find(absolute_paths(config), str(run.path), metric)


@contextlib.contextmanager
def kept_weights(source: Source) -> Iterator[str | None]:
    """Gives the file with a model's weights for the block; of a run that still trains, links that it does not delete.

    Where no link can be made, as on a disk without them, the file is the run's own, and may be gone when it is read.
    The links' folder is hidden beside the checkpoints; one that a killed process has left may be deleted.
    """
    run, own = source.run, Path(source.file or "").expanduser().absolute()
    with contextlib.ExitStack() as stack:
        file = source.file
        if run and run.report is None:
            with contextlib.suppress(OSError):
                links = stack.enter_context(tempfile.TemporaryDirectory(prefix=".evaluated-", dir=own.parent))
                for part in own.iterdir():
                    os.link(part, Path(links, part.name))
                file = links
        yield file


@dataclass(frozen=True)
class Evaluated:
    """A model with what it found."""

    source: Source
    model: nn.Module
    evaluation: Evaluation

    def facts(self) -> dict[str, str]:
        """Returns where the model comes from, by title."""
        source, config = self.source, self.source.config
        task, run, checkpoint = make_task(config), source.run, source.checkpoint
        fingerprint = checkpoint.backbone if checkpoint else task.backbone.fingerprint(self.model)
        begun, command = _read_environment(run)
        trained = (checkpoint.data if checkpoint else {}).get(config.data.train_split)
        facts = {
            "weights": str(run.path) if run else source.file or "the backbone's alone (zero-shot)",
            "recipe": f"{config.recipe}, seed {config.seed}",
            "checkpoint": _describe_checkpoint(source) if checkpoint else "",
            "backbone": f"{task.backbone.name} (fingerprint {fingerprint[:_DIGITS]})",
            "trained on": f"{run.config.data.path}/{config.data.train_split}{_show_data(trained)}" if run else "",
            "training begun": begun,
            "training command": command,
        }
        return {title: fact for title, fact in facts.items() if fact}


def _describe_checkpoint(source: Source) -> str:
    """Tells where a checkpoint stood, and which choice it is."""
    assert source.checkpoint
    found, metrics = source.checkpoint, make_task(source.config).metrics
    metric = source.metric or metrics.objective
    place = f"step {found.step:,} (epoch {found.epoch:.4g})"
    if metric not in found.metrics:
        return f"{place}, the last"
    split = source.config.selecting_split
    return f"{place}, the best by {metrics.title(metric)} on {split}: {metrics.show(metric, found.metrics[metric])}"


def _read_environment(run: Run | None) -> tuple[str, str]:
    """Returns when a run was begun and by which program, and the command that did; empty if that is not known."""
    file = run.path / ENVIRONMENT_NAME if run else None
    return _describe_program(json.loads(file.read_text())) if file and file.is_file() else ("", "")


def _describe_program(environment: Mapping[str, Any]) -> tuple[str, str]:
    commit = environment.get("git_commit") or ""
    dirty = ", with changes" if commit.endswith("+") else ""
    program = f"harma_ray {environment.get('harma_ray', 'of unknown version')}"
    program += f", commit {commit.rstrip('+')[:_DIGITS]}{dirty}" if commit else ""
    time = environment.get("time", "").replace("T", " ")
    return f"{time}, {program}", launch_command(*environment.get("command", ())[1:])


def _show_data(identity: Mapping[str, Any] | None) -> str:
    return f": {count(identity['rows'], 'row')}{_show_fingerprint(identity)}" if identity else ""


def _show_fingerprint(identity: Mapping[str, Any]) -> str:
    return f" (fingerprint {identity['fingerprint'][:_DIGITS]})"


def about_section(evaluated: Mapping[str, Evaluated], data: Split) -> Section:
    """Returns the part of a page that says what was evaluated, on what, by which program and with which settings.

    Args:
        evaluated: Models by their names, the first of which the page is about.
        data: The split.
    """
    first = next(iter(evaluated.values()))
    time, command = _describe_program(json.loads(describe_environment()))
    on = {
        "data": f"{data.path}: {data.describe()}{_show_fingerprint(split_identity(data))}",
        "measured": f"in {first.source.config.train.eval_precision}; {first.evaluation.note}".rstrip("; "),
        "evaluated": time,
        "command": command,
    }
    facts = {name: found.facts() for name, found in evaluated.items()}
    titles = list(dict.fromkeys(title for found in facts.values() for title in found))
    models = [(name, [found.get(title, "") for title in titles]) for name, found in facts.items()]
    parts = [
        page.table([("", titles), *models], num_text_columns=1 + len(models)),
        page.table([("", list(on)), ("this evaluation", list(on.values()))], num_text_columns=2),
        page.subsection("Settings that are not the recipe's"),
        _changed_settings({name: found.source.config for name, found in evaluated.items()}),
    ]
    return Section("about", "What was evaluated", "\n".join(parts))


def _changed_settings(configs: Mapping[str, RunConfig]) -> str:
    own = {name: flat_settings(to_dict(config)) for name, config in configs.items()}
    names = dict.fromkeys(config.recipe for config in configs.values())
    recipes = {name: flat_settings(to_dict(recipe_config(name))) for name in names}
    changed: list[str] = []
    for name, config in configs.items():
        changed += [key for key, value in own[name].items() if value != recipes[config.recipe].get(key)]
    shown = [key for key in dict.fromkeys(changed) if not {key, key.partition(".")[0]} & {*_TOLD}]
    if not shown:
        return page.paragraph("All settings are the recipe's.")
    columns: list[tuple[str, Sequence[str]]] = [("setting", shown)]
    known = {f"recipe {name}": settings for name, settings in recipes.items()}
    for title, settings in ({**known, **own} if len(known) == 1 else own).items():
        columns.append((title, [str(settings.get(key, "")) for key in shown]))
    return page.table(columns, num_text_columns=len(columns))


def require_comparable(sources: Sequence[Source], data: Split) -> None:
    """Checks that several models can be evaluated on a split and compared, before any is built.

    Raises:
        UserError: If they cannot.
    """
    kinds = {source.name: type(make_task(source.config)) for source in sources}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{source.name} ({source.config.recipe})" for source in sources)
        raise UserError(f"`--compare` needs runs of one kind of retrieval, got {shown}")
    for source in sources:
        make_task(source.config).check_evaluated(data)
