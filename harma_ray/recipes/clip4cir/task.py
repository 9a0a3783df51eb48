"""CLIP4Cir: composed image retrieval with CLIP (Baldrati et al., CVPR Workshops 2022; ACM TOMM 2023).

A query is a reference image and a text that changes it; the answer is a target image. Stage 1 fine-tunes CLIP so that
the sum of both features finds it; stage 2 trains a Combiner of the features of the frozen CLIP.

Shape letters: Q queries, G gallery, F features of CLIP.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from harma_ray.data.kinds.images import IMAGE_VECTORS, IMAGES
from harma_ray.data.kinds.triplets import TRIPLET_VECTORS, TRIPLETS
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.relative_captions import evaluation_text, training_texts
from harma_ray.data.samples import Batch, RowTransform
from harma_ray.data.splits import Split
from harma_ray.data.stream import EvaluationStream
from harma_ray.distributed import gather_rows, gather_with_gradient, rank
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation
from harma_ray.models.backbones import ClipBackbone
from harma_ray.models.clip import DualEncoder, unit
from harma_ray.models.combiner import Combiner
from harma_ray.models.composed import ComposedRetriever, Encoders
from harma_ray.models.fingerprints import backbone_fingerprint, built_from
from harma_ray.models.losses import composed_loss
from harma_ray.recipes.clip4cir.commands import QUERIES
from harma_ray.recipes.clip4cir.config import Clip4CirConfig, CombinerConfig, Criterion, FinetuneConfig, TunedClipConfig
from harma_ray.recipes.clip4cir.inputs import Inputs, ItemTransform, TripletTransform
from harma_ray.recipes.clip4cir.queries import BASELINE_METRICS, LABELS, compose, composing_encoder
from harma_ray.report.composed import ComposedEvaluation
from harma_ray.retrieval.composed import ComposedResult, ComposedRetrieval
from harma_ray.retrieval.encoding import Encoder, VectorIdentity, clip_encoder, encode_texts
from harma_ray.task import Features, Task
from harma_ray.training.checkpoint import WEIGHTS_NAME, load_weights, read_meta


@dataclass(frozen=True)
class TunedClip(ClipBackbone):
    """A CLIP, with the weights of a fine-tuning run if one is named."""

    tuned: str = ""
    """Folder of a checkpoint whose weights take the place of the pretrained ones; empty: none."""

    @property
    def name(self) -> str:
        """The architecture and the weights."""
        return super().name + (f", tuned by {self.tuned}" if self.tuned else "")

    def build(self) -> nn.Module:
        """Returns open_clip's model, all parameters trainable."""
        clip, folder = super().build(), Path(self.tuned)
        if not self.tuned:
            return clip
        model, base = ComposedRetriever(DualEncoder(clip)), self.fingerprint(clip)
        names = read_meta(folder).trainable
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

        def load() -> nn.Module:
            load_weights(folder, model, backbone=base)
            return clip

        return built_from([folder / WEIGHTS_NAME], load, beneath=base).requires_grad_(True)

    def check(self) -> None:
        """Raises UserError as `check_pretrained` does, or if the checkpoint is none."""
        super().check()
        if self.tuned:
            read_meta(Path(self.tuned))


