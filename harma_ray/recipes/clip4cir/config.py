"""Settings of CLIP4Cir runs: what can be set, the published values, and those for drawn scenes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from harma_ray.config import (
    EmptyMeant,
    Incidental,
    OnDisk,
    OptimConfig,
    PositiveCount,
    RunConfig,
    SelectionConfig,
    SharedByTrials,
    TrainConfig,
)
from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics, PublishedFigures
from harma_ray.models.names import require_file, require_named
from harma_ray.training.run_files import read_meta

if TYPE_CHECKING:
    from harma_ray.task import StoredRun

_FROM = "--from RUN, or "
"""The other way to name weights."""
Criterion = Literal[
    "r_mean", "average_recall", "average_recall_at10", "average_recall_at50", "recall_at1", "recall_at5", "recall_at10",
    "recall_at50", "group_recall_at1", "group_recall_at2", "group_recall_at3", "mean(R@5+R_s@1)", "arithmetic_mean",
    "harmonic_mean", "geometric_mean",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The CLIP that encodes images and texts."""

    architecture: str = "RN50x4-quickgelu"
    """open_clip's name, or one of this package's (``scenes-tiny``)."""
    pretrained: Annotated[str, OnDisk("file"), EmptyMeant("random")] = "openai"
    """open_clip's tag, the path of a local file (the published ``.pt`` of a fine-tuned CLIP too), or ``random``."""
    activation: Annotated[Literal["", "gelu", "quick_gelu"], Incidental()] = ""
    """Which activation the weights of a file were trained with, where the file does not say so; it must be the one that
    the architecture computes."""


@dataclass(frozen=True, kw_only=True)
class TunedClipConfig(ClipConfig):
    """A CLIP that an earlier run may have fine-tuned."""

    tuned: Annotated[str, OnDisk("folder")] = ""
    """Folder of a fine-tuning run's checkpoint, whose weights take the place of the pretrained ones (``--from``)."""
    tuned_seed: int = 0
    """Seed of that run: weights that are ``random`` are drawn with it."""


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """How images and captions become inputs."""

    padding: Literal["target", "square", "none"] = "target"
    """Pad the shorter side to a ratio of `target_ratio`, to a square, or not; then resize and crop the centre."""
    target_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.25
    """Largest ratio of the sides after target padding."""
    random_captions: bool = True
    """Whether training draws one of four texts made of a query's two captions (FashionIQ), or always joins them."""


@dataclass(frozen=True, kw_only=True)
class RecallSelection(SelectionConfig):
    """What picks the best epoch."""

    criterion: Criterion = "r_mean"
    """Metric that picks the best epoch; r_mean is average_recall on FashionIQ and arithmetic_mean on CIRR."""
    also_keep: tuple[Criterion, ...] = ()
    """Metrics whose best checkpoints are kept too; CIRR's code keeps those of the arithmetic, harmonic and geometric
    mean."""


@dataclass(frozen=True, kw_only=True)
class Clip4CirConfig(RunConfig):
    """What both stages have."""

    model: ClipConfig = field(default_factory=ClipConfig)
    """CLIP."""
    preparation: PreparationConfig = field(default_factory=PreparationConfig)
    """Inputs."""
    selection: Annotated[RecallSelection, SharedByTrials()] = field(default_factory=RecallSelection)
    """The best epoch."""

    @property
    def metrics(self) -> Metrics:
        """The figures on which choices rest, without labels."""
        return Metrics(get_args(Criterion), self.selection.criterion, self.selection.also_keep)

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        """Triplets, or what a frozen CLIP makes of them."""
        return "triplets", "triplet vectors"

    def require_weights(self) -> None:
        """Raises UserError if CLIP's weights can be nothing but a file, and that is not there."""
        require_file(self.model.architecture, self.model.pretrained)

    def check_export(self, format: str) -> None:
        """Raises UserError for adapters."""
        if format == "adapter":
            raise UserError(f"recipe {self.recipe} has no adapters; export it as `released` or `open_clip`")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What the first stage trains."""

    encoder: Literal["both", "text", "image"] = "both"
    """The encoders that are trained."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Clip4CirConfig):
    """Settings of the first stage: CLIP's encoders, their outputs added."""

    tuning: TuningConfig = field(default_factory=TuningConfig)
    """What is trained."""

    @property
    def next_stage(self) -> "CombinerConfig":
        """The second stage."""
        return scenes_cir_combiner() if self.recipe == "scenes-cir-finetune" else clip4cir_combiner()

    def require_named(self) -> None:
        """Raises UserError if an encoder stays frozen, and nobody named CLIP's weights."""
        if self.tuning.encoder != "both":
            require_named(self.recipe, self.model.pretrained, _FROM)


