"""Configuration: frozen dataclasses whose fields say what they are, in which range, and what they change.

A recipe's configuration is a subclass of `RunConfig` that adds the recipe's own sections. Ranges stand beside the
field and are checked by `harma_ray.settings.build_config`; what relates two fields is checked in ``__post_init__``.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:
    from harma_ray.evaluation import Metrics
    from harma_ray.task import StoredRun

Count = Annotated[int, Field(ge=0)]
"""0, 1, 2, ..."""
PositiveCount = Annotated[int, Field(ge=1)]
"""1, 2, ..."""
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number that is at least 0."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""
_Beta = Annotated[float, Field(ge=0, lt=1)]
RANDOM = "random"
"""Weights that are drawn."""


@dataclass(frozen=True)
class OnDisk:
    """Marks a setting of a model that may be a path; what has no suffix and does not exist is a name."""

    kind: Literal["file", "folder", "either"]

    def is_there(self, path: Path) -> bool:
        """Tells whether a path is one of these."""
        return (self.kind != "folder" and path.is_file()) or (self.kind != "file" and path.is_dir())


@dataclass(frozen=True)
class Incidental:
    """Marks a setting, or a section, that does not change what a run computes: a run may be resumed with others."""


@dataclass(frozen=True)
class AddedLater:
    """Marks a setting, or a section, that older runs do not have: one value of it changes nothing."""

    before: Any
    """This value."""


@dataclass(frozen=True)
class EmptyMeant:
    """Marks a setting that was never empty in earlier versions: their searches left out what was its default."""

    value: str
    """This default."""


@dataclass(frozen=True)
class SharedByTrials:
    """Marks a setting, or a section, that is no part of what a trial of a search is."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data lies and how it is streamed."""

    path: Annotated[str, Incidental()] = ""
    """Folder of a converted data set, with one sub-folder a split."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split that selects the best epoch."""
    test_split: str = "test"
    """Split that is evaluated once, at the end; left out with a notice if the data set has none."""
    shuffle_window_mb: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 256
    """Encoded images that are shuffled together, in MiB; row groups are dealt anew into windows every epoch."""
    chunk_mb: Annotated[float, Field(ge=0.01, allow_inf_nan=False), Incidental()] = 32
    """Encoded images read by one Ray Data task, in MiB, but a training step at least; four of them may wait in Ray's
    object store for a worker, which reads the first itself, and all of a split that fits one, if no tasks decode."""
    decode: Annotated[Literal["auto", "worker", "tasks"], Incidental()] = "auto"
    """Where images are decoded: in threads of the worker, or in Ray tasks on CPUs that no worker has, but for the first
    chunk. auto: in tasks for a worker on a GPU, which threads of its process would keep from its GPU."""
    augment: Annotated[Literal["auto", "cpu", "device"], Incidental()] = "auto"
    """Where HarMA's training images are resized and changed, with the same pixels: one by one where they are decoded,
    or batch by batch on the device of the model. auto: on the device if it is a GPU."""
    decode_threads: Annotated[Count, Incidental()] = 0
    """Threads that decode in a worker, at most 4 beside tasks; 0 = the CPUs of the worker's share of its node."""
    prefetch_batches: Annotated[PositiveCount, Incidental()] = 2
    """Batches prepared ahead; where tasks decode, as many more as keep their CPUs busy and do not exceed 512 MiB."""
    task_cpus: Annotated[Positive, Incidental()] = 0.5
    """CPUs that Ray reserves for one data task."""
    max_pixels: Annotated[Count, Incidental()] = 0
    """Images of more pixels are refused before they are decoded; 0 = all that conversion let into the data set are
    read, and of files beside it (``embed``) up to 100 million pixels."""

    def augments_on_device(self, *, on_gpu: bool) -> bool:
        """Returns whether training images are changed batch by batch on a worker's device."""
        return self.augment == "device" or (self.augment == "auto" and on_gpu)

    def decodes_in_tasks(self, *, on_gpu: bool) -> bool:
        """Returns whether tasks decode for a worker."""
        return self.decode == "tasks" or (self.decode == "auto" and on_gpu)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule: linear warm-up, then linear, cosine or no decay."""

    name: Literal["adamw", "adam"] = "adamw"
    """Adam with decoupled weight decay, or with the decay added to the gradient."""
    learning_rate: Positive = 4e-4
    """Peak learning rate."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    """Coefficients of the running means (HarMA's)."""
    epsilon: Positive = 1e-8
    """Offset of the denominator."""
    weight_decay: NonNegative = 0.04
    """Weight decay (HarMA's)."""
    no_decay: tuple[str, ...] = ("bias",)
    """Parameters whose names contain one of these are not decayed (HarMA's rule)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What follows the warm-up: down to 0 along a line, along a half cosine, or no change."""
    warmup_fraction: Fraction = 0.1
    """Share of all steps in which the rate climbs from 0 to its peak."""
    clip_grad_norm: NonNegative = 0.0
    """Largest gradient norm; 0 = no clipping (HarMA's)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: Count = 10
    """Passes over the data."""
    steps: Annotated[Count, AddedLater(before=0)] = 0
    """Steps of the whole training; 0 = as many as `epochs` passes take."""
    captions: Literal["all", "one", "grouped"] = "all"
    """What a pass visits: all captions of every image (HarMA's), one of them, drawn anew in every pass, or all in
    groups that share one encoding of their image (HarMA's recipes alone)."""
    captions_per_image: Annotated[PositiveCount, AddedLater(before=5)] = 5
    """Captions of a group, with `captions` grouped; of an image with too few, some are shown again."""
    global_batch_size: Annotated[int, Field(ge=2)] = 428
    """Pairs in a step, over all workers; also the candidates in the contrastive loss (grouped, each image is one)."""
    accumulation: PositiveCount = 1
    """Micro-batches a worker cuts its share into. Exact: contrastive losses cache features, so that no negatives are
    lost, which costs one more forward pass; losses that are means over samples or tokens are summed up."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of the model in training steps, not of losses; auto = bf16 on GPUs that compute it, else fp32."""
    eval_precision: Annotated[Literal["fp32", "bf16"], AddedLater(before="fp32")] = "fp32"
    """Precision in which models are evaluated, while training and after: fp32 on any device, as the published figures
    were measured (without TF32 too), or bf16 autocast, which moves ranks."""
    compile: bool = False
    """`torch.compile` the model, HarMA's block by block: the first step takes half a minute or more."""
    cuda_graphs: Annotated[bool, Incidental()] = True
    """Record the passes of HarMA's vision and text transformers on a GPU, which its host then need not launch kernel by
    kernel; not with `accumulation` above 1 or activation checkpointing. Takes a second and memory at each new length
    of captions."""
    eval_every_epochs: PositiveCount = 1
    """Epochs between evaluations on the val split."""
    eval_every_steps: Annotated[Count, AddedLater(before=0)] = 0
    """Steps between evaluations; 0 = `eval_every_epochs` counts. The last step is followed by one in any case."""
    early_stopping_patience: Count = 0
    """Evaluations without a better objective before the run stops; 0 = never."""
    select_on: Literal["val", "test-as-in-released-code"] = "val"
    """Split that picks the best epoch. Picking on test flatters the result: only to compare with published tables."""
    keep_checkpoints: Annotated[PositiveCount, Incidental()] = 1
    """Best checkpoints kept, beside the last."""
    eval_batch_size: Annotated[PositiveCount, Incidental()] = 256
    """Images or captions encoded at a time in evaluation; does not change the result."""
    checkpoint_every_steps: Annotated[Count, Incidental()] = 0
    """Steps between checkpoints inside an epoch; 0 = only where the run evaluates."""
    log_every_steps: Annotated[PositiveCount, Incidental()] = 10
    """Steps between two records of losses and rates."""
    log_to: Annotated[tuple[Literal["wandb", "mlflow"], ...], Incidental()] = ()
    """Where figures go beside TensorBoard and JSON lines: to Weights & Biases, to MLflow, or to both."""
    threads: Annotated[Count, Incidental()] = 0
    """torch threads of a worker on CPU; 0 = the machine's cores divided by its workers."""

    def __post_init__(self) -> None:
        size, group = self.global_batch_size, self.pairs_per_sample
        if size % group or size < 2 * group:
            low = max(size - size % group, 2 * group)
            raise ValueError(
                "`global_batch_size` must be a multiple of `captions_per_image` with `captions` grouped, two images at "
                f"least, got {size} and {group}; use {low} or {low + group}"
            )

    @property
    def pairs_per_sample(self) -> int:
        """Pairs of one sample of a stream, such as an image with a group of captions."""
        return self.captions_per_image if self.captions == "grouped" else 1

    @property
    def samples_per_step(self) -> int:
        """Samples of a stream in a step, over all workers."""
        return self.global_batch_size // self.pairs_per_sample


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What picks the best epoch, and with it stops a run early and is compared by a search.

    A recipe's own section narrows the names to the metrics of its evaluations.
    """

    criterion: str
    """Metric that picks the best epoch."""
    also_keep: tuple[str, ...] = ()
    """Metrics whose best checkpoints are kept too."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The run whose trained weights a run starts from (``--from``)."""

    run: Annotated[str, Incidental()] = ""
    """Its folder; empty: the run starts from the pretrained model. Once it has a checkpoint of its own, that may go."""
    checkpoint: Annotated[str, Incidental()] = ""
    """Name of the checkpoint's folder there."""
    weights: str = ""
    """SHA-256 of the weights in it."""

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.run, "checkpoints", self.checkpoint)

    @property
    def title(self) -> str:
        """What the model of step 0 is called."""
        return f"the start from {Path(self.run).name}'s weights" if self.weights else "the untrained model"

    @property
    def entry(self) -> dict[str, Any]:
        """What a report has of it: nothing, if there is none."""
        return {"started_from": asdict(self)} if self.weights else {}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Workers and what each of them is given."""

    num_workers: Count = 0
    """Training processes; 0 = one a GPU, or two on CPUs (one on a single core); in a search: one a trial."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; null = if the cluster has GPUs."""
    cpus_per_worker: NonNegative = 0
    """CPUs Ray reserves for a worker; 0 = an equal share of what data tasks leave, in a search on CPUs one."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1
    """GPUs of a worker that uses them; below 1, trials of one worker each share a GPU."""
    max_failures: Count = 0
    """Restarts of the workers from the last checkpoint after a crash or a lost node, before the run gives up."""
    start_timeout_seconds: PositiveCount = 60
    """How long one attempt waits for the cluster to start all workers."""

    def __post_init__(self) -> None:
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                "`gpus_per_worker` below 1 needs `num_workers` 1 (workers of one training cannot share a GPU), got "
                f"{self.gpus_per_worker} and {self.num_workers}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every recipe has; a recipe's configuration adds its own sections."""

    groups_captions = False  # without a type: no setting
    """Whether the recipe's loss takes several captions of an image."""
    built_on_clip = True
    """Whether the recipe's backbone is a CLIP."""

    recipe: Annotated[str, SharedByTrials()]
    """Name of the recipe that this configuration started from."""
    seed: Annotated[Count, SharedByTrials()] = 0
    """Seed of initialisation, order and augmentation."""
    data: Annotated[DataConfig, SharedByTrials()] = field(default_factory=DataConfig)
    """Where the data lies and how it is streamed."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    scaling: Annotated[ScalingConfig, Incidental(), SharedByTrials()] = field(default_factory=ScalingConfig)
    """Workers."""
    started_from: Annotated[StartConfig, AddedLater(before=StartConfig()), SharedByTrials()] = field(
        default_factory=StartConfig
    )
    """Where it began, if not at the pretrained model."""

    def __post_init__(self) -> None:
        if self.train.captions == "grouped" and not self.groups_captions:
            raise ValueError(
                "`train.captions` grouped needs images with captions of their own, which HarMA's recipes train on, got "
                f"recipe {self.recipe}; use all or one"
            )

    @property
    def selecting_split(self) -> str:
        """The split that selects the best epoch."""
        return self.data.val_split if self.train.select_on == "val" else self.data.test_split

    @property
    def data_sets(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Folders of the data sets that figures depend on, with the splits that are used, by the settings' names.

        A recipe with a setting that names another one adds it.
        """
        return {"data.path": (self.data.path, (self.data.train_split, self.selecting_split, self.data.test_split))}

    @property
    def metrics(self) -> "Metrics":
        """The figures on which choices rest, without labels; a recipe replaces it."""
        raise NotImplementedError(f"{type(self).__name__} must say its `metrics`, by which runs are compared")

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        """Kinds of rows that it may be trained on, as manifests name them."""
        return ("images",)

    @property
    def next_stage(self) -> "RunConfig | None":
        """The settings of the recipe that builds on runs of this one; None: none does."""
        return None

    def after(self, run: "StoredRun", metric: str | None = None) -> dict[str, Any]:
        """Returns the settings by which the recipe builds on the best model of an earlier stage's run; none for others.

        Args:
            run: The run, finished.
            metric: What the model is the best by; None = the run's objective.

        Raises:
            UserError: If the run has no such model.
        """
        return {}

    def require_named(self) -> None:
        """Raises UserError if nobody named weights that the recipe does not draw by itself; a recipe replaces it."""

    def require_weights(self) -> None:
        """Raises UserError if named weights are not there, as far as shows without torch; a recipe replaces it."""

    def check_export(self, format: str) -> None:
        """Raises UserError if models of these settings cannot be written as ``adapter``, ...; a recipe replaces it."""
