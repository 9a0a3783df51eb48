"""Evaluations, as they are printed."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harma_ray.cli.evaluated import Evaluated, Source, about_section, kept_weights, require_comparable
from harma_ray.cli.header import start_line
from harma_ray.config import RunConfig
from harma_ray.data.identity import split_identity
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import local_batches
from harma_ray.evaluation import FIGURES, Evaluation, Section
from harma_ray.files import figures_path, output_path, write_text
from harma_ray.import_export import load_model
from harma_ray.on_ray.cluster import ray_cluster
from harma_ray.on_ray.workers import evaluate_on_workers
from harma_ray.recipes import make_task
from harma_ray.report.comparison import comparison_section, paired_differences, runs_table
from harma_ray.report.evaluation import FiguresTable, comparison_table, results_table, write_report
from harma_ray.runs import absolute_paths
from harma_ray.task import Task, require_query
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
    metric: str | None = None,
    compare: Sequence[str] = (),
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
        metric: What the checkpoints of runs are chosen by; None = their recipes' objective.
        compare: Folders of runs that are measured on the same split and compared with the model.

    Raises:
        UserError: If the weights, the split, the kind of queries or a run to compare with does not fit.
    """
    source = Source.find(absolute_paths(config), file, metric)
    data = open_split(source.config.data.path, split)
    sources = [source, *(source.beside(folder, metric) for folder in compare)]
    require_comparable(sources, data)
    figures, folder = figures_path(json_file), output_path(report) if report else None
    evaluated, compared = _measure_all(sources, split, query, num_workers, address)
    task = make_task(source.config)
    outcome, tables = _print_figures(evaluated[0].evaluation, compared, task, data, source)
    named = _named(evaluated)
    sections = [Section("queries", "Kinds of queries", table.to_html()) for table in tables[1:]]
    if compare:
        sections.append(_compare(named, task, data, outcome, show=folder is not None))
    if figures:
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder:
        print(f"report     {_write_page(folder, named, tables[0], sections, data)}")


def _measure_all(
    sources: Sequence[Source], split: str, query: str | None, num_workers: int, address: str | None
) -> tuple[list[Evaluated], Mapping[str, Evaluation]]:
    """Builds models and evaluates them; returns what they found and, for ``all``, what the first's other queries did.

    Arguments as of `evaluate_and_print`.
    """
    found, compared = [], {}
    with contextlib.ExitStack() as stack:
        kept = [(source, stack.enter_context(kept_weights(source))) for source in sources]
        for source, file in kept:
            config, started = source.config, time.perf_counter()
            model, evaluation = _measure(config, file, split, query, num_workers, address)
            data = open_split(config.data.path, split)
            seconds = f"{config.train.eval_precision}, {time.perf_counter() - started:.1f} s"
            who = f"{source.name} on " if len(sources) > 1 else ""
            print(f"{who}{data.path}: {data.describe()}, {seconds}", flush=True)
            compared = compared or (evaluation.by_query if query == "all" else {})
            found.append(Evaluated(source, model, evaluation.by_query.get(query or "", evaluation)))
    return found, compared


def _measure(
    config: RunConfig, file: str | None, split: str, query: str | None, num_workers: int, address: str | None
) -> tuple[nn.Module, Evaluation]:
    """Builds a model from a file and evaluates it. Arguments as of `evaluate_and_print`."""
    task, model = make_task(config), load_model(file, config)
    if query:
        require_query(task, model, query if query != "all" else next(iter(task.queries(model)), query))
    if num_workers == 1:
        return model, evaluate_split(task, config, model, split, worker=local_worker(config), loader=local_batches)
    with ray_cluster(address) as cluster:
        print(start_line(num_workers), flush=True)
        return model, evaluate_on_workers(config, file, split, cluster)


def _named(evaluated: Sequence[Evaluated]) -> dict[str, Evaluated]:
    """Returns models by their names, numbered where two have the same."""
    names = [found.source.name for found in evaluated]
    shown = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return dict(zip(shown, evaluated, strict=True))


def _compare(
    evaluated: Mapping[str, Evaluated], task: Task, data: Split, outcome: dict[str, Any], *, show: bool
) -> Section:
    """Prints how models differ, adds it to the outcome, and returns the part of a page about it, if it is to be shown.

    Raises:
        UserError: If two of them cannot be compared.
    """
    found = {name: one.evaluation for name, one in evaluated.items()}
    table = runs_table(task.metrics, found)
    (first_name, first), *others = found.items()
    print(f"\n{table}\ndifference: the figure of a run minus that of {first_name}, on the same queries")
    outcome["compared"] = {}
    for (name, other), one in zip(others, list(evaluated.values())[1:], strict=True):
        differences = paired_differences(first, other)
        outcome["compared"][name] = {
            "weights": one.source.file,
            "metrics": other.metrics,
            "difference": {metric: difference for metric, (difference, _) in differences.items()},
            "interval_95": {metric: interval for metric, (_, interval) in differences.items() if interval},
        }
    return comparison_section(table, found, data) if show else Section("comparison", "Comparison", "")


def _print_figures(
    evaluation: Evaluation, compared: Mapping[str, Evaluation], task: Task, data: Split, source: Source
) -> tuple[dict[str, Any], list[FiguresTable]]:
    """Prints the tables of an evaluation and, if there are several kinds of queries, of them; returns both."""
    config = task.config
    identity, trained_on = split_identity(data), source.checkpoint and (source.checkpoint.data or None)
    outcome: dict[str, Any] = {
        "split": data.name,
        "data": str(data.path),
        **identity,
        "weights": source.file,
        "trained_on": trained_on,
        "precision": config.train.eval_precision,
        **evaluation.figures(),
    }
    if evaluation.note:
        print(evaluation.note)
    tables = [results_table(task.metrics, *(outcome[key] for key in FIGURES))]
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
    folder: Path, evaluated: Mapping[str, Evaluated], results: FiguresTable, sections: Sequence[Section], data: Split
) -> Path:
    """Writes the page of the first of some models, whose figures are known; returns its file."""
    first = next(iter(evaluated.values()))
    source, evaluation = first.source, first.evaluation
    about = f"{data.path.parent.name}/{data.name}: {data.describe()}"
    return write_report(
        folder,
        title=f"{source.name} on {data.name}",
        subtitle="; ".join(filter(None, [f"recipe {source.config.recipe}", about, evaluation.note])),
        about=about_section(evaluated, data),
        results=results,
        sections=[*sections, *evaluation.sections(data)],
        model=first.model,
        settings=dataclasses.asdict(source.config),
        metrics=make_task(source.config).metrics,
        records=list(read_records(source.run.path)) if source.run else [],
    )