@dataclass(frozen=True, kw_only=True)
class CombinerSizes:
    """The Combiner; see `harma_ray.models.combiner`."""

    projection_dim: PositiveCount = 2560
    """Features that image and text are projected to; published: 4 times CLIP's."""
    hidden_dim: PositiveCount = 5120
    """Hidden features; published: 8 times CLIP's."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """Share of activations dropped in training, at four places."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The frozen encoders' outputs."""

    cached: bool = True
    """Compute them once, with Ray Data, before training (nothing about them is random), or anew in every epoch."""


@dataclass(frozen=True, kw_only=True)
class CombinerConfig(Clip4CirConfig):
    """Settings of the second stage: a Combiner over the frozen encoders."""

    model: TunedClipConfig = field(default_factory=TunedClipConfig)
    """CLIP, frozen."""
    combiner: CombinerSizes = field(default_factory=CombinerSizes)
    """The Combiner."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The encoders' outputs."""

    def after(self, run: "StoredRun", metric: str | None = None) -> dict[str, Any]:
        """Returns the settings by which this stage builds on the first's CLIP."""
        first = run.config
        if not isinstance(first, FinetuneConfig):
            return {}
        return {
            "model.architecture": first.model.architecture,
            "model.pretrained": first.model.pretrained,
            "model.activation": first.model.activation,
            "model.tuned": str(run.best_finished(metric)),
            "model.tuned_seed": first.seed,
            **{f"preparation.{name}": value for name, value in asdict(first.preparation).items()},
        }

    def require_named(self) -> None:
        """Raises UserError if nobody named CLIP's weights, or a run that tuned them."""
        if not self.model.tuned:
            require_named(self.recipe, self.model.pretrained, _FROM)

    def require_weights(self) -> None:
        """Raises UserError as for the first stage, or if the run's checkpoint is not there."""
        super().require_weights()
        if self.model.tuned:
            read_meta(Path(self.model.tuned).expanduser())


def clip4cir_finetune() -> FinetuneConfig:
    """CLIP4Cir's first stage: OpenAI's CLIP RN50x4 fine-tuned with the sum of its outputs."""
    return FinetuneConfig(
        recipe="clip4cir-finetune",
        optim=OptimConfig(
            learning_rate=2e-6, betas=(0.9, 0.999), epsilon=1e-7, weight_decay=0.01, no_decay=(), schedule="constant",
            warmup_fraction=0,
        ),
        train=TrainConfig(epochs=100, global_batch_size=128),
    )  # fmt: skip


def clip4cir_combiner() -> CombinerConfig:
    """CLIP4Cir's second stage: a Combiner over a fine-tuned CLIP (``--from RUN``)."""
    return CombinerConfig(
        recipe="clip4cir-combiner",
        optim=OptimConfig(
            name="adam", learning_rate=2e-5, betas=(0.9, 0.999), weight_decay=0, no_decay=(), schedule="constant",
            warmup_fraction=0,
        ),
        train=TrainConfig(epochs=300, global_batch_size=4096),
    )  # fmt: skip


def scenes_cir_finetune() -> FinetuneConfig:
    """The first stage on drawn scenes, with a tiny CLIP such as ``scenes-pretrain`` makes."""
    base = clip4cir_finetune()
    return replace(
        base,
        recipe="scenes-cir-finetune",
        model=ClipConfig(architecture="scenes-tiny", pretrained="random"),
        optim=replace(base.optim, learning_rate=3e-4),
        train=TrainConfig(epochs=8, global_batch_size=128),
    )


def scenes_cir_combiner() -> CombinerConfig:
    """The second stage on drawn scenes."""
    base = clip4cir_combiner()
    return replace(
        base,
        recipe="scenes-cir-combiner",
        model=TunedClipConfig(architecture="scenes-tiny", pretrained=""),
        combiner=CombinerSizes(projection_dim=512, hidden_dim=1024),
        optim=replace(base.optim, learning_rate=1e-3),
        train=TrainConfig(epochs=20, global_batch_size=256),
    )


RECIPES: Mapping[str, Callable[[], Clip4CirConfig]] = {
    "clip4cir-finetune": clip4cir_finetune,
    "clip4cir-combiner": clip4cir_combiner,
    "scenes-cir-finetune": scenes_cir_finetune,
    "scenes-cir-combiner": scenes_cir_combiner,
}

PUBLISHED: Mapping[str, tuple[PublishedFigures, ...]] = {
    "clip4cir-combiner": (
        PublishedFigures(
            data="FashionIQ", split="val", num_texts=6016, figures={"average_recall": 55.36},
            source="CLIP4Cir (arXiv 2308.11485), mean of R@10 and R@50; it picks the best epoch on the same split",
        ),
        PublishedFigures(
            data="CIRR", split="test1", num_texts=4148, figures={"mean(R@5+R_s@1)": 75.10},
            source="CLIP4Cir (arXiv 2308.11485), from CIRR's server, which `predict cirr-test` writes files for",
        ),
    ),
}  # fmt: skip
"""What the paper says that its recipes reach."""
