"""HarMA's training step in parts, against the released step and against its matrix products alone.

The floor is what the multiply-adds that must be done (no gradient of frozen weights, none below the first adapter, no
padding where captions are packed) take at the rate of the step's own matrix products, each shape timed by itself, by
MKL or oneDNN, whichever is faster. Steps are taken in turns on one batch in memory; CPU seconds are less disturbed by
other programs than seconds are, with one thread least.

Needs torch, torchvision and open_clip alone.

Run: python benchmarks/step.py [--architecture ViT-B-32] [--batches 16 32 64] [--threads 1] [--profile | --text]
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from gpu import OwnStep, Pairs, new_model, random_model, wait
from released_step import ReleasedStep
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from harma_ray.models.clip import DualEncoder
from harma_ray.models.kernels import linear

WAYS = ("released", "full", "trim", "packed")
"""The released step, and this package's with captions of 77 positions, cut to the longest, and without padding."""
PARTS = ("forward", "backward", "optimiser")
GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "convolution"),
    "attention": ("scaled_dot_product", "softmax"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "copies": ("copy_", "cat", "fill_", "zero_", "index", "embedding", "stack", "clone"),
    "optimiser": ("adam", "norm"),
}
"""What of torch's operators counts as what, by parts of their names; the first that fits."""


class Products(TorchDispatchMode):
    """Counts the matrix products that run, by the shapes of their factors."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operator."""
        if func._schema.name in ("aten::mm", "aten::addmm"):
            left, right = args[-2:]
            self.shapes[(*left.shape, right.shape[1])] += 1
        return func(*args, **kwargs or {})


class Ways:
    """The ways of taking a step that are compared, each in three parts."""

    def __init__(self, architecture: str, device: str, names: Sequence[str]):
        """Takes random weights, anew for each way."""
        self.released = ReleasedStep(new_model(architecture, device))
        own = [name for name in names if name != "released"]
        self.own = {name: OwnStep(new_model(architecture, device, name), "fp32") for name in own}
        self.device = device

    def parts(self, way: str, batch: Pairs) -> tuple[Callable[[], None], ...]:
        """Returns functions that run the forward pass, the backward pass and the update of a step."""
        held: list[Sequence[Tensor]] = []
        if way == "released":
            inputs = [x.to(self.device) for x in (batch.normalised, batch.text, batch.ids)]
            return (
                lambda: held.append(self.released.losses(*inputs)),
                lambda: (held[0][0] + held[0][1]).backward(),
                lambda: void(self.released.update(held.pop())),
            )
        own = self.own[way]
        return (
            lambda: held.append([own.losses(batch)[1]]),
            lambda: held[0][0].backward(),
            lambda: own.update(held.pop()[0]),
        )

    def take(self, way: str, batch: Pairs) -> tuple[list[float], float]:
        """Takes a step; returns the seconds of its parts, and CPU seconds."""
        seconds, cpu = [], time.process_time()
        for part in self.parts(way, batch):
            begin = time.perf_counter()
            part()
            wait(self.device)
            seconds.append(time.perf_counter() - begin)
        return seconds, time.process_time() - cpu

    def floor(self, way: str, batch: Pairs) -> float:
        """Returns the CPU seconds that a step's multiply-adds take."""
        own = torch.backends.mkldnn.flags(enabled=False)  # torch's own operators are counted, oneDNN's are not
        with own, FlopCounterMode(display=False) as flops, Products() as products:
            self.take(way, batch)
        done = sum(2 * rows * inner * columns * n for (rows, inner, columns), n in products.shapes.items())
        took = sum(product_seconds(*shape, device=self.device) * n for shape, n in products.shapes.items())
        return flops.get_total_flops() * took / done


def void(_: object) -> None:
    """Returns nothing."""


@torch.no_grad()
def product_seconds(rows: int, inner: int, columns: int, *, device: str) -> float:
    """Returns the least CPU seconds of a product of two matrices."""
    left, right = torch.randn(rows, inner, device=device), torch.randn(columns, inner, device=device)
    found = []
    for product in (lambda: left @ right.t(), lambda: linear(left, right)):
        for _ in range(4):
            begin = time.process_time()
            product()
            wait(device)
            found.append(time.process_time() - begin)
    return min(found)


