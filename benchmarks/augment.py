"""The published augmentation image by image, on CPUs, against batch by batch, on a device: time, and equal pixels.

Of JPEG files of one size, decoded every time: CPU milliseconds an image before anything is sent, by turns; then what
the device takes for a batch, and what launching its work takes the host. Ends with status 1 if a pixel differs.

Run: python benchmarks/augment.py [--device cuda] [--batch 428] [--side 256] [--size 224] [--rounds 5]
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.batch_transforms import changed_batch, collate_cuts, cut_transform
from harma_ray.data.images import decode_stored
from harma_ray.data.transforms import PUBLISHED, train_transform


def draw_file(side: int, seed: int) -> bytes:
    """Returns a smooth picture with noise, as a JPEG file."""
    rng = np.random.default_rng(seed)
    few = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    pixels = np.asarray(few.resize((side, side), Image.Resampling.BICUBIC)) * 0.9 + rng.integers(0, 25, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def of_each(files: list[bytes], change: Callable[..., Any], size: int) -> tuple[list[Any], float]:
    """Returns what becomes of each image, and the CPU's milliseconds for one."""
    begin = time.process_time()
    made = [
        change(decode_stored(file), np.random.default_rng(seed), size, PUBLISHED) for seed, file in enumerate(files)
    ]
    return made, 1000 * (time.process_time() - begin) / len(files)


def on_device(batch: list[Tensor], size: int, device: str) -> tuple[Tensor, float, float]:
    """Returns the changed images, the milliseconds until they are there and until all work is launched."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def send(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device == "cuda" else tensor).to(device, non_blocking=True)

    images, sizes, changes = batch
    sent = send(images)
    wait()
    begin = time.perf_counter()
    result = changed_batch(sent, sizes, changes, size, PUBLISHED.level, send)
    launched = time.perf_counter() - begin
    wait()
    there = time.perf_counter() - begin
    return result.cpu(), 1000 * there, 1000 * launched


def compare(batch: int, side: int, size: int, device: str, rounds: int) -> bool:
    """Prints what both ways take; returns whether their pixels are equal."""
    files = [draw_file(side, seed) for seed in range(batch)]
    whole, cut, on = [], [], []
    good, held = True, 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(rounds):
        one_by_one, took = of_each(files, train_transform, size)
        whole.append(took)
        cuts, took = of_each(files, cut_transform, size)
        cut.append(took)
        result, *took = on_device([torch.from_numpy(values) for values in collate_cuts(cuts).values()], size, device)
        on.append(took)
        good &= torch.equal(result, torch.stack(one_by_one))
    median = statistics.median
    print(f"image by image: {median(whole):.2f} ms of a CPU an image; decoded and cropped alone: {median(cut):.2f} ms")
    there, launched = (median(times) for times in zip(*on, strict=True))
    name, peak = f"CPU, {torch.get_num_threads()} threads", ""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = f", with {(torch.cuda.max_memory_allocated() - held) / 2**20:.0f} MiB at most"
    print(f"{name}: a batch of {batch} in {there:.1f} ms, launched in {launched:.1f} ms{peak}")
    print("equal to the bit" if good else "NOT EQUAL", flush=True)
    return good


def main() -> None:
    """Draws, measures, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=428)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.exit(not compare(options.batch, options.side, options.size, options.device, options.rounds))


if __name__ == "__main__":
    main()
