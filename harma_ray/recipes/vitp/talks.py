"""From a row of talks to the tensors of a batch: tiles of its images, and its tokens.

Shape letters: B talks, L tokens of the longest, T tiles of all, S side of a tile.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from harma_ray.data.chat import ChatTemplate
from harma_ray.data.image_reading import picture_size
from harma_ray.data.images import decode_stored
from harma_ray.data.kinds.base import Record
from harma_ray.data.kinds.talks import IMAGE_MARK, TalkRecord, Turn
from harma_ray.data.samples import Array, RowTransform
from harma_ray.data.splits import Split, open_shard
from harma_ray.data.tiles import count_tiles, cut_tiles, tiles_each
from harma_ray.data.transforms import to_tensor
from harma_ray.errors import UserError
from harma_ray.models.internvl.backbone import InternVLBackbone
from harma_ray.models.internvl.marks import IGNORED, IMAGE_TOKEN
from harma_ray.recipes.vitp.config import TalkConfig, VitpConfig
from harma_ray.recipes.vitp.vocabulary import vocabulary

_WHITE = 255


@dataclass(frozen=True)
class TalkReader:
    """Reads talks as a model does; small, so that it travels to where rows are decoded."""

    backbone: InternVLBackbone
    settings: TalkConfig
    max_pixels: int = 0

    def check(self, record: Record, sizes: Sequence[tuple[int, int]]) -> None:
        """Raises UserError for a talk that is longer than is read; a `RowCheck`."""
        talk = cast("TalkRecord", record)  # what makes talks asks of nothing else
        try:
            tokens = self.template.render(talk.turns, self.count(sizes, talk.max_tiles))
            tokens.cut(self.settings.max_tokens, self._image_token, whole=True)
        except UserError as error:
            raise UserError(f"{talk.source}: {error}") from error

    def read(self, row: Mapping[str, Any], tiles: Sequence[Image.Image], counts: Sequence[int]) -> dict[str, Array]:
        """Returns ``pixels`` uint8[T, 3, S, S], ``ids`` and ``labels`` int64[L] of a row whose images are cut.

        Raises:
            UserError: If the talk is too long, or its marks and images do not agree.
        """
        turns = [Turn(turn["from"], turn["value"]) for turn in row["conversations"]]
        tokens = self.template.render(turns, counts).cut(self.settings.max_tokens, self._image_token)
        return {"pixels": self.stack(tiles), "ids": tokens.ids, "labels": tokens.labels}

    def ask(self, turns: Sequence[Turn], images: Sequence[Image.Image], max_tiles: int | None) -> dict[str, Array]:
        """Returns what `read` does of a talk that ends with a question, up to where the answer begins.

        Raises:
            UserError: If the marks in its questions are not as many as the images.
        """
        cut = self.cut(images, max_tiles)
        ids = self.template.ask(turns, [len(tiles) for tiles in cut])
        pixels = self.stack([tile for tiles in cut for tile in tiles])
        return {"pixels": pixels, "ids": ids, "labels": np.full_like(ids, IGNORED)}

    @property
    def template(self) -> ChatTemplate:
        """The chat template over the model's tokenizer."""
        return ChatTemplate(_encoder(self.backbone), self.backbone.tokens_per_tile, self.settings.system)

    @property
    def _image_token(self) -> int:
        token = self.backbone.tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
        assert isinstance(token, int)
        return token

    def count(self, sizes: Sequence[tuple[int, int]], max_tiles: int | None = None) -> list[int]:
        """Returns how many tiles `cut` makes of each of a talk's images, given their widths and heights."""
        each = tiles_each(max_tiles or self.settings.max_tiles, len(sizes))
        side, thumbnail = self.backbone.image_size, self.settings.thumbnail
        return [count_tiles(width, height, side, each, thumbnail=thumbnail) for width, height in sizes]

    def cut(self, images: Sequence[Image.Image], max_tiles: int | None = None) -> list[list[Image.Image]]:
        """Returns the tiles of the images of a talk."""
        each = tiles_each(max_tiles or self.settings.max_tiles, len(images))
        size = self.backbone.image_size
        return [cut_tiles(image, size, each, thumbnail=self.settings.thumbnail) for image in images]

    def stack(self, tiles: Sequence[Image.Image]) -> torch.Tensor:
        """Returns tiles as uint8[T, 3, S, S]; T may be 0."""
        size = self.backbone.image_size
        empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
        return torch.stack([to_tensor(tile) for tile in tiles]) if tiles else empty