def shares(ways: Ways, way: str, batch: Pairs) -> Mapping[str, float]:
    """Returns the shares of a step's time by kinds of operators."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        ways.take(way, batch)
    found: Counter[str] = Counter()
    for event in record.key_averages():
        kind = next((kind for kind, names in GROUPS.items() if any(name in event.key for name in names)), "the rest")
        found[kind] += event.self_cpu_time_total
    return {kind: taken / found.total() for kind, taken in found.most_common()}


def encode(model: DualEncoder, text: Tensor, groups: int) -> Tensor:
    """Returns captions' vectors, encoded in groups of about equal lengths."""
    order = text.argmax(dim=-1).argsort()
    found = torch.cat([model.encode_text(text[rows]) for rows in order.chunk(groups)])
    return found[order.argsort()]


def text_table(architecture: str, sizes: Sequence[int], rounds: int) -> None:
    """Prints what the text tower's passes, forward and backward, take by ways of leaving padding out."""
    ways = {"trimmed": (False, 1), "two groups": (False, 2), "four groups": (False, 4), "packed": (True, 1)}
    model = new_model(architecture, "cpu", "trim")
    print("| captions | " + " | ".join(ways) + " |, times trimmed, CPU seconds\n" + "|---" * (len(ways) + 1) + "|")
    for size in sizes:
        text = Pairs.draw(model, size, 0, pin=False).text
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, (model.packs_text, groups) in ways.items():
                begin = time.process_time()
                encode(model, text, groups).sum().backward()
                taken[name] += [time.process_time() - begin] if number else []
        ratios = ([one / own for one, own in zip(taken["trimmed"], taken[name], strict=True)] for name in ways)
        print(f"| {size} | " + " | ".join(spread(ratio) for ratio in ratios) + " |", flush=True)


def spread(values: Sequence[float]) -> str:
    """Returns the median, the smallest and the largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = as many as cores")
    parser.add_argument("--profile", action="store_true", help="say what a step's time goes to, by operators")
    parser.add_argument("--text", action="store_true", help="the text tower alone, by ways of leaving padding out")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.text:
        text_table(options.architecture, options.batches, options.rounds)
        return
    ways = Ways(options.architecture, "cpu", options.ways)
    print(
        f"{options.architecture}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians, least and most"
    )
    print("| batch | step | " + " | ".join(PARTS) + " | times released, seconds | CPU seconds | of the floor's rate |")
    print("|" + "---|" * (len(PARTS) + 5))
    for size in options.batches:
        model = random_model(options.architecture)
        batches = [Pairs.draw(model, size, seed, pin=False) for seed in range(options.rounds + 1)]
        names = dict.fromkeys(("released", *options.ways))
        taken: dict[str, list[tuple[list[float], float]]] = {name: [] for name in names}
        for number in range(options.rounds + 1):  # in turns: the machine may be slower at one time than at another
            for name in names:
                took = ways.take(name, batches[number])  # each of its own number of tokens, as in a training
                taken[name] += [took] if number else []  # the first step fills caches
        for name in names:
            parts = [statistics.median(seconds[part] for seconds, _ in taken[name]) for part in range(len(PARTS))]
            pairs = list(zip(taken["released"], taken[name], strict=True))
            wall = spread([sum(other[0]) / sum(own[0]) for other, own in pairs])
            cpu = spread([other[1] / own[1] for other, own in pairs])
            share = ways.floor(name, batches[0]) / statistics.median(cpu for _, cpu in taken[name])
            shown = " | ".join(f"{part:.2f} s" for part in parts)
            print(f"| {size} | {name} | {shown} | {wall} | {cpu} | {100 * share:.0f} % |", flush=True)
            if options.profile:
                found = shares(ways, name, batches[0])
                print(f"{name}: " + ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in found.items()))


if __name__ == "__main__":
    main()
