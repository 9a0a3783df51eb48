"""CLIP backbones by name: an open_clip architecture, and weights from a tag, a local file, or a seed."""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from harma_ray.errors import UserError
from harma_ray.models.weights import CLIP_SECTION, check_fit, read_section, says_quick_gelu

logger = logging.getLogger(__name__)

_CONFIGS = Path(__file__).parent / "configs"
_QUICK = "-quickgelu"
_QUICK_FILE = "RS5M_ViT-B-32"
"""How the names of GeoRSCLIP's releases begin that were fine-tuned from OpenAI's weights."""


def build_clip(architecture: str, pretrained: str, *, seed: int = 0) -> nn.Module:
    """Build a CLIP on the CPU in fp32.

    OpenAI's weights, and those fine-tuned from them (GeoRSCLIP), belong to the `-quickgelu` architectures. A tag says
    which activation it needs and is checked; a file does not, so there the architecture must be named rightly.

    Args:
        architecture: an open_clip name such as `ViT-B-32`, or one of this package: `scenes-tiny`.
        pretrained: "random"; or a tag of open_clip such as `laion2b_s34b_b79k`, downloaded to open_clip's cache; or
            the path of a local state dict (see `harma_ray.models.weights.read_state_dict`), loaded strictly.
        seed: draws random weights; the caller's random state is left alone.

    Returns:
        open_clip's model, all parameters trainable.

    Raises:
        UserError: unknown architecture or tag, a file that does not fit, weights of the other activation, no network.
    """
    check_pretrained(architecture, pretrained)
    architecture = architecture.replace("/", "-")
    if pretrained == "random":
        return _create(architecture, None, seed)
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        try:
            return _create(architecture, pretrained, seed)
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the weights `{pretrained}` of `{architecture}` could not be loaded ({reason}); fetch them "
                "where there is a network and give the file's path, or use `random`"
            ) from error
    section, state_dict = read_section(pretrained)
    if section == CLIP_SECTION and has_quick_twin(architecture):
        raise UserError(
            f"{pretrained} is a CLIP4Cir file, trained with quick GELU, but `{architecture}` computes plain GELU; use "
            f"`{architecture}{_QUICK}`"
        )
    model = _create(architecture, None, seed)
    check_fit(model.state_dict(), state_dict, f"{pretrained} (for `{architecture}`)")
    model.load_state_dict(state_dict)
    return model


def check_pretrained(architecture: str, pretrained: str) -> None:
    """Check names without loading anything: the architecture is known, the weights are random, a tag, or a file.

    Raises:
        UserError: unknown architecture or tag, missing file, weights of the other activation.
    """
    config = _configuration(architecture)
    architecture = architecture.replace("/", "-")
    if pretrained == "random":
        return
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        _check_activation(architecture, config, pretrained)
    elif not Path(pretrained).is_file():
        raise UserError(
            "`pretrained` must be `random`, an existing file, or a tag of the architecture, got "
            f"{pretrained!r} for `{architecture}`; {_nearest(architecture, pretrained)}"
        )
    else:
        check_file_activation(architecture, pretrained)


def tokenize(architecture: str) -> Callable[..., Tensor]:
    """Return an architecture's tokenizer: `tokenizer(list of str)` gives int64 (B, context length), padded with 0.

    Captions that are too long are cut, the end-of-text token kept. No network is needed for open_clip's own tokenizer.
    """
    _configuration(architecture)
    with _quiet_root_logger():
        return open_clip.get_tokenizer(architecture.replace("/", "-"))


def image_size(model: nn.Module | str) -> int:
    """Return the side of the square images, in pixels, that a CLIP, a `DualEncoder` or an architecture (name) takes."""
    if isinstance(model, str):
        size = _configuration(model)["vision_cfg"].get("image_size", 224)
    else:
        clip: Any = getattr(model, "clip", model)
        size = clip.visual.image_size
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"the images of a model must be square, got {size}; choose another architecture")
    return sides.pop()


