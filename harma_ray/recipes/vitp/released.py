"""InternVL's files, in and out: whole models in Hugging Face folders, and vision transformers, alone or in a folder.

What is imported is read where it lies: nothing of it is copied into the run, whose checkpoint holds no weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.files import kept_path
from harma_ray.formats import Carried, ForeignFormat, Reading
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.foreign import ForeignWeights
from harma_ray.models.internvl.files import TRANSLATED, Extraction, Layout, read_outline, write_internvl, write_vision
from harma_ray.models.internvl.keys import VISION_MARKS, is_original, vision_part
from harma_ray.models.internvl.layouts import check_tensors, is_internvl, read_vision_config, vision_facts
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.vision import IMAGENET_MEAN, IMAGENET_STD, VisionVectors
from harma_ray.models.towers import Preparation, Tower, image_tower
from harma_ray.recipes.vitp.config import VitpConfig
from harma_ray.recipes.vitp.talks import backbone_of
from harma_ray.recipes.vitp.task import VitpTask
from harma_ray.settings import build_config
from harma_ray.shell import launch_command
from harma_ray.task import StoredRun

_FOLDER = "model"
"""Of a whole model in the folder of a run."""
_PARTS = ("vision", "projector", "language_model", "output_head")


class InternVLFile(ForeignFormat):
    """An InternVL, or its vision transformer: the transformer alone may be a file, all else is a folder."""

    settings, marks = VitpConfig, VISION_MARKS
    tags = ("image-text-to-text", "internvl", "vitp", "remote-sensing")

    def claim(self, weights: ForeignWeights) -> ForeignWeights | None:
        """Returns a vision transformer as it is."""
        return weights if weights.mark in self.marks else None

    def claim_folder(self, folder: Path) -> ForeignWeights | None:
        """Returns what is in a folder whose configuration is of an InternVL or an InternViT, and fits it."""
        if not is_internvl(folder):
            return None
        tensors = read_outline(folder)
        check_tensors(read_vision_config(folder), vision_part(tensors)[0], str(folder))
        return ForeignWeights(folder, tensors, container_notes=(TRANSLATED,) if is_original(tensors) else ())

    def describe(self, weights: ForeignWeights) -> str:
        """Says what it is, and the vision transformer's sizes."""
        facts = vision_facts(vision_part(weights.tensors)[0], str(weights.path))
        side, patch = facts["image_size"][0], facts["patch_size"][0]
        kinds = f"{facts['norm_type']}, {'' if facts['attention_bias'] else 'no '}bias of queries, keys and values, "
        kinds += f"{'' if facts['use_qk_norm'] else 'no '}q/k norm"
        sizes = f"{facts['num_hidden_layers']} layers of width {facts['hidden_size']}, images of {side} px in patches"
        whole = "a whole model with " if _is_whole(weights.tensors) else ""
        return f"{_kind(weights)} {weights.path}: {whole}a vision transformer of {sizes} of {patch} px; {kinds}"

    def load(self, weights: ForeignWeights, config: RunConfig) -> VisualInstructionModel:
        """Builds the whole model; of a vision transformer if the settings name the rest."""
        config = _settings(weights, config)
        if config.model.knows_no_answers:
            words = ("--recipe", config.recipe, "--out", "FOLDER")
            way_out = launch_command("checkpoint", "import", weights.path, *words)
            raise UserError(
                f"{weights.path} is a vision transformer without the rest of a model; name that with --set "
                f"model.pretrained=FOLDER, or encode images with it: {way_out}"
            )
        return VitpTask(config).new_model()

    def read(self, weights: ForeignWeights, config: RunConfig, kept: Path, clip: StoredRun | str | None) -> Reading:
        """Builds the model that a folder holds, or around a vision transformer; nothing of it is kept."""
        config = _settings(weights, config)
        task = VitpTask(config)
        task.backbone.check()
        model = task.new_model()
        fingerprint = task.backbone.fingerprint(model)
        lines = [*weights.notes, self.describe(weights)]
        lines.append(
            f"fingerprint of the model {fingerprint[:12]}; {weights.path} is read where it lies: keep it there"
        )
        if config.model.knows_no_answers:
            lines.append("the rest of the model is drawn: it encodes images, and answers nothing")
        use = ("embed", "--data", "IMAGES", "--out", "VECTORS") if config.model.knows_no_answers else Reading.use
        return Reading(model, config, fingerprint, "\n".join(lines), keeps_clip=False, use=use)

    def preparation(self, model: VisualInstructionModel, run: StoredRun) -> Preparation:
        """Returns that of images whose vectors are wanted: squashed to a square."""
        assert isinstance(run.config, VitpConfig)
        side = model.vision_tower.config.image_size[0]
        return Preparation(side, IMAGENET_MEAN, IMAGENET_STD, run.config.features.interpolation)

    def towers(self, model: VisualInstructionModel, run: StoredRun) -> list[Tower]:
        """Returns the vision transformer with its pooling."""
        assert isinstance(run.config, VitpConfig)
        how = run.config.features
        tower = image_tower(VisionVectors(model.vision_tower, how.layer, how.pooling), self.preparation(model, run))
        return [replace(tower, facts={**tower.facts, "layer": how.layer, "pooling": how.pooling})]

    def write(self, model: VisualInstructionModel, run: StoredRun, epoch: float, path: Path) -> None:
        """Writes the whole model as a folder in the layout of InternVL's own code, with its tokenizer, in fp32."""
        assert isinstance(run.config, VitpConfig)
        write_internvl(model.core, path)
        backbone_of(run.config).tokenizer().save_pretrained(path)

    def carry(self, model: VisualInstructionModel, folder: Path, run: StoredRun) -> Carried:
        """Writes the whole model as trained, as `write` does: nothing else is needed."""
        self.write(model, run, 0, folder / _FOLDER)
        frozen = {f"model.freeze_{part}": True for part in _PARTS}
        fingerprint = backbone_fingerprint(model.core)
        text = f"{_FOLDER}/ holds the whole trained model in InternVL's own layout (fingerprint {fingerprint[:12]})."
        changes = {**frozen, "model.pretrained": f"./{_FOLDER}", "model.vision": ""}
        return Carried(changes, fingerprint, text, is_trained_further=False)

    def write_vision(
        self, model: VisualInstructionModel, folder: Path, layout: Layout, dtype: torch.dtype
    ) -> Extraction:
        """Writes the vision transformer alone."""
        return write_vision(model.core, folder, layout, dtype)


def _settings(weights: ForeignWeights, config: RunConfig) -> VitpConfig:
    """Returns settings by which the model is what a file or a folder holds, nothing of which is to be trained."""
    if not isinstance(config, VitpConfig):
        raise UserError(
            f"{weights.path} is an {_kind(weights)}; give a recipe of ViTP, such as vitp-internvl-1b, got "
            f"{config.recipe}"
        )
    path = str(kept_path(weights.path, "the model"))
    frozen = {f"model.freeze_{part}": True for part in _PARTS}
    changes = {"model.pretrained": path} if _is_whole(weights.tensors) else {"model.vision": path}
    return build_config(config, {**frozen, **changes}, origin=path)


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Tells whether tensors are of more than a vision transformer."""
    return bool(vision_part(tensors)[1])


def _kind(weights: ForeignWeights) -> str:
    return "InternVL" if _is_whole(weights.tensors) else "InternViT"
