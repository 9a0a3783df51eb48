"""The page of a search: the best setting, whether it holds, what the search cost, and figures of all trials."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from harma_ray.errors import count
from harma_ray.evaluation import Section
from harma_ray.report import page
from harma_ray.shell import launch_command
from harma_ray.tune.folder import BEST_NAME
from harma_ray.tune.report.confirmed import confirmed_section
from harma_ray.tune.report.drawing import label
from harma_ray.tune.report.figures import draw_curves, draw_history, draw_pareto
from harma_ray.tune.report.importance import TRIALS_PER_PARAMETER, importance, partial_parameters, whole_parameters
from harma_ray.tune.report.parameter_figures import draw_importance, draw_parallel, draw_slices
from harma_ray.tune.report.scale import end_of_range, short_names, show
from harma_ray.tune.results import SearchResults, State, TrialResult
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.space.parameters import Choices, Parameter

PAGE_NAME = "report.html"
FIGURES_FOLDER = "figures"
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
    best = _best_section(results, folder / BEST_NAME)
    sections = [
        Section("best", "Best setting", best),
        *([Section("confirmed", "Confirmed", confirmed_section(results))] if results.best_trial else []),
        Section("cost", "Cost", _cost_section(results)),
        *_figure_sections(results),
        Section("trials", "Trials", _trials_section(results)),
    ]
    return page.write_page(folder, PAGE_NAME, f"Search {results.folder.name}", _subtitle(results), sections)


def _subtitle(results: SearchResults) -> str:
    search = results.definition
    metrics = " and ".join(f"{'highest' if o.maximize else 'lowest'} {label(o)}" for o in search.objectives)
    return (
        f"Recipe {search.config.recipe} on {search.config.data.path}, searched for the {metrics}; sampler "
        f"{search.sampler.name}, scheduler {_show_scheduler(search)}. {count(len(results.trials), 'trial')}: "
        f"{results.counts or 'none yet'}."
    )


def _show_scheduler(search: SearchDefinition) -> str:
    """Returns the scheduler's name, and the settings that it makes use of."""
    scheduler = search.scheduler
    halving = f"grace {search.grace}, reduction {scheduler.reduction_factor:g}"
    details = {
        "asha": f" ({halving})",
        "hyperband": f" ({halving}, {scheduler.brackets} brackets)",
        "median": f" (grace {search.grace})",
    }
    return scheduler.name + details.get(scheduler.name, "")


def _best_section(results: SearchResults, file: Path) -> str:
    best, objective, first = results.best_trial, results.objective, results.published
    if best is None:
        return page.paragraph("No trial has come to a value yet.")
    name = results.definition.first_name
    text = f"{label(objective)}: trial {best.number} ({best.state}) reached {objective.show(best.value)}"
    if best.number == 0:
        text += f". It is the {name} setting itself; none that ran to its end was better."
    elif first is not None and first.state != "failed" and first.values:
        difference = objective.show(best.value - first.value, sign=True)
        text += f", the {name} setting (trial 0) {objective.show(first.value)}: {difference}."
    else:
        text += f"; the {name} setting (trial 0) has no value to compare with."
    searched = results.definition.parameters
    parts = [page.paragraph(text), _settings_table(results, best)]
    parts += [page.paragraph(warning) for warning in _warn_of_ends(searched, best)]
    if file.is_file():
        command = launch_command("train", "--config", file, "--data", results.definition.config.data.path)
        parts += [page.paragraph("To train with it:"), page.command(command)]
    if results.final:
        unit = "" if results.metrics.lower_is_better else " (%)"
        parts += [page.subsection(f"Final metrics of {results.final_title}{unit}"), _final_table(results)]
    return "\n".join(parts)


