"""HarMA's training step on a GPU: held against the CPU in fp32, then timed against the released step.

Needs torch, torchvision and open_clip alone; the augmentation on the GPU is tried too (`augment`) where pyarrow and
pydantic are there as well. Ends with status 1 if a figure on the GPU is wrong.

Run: python benchmarks/gpu.py [--architectures ViT-B-32 ViT-L-14] [--batches 32 128 428] [--no-compile]
     [--no-check] [--ways released "bf16 trim compiled"] [--device cuda]
"""

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from released_step import ReleasedStep
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harma_ray.models.adapters import insert_adapters
from harma_ray.models.clip import DualEncoder
from harma_ray.models.losses import contrastive_loss, weighted_triplet_loss
from harma_ray.models.openclip import open_clip
from harma_ray.models.precision import attend_at_any_length
from harma_ray.models.recording import RecordedEncoder
from harma_ray.training.divergence import GuardedOptimizer

BOUNDS = {"fp32": 1e-4, "bf16": 4e-2}
"""Largest relative error of outputs, loss and gradients that passes."""


@functools.cache
def random_model(architecture: str) -> DualEncoder:
    """Returns random weights; adapters change what passes them, as after training."""
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    torch.manual_seed(0)
    clip = open_clip.create_model(architecture)
    logging.disable(logging.NOTSET)
    insert_adapters(clip)
    model = DualEncoder(clip)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".up.weight", ".l2.weight")):
                parameter.normal_(std=0.02)
    return model.train()


def new_model(architecture: str, device: str, text: str = "full") -> DualEncoder:
    """Returns a copy of the random weights on a device; captions are "full", padded to "trim", or "packed"."""
    model = copy.deepcopy(random_model(architecture)).to(device)
    model.text_tokens, model.packs_text = "full" if text == "full" else "trim", text == "packed"
    return model


@dataclass
class Pairs:
    """A batch on the CPU: what this package sends to the device, and what the released code sends."""

    image: Tensor
    """uint8."""
    text: Tensor
    ids: Tensor
    normalised: Tensor

    @classmethod
    def draw(cls, model: DualEncoder, size: int, seed: int, pin: bool) -> "Pairs":
        """Draws noise with captions as long as RSITMD's: 13.6 tokens on average, 95 % under 22, at most 39."""
        generator = torch.Generator().manual_seed(seed)
        visual: Any = model.clip.visual
        side = visual.image_size[0]
        image = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
        lengths = (torch.randn(size, generator=generator) * 4.7 + 13.6).round().long().clamp(5, 39)
        text = torch.randint(1, 49000, (size, 77), generator=generator)
        text[:, 0] = 49406
        text[torch.arange(77) >= lengths[:, None]] = 0
        text[torch.arange(size), lengths - 1] = 49407
        ids = torch.randint(size * 8, (size,), generator=generator)
        normalised = (image.float() / 255 - model.pixel_mean.cpu()) / model.pixel_std.cpu()
        batch = cls(image, text, ids, normalised)
        return cls(*(tensor.pin_memory() for tensor in vars(batch).values())) if pin else batch


