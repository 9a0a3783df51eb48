"""Images per second of `embed` against a plain loop of PIL and torch in one process: same images, model and batches.

Each way runs with few images and with many, in turns; a rate is of the difference, so that no start is in it. The start
is printed apart: of `embed` a process with the model.

Run: python benchmarks/embed.py [--images 4000] [--side 256] [--rounds 3] [--threads 2]
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harma_ray.api import load_encoder
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run, create_run
from harma_ray.settings import config_hash
from harma_ray.training.checkpoint import CheckpointMeta, save_checkpoint
from harma_ray.vectors.embed import embed
from harma_ray.vectors.job import JobSettings
from harma_ray.vectors.store import open_store

FEW = 64


def draw_images(folder: Path, count: int, side: int) -> None:
    """Writes JPEG files of smooth noise, which are as large as photographs are."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:06d}.jpg", quality=90)


def make_run(folder: Path) -> Run:
    """Returns a run whose vision transformer nobody trained: a small one, so that reading images counts."""
    config = recipe_config("scenes-vitp")
    run = create_run(folder, "drawn", config)
    model = run.task.new_model()
    backbone = run.task.backbone.fingerprint(model)
    meta = CheckpointMeta(0, 0, {"loss": 1.0}, {}, config_hash(config), config.recipe, backbone)
    save_checkpoint(run.path, meta, model, {})
    return run


def plain_loop(run: Run, folder: Path, out: Path, batch_size: int) -> None:
    """Loads the model, and encodes a folder's images, a batch after the other."""
    encoder, _ = load_encoder(run, run.best_checkpoint(), "cpu")
    paths, found = sorted(folder.iterdir()), []
    for start in range(0, len(paths), batch_size):
        images = [encoder.prepare(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
        found.append(encoder.encode_images(torch.stack(images)).numpy())
    np.savez(out, features=np.concatenate(found), image_paths=np.array(list(map(str, paths))))


def main() -> None:
    """Prints medians of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name, ray_cluster():
        place = Path(name)
        run = make_run(place / "runs")
        for count in (FEW, options.images):
            draw_images(place / f"{count}", count, options.side)
        ways = {"embed": partial(embed, settings=JobSettings()), "loop": partial(plain_loop, batch_size=64)}
        for number in range(options.rounds):
            for count in (FEW, options.images):
                for way, encode in ways.items():
                    begin = time.perf_counter()
                    encode(run, place / f"{count}", place / f"{way}-{count}-{number}.npz")
                    seconds.setdefault((way, count), []).append(time.perf_counter() - begin)
        one, other = (open_store(place / f"{way}-{options.images}-0.npz").vectors for way in ways)
    rates = {}
    for way in ways:
        few, many = (statistics.median(seconds[way, count]) for count in (FEW, options.images))
        rates[way] = (options.images - FEW) / (many - few)
        print(f"{way:5}  {rates[way]:6.1f} images/s; start and {FEW} images {few:.1f} s, {options.images} {many:.1f} s")
    print(
        f"ratio  {rates['embed'] / rates['loop']:.2f}; vectors differ by {float((one - other).abs().max()):.1e} at most"
    )


if __name__ == "__main__":
    main()
