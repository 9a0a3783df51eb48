"""Where an InternVL comes from: a Hugging Face folder, as transformers or the original code wrote it, or a seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harma_ray.config import RANDOM
from harma_ray.errors import UserError
from harma_ray.models.backbones import Backbone
from harma_ray.models.fingerprints import built_from, fingerprint_as_built
from harma_ray.models.internvl.configs import SIZES, internvl_config, require_transformers
from harma_ray.models.internvl.files import build_empty, read_internvl, read_vision
from harma_ray.models.internvl.folders import CONFIG, files_of
from harma_ray.models.internvl.layouts import (
    UNKNOWN_TOKEN,
    check_same_vision,
    read_config,
    read_vision_config,
)
from harma_ray.models.internvl.marks import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START
from harma_ray.models.internvl.tokens import make_room, read_tokenizer, require_tokens, with_special_tokens
from harma_ray.models.internvl.vision import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

_EMBEDDING_STD = 0.02
"""Of random class tokens and positions, which transformers leaves at zero, where no gradient tells patches apart."""


@dataclass(frozen=True)
class InternVLBackbone(Backbone):
    """An InternVL with the weights of a folder, or with weights that are drawn."""

    pretrained: str
    """A folder; or ``random``."""
    size: str
    """Of random weights, one of `SIZES`; a folder says its own."""
    seed: int = 0
    """Draws random weights."""
    make_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    """Makes the tokenizer of random weights, always the same; a folder has its own."""
    vision: str = ""
    """Folder or file of a vision transformer that takes the place of the model's own; empty: none."""

    @property
    def name(self) -> str:
        """The size and the weights."""
        vision = f", vision transformer of {self.vision}" if self.vision else ""
        if self._is_random:
            return f"InternVL {self.size}, random of seed {self.seed}{vision}"
        return f"InternVL, {self.pretrained}{vision}"

    @property
    def image_size(self) -> int:
        """Side of a tile."""
        return SIZES[self.size].image_size if self._is_random else self._folder_config.vision_config.image_size[0]

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that stand for a tile."""
        if self._is_random:
            return SIZES[self.size].tokens_per_tile
        config = self._folder_config
        side = self.image_size // config.vision_config.patch_size[0] * config.downsample_ratio
        return int(side) ** 2

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """ImageNet's."""
        return IMAGENET_MEAN, IMAGENET_STD

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns transformers' tokenizer, with InternVL's special tokens."""
        return self._tokenizer[0]

    def build(self) -> InternVLForConditionalGeneration:
        """Returns transformers' model in fp32, all parameters trainable."""
        tokenizer, num_new = self._tokenizer
        if self._is_random:
            model = self._with_vision(self._draw())
        else:
            paths = [Path(path).expanduser() for path in (self.pretrained, self.vision) if path]
            files = [file for path in paths for file in files_of(path)]
            model: Any = built_from(files, lambda: self._with_vision(self._load()))
            make_room(model, len(tokenizer), num_new)
        end = tokenizer.convert_tokens_to_ids(TURN_END)
        model.generation_config.eos_token_id = tokenizer.eos_token_id if end in (None, tokenizer.unk_token_id) else end
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def outline(self) -> nn.Module:
        """Returns transformers' model without weights."""
        tokenizer, num_new = self._tokenizer
        with torch.device("meta"):
            model = build_empty(copy.deepcopy(self._config))  # `make_room` writes into it
            if not self._is_random:
                make_room(model, len(tokenizer), num_new)
        return model

    def fingerprint(self, model: nn.Module) -> str:
        """Returns the SHA-256 of the weights with which transformers' model, or one around it, was built."""
        return fingerprint_as_built(getattr(model, "core", model))

    def check(self) -> None:
        """Raises UserError if transformers, the size, a folder, its configuration or its tokenizer is missing.

        A vision transformer that says that it is another than the model's is refused, too.
        """
        require_transformers()
        if not self._is_random:
            read_internvl(Path(self.pretrained).expanduser(), data=False)
        self.tokenizer()
        if not self.vision:
            return
        path = Path(self.vision).expanduser()
        config = files_of(path)[-1]
        if config.name == CONFIG:
            wanted: Any = self._config.vision_config
            check_same_vision(read_vision_config(config.parent), wanted, str(path))

    def notes(self) -> tuple[str, ...]:
        """Returns what is done to make the folder's weights a model's."""
        own = () if self._is_random else read_internvl(Path(self.pretrained).expanduser(), data=False)[2]
        return (*own, f"its vision transformer is that of {self.vision}") if self.vision else own

    @property
    def _is_random(self) -> bool:
        return self.pretrained in ("", RANDOM)

    @property
    def _config(self) -> InternVLConfig:
        if not self._is_random:
            return self._folder_config
        tokenizer: Any = self.tokenizer()
        return internvl_config(SIZES[self.size], len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @functools.cached_property
    def _folder_config(self) -> Any:
        return read_config(Path(self.pretrained).expanduser())

    @functools.cached_property
    def _tokenizer(self) -> tuple[Any, int]:
        """The tokenizer, and how many tokens were added to it."""
        require_transformers()
        if self._is_random:
            if self.size not in SIZES:
                raise UserError(f"the size of a random InternVL must be one of {', '.join(SIZES)}, got {self.size!r}")
            if self.make_tokenizer is None:
                raise UserError(
                    "a random InternVL needs a tokenizer, which this recipe has not; give pretrained=FOLDER"
                )
            return with_special_tokens(self.make_tokenizer()), 0
        found = read_tokenizer(Path(self.pretrained).expanduser(), self._folder_config)
        before, config = len(found), self._folder_config
        of_images = () if config.image_token_id == UNKNOWN_TOKEN else (IMAGE_START, IMAGE_TOKEN, IMAGE_END)
        require_tokens(found, (TURN_START, TURN_END, *of_images), self.pretrained)
        tokenizer: Any = with_special_tokens(found)
        wanted = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if config.image_token_id not in (UNKNOWN_TOKEN, wanted):
            raise UserError(
                f"{self.pretrained} must mean one token by `{IMAGE_TOKEN}`, got {config.image_token_id} in its "
                f"configuration and {wanted} in its tokenizer; take both from one model"
            )
        config.image_token_id = wanted
        return tokenizer, len(tokenizer) - before

    def _draw(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model: Any = build_empty(self._config, draw=True)
            for tensor in (model.model.vision_tower.embeddings.cls_token, self._positions(model)):
                nn.init.normal_(tensor, std=_EMBEDDING_STD)
        return model

    @staticmethod
    def _positions(model: Any) -> nn.Parameter:
        return model.model.vision_tower.embeddings.position_embeddings

    def _load(self) -> nn.Module:
        config, state, _ = read_internvl(Path(self.pretrained).expanduser())
        config.image_token_id = self._config.image_token_id
        model = build_empty(config)
        model.load_state_dict(state)
        return model

    def _with_vision(self, model: Any) -> Any:
        """Returns the model, with the vision transformer of its own file if it has one."""
        if self.vision:
            tower, path = model.model.vision_tower, Path(self.vision).expanduser()
            config, tensors, _ = read_vision(path, tower.config)
            check_same_vision(config, tower.config, str(path))
            tower.load_state_dict(tensors)
        return model
