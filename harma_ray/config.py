"""Configuration: frozen dataclasses, checked at the door.

A recipe's configuration is a subclass of `RunConfig` that adds the recipe's own sections. Everything a user writes
(YAML files, ``--set a.b=value``) goes through `build_config`, which refuses unknown keys and wrong types, each with
its dotted path, all problems at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from harma_ray.errors import UserError


@dataclass(frozen=True)
class OnDisk:
    """Marks a setting of a model that may be a path; what has no suffix and does not exist is a name."""

    kind: Literal["file", "folder"]

    def is_there(self, path: Path) -> bool:
        """Tells whether a path is one of these."""
        return path.is_file() if self.kind == "file" else path.is_dir()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data lies and how it is streamed."""

    path: str = ""
    """Folder of a converted data set, with one sub-folder a split."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split that selects the best epoch."""
    test_split: str = "test"
    """Split that is evaluated once, at the end; left out with a notice if the data set has none."""
    shuffle_window_mb: float = 256
    """Encoded images that are shuffled together, in MiB; row groups are dealt anew into windows every epoch."""
    chunk_mb: float = 32
    """Encoded images read by one Ray Data task, in MiB; bounds the memory of a task, and four times this what a
    worker has waiting in Ray's object store."""
    decode: Literal["worker", "tasks"] = "worker"
    """Where images are decoded and augmented: in the training worker's threads, or in Ray Data tasks (spare CPUs)."""
    decode_threads: int = 0
    """Threads that decode in a training worker; 0 = the CPUs of the worker's share of its node."""
    prefetch_batches: int = 2
    """Batches prepared ahead."""
    task_cpus: float = 0.5
    """CPUs that Ray reserves for one data task."""
    max_pixels: int = 0
    """Images of more pixels are refused before they are decoded; 0 = all that conversion let into the data set are
    read, and of files beside it (``embed``) up to 100 million pixels."""

    def __post_init__(self) -> None:
        at_least(self, shuffle_window_mb=0.01, chunk_mb=0.01, decode_threads=0, prefetch_batches=1, max_pixels=0)
        above_zero(self, "task_cpus")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule: linear warm-up, then linear, cosine or no decay."""

    name: Literal["adamw", "adam"] = "adamw"
    """Adam with decoupled weight decay, or with the decay added to the gradient."""
    learning_rate: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Coefficients of the running means (HarMA's)."""
    epsilon: float = 1e-8
    """Offset of the denominator."""
    weight_decay: float = 0.04
    """Weight decay (HarMA's)."""
    no_decay: tuple[str, ...] = ("bias",)
    """Parameters whose names contain one of these are not decayed (HarMA's rule)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What follows the warm-up: down to 0 along a line, along a half cosine, or no change."""
    warmup_fraction: float = 0.1
    """Share of all steps in which the rate climbs from 0 to its peak."""
    clip_grad_norm: float = 0.0
    """Largest gradient norm; 0 = no clipping (HarMA's)."""

    def __post_init__(self) -> None:
        above_zero(self, "learning_rate", "epsilon")
        at_least(self, weight_decay=0, clip_grad_norm=0)
        within(self, 0, 1, "warmup_fraction")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"`betas` must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 10
    """Passes over the data."""
    captions: Literal["all", "one"] = "all"
    """What a pass visits: all captions of every image (HarMA's), or one of them, drawn anew in every pass."""
    global_batch_size: int = 428
    """Pairs in a step, over all workers; also the number of candidates in the contrastive loss."""
    accumulation: int = 1
    """Micro-batches a worker cuts its share into. Exact: features are cached, so no negatives are lost; costs one more
    forward pass."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of the model in training steps; losses are always fp32. auto = bf16 on GPUs that compute it themselves,
    else fp32."""
    eval_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which models are evaluated, while training and after: fp32 on any device, as the published figures
    were measured (without TF32 too), or bf16 autocast, which moves ranks."""
    compile: bool = False
    """`torch.compile` the model; the first steps take minutes, changing shapes (text_tokens=trim) compile again."""
    eval_every_epochs: int = 1
    """Epochs between evaluations on the val split."""
    early_stopping_patience: int = 0
    """Evaluations without a better objective before the run stops; 0 = never."""
    select_on: Literal["val", "test-as-in-released-code"] = "val"
    """Split that picks the best epoch. Picking on test flatters the result: only to compare with published tables."""
    keep_checkpoints: int = 1
    """Best checkpoints kept, beside the last."""
    eval_batch_size: int = 256
    """Images or captions encoded at a time in evaluation; does not change the result."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints inside an epoch; 0 = only where the run evaluates."""
    log_every_steps: int = 10
    """Steps between two records of losses and rates."""
    threads: int = 0
    """torch threads of a worker on CPU; 0 = the machine's cores divided by its workers."""

    def __post_init__(self) -> None:
        at_least(
            self, epochs=0, global_batch_size=2, accumulation=1, eval_every_epochs=1, early_stopping_patience=0,
            keep_checkpoints=1, eval_batch_size=1, checkpoint_every_steps=0, log_every_steps=1, threads=0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Workers and what each of them is given."""

    num_workers: int = 0
    """Training processes; 0 = one a GPU, or two on CPUs (one on a single core); in a search: one a trial."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; null = if the cluster has GPUs."""
    cpus_per_worker: float = 0
    """CPUs Ray reserves for a worker; 0 = an equal share of what the data tasks leave; in a search: one, or with GPUs
    an equal share."""
    gpus_per_worker: float = 1
    """GPUs of a worker that uses them; below 1, trials of one worker each share a GPU."""
    max_failures: int = 0
    """Restarts of the workers from the last checkpoint after a crash or a lost node, before the run gives up."""
    start_timeout_seconds: int = 60
    """How long one attempt waits for the cluster to start all workers."""

    def __post_init__(self) -> None:
        at_least(self, num_workers=0, cpus_per_worker=0, max_failures=0, start_timeout_seconds=1)
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(f"`gpus_per_worker` must lie in (0, 1], got {self.gpus_per_worker}")
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                "`gpus_per_worker` below 1 needs `num_workers` 1 (workers of one training cannot share a GPU), got "
                f"{self.gpus_per_worker} and {self.num_workers}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every recipe has; a recipe's configuration adds its own sections."""

    recipe: str
    """Name of the recipe that this configuration started from."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the data lies and how it is streamed."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Workers."""

    def __post_init__(self) -> None:
        at_least(self, seed=0)


ConfigT = TypeVar("ConfigT", bound=RunConfig)

_NOT_IDENTITY = {
    "scaling": None,
    "data": {"path", "decode", "decode_threads", "prefetch_batches", "task_cpus", "chunk_mb", "max_pixels"},
    "model": {"activation"},
    "train": {"eval_batch_size", "log_every_steps", "threads", "checkpoint_every_steps", "keep_checkpoints"},
}
"""Settings that do not change what a run computes: a run may be resumed with others."""


_LATER = {"train": {"eval_precision": "fp32"}}
"""Settings that older runs do not have, with the values at which they change nothing: a run may be resumed without."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested plain dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in flat_settings(value).items()}
        else:
            flat[key] = value
    return flat


def disk_settings(config: Any, prefix: str = "") -> dict[str, tuple[str, OnDisk]]:
    """Returns the settings that are marked `OnDisk` and not empty, with their marks, by dotted name."""
    found: dict[str, tuple[str, OnDisk]] = {}
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= disk_settings(value, f"{prefix}{name}.")
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OnDisk)]
        if marks and value:
            found[f"{prefix}{name}"] = str(value), marks[0]
    return found


def to_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML that `build_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: RunConfig) -> str:
    """Returns a SHA-256 over every setting that changes what the run computes."""
    raw = json.loads(json.dumps(to_dict(config)), parse_int=float)  # 256 and 256.0 are the same setting
    for section, keys in _NOT_IDENTITY.items():
        if section in raw:
            raw[section] = {} if keys is None else {k: v for k, v in raw[section].items() if k not in keys}
    for section, settings in _LATER.items():
        raw[section] = {k: v for k, v in raw[section].items() if k not in settings or v != settings[k]}
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        UserError: If the file cannot be read or is not a mapping; a syntax error names line and column.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (UTF-8)") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, got {type(raw).__name__}")
    return raw


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Turns ``a.b=value`` assignments into a flat mapping from dotted keys to values; values are read as YAML.

    Raises:
        UserError: If an assignment has no ``=`` or its value is no YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise UserError(f"`--set` takes key=value, got `{assignment}`; for example --set optim.learning_rate=2e-4")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"`--set {assignment}`: the value is not valid YAML") from error
    return overrides


def show_override(key: str, value: Any) -> str:
    """Returns an assignment from which `parse_overrides` reads the value back, whatever characters a text has."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        plain = yaml.safe_load(text) == value
    except yaml.YAMLError:
        plain = False
    return f"{key}={text if plain else json.dumps(value)}"


def build_config(base: ConfigT, changes: Mapping[str, Any], *, origin: str = "--set") -> ConfigT:
    """Returns `base` with some settings changed.

    Args:
        base: The recipe's published settings.
        changes: Nested mappings, or flat dotted keys, or both.
        origin: Named in errors.

    Raises:
        UserError: Listing every unknown key (with the nearest valid ones) and every value of a wrong type or range.
    """
    raw = to_dict(base)
    problems = _merge(raw, changes, "")
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems))
    try:
        return _adapter(type(base)).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


