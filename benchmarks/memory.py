"""Peak memory of driver, Ray and workers while training on a small and on a ten times larger data set (Linux).

Memory is what the processes own: anonymous pages and shared memory (Ray's object store), each shared page counted once;
pages of files that the kernel may drop at any time are left out.

Run: python benchmarks/memory.py [--images 2000 20000] [--size 64] [--workers 2]
"""

import argparse
import os
import tempfile
import threading
from pathlib import Path

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import train
from harma_ray.preflight import prepare
from harma_ray.recipes import recipe_config
from harma_ray.runs import create_run
from harma_ray.settings import build_config

MIB = 2**20


def family(root: int) -> list[int]:
    """Returns a process and all its descendants."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def owned_bytes(pid: int) -> int:
    """Returns a process's anonymous and shared memory, shared pages divided by those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"]


def kind_of(pid: int) -> str:
    """Returns what a process is, by the title that Ray gives it."""
    if pid == os.getpid():
        return "driver"
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "Ray itself"
    if "RayTrainWorker" in title:
        return "training workers"
    if "ImplicitFunc" in title or "_run_in_tune" in title:
        return "trials"
    return "data tasks" if title.startswith(("ray::IDLE", "ray::ReadShards")) else "Ray itself"


class Watch:
    """Samples the memory of this process and its descendants until it is left."""

    def __enter__(self):
        """Starts sampling."""
        self.peak, self.peaks, self._done = 0, {}, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        """Stops sampling."""
        self._done.set()
        self._thread.join()

    def _run(self):
        while not self._done.wait(1.0):
            kinds: dict[str, list[int]] = {}
            for pid in family(os.getpid()):
                kinds.setdefault(kind_of(pid), []).append(owned_bytes(pid))
            self.peak = max(self.peak, sum(map(sum, kinds.values())))
            for kind, sizes in kinds.items():
                self.peaks[kind] = max(self.peaks.get(kind, (0, 0)), (sum(sizes), len(sizes)))


def main() -> None:
    """Trains an epoch on each data set, in clusters of their own, and prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for images in options.images:
            folder = Path(name) / str(images)
            with ray_cluster():
                convert_scenes(folder / "data", {"train": images, "val": 200}, style="winter", size=options.size)
            stored = sum(file.stat().st_size for file in (folder / "data" / "train").glob("*.parquet"))
            changes = {
                "model.pretrained": "random",
                "data.path": str(folder / "data"),
                "train.epochs": 1,
                "scaling.num_workers": options.workers,
            }
            config = build_config(recipe_config("harma-scenes"), changes)
            with ray_cluster() as cluster, Watch() as watch:
                run, prepared = create_run(folder, "run", config), prepare(config).on(cluster)
                report = train(run, prepared, cluster, on_record=lambda record: None)
            peaks.append(watch.peak)
            print(f"{images} images, {stored / MIB:.0f} MiB of shards, {report['steps']} steps")
            print(f"  peak of all processes   {watch.peak / MIB:6.0f} MiB")
            for kind, (size, count) in sorted(watch.peaks.items()):
                print(f"    {kind:20}  {size / MIB:6.0f} MiB in {count} processes")
            size = report["checkpoint_bytes"] / MIB
            print(f"  checkpoint              {size:6.1f} MiB, optimiser state included", flush=True)
    print(f"ratio of the last peak to the first: {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