def pixel_statistics(model: nn.Module | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the RGB channels, in [0, 1], by which images are normalised.

    They are CLIP's, except for a model built from a tag that was trained with others.
    """
    if isinstance(model, str):
        _configuration(model)
        return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    visual = getattr(model, "clip", model).visual
    settings = getattr(visual, "preprocess_cfg", {})
    mean = settings.get("mean", open_clip.OPENAI_DATASET_MEAN)
    return tuple(mean), tuple(settings.get("std", open_clip.OPENAI_DATASET_STD))


def _configuration(architecture: str) -> dict:
    """Return an architecture's open_clip configuration, this package's own architectures registered first."""
    known = open_clip.list_models()
    if not {path.stem for path in _CONFIGS.glob("*.json")} <= set(known):
        open_clip.add_model_config(_CONFIGS)
        known = open_clip.list_models()
    cleaned = architecture.replace("/", "-")
    if cleaned not in known:
        close = difflib.get_close_matches(cleaned, known, n=3, cutoff=0.4) or ["ViT-B-32"]
        raise UserError(f"the architecture must be one that open_clip knows, got {architecture!r}; near: {close}")
    return open_clip.get_model_config(cleaned) or {}


def _create(architecture: str, tag: str | None, seed: int) -> nn.Module:
    """Let open_clip build the model; only a forked CPU generator is drawn from."""
    with torch.random.fork_rng(devices=[]), _quiet_root_logger():
        torch.default_generator.manual_seed(seed)
        return open_clip.create_model(architecture, pretrained=tag, precision="fp32", device="cpu", weights_only=True)


def _check_activation(architecture: str, config: dict, tag: str) -> None:
    """Raise UserError if a tag's weights were trained with the other GELU than the architecture computes."""
    trained_quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    if trained_quick != bool(config.get("quick_gelu", False)):
        kind, other = ("quick", "plain") if trained_quick else ("plain", "quick")
        right = architecture + _QUICK if trained_quick else architecture.removesuffix(_QUICK)
        raise UserError(
            f"the weights `{tag}` were trained with {kind} GELU, but `{architecture}` computes {other} GELU; "
            f"use `{right}`"
        )


def has_quick_twin(architecture: str) -> bool:
    """Tell whether an architecture computes plain GELU and open_clip has it with quick GELU too."""
    quick = bool(_configuration(architecture).get("quick_gelu", False))
    return not quick and architecture.replace("/", "-") + _QUICK in open_clip.list_models()


def check_file_activation(architecture: str, path: str | Path) -> None:
    """Guard against plain GELU for weights of quick GELU: only files of `save_clip` say which they were trained with.

    Raises:
        UserError: the file says so, or its name tells that it needs quick GELU. Without that there is a warning.
    """
    twin, told = architecture + _QUICK, says_quick_gelu(path)
    if told is False and _configuration(architecture).get("quick_gelu", False):
        plain = architecture.removesuffix(_QUICK)
        raise UserError(f"{path} was trained with plain GELU, but `{architecture}` computes quick GELU; use `{plain}`")
    if not has_quick_twin(architecture) or told is False:
        return
    if told or Path(path).name.startswith(_QUICK_FILE):
        raise UserError(f"{path} was trained with quick GELU, but `{architecture}` computes plain GELU; use `{twin}`")
    logger.warning("%s is run with plain GELU; if it was trained with quick GELU, use `%s`", path, twin)


def knows_activation(path: str | Path) -> bool:
    """Return whether the file tells which GELU it was trained with: it says so, or by its name, or by its layout."""
    known = says_quick_gelu(path) is not None or Path(path).name.startswith(_QUICK_FILE)
    return known or read_section(path)[0] == CLIP_SECTION


def _nearest(architecture: str, pretrained: str) -> str:
    """Say what the user may have meant by an unknown tag or a missing file."""
    if "/" in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return "there is no such file"
    owners = open_clip.list_pretrained_models_by_tag(pretrained)
    if owners:
        return f"this tag belongs to {', '.join(owners[:5])}"
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"its nearest tags: {', '.join(difflib.get_close_matches(pretrained, tags, n=5, cutoff=0.0)) or 'none'}"


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
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
