"""Models that answered the same queries, side by side: differences with paired intervals, and queries that tell them
apart.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harma_ray.data.splits import Split
from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation, Metrics, Section
from harma_ray.report import page
from harma_ray.report.evaluation import FiguresTable
from harma_ray.retrieval.image_text import percentile_intervals

_MAX_SHOWN = 5
_NOTE = (
    "A difference is the figure of a run minus that of {first}, in points. The 95 % intervals are paired: both models "
    "are measured on the same queries, drawn again and again with replacement (bootstrap), so that what is hard for "
    "both cancels out. An interval without 0 tells the two apart on these queries; the spread over training seeds is "
    "not in it."
)


def paired_differences(first: Evaluation, other: Evaluation) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Returns how much more the other model has of each metric that both have, with the 95 % interval if it is known.

    The interval is of a paired bootstrap: a sample holds the same queries for both models, and of each sample the
    difference is taken.

    Raises:
        UserError: If the models were asked different numbers of queries.
    """
    _require_same_queries(first, other)
    samples, others = first.resampled(), other.resampled()
    intervals = percentile_intervals({name: others[name] - samples[name] for name in samples if name in others})
    shared = [name for name in first.metrics if name in other.metrics]
    return {name: (other.metrics[name] - first.metrics[name], intervals.get(name)) for name in shared}


def _require_same_queries(first: Evaluation, other: Evaluation) -> None:
    asked, others = ({kind: len(ranks) for kind, ranks in found.first_right().items()} for found in (first, other))
    different = [kind for kind in asked if others.get(kind, asked[kind]) != asked[kind]]
    if type(first) is not type(other) or not first.metrics.keys() & other.metrics.keys():
        raise UserError("runs of different kinds of retrieval have no figures to compare; give runs of one kind")
    if different:
        raise UserError(
            f"`--compare` needs runs that are asked the same, got {asked} and {others}; give --set so that they are"
        )


def runs_table(metrics: Metrics, evaluations: Mapping[str, Evaluation]) -> FiguresTable:
    """Returns the figures of several models, and the differences of all to the first.

    Args:
        metrics: The task's.
        evaluations: What each found, by its name; at least two.

    Raises:
        UserError: If two of them cannot be compared.
    """
    (first_name, first), *others = evaluations.items()
    found = {name: paired_differences(first, other) for name, other in others}
    names = [name for name in first.metrics if all(name in differences for differences in found.values())]

    def figures(evaluation: Evaluation) -> list[str]:
        return [metrics.show(name, evaluation.metrics[name], 1) for name in names]

    groups = [(first_name, {"figure": figures(first)})]
    for name, other in others:
        columns = {"figure": figures(other), "difference": [], "95 % CI": []}
        for metric in names:
            difference, interval = found[name][metric]
            columns["difference"].append(_signed(metrics, metric, difference))
            columns["95 % CI"].append(" to ".join(_signed(metrics, metric, bound) for bound in interval or ()))
        groups.append((name, columns))
    return FiguresTable({"metric": names, "": [metrics.label(name) for name in names]}, groups)


def _signed(metrics: Metrics, metric: str, difference: float) -> str:
    shown = metrics.show(metric, difference, 1)
    return shown if shown.startswith("-") else f"+{shown}"


def comparison_section(table: FiguresTable, evaluations: Mapping[str, Evaluation], split: Split) -> Section:
    """Returns the part of a page about several models: the table of `runs_table`, and queries that tell them apart.

    Raises:
        UserError: If an image cannot be read.
    """
    (first_name, first), *others = evaluations.items()
    parts = [table.to_html(), page.paragraph(_NOTE.format(first=first_name))]
    for name, other in others:
        parts += _apart(split, {first_name: first, name: other})
    return Section("comparison", "Comparison", "\n".join(parts))


def _apart(split: Split, pair: Mapping[str, Evaluation]) -> list[str]:
    """Returns, for each kind of query, how often one of two models has a right answer first, and some such queries."""
    (first_name, first), (name, other) = pair.items()
    ranks, others, parts = first.first_right(), other.first_right(), []
    for kind in (kind for kind in ranks if kind in others):
        parts.append(page.subsection(f"{kind.capitalize()}: {first_name} and {name}"))
        own, its = (found[kind] == 0 for found in (ranks, others))
        cells = [own & its, own & ~its, ~own & its, ~own & ~its]
        titles = ["both", f"{first_name} alone", f"{name} alone", "neither"]
        columns = [("a right answer first", titles), ("queries", [f"{int(cell.sum()):,}" for cell in cells])]
        parts.append(page.table(columns, num_text_columns=1))
        for winner, loser, lost in ((first_name, name, others[kind]), (name, first_name, ranks[kind])):
            chosen = _worst((own & ~its) if winner == first_name else (its & ~own), lost)
            if chosen:
                parts.append(_shown(split, kind, chosen, winner, loser, pair))
    return parts


def _worst(chosen: Tensor, ranks: Tensor) -> list[int]:
    """Returns the numbers of chosen queries, bool[Q], those with the largest rank first."""
    numbers = chosen.nonzero()[:, 0]
    return numbers[torch.argsort(ranks[numbers], descending=True, stable=True)].tolist()


def _shown(
    split: Split, kind: str, chosen: Sequence[int], winner: str, loser: str, pair: Mapping[str, Evaluation]
) -> str:
    content = []
    for name in (winner, loser):
        content += [page.paragraph(f"By {name}:"), pair[name].show_queries(split, kind, chosen, _MAX_SHOWN)]
    return page.folded(f"{winner} has a right answer first, {loser} has not: some queries", "\n".join(content))
