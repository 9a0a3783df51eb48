"""The one seam of the platform: what a batch means.

The engine owns the loop, the streams, the optimiser, checkpoints and logging; a `Task` owns the model, the row
transforms, the losses and the evaluation. A task never touches Ray, nor the files of its own run. It computes on the
device that the model is on; what only one worker needs it computes on worker 0 alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harma_ray.config import OptimConfig, RunConfig
from harma_ray.data.kinds.base import RowCheck, RowKind
from harma_ray.data.samples import Batch, RowTransform
from harma_ray.data.splits import Split
from harma_ray.data.stream import EvaluationStream, Worker
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation, Metrics
from harma_ray.models.backbones import Backbone
from harma_ray.parallel import replicate
from harma_ray.retrieval.encoding import Encoder, VectorIdentity

ModelT = TypeVar("ModelT", bound=nn.Module)
ConfigT = TypeVar("ConfigT", bound=RunConfig)


_SHARED_DRAWS = (2**32 - 1,)
"""Tells the draws that all workers share from those of samples, none of which has this number."""
ParameterGroup = dict[str, Any]
"""Parameters under ``params``, and what torch's optimisers are told of them, such as ``weight_decay`` and ``lr``; the
learning rate of those with a ``name`` is recorded by itself."""


Answerer = Callable[[str, Sequence[Image.Image], int], str]
"""Answers a question about RGB images in so many tokens at most."""


class StoredRun(Protocol):
    """A run on disk, as `harma_ray.runs.Run`."""

    @property
    def path(self) -> Path:
        """Absolute folder."""
        ...

    @property
    def config(self) -> RunConfig:
        """Its full settings."""
        ...

    def best_finished(self, metric: str | None = None) -> Path:
        """Returns its best checkpoint, by a metric or its objective.

        Raises:
            UserError: If it is not finished, or has none by that metric.
        """
        ...


@dataclass(frozen=True)
class SampleFacts:
    """What the rows of a split are to a model."""

    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of each row, or image, by what they are, such as ``tokens of a talk``."""
    notes: Sequence[str] = ()
    """What follows from them."""


@dataclass(frozen=True)
class Features:
    """What frozen encoders give for a data set, to be computed once and trained on."""

    load: Callable[[str], tuple[Encoder, VectorIdentity]]
    """Builds the encoders on a device."""
    texts_of: Callable[[Sequence[str], bool], Sequence[str]]
    """Returns the texts that a query with some captions may be given, in training or not."""


