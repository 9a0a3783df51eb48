"""Evaluations, told to a person."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from harma_ray.config import RunConfig
from harma_ray.data.identity import Identity, data_identity
from harma_ray.data.schema import open_split
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.exchange import load_model
from harma_ray.files import output_path, write_text
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import evaluate_on_workers
from harma_ray.preflight import absolute_paths
from harma_ray.recipes import make_task
from harma_ray.report.evaluation import comparison_section, comparison_table, results_table, write_report
from harma_ray.task import require_query
from harma_ray.training.checkpoint import META_NAME, list_checkpoints, read_meta
from harma_ray.training.step import default_place, evaluate_split
from harma_ray.training.tracking import read_records


def evaluate_and_print(
    config: RunConfig,
    file: str | None,
    *,
    split: str,
    json_file: str | None = None,
    report: str | None = None,
    num_workers: int = 1,
    address: str | None = None,
    query: str | None = None,
) -> dict[str, Any]:
    """Evaluates, prints a table with intervals and chance, writes JSON and the page if asked for.

    Args:
        config: Settings of the model and the data.
        file: A run's folder or another file of weights, see `harma_ray.exchange.load_model`; None = as built.
        split: Name of the split.
        json_file: Where the figures go.
        report: Folder of the page.
        num_workers: More than one need Ray.
        address: Cluster to join for that.
        query: Whose figures, of a model that knows several kinds of queries; None = its own, ``all`` = beside its own
            a table of all.

    Raises:
        UserError: If the weights, the split or the kind of queries does not fit.
    """
    config = absolute_paths(config)
    data, task = open_split(config.data.path, split), make_task(config)
    figures, folder = (output_path(path) if path else None for path in (json_file, report))
    if figures and not figures.parent.is_dir():
        raise UserError(f"the folder of `--json` {figures} does not exist")
    started = time.perf_counter()
    model = load_model(file, config)
    if query:
        require_query(task, model, query if query != "all" else next(iter(task.queries(model)), query))
    if num_workers > 1:
        with ray_cluster(address) as cluster:
            evaluation = evaluate_on_workers(config, file, split, cluster)
    else:
        place = default_place(config)
        evaluation = evaluate_split(task, config, model, split, place=place, reader=local_batches)
    by_query = evaluation.by_query
    if query and query != "all":
        evaluation = by_query[query]
    intervals, chance = evaluation.intervals(), evaluation.chance()
    kinds = {name: found.metrics for name, found in by_query.items()} if query == "all" else {}
    spreads = {name: by_query[name].intervals() for name in kinds}
    precision = config.train.eval_precision
    print(f"{data.path}: {data.describe()}, {precision}, {time.perf_counter() - started:.1f} s")
    if evaluation.note:
        print(evaluation.note)
    print(results_table(evaluation.metrics, intervals, chance))
    identity, trained_on = data_identity(config.data.path, [split])[split], _trained_on(file)
    if trained_on and trained_on.get(split, identity) != identity:
        print(f"notice: the run was begun on another `{split}` than this one")
    outcome: dict[str, Any] = {
        "split": split, "data": str(data.path), **identity, "weights": file, "trained_on": trained_on,
        "precision": precision, "metrics": evaluation.metrics,
        "interval_95": intervals, "chance": chance,
    }  # fmt: skip
    if evaluation.query:
        outcome["query"] = evaluation.query
    sections = evaluation.sections(data) if folder else []
    if kinds:
        print(f"\n{comparison_table(kinds, spreads)}")
        outcome["queries"] = {name: {"metrics": kinds[name], "interval_95": spreads[name]} for name in kinds}
        sections.insert(0, comparison_section(kinds, spreads))
    if figures:
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder:
        page = write_report(
            folder, title=f"{config.recipe} on {split}", sections=sections,
            subtitle="; ".join(filter(None, [
                f"{data.path.parent.name}/{split}: {data.describe()}", evaluation.note, f"measured in {precision}"
            ])),
            metrics=evaluation.metrics, intervals=intervals, chance=chance, model=model,
            settings=dataclasses.asdict(config), compared=task.metrics,
            records=list(read_records(Path(file))) if file else [],
        )  # fmt: skip
        print(f"report     {page}")
    return outcome


def _trained_on(file: str | None) -> Identity | None:
    """Returns the data of the run whose folder or checkpoint a file is; None if that is not known."""
    folder = Path(file or "").expanduser()
    checkpoints = [folder] if file and (folder / META_NAME).is_file() else list_checkpoints(folder) if file else []
    return (read_meta(checkpoints[-1]).data or None) if checkpoints else None
