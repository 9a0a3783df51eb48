"""Pretrained parts of models: what a recipe asks of one, and open_clip's CLIPs by name, file, tag or seed."""

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from harma_ray.config import RANDOM
from harma_ray.errors import UserError, count, warn_once
from harma_ray.models.architectures import (
    activation_twin,
    clean_name,
    computes_quick_gelu,
    image_size,
    outline_clip,
    pixel_statistics,
    preprocessing,
    quiet_root_logger,
    tokenizer_of,
)
from harma_ray.models.fingerprints import built_from, fingerprint_as_built
from harma_ray.models.foreign import CLIP_MARK, ForeignWeights, fitted, read_foreign
from harma_ray.models.hub import find_weights, from_cache, known_weights, require_tag
from harma_ray.models.names import is_elsewhere, require_file, unknown_weights
from harma_ray.models.openclip import open_clip
from harma_ray.models.weights import check_fit

logger = logging.getLogger(__name__)

Activation = Literal["", "gelu", "quick_gelu"]
"""What the user says that weights were trained with; nothing: what the file says."""
_SHOW = "launch.py checkpoint show"
_SPOKEN = {False: "plain GELU", True: "quick GELU"}


class Backbone(ABC):
    """A pretrained part: how it is called, built and fed, and what tells it from others."""

    is_shared: bool = False
    """Whether what `build` returns lies in memory that nobody may write into."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is: backbones of equal names are built equal."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square images that it takes, in pixels."""

    @property
    @abstractmethod
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the RGB channels, in [0, 1], by which images are normalised."""

    @abstractmethod
    def tokenizer(self) -> Callable[..., Any]:
        """Returns what turns a list of B texts into int64[B, L]."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Returns it on CPU, before anything is added or frozen.

        Raises:
            UserError: If its weights cannot be read, or do not fit.
        """

    @abstractmethod
    def outline(self) -> nn.Module:
        """Returns it without its weights, on torch's meta device: names and sizes alone."""

    @abstractmethod
    def fingerprint(self, model: nn.Module) -> str:
        """Returns what tells the weights with which `build` made (part of) a model from all others.

        It need not look at the model's numbers, so it is asked before they are trained.
        """

    def check(self) -> None:  # noqa: B027
        """Raises UserError for weights that cannot be its own, as far as shows without loading them."""

    def notes(self) -> tuple[str, ...]:
        """Returns what is done to find it in its file."""
        return ()


@dataclass(frozen=True)
class ClipBackbone(Backbone):
    """An open_clip architecture with weights from a tag, a file or a seed; see `build_clip`."""

    architecture: str
    pretrained: str
    """As `build_clip` takes it; empty: nobody named any, and they are drawn."""
    seed: int = 0
    activation: Activation = ""

    @property
    def name(self) -> str:
        """The architecture and the weights."""
        drawn = f" of seed {self.seed}" if self.pretrained in ("", RANDOM) else ""
        return f"{self.architecture}, {self.pretrained or RANDOM}{drawn}"

    @property
    def image_size(self) -> int:
        """The architecture's."""
        return image_size(self.architecture)

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """CLIP's."""
        return pixel_statistics(self.architecture)

    def tokenizer(self) -> Callable[..., Any]:
        """Returns the architecture's."""
        return tokenizer_of(self.architecture)

    def build(self) -> nn.Module:
        """Returns open_clip's model."""
        name, pretrained = self.architecture, self.pretrained or RANDOM
        files = [file] if (file := _find_file(name, pretrained)) else []
        return built_from(files, lambda: build_clip(name, pretrained, seed=self.seed, activation=self.activation))

    def outline(self) -> nn.Module:
        """Returns open_clip's model without weights."""
        return outline_clip(self.architecture)

    def fingerprint(self, model: nn.Module) -> str:
        """Returns the `backbone_fingerprint` of a model as it was built."""
        return fingerprint_as_built(model)

    def check(self) -> None:
        """Raises UserError as `check_pretrained` does."""
        check_pretrained(self.architecture, self.pretrained or RANDOM, self.activation)

    def notes(self) -> tuple[str, ...]:
        """Returns how the CLIP is found in a file; nothing for a tag, or a file with a bare state dict."""
        file = _find_file(self.architecture, self.pretrained)
        return read_foreign(file, data=False).notes if file else ()


def build_clip(architecture: str, pretrained: str, *, seed: int = 0, activation: Activation = "") -> nn.Module:
    """Build a CLIP on the CPU in fp32.

    OpenAI's weights, and those fine-tuned from them (GeoRSCLIP), belong to the `-quickgelu` architectures. A tag says
    which activation it needs and is checked, as does a file that says it; of any other file there is a warning.

    Args:
        architecture: an open_clip name such as `ViT-B-32`, `hf-hub:ORG/NAME` or `local-dir:/PATH`, or one of this
            package: `scenes-tiny`.
        pretrained: "random"; or a tag of open_clip such as `laion2b_s34b_b79k`, downloaded to open_clip's cache; or
            a local file (see `harma_ray.models.foreign`), or that of `hf-hub:ORG/NAME` or `local-dir:/PATH`, whose CLIP
            is loaded strictly.
        seed: draws random weights; the caller's random state is left alone.
        activation: what the user says that a file's weights were trained with.

    Returns:
        open_clip's model, all parameters trainable.

    Raises:
        UserError: unknown architecture or tag, a file that does not fit, weights of the other activation, no network.
    """
    _check_names(architecture, pretrained)
    if pretrained == RANDOM:
        return _create(architecture, None, seed)
    file = _find_file(architecture, pretrained)
    if file:
        return load_clip(architecture, read_foreign(file), activation=activation)[0]
    require_tag(clean_name(architecture), pretrained)
    try:
        with from_cache(clean_name(architecture), pretrained):
            return _create(architecture, pretrained, seed)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the weights `{pretrained}` of `{clean_name(architecture)}` could not be loaded ({reason}); fetch them "
            "where there is a network and give the file's path, or use `random`"
        ) from error


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
    model = _create(architecture, None, 0)
    given, notes = fitted(model.state_dict(), weights.tensors)
    check_fit(model.state_dict(), given, f"{weights.path} (for `{architecture}`)")
    model.load_state_dict(given)
    return model, notes