class Task(ABC, Generic[ConfigT, ModelT]):
    """What a batch means. Six members are a paper's own; the others have defaults that a paper may replace."""

    metrics: Metrics
    """Set by the constructor."""
    backbone: Backbone
    """The pretrained part, set by the constructor; trials of a search put a shared one in its place."""

    random: np.random.Generator
    """Draws alike on all workers in `losses`; see `begin_step`."""

    evaluated_kinds: Sequence[RowKind] = ()
    """Kinds of rows that splits are evaluated of; empty: all."""
    unseen_settings: Sequence[str] = ()
    """Settings that change what weights compute but not their shapes."""
    vector_settings: Sequence[str] = ()
    """Settings that only say how `encoder` makes vectors: ``embed`` may change them."""
    feature_sections: Sequence[str] = ()
    """Sections of the settings that decide what `features` is."""
    model_settings: Sequence[str] = ()
    """Sections and settings of the model that is trained: a run starts from another's weights where these agree."""
    accumulation: Literal["cached", "summed"] = "cached"
    """How a batch is put together from the parts of ``train.accumulation``. ``cached``: a loss that compares samples
    with each other sees the outputs of all. ``summed``: a loss that is a mean over samples, or over their tokens, is
    computed part by part and worker by worker, each of which weighs as much as it counts; see `counted`."""

    def __init__(self, config: ConfigT):
        """Takes the settings; nothing is loaded yet."""
        self.config = config
        self.begin_step(0)

    # --- what a paper writes, beside `metrics` and `backbone`

    @abstractmethod
    def build_model(self, backbone: nn.Module) -> ModelT:
        """Returns the model on CPU, around what `Backbone.build` returned, with freezing applied.

        Trainable parameters are those that require a gradient. The backbone's own may be replaced here, but not
        written into: trials of a search share them.
        """

    @abstractmethod
    def transform(self, *, training: bool) -> RowTransform:
        """Returns the transform of training samples or of evaluated rows."""

    @abstractmethod
    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of the loss, each a scalar; their sum is minimised.

        Calls `model` exactly once, with tensors only. Where `accumulation` is ``cached``, the outputs are tensors
        whose first dimension is the batch, or scalars.
        """

    @abstractmethod
    def evaluate(self, model: ModelT, data: EvaluationStream) -> Evaluation:
        """Evaluates the (unwrapped) model on a split; called on every worker, what worker 0 returns counts."""

    # --- what has a default

    def begin_step(self, step: int) -> None:
        """Seeds what all workers draw from alike by the run's seed and a step, apart from all other draws."""
        self.random = np.random.default_rng(np.random.SeedSequence([self.config.seed, step], spawn_key=_SHARED_DRAWS))

    @property
    def trains_backbone(self) -> bool:
        """Whether weights of the backbone itself are trained."""
        return False

    def new_model(self) -> ModelT:
        """Returns the model on CPU; what a training writes into is its own, the rest of the backbone may be shared."""
        model = self.build_model(self.backbone.build())
        if self.backbone.is_shared:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.clone()
        return model

    def baseline_model(self) -> ModelT:
        """Returns the model that a training is measured against: the pretrained part, without what is random yet."""
        return self.new_model()

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for settings that cannot work on a data set, as far as shows without the model.

        Args:
            training: The split that is trained on.
            evaluated: Splits that will be evaluated.
            metrics: Metrics that a search compares, beside the objective.
        """
        self.backbone.check()
        for split in evaluated:
            self.check_evaluated(split)
        self.config.require_named()

    def check_evaluated(self, split: Split) -> None:
        """Raises UserError for a split whose rows are of a kind that is not evaluated; part of `check`."""
        if self.evaluated_kinds:
            split.require_kind(self.evaluated_kinds, f"evaluating recipe {self.config.recipe}")

    def encoder(self, model: ModelT, device: str) -> Encoder | None:
        """Returns what gives the vectors of a trained model, which is moved to a device, in the settings' precision.

        None: its images have none that could be compared.
        """
        return None

    def answerer(self, model: ModelT, device: str) -> Answerer | None:
        """Returns what answers questions with a trained model, which is moved to a device; None: it answers none."""
        return None

    def queries(self, model: ModelT | None = None) -> Sequence[str]:
        """Returns the names of the ways in which a model's queries can be made, its own first; none: there is one.

        Args:
            model: The model; None = any that was trained.
        """
        return ()

    def quicken(self, model: ModelT, device: torch.device) -> nn.Module:
        """Returns what steps call: the model, or what computes the same in less time; by default compiled as a whole.

        Args:
            model: The model on its device, which stays as it is for evaluations.
            device: That device.
        """
        return cast(nn.Module, torch.compile(model)) if self.config.train.compile else model

    def parallelise(self, model: nn.Module, worker: Worker) -> nn.Module:
        """Returns what the steps call where there are several workers: it averages gradients over them.

        By default every worker holds all of the model. `harma_ray.parallel.shard` spreads one over them that is too
        large for that: its weights, gradients and optimiser's state; in evaluations and for `monitor` its weights alone
        are whole on every worker. Checkpoints are the same either way. Only the default goes with ``train.compile``.

        Args:
            model: The model on this worker's device; its parameters may be replaced by their parts, in place.
            worker: This worker.
        """
        return replicate(model, worker.device)

    def parameter_groups(self, model: ModelT, optim: OptimConfig) -> list[ParameterGroup]:
        """Returns the trainable parameters, in groups; by default those whose names have a mark are not decayed."""
        decayed, others = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (others if any(part in name for part in optim.no_decay) else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def counted(self, batch: Batch) -> Tensor:
        """Returns how many samples, or supervised tokens, the terms of `losses` are means over, as a scalar.

        Of a batch in which it is 0 the terms must be 0.
        """
        return torch.tensor(len(batch["row"]))

    def amounts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Returns what else a batch holds, as scalars by name: of ``tokens``, ``tokens_per_second`` is recorded."""
        return {}

    def row_check(self) -> RowCheck:
        """Returns what ``convert`` asks of rows with this recipe.

        Raises:
            UserError: If that is nothing, as by default.
        """
        raise UserError(f"recipe {self.config.recipe} sets no limit to the rows that are converted; leave out --recipe")

    def sample_facts(self, split: Split) -> SampleFacts:
        """Returns what the rows of a split are to the model, for ``inspect``; nothing by default."""
        return SampleFacts()

    def monitor(self, model: ModelT) -> dict[str, float]:
        """Returns values worth watching, such as the temperature and the gates; worker 0's are recorded.

        Called on every worker with the (unwrapped) model, whole and without gradients.
        """
        return {}

    def losses_at_equal_scores(self) -> Mapping[str, float]:
        """Returns terms of `losses` and what each is while all scores of a global batch are equal.

        Terms whose value then depends on the batch are left out; a loss without any is not watched.
        """
        return {}

    def advice(self) -> Sequence[str]:
        """Returns what to try when a training learns nothing, the most promising first, in terms of the settings."""
        return ()

    @property
    def features(self) -> Features | None:
        """What is to be computed once, before training, in place of the data set's images; None = nothing."""
        return None


def require_query(task: Task, model: nn.Module | None, query: str) -> None:
    """Checks that the queries of a model (None: of any that was trained) can be made in some way.

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