class Clip4CirTask(Task[Clip4CirConfig, ComposedRetriever]):
    """Composed retrieval with CLIP4Cir, either stage."""

    evaluated_kinds = (IMAGES, IMAGE_VECTORS)
    feature_sections = ("model", "preparation", "features")
    model_settings = ("model", "preparation.padding", "preparation.target_ratio", "tuning", "combiner")

    def __init__(self, config: Clip4CirConfig):
        """Takes the settings; nothing is loaded yet."""
        super().__init__(config)
        model = config.model
        self.metrics = replace(config.metrics, labels=LABELS)
        tuned = model.tuned if isinstance(model, TunedClipConfig) else ""
        seed = model.tuned_seed if isinstance(model, TunedClipConfig) and tuned else config.seed
        self.backbone = TunedClip(model.architecture, model.pretrained, seed, model.activation, tuned)
        self._trusted: set[Path] = set()
        self._frozen_gallery: dict[Path, Tensor] = {}
        self._frozen_baselines: dict[Path, dict[str, ComposedEvaluation]] = {}

    def check(self, training: Split, evaluated: Sequence[Split] = (), metrics: Sequence[str] = ()) -> None:
        """Raises UserError for weights that do not fit, splits of another kind, metrics that they have not."""
        self.backbone.check()
        recipe = f"recipe {self.config.recipe}"
        training.require_kind([TRIPLETS] if self.trains_backbone else [TRIPLETS, TRIPLET_VECTORS], recipe)
        encodes = self.trains_backbone or (self.features is not None and not training.kind.is_encoded)
        for split in evaluated:
            self.check_evaluated(split)
            if encodes:  # vectors would be another model's, or there would be nothing to compute them from
                split.require_kind([IMAGES], f"{recipe}, trained on {training.kind.name},")
            ComposedQueries.of(split).require_targets()
        members = training.read(["members"]).column("members").combine_chunks().value_lengths().to_numpy()
        known = _names_of_protocol(bool(members.any()))
        wanted = [("selection", name) for name in self.metrics.kept]
        for asker, name in (*wanted, *(("objective", name) for name in metrics)):
            if name not in known:
                raise UserError(
                    f"`{asker}` names `{name}`, which is not measured on {training.path} (there are {', '.join(known)})"
                )
        self.config.require_named()

    @property
    def trains_backbone(self) -> bool:
        """Whether an encoder is trained: in the first stage."""
        return isinstance(self.config, FinetuneConfig)

    def build_model(self, backbone: nn.Module) -> ComposedRetriever:
        """Returns CLIP with one or both encoders to train, or frozen under a new Combiner."""
        combiner: Combiner | None = None
        trained: Encoders = "none"
        if isinstance(self.config, FinetuneConfig):
            trained = self.config.tuning.encoder
        encoder = DualEncoder(backbone, text_tokens="trim")
        if isinstance(self.config, CombinerConfig):
            sizes = self.config.combiner
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.config.seed)
                combiner = Combiner(encoder.embedding_width, sizes.projection_dim, sizes.hidden_dim, sizes.dropout)
        return ComposedRetriever(encoder, combiner, trained=trained, chunk_size=self.config.train.eval_batch_size)

    def baseline_model(self) -> ComposedRetriever:
        """Returns CLIP on CPU, whose outputs are added: a Combiner that nobody trained is random."""
        model = self.new_model()
        model.combiner = None
        return model

    def queries(self, model: ComposedRetriever | None = None) -> Sequence[str]:
        """Returns the names among `QUERIES` that a model can make: all, or without a Combiner all others."""
        combines = isinstance(self.config, CombinerConfig) if model is None else model.combiner is not None
        return [name for name in QUERIES if name != "combiner" or combines]

    def encoder(self, model: ComposedRetriever, device: str) -> Encoder:
        """Returns what makes unit vectors of a gallery's images, of texts and of queries, as evaluation does."""
        return composing_encoder(
            model,
            self.backbone.tokenizer(),
            self._inputs.prepare,
            device,
            self.queries(model),
            precision=self.config.train.eval_precision,
            depends_on=self._padding,
        )

    def transform(self, *, training: bool) -> RowTransform:
        """Returns the transform of triplets, or of the gallery; the same padding and crop in both."""
        inputs = self._inputs
        return TripletTransform(inputs, self.config.preparation.random_captions) if training else ItemTransform(inputs)

    @property
    def _inputs(self) -> Inputs:
        preparation, architecture = self.config.preparation, self.config.model.architecture
        return Inputs(
            architecture, self.backbone.image_size, self.config.data.max_pixels, preparation.padding,
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
        tuned = isinstance(config.model, TunedClipConfig) and config.model.tuned
        advice = [f"a lower optim.learning_rate, such as {rate / 4:.1g} (now {rate:g})"]
        if config.optim.warmup_fraction < 0.1:
            advice.append(f"a warm-up, optim.warmup_fraction=0.1 (now {config.optim.warmup_fraction:g})")
        if config.model.pretrained == "random" and not tuned:
            advice.append("pretrained weights, model.pretrained=FILE: nothing but this training knows the images yet")
        elif isinstance(config, CombinerConfig) and not tuned:
            advice.append("a fine-tuned CLIP (--from RUN): the Combiner starts from its features")
        return advice

    def evaluate(self, model: ComposedRetriever, data: EvaluationStream) -> Evaluation:
        """Returns the recalls of the split's protocol, in percent, and `r_mean` of the baselines among `QUERIES`."""
        queries = ComposedQueries.of(data.split)
        queries.require_targets()
        features, texts = self.encode(model, data, queries)
        own, *baselines = self.queries(model)
        found = None
        if rank() == 0:
            gallery = unit(features)

            def measure(query: str) -> ComposedEvaluation:
                references, batch_size = features[queries.reference], self.config.train.eval_batch_size
                vectors = compose(model, references, texts, query, batch_size=batch_size)
                retrieval = ComposedRetrieval.of(gallery, vectors, queries)
                note = f"queries: {QUERIES[query]}"
                return ComposedEvaluation(retrieval.result.metrics, query, note, retrieval=retrieval)

            others = self._frozen_baselines.get(data.split.path)
            if others is None:
                others = {query: measure(query) for query in baselines}
                if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
                    self._frozen_baselines[data.split.path] = others
            found = measure(own)
            of_others = {BASELINE_METRICS[query]: other.metrics["r_mean"] for query, other in others.items()}
            found = replace(found, metrics={**found.metrics, **of_others}, others=others)
        return found or Evaluation({})

    def encode(
        self, model: ComposedRetriever, data: EvaluationStream, queries: ComposedQueries
    ) -> tuple[Tensor, Tensor]:
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
        return gallery, encode_texts(model.encoder, self.backbone.tokenizer(), texts, batch_size, normalize=False)

    def _require_same_encoders(self, model: ComposedRetriever, split: Split) -> None:
        """Raises UserError if a split's vectors are not what the model's encoders give."""
        if not split.kind.is_encoded or split.path in self._trusted:
            return
        wrong = self._identity(model).differing(VectorIdentity(split.manifest.options.get("encoder", {})))
        if wrong:
            raise UserError(
                f"the features in {split.path} come from other encoders or settings than the model's "
                f"({wrong} differ); compute them anew, or give the data set itself"
            )
        self._trusted.add(split.path)

    def _identity(self, model: nn.Module) -> VectorIdentity:
        backbone = backbone_fingerprint(model) if self.trains_backbone else self.backbone.fingerprint(model)
        random_captions = self.config.preparation.random_captions
        return VectorIdentity({"backbone": backbone, **self._padding, "random_captions": random_captions})

    @property
    def _padding(self) -> dict[str, str | float]:
        preparation = self.config.preparation
        target_ratio = preparation.target_ratio if preparation.padding == "target" else 0
        return {"padding": preparation.padding, "target_ratio": target_ratio}

    @property
    def features(self) -> Features | None:
        """What the second stage's frozen encoders give, if it is wanted once."""
        wanted = isinstance(self.config, CombinerConfig) and self.config.features.cached
        return Features(self._load_frozen, self._texts_of) if wanted else None

    def _texts_of(self, captions: Sequence[str], training: bool) -> Sequence[str]:
        """Returns the text of a query in evaluation, or those that training draws from."""
        texts = training_texts(captions)
        return texts if training and self.config.preparation.random_captions else texts[:1]

    def _load_frozen(self, device: str) -> tuple[Encoder, VectorIdentity]:
        """Builds the frozen encoders on a device; their vectors are fp32, as training computes them."""
        model = DualEncoder(self.backbone.build(), text_tokens="trim")
        encoder = clip_encoder(model, self.backbone.tokenizer(), self._inputs.prepare, device, normalize=False)
        return encoder, self._identity(model)


def _names_of_protocol(with_members: bool) -> list[str]:
    """Returns the metrics that a search or the selection can rest on, of CIRR's protocol or of FashionIQ's."""
    one = torch.zeros(1, dtype=torch.int64)
    result = ComposedResult(one, subset_ranks=one) if with_members else ComposedResult(one, categories=["all"])
    return [name for name in result.metrics if name in get_args(Criterion)]
