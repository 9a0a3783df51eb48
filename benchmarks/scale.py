"""Cost against size: conversion of class folders to Parquet, and the ranking of images and captions.

Each beside the plain way: a loop that reads, decodes and writes the files, and the loops in which released code finds
ranks. Exponents are fitted to seconds by size; the picture shows both.

Run: python benchmarks/scale.py [--files 1000 4000 16000] [--side 256] [--images 1093 2000 4000 8000] [--out scale.png]
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from memory import MIB, Watch
from PIL import Image
from tabulate import tabulate

from harma_ray.data.convert.commands import convert_folder
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.tasks import map_with_ray
from harma_ray.retrieval.image_text import image_text_recalls

CLASSES = 20
PICTURES = 1000
"""Drawn; of more files, the others are these with a comment, so that no file is another's copy."""
SHARD = 64 * MIB
LOOPS_UP_TO = 2000
"""Images up to which the released loops are timed: their time grows with the square."""


def draw_files(folder: Path, number: int, side: int) -> None:
    """Writes JPEG files of side x side pixels into class folders: blocks of colour under noise."""
    pictures: list[bytes] = []
    for index in range(min(number, PICTURES)):
        generator = np.random.default_rng(index)
        blocks = generator.integers(256, size=(6, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + generator.integers(-24, 25, size=smooth.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=75)
        pictures.append(stream.getvalue())
    for index in range(number):
        picture, comment = pictures[index % PICTURES], f"{index:010d}".encode()
        place = folder / f"class_{index % CLASSES:02d}"
        place.mkdir(parents=True, exist_ok=True)
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (place / f"{index:06d}.jpg").write_bytes(picture[:2] + marker + picture[2:])


def convert_plainly(folder: Path, out: Path) -> None:
    """Reads, decodes and writes every file, one after another."""
    out.mkdir()
    rows: list[dict] = []
    held = shards = 0
    files = sorted(folder.glob("*/*.jpg"))
    for file in files:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            rows.append({"image": data, "label": file.parent.name, "width": image.width, "height": image.height})
        held += len(data)
        if held >= SHARD or file is files[-1]:
            pq.write_table(pa.Table.from_pylist(rows), out / f"{shards:05d}.parquet")
            rows, held, shards = [], 0, shards + 1


def rank_plainly(images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns the best rank of each image's own captions, and of each caption's own image: one sort for each."""
    scores = images @ texts.T
    own = [np.flatnonzero(image_of_text == index) for index in range(len(images))]
    to_text = [
        min(int(np.where(order == text)[0][0]) for text in own[index])
        for index, order in enumerate(np.argsort(-row) for row in scores)
    ]
    to_image = [int(np.where(np.argsort(-row) == image_of_text[index])[0][0]) for index, row in enumerate(scores.T)]
    return to_text, to_image


def seconds_of(run) -> float:
    """Returns how long a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure_conversion(sizes: list[int], side: int) -> list[list[float]]:
    """Returns files, seconds of the conversion, of the plain loop, and the peak memory of the former in MiB."""
    rows, settings = [], WriteSettings(map_tasks=map_with_ray)
    with tempfile.TemporaryDirectory() as name, ray_cluster(for_tasks=True):
        draw_files(Path(name, "first"), 200, side)
        convert_folder(Path(name, "first"), Path(name, "warm"), settings=settings)  # its tasks' processes stay
        for size in sizes:
            files, out = Path(name, f"files{size}"), Path(name, f"out{size}")
            draw_files(files, size, side)
            with Watch() as watch:
                own = seconds_of(lambda f=files, o=out, s=settings: convert_folder(f, o, settings=s))
            plain = seconds_of(lambda f=files: convert_plainly(f, Path(name, f"plain{f.name}")))
            rows.append([size, own, plain, watch.peak / MIB])
            print(f"{size} files: {own:.1f} s, plain loop {plain:.1f} s, peak {watch.peak / MIB:.0f} MiB", flush=True)
    return rows


def measure_ranking(sizes: list[int]) -> list[list[float]]:
    """Returns images, seconds of the exact ranking both ways, and of the released loops (nan where not timed)."""
    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        image_of_text = torch.arange(size).repeat_interleave(5)
        images = torch.nn.functional.normalize(torch.randn(size, 512, generator=generator), dim=1)
        noise = torch.randn(len(image_of_text), 512, generator=generator)
        texts = torch.nn.functional.normalize(images[image_of_text] + 0.2 * noise, dim=1)
        keys, found, plain, plain_seconds = torch.arange(len(texts)), [], [], float("nan")

        def rank(found=found, images=images, texts=texts, of=image_of_text, keys=keys):
            found.append(image_text_recalls(images, texts, of, keys))

        own = seconds_of(rank)
        if size <= LOOPS_UP_TO:
            arrays = images.numpy(), texts.numpy(), image_of_text.numpy()
            plain_seconds = seconds_of(lambda plain=plain, arrays=arrays: plain.append(rank_plainly(*arrays)))
            at_ten = [100 * float(np.mean(np.array(ranks) < 10)) for ranks in plain[0]]
            metrics = found[0].metrics
            if not np.allclose(at_ten, [metrics["txt_r10"], metrics["img_r10"]], atol=0.1):
                raise SystemExit(f"the loops find {at_ten}, the ranking {metrics}")
        rows.append([size, own, plain_seconds])
        print(f"{size} images, {len(texts)} captions: {own:.2f} s, loops {plain_seconds:.2f} s", flush=True)
    return rows


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Returns the slope of a line through logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw(conversion: list[list[float]], ranking: list[list[float]], out: Path) -> None:
    """Writes both curves, on logarithmic axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    parts = (
        (panels[0], conversion, "image files", "conversion", "plain loop"),
        (panels[1], ranking, "images, each with five captions", "exact ranking, both ways", "released loops"),
    )
    for axes, rows, size, title, plain in parts:
        for column, name, colour in ((1, title, "tab:blue"), (2, plain, "tab:gray")):
            points = [(row[0], row[column]) for row in rows if np.isfinite(row[column])]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            grows = f", size to the {exponent(list(x), list(y)):.2f}" if len(x) > 1 else ""
            axes.loglog(x, y, "o-", color=colour, label=f"{name}{grows}")
        axes.set_xlabel(size)
        axes.set_ylabel("seconds")
        axes.grid(which="both", alpha=0.3)
        axes.legend(loc="upper left", frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measures, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="*", default=[1000, 4000, 16000])
    parser.add_argument("--side", type=int, default=256, help="pixels of a file's side")
    parser.add_argument("--images", type=int, nargs="*", default=[1093, 2000, 4000, 8000])
    parser.add_argument("--out", type=Path, default=Path("scale.png"))
    options = parser.parse_args()
    ranking = measure_ranking(options.images)
    conversion = measure_conversion(options.files, options.side)
    print(tabulate(conversion, headers=["files", "seconds", "plain loop", "peak MiB"], floatfmt=".1f"))
    print(tabulate(ranking, headers=["images", "seconds", "released loops"], floatfmt=".2f"))
    for name, rows in (("conversion", conversion), ("ranking", ranking)):
        if len(rows) > 1:
            print(f"{name}: size to the {exponent([row[0] for row in rows], [row[1] for row in rows]):.2f}")
    draw(conversion, ranking, options.out)
    print(f"picture {options.out}")


if __name__ == "__main__":
    main()