class OwnStep:
    """The package's step, as its training loop takes it."""

    def __init__(self, model: DualEncoder, precision: str, quick: str = "", captions: int = 1):
        """Takes the model.

        Args:
            model: As it is; it may be compiled in place.
            precision: "fp32" or "bf16".
            quick: "recorded" passes, also with blocks that are "compiled"; "": neither.
            captions: Of each image; more than one are encoded with it once.
        """
        self.model, self.device, self.captions = model, model.temperature.device, captions
        if quick == "compiled":
            model.compile_blocks()
        self.forward = RecordedEncoder(model) if quick and self.device.type == "cuda" else model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=4e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.04, fused=True
        )
        self.guarded, self.number = GuardedOptimizer(self.optimizer, 0), 0
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        rough = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if rough else contextlib.nullcontext()

    def losses(self, batch: Pairs) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the model's outputs and the sum of both terms."""
        images = len(batch.image) // self.captions
        pairs = images * self.captions
        image, text = batch.image[:images].to(self.device, non_blocking=True), batch.text[:pairs]
        with self.autocast():
            found = self.forward(image, text.view(images, self.captions, -1) if self.captions > 1 else text)
            image, text = found["image"].repeat_interleave(self.captions, dim=0), found["text"].flatten(0, -2)
            same = torch.arange(images).repeat_interleave(self.captions) if self.captions > 1 else batch.ids
            ids = same.to(self.device, non_blocking=True)
            ranked = {"image_ids": ids, "same_image_negatives": False} if self.captions > 1 else {}
            loss = contrastive_loss(image, text, found["temperature"], ids)
            loss = loss + weighted_triplet_loss(image, text, **ranked)
        return found, loss

    def step(self, batch: Pairs) -> None:
        """Takes a step, its check of the loss and the gradients included."""
        _, loss = self.losses(batch)
        loss.backward()
        self.update(loss)

    def update(self, loss: Tensor) -> None:
        """Moves the weights by their gradients."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, float("inf"))
        self.number += 1
        self.guarded.step(self.number, {"loss": loss.detach()}, norm)
        self.optimizer.zero_grad(set_to_none=True)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected|."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def errors(step: OwnStep, expected: OwnStep, batch: Pairs) -> dict[str, float]:
    """Returns the relative errors of vectors, loss and all gradients, taken as one vector."""
    results = []
    for own in (step, expected):
        outputs, loss = own.losses(batch)
        loss.backward()
        gradient = torch.cat(
            [parameter.grad.flatten().cpu() for parameter in own.trained if parameter.grad is not None]
        )
        results.append({"image": outputs["image"], "text": outputs["text"], "loss": loss, "gradient": gradient})
        own.optimizer.zero_grad(set_to_none=True)
    return {name: relative(results[0][name], results[1][name]) for name in results[0]}


def check(architecture: str, device: str, compiled: bool) -> bool:
    """Prints how far the device is from the CPU's fp32; returns whether all is within bounds."""
    good = True
    print(f"{architecture}, batch 8: relative error against the CPU in fp32")
    for tokens in ("full", "trim", "packed"):
        plain = new_model(architecture, "cpu", "full" if tokens == "full" else "trim")
        batch = Pairs.draw(plain, 8, 0, pin=False)
        reference = OwnStep(plain, "fp32")
        quick = ("",) if tokens == "packed" else ("", "recorded", "compiled") if compiled else ("", "recorded")
        for precision, way in itertools.product(("fp32", "bf16"), quick):
            own = OwnStep(new_model(architecture, device, tokens), precision, way)
            error = errors(own, reference, batch)
            fits = all(value <= BOUNDS[precision] for value in error.values())
            good &= fits
            shown = "  ".join(f"{part} {value:.1e}" for part, value in error.items())
            print(f"  {tokens} {precision} {way:10} {shown}{'' if fits else '   WRONG'}", flush=True)
    own = OwnStep(new_model(architecture, "cpu"), "fp32")
    _, loss = own.losses(batch)
    released = ReleasedStep(new_model(architecture, "cpu"))
    error = relative(torch.stack(released.losses(batch.normalised, batch.text, batch.ids)).sum(), loss)
    print(f"  the released step's loss against this package's, CPU: {error:.1e}", flush=True)
    return good and error < 1e-5


def check_augmentation(device: str, batches: list[int]) -> bool:
    """Prints what the augmentation takes, on CPUs and on the device; returns whether the pixels are equal."""
    try:
        from augment import compare
    except ModuleNotFoundError as error:
        if error.name not in ("pyarrow", "pydantic"):
            raise
        print(f"THE AUGMENTATION IS NOT TRIED: there is no {error.name} here")
        return True
    equal = [compare(batch, 256, 224, device, rounds=3) for batch in batches]
    return all(equal)


def matrix_rate(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """Returns floating-point operations per second of a large matrix product of random numbers."""
    size = size if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: left @ right, device))


def timed(run: Callable[[], object], device: str, row: int = 1) -> list[float]:
    """Returns the seconds of a run in rows, each waited for at its end: three rows at least."""
    seconds = []
    while len(seconds) < 3 or (sum(seconds) * row < 1.5 and len(seconds) < 30):
        wait(device)
        begin = time.perf_counter()
        for _ in range(row):
            run()
        wait(device)
        seconds.append((time.perf_counter() - begin) / row)
    return seconds


