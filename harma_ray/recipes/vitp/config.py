"""Settings of ViTP runs: what can be set, the published values, and the drawn scenes' own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from harma_ray.config import (
    RANDOM,
    Count,
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
from harma_ray.evaluation import Metrics
from harma_ray.models.internvl.configs import require_transformers
from harma_ray.models.internvl.folders import files_of, require_config
from harma_ray.models.internvl.marks import SYSTEM_PROMPT

Criterion = Literal["loss", "token_accuracy", "answers", "top_1", "top_3", "top_5", "map"]
OF_FEATURES: Sequence[Criterion] = ("top_1", "top_3", "top_5", "map")
"""Those that need a data set with classes."""
Preset = Literal["paper", "released", "guide", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model and what of it is trained."""

    architecture: Literal["internvl2.5-1b", "scenes-tiny"] = "internvl2.5-1b"
    """Sizes of a model that is drawn; a folder says its own."""
    pretrained: Annotated[str, OnDisk("folder")] = ""
    """Folder of a model, in InternVL's own layout or transformers', or ``random``."""
    vision: Annotated[str, OnDisk("either")] = ""
    """Folder or file of a vision transformer of the same sizes to start from, alone or in a whole model; empty: the
    model's own."""
    freeze_vision: bool = False
    """Keep the vision transformer as it is."""
    freeze_vision_layers: Count = 0
    """Keep its embeddings and so many of its first layers as they are."""
    freeze_projector: bool = False
    """Keep what leads from it to the language model as it is."""
    freeze_language_model: bool = False
    """Keep the language model as it is."""
    freeze_output_head: bool = False
    """Keep the language model's output matrix as it is."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Chance that the last vision layer's branches are left out in training; from 0 at the first layer it grows evenly
    (released script)."""
    activation_checkpointing: bool = False
    """Keep only layer inputs for the backward pass: about a third more time, far less memory."""
    parallel: Annotated[Literal["ddp", "fsdp2"], Incidental()] = "ddp"
    """Whether each of several workers holds the whole model, or a part of every layer; checkpoints are the same."""

    @property
    def knows_no_answers(self) -> bool:
        """Whether all but the vision transformer is drawn and stays as it is."""
        is_frozen = self.freeze_projector and self.freeze_language_model and self.freeze_output_head
        return is_frozen and self.pretrained in ("", RANDOM)


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """How talks become tokens and images tiles."""

    max_tiles: PositiveCount = 6
    """Most tiles of the images of a talk, without thumbnails, where the data set does not say (released script)."""
    thumbnail: bool = True
    """Whether the whole image follows its tiles, if there are several."""
    max_tokens: PositiveCount = 4096
    """Tokens that are read of a talk; one whose image tokens would be cut off is refused."""
    system: str = SYSTEM_PROMPT
    """What talks without a system turn are told first; empty: nothing."""


@dataclass(frozen=True, kw_only=True)
class TokenDropConfig:
    """Token mask augmentation: image tokens that training leaves out."""

    preset: Preset = "paper"
    """``paper``: 0.75 of the image tokens, always, and the sequence is shorter; ``released``: as the released code, in
    one of four steps; ``guide``: 0.3 of them, in three of four steps, become zero; ``none``."""
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the image tokens in ``paper`` and ``released``; in ``released`` one minus this is the chance of a step,
    too."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What an image's vector is: the vision transformer's hidden states, pooled."""

    layer: int = -1
    """Which hidden states: -1 = of the last layer, else those behind so many layers (0 = embeddings)."""
    pooling: Literal["mean_all", "mean_patch", "cls"] = "mean_all"
    """Mean over all tokens, over those of patches, or the class token."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How an image is resized to the model's square (bilinear as in the guide; training tiles are bicubic)."""
    data: Annotated[str, OnDisk("folder"), Incidental()] = ""
    """Folder of a converted data set with classes, on which Top-1 is measured at every evaluation; empty: none. The
    images that are asked for are those of its split of the same name as that of the talks, such as ``val``."""
    gallery: str = "train"
    """Its split that images are found in."""