@dataclass(frozen=True)
class TalkTransform(RowTransform):
    """Talks as they are trained on or evaluated."""

    reader: TalkReader
    training: bool
    on_cpu = frozenset({"ids", "mask", "labels", "scores"})  # the model counts and places tokens there

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns what `TalkReader.read` does, and ``scores``, float32[L], by which image tokens are dropped.

        In training, images of some data sets are compressed anew.
        """
        images = [decode_stored(data, max_pixels=self.reader.max_pixels) for data in row["images"]]
        if self.training and row["augment"]:
            images = [compress(image, int(rng.integers(75, 101))) for image in images]
        cut = self.reader.cut(images, row["max_tiles"])
        sample = self.reader.read(row, [tile for tiles in cut for tile in tiles], [len(tiles) for tiles in cut])
        return {**sample, "scores": rng.random(len(np.asarray(sample["ids"])), np.float32)}

    def collate(self, samples: Sequence[dict[str, Array]]) -> dict[str, Array]:
        """Returns the tiles of all talks one after the other, at least one, and their tokens, padded to the longest.

        Returns:
            ``pixels`` uint8[T, 3, S, S]; ``ids``, ``mask`` and ``labels`` int64[B, L]; ``scores`` float32[B, L].
        """
        pixels = [np.asarray(sample["pixels"]) for sample in samples]
        if not sum(map(len, pixels)):
            size = self.reader.backbone.image_size
            pixels.append(np.full((1, 3, size, size), _WHITE, np.uint8))
        batch: dict[str, Array] = {"pixels": np.concatenate(pixels)}
        samples = [{**sample, "mask": np.ones_like(sample["ids"])} for sample in samples]
        for name in samples[0].keys() - {"pixels"}:
            rows = [torch.tensor(np.asarray(sample[name])) for sample in samples]
            padding = IGNORED if name == "labels" else 0
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        return batch


@dataclass(frozen=True)
class QuestionTransform(TalkTransform):
    """The first question of talks, to be answered."""

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Returns what `TalkReader.ask` does."""
        first, _ = question_of(row["conversations"])
        turns = [Turn(turn["from"], turn["value"]) for turn in row["conversations"][: first + 1]]
        shown = row["images"][: sum(turn.value.count(IMAGE_MARK) for turn in turns)]
        images = [decode_stored(data, max_pixels=self.reader.max_pixels) for data in shown]
        return self.reader.ask(turns, images, row["max_tiles"])


def question_of(conversations: Sequence[Mapping[str, str]]) -> tuple[int, str]:
    """Returns the place of a talk's first question, and its answer."""
    first = next(place for place, turn in enumerate(conversations) if turn["from"] == "human")
    return first, conversations[first + 1]["value"]


def measure_talks(split: Split, reader: TalkReader) -> dict[str, list[int]]:
    """Returns tokens and supervised tokens of all talks of a split, and the tiles of their images; none is decoded."""
    found: dict[str, list[int]] = {"tokens of a talk": [], "supervised tokens of a talk": [], "tiles of an image": []}
    for path in split.shard_paths():
        with open_shard(path) as file:
            for batch in file.iter_batches(8, columns=["images", "conversations", "max_tiles"]):
                for row in batch.to_pylist():
                    tiles = reader.count([picture_size(data) for data in row["images"]], row["max_tiles"])
                    tokens = reader.template.render([Turn(t["from"], t["value"]) for t in row["conversations"]], tiles)
                    found["tokens of a talk"].append(len(tokens.ids))
                    found["supervised tokens of a talk"].append(int(np.count_nonzero(tokens.labels != IGNORED)))
                    found["tiles of an image"] += tiles
    return found


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Returns an image as JPEG of a quality (1 to 100) shows it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def reader_of(config: VitpConfig) -> TalkReader:
    """Returns what reads the talks of a run."""
    return TalkReader(backbone_of(config), config.talk, config.data.max_pixels)


def backbone_of(config: VitpConfig) -> InternVLBackbone:
    """Returns the model that a run starts from."""
    model = config.model
    return InternVLBackbone(model.pretrained, model.architecture, config.seed, vocabulary, model.vision)


@functools.lru_cache(maxsize=4)
def _encoder(backbone: InternVLBackbone) -> Callable[[str], list[int]]:
    tokenizer = backbone.tokenizer()

    @functools.lru_cache(maxsize=256)  # headers, the system prompt and common questions come again and again
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return encode
