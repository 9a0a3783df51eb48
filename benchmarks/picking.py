"""How much picking the best epoch on test flatters: runs that kept every epoch, evaluated on val and on test.

Run: python launch.py train ... --set train.keep_checkpoints=1000 --seeds 0,1,2 --name NAME
     python benchmarks/picking.py runs/NAME-seed0 runs/NAME-seed1 runs/NAME-seed2 [--metric r_mean]
"""

import argparse
import statistics

from tabulate import tabulate

from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.runs import Run, open_run
from harma_ray.training.run_files import list_checkpoints, read_meta, read_records
from harma_ray.training.step import evaluate_split, local_worker


def figures(run: Run, metric: str) -> list[dict[str, float]]:
    """Returns val's and test's figure of each checkpoint of a run."""
    task, config, worker = run.task, run.config, local_worker(run.config)
    evaluated = [record["step"] for record in read_records(run.path) if record["kind"] == "evaluation"]
    if [read_meta(path).step for path in list_checkpoints(run.path)] != evaluated:
        raise UserError(f"{run.path} has not kept what it evaluated; train it with train.keep_checkpoints=1000")
    found = []
    for checkpoint in list_checkpoints(run.path):
        model = run.load_checkpoint(checkpoint)
        outcomes = {
            split: evaluate_split(task, config, model, split, worker=worker, loader=local_batches)
            for split in ("val", "test")
        }
        found.append({split: outcome.metrics[metric] for split, outcome in outcomes.items()})
    return found


def main() -> None:
    """Evaluates and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--metric", default="r_mean")
    options = parser.parse_args()
    rows, flattered = [], []
    for name in options.runs:
        known = figures(open_run(name), options.metric)
        on_val = max(known, key=lambda epoch: epoch["val"])["test"]
        on_test = max(epoch["test"] for epoch in known)
        flattered.append(on_test - on_val)
        rows.append([name, len(known), on_val, on_test, on_test - on_val])
    print(tabulate(rows, floatfmt=".2f", headers=["run", "epochs", "test: best by val", "best by test", "flatters by"]))
    print(f"test {options.metric} flattered by {statistics.mean(flattered):.2f} (mean of {len(rows)} runs)")


if __name__ == "__main__":
    main()
