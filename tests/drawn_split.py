"""A small split on disk with chosen captions, and a retrieval of chosen embeddings."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harma_ray.data.kinds.images import IMAGE_SCHEMA
from harma_ray.data.manifest import MANIFEST_NAME, Manifest, Shard
from harma_ray.data.scenes import scene
from harma_ray.data.splits import Split, open_split
from harma_ray.retrieval.image_text import ImageTextRetrieval


def write_split(folder, captions, labels=None, images=None) -> Split:
    """Writes a split of drawn scenes with the given captions of each row, in two shards of small row groups."""
    path = folder / "data" / "val"
    path.mkdir(parents=True)
    scenes = [scene(0, i, "summer", size=32, num_captions=1) for i in range(len(captions))]
    rows = []
    for number, texts in enumerate(captions):
        buffer = io.BytesIO()
        scenes[number].image.save(buffer, "PNG")
        label = None if labels is None else labels[number]
        rows.append({
            "image_id": number, "image": buffer.getvalue() if images is None else images[number], "height": 32,
            "width": 32, "captions": texts, "label": None if label is None else 0, "label_name": label,
            "source": f"scene-{number}.png",
        })  # fmt: skip
    shards = []
    half = max(1, len(rows) // 2)
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            name = f"part-{number:05}.parquet"
            pq.write_table(pa.Table.from_pylist(part, IMAGE_SCHEMA), path / name, row_group_size=2)
            shards.append(Shard(name, len(part), (path / name).stat().st_size))
    manifest = Manifest(len(rows), sum(map(len, captions)), tuple(shards))
    (path / MANIFEST_NAME).write_text(manifest.to_json())
    return open_split(folder / "data", "val")


def make_retrieval(images, texts, captions) -> ImageTextRetrieval:
    """Ranks embeddings that need not be normalised."""
    images, texts = (torch.nn.functional.normalize(x.float(), dim=1) for x in (images, texts))
    image_of_text = torch.repeat_interleave(torch.arange(len(captions)), torch.tensor([len(row) for row in captions]))
    return ImageTextRetrieval.of(images, texts, [text for row in captions for text in row], image_of_text)


def perfect(captions) -> ImageTextRetrieval:
    eye = torch.eye(len(captions))
    return make_retrieval(
        eye, torch.cat([eye[i : i + 1].repeat(len(row), 1) for i, row in enumerate(captions)]), captions
    )
