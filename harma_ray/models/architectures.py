"""open_clip's architectures by name, and this package's own: what they take, and which one some weights are of."""

import difflib
import functools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harma_ray.errors import UserError
from harma_ray.models.hub import read_configuration
from harma_ray.models.names import is_elsewhere
from harma_ray.models.openclip import open_clip

_CONFIGS = Path(__file__).parent / "configs"
_QUICK = "-quickgelu"
_REGISTERED = "from-"
"""What names begin with that repositories and folders have in open_clip's tables."""


def configuration(architecture: str) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture.

    Args:
        architecture: a name of open_clip's or of this package's, or of a repository or folder, see `models.hub`.

    Raises:
        UserError: unknown architecture, one that the dual encoder does not run, or one that cannot be fetched.
    """
    name = clean_name(architecture)
    known = _known()
    found = open_clip.get_model_config(name)
    if found is None:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["ViT-B-32"]
        raise UserError(
            f"the architecture must be one that open_clip knows, hf-hub:ORG/NAME or local-dir:/PATH, got "
            f"{architecture!r}; near: {close}"
        )
    text = found.get("text_cfg", {})
    own_text_tower = "hf_model_name" not in text and not {"multimodal_cfg", "custom_text"} & found.keys()
    if not own_text_tower or text.get("pool_type", "argmax") != "argmax":
        other = text.get("hf_model_name")
        raise UserError(
            f"a dual encoder needs open_clip's `CLIP` with captions pooled at the end-of-text token (`argmax`), but "
            f"`{architecture}` has {f'the text tower {other} of transformers' if other else 'another text tower'}; "
            "choose an architecture such as ViT-B-32"
        )
    return found


def clean_name(architecture: str) -> str:
    """Return an architecture's name as open_clip's tables have it, without the slash of OpenAI's."""
    return _registered(architecture) if is_elsewhere(architecture) else architecture.replace("/", "-")


@functools.cache
def _registered(name: str) -> str:
    """Add the architecture of a repository or folder to open_clip's tables and return its name there."""
    entry = _REGISTERED + name.replace(":", "-").replace("/", "-")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{entry}.json"
        file.write_text(json.dumps(read_configuration(name)["model_cfg"]))
        open_clip.add_model_config(file)
    return entry


def preprocessing(architecture: str) -> dict[str, Any]:
    """Return what a repository or folder says of the pixels that its model takes; nothing of other architectures."""
    return read_configuration(architecture).get("preprocess_cfg", {}) if is_elsewhere(architecture) else {}


def computes_quick_gelu(architecture: str) -> bool:
    """Return whether an architecture's activation is quick GELU."""
    return bool(configuration(architecture).get("quick_gelu", False))


def activation_twin(architecture: str) -> str:
    """Return the name of the architecture that is equal but for the other GELU; empty: there is none."""
    name = clean_name(architecture)
    twin = name.removesuffix(_QUICK) if computes_quick_gelu(name) else name + _QUICK
    return twin if twin != name and twin in _known() else ""


def _known() -> list[str]:
    """Return the names of open_clip's architectures, with this package's own, without those of `_registered`."""
    if not {path.stem for path in _CONFIGS.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(_CONFIGS)
    return [name for name in open_clip.list_models() if not name.startswith(_REGISTERED)]


@functools.cache
def tokenizer_of(architecture: str) -> Callable[..., Tensor]:
    """Return an architecture's tokenizer: `tokenizer(list of str)` gives int64 (B, context length), padded with 0.

    Captions that are too long are cut, the end-of-text token kept. It is made once a process. No network is needed for
    open_clip's own.
    """
    configuration(architecture)
    with quiet_root_logger():
        return open_clip.get_tokenizer(clean_name(architecture))


def image_size(model: nn.Module | str) -> int:
    """Return the side of the square images, in pixels, that a CLIP, a `DualEncoder` or an architecture (name) takes."""
    if isinstance(model, str):
        size = configuration(model)["vision_cfg"].get("image_size", 224)
    else:
        clip: Any = getattr(model, "clip", model)
        size = clip.visual.image_size
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"the images of a model must be square, got {size}; choose another architecture")
    return sides.pop()


def pixel_statistics(model: nn.Module | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the RGB channels, in [0, 1], by which images are normalised.

    They are CLIP's, except for a model built from a tag, or of a repository, that was trained with others.
    """
    if isinstance(model, str):
        configuration(model)
        settings = preprocessing(model)
    else:
        visual = getattr(model, "clip", model).visual
        settings = getattr(visual, "preprocess_cfg", {})
    mean = settings.get("mean", open_clip.OPENAI_DATASET_MEAN)
    return tuple(mean), tuple(settings.get("std", open_clip.OPENAI_DATASET_STD))


def outline_clip(architecture: str) -> nn.Module:
    """Build a CLIP without weights on torch's meta device: names and sizes alone, in about a second.

    Raises:
        UserError: unknown architecture.
    """
    configuration(architecture)
    with torch.device("meta"), quiet_root_logger():
        return open_clip.create_model(clean_name(architecture), device="meta")


def guess_architecture(state: Mapping[str, Tensor]) -> str:
    """Names the architectures of these shapes; the activation is not in the file, so there can be several."""
    names = {re.sub(r"^model\.", "", name): tensor for name, tensor in state.items()}
    needed = ("conv1.weight", "proj", "positional_embedding")
    if not {*(f"visual.{name}" for name in needed), "token_embedding.weight"} <= names.keys():
        return "a CLIP whose image tower is no plain ViT"
    width, _, patch, _ = names["visual.conv1.weight"].shape
    side = patch * round((len(names["visual.positional_embedding"]) - 1) ** 0.5)
    layers, text_layers = (
        len({name.split(".")[-3] for name in names if re.match(rf"{tower}resblocks\.\d+\.ln_1\.weight$", name)})
        for tower in (r"visual\.transformer\.", r"transformer\.")
    )
    words, text_width = names["token_embedding.weight"].shape
    found = (names["visual.proj"].shape[1], width, patch, side, layers, words, text_width, text_layers)
    fitting = []
    for name in _known():
        config = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        shape = (vision.get("width", 768), vision.get("patch_size", 16), vision.get("image_size", 224))
        tail = (text.get("vocab_size", 49408), text.get("width", 512), text.get("layers", 12))
        own_text_tower = "hf_model_name" not in text and "multimodal_cfg" not in config
        if own_text_tower and (config.get("embed_dim"), *shape, vision.get("layers", 12), *tail) == found:
            fitting.append(name)
    facts = f"a ViT of width {width}, {layers} layers and patch {patch}, for images of {side} px"
    return f"{' or '.join(sorted(fitting, key=len)[:3])} by its shapes ({facts})" if fitting else f"a CLIP with {facts}"


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keep open_clip, which logs through the root logger, from speaking and from installing a handler there."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def only_errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addHandler(handler)
    root.addFilter(only_errors)
    try:
        yield
    finally:
        root.removeFilter(only_errors)
        root.removeHandler(handler)