def check_pretrained(architecture: str, pretrained: str, activation: Activation = "") -> None:
    """Check without loading: the architecture is known, the weights are random, a tag, or a file with one CLIP.

    Raises:
        UserError: unknown architecture or tag, weights of the other activation, a file that is missing or no CLIP's,
            weights that are not on this machine and cannot be fetched.
    """
    _check_names(architecture, pretrained)
    file = known_weights(pretrained) if is_elsewhere(pretrained) else _find_file(architecture, pretrained)
    if file is None and not is_elsewhere(pretrained):
        require_tag(clean_name(architecture), pretrained)
    if file is None:
        return
    weights, expected = read_foreign(file, data=False), outline_clip(architecture).state_dict()
    _require_clip(architecture, weights, activation)
    strange = [name for name in fitted(expected, weights.tensors)[0] if name not in expected]
    if strange:
        raise UserError(
            f"{weights.path} does not fit `{architecture}`: {count(len(strange), 'unexpected tensor')}, such as "
            f"{strange[0]}; choose the model it was made for ({_SHOW} says what it holds)"
        )


def _find_file(architecture: str, pretrained: str) -> Path | None:
    """Return the file of weights that are in one, fetched if it is the hub's; a tag goes before a file of its name."""
    if is_elsewhere(pretrained):
        return find_weights(pretrained)
    named = pretrained not in ("", RANDOM) and not open_clip.is_pretrained_cfg(clean_name(architecture), pretrained)
    return Path(pretrained) if named and Path(pretrained).is_file() else None


def _check_names(architecture: str, pretrained: str) -> None:
    quick, name = computes_quick_gelu(architecture), clean_name(architecture)
    if open_clip.is_pretrained_cfg(name, pretrained):
        trained = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
        if trained != quick:
            raise UserError(
                f"the weights `{pretrained}` were trained with {_SPOKEN[trained]}, but `{name}` computes "
                f"{_SPOKEN[quick]}; use `{activation_twin(name)}`"
            )
    elif pretrained != RANDOM and not is_elsewhere(pretrained) and not Path(pretrained).is_file():
        require_file(name, pretrained)
        near = f"its own are `{architecture}`" if is_elsewhere(architecture) else _nearest(name, pretrained)
        raise unknown_weights(name, pretrained, near)


def _require_clip(architecture: str, weights: ForeignWeights, activation: Activation) -> None:
    """Raise UserError unless a file's weights are those of a CLIP with the architecture's activation."""
    if weights.mark != CLIP_MARK:
        raise UserError(f"{weights.path} must hold a CLIP under open_clip's names; {_no_clip(weights)}")
    check_file_activation(architecture, weights, activation)
    if weights.beside:
        warn_once(logger, f"{weights.path}: {weights.notes[-1]}")


def _no_clip(weights: ForeignWeights) -> str:
    """Say what a file holds instead of a CLIP, and the way out."""
    names = list(weights.tensors)
    if any("vision_model." in name for name in names):
        return "its names are those of Hugging Face's transformers; take the file for open_clip of the same model"
    return f"its names are such as {', '.join(names[:3])}; choose another file ({_SHOW} says what this one holds)"


def _create(architecture: str, tag: str | None, seed: int) -> nn.Module:
    """Let open_clip build the model; only a forked CPU generator is drawn from."""
    name = clean_name(architecture)
    with torch.random.fork_rng(devices=[]), quiet_root_logger():
        torch.default_generator.manual_seed(seed)
        options: Any = {"precision": "fp32", "weights_only": True, "force_preprocess_cfg": preprocessing(architecture)}
        return open_clip.create_model(name, pretrained=tag, device="cpu", **options)


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
    name, quick, twin = clean_name(architecture), computes_quick_gelu(architecture), activation_twin(architecture)
    if not twin:
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
        warn_once(
            logger,
            f"{path} does not say which activation it was trained with and is run with {own}, as `{name}` computes; if "
            f"it was trained with {other}, use `{twin}`, and if not, say so: "
            f"--set model.activation={'quick_gelu' if quick else 'gelu'}",
        )
    elif trained != quick:
        raise UserError(
            f"{path} was trained with {_SPOKEN[trained]} (it {source}), but `{name}` computes {_SPOKEN[quick]}; use "
            f"`{twin}`"
        )


def _nearest(architecture: str, pretrained: str) -> str:
    """Say what the user may have meant by an unknown tag."""
    owners = open_clip.list_pretrained_models_by_tag(pretrained)
    if owners:
        return f"this tag belongs to {', '.join(owners[:5])}"
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"its nearest tags: {', '.join(difflib.get_close_matches(pretrained, tags, n=5, cutoff=0.0)) or 'none'}"
