"""Retrieval by class between stores of vectors, as it is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError, first_few
from harma_ray.evaluation import Section, show_figure
from harma_ray.files import output_path, write_text
from harma_ray.report.by_class import Pictured, retrieval_sections
from harma_ray.report.evaluation import PAGE_NAME, FiguresTable
from harma_ray.report.page import paragraph, write_page
from harma_ray.vectors.comparison import Measured, Problem, Wanted, choose_methods, measure
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
    figures, folder = (output_path(path) if path else None for path in (json_file, report))
    if figures and not figures.parent.is_dir():
        raise UserError(f"the folder of `--json` {figures} does not exist")
    if wanted.index != "exact":
        import_faiss()
    own = open_store(query)
    stores = own, (own if Path(gallery).expanduser().absolute() == own.path else open_store(gallery))
    problem = Problem.of(*stores)
    methods = choose_methods(problem, wanted)
    for line in _describe(problem, *stores):
        print(line)
    found = {method.name: measure(problem, method, wanted) for method in methods}
    first = next(iter(found.values())).result
    intervals, chance = {name: each.result.intervals() for name, each in found.items()}, first.chance()
    table = methods_table({name: each.result.metrics for name, each in found.items()}, intervals, chance)
    print(table)
    notes = [f"{name}: {note}" for name, each in found.items() for note in each.notes]
    for note in notes:
        print(note)
    if figures:
        outcome = _outcome(problem, stores, wanted, found, intervals, chance)
        write_text(figures, json.dumps(outcome, indent=1))
        print(f"figures    {figures}")
    if folder:
        _write_page(folder, problem, stores, found, table, notes)


def _describe(problem: Problem, query: Store, gallery: Store) -> list[str]:
    same = "; each looks for the others" if query.path == gallery.path else ""
    classes = len(set(problem.classes.gallery.tolist()))
    lines = [
        f"queries    {query.path}: {len(problem.queries):,} images{same}",
        f"gallery    {gallery.path}: {len(gallery):,} images of {classes} classes, width {gallery.vectors.shape[1]}",
    ]
    hidden = int((problem.excluded.sizes > 0).sum())
    if hidden and not same:
        told = "the same bytes" if query.contents and gallery.contents else "the same name"
        lines.append(f"notice: {hidden:,} queries are in the gallery too ({told}) and do not find themselves")
    if problem.left_out:
        count, named = len(problem.left_out), first_few(problem.left_out)
        lines.append(f"notice: {count:,} images are no queries: the gallery has no other of their class ({named})")
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
    found: Mapping[str, Measured],
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
                "metrics": each.result.metrics,
                "interval_95": dict(intervals[name]),
                "notes": list(each.notes),
                "classes": {row.name: row.metrics for row in each.result.by_class()},
            }
            for name, each in found.items()
        },
    }


def _write_page(
    folder: Path,
    problem: Problem,
    stores: tuple[Store, Store],
    found: Mapping[str, Measured],
    table: FiguresTable,
    notes: Sequence[str],
) -> None:
    """Writes the page of the best method, by its last figure, and prints where it is."""
    names = list(found)
    best = max(names, key=lambda name: (list(found[name].result.metrics.values())[-1], -names.index(name)))
    readers = [find_pictures(store) for store in stores]
    missing = [reader for reader in readers if isinstance(reader, str)]
    reads = [reader for reader in readers if not isinstance(reader, str)]
    pictured = Pictured(*reads) if len(reads) == len(readers) else None
    why = f"Images are not shown: {missing[0]}." if missing else ""
    html = table.to_html() + "".join(map(paragraph, (_NOTE, *notes, f"Everything below is of: {best}.")))
    sections = retrieval_sections(found[best].retrieval, pictured, why)
    subtitle = "; ".join(_describe(problem, *stores))
    path = write_page(
        folder, PAGE_NAME, "Retrieval by class", subtitle, [Section("results", "Results", html), *sections]
    )
    if why:
        print(f"notice: the report shows no images: {missing[0]}")
    print(f"report     {path}")