@dataclass(frozen=True, kw_only=True)
class TalkSelection(SelectionConfig):
    """What picks the best epoch, and what is answered to find it."""

    criterion: Criterion = "loss"
    """Metric that picks the best epoch: of held-out talks (``answers`` needs ``selection.answers``), or of the vision
    transformer's features (those need ``features.data``)."""
    also_keep: tuple[Criterion, ...] = ()
    """Metrics whose best checkpoints are kept too."""
    answers: Count = 0
    """Held-out talks whose first question is answered at every evaluation, to be compared with the true answer."""
    answer_tokens: PositiveCount = 32
    """Longest answer."""


@dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """Which parameters are decayed, and how fast layers learn."""

    released: bool = False
    """Decay as the released code does: RMS norms, too. Layer scale, class token and positions decay in any case."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate of each vision layer below the next; 1 = none (released)."""


@dataclass(frozen=True, kw_only=True)
class VitpConfig(RunConfig):
    """Settings of a ViTP run."""

    built_on_clip = False

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    talk: TalkConfig = field(default_factory=TalkConfig)
    """Tokens and tiles."""
    token_drop: TokenDropConfig = field(default_factory=TokenDropConfig)
    """Image tokens that are left out."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Vectors of images."""
    selection: Annotated[TalkSelection, SharedByTrials()] = field(default_factory=TalkSelection)
    """The best checkpoint."""
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    """Weight decay and learning rates by layer."""

    @property
    def data_sets(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The talks and, if there is one, the data set with classes on which Top-1 is measured."""
        used = (self.features.gallery, self.selecting_split, self.data.test_split)
        return super().data_sets | ({"features.data": (self.features.data, used)} if self.features.data else {})

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        """Talks."""
        return ("talks",)

    @property
    def metrics(self) -> Metrics:
        """The figures on which choices rest, without labels."""
        return Metrics(
            get_args(Criterion), self.selection.criterion, self.selection.also_keep, lower_is_better=("loss",)
        )

    def require_named(self) -> None:
        """Raises UserError if nobody said which weights the model has."""
        if not self.model.pretrained:
            raise UserError(
                f"recipe {self.recipe} starts from a model whose weights must be named; give "
                "--set model.pretrained=FOLDER, or model.pretrained=random if random ones are what you want"
            )

    def require_weights(self) -> None:
        """Raises UserError if what reads them, the folder, or the vision transformer is not there."""
        require_transformers()
        if self.model.pretrained not in ("", RANDOM):
            folder = Path(self.model.pretrained).expanduser()
            require_config(folder)
            files_of(folder)
        if self.model.vision:
            files_of(Path(self.model.vision).expanduser())


def vitp_internvl_1b() -> VitpConfig:
    """ViTP's pretraining of InternViT-300M in InternVL2.5-1B, as in the released script (8 GPUs, a talk at a time)."""
    return VitpConfig(
        recipe="vitp-internvl-1b",
        model=ModelConfig(activation_checkpointing=True),
        optim=OptimConfig(
            learning_rate=2e-5,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            schedule="cosine",
            warmup_fraction=0.2,
            clip_grad_norm=1.0,
        ),
        train=TrainConfig(
            epochs=1, steps=8000, global_batch_size=128, accumulation=16, eval_every_steps=500, eval_batch_size=4
        ),
    )


def scenes_vitp() -> VitpConfig:
    """The whole thing in minutes on 2 cores: a tiny model, drawn and pretrained on talks about drawn scenes."""
    return VitpConfig(
        recipe="scenes-vitp",
        model=ModelConfig(architecture="scenes-tiny", pretrained="random", drop_path=0.0),
        talk=TalkConfig(max_tiles=1, max_tokens=512, system=""),
        token_drop=TokenDropConfig(ratio=0.5),
        selection=TalkSelection(answers=600, answer_tokens=24),
        optim=OptimConfig(
            learning_rate=1e-3,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            schedule="cosine",
            warmup_fraction=0.1,
            clip_grad_norm=1.0,
        ),
        train=TrainConfig(
            epochs=1, steps=1800, global_batch_size=32, eval_every_steps=600, eval_batch_size=32, log_every_steps=50
        ),
    )


RECIPES: Mapping[str, Callable[[], VitpConfig]] = {"vitp-internvl-1b": vitp_internvl_1b, "scenes-vitp": scenes_vitp}