def wait(device: str) -> None:
    """Waits until the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Row:
    """What one way of taking a step took."""

    seconds: list[float]
    pairs: int
    warm_up: float
    """Seconds of the first steps, compiling and recording included."""
    peak_gib: float
    flops: float


CAPTIONS = 5
"""Of an image, where they are grouped."""


def measure(way: str, architecture: str, batches: list[Pairs], device: str) -> Row:
    """Times a way of taking steps, over batches in turn."""
    tokens = next((name for name in ("trim", "packed") if name in way), "full")
    captions, size = CAPTIONS if "grouped" in way else 1, len(batches[0].ids)
    model, turn = new_model(architecture, device, tokens), itertools.cycle(batches)
    if way == "released":
        released = ReleasedStep(model)
        one = lambda batch: released.step(batch.normalised, batch.text, batch.ids)  # noqa: E731
        flops = flops_of(one, batches[0])
    else:
        precision = "bf16" if "bf16" in way else "fp32"
        flops = flops_of(OwnStep(model, precision, captions=captions).step, batches[0])
        quick = next((name for name in ("recorded", "compiled") if name in way), "")
        one = OwnStep(model, precision, quick, captions).step
    if device == "cuda":
        free_memory()
    begin = time.perf_counter()
    for _ in batches:
        one(next(turn))
    wait(device)
    warm_up = time.perf_counter() - begin
    seconds = timed(lambda: one(next(turn)), device, row=len(batches))
    peak = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else float("nan")
    return Row(seconds, size - size % captions, warm_up, peak, flops)


def free_memory() -> None:
    """Gives back what is not needed, earlier graphs among it, and counts the peak of memory from here on."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def flops_of(step: Callable[[Pairs], object], batch: Pairs) -> float:
    """Returns the floating-point operations of a step; torch's own operators are counted, oneDNN's are not."""
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def table(architecture: str, sizes: list[int], ways: list[str], device: str, rates: dict[str, float]) -> None:
    """Prints what each way took at each batch size, against the released step."""
    print("| model | batch | step | pairs/s (slowest-fastest) | times released | GiB | of matrix rate | first steps |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        batches = [Pairs.draw(random_model(architecture), size, seed, pin=device == "cuda") for seed in range(4)]
        released = None
        for way in ways:
            try:
                row = measure(way, architecture, batches, device)
            except torch.cuda.OutOfMemoryError:
                print(f"| {architecture} | {size} | {way} | out of memory | | | | |", flush=True)
                continue
            finally:
                if device == "cuda":
                    free_memory()
            median = statistics.median(row.seconds)
            rate = row.pairs / median
            released = released or (rate if way == "released" else None)
            ratio = f"{rate / released:.2f}" if released else ""
            share = row.flops / median / rates["bf16" if "bf16" in way else "fp32"]
            print(
                f"| {architecture} | {size} | {way} | {rate:,.0f} ({row.pairs / max(row.seconds):,.0f}-"
                f"{row.pairs / min(row.seconds):,.0f}) | {ratio} | {row.peak_gib:.1f} | {100 * share:.0f} % | "
                f"{row.warm_up:.1f} s |",
                flush=True,
            )


WAYS = ("released", "fp32", "fp32 trim", "fp32 trim recorded", "bf16", "bf16 trim", "bf16 packed", "bf16 recorded")
WAYS += ("bf16 trim recorded", "bf16 trim grouped recorded", "bf16 compiled", "bf16 trim compiled")
WAYS += ("bf16 trim grouped compiled",)
"""Of taking a step. Recorded: passes as CUDA graphs (``train.cuda_graphs``); compiled: block by block, and recorded."""


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 428])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here")
    attend_at_any_length(torch.device(options.device))
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    good = options.no_check or check(options.architectures[0], options.device, not options.no_compile)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {key: matrix_rate(options.device, dtype) for key, dtype in types.items()}
    print("matrix products, TFLOP/s: " + ", ".join(f"{key} {rate / 1e12:.1f}" for key, rate in rates.items()))
    ways = [way for way in options.ways if not (options.no_compile and "compiled" in way)]
    for architecture in options.architectures:
        table(architecture, options.batches, ways, options.device, rates)
    good &= options.no_check or check_augmentation(options.device, options.batches)
    sys.exit(not good)


if __name__ == "__main__":
    main()