def _settings_table(results: SearchResults, best: TrialResult) -> str:
    searched = results.definition.parameters
    columns = [
        ("parameter", [parameter.name for parameter in searched]),
        (results.definition.first_name, [_show_parameter(parameter, results.published) for parameter in searched]),
        ("best", [_show_parameter(parameter, best) for parameter in searched]),
        ("range", [_show_range(parameter) for parameter in searched]),
    ]
    return page.table(columns, num_text_columns=len(columns))


def _warn_of_ends(searched: Sequence[Parameter], best: TrialResult) -> list[str]:
    ends = {p.name: end_of_range(p, best.params[p.name]) for p in searched if p.name in best.params}
    return [
        f"{name} lies at the {end} end of its range: a better value may lie outside. Widen the range."
        for name, end in ends.items()
        if end
    ]


def _final_table(results: SearchResults) -> str:
    groups = {**results.final, **({"before training": results.baseline} if results.baseline else {})}
    names = list(dict.fromkeys(name for metrics in results.final.values() for name in metrics))
    kinds, intervals = results.metrics, results.beside.get("interval_95", {})
    columns = [("metric", names)]
    for title, found in groups.items():
        columns.append((title, [kinds.show(name, found[name]) if name in found else _NO_VALUE for name in names]))
        if bounds := intervals.get(title):
            shown = ("-".join(kinds.show(name, end) for end in bounds.get(name, ())) for name in names)
            columns.append(("95 % CI", [text or _NO_VALUE for text in shown]))
    table = page.table(columns, num_text_columns=1)
    if not results.baseline:
        return table
    split, start = next(iter(results.final)), results.definition.config.started_from
    model = start.title if start.weights else "the model of the best setting as it was built"
    return f"{table}\n{page.paragraph(f'Before training: {model}, on {split}.')}"


def _cost_section(results: SearchResults) -> str:
    groups = {state: [trial for trial in results.trials if trial.state == state] for state in get_args(State)}
    groups = {state: trials for state, trials in groups.items() if trials} | {"all": list(results.trials)}
    units, digits = ("steps", 0) if results.definition.unit == "step" else ("epochs", 1)
    columns = [
        ("trials", list(groups)),
        ("number", [str(len(trials)) for trials in groups.values()]),
        (f"{units} trained", [f"{sum(trial.trained for trial in trials):,.{digits}f}" for trials in groups.values()]),
        ("hours of training", [f"{sum(trial.seconds for trial in trials) / 3600:,.2f}" for trials in groups.values()]),
    ]
    trained, planned = results.ended_training
    parts = [page.table(columns, num_text_columns=1, sum_row=True)]
    if planned:
        parts.append(
            page.paragraph(
                f"Without stopping, the complete and stopped trials would have trained {planned:,} {units}; they "
                f"trained {trained:,.{digits}f}: the scheduler saved {100 * (1 - trained / planned):.1f} %."
            )
        )
    return "\n".join(parts)


def _figure_sections(results: SearchResults) -> list[Section]:
    """Returns the sections of one picture each, with a note, or the reason why there is none."""
    objective = label(results.objective)
    better = "highest" if results.objective.maximize else "lowest"
    partial = partial_parameters(results)
    left_out = f" Left out, because not every trial has them: {', '.join(partial)}." if partial else ""
    needed = TRIALS_PER_PARAMETER * len(whole_parameters(results))
    stopped = "A stopped trial counts with the best it had reached."
    sections = [
        ("history", "History", draw_history(results),
         f"{objective} of each trial. {stopped}", "No trial has come to a value yet."),
        ("importance", "Importance", draw_importance(importance(results)),
         "Share of the variance of the first objective that each parameter explains by itself (fANOVA on a random "
         f"forest). {stopped} A share of a few percent may be chance.{left_out}",
         f"Left out: shares mean little with fewer than ten complete or stopped trials a parameter (a rule of Loeppky, "
         f"Sacks and Welch, Technometrics 51, 2009), which are {needed} here; there are {len(results.measured)}. They "
         f"also need different values, and two parameters that all trials have.{left_out}"),
        ("parallel", "Parallel coordinates", draw_parallel(results),
         f"Each line is a trial, complete or stopped; thick ones have the {better} values. A line passes through "
         "\u201cunused\u201d where the trial lacks the parameter. The worst tenth shares one colour.",
         "Needs two complete or stopped trials with different values."),
        ("slices", "Slices", draw_slices(results),
         "Each dot is a trial, complete or stopped; choices are spread sideways to show them all.",
         "Needs two complete or stopped trials."),
        ("curves", "Learning curves", draw_curves(results),
         f"{objective} over the {results.definition.unit}s of each trial, of its first seed where it has several; the "
         "marks show where a trial ended.", "No trial has been evaluated yet."),
    ]  # fmt: skip
    if len(results.definition.objectives) == 2:
        note = "No other complete trial beats those of the front in both objectives. Numbers are trials."
        sections.append(("pareto", "Two objectives", draw_pareto(results), note, "No trial has come to a value yet."))
    return [_picture_section(*section) for section in sections]


