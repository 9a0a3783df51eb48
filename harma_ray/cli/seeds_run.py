"""Runs of one setting with several seeds: those that are there already, and the table that they come to."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from harma_ray.config import RunConfig
from harma_ray.data.identity import require_same_data
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.files import output_path, write_text
from harma_ray.recipes import PUBLISHED, recipe_config
from harma_ray.report.seeds import SeedRuns, seeds_markdown
from harma_ray.runs import CONFIG_NAME, Run, open_run
from harma_ray.settings import config_hash, flat_settings, show_override, to_dict
from harma_ray.training.health import Finding
from harma_ray.training.run_files import list_checkpoints, read_meta

_NOT_COMPARED = ("recipe", "seed", "data.path", "scaling.", "started_from.")
"""Settings that are no deviation from a recipe."""


def begun_runs(runs: str | Path, configs: Mapping[str, RunConfig]) -> dict[str, Run]:
    """Returns those of some runs that are there already, by name; they must be runs of the same settings and data.

    Args:
        runs: Folder of all runs.
        configs: Settings by the runs' names; where the workers of one that goes on are others, these count.

    Raises:
        UserError: If one was made with other settings, or on other data.
    """
    found = {}
    for name, config in configs.items():
        path = output_path(runs) / name
        if not (path / CONFIG_NAME).is_file():
            continue
        run, way_out = open_run(path), "choose another --name"
        if config_hash(run.config) != config_hash(config):
            raise UserError(f"run {path} is there, but was made with other settings; {way_out}")
        checkpoints = list_checkpoints(path)
        if checkpoints:
            require_same_data(read_meta(checkpoints[-1]).data, config, subject=f"run {path}", way_out=way_out)
        found[name] = Run(path, config)
    return found


def print_seeds(runs: Sequence[Run], file: Path) -> None:
    """Prints each seed's figures, and mean and standard deviation as a table to paste, which a file holds too."""
    reports = [run.report or {} for run in runs]
    metrics = runs[0].task.metrics
    for split in reports[0]["metrics"]:
        rows = []
        for name in reports[0]["metrics"][split]:
            values = [report["metrics"][split][name] for report in reports]
            figures = (statistics.mean(values), statistics.stdev(values), *values)
            rows.append([name, *(metrics.show(name, value) for value in figures)])
        headers = [split, "mean", "std", *(f"seed {run.config.seed}" for run in runs)]
        align = ["left", *["right"] * (len(headers) - 1)]
        print("\n" + tabulate(rows, headers=headers, disable_numparse=True, colalign=align))
    text = seeds_markdown(_summary(runs, reports))
    write_text(file, text)
    print(f"\n{text}\nthis table  {file}")
    found = {
        run.path.name: [Finding.of(entry) for entry in report.get("health", [])]
        for run, report in zip(runs, reports, strict=True)
    }
    for name, findings in found.items():
        for finding in findings:
            print(f"WARNING    {name}: {finding.message}")
    for line in advice_lines([finding for findings in found.values() for finding in findings]):
        print(line)


def advice_lines(findings: Sequence[Finding]) -> list[str]:
    """Returns lines that tell what to try, each thing once."""
    advice = dict.fromkeys(text for finding in findings for text in finding.advice)
    return [f"{'' if number else 'try':10} {text}" for number, text in enumerate(advice)]


def _summary(runs: Sequence[Run], reports: Sequence[dict]) -> SeedRuns:
    config = runs[0].config
    path, splits = Path(config.data.path), list(reports[0]["metrics"])
    manifests = {split: open_split(path, split).manifest for split in splits}
    own, published = (flat_settings(to_dict(c)) for c in (config, recipe_config(config.recipe)))
    changed = [show_override(name, value) for name, value in own.items() if value != published.get(name)]
    return SeedRuns(
        recipe=config.recipe,
        data=path.name,
        seeds=[run.config.seed for run in runs],
        reports=reports,
        metrics=runs[0].task.metrics,
        num_texts={name: m.queries.rows if m.queries else m.captions for name, m in manifests.items()},
        changed=[text for text in changed if not text.startswith(_NOT_COMPARED)],
        published=PUBLISHED.get(config.recipe, ()),
    )
