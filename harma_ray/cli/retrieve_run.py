"""Retrieval by class between stores of vectors, as it is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harma_ray.errors import count, first_few
from harma_ray.evaluation import Section, show_figure
from harma_ray.files import figures_path, output_path, write_text
from harma_ray.report.by_class import Pictured, retrieval_sections
from harma_ray.report.evaluation import PAGE_NAME, FiguresTable
from harma_ray.report.page import paragraph, write_page
from harma_ray.retrieval.by_class import ByClassResult, ByClassRetrieval
from harma_ray.vectors.comparison import Method, Problem, Wanted, choose_methods, measure
from harma_ray.vectors.index import import_faiss
from harma_ray.vectors.pictures import find_pictures
from harma_ray.vectors.store import Store, open_store

_NOTE = (
    "In percent. Top-k: how many queries have an image of their class among the first k. mAP: mean over the queries of "
    "the average precision over the whole gallery. A confidence interval (CI) tells the spread over queries "
    "(bootstrap). Chance: rankings drawn at random."
)


def retrieve_and_print(
    query: str, gallery: str, wanted: Wanted, *, json_file: str | None = None, report: str | None = None
) -> None:
    """Searches, prints a table by method with intervals and chance, writes JSON and a page if asked for.

    Args:
        query: Store of the queries.
        gallery: Store of what is searched.
        wanted: What is compared.
        json_file: Where the figures go.
        report: Folder of the page.

    Raises:
        UserError: If the stores or what is wanted of them do not fit.
    """
    figures, folder = figures_path(json_file), output_path(report) if report else None
    if wanted.index != "exact":
        import_faiss()
    own = open_store(query)
    stores = own, (own if Path(gallery).expanduser().absolute() == own.path else open_store(gallery))
    problem = Problem.of(*stores)
    methods = choose_methods(problem, wanted)
    for line in _describe(problem, *stores):
        print(line)
    found = _measure_each(problem, methods, wanted, keep_best=folder is not None)
    intervals = {name: result.intervals() for name, result in found.results.items()}
    chance = found.results["plain"].chance()
    table = methods_table({name: result.metrics for name, result in found.results.items()}, intervals, chance)
    print(table)
    for line in found.lines():
        print(line)
    if figures:
        outcome = _outcome(problem, stores, wanted, found, intervals, chance)
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder and found.best:
        _write_page(folder, problem, stores, found.lines(), found.best, table)


@dataclass
class _Found:
    """What the methods found, by their names; a method may need a gallery in a space of its own, which is large."""

    results: dict[str, ByClassResult] = field(default_factory=dict)
    notes: dict[str, Sequence[str]] = field(default_factory=dict)
    """Of their indices."""
    best: tuple[str, ByClassRetrieval] | None = None
    """The method whose last figure is the highest, and its vectors, which no other keeps."""

    def lines(self) -> list[str]:
        """Returns the notes, each with the method's name."""
        return [f"{name}: {note}" for name, notes in self.notes.items() for note in notes]


def _measure_each(problem: Problem, methods: Sequence[Method], wanted: Wanted, *, keep_best: bool) -> _Found:
    found, highest = _Found(), -1.0
    for method in methods:
        retrieval, found.notes[method.name] = measure(problem, method, wanted)
        found.results[method.name] = retrieval.result
        figure = list(retrieval.result.metrics.values())[-1]
        if keep_best and figure > highest:
            found.best, highest = (method.name, retrieval), figure
        del retrieval  # before the next one needs memory
    return found


def _describe(problem: Problem, query: Store, gallery: Store) -> list[str]:
    same = "; each looks for the others" if query.path == gallery.path else ""
    classes = count(len(set(problem.classes.gallery.tolist())), "class")
    lines = [
        f"queries    {query.path}: {count(len(problem.queries), 'image')}{same}",
        f"gallery    {gallery.path}: {count(len(gallery), 'image')} of {classes}, width {gallery.vectors.shape[1]}",
    ]
    hidden = int((problem.excluded.sizes > 0).sum())
    unhashed = [store.path for store in (query, gallery) if not store.contents]
    if unhashed:
        lines.append(f"notice: {unhashed[0]} has no hashes of files: images of the same name are taken for the same")
    if hidden and not same:
        told = "the same name" if unhashed else "the same bytes"
        lines.append(f"notice: in the gallery too ({told}), which never find themselves: {count(hidden, 'query')}")
    if problem.left_out:
        left_out = f"{count(len(problem.left_out), 'image')} ({first_few(problem.left_out)})"
        lines.append(f"notice: no query, as the gallery has no other of the class: {left_out}")
    return lines


def methods_table(
    found: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    chance: Mapping[str, float],
) -> FiguresTable:
    """Returns the figures of several methods, a row each, and chance below them.

    Args:
        found: Metrics by method.
        intervals: Their 95 % intervals by method.
        chance: What metrics are expected to be.
    """

    def show(value: float) -> str:
        return show_figure(value, 1, percent=True)

    groups = [
        (
            "mAP" if name == "map" else f"Top-{name.removeprefix('top_')}",
            {
                "%": [*(show(metrics[name]) for metrics in found.values()), show(chance[name])],
                "95 % CI": [*("-".join(map(show, bounds[name])) for bounds in intervals.values()), ""],
            },
        )
        for name in chance
    ]
    return FiguresTable({"method": [*found, "chance"]}, groups)


def _outcome(
    problem: Problem,
    stores: tuple[Store, Store],
    wanted: Wanted,
    found: _Found,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    chance: Mapping[str, float],
) -> dict[str, Any]:
    identity = stores[1].identity
    return {
        "query": str(stores[0].path),
        "gallery": str(stores[1].path),
        "encoder": identity and dict(identity.values),
        "num_queries": len(problem.queries),
        "num_gallery": len(problem.gallery),
        "left_out": list(problem.left_out),
        "index": wanted.index,
        "chance": dict(chance),
        "methods": {
            name: {
                "metrics": result.metrics,
                "interval_95": dict(intervals[name]),
                "notes": list(found.notes[name]),
                "classes": {row.name: row.metrics for row in result.by_class()},
            }
            for name, result in found.results.items()
        },
    }


def _write_page(
    folder: Path,
    problem: Problem,
    stores: tuple[Store, Store],
    notes: Sequence[str],
    best: tuple[str, ByClassRetrieval],
    table: FiguresTable,
) -> None:
    """Writes the page of the best method and prints where it is."""
    name, retrieval = best
    readers = [find_pictures(store) for store in stores]
    missing = [reader for reader in readers if isinstance(reader, str)]
    reads = [reader for reader in readers if not isinstance(reader, str)]
    pictured = Pictured(*reads) if len(reads) == len(readers) else None
    why = f"Images are not shown: {missing[0]}." if missing else ""
    html = table.to_html() + "".join(map(paragraph, (_NOTE, *notes, f"Everything below is of: {name}.")))
    sections = retrieval_sections(retrieval, pictured, why)
    subtitle = "; ".join(_describe(problem, *stores))
    path = write_page(
        folder, PAGE_NAME, "Retrieval by class", subtitle, [Section("results", "Results", html), *sections]
    )
    if why:
        print(f"notice: the report shows no images: {missing[0]}")
    print(f"report     {path}")
