"""Seconds from the command to the first step of a training, by phase; against another checkout, taken in turn.

Python's byte code is written before, as a first command does where the environment lets it.

Run: python benchmarks/start.py [--against FOLDER] [--rounds 3] [--workers 2]
"""

import argparse
import compileall
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).resolve().parents[1]
PHASES = {
    "settings and data checked": "settings and data",
    "Ray is up": "Ray is up",
    "workers are being started": "starting ",
    "workers are up": "workers are up",
    "evaluated at step 0": "epoch 0 ",
    "first step": "first step",
}
"""What is reached, and how the line begins that says so."""
_LINE = re.compile(r"\[ *([0-9.]+) s\] (.*)")


def start(checkout: Path, data: Path, runs: Path, workers: int) -> list[float]:
    """Trains with a checkout's command up to the first step; returns when each phase was reached, in seconds."""
    command = [
        sys.executable, "launch.py", "train", "--recipe", "scenes-pretrain", "--data", str(data), "--runs", str(runs),
        "--workers", str(workers), "--set", "train.epochs=1000",
    ]  # fmt: skip
    told: list[tuple[str | Any, ...]] = []
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            told += [found.groups() for found in [_LINE.match(line)] if found]
            if told and told[-1][1].startswith("first step"):
                run.send_signal(signal.SIGINT)
                break
        run.stdout.read()
    return [next(float(at) for at, text in told if text.startswith(begin)) for begin in PHASES.values()]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    checkouts = [HERE, *([options.against.resolve()] if options.against else [])]
    for checkout in checkouts:
        compileall.compile_dir(checkout / "harma_ray", quiet=1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        drawn = ["convert", "scenes", "--style", "summer", "--counts", "200", "60", "60", "--out", str(data)]
        subprocess.run([sys.executable, "launch.py", *drawn], cwd=HERE, capture_output=True, check=True)
        found: dict[Path, list[list[float]]] = {checkout: [] for checkout in checkouts}
        for number in range(options.rounds):
            for checkout in checkouts if number % 2 == 0 else checkouts[::-1]:
                runs = Path(folder, f"runs{number}-{checkouts.index(checkout)}")
                found[checkout].append(start(checkout, data, runs, options.workers))
                print(f"{checkout}: first step after {found[checkout][-1][-1]:.1f} s", flush=True)
    medians = [[statistics.median(column) for column in zip(*found[checkout], strict=True)] for checkout in checkouts]
    ratios = [own / other for own, other in zip(medians[0], medians[-1], strict=True)]
    rows = [[phase, *times] for phase, *times in zip(PHASES, *medians, ratios, strict=True)]
    print(tabulate(rows, headers=["seconds until", *map(str, checkouts), "ratio"], floatfmt=("", ".1f", ".1f", ".2f")))


if __name__ == "__main__":
    main()
