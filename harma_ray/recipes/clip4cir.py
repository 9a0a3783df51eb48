"""CLIP4Cir: composed image retrieval with CLIP (Baldrati et al., CVPR Workshops 2022; ACM TOMM 2023).

A query is a reference image and a text that changes it; the answer is a target image. Stage 1 fine-tunes CLIP so that
the sum of both features finds it; stage 2 trains a Combiner of the features of the frozen CLIP.

Shape letters: Q queries, G gallery, F features of CLIP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harma_ray.checkpoint import load_weights, read_meta
from harma_ray.composed_metrics import ComposedResult
from harma_ray.composed_pictures import composed_sections, composed_sheet
from harma_ray.data.padding import padded_transform
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.relative_captions import evaluation_text, training_texts
from harma_ray.data.schema import Split
from harma_ray.distributed import broadcast_object, gather_rows, gather_with_gradient, rank
from harma_ray.encoding import encode_texts
from harma_ray.errors import UserError
from harma_ray.losses import composed_loss
from harma_ray.models.backbones import RANDOM, check_pretrained, require_named
from harma_ray.models.clip import DualEncoder, build_clip, image_size, outline_clip, unit
from harma_ray.models.combiner import Combiner
from harma_ray.models.composed import ComposedRetriever, Encoders
from harma_ray.models.weights import backbone_fingerprint
from harma_ray.pictures import read_images
from harma_ray.recipes.clip4cir_config import Clip4CirConfig, CombinerConfig, Criterion, FinetuneConfig, TunedClipConfig
from harma_ray.recipes.clip4cir_inputs import Inputs, ItemTransform, TripletTransform
from harma_ray.recipes.clip4cir_queries import BASELINE_METRICS, QUERIES, ComposedDetails, compose
from harma_ray.task import Batch, Evaluation, EvaluationData, FeatureEncoder, Projection, RowTransform, Section

_MAX_POINTS = 500


class Clip4CirTask:
    """Composed retrieval with CLIP4Cir, either stage."""

    metric_names: Sequence[str] = get_args(Criterion)

    def __init__(self, config: Clip4CirConfig, base: Callable[[], nn.Module] | None = None):
        """Takes the settings, and what gives the backbone (None: it is built); nothing is loaded yet."""
        self.config = config
        self.objective = config.selection.criterion
        self.other_objectives = config.selection.also_keep
        self._base = base
        self._trusted: set[Path] = set()
        self._frozen_gallery: dict[Path, Tensor] = {}
        self._frozen_baselines: dict[Path, dict[str, Evaluation]] = {}

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for weights that do not fit, splits of another kind, metrics that they have not."""
        model = self.config.model
        check_pretrained(model.architecture, model.pretrained or RANDOM, model.activation)
        if self._tuned:
            read_meta(self._tuned)
        training.require_kind(["triplets", "triplet vectors"], f"recipe {self.config.recipe}")
        if isinstance(self.config, FinetuneConfig):
            training.require_kind(["triplets"], "fine-tuning")
        for split in evaluated:
            ComposedQueries.of(split).require_targets()
        members = training.read(["members"]).column("members").combine_chunks().value_lengths().to_numpy()
        known = _names_of_protocol(bool(members.any()))
        wanted = [("selection", name) for name in (self.objective, *self.other_objectives)]
        for asker, name in (*wanted, *(("objective", name) for name in metrics)):
            if name not in known:
                raise UserError(
                    f"`{asker}` names `{name}`, which is not measured on {training.path} (there are {', '.join(known)})"
                )
        self.require_backbone()

    def require_backbone(self) -> None:
        """Raises UserError if a part of CLIP stays frozen whose weights nobody named."""
        whole = isinstance(self.config, FinetuneConfig) and self.config.tuning.encoder == "both"
        if not whole and not self._tuned:
            require_named(self.config.recipe, self.config.model.pretrained, "--from RUN, or ")

    @property
    def _tuned(self) -> Path | None:
        """The checkpoint whose weights take the place of the pretrained ones."""
        model = self.config.model
        return Path(model.tuned) if isinstance(model, TunedClipConfig) and model.tuned else None

    @property
    def _base_seed(self) -> int:
        model = self.config.model
        return model.tuned_seed if isinstance(model, TunedClipConfig) and model.tuned else self.config.seed

    @property
    def base_name(self) -> str:
        """The backbone's architecture and weights."""
        settings = self.config.model
        drawn = f" of seed {self._base_seed}" if settings.pretrained in ("", RANDOM) else ""
        tuned = f", tuned by {self._tuned}" if self._tuned else ""
        return f"{settings.architecture}, {settings.pretrained or RANDOM}{drawn}{tuned}"

    def build_base(self) -> nn.Module:
        """Returns CLIP on CPU, with the weights of the fine-tuning run if the settings name one."""
        settings = self.config.model
        clip = build_clip(
            settings.architecture, settings.pretrained or RANDOM, seed=self._base_seed, activation=settings.activation
        )
        if self._tuned:
            model = ComposedRetriever(DualEncoder(clip))
            names = read_meta(self._tuned).trainable
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
            load_weights(self._tuned, model, backbone=backbone_fingerprint(model))
        return clip.requires_grad_(True)

    def outline_base(self) -> nn.Module:
        """Returns the backbone without its weights, to count its parameters."""
        return outline_clip(self.config.model.architecture)

    def build_model(self) -> ComposedRetriever:
        """Returns the model on CPU: CLIP with one or both encoders to train, or frozen under a new Combiner."""
        base = self.build_base() if self._base is None else self._base()
        combiner: Combiner | None = None
        trained: Encoders = "none"
        if isinstance(self.config, FinetuneConfig):
            trained = self.config.tuning.encoder
            base = base if self._base is None else copy.deepcopy(base)  # what was given may be read-only
        encoder = DualEncoder(base, text_tokens="trim")
        if isinstance(self.config, CombinerConfig):
            sizes = self.config.combiner
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.config.seed)
                combiner = Combiner(encoder.embedding_width, sizes.projection_dim, sizes.hidden_dim, sizes.dropout)
        return ComposedRetriever(encoder, combiner, trained=trained, chunk_size=self.config.train.eval_batch_size)

    def build_untrained(self) -> ComposedRetriever:
        """Returns CLIP on CPU, whose outputs are added: a Combiner that nobody trained is random."""
        model = self.build_model()
        model.combiner = None
        return model

    def queries(self, model: nn.Module) -> Sequence[str]:
        """Returns the names among `QUERIES` that a model can make: all, or without a Combiner all others."""
        assert isinstance(model, ComposedRetriever)
        return [name for name in QUERIES if name != "combiner" or model.combiner is not None]

    def transform(self, *, training: bool) -> RowTransform:
        """Returns the transform of triplets, or of the gallery; the same padding and crop in both."""
        inputs = self._inputs
        return TripletTransform(inputs, self.config.preparation.random_captions) if training else ItemTransform(inputs)

    @property
    def _inputs(self) -> Inputs:
        preparation, architecture = self.config.preparation, self.config.model.architecture
        return Inputs(
            architecture, image_size(architecture), self.config.data.max_pixels, preparation.padding,
            preparation.target_ratio,
        )  # fmt: skip

    def losses(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy of the global batch's queries over its targets."""
        outputs = model(batch["reference"], batch["text"], batch["target"])
        query, target = gather_with_gradient(outputs["query"]), gather_with_gradient(outputs["target"])
        return {"contrastive": composed_loss(query, target)}

    def losses_at_equal_scores(self) -> dict[str, float]:
        """Returns the cross-entropy while all scores are equal."""
        return {"contrastive": math.log(self.config.train.global_batch_size)}

    def advice(self) -> list[str]:
        """Returns what to try: a lower rate first, since the loss's fixed scale of 100 makes steep gradients."""
        config, rate = self.config, self.config.optim.learning_rate
        advice = [f"a lower optim.learning_rate, such as {rate / 4:.1g} (now {rate:g})"]
        if config.optim.warmup_fraction < 0.1:
            advice.append(f"a warm-up, optim.warmup_fraction=0.1 (now {config.optim.warmup_fraction:g})")
        if config.model.pretrained == "random" and not self._tuned:
            advice.append("pretrained weights, model.pretrained=FILE: nothing but this training knows the images yet")
        elif isinstance(config, CombinerConfig) and not self._tuned:
            advice.append("a fine-tuned CLIP (--from RUN): the Combiner starts from its features")
        return advice

    def evaluate(self, model: nn.Module, data: EvaluationData) -> Evaluation:
        """Returns the recalls of the split's protocol, in percent, and `r_mean` of the baselines among `QUERIES`."""
        assert isinstance(model, ComposedRetriever)
        queries = ComposedQueries.of(data.split)
        queries.require_targets()
        features, texts = self.encode(model, data, queries)
        own, *baselines = self.queries(model)
        details, others, metrics = None, {}, {}
        if rank() == 0:
            gallery = unit(features)

            def measure(query: str) -> Evaluation:
                vectors = compose(model, features, texts, queries, query, batch_size=self.config.train.eval_batch_size)
                found = ComposedDetails.of(gallery, vectors, queries)
                return Evaluation(found.result.metrics, found, query, f"queries: {QUERIES[query]}")

            others = self._frozen_baselines.get(data.split.path)
            if others is None:
                others = {query: measure(query) for query in baselines}
                if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
                    self._frozen_baselines[data.split.path] = others
            evaluation = measure(own)
            details, metrics = evaluation.details, dict(evaluation.metrics)
            for query, other in others.items():
                metrics[BASELINE_METRICS[query]] = other.metrics["r_mean"]
        return Evaluation(broadcast_object(metrics), details, own, f"queries: {QUERIES[own]}", others)

    def encode(self, model: ComposedRetriever, data: EvaluationData, queries: ComposedQueries) -> tuple[Tensor, Tensor]:
        """Encodes a gallery and the texts of its queries, the work shared by all workers.

        Returns:
            Features fp32[G, F] and fp32[Q, F] on CPU, not normalised, the same on every worker.
        """
        self._require_same_encoders(model, data.split)
        batch_size, path = self.config.train.eval_batch_size, data.split.path
        gallery = self._frozen_gallery.get(path)
        if gallery is None:
            own = [
                model.image_features(batch["image"]).float()
                for batch in data.batches(self.transform(training=False), batch_size=batch_size)
            ]
            empty = torch.empty(0, model.encoder.embedding_width, device=model.device)
            gallery = gather_rows(torch.cat(own) if own else empty).cpu()
            if not any(parameter.requires_grad for parameter in model.image_parameters()):
                self._frozen_gallery[path] = gallery
        if queries.text_vectors is not None:
            return gallery, queries.text_vectors
        texts = [evaluation_text(captions) for captions in queries.captions]
        return gallery, encode_texts(
            model.encoder, self.config.model.architecture, texts, batch_size, normalize=False
        )  # fmt: skip

    def _require_same_encoders(self, model: ComposedRetriever, split: Split) -> None:
        """Raises UserError if a split's vectors are not what the model's encoders give."""
        if split.manifest.kind != "image vectors" or split.path in self._trusted:
            return
        ours, theirs = self._identity(model), split.manifest.options.get("encoder", {})
        wrong = [name for name in ours if ours[name] != theirs.get(name)]
        if wrong:
            raise UserError(
                f"the features in {split.path} come from other encoders or settings than the model's "
                f"({', '.join(wrong)} differ); compute them anew, or give the data set itself"
            )
        self._trusted.add(split.path)

    def _identity(self, model: ComposedRetriever) -> dict[str, Any]:
        preparation = self.config.preparation
        return {
            "backbone": backbone_fingerprint(model),
            "padding": preparation.padding,
            "target_ratio": preparation.target_ratio if preparation.padding == "target" else 0,
            "random_captions": preparation.random_captions,
        }

    @property
    def caches_features(self) -> bool:
        """Whether the encoders are frozen and their outputs wanted once."""
        return isinstance(self.config, CombinerConfig) and self.config.features.cached

    def texts_of(self, captions: Sequence[str], training: bool) -> Sequence[str]:
        """Returns the text of a query in evaluation, or those that training draws from."""
        texts = training_texts(captions)
        return texts if training and self.config.preparation.random_captions else texts[:1]

    def feature_encoder(self, device: str) -> FeatureEncoder:
        """Builds the frozen encoders on a device."""
        base = self.build_base() if self._base is None else self._base()
        model = ComposedRetriever(DualEncoder(base, text_tokens="trim")).to(device)
        inputs = self._inputs

        def encode_images(files: Sequence[bytes], names: Sequence[str]) -> Tensor:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                images = torch.stack(list(pool.map(inputs.named_image, files, names)))
            return model.image_features(images.to(device)).float().cpu()

        def encode_texts(texts: list[str]) -> Tensor:
            return model.text_features(inputs.tokens(texts)).float().cpu()

        return FeatureEncoder(encode_images, encode_texts, self._identity(model))

    def picture(self, evaluation: Evaluation, split: Split) -> Image.Image | None:
        """Draws some queries with their first results; nothing if the images are not there any more."""
        pictured = split.pictured
        return composed_sheet(evaluation.details, pictured) if pictured else None

    def sections(self, evaluation: Evaluation, split: Split) -> list[Section]:
        """Returns some queries and the worst ones."""
        pictured = split.pictured
        return composed_sections(evaluation.details, pictured) if pictured else []

    def projection(self, evaluation: Evaluation, split: Split) -> Projection | None:
        """Returns up to 500 gallery embeddings, labelled by name, with thumbnails if there are images."""
        vectors = evaluation.details.gallery_embeddings[:_MAX_POINTS]
        names = split.read(["source"]).column("source").to_pylist()[: len(vectors)]
        thumbnails, pictured = None, split.pictured
        if pictured:
            images = read_images(pictured, np.arange(len(vectors)), longest_side=64)
            thumbnails = torch.stack([padded_transform(image, 32, padding="square") for image in images]) / 255
        return Projection(vectors, [name.replace("\t", " ") for name in names], thumbnails)

    def monitor(self, model: nn.Module) -> dict[str, float]:
        """Returns nothing: the loss has a fixed scale."""
        return {}


def _names_of_protocol(with_members: bool) -> list[str]:
    """Returns the metrics that a search or the selection can rest on, of CIRR's protocol or of FashionIQ's."""
    one = torch.zeros(1, dtype=torch.int64)
    result = ComposedResult(one, subset_ranks=one) if with_members else ComposedResult(one, categories=["all"])
    return [name for name in result.metrics if name in get_args(Criterion)]
