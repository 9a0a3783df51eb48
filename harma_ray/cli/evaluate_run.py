"""Evaluations, as they are printed."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harma_ray.config import RunConfig
from harma_ray.data.identity import Identity, split_identity
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import local_batches
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation, Section
from harma_ray.files import output_path, write_text
from harma_ray.import_export import load_model
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import evaluate_on_workers
from harma_ray.preflight import absolute_paths
from harma_ray.recipes import make_task
from harma_ray.report.evaluation import FiguresTable, comparison_table, results_table, write_report
from harma_ray.task import Task, require_query
from harma_ray.training.checkpoint import META_NAME, list_checkpoints, read_meta
from harma_ray.training.step import evaluate_split, local_worker
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
) -> None:
    """Evaluates, prints a table with intervals and chance, writes JSON and the page if asked for.

    Args:
        config: Settings of the model and the data.
        file: A run's folder or another file of weights, see `harma_ray.import_export.load_model`; None = as built.
        split: Name of the split.
        json_file: Where the figures go.
        report: Folder of the page.
        num_workers: More than one need Ray.
        address: Cluster to join for that.
        query: Whose figures, of a model that knows several kinds of queries; None = its own, ``all`` = a table too.

    Raises:
        UserError: If the weights, the split or the kind of queries does not fit.
    """
    config = absolute_paths(config)
    data, task = open_split(config.data.path, split), make_task(config)
    task.check_evaluated(data)
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
        evaluation = evaluate_split(task, config, model, split, worker=local_worker(config), loader=local_batches)
    compared = evaluation.by_query if query == "all" else {}
    evaluation = evaluation.by_query.get(query or "", evaluation)
    print(f"{data.path}: {data.describe()}, {config.train.eval_precision}, {time.perf_counter() - started:.1f} s")
    outcome, tables = _print_figures(evaluation, compared, task, data, file)
    if figures:
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder:
        print(f"report     {_write_page(folder, evaluation, tables, file, task, config, data, model)}")


def _print_figures(
    evaluation: Evaluation, compared: Mapping[str, Evaluation], task: Task, data: Split, file: str | None
) -> tuple[dict[str, Any], list[FiguresTable]]:
    """Prints the tables of an evaluation and, if there are several kinds of queries, of them; returns both."""
    config = task.config
    identity, trained_on = split_identity(data), _trained_on(file)
    outcome: dict[str, Any] = {
        "split": data.name,
        "data": str(data.path),
        **identity,
        "weights": file,
        "trained_on": trained_on,
        "precision": config.train.eval_precision,
        "metrics": evaluation.metrics,
        "interval_95": evaluation.intervals(),
        "chance": evaluation.chance(),
    }
    if evaluation.note:
        print(evaluation.note)
    tables = [results_table(task.metrics, evaluation.metrics, outcome["interval_95"], outcome["chance"])]
    print(tables[0])
    if trained_on and trained_on.get(data.name, identity) != identity:
        print(f"notice: the run was begun on another `{data.name}` than this one")
    if evaluation.query:
        outcome["query"] = evaluation.query
    if compared:
        outcome["queries"] = {
            name: {"metrics": found.metrics, "interval_95": found.intervals()} for name, found in compared.items()
        }
        kinds = outcome["queries"].items()
        metrics, intervals = ({name: kind[key] for name, kind in kinds} for key in ("metrics", "interval_95"))
        tables.append(comparison_table(task.metrics, metrics, intervals))
        print(f"\n{tables[1]}")
    return outcome, tables


def _write_page(
    folder: Path,
    evaluation: Evaluation,
    tables: Sequence[FiguresTable],
    file: str | None,
    task: Task,
    config: RunConfig,
    data: Split,
    model: nn.Module,
) -> Path:
    """Writes the page of an evaluation whose figures are known; returns its file."""
    compared = [Section("queries", "Kinds of queries", table.to_html()) for table in tables[1:]]
    about = f"{data.path.parent.name}/{data.name}: {data.describe()}"
    measured = f"measured in {config.train.eval_precision}"
    return write_report(
        folder,
        title=f"{config.recipe} on {data.name}",
        subtitle="; ".join(filter(None, [about, evaluation.note, measured])),
        results=tables[0],
        sections=[*compared, *evaluation.sections(data)],
        model=model,
        settings=dataclasses.asdict(config),
        metrics=task.metrics,
        records=list(read_records(Path(file))) if file else [],
    )


def _trained_on(file: str | None) -> Identity | None:
    """Returns the data of the run whose folder or checkpoint a file is; None if that is not known."""
    folder = Path(file or "").expanduser()
    checkpoints = [folder] if file and (folder / META_NAME).is_file() else list_checkpoints(folder) if file else []
    return (read_meta(checkpoints[-1]).data or None) if checkpoints else None
