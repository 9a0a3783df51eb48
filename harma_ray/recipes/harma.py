"""HarMA: image-text retrieval with adapters in a frozen CLIP (arXiv 2404.18253).

Shape letters: B batch, N images, M texts, E embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harma_ray.data.schema import Split
from harma_ray.data.transforms import Augmentation, decode_stored, eval_transform, train_transform
from harma_ray.distributed import broadcast_object, gather_rows, gather_with_gradient, rank
from harma_ray.encoding import encode_texts
from harma_ray.errors import UserError
from harma_ray.image_text_page import image_text_sections
from harma_ray.losses import (
    affiliation_loss,
    class_means,
    contrastive_loss,
    equal_scores_triplet_loss,
    triplet_loss,
    weighted_triplet_loss,
)
from harma_ray.metrics import RetrievalResult, bootstrap_interval, chance_recalls, image_text_recalls
from harma_ray.models.adapters import GatedAdapter, set_tuning
from harma_ray.models.backbones import RANDOM, check_pretrained, require_named
from harma_ray.models.clip import DualEncoder, build_clip, image_size, outline_clip, tokenize
from harma_ray.pictures import read_images, retrieval_sheet
from harma_ray.recipes.harma_config import HarmaConfig
from harma_ray.task import Array, Batch, Evaluation, EvaluationData, Projection, RowTransform, Section


@dataclass(frozen=True)
class ImageTextDetails:
    """Embeddings and ranks of an image-text evaluation."""

    image_embeddings: Tensor
    """fp32[N, E], L2-normalised, in row order."""
    text_embeddings: Tensor
    """fp32[M, E], L2-normalised, in the order of the rows' captions."""
    texts: list[str]
    """M captions."""
    image_of_text: Tensor
    """int64[M], the row of each caption's image."""
    result: RetrievalResult
    """Ranks, from which metrics and intervals follow."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the metrics."""
        return bootstrap_interval(self.result)

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return chance_recalls(self.image_of_text, self.texts, num_images=len(self.image_embeddings))


