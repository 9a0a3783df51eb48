"""A CLIP as the folder that plain open_clip opens with ``local-dir:``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from harma_ray.models.architectures import configuration
from harma_ray.models.towers import Preparation
from harma_ray.models.weights import has_quick_gelu, save_clip

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def write_clip_folder(clip: nn.Module, architecture: str, preparation: Preparation, folder: Path) -> None:
    """Writes weights, architecture and how images are prepared.

    Args:
        clip: open_clip's model.
        architecture: Its name.
        preparation: How images are prepared. What open_clip has no word for stands beside its words, and is not done.
        folder: Is made.
    """
    folder.mkdir()
    save_clip(clip, folder / WEIGHTS_NAME)
    settings: dict[str, Any] = configuration(architecture)
    if has_quick_gelu(clip):
        settings["quick_gelu"] = True
    prepared = asdict(preparation)
    before = prepared.pop("first")
    content = {"model_cfg": settings, "preprocess_cfg": {**prepared, "mode": "RGB"}}
    if before:
        content["not_done_by_open_clip"] = before
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=1))
