"""CLIP backbones by name: an open_clip architecture, and weights from a tag, a local file, or a seed."""

import difflib
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn

from harma_ray.errors import UserError
from harma_ray.models.foreign import ForeignWeights, fitted, read_foreign
from harma_ray.models.weights import check_fit

logger = logging.getLogger(__name__)

_CONFIGS = Path(__file__).parent / "configs"
_QUICK = "-quickgelu"
Activation = Literal["", "gelu", "quick_gelu"]
"""What the user says that weights were trained with; nothing: what the file says."""
RANDOM = "random"
"""Weights that are drawn."""
_SPOKEN = {False: "plain GELU", True: "quick GELU"}


def build_clip(architecture: str, pretrained: str, *, seed: int = 0, activation: Activation = "") -> nn.Module:
    """Build a CLIP on the CPU in fp32.

    OpenAI's weights, and those fine-tuned from them (GeoRSCLIP), belong to the `-quickgelu` architectures. A tag says
    which activation it needs and is checked, as does a file that says it; of any other file there is a warning.

    Args:
        architecture: an open_clip name such as `ViT-B-32`, or one of this package: `scenes-tiny`.
        pretrained: "random"; or a tag of open_clip such as `laion2b_s34b_b79k`, downloaded to open_clip's cache; or
            the path of a local file (see `harma_ray.models.foreign`), whose CLIP is loaded strictly.
        seed: draws random weights; the caller's random state is left alone.
        activation: what the user says that a file's weights were trained with.

    Returns:
        open_clip's model, all parameters trainable.

    Raises:
        UserError: unknown architecture or tag, a file that does not fit, weights of the other activation, no network.
    """
    _check_names(architecture, pretrained)
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
    return load_clip(architecture, read_foreign(pretrained, only="clip"), activation=activation)[0]


def outline_clip(architecture: str) -> nn.Module:
    """Build a CLIP without weights on torch's meta device: names and sizes alone, in about a second.

    Raises:
        UserError: unknown architecture.
    """
    _configuration(architecture)
    with torch.device("meta"), _quiet_root_logger():
        return open_clip.create_model(architecture.replace("/", "-"), device="meta")


def load_clip(
    architecture: str, weights: ForeignWeights, *, activation: Activation = ""
) -> tuple[nn.Module, list[str]]:
    """Build a CLIP on the CPU in fp32 with the weights of a file.

    Args:
        architecture: as for `build_clip`.
        weights: what was read.
        activation: as for `build_clip`.

    Returns:
        open_clip's model, all parameters trainable, and what was done to make the weights fit.

    Raises:
        UserError: as `build_clip`.
    """
    _require_clip(architecture, weights, activation)
    model = _create(architecture.replace("/", "-"), None, 0)
    given, notes = fitted(model.state_dict(), weights.tensors)
    check_fit(model.state_dict(), given, f"{weights.path} (for `{architecture}`)")
    model.load_state_dict(given)
    return model, notes


def check_pretrained(architecture: str, pretrained: str, activation: Activation = "") -> None:
    """Check without loading: the architecture is known, the weights are random, a tag, or a file with one CLIP.

    Raises:
        UserError: unknown architecture or tag, weights of the other activation, a file that is missing or no CLIP's.
    """
    _check_names(architecture, pretrained)
    if pretrained != "random" and not open_clip.is_pretrained_cfg(architecture.replace("/", "-"), pretrained):
        _require_clip(architecture, read_foreign(pretrained, only="clip", data=False), activation)


def _check_names(architecture: str, pretrained: str) -> None:
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


def _require_clip(architecture: str, weights: ForeignWeights, activation: Activation) -> None:
    """Raise UserError unless a file's weights are those of a CLIP with the architecture's activation."""
    if weights.kind != "clip":
        raise UserError(f"{weights.path} must hold a CLIP under open_clip's names; {_no_clip(weights)}")
    check_file_activation(architecture, weights, activation)
    if weights.beside:
        _warn_once(f"{weights.path}: {weights.notes[-1]}")


def _no_clip(weights: ForeignWeights) -> str:
    """Say what a file holds instead of a CLIP, and the way out."""
    if weights.kind == "released":
        return "it is a released HarMA file, whose CLIP has adapters: launch.py checkpoint import, or --checkpoint"
    if weights.kind == "combiner":
        return "it is a CLIP4Cir Combiner, which goes on top of one: launch.py checkpoint import"
    names = list(weights.tensors)
    if any("vision_model." in name for name in names):
        return "its names are those of Hugging Face's transformers; take the file for open_clip of the same model"
    return f"its names are such as {', '.join(names[:3])}; choose another file"


def require_named(recipe: str, pretrained: str, other_way: str = "") -> None:
    """Raise UserError unless a frozen model's weights were named; drawn ones are, if somebody asked for them."""
    if not pretrained:
        raise UserError(
            f"recipe {recipe} keeps the backbone frozen, so its weights must be named; give {other_way}"
            "--set model.pretrained=FILE (`checkpoint export --format open_clip` writes one), or "
            "--set model.pretrained=random if a random backbone is what you want"
        )


def tokenizer_of(architecture: str) -> Callable[..., Tensor]:
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


def check_file_activation(architecture: str, weights: ForeignWeights, activation: Activation = "") -> None:
    """Guard against weights of one GELU in an architecture that computes the other.

    Where an architecture has no twin with the other GELU there is no choice, and nothing is checked.

    Args:
        architecture: What is built.
        weights: A file's.
        activation: What the user says of them.

    Raises:
        UserError: the file, or the user, says so. Where neither says anything, there is a warning, once.
    """
    name = architecture.replace("/", "-")
    quick = bool(_configuration(name).get("quick_gelu", False))
    twin = name.removesuffix(_QUICK) if quick else name + _QUICK
    if twin == name or twin not in open_clip.list_models():
        return
    path, trained, source = weights.path, weights.quick_gelu, weights.activation_source
    if activation:
        stated = activation == "quick_gelu"
        if trained not in (None, stated):
            raise UserError(
                f"{path} was trained with {_SPOKEN[not stated]} (it {source}), but `model.activation` is {activation}; "
                "leave it out"
            )
        trained, source = stated, f"is said to be by model.activation={activation}"
    if trained is None:
        own, other = _SPOKEN[quick], _SPOKEN[not quick]
        _warn_once(
            f"{path} does not say which activation it was trained with and is run with {own}, as `{name}` computes; if "
            f"it was trained with {other}, use `{twin}`, and if not, say so: "
            f"--set model.activation={'quick_gelu' if quick else 'gelu'}"
        )
    elif trained != quick:
        raise UserError(
            f"{path} was trained with {_SPOKEN[trained]} (it {source}), but `{name}` computes {_SPOKEN[quick]}; use "
            f"`{twin}`"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning that would be told of the same file by its check and by its loading."""
    logger.warning("%s", message)


def reading_notes(pretrained: str) -> tuple[str, ...]:
    """Return what is done to find the CLIP in a file; nothing for a tag, or a file with a bare state dict."""
    is_file = pretrained != "random" and Path(pretrained).is_file()
    return read_foreign(pretrained, only="clip", data=False).notes if is_file else ()


def knows_activation(path: str | Path) -> bool:
    """Return whether a file tells which GELU its CLIP was trained with."""
    return read_foreign(path, only="clip", data=False).quick_gelu is not None


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