@functools.cache
def _adapter(kind: type[ConfigT]) -> TypeAdapter[ConfigT]:
    return TypeAdapter(kind)


def _merge(raw: dict[str, Any], changes: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")
        path = f"{prefix}{head}"
        if head not in raw:
            near = difflib.get_close_matches(head, raw, n=3) or sorted(raw)
            problems.append(f"unknown key `{path}` (valid there: {', '.join(near)})")
        elif rest:
            if isinstance(raw[head], dict):
                problems += _merge(raw[head], {rest: value}, f"{path}.")
            else:
                problems.append(f"`{path}` is a single value, so `{prefix}{key}` does not exist")
        elif isinstance(raw[head], dict):
            if isinstance(value, Mapping):
                problems += _merge(raw[head], value, f"{path}.")
            else:
                problems.append(f"`{path}` is a section (keys: {', '.join(raw[head])}), got {value!r}")
        else:
            raw[head] = _repair_number(raw[head], value)
    return problems


def _repair_number(old: Any, value: Any) -> Any:
    """YAML 1.1 reads ``4e-6`` as a string; where a number stood, a string that is a number is one."""
    if isinstance(value, str) and isinstance(old, (int, float)) and not isinstance(old, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{path}`: {message}" if path else message
    return f"`{path}`: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def at_least(section: Any, **bounds: float) -> None:
    """Raises ValueError unless each named attribute is finite and at least its bound; for ``__post_init__``."""
    for name, low in bounds.items():
        value = getattr(section, name)
        if not low <= value < math.inf:
            raise ValueError(f"`{name}` must be at least {low}, got {value}")


def above_zero(section: Any, *names: str) -> None:
    """Raises ValueError unless each named attribute is finite and above 0; for ``__post_init__``."""
    for name in names:
        value = getattr(section, name)
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be above 0, got {value}")


def within(section: Any, low: float, high: float, *names: str) -> None:
    """Raises ValueError unless each named attribute lies in [low, high]; for ``__post_init__``."""
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high:
            raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value}")
