"""The page of a search: the best setting, whether it holds, what the search cost, and figures of all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from harma_ray.errors import UserError
from harma_ray.report import page
from harma_ray.shell import launch_command
from harma_ray.tune.folder import BEST_NAME
from harma_ray.tune.report.confirmed import confirmed_section
from harma_ray.tune.report.drawing import label
from harma_ray.tune.report.figures import draw_curves, draw_history, draw_pareto
from harma_ray.tune.report.importance import MIN_TRIALS, importance, partial_parameters
from harma_ray.tune.report.parameter_figures import draw_importance, draw_parallel, draw_slices
from harma_ray.tune.report.scale import end_of_range, short_names, show, value_of
from harma_ray.tune.results import Axis, SearchResults, TrialResult
from harma_ray.tune.space.definition import Target

PAGE_NAME = "report.html"
FIGURES_FOLDER = "figures"
_STATES = ("complete", "stopped", "failed", "running")
_MAX_OPEN_ROWS = 30
_NO_VALUE = "–"


def write_search_report(results: SearchResults, folder: Path) -> Path:
    """Writes a page of what a search has found so far; it may still be running.

    The page holds its pictures and style itself and opens without a network; the figures lie beside it too.

    Args:
        results: The search.
        folder: Where to write; made if missing.

    Returns:
        Path of ``report.html``.

    Raises:
        UserError: If the folder cannot be written.
    """
    figures = {
        "history": draw_history(results),
        "importance": draw_importance(importance(results)),
        "parallel": draw_parallel(results),
        "slices": draw_slices(results),
        "curves": draw_curves(results),
        "pareto": draw_pareto(results),
    }
    sections = [
        ("best", "Best setting", _best_section(results, folder / BEST_NAME)),
        *([("confirmed", "Confirmed", confirmed_section(results))] if results.best is not None else []),
        ("cost", "Cost", _cost_section(results)),
        *_figure_sections(results, figures),
        ("trials", "Trials", _trials_section(results)),
    ]
    title = f"Search {results.folder.name}"
    top = page.heading(title, _subtitle(results), [(name, text) for name, text, _ in sections])
    text = page.document(title, [top, *(page.section(*parts) for parts in sections)])
    try:
        (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, data in figures.items():
            if data is not None:
                (folder / FIGURES_FOLDER / f"{name}.png").write_bytes(data)
        (folder / PAGE_NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder} ({error.strerror}); choose another folder") from error
    return folder / PAGE_NAME


def _subtitle(results: SearchResults) -> str:
    counts = {state: sum(trial.state == state for trial in results.trials) for state in _STATES}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none yet"
    metrics = " and ".join(f"{'highest' if o.maximize else 'lowest'} {label(o)}" for o in results.objectives)
    return (
        f"Recipe {results.recipe} on {results.data}, searched for the {metrics}; sampler {results.sampler}, scheduler "
        f"{results.scheduler}. {len(results.trials)} trials: {states}."
    )


def _best_section(results: SearchResults, file: Path) -> str:
    best, objective = results.best_trial, results.objectives[0]
    if best is None:
        return page.paragraph("No trial has come to a value yet.")
    published = next((trial for trial in results.trials if trial.number == 0), None)
    value = value_of(best)
    text = f"{label(objective)}: trial {best.number} ({best.state}) reached {_show_value(value, objective)}"
    if best.number == 0:
        text += ". It is the published setting itself; none that ran to its end was better."
    elif published is not None and published.state != "failed" and published.values:
        difference = _show_value(value - value_of(published), objective, sign=True)
        text += f", the published setting (trial 0) {_show_value(value_of(published), objective)}: {difference}."
    else:
        text += "; the published setting (trial 0) has no value to compare with."
    parts = [page.paragraph(text), _settings_table(results.axes, best, published)]
    parts += [page.paragraph(warning) for warning in _warn_of_ends(results.axes, best)]
    if file.is_file():
        command = launch_command("train", "--config", file, "--data", results.data)
        parts += [page.paragraph("To train with it:"), page.command(command)]
    if results.final:
        parts += [page.subsection(f"Final metrics of {results.final_title} (%)"), _final_table(results)]
    return "\n".join(parts)


def _settings_table(axes: Sequence[Axis], best: TrialResult, published: TrialResult | None) -> str:
    columns = [
        ("parameter", [axis.name for axis in axes]),
        ("published", [_show_parameter(axis, published) for axis in axes]),
        ("best", [_show_parameter(axis, best) for axis in axes]),
        ("range", [_show_range(axis) for axis in axes]),
    ]
    return page.table(columns, num_text_columns=len(columns))


def _warn_of_ends(axes: Sequence[Axis], best: TrialResult) -> list[str]:
    ends = {axis.name: end_of_range(axis, best.params[axis.name]) for axis in axes if axis.name in best.params}
    return [
        f"{name} lies at the {end} end of its range: a better value may lie outside. Widen the range."
        for name, end in ends.items()
        if end
    ]


def _final_table(results: SearchResults) -> str:
    groups = {**results.final, **({"before training": results.untrained} if results.untrained else {})}
    names = list(dict.fromkeys(name for metrics in results.final.values() for name in metrics))
    columns = [("metric", names)]
    for title, metrics in groups.items():
        columns.append((title, [f"{metrics[name]:.2f}" if name in metrics else _NO_VALUE for name in names]))
    table = page.table(columns, num_text_columns=1)
    if not results.untrained:
        return table
    split = next(iter(results.final))
    return f"{table}\n{page.paragraph(f'Before training: the model of the best setting as it was built, on {split}.')}"


def _cost_section(results: SearchResults) -> str:
    groups = {state: [trial for trial in results.trials if trial.state == state] for state in _STATES}
    groups = {state: trials for state, trials in groups.items() if trials} | {"all": list(results.trials)}
    columns = [
        ("trials", list(groups)),
        ("number", [str(len(trials)) for trials in groups.values()]),
        ("epochs trained", [f"{sum(trial.epochs for trial in trials):,.1f}" for trials in groups.values()]),
        ("hours of training", [f"{sum(trial.seconds for trial in trials) / 3600:,.2f}" for trials in groups.values()]),
    ]
    trained, planned = results.ended_epochs
    parts = [page.table(columns, num_text_columns=1, sum_row=True)]
    if planned:
        parts.append(
            page.paragraph(
                f"Without stopping, the complete and stopped trials would have trained {planned:,} epochs; they "
                f"trained {trained:,.1f}: the scheduler saved {100 * (1 - trained / planned):.1f} %."
            )
        )
    return "\n".join(parts)


def _figure_sections(results: SearchResults, figures: Mapping[str, bytes | None]) -> list[tuple[str, str, str]]:
    """Returns the sections of one picture each, with a note, or the reason why there is none."""
    objective = label(results.objectives[0])
    better = "highest" if results.objectives[0].maximize else "lowest"
    partial = partial_parameters(results)
    left_out = f" Left out, because not every trial has them: {', '.join(partial)}." if partial else ""
    stopped = "A stopped trial counts with the best it had reached."
    sections = [
        ("history", "History", f"{objective} of each trial. {stopped}", "No trial has come to a value yet."),
        ("importance", "Importance",
         "Share of the variance of the first objective that each parameter explains by itself (fANOVA on a random "
         f"forest). {stopped} With few trials the shares are rough.{left_out}",
         f"Needs at least {MIN_TRIALS} complete or stopped trials with different values, and two parameters that all "
         f"of them have.{left_out}"),
        ("parallel", "Parallel coordinates",
         f"Each line is a trial, complete or stopped; thick ones have the {better} values. A line passes through "
         "\u201cunused\u201d where the trial lacks the parameter. The worst tenth shares one colour.",
         "Needs two complete or stopped trials with different values."),
        ("slices", "Slices",
         "Each dot is a trial, complete or stopped; choices are spread sideways to show them all.",
         "Needs two complete or stopped trials."),
        ("curves", "Learning curves",
         f"{objective} over the epochs of each trial, of its first seed where it has several; the marks show where a "
         "trial ended.", "No trial has been evaluated yet."),
    ]  # fmt: skip
    if len(results.objectives) == 2:
        note = "No other complete trial beats those of the front in both objectives. Numbers are trials."
        sections.append(("pareto", "Two objectives", note, "No trial has come to a value yet."))
    return [(name, title, _picture(figures[name], title, note, why)) for name, title, note, why in sections]


def _picture(data: bytes | None, title: str, note: str, why_not: str) -> str:
    return page.paragraph(why_not) if data is None else f"{page.picture(data, title)}\n{page.paragraph(note)}"


def _trials_section(results: SearchResults) -> str:
    if not results.trials:
        return page.paragraph("No trial has begun yet.")
    trials = _best_first(results)
    columns = [
        ("trial", [_show_number(trial, results) for trial in trials]),
        ("state", [trial.state for trial in trials]),
    ]
    for index, objective in enumerate(results.objectives):
        cells = [_show_value(trial.values[index], objective) if trial.values else _NO_VALUE for trial in trials]
        columns.append((label(objective), cells))
    columns.append(("epochs", [f"{trial.epochs:g}" for trial in trials]))
    columns.append(("seconds", [f"{trial.seconds:,.0f}" for trial in trials]))
    shorts = short_names([axis.name for axis in results.axes])
    columns += [(shorts[axis.name], [_show_parameter(axis, trial) for trial in trials]) for axis in results.axes]
    content = page.table(columns, num_text_columns=2)
    if len(trials) > _MAX_OPEN_ROWS:
        content = page.folded(f"{len(trials)} trials", content)
    failed = [trial for trial in results.trials if trial.state == "failed"]
    if failed:
        reasons = [("trial", [str(t.number) for t in failed]), ("reason", [t.reason or "unknown" for t in failed])]
        table = page.table(reasons, num_text_columns=2)
        if len(failed) > _MAX_OPEN_ROWS:
            table = page.folded(f"{len(failed)} trials", table)
        content += f"\n{page.subsection('Why trials failed')}\n{table}"
    return content


def _best_first(results: SearchResults) -> list[TrialResult]:
    """Sorts the trials that count by value, then those that run, then those that failed."""
    merit = results.objectives[0].merit
    order = {"complete": 0, "stopped": 0, "running": 1, "failed": 2}
    return sorted(
        results.trials,
        key=lambda trial: (order[trial.state], -merit(value_of(trial)) if trial.values else math.inf, trial.number),
    )


def _show_number(trial: TrialResult, results: SearchResults) -> str:
    names = [*(["published"] if trial.number == 0 else []), *(["best"] if trial.number == results.best else [])]
    return f"{trial.number}\N{NO-BREAK SPACE}({', '.join(names)})" if names else str(trial.number)


def _show_value(value: float, objective: Target, *, sign: bool = False) -> str:
    digits = 0 if objective.metric in ("trainable_parameters", "seconds") else 2
    return f"{value:{'+' if sign else ''},.{digits}f}"


def _show_parameter(axis: Axis, trial: TrialResult | None) -> str:
    return show(trial.params[axis.name]) if trial is not None and axis.name in trial.params else _NO_VALUE


def _show_range(axis: Axis) -> str:
    if axis.choices is not None:
        return ", ".join(map(show, axis.choices))
    return f"{show(axis.low)} to {show(axis.high)}{', logarithmic' if axis.log else ''}"