def _picture_section(name: str, title: str, png: bytes | None, note: str, why_not: str) -> Section:
    if png is None:
        return Section(name, title, page.paragraph(why_not))
    html = f"{page.picture(png, title)}\n{page.paragraph(note)}"
    return Section(name, title, html, {f"{FIGURES_FOLDER}/{name}.png": png})


def _trials_section(results: SearchResults) -> str:
    if not results.trials:
        return page.paragraph("No trial has begun yet.")
    trials = _best_first(results)
    columns = [
        ("trial", [_show_number(trial, results) for trial in trials]),
        ("state", [trial.state for trial in trials]),
    ]
    for index, objective in enumerate(results.definition.objectives):
        cells = [objective.show(trial.values[index]) if trial.values else _NO_VALUE for trial in trials]
        columns.append((label(objective), cells))
    columns.append((f"{results.definition.unit}s", [f"{trial.trained:.9g}" for trial in trials]))
    columns.append(("seconds", [f"{trial.seconds:,.0f}" for trial in trials]))
    searched = results.definition.parameters
    shorts = short_names([parameter.name for parameter in searched])
    columns += [(shorts[p.name], [_show_parameter(p, trial) for trial in trials]) for p in searched]
    content = page.table(columns, num_text_columns=2)
    if len(trials) > _MAX_OPEN_ROWS:
        content = page.folded(count(len(trials), "trial"), content)
    failed = [trial for trial in results.trials if trial.state == "failed"]
    if failed:
        reasons = [("trial", [str(t.number) for t in failed]), ("reason", [t.reason or "unknown" for t in failed])]
        table = page.table(reasons, num_text_columns=2)
        if len(failed) > _MAX_OPEN_ROWS:
            table = page.folded(count(len(failed), "trial"), table)
        content += f"\n{page.subsection('Why trials failed')}\n{table}"
    return content


def _best_first(results: SearchResults) -> list[TrialResult]:
    """Sorts the trials that count by value, then those that run, then those that failed."""
    merit = results.objective.merit
    order = {"complete": 0, "stopped": 0, "running": 1, "failed": 2}
    return sorted(
        results.trials,
        key=lambda trial: (order[trial.state], -merit(trial.value) if trial.values else math.inf, trial.number),
    )


def _show_number(trial: TrialResult, results: SearchResults) -> str:
    first = results.definition.first_name
    names = [*([first] if trial.number == 0 else []), *(["best"] if trial.number == results.best else [])]
    return f"{trial.number}\N{NO-BREAK SPACE}({', '.join(names)})" if names else str(trial.number)


def _show_parameter(parameter: Parameter, trial: TrialResult | None) -> str:
    return show(trial.params[parameter.name]) if trial and parameter.name in trial.params else _NO_VALUE


def _show_range(parameter: Parameter) -> str:
    if isinstance(parameter, Choices):
        return ", ".join(map(show, parameter.choices))
    return f"{show(parameter.low)} to {show(parameter.high)}{', logarithmic' if parameter.log else ''}"
