"""ViTP: a vision transformer is pretrained through a vision-language model that answers questions about images.

Source: ViTP (Visual insTruction Pretraining, arXiv 2509.17562). Shape letters: B talks, L tokens, T tiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from harma_ray.config import OptimConfig
from harma_ray.data.kinds.base import RowCheck
from harma_ray.data.kinds.talks import IMAGE_MARK, TALKS, Turn
from harma_ray.data.samples import Batch, RowTransform
from harma_ray.data.splits import Split
from harma_ray.data.stream import EvaluationStream, Worker
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.models.internvl.groups import parameter_groups
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.token_drop import TOKEN_DROPS, TokenDrop, released_drop
from harma_ray.models.internvl.vision import set_drop_path
from harma_ray.models.precision import evaluating
from harma_ray.parallel import shard
from harma_ray.recipes.vitp.config import OF_FEATURES, TokenDropConfig, VitpConfig
from harma_ray.recipes.vitp.evaluation import evaluate_talks
from harma_ray.recipes.vitp.features import SquareTransform, labelled_splits, measure_features, vision_encoder
from harma_ray.recipes.vitp.talks import TalkTransform, backbone_of, measure_talks, reader_of
from harma_ray.retrieval.encoding import Encoder
from harma_ray.task import Answerer, ParameterGroup, SampleFacts, Task

LABELS = {
    "loss": "loss on held-out talks",
    "token_accuracy": "supervised tokens that are the likeliest",
    "answers": "answers to questions that are right",
    "top_1": "an image of the class is nearest",
    "top_3": "an image of the class is among the nearest 3",
    "top_5": "an image of the class is among the nearest 5",
    "map": "mean average precision by class",
}


class VitpTask(Task[VitpConfig, VisualInstructionModel]):
    """Visual-instruction pretraining."""

    accumulation = "summed"
    evaluated_kinds = (TALKS,)
    vector_settings = ("features.layer", "features.pooling", "features.interpolation")
    model_settings = (
        "model.architecture", "model.pretrained", "model.vision", "model.freeze_vision", "model.freeze_vision_layers",
        "model.freeze_projector", "model.freeze_language_model", "model.freeze_output_head",
    )  # fmt: skip
    unseen_settings = ("talk.max_tiles", "talk.thumbnail", "talk.max_tokens", "talk.system")

    def __init__(self, config: VitpConfig):
        """Takes the settings; nothing is loaded yet."""
        super().__init__(config)
        self.metrics = replace(config.metrics, labels=LABELS)
        self.backbone = backbone_of(config)
        self._step_values: dict[str, Tensor] = {}

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for a model that is not there or no InternVL, data of another kind, or Top-1 of nothing."""
        for asker, names in (("selection", self.metrics.kept), ("objective", metrics)):
            of_features = next((name for name in names if name in OF_FEATURES), None)
            if of_features and not self.config.features.data:
                rule = f"`{asker}` names {of_features}, which needs `features.data`"
                raise UserError(f"{rule}: a converted data set with classes; --set features.data=FOLDER")
            if "answers" in names and not self.config.selection.answers:
                rule = f"`{asker}` names answers, which needs `selection.answers`"
                raise UserError(f"{rule}: how many held-out questions are answered; --set selection.answers=200")
        super().check(training, evaluated, metrics)
        training.require_kind([TALKS], f"recipe {self.config.recipe}")
        for split in evaluated if self.config.features.data else ():
            labelled_splits(self.config.features, split.name)

    @property
    def trains_backbone(self) -> bool:
        """Whether the model itself is trained."""
        return True

    def build_model(self, backbone: nn.Module) -> VisualInstructionModel:
        """Returns the model with drop path and token drop, its frozen parts frozen."""
        settings: Any = self.config.model
        model = VisualInstructionModel(backbone, token_drop_of(self.config.token_drop))  # type: ignore[arg-type]
        set_drop_path(model.vision_tower, settings.drop_path)
        model.freeze(
            vision=settings.freeze_vision,
            projector=settings.freeze_projector,
            language_model=settings.freeze_language_model,
            lm_head=settings.freeze_output_head,
            vision_layers=settings.freeze_vision_layers,
        )
        if settings.activation_checkpointing:
            model.set_grad_checkpointing()
        return model

    def transform(self, *, training: bool) -> RowTransform:
        """Returns what makes tiles and tokens of a talk."""
        return TalkTransform(reader_of(self.config), training)

    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the mean cross-entropy of the supervised tokens."""
        drop = torch.tensor(self.random.random() < token_drop_of(self.config.token_drop).probability)
        outputs = model(batch["pixels"], batch["ids"], batch["mask"], batch["labels"], drop, batch["scores"])
        counted = self.counted(batch)
        self._step_values = {
            "token_accuracy": 100 * outputs["right"].detach() / counted.clamp(min=1),
            "dropped_percent": 100 * (1 - outputs["kept"].detach() / outputs["tokens"].detach()),
        }
        return {"talk": outputs["loss"]}

    def counted(self, batch: Batch) -> Tensor:
        """Returns the number of supervised tokens; the first one of a talk follows nothing."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def amounts(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the numbers of supervised tokens and of tiles."""
        return {"tokens": self.counted(batch), "tiles": torch.tensor(len(batch["pixels"]))}

    def monitor(self, model: VisualInstructionModel) -> dict[str, float]:
        """Returns token accuracy and the share of tokens that was dropped, in percent, of worker 0's last batch."""
        return {name: float(value) for name, value in self._step_values.items()}

    def parameter_groups(self, model: VisualInstructionModel, optim: OptimConfig) -> list[ParameterGroup]:
        """Returns groups by weight decay and, with layer decay, by vision layer."""
        groups = self.config.groups
        return parameter_groups(
            model,
            optim.learning_rate,
            optim.weight_decay,
            released_groups=groups.released,
            layer_decay=groups.layer_decay,
        )

    def parallelise(self, model: nn.Module, worker: Worker) -> nn.Module:
        """Returns the model replicated (DDP), or with every layer spread over the workers (FSDP2)."""
        if self.config.model.parallel == "ddp":
            return super().parallelise(model, worker)
        assert isinstance(model, VisualInstructionModel)
        return shard(model, model.layers(), worker.device)

    def encoder(self, model: VisualInstructionModel, device: str) -> Encoder:
        """Returns the vision transformer's pooled hidden states as unit vectors."""
        model.to(device)
        return self._encoder(model)

    def answerer(self, model: VisualInstructionModel, device: str) -> Answerer:
        """Returns what answers questions, without chance: the likeliest token follows each."""
        model.to(device).eval()
        reader, precision = reader_of(self.config), self.config.train.eval_precision

        @evaluating(precision, torch.device(device))
        def answer(question: str, images: Sequence[Image.Image], max_tokens: int) -> str:
            if self.config.model.knows_no_answers:
                raise UserError(
                    "this model answers nothing: all but its vision transformer is drawn and was never trained; import "
                    "it anew with the rest of a model, --set model.pretrained=FOLDER"
                )
            marks = "" if IMAGE_MARK in question else f"{IMAGE_MARK}\n" * len(images)
            sample = reader.ask([Turn("human", marks + question)], images, None)
            batch = TalkTransform(reader, training=False).collate([sample])
            inputs = [torch.as_tensor(batch[name]).to(device) for name in ("pixels", "ids", "mask")]
            ids = model.answer(*inputs, max_new_tokens=max_tokens)
            (text,) = reader.backbone.tokenizer().batch_decode(ids, skip_special_tokens=True)
            return text.strip()

        return answer

    def row_check(self) -> RowCheck:
        """Returns what refuses talks of more than ``talk.max_tokens`` tokens."""
        self.config.require_named()  # else the tokenizer would be another model's
        self.backbone.tokenizer()
        return reader_of(self.config).check

    def sample_facts(self, split: Split) -> SampleFacts:
        """Returns tokens and tiles of all talks, and how many of them are longer than may be."""
        split.require_kind([TALKS], f"recipe {self.config.recipe}")
        self.config.require_named()
        measured, limit = measure_talks(split, reader_of(self.config)), self.config.talk.max_tokens
        lengths = measured["tokens of a talk"]
        too_long = sum(length > limit for length in lengths)
        share = f"{too_long:,} of {len(lengths):,} talks ({100 * too_long / len(lengths):.1f} %)"
        return SampleFacts(measured, [f"{share} are longer than talk.max_tokens = {limit:,}"])

    def _encoder(self, model: VisualInstructionModel) -> Encoder:
        config = self.config
        return vision_encoder(model.vision_tower, config.features, self._square, config.train.eval_precision)

    @property
    def _square(self) -> SquareTransform:
        config = self.config
        return SquareTransform(self.backbone.image_size, config.features.interpolation, config.data.max_pixels)

    def evaluate(self, model: VisualInstructionModel, data: EvaluationStream) -> Evaluation:
        """Returns the loss on the talks, answers by kind if any are asked for, and Top-1 of a labelled data set."""
        config = self.config
        found = evaluate_talks(model, data, reader_of(config), config)
        if not config.features.data:
            return found
        labelled = labelled_splits(config.features, data.split.name)
        retrieval = measure_features(self._encoder(model), self._square, labelled, data, config.train.eval_batch_size)
        metrics = {**found.metrics, **retrieval.result.metrics}
        return replace(found, retrieval=retrieval, labelled=labelled, metrics=metrics)


def token_drop_of(settings: TokenDropConfig) -> TokenDrop:
    """Returns which image tokens are dropped, how often."""
    preset = TOKEN_DROPS[settings.preset]
    if settings.preset == "released":
        return released_drop(settings.ratio)
    return replace(preset, ratio=settings.ratio) if settings.preset == "paper" else preset
