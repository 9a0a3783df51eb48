"""Whether the best setting holds: runs with fresh seeds, beside those of trial 0's setting."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from harma_ray.report import page
from harma_ray.tune.results import Confirmation, SearchResults
from harma_ray.tune.space.definition import Target


def confirmed_section(results: SearchResults) -> str:
    """Returns tables and sentences of the page on settings that were trained anew with several seeds."""
    if not results.confirmations:
        command = f"{results.resume_command} --confirm 3"
        text = (
            f"One run a setting proves nothing: the best of {len(results.measured)} trials is in part the luckiest. "
            f"To train the best and the {results.definition.first_name} setting with three fresh seeds:"
        )
        return page.paragraph(text) + page.command(command)
    names = list(dict.fromkeys(name for confirmation in results.confirmations for name in confirmation.metrics))
    shows = {name: partial(results.metrics.show, name.split(" ")[1]) for name in names}
    columns, groups = [("metric", names)], []
    for confirmation in results.confirmations:
        seeds = [(confirmation.metrics.get(name, ()), show) for name, show in shows.items()]
        columns += [("mean ± s.d.", [_mean_and_deviation(values, show) for values, show in seeds])]
        columns += [("each seed", [", ".join(map(show, values)) for values, show in seeds])]
        groups.append((confirmation.title, 2))
    parts = [page.table(columns, num_text_columns=1, groups=groups)]
    first = next((c for c in results.confirmations if c.number == 0), None)
    for other in results.confirmations:
        if first is not None and other.number != 0:
            parts += [page.paragraph(text) for text in _compare(other, first, results.objective)]
    parts.append(
        page.paragraph(
            "Seeds that the search had not seen. s.d.: sample standard deviation over them. Two equal settings of "
            "three seeds each come out more than 2 standard errors apart in about one comparison of nine."
        )
    )
    return "\n".join(parts)


def _compare(other: Confirmation, first: Confirmation, objective: Target) -> list[str]:
    """Says for each split how far the means of the objective lie apart, in standard errors."""
    shared = [name for name in other.metrics if first.metrics.get(name) and other.metrics[name]]
    texts = []
    for name in [name for name in shared if name.endswith(f" {objective.metric}")]:
        values, others = other.metrics[name], first.metrics[name]
        difference = statistics.fmean(values) - statistics.fmean(others)
        shown = objective.show(difference, sign=True) + (" points" if objective.maximize else "")
        text = f"{name}, {other.title} against {first.title}: the difference of {shown} is "
        errors = standard_errors(values, others)
        if errors is None:
            text += "of unknown worth, because its spread is unknown; confirm with more seeds."
        else:
            size = "larger" if abs(errors) > 1 else "not larger"
            text += f"{abs(errors):.1f} standard errors: {size} than the combined standard error."
        texts.append(text)
    return texts


def standard_errors(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns the difference of two means in units of its standard error (Welch's t).

    Returns:
        The statistic; None if either has fewer than two values, or if none of them varies.
    """
    if min(len(first), len(second)) < 2:
        return None
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (first, second)))
    return (statistics.fmean(first) - statistics.fmean(second)) / error if error else None


def _mean_and_deviation(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return "–"
    deviation = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{show(statistics.fmean(values))}{deviation}"
