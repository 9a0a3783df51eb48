"""Settings of HarMA runs: what can be set, the published values, and the demo's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from pydantic import FiniteFloat

from harma_ray.config import (
    AddedLater,
    EmptyMeant,
    Incidental,
    NonNegative,
    OnDisk,
    OptimConfig,
    Positive,
    PositiveCount,
    RunConfig,
    SelectionConfig,
    SharedByTrials,
    TrainConfig,
)
from harma_ray.data.augmentation import Augmentation
from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics, PublishedFigures
from harma_ray.models.names import require_file, require_named

Criterion = Literal[
    "txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean",
    "txt_r1_text", "txt_r5_text", "txt_r10_text", "img_r1_text", "img_r5_text", "img_r10_text", "r_mean_text",
]  # fmt: skip
"""Recalls: ``txt`` image to text, ``img`` text to image; ``_text``: a caption that is word for word equal is right."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and what of it is trained."""

    architecture: str = "ViT-B-32"
    """open_clip's name, or one of this package's (``scenes-tiny``)."""
    pretrained: Annotated[str, OnDisk("file"), EmptyMeant("random")] = ""
    """open_clip's tag, the path of a local file, or ``random``; to be named, unless all of the model is trained."""
    activation: Annotated[Literal["", "gelu", "quick_gelu"], Incidental()] = ""
    """Which activation the weights of a file were trained with, where the file does not say so; it must be the one that
    the architecture computes."""
    tuning: Literal["adapters", "full", "none"] = "adapters"
    """HarMA's adapters; everything; or nothing (zero-shot)."""
    text_tokens: Literal["full", "trim"] = "full"
    """All positions of a caption, as the released weights expect, or none beyond the longest caption of the batch."""
    temperature: Positive = 0.07
    """Start of the learned temperature that divides the logits."""
    activation_checkpointing: bool = False
    """Keep only block inputs for the backward pass: about a third more time, far less memory."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """HarMA's adapters (see `harma_ray.models.adapters`)."""

    width: PositiveCount = 128
    """Features inside an adapter."""
    num_heads: PositiveCount = 8
    """Attention heads of an adapter; must divide both widths."""
    shared_width: PositiveCount = 64
    """Features inside a shared adapter."""
    share_across_modalities: bool = False
    """Whether block i of both towers uses the same shared adapter (paper), or the text tower alone (released code)."""
    gate_init: FiniteFloat = 0.6
    """Start of every gate, before the sigmoid."""

    def __post_init__(self) -> None:
        for name in ("width", "shared_width"):
            width = getattr(self, name)
            if width % self.num_heads:
                raise ValueError(f"`{name}` must be a multiple of `num_heads`, got {width} and {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the loss; their sum is minimised."""

    contrastive: bool = True
    """The contrastive term."""
    triplet: Literal["weighted", "plain", "hardest", "none"] = "weighted"
    """HarMA's weighted triplet term, the plain one, the plain one on the hardest negatives, or none."""
    margin: NonNegative = 0.2
    """Margin of the triplet term, in cosine."""
    gamma: NonNegative = 2.0
    """Exponent of the triplet weights; 0 = no weights."""
    same_image_negatives: bool = True
    """Whether other captions of the same image count as negatives in the triplet term, as in the released code; with
    `train.captions` grouped they never do."""
    center_factor: NonNegative = 0.0
    """Weight of the affiliation term (class means); 0 = left out; needs labels."""

    def __post_init__(self) -> None:
        if not self.contrastive and self.triplet == "none":
            raise ValueError("`contrastive` or `triplet` must be on, got false and none")


@dataclass(frozen=True, kw_only=True)
class RecallSelection(SelectionConfig):
    """What picks the best epoch."""

    criterion: Criterion = "r_mean"
    """Metric that picks the best epoch; ``r_mean_text`` is the duplicate-aware one."""
    also_keep: tuple[Criterion, ...] = ()
    """Metrics whose best checkpoints are kept too."""


@dataclass(frozen=True, kw_only=True)
class HarmaConfig(RunConfig):
    """Settings of a HarMA run."""

    groups_captions = True

    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and tuning."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Adapters; used if ``model.tuning`` is ``adapters``."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss terms."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random changes of training images."""
    selection: Annotated[RecallSelection, AddedLater(before=RecallSelection()), SharedByTrials()] = field(
        default_factory=RecallSelection
    )
    """The best epoch."""

    @property
    def metrics(self) -> Metrics:
        """The figures on which choices rest, without labels."""
        return Metrics(get_args(Criterion), self.selection.criterion, self.selection.also_keep)

    def require_named(self) -> None:
        """Raises UserError if the backbone stays frozen, and nobody named its weights."""
        if self.model.tuning != "full":
            require_named(self.recipe, self.model.pretrained)

    def require_weights(self) -> None:
        """Raises UserError if the backbone's weights can be nothing but a file, and that is not there."""
        require_file(self.model.architecture, self.model.pretrained)

    def check_export(self, format: str) -> None:
        """Raises UserError for a plain CLIP of a model with adapters."""
        if format == "open_clip" and self.model.tuning == "adapters":
            raise UserError(
                "this run has HarMA's adapters, whose GELU and attention no weight of a plain CLIP can stand for; "
                "export it as `onnx`, `huggingface`, `released` or `adapter`"
            )


def harma_rsitmd_vit() -> HarmaConfig:
    """HarMA on RSITMD from LAION-2B's ViT-B/32."""
    return HarmaConfig(
        recipe="harma-rsitmd-vit",
        model=ModelConfig(architecture="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        optim=OptimConfig(learning_rate=4e-4),
        train=TrainConfig(epochs=50, global_batch_size=428),
    )


def harma_rsicd_vit() -> HarmaConfig:
    """HarMA on RSICD from LAION-2B's ViT-B/32."""
    base = harma_rsitmd_vit()
    return replace(base, recipe="harma-rsicd-vit", train=replace(base.train, epochs=10))


def harma_rsitmd_geo() -> HarmaConfig:
    """HarMA on RSITMD from GeoRSCLIP. The file is to be in the working folder."""
    return HarmaConfig(
        recipe="harma-rsitmd-geo",
        model=ModelConfig(architecture="ViT-B-32-quickgelu", pretrained="RS5M_ViT-B-32_RET-2.pt"),
        optim=OptimConfig(learning_rate=4e-6),
        train=TrainConfig(epochs=80, global_batch_size=428),
    )


def harma_rsicd_geo() -> HarmaConfig:
    """HarMA on RSICD from GeoRSCLIP."""
    return replace(harma_rsitmd_geo(), recipe="harma-rsicd-geo")


def scenes_pretrain() -> HarmaConfig:
    """The demo's first half: a tiny CLIP trained whole, from nothing, on one style of drawn scenes."""
    return HarmaConfig(
        recipe="scenes-pretrain",
        model=ModelConfig(architecture="scenes-tiny", pretrained="random", tuning="full", text_tokens="trim"),
        loss=LossConfig(triplet="none"),
        optim=OptimConfig(learning_rate=1e-3),
        train=TrainConfig(epochs=2, global_batch_size=128),
        augmentation=Augmentation(min_scale=0.7, num_operations=0),
    )


def harma_scenes() -> HarmaConfig:
    """The demo's second half: HarMA adapts the frozen tiny CLIP to another style of drawn scenes."""
    return HarmaConfig(
        recipe="harma-scenes",
        model=ModelConfig(architecture="scenes-tiny", text_tokens="trim"),
        optim=OptimConfig(learning_rate=4e-3),
        train=TrainConfig(epochs=3, global_batch_size=128),
        augmentation=Augmentation(min_scale=0.7, num_operations=0),
    )


RECIPES: Mapping[str, Callable[[], HarmaConfig]] = {
    "harma-rsitmd-vit": harma_rsitmd_vit,
    "harma-rsitmd-geo": harma_rsitmd_geo,
    "harma-rsicd-vit": harma_rsicd_vit,
    "harma-rsicd-geo": harma_rsicd_geo,
    "scenes-pretrain": scenes_pretrain,
    "harma-scenes": harma_scenes,
}


def _table_1(data: str, num_texts: int, *recalls: float) -> tuple[PublishedFigures, ...]:
    """Returns a line of HarMA's Table 1: image to text and text to image R@1, R@5, R@10, and their mean."""
    names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
    figures: dict[str, float] = dict(zip(names, recalls, strict=True))
    source = "HarMA (arXiv 2404.18253), Table 1; its code picks the best epoch on test"
    return (PublishedFigures(data=data, split="test", num_texts=num_texts, figures=figures, source=source),)


PUBLISHED: Mapping[str, tuple[PublishedFigures, ...]] = {
    "harma-rsitmd-vit": _table_1("RSITMD", 2260, 25.81, 48.37, 60.61, 19.92, 53.27, 71.21, 46.53),
    "harma-rsitmd-geo": _table_1("RSITMD", 2260, 32.74, 53.76, 69.25, 25.62, 57.65, 74.60, 52.27),
    "harma-rsicd-vit": _table_1("RSICD", 5465, 16.36, 34.48, 47.74, 12.92, 37.17, 53.07, 33.62),
    "harma-rsicd-geo": _table_1("RSICD", 5465, 20.52, 41.37, 54.66, 15.84, 41.92, 59.39, 38.95),
}
"""What the paper says that its recipes reach."""