class HarmaTask:
    """Image-text retrieval with HarMA."""

    objective = "r_mean"
    other_objectives = ()
    metric_names = RetrievalResult.METRICS

    def __init__(self, config: HarmaConfig, base: Callable[[], nn.Module] | None = None):
        """Takes the settings, and what gives the backbone (None: it is built); nothing is loaded yet."""
        self.config = config
        self._base = base

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for weights that do not belong to the architecture, missing labels, missing captions."""
        model = self.config.model
        check_pretrained(model.architecture, model.pretrained or RANDOM, model.activation)
        for split in (training, *evaluated):
            split.require_kind(["images"], f"recipe {self.config.recipe}")
        for split in evaluated:
            _require_captions(split.read(["captions"]).column("captions").to_pylist(), split.path)
        if self.config.loss.center_factor and training.read(["label"]).column("label").null_count:
            raise UserError(
                f"`loss.center_factor` needs a class label for every image, but {training.path} has images without; "
                "convert it with labels, or set loss.center_factor=0"
            )
        self.require_backbone()

    def require_backbone(self) -> None:
        """Raises UserError if a part of the model stays frozen whose weights nobody named."""
        if self.config.model.tuning != "full":
            require_named(self.config.recipe, self.config.model.pretrained)

    @property
    def base_name(self) -> str:
        """The backbone's architecture and weights."""
        settings = self.config.model
        drawn = f" of seed {self.config.seed}" if settings.pretrained in ("", RANDOM) else ""
        return f"{settings.architecture}, {settings.pretrained or RANDOM}{drawn}"

    def build_base(self) -> nn.Module:
        """Returns the backbone on CPU."""
        settings = self.config.model
        return build_clip(
            settings.architecture, settings.pretrained or RANDOM, seed=self.config.seed, activation=settings.activation
        )

    def outline_base(self) -> nn.Module:
        """Returns the backbone without its weights, to count its parameters."""
        return outline_clip(self.config.model.architecture)

    def build_model(self) -> DualEncoder:
        """Returns the dual encoder on CPU, tuned as configured; a loss that is off leaves its temperature frozen."""
        settings, loss = self.config.model, self.config.loss
        base = self.build_base() if self._base is None else self._base()
        if settings.tuning == "full" and self._base is not None:
            base = copy.deepcopy(base)  # what was given may be read-only
        model = DualEncoder(
            base,
            temperature=settings.temperature,
            affiliation_temperature=settings.temperature if loss.center_factor else None,
            text_tokens=settings.text_tokens,
        )
        adapter = self.config.adapter
        options: dict[str, Any] = {}
        if settings.tuning == "adapters":
            options = {
                "width": adapter.width,
                "num_heads": adapter.num_heads,
                "shared_width": adapter.shared_width,
                "share_across_modalities": adapter.share_across_modalities,
                "gate_init": adapter.gate_init,
                "seed": self.config.seed,
            }
        set_tuning(model, settings.tuning, **options)
        if not loss.contrastive:
            model.temperature.requires_grad_(False)
        if settings.activation_checkpointing:
            model.set_grad_checkpointing()
        return model

    def build_untrained(self) -> DualEncoder:
        """Returns the dual encoder on CPU; new adapters change nothing."""
        return self.build_model()

    def queries(self, model: nn.Module) -> Sequence[str]:
        """Returns nothing: a query is an image or a caption."""
        return ()

    def transform(self, *, training: bool) -> RowTransform:
        """Returns the published training transform, or the plain resize."""
        architecture = self.config.model.architecture
        size, max_pixels = image_size(architecture), self.config.data.max_pixels
        if training:
            return PairTransform(architecture, size, max_pixels, self.config.augmentation)
        return ImageTransform(size, max_pixels)

    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the terms over the global batch."""
        loss = self.config.loss
        outputs = model(batch["image"], batch["text"])
        image, text = gather_with_gradient(outputs["image"]), gather_with_gradient(outputs["text"])
        ids = gather_with_gradient(batch["image_id"])
        terms = {}
        if loss.contrastive:
            terms["contrastive"] = contrastive_loss(image, text, outputs["temperature"], ids)
        negatives = {"image_ids": ids, "same_image_negatives": loss.same_image_negatives}
        if loss.triplet == "weighted":
            terms["triplet"] = weighted_triplet_loss(image, text, margin=loss.margin, gamma=loss.gamma, **negatives)
        elif loss.triplet != "none":
            hardest = loss.triplet == "hardest"
            terms["triplet"] = triplet_loss(image, text, margin=loss.margin, hardest_only=hardest, **negatives)
        if loss.center_factor:
            image_means = gather_with_gradient(class_means(outputs["image"], batch["label"]))
            text_means = gather_with_gradient(class_means(outputs["text"], batch["label"]))
            affiliation = affiliation_loss(image, text, image_means, text_means, outputs["affiliation_temperature"])
            terms["affiliation"] = loss.center_factor * affiliation
        return terms

    def losses_at_equal_scores(self) -> dict[str, float]:
        """Returns the terms while all scores are equal; the triplet term only where every other row is a negative."""
        loss, rows = self.config.loss, self.config.train.global_batch_size
        terms = {}
        if loss.contrastive:
            terms["contrastive"] = math.log(rows)
        if loss.same_image_negatives and loss.triplet != "none":
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
        advice = [f"a lower optim.learning_rate, such as {rate / 4:.1g} (now {rate:g})"]
        if config.optim.warmup_fraction < 0.3:
            advice.append(f"a longer warm-up, optim.warmup_fraction=0.3 (now {config.optim.warmup_fraction:g})")
        if model.pretrained == "random" and model.tuning == "adapters":
            advice.append("a pretrained backbone, model.pretrained=FILE: adapters in a random one have little to adapt")
        if config.loss.contrastive and config.loss.triplet in ("weighted", "plain"):
            advice.append(
                f"loss.triplet=none: the triplet term is a sum over {rows} x {rows - 1} pairs and outweighs the "
                "contrastive one, and while a model hardly ranks, equal scores lower it"
            )
        if model.temperature < 0.01 or model.temperature > 0.2:
            advice.append(f"model.temperature=0.07 (now {model.temperature:g})")
        return advice

    def evaluate(self, model: nn.Module, data: EvaluationData) -> Evaluation:
        """Returns the recalls of the split, index-based and duplicate-aware (``*_text``), in percent."""
        assert isinstance(model, DualEncoder)
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
        text_embeddings = encode_texts(model, self.config.model.architecture, texts, batch_size)
        details, metrics = None, {}
        if rank() == 0:
            counts = torch.tensor([len(row) for row in captions])
            image_of_text = torch.repeat_interleave(torch.arange(len(captions)), counts)
            result = image_text_recalls(image_embeddings, text_embeddings, image_of_text, texts)
            details = ImageTextDetails(image_embeddings, text_embeddings, texts, image_of_text, result)
            metrics = result.metrics
        return Evaluation(broadcast_object(metrics), details)

    def picture(self, evaluation: Evaluation, split: Split) -> Image.Image | None:
        """Draws some queries with their first results."""
        return retrieval_sheet(evaluation.details, split)

    def sections(self, evaluation: Evaluation, split: Split) -> list[Section]:
        """Returns some queries, the failures and a map of the embeddings."""
        return image_text_sections(evaluation.details, split)

    def projection(self, evaluation: Evaluation, split: Split) -> Projection | None:
        """Returns up to 500 image embeddings, labelled by class (or by first caption), with thumbnails."""
        vectors = evaluation.details.image_embeddings[:500]
        columns = split.read(["label_name", "captions"]).slice(0, len(vectors)).to_pylist()
        labels = [(row["label_name"] or row["captions"][0]).replace("\t", " ") for row in columns]
        images = read_images(split, np.arange(len(vectors)), longest_side=64)
        thumbnails = torch.stack([eval_transform(image, 32) for image in images]) / 255
        return Projection(vectors, labels, thumbnails)

    def monitor(self, model: nn.Module) -> dict[str, float]:
        """Returns the temperature and, for every adapter, the shares (sigmoid of the gates) it lets through."""
        assert isinstance(model, DualEncoder)
        values = {"temperature": float(model.temperature.detach())}
        for name, module in model.clip.named_modules():
            if isinstance(module, GatedAdapter):
                tower = "image" if name.startswith("visual") else "text"
                block = name.split(".resblocks.")[1].split(".")[0]
                values[f"gate/{tower}/{block}/block"] = float(module.gate.detach().sigmoid())
                values[f"gate/{tower}/{block}/adapter"] = float(module.bottleneck.gate.detach().sigmoid())
        return values


@dataclass(frozen=True)
class PairTransform:
    """An augmented image and one of its captions."""

    architecture: str
    size: int
    max_pixels: int
    augmentation: Augmentation

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenize(self.architecture)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns ``image`` uint8[3, S, S], ``text`` int64[L], ``image_id`` and ``label`` (-1: none)."""
        image = decode_stored(row["image"], max_pixels=self.max_pixels)
        return {
            "image": train_transform(image, rng, self.size, self.augmentation),
            "text": self._tokenizer([row["captions"][row["caption"]]])[0],
            "image_id": np.int64(row["image_id"]),
            "label": np.int64(-1 if row["label"] is None else row["label"]),
        }


@dataclass(frozen=True)
class ImageTransform:
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
