"""The one seam of the platform: what a batch means.

The engine owns the loop, the streams, the optimiser, checkpoints and logging; a `Task` owns the model, the row
transforms, the losses and the evaluation. A task never touches Ray, nor the files of its own run. It computes on the
device that the model is on; what only one worker needs it computes on worker 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor, nn

from harma_ray.config import RunConfig
from harma_ray.data.schema import Split
from harma_ray.errors import UserError
from harma_ray.health import HealthWatch
from harma_ray.optim import warmup_steps

Batch = dict[str, Tensor]
"""A batch: tensors whose first dimension is the batch; always with ``row`` and ``caption`` (int64[B])."""


Array = np.ndarray | np.generic | Tensor
"""What a transform may return for a sample: an array, a number, a tensor."""


class RowTransform(Protocol):
    """Turns one row of a shard into the arrays of one sample; runs inside Ray Data, so it must pickle."""

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Transforms a row.

        Args:
            row: The columns of the schema, and ``row`` and ``caption``, the sample.
            rng: Seeded by (seed, epoch, row, caption) alone; the only source of randomness.

        Returns:
            Arrays of equal shapes over all rows.

        Raises:
            UserError: If the row cannot be used; the stream adds the row's source.
        """
        ...


class EvaluationData(Protocol):
    """A split as one worker sees it in evaluation."""

    split: Split

    @property
    def rows(self) -> np.ndarray:
        """int64[n], the rows of this worker; over all workers every row exactly once."""
        ...

    def batches(self, transform: RowTransform, *, batch_size: int) -> Iterable[Batch]:
        """Yields this worker's rows in order, on the model's device."""
        ...

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Returns light columns (never ``image``) of the WHOLE split, in row order."""
        ...


class Details(Protocol):
    """What lies behind the metrics of an evaluation: embeddings, ranks, the task's own besides."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of metrics."""
        ...

    def chance(self) -> dict[str, float]:
        """Returns what metrics are expected to be for rankings drawn at random."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the metrics are the same on every worker."""

    metrics: dict[str, float]
    """Metric names and values, such as ``r_mean`` in percent."""
    details: Any = None
    """On worker 0 the task's `Details`, for tables, pictures and pages."""
    query: str = ""
    """How queries were made, where a task knows several ways, such as ``sum``; see `others`."""
    note: str = ""
    """The same in words."""
    others: Mapping[str, Evaluation] = field(default_factory=dict)
    """On worker 0 what the other ways find with the same model, by name: baselines."""

    @property
    def by_query(self) -> dict[str, Evaluation]:
        """Returns this evaluation and the others by their queries' names; nothing if there is one way alone."""
        return {self.query: self, **self.others} if self.query else {}


@dataclass(frozen=True)
class Section:
    """A part of a page about an evaluation."""

    name: str
    """Short name, for links."""
    title: str
    html: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files that go beside the page, by name."""


@dataclass(frozen=True)
class FeatureEncoder:
    """Frozen encoders whose outputs may be computed once and trained on."""

    encode_images: Callable[[Sequence[bytes], Sequence[str]], Tensor]
    """Turns image files into fp32[B, F] on CPU; their names are for messages."""
    encode_texts: Callable[[list[str]], Tensor]
    """Turns texts into fp32[B, F] on CPU."""
    identity: Mapping[str, Any]
    """What the outputs depend on, the weights' fingerprint among it: features of equal identities are the same."""


@dataclass(frozen=True)
class Projection:
    """Points for TensorBoard's projector."""

    vectors: Tensor
    """fp32[N, E]."""
    labels: list[str]
    """N texts."""
    thumbnails: Tensor | None
    """fp32[N, 3, S, S] in [0, 1]."""


