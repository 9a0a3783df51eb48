"""Small trees of FashionIQ and CIRR with drawn images, and the conversion of them without Ray."""

import json
import zlib

import numpy as np
from PIL import Image

from harma_ray.data.convert.commands import convert_composed
from harma_ray.data.convert.composed import read_cirr, read_fashioniq
from harma_ray.data.convert.writer import WriteSettings

SMALL = {"shard_bytes": 20_000, "row_group_bytes": 5_000}


def draw_images(folder, names, suffix):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def draw_fashioniq(root):
    """Three categories of 8 images and 6 queries each, of training and validation; B0 is in dress and shirt of val."""
    for split in ("train", "val"):
        for initial, category in zip("DTS", ("dress", "toptee", "shirt"), strict=True):
            names = [f"{initial}{split[0]}{number}" for number in range(8)]
            draw_images(root / "images", names, ".jpg")
            if split == "val" and category != "toptee":
                names.insert(3, "B0")
            rows = [
                {"target": names[n + 1], "candidate": names[n], "captions": [f"Is {initial}{n}, ", "and longer."]}
                for n in range(6)
            ]
            write_json(root / "captions" / f"cap.{category}.{split}.json", rows)
            write_json(root / "image_splits" / f"split.{category}.{split}.json", names)
    draw_images(root / "images", ["B0"], ".png")
    return root


def draw_cirr(root):
    """12 images and 6 queries of training, validation and test."""
    for split, folder in (("train", "train/7"), ("val", "dev"), ("test1", "test1")):
        names = [f"{split}-{number}-img0" for number in range(12)]
        draw_images(root / folder, names, ".png")
        rows = []
        for n in range(6):
            members = names[n : n + 6]
            row = {"pairid": 100 + 2 * n, "reference": names[n], "target_hard": names[n + 2], "caption": f"Show {n}!",
                   "target_soft": {}, "img_set": {"id": n, "members": members[::-1], "reference_rank": 1}}  # fmt: skip
            if split == "test1":
                del row["target_hard"], row["target_soft"]
            rows.append(row)
        write_json(root / "cirr" / "captions" / f"cap.rc2.{split}.json", rows)
        write_json(
            root / "cirr" / "image_splits" / f"split.rc2.{split}.json", {n: f"./{folder}/{n}.png" for n in names}
        )
    return root


def fashioniq_split(root, split, out, *, categories=("dress", "toptee", "shirt"), **settings):
    source = read_fashioniq(root, split, categories)
    return convert_composed(source, out, settings=WriteSettings(**{**SMALL, **settings}))


def cirr_split(root, split, out, **settings):
    return convert_composed(read_cirr(root, split), out, settings=WriteSettings(**{**SMALL, **settings}))


def edit_json(path, change):
    """Changes a JSON file by a function that changes its content, or returns another."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))
