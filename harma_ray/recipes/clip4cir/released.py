"""CLIP4Cir's released files, in and out: a fine-tuned CLIP under ``CLIP``, a Combiner under ``Combiner``.

A CLIP comes in as a backbone, like any other (`harma_ray.import_export`); a Combiner is read here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.formats import ForeignFormat, Reading
from harma_ray.models.architectures import (
    activation_twin,
    computes_quick_gelu,
    image_size,
    pixel_statistics,
    tokenizer_of,
)
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.foreign import ForeignWeights, read_foreign
from harma_ray.models.openclip import open_clip
from harma_ray.models.towers import EXAMPLES, Preparation, Tower, clip_towers
from harma_ray.models.weights import check_fit
from harma_ray.recipes.clip4cir.config import Clip4CirConfig, CombinerConfig
from harma_ray.recipes.clip4cir.task import Clip4CirTask
from harma_ray.settings import build_config
from harma_ray.shell import launch_command
from harma_ray.task import StoredRun

_TEXTS = "as they are; of two captions of a query, `First and second` (harma_ray.data.relative_captions)"
_TRAINED_ON = "trained_on"
"""Where a Combiner's file names the CLIP that it was trained on, by its fingerprint; those of the paper name none."""


class Clip4CirFile(ForeignFormat):
    """A Combiner, which is one with the CLIP that it was trained on; written, a fine-tuned CLIP as well."""

    settings, marks, part = Clip4CirConfig, ("combiner_layer.weight",), "a Combiner"
    tags = ("composed-image-retrieval", "clip", "clip4cir", "remote-sensing")

    def claim(self, weights: ForeignWeights) -> ForeignWeights | None:
        """Returns a Combiner as it is."""
        return weights if weights.mark in self.marks else None

    def describe(self, weights: ForeignWeights) -> str:
        """Says its sizes."""
        return f"released CLIP4Cir Combiner {weights.path}: {_sizes(weights)}"

    def load(self, weights: ForeignWeights, config: RunConfig) -> ComposedRetriever:
        """Raises UserError: it has no CLIP."""
        words = ("--recipe", "clip4cir-combiner", "--clip", "FILE", "--out", "FOLDER")
        way_out = f"import both first: {launch_command('checkpoint', 'import', weights.path, *words)}"
        raise UserError(f"{weights.path} is a Combiner without its CLIP; {way_out}")

    def read(self, weights: ForeignWeights, config: RunConfig, kept: Path, clip: StoredRun | str | None) -> Reading:
        """Builds the Combiner on the CLIP that is given; that of a tag is not kept, the tag is."""
        path, state = weights.path, weights.tensors
        if not isinstance(config, CombinerConfig):
            raise UserError(f"{path} is a CLIP4Cir Combiner; import it with --recipe clip4cir-combiner")
        if clip is None:
            raise UserError(
                f"{path} is a Combiner without its CLIP, and another CLIP's features mean nothing to it: give the one "
                "that it was trained on with --clip FILE (published beside it: cirr_clip_RN50x4_fullft.pt, "
                "fiq_clip_RN50x4_fullft.pt), --clip RUN (a first stage), or --clip openai if that CLIP was not "
                "fine-tuned"
            )
        config, source = _paired(config, clip)
        layers = {"combiner.projection_dim": "text_projection_layer.bias", "combiner.hidden_dim": "combiner_layer.bias"}
        sizes = {name: len(state[layer]) for name, layer in layers.items() if layer in state and state[layer].ndim}
        config = build_config(config, sizes, origin=str(path))
        task, architecture = Clip4CirTask(config), config.model.architecture
        model = task.new_model()
        fingerprint, named = task.backbone.fingerprint(model), str(weights.entries.get(_TRAINED_ON, ""))
        _load_combiner(model, weights, named, fingerprint, source, architecture)
        is_kept = not open_clip.is_pretrained_cfg(architecture, config.model.pretrained) or bool(config.model.tuned)
        if is_kept:
            config = build_config(config, {"model.pretrained": str(kept), "model.tuned": "", "model.tuned_seed": 0})
        proof = "as the file says" if named else "the file does not say which CLIP it was trained on; their widths fit"
        text = f"{_sizes(weights)}\npaired with {source} (`{architecture}`, fingerprint {fingerprint[:12]}): {proof}"
        return Reading(model, config, fingerprint, text, is_kept, is_kept and _knows_activation(clip))

    def preparation(self, model: ComposedRetriever, run: StoredRun) -> Preparation:
        """Returns the gallery's: padded as configured, resized, its centre cut out."""
        assert isinstance(run.config, Clip4CirConfig)
        how = run.config.preparation
        words = {
            "none": "",
            "square": "the shorter side is padded with black to a square",
            "target": f"the shorter side is padded with black until the sides' ratio is {how.target_ratio:g}",
        }
        return Preparation(
            image_size(model), *pixel_statistics(model), resize_mode="shortest", first=words[how.padding]
        )

    def towers(self, model: ComposedRetriever, run: StoredRun) -> list[Tower]:
        """Returns both towers, with the features that queries are made of, and the Combiner if there is one."""
        assert isinstance(run.config, Clip4CirConfig)
        tokenizer, prepared = tokenizer_of(run.config.model.architecture), self.preparation(model, run)
        image, text = clip_towers(model.encoder, tokenizer, prepared, _TEXTS, with_features=True)
        if model.combiner is None:
            said = {**text.facts, "query": "the sum of the features of image and text, divided by its norm"}
            return [image, replace(text, facts=said)]
        draw, width = torch.Generator().manual_seed(0), model.encoder.embedding_width
        inputs = {name: torch.randn(EXAMPLES, width, generator=draw) for name in ("image_features", "text_features")}
        return [image, text, Tower("combiner", model.combiner.eval(), inputs, ("query",))]

    def write(self, model: ComposedRetriever, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes the ``.pt``: a CLIP, or the Combiner."""
        assert isinstance(run.config, Clip4CirConfig)
        architecture = run.config.model.architecture
        if model.combiner is None and activation_twin(architecture) and not computes_quick_gelu(architecture):
            raise UserError(
                f"CLIP4Cir's own program takes every CLIP for one with quick GELU, but `{architecture}` computes plain "
                "GELU; export it as `open_clip`"
            )
        name, module = ("CLIP", model.clip) if model.combiner is None else ("Combiner", model.combiner)
        content: dict[str, Any] = {"epoch": epoch, name: {k: value.clone() for k, value in module.state_dict().items()}}
        if model.combiner is not None:
            content[_TRAINED_ON] = backbone_fingerprint(model)
        torch.save(content, path)


def _paired(config: CombinerConfig, clip: StoredRun | str) -> tuple[CombinerConfig, str]:
    """Returns the settings with a CLIP, and what it is in words."""
    if not isinstance(clip, str):
        return build_config(config, config.after(clip), origin="--clip"), f"run {clip.path}"
    file = Path(clip).expanduser()
    is_file = file.is_file()
    changes = {"model.pretrained": str(file.absolute()) if is_file else clip, "model.tuned": ""}
    return build_config(config, changes, origin="--clip"), f"{file if is_file else clip}"


def _knows_activation(clip: StoredRun | str) -> bool:
    """Tells whether it is known which activation a CLIP was trained with; of a file, if it says so."""
    file = Path(clip).expanduser() if isinstance(clip, str) else None
    return not (file and file.is_file()) or read_foreign(file, data=False).quick_gelu is not None


def _load_combiner(
    model: ComposedRetriever, weights: ForeignWeights, named: str, fingerprint: str, source: str, architecture: str
) -> None:
    """Loads a Combiner's weights; UserError if they, or the CLIP that the file names, do not fit the model's CLIP."""
    path, state = weights.path, weights.tensors
    taken, given = len(state.get("output_layer.bias", ())), model.encoder.embedding_width
    if taken and taken != given:
        raise UserError(
            f"{path} combines features of width {taken}, but {source} (`{architecture}`) gives {given}; give the CLIP "
            "that it was trained on, and its name with --set model.architecture=NAME"
        )
    if named and named != fingerprint:
        raise UserError(
            f"{path} was trained on a CLIP with fingerprint {named[:12]}, but {source} has {fingerprint[:12]}; give "
            "the one that it was trained on"
        )
    assert model.combiner is not None
    check_fit(model.combiner.state_dict(), state, f"{path} (for `{architecture}`)")
    model.combiner.load_state_dict(dict(state))


def _sizes(weights: ForeignWeights) -> str:
    """Returns the sizes of a Combiner."""
    state = weights.tensors
    features = state["output_layer.bias"].shape[0] if "output_layer.bias" in state else 0
    projection, hidden = (len(state.get(f"{name}.bias", ())) for name in ("text_projection_layer", "combiner_layer"))
    return f"Combiner of {features} features, projection {projection}, hidden {hidden}"