class Task(Protocol):
    """What a batch means."""

    objective: str
    """Metric of `evaluate` that selects the best epoch; higher is better."""

    @property
    def other_objectives(self) -> Sequence[str]:
        """Metrics whose best checkpoints are kept too."""
        ...

    @property
    def metric_names(self) -> Sequence[str]:
        """Metrics that a search may have as objectives."""
        ...

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for settings that cannot work on a data set, as far as shows without the model.

        Args:
            training: The split that is trained on.
            evaluated: Splits that will be evaluated.
            metrics: Metrics that a search compares, beside the objective.
        """
        ...

    def require_backbone(self) -> None:
        """Raises UserError if a part stays frozen whose weights nobody named; part of `check`."""
        ...

    @property
    def base_name(self) -> str:
        """What the pretrained part is: tasks with equal names build equal ones."""
        ...

    def build_base(self) -> nn.Module:
        """Returns the pretrained part on CPU, before anything is added or frozen; trials of a search share it."""
        ...

    def outline_base(self) -> nn.Module:
        """Returns the pretrained part without its weights, on torch's meta device: names and sizes alone."""
        ...

    def build_model(self) -> nn.Module:
        """Returns the model on CPU with freezing applied: trainable parameters are those that require a gradient."""
        ...

    def build_untrained(self) -> nn.Module:
        """Returns the model that a training is measured against: the pretrained part, without what is random yet."""
        ...

    def queries(self, model: nn.Module) -> Sequence[str]:
        """Returns the names of the ways in which a model's queries can be made, its own first; none: there is one."""
        ...

    def transform(self, *, training: bool) -> RowTransform:
        """Returns the transform of training samples or of evaluated rows."""
        ...

    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of the loss, each a scalar; their sum is minimised.

        Calls `model` exactly once, with tensors only. The outputs are tensors whose first dimension is the batch, or
        scalars.
        """
        ...

    def evaluate(self, model: nn.Module, data: EvaluationData) -> Evaluation:
        """Evaluates the (unwrapped) model on a split; called on every worker."""
        ...

    def picture(self, evaluation: Evaluation, split: Split) -> Image.Image | None:
        """Draws some results of an evaluation, or None; called on worker 0 alone."""
        ...

    def projection(self, evaluation: Evaluation, split: Split) -> Projection | None:
        """Returns points for TensorBoard's projector, or None; called on worker 0 alone."""
        ...

    def sections(self, evaluation: Evaluation, split: Split) -> list[Section]:
        """Returns what a page about an evaluation shows beside the table of metrics."""
        ...

    def monitor(self, model: nn.Module) -> dict[str, float]:
        """Returns values worth watching, such as the temperature and the gates."""
        ...


def require_query(task: Task, model: nn.Module, query: str) -> None:
    """Checks that a model's queries can be made in some way.

    Raises:
        UserError: If they cannot.
    """
    known = task.queries(model)
    if query not in known:
        raise UserError(
            f"`--query {query}` must be one of {', '.join(known)} for this model"
            if known
            else "`--query` is for composed retrieval, where queries can be made in several ways; leave it out"
        )


@runtime_checkable
class WatchedTask(Protocol):
    """A task that knows what its loss is while a model tells nothing apart; the loss of others is not watched."""

    def losses_at_equal_scores(self) -> Mapping[str, float]:
        """Returns terms of `losses` and what each is while all scores of a global batch are equal.

        Terms whose value then depends on the batch are left out.
        """
        ...

    def advice(self) -> Sequence[str]:
        """Returns what to try when a training learns nothing, the most promising first, in terms of the settings."""
        ...


def health_watch(task: Task, config: RunConfig, total_steps: int) -> HealthWatch:
    """Returns who watches a training of some steps from its first one on."""
    watched = isinstance(task, WatchedTask)
    return HealthWatch(
        task.losses_at_equal_scores() if watched else {}, objective=task.objective, total_steps=total_steps,
        warmup_steps=warmup_steps(total_steps, config.optim), advice=task.advice() if watched else (),
    )  # fmt: skip


@runtime_checkable
class FeatureTask(Protocol):
    """A task with frozen encoders whose outputs can be computed once, before training."""

    @property
    def caches_features(self) -> bool:
        """Whether the outputs of frozen encoders are to be computed once, before training."""
        ...

    def feature_encoder(self, device: str) -> FeatureEncoder:
        """Builds these encoders."""
        ...

    def texts_of(self, captions: Sequence[str], training: bool) -> Sequence[str]:
        """Returns the texts that a query with some captions may be given."""
        ...
