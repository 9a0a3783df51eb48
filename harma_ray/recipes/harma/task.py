"""HarMA: image-text retrieval with adapters in a frozen CLIP (arXiv 2404.18253).

Shape letters: B batch, N images, M texts, E embedding.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harma_ray.data.augmentation import Augmentation
from harma_ray.data.batch_transforms import changed_batch, collate_cuts, cut_transform
from harma_ray.data.images import decode_stored, to_rgb
from harma_ray.data.kinds.images import IMAGES
from harma_ray.data.order import captions_of_group
from harma_ray.data.samples import Array, Batch, RowTransform, Send
from harma_ray.data.splits import Split
from harma_ray.data.stream import EvaluationStream
from harma_ray.data.transforms import eval_transform, train_transform
from harma_ray.distributed import gather_rows, gather_with_gradient
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.models.adapters import GatedAdapter, set_tuning
from harma_ray.models.architectures import tokenizer_of
from harma_ray.models.backbones import ClipBackbone
from harma_ray.models.clip import DualEncoder
from harma_ray.models.losses import (
    affiliation_loss,
    class_means,
    contrastive_loss,
    equal_scores_triplet_loss,
    triplet_loss,
    weighted_triplet_loss,
)
from harma_ray.models.recording import RecordedEncoder, is_recordable
from harma_ray.recipes.harma.config import HarmaConfig
from harma_ray.report.image_text import ImageTextEvaluation
from harma_ray.retrieval.encoding import Encoder, clip_encoder, encode_texts
from harma_ray.retrieval.image_text import ImageTextRetrieval, RetrievalResult
from harma_ray.task import Task


class HarmaTask(Task[HarmaConfig, DualEncoder]):
    """Image-text retrieval with HarMA."""

    evaluated_kinds = (IMAGES,)
    unseen_settings = ("model.text_tokens", "adapter.num_heads", "adapter.share_across_modalities")
    model_settings = (
        "model.architecture", "model.pretrained", "model.activation", "model.tuning", "model.text_tokens", "adapter",
        "loss.contrastive",
    )  # fmt: skip

    def __init__(self, config: HarmaConfig):
        """Takes the settings; nothing is loaded yet."""
        super().__init__(config)
        model = config.model
        self.metrics = replace(config.metrics, labels=RetrievalResult.LABELS)
        self.backbone = ClipBackbone(model.architecture, model.pretrained, config.seed, model.activation)

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for weights that do not belong to the architecture, missing labels, missing captions."""
        self.backbone.check()
        training.require_kind([IMAGES], f"recipe {self.config.recipe}")
        for split in evaluated:
            self.check_evaluated(split)
            _require_captions(split.read(["captions"]).column("captions").to_pylist(), split.path)
        if self.config.loss.center_factor and training.read(["label"]).column("label").null_count:
            raise UserError(
                f"`loss.center_factor` needs a class label for every image, but {training.path} has images without; "
                "convert it with labels, or set loss.center_factor=0"
            )
        self.config.require_named()

    @property
    def trains_backbone(self) -> bool:
        """Whether everything is trained."""
        return self.config.model.tuning == "full"

    def build_model(self, backbone: nn.Module) -> DualEncoder:
        """Returns the dual encoder, tuned as configured; a loss that is off leaves its temperature frozen."""
        settings, loss = self.config.model, self.config.loss
        model = DualEncoder(
            backbone,
            temperature=settings.temperature,
            affiliation_temperature=settings.temperature if loss.center_factor else None,
            text_tokens=settings.text_tokens,
        )
        adapter = {**asdict(self.config.adapter), "seed": self.config.seed}
        set_tuning(model, settings.tuning, **adapter if settings.tuning == "adapters" else {})
        if not loss.contrastive:
            model.temperature.requires_grad_(False)
        if settings.activation_checkpointing:
            model.set_grad_checkpointing()
        return model

    def quicken(self, model: DualEncoder, device: torch.device) -> nn.Module:
        """Returns the model, its blocks compiled if asked for, its passes recorded on a GPU where they can be."""
        train = self.config.train
        if train.compile:
            model.compile_blocks()
        records = train.cuda_graphs and train.accumulation == 1 and device.type == "cuda" and is_recordable(model)
        return RecordedEncoder(model) if records else model

    def encoder(self, model: DualEncoder, device: str) -> Encoder:
        """Returns what encodes as `evaluate` does; unit vectors."""
        size = self.backbone.image_size
        return clip_encoder(
            model,
            self.backbone.tokenizer(),
            lambda image: eval_transform(to_rgb(image), size),
            device,
            precision=self.config.train.eval_precision,
        )

    def transform(self, *, training: bool) -> RowTransform:
        """Returns the published training transform, or the plain resize."""
        size, max_pixels = self.backbone.image_size, self.config.data.max_pixels
        if training:
            train = self.config.train
            group = train.captions_per_image if train.captions == "grouped" else None
            return PairTransform(self.config.model.architecture, size, max_pixels, self.config.augmentation, group)
        return ImageTransform(size, max_pixels)

    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the terms over the global batch of N pairs.

        Images with K captions each stand for K pairs: their vectors are repeated. So the terms and their gradients are
        those of a batch of pairs whose K images are equal, which is encoded once. With the ids as positives, and the
        M images different, the contrastive term is half the sum of::

            1/M sum_m 1/K sum_(j of m) -log softmax(logits_m.)_j                  image to text, over all N texts
            1/N sum_j -log softmax over the M images (logits_.j)_m(j)  +  ln K    text to image: m stands in K columns

        which is SupCon's L_out (Khosla et al. 2020, eq. 2) between two modalities, as in UniCL (Yang et al. 2022), up
        to a constant that makes it ln N at equal scores as for pairs. The triplet term sums c_ij of every pair against
        the N - K texts of other images and d_ij of every pair against the M - 1 other images, K times each.
        """
        loss, group = self.config.loss, self.config.train.pairs_per_sample
        outputs = model(batch["image"], batch["text"])
        own_image, own_text = outputs["image"].repeat_interleave(group, dim=0), outputs["text"].flatten(0, -2)
        image, text = gather_with_gradient(own_image), gather_with_gradient(own_text)
        ids = gather_with_gradient(batch["image_id"].repeat_interleave(group))
        terms = {}
        if loss.contrastive:
            terms["contrastive"] = contrastive_loss(image, text, outputs["temperature"], ids)
        negatives = {"image_ids": ids, "same_image_negatives": self._same_image_negatives}
        if loss.triplet == "weighted":
            terms["triplet"] = weighted_triplet_loss(image, text, margin=loss.margin, gamma=loss.gamma, **negatives)
        elif loss.triplet != "none":
            hardest = loss.triplet == "hardest"
            terms["triplet"] = triplet_loss(image, text, margin=loss.margin, hardest_only=hardest, **negatives)
        if loss.center_factor:
            labels = batch["label"].repeat_interleave(group)
            image_means = gather_with_gradient(class_means(own_image, labels))
            text_means = gather_with_gradient(class_means(own_text, labels))
            affiliation = affiliation_loss(image, text, image_means, text_means, outputs["affiliation_temperature"])
            terms["affiliation"] = loss.center_factor * affiliation
        return terms

    @property
    def _same_image_negatives(self) -> bool:
        """Whether other captions of an image are its negatives in the triplet term."""
        return self.config.loss.same_image_negatives and self.config.train.captions != "grouped"

    def losses_at_equal_scores(self) -> dict[str, float]:
        """Returns the terms while all scores are equal; the triplet term only where every other row is a negative."""
        loss, rows = self.config.loss, self.config.train.global_batch_size
        terms = {}
        if loss.contrastive:
            terms["contrastive"] = math.log(rows)
        if self._same_image_negatives and loss.triplet != "none":
            terms["triplet"] = {
                "weighted": equal_scores_triplet_loss(rows, margin=loss.margin, gamma=loss.gamma),
                "plain": 2 * equal_scores_triplet_loss(rows, margin=loss.margin),
                "hardest": 2 * rows * loss.margin,
            }[loss.triplet]
        if loss.center_factor:
            terms["affiliation"] = loss.center_factor * math.log(rows)
        return terms

    def advice(self) -> list[str]:
        """Returns what to try: a lower rate first, since that is what collapses adapters."""
        config = self.config
        model, rate, rows = config.model, config.optim.learning_rate, config.train.global_batch_size
        others = rows - (1 if self._same_image_negatives else config.train.pairs_per_sample)
        advice = [f"a lower optim.learning_rate, such as {rate / 4:.1g} (now {rate:g})"]
        if config.optim.warmup_fraction < 0.3:
            advice.append(f"a longer warm-up, optim.warmup_fraction=0.3 (now {config.optim.warmup_fraction:g})")
        if model.pretrained == "random" and model.tuning == "adapters":
            advice.append("a pretrained backbone, model.pretrained=FILE: adapters in a random one have little to adapt")
        if config.loss.contrastive and config.loss.triplet in ("weighted", "plain"):
            advice.append(
                f"loss.triplet=none: the triplet term is a sum over {rows} x {others} pairs and outweighs the "
                "contrastive one, and while a model hardly ranks, equal scores lower it"
            )
        if model.temperature < 0.01 or model.temperature > 0.2:
            advice.append(f"model.temperature=0.07 (now {model.temperature:g})")
        return advice

    def evaluate(self, model: DualEncoder, data: EvaluationStream) -> Evaluation:
        """Returns the recalls of the split, index-based and duplicate-aware (``*_text``), in percent."""
        batch_size = self.config.train.eval_batch_size
        device = model.temperature.device
        captions = data.table(["captions"]).column("captions").to_pylist()
        _require_captions(captions, data.split.path)
        images = [
            model.encode_image(batch["image"]).float().cpu()
            for batch in data.batches(self.transform(training=False), batch_size=batch_size)
        ]
        width = model.embedding_width
        own_images = torch.cat(images) if images else torch.empty(0, width)
        image_embeddings = gather_rows(own_images.to(device)).cpu()
        texts = [text for row in captions for text in row]
        text_embeddings = encode_texts(model, self.backbone.tokenizer(), texts, batch_size)
        counts = torch.tensor([len(row) for row in captions])
        image_of_text = torch.repeat_interleave(torch.arange(len(captions)), counts)
        retrieval = ImageTextRetrieval.of(image_embeddings, text_embeddings, texts, image_of_text, device)
        return ImageTextEvaluation(retrieval.result.metrics, retrieval=retrieval)

    def monitor(self, model: DualEncoder) -> dict[str, float]:
        """Returns the temperature and, for every adapter, the shares (sigmoid of the gates) it lets through."""
        values = {"temperature": float(model.temperature.detach())}
        for name, module in model.clip.named_modules():
            if isinstance(module, GatedAdapter):
                tower = "image" if name.startswith("visual") else "text"
                block = name.split(".resblocks.")[1].split(".")[0]
                values[f"gate/{tower}/{block}/block"] = float(module.gate.detach().sigmoid())
                values[f"gate/{tower}/{block}/adapter"] = float(module.bottleneck.gate.detach().sigmoid())
        return values


@dataclass(frozen=True)
class PairTransform(RowTransform):
    """An augmented image and one of its captions, or a group of them."""

    on_cpu = frozenset({"text", "crop_size", "changes"})  # which are read without a GPU being waited for

    architecture: str
    size: int
    max_pixels: int
    augmentation: Augmentation
    captions_per_image: int | None = None
    """Captions of a group; None: one, of which there is no group."""
    cuts: bool = False
    """Whether images are cropped alone, and changed by `finish`."""

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``image`` uint8[3, S, S], ``text`` int64[L] or [K, L], ``image_id`` and ``label`` (-1: none)."""
        image = decode_stored(row["image"], max_pixels=self.max_pixels)
        if self.cuts:
            pixels = cut_transform(image, rng, self.size, self.augmentation)
        else:
            pixels = {"image": train_transform(image, rng, self.size, self.augmentation)}
        return {
            **pixels,
            "text": self._tokens(row),
            "image_id": np.int64(row["image_id"]),
            "label": np.int64(-1 if row["label"] is None else row["label"]),
        }

    def collate(self, samples: Sequence[dict[str, Array]]) -> dict[str, Array]:
        """Stacks samples; crops, which differ in size, are padded."""
        if not self.cuts:
            return super().collate(samples)
        cuts = collate_cuts(samples)
        return (
            super().collate([{name: sample[name] for name in sample if name not in cuts} for sample in samples]) | cuts
        )

    def for_device(self) -> "PairTransform":
        """Returns one whose images are changed by `finish`."""
        return replace(self, cuts=True)

    def finish(self, batch: Batch, send: Send) -> Batch:
        """Resizes and changes what was only cropped."""
        if not self.cuts:
            return batch
        sizes, changes = batch.pop("crop_size"), batch.pop("changes")
        image = changed_batch(batch["image"], sizes, changes, self.size, self.augmentation.level, send)
        return batch | {"image": image}

    def _tokens(self, row: Mapping[str, Any]) -> Tensor:
        captions, number = row["captions"], row["caption"]
        if self.captions_per_image is None:
            return _tokens_of(self.architecture, captions[number])
        chosen = captions_of_group(number, self.captions_per_image, num_captions=len(captions), epoch=row["epoch"])
        return torch.stack([_tokens_of(self.architecture, captions[place]) for place in chosen])


@functools.lru_cache(maxsize=2**15)
def _tokens_of(architecture: str, caption: str) -> Tensor:
    """Returns a caption as int64[L], not to be changed; of the last 32,768 it is kept (40 MB in each process)."""
    return tokenizer_of(architecture)([caption])[0]


@dataclass(frozen=True)
class ImageTransform(RowTransform):
    """An image as it is evaluated."""

    size: int
    max_pixels: int

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``image`` uint8[3, S, S]; nothing is random."""
        return {"image": eval_transform(decode_stored(row["image"], max_pixels=self.max_pixels), self.size)}


def _require_captions(captions: list[list[str]], path: Any) -> None:
    without = [row for row, texts in enumerate(captions) if not texts]
    if without:
        raise UserError(
            f"{path}: retrieval needs captions for every image, but rows {without[:5]} have none "
            f"({len(without)} in all); convert with captions or a caption template"
        )
