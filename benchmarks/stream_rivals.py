"""The same pictures and captions as other loaders have them: files, MosaicML's shards, tar files; one pair a sample."""

import importlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from harma_ray.config import DataConfig
from harma_ray.data.convert.commands import convert_harma, convert_scenes
from harma_ray.data.decoding import DecodeRows
from harma_ray.data.order import TrainingOrder, chunk_samples, iterate_slices, read_samples
from harma_ray.data.splits import open_split
from harma_ray.models.architectures import pixel_statistics
from harma_ray.recipes.harma.task import PairTransform

_PAIRS_A_TAR = 250


@dataclass(frozen=True)
class Sources:
    """The same pairs in each loader's format."""

    pairs: list[tuple[Path, str]]
    """Image files and captions."""
    shards: Path
    mosaic: Path
    tars: Path


def write_sources(folder: Path, num_images: int, size: int, names: list[str]) -> Sources:
    """Draws images, saves them as JPEG, and packs the files as they are for the loaders that are named."""
    convert_scenes(folder / "drawn", {"train": num_images}, style="summer", size=size)
    rows = open_split(folder / "drawn", "train").read(["image", "captions"]).to_pylist()
    images = folder / "images"
    images.mkdir()
    pairs: list[tuple[Path, str]] = []
    for number, row in enumerate(rows):
        path = images / f"{number:05}.jpg"
        Image.open(io.BytesIO(row["image"])).convert("RGB").save(path, quality=90)
        pairs += [(path, caption) for caption in row["captions"]]
    annotations = folder / "train.json"
    listed = [{"image": path.name, "caption": text, "image_id": int(path.stem)} for path, text in pairs]
    annotations.write_text(json.dumps(listed))
    convert_harma(annotations, images, "train", folder / "shards")
    sources = Sources(pairs, folder / "shards", folder / "mosaic", folder / "tars")
    if "mosaic" in names:
        _write_mosaic(sources)
    if "webdataset" in names:
        _write_tars(sources)
    return sources


def _write_mosaic(sources: Sources) -> None:
    streaming = importlib.import_module("streaming")
    columns = {"image": "bytes", "caption": "str"}
    with streaming.MDSWriter(out=str(sources.mosaic), columns=columns) as writer:
        for path, caption in sources.pairs:
            writer.write({"image": path.read_bytes(), "caption": caption})


def _write_tars(sources: Sources) -> None:
    sources.tars.mkdir()
    for number, part in enumerate(iterate_slices(len(sources.pairs), _PAIRS_A_TAR)):
        with tarfile.open(sources.tars / f"{number:05}.tar", "w") as file:
            for place, (path, caption) in enumerate(sources.pairs[part], part.start):
                for ending, content in (("jpg", path.read_bytes()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{place:06}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))


class Shards(IterableDataset):
    """The stream's own batches, read in pieces of the same size and decoded in DataLoader's processes."""

    def __init__(self, order: TrainingOrder, transform: PairTransform, num_workers: int):
        self.order, self.decode = order, DecodeRows(transform, order.seed)
        samples = order.worker_samples(0, 0, 1)
        steps = max(1, chunk_samples(order.index, DataConfig().chunk_mb) // order.global_batch_size)
        steps = min(steps, -(-len(samples) // (2 * num_workers)))  # at least two pieces for each
        self.pieces = [samples[part] for part in iterate_slices(len(samples), steps)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batches of this process."""
        worker = get_worker_info()
        assert worker is not None  # it is read by DataLoader's processes alone
        for piece in self.pieces[worker.id :: worker.num_workers]:
            table = read_samples(self.order, piece.reshape(-1, 2), 0)
            for part in iterate_slices(len(table), self.order.global_batch_size):
                arrays = self.decode(table.slice(part.start, self.order.global_batch_size))
                yield {name: torch.as_tensor(array) for name, array in arrays.items()}


def _transformed(transform: PairTransform, image: bytes, caption: str) -> dict[str, Any]:
    row = {"image": image, "captions": [caption], "caption": 0, "image_id": 0, "label": None, "epoch": 0}
    return transform(row, np.random.default_rng())


class MosaicPairs:
    """MosaicML's shards; a class around one, for it can be imported only where it is installed."""

    def __init__(self, sources: Sources, transform: PairTransform, batch_size: int):
        self.sources, self.transform, self.batch_size = sources, transform, batch_size

    def dataset(self) -> Any:
        """Returns its dataset, with the transform."""
        streaming, transform = importlib.import_module("streaming"), self.transform
        streaming.base.util.clean_stale_shared_memory()

        class Transformed(streaming.StreamingDataset):
            def __getitem__(self, at: int) -> dict[str, Any]:
                sample = super().__getitem__(at)
                return _transformed(transform, sample["image"], sample["caption"])

        return Transformed(local=str(self.sources.mosaic), shuffle=True, batch_size=self.batch_size)


def tar_files(sources: Sources, transform: PairTransform, batch_size: int) -> Any:
    """Returns WebDataset's dataset of batches."""
    webdataset = importlib.import_module("webdataset")
    urls = sorted(map(str, sources.tars.glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000)
    pairs = samples.map(lambda sample: _transformed(transform, sample["jpg"], sample["txt"].decode()))
    return pairs.batched(batch_size, collation_fn=torch.utils.data.default_collate)


class _RandomOperations(torch.nn.Module):
    """Two of the ten published operations, each applied half of the time at level 7, by torchvision alone."""

    def forward(self, image: Image.Image) -> Image.Image:
        for operation in np.random.choice(len(self._operations), 2):
            if np.random.random() < 0.5:
                image = self._operations[operation](image, np.random.choice([-1, 1]))
        return image

    @staticmethod
    def _affine(image: Any, x: float = 0, y: float = 0, shear: tuple[float, float] = (0, 0)) -> Any:
        moved, filled = [x, y], [128.0] * 3
        return F.affine(image, 0, moved, 1, list(shear), F.InterpolationMode.BILINEAR, filled, [0, 0])

    _operations = (
        lambda image, sign: image,
        lambda image, sign: F.autocontrast(image),
        lambda image, sign: F.equalize(image),
        lambda image, sign: F.adjust_brightness(image, 1.36),
        lambda image, sign: F.adjust_sharpness(image, 1.36),
        lambda image, sign: _RandomOperations._affine(image, shear=(sign * 11.86, 0)),
        lambda image, sign: _RandomOperations._affine(image, shear=(0, sign * 11.86)),
        lambda image, sign: _RandomOperations._affine(image, x=sign * 7),
        lambda image, sign: _RandomOperations._affine(image, y=sign * 7),
        lambda image, sign: F.rotate(image, sign * 21, F.InterpolationMode.BILINEAR, fill=[128.0] * 3),
    )


class _Files(Dataset):
    def __init__(self, pairs: list[tuple[Path, str]], architecture: str, size: int = 224):
        self.pairs, self.tokenizer = pairs, open_clip.get_tokenizer(architecture)
        mean, deviation = pixel_statistics(architecture)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.5, 1), interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                _RandomOperations(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(deviation)),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        path, caption = self.pairs[number]
        return {"image": self.transform(Image.open(path).convert("RGB")), "text": self.tokenizer([caption])[0]}


def jpeg_files(sources: Sources, architecture: str) -> Dataset:
    """Returns a dataset of pairs: floats, normalised, and tokens."""
    return _Files(sources.pairs, architecture)
