"""What must hold between the parts of a search, each of which is right by itself."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import combinations, product
from typing import Any

from harma_ray.errors import UserError
from harma_ray.settings import explain_unknown
from harma_ray.tune.space.definition import COSTS, ORIGIN, SearchDefinition, Target
from harma_ray.tune.space.lines import Location
from harma_ray.tune.space.parameters import Choices, Parameter, Range, parents_first, quiet_optuna

Mistakes = Iterator[tuple[Location, str]]
"""Where a mistake stands in the file, and what it is."""

MAX_GRID = 10_000
"""Settings that the grid sampler takes on."""
_NUM_RANDOM_POINTS = 50


def find_mistakes(definition: SearchDefinition, known: Collection[str]) -> Mistakes:
    """Yields what does not fit together in a definition.

    Args:
        definition: Its parameters may lack some that have mistakes of their own.
        known: Names of all parameters, those too.
    """
    yield from _find_wrong_conditions(definition, known)
    yield from _find_wrong_enqueued(definition, known)
    yield from _find_wrong_sampler(definition)
    yield from _find_wrong_objectives(definition)
    yield from _find_wrong_units(definition)
    yield from _find_wrong_lengths(definition)
    yield from _find_refused_points(definition)


def _find_wrong_conditions(definition: SearchDefinition, known: Collection[str]) -> Mistakes:
    parameters = {parameter.name: parameter for parameter in definition.parameters}
    for name, parameter in parameters.items():
        for parent, values in parameter.when.items():
            where = ("space", name, "when", parent)
            if parent not in known:
                yield where, f"`when` must name a searched parameter, got `{parent}`; {explain_unknown(parent, known)}"
            elif parent in parameters:
                yield from ((where, text) for text in _find_impossible(parameters[parent], values))
    ordered = parents_first(definition.parameters)
    if circle := [name for name, parameter in parameters.items() if parameter not in ordered]:
        yield ("space", circle[0], "when"), f"`when` must not lead in a circle, got one among {', '.join(circle)}"


def _find_impossible(parent: Parameter, values: tuple[Any, ...]) -> Iterator[str]:
    if not parent.is_finite:
        yield f"`when` needs a parameter of separate values, got `{parent.name}` without them; give it a `step`"
        return
    for value in values:
        if parent.find(value) is None:
            yield f"`when` must name values that `{parent.name}` can have, got {value!r} and {parent}"


def _find_wrong_enqueued(definition: SearchDefinition, known: Collection[str]) -> Mistakes:
    parameters = {parameter.name: parameter for parameter in definition.parameters}

    def unpublished(point: Mapping[str, Any]) -> list[str]:
        return [name for name in point if parameters[name].find(definition.configured[name]) is None]

    missed = unpublished(definition.published)
    for name in missed:
        rule = "the default value must be in the space, because trial 0 is the default setting"
        way_out = "add it" if isinstance(parameters[name], Choices) else "widen the range or change its `step`"
        yield ("space", name), f"{rule}, got {definition.configured[name]} and {parameters[name]}; {way_out}"
    for index, start in enumerate(definition.enqueued):
        point = definition.complete(start)
        for name, value in start.items():
            where = ("start", index, name)
            if name not in known:
                yield where, f"`start` must name searched parameters, got `{name}`; {explain_unknown(name, known)}"
            elif name in parameters and parameters[name].find(value) is None:
                yield where, f"`{name}` of `start` must be in the space, got {value!r} and {parameters[name]}"
            elif name in parameters and name not in point:
                yield where, f"`{name}` does not exist beside the other values of this start; see its `when`"
        for name in unpublished(point):
            if name not in start and name not in missed:
                yield ("start", index), f"`{name}` must be given here, because its default value is not in the space"


def _find_wrong_sampler(definition: SearchDefinition) -> Mistakes:
    name, where = definition.sampler.name, ("sampler", "name")
    if name == "cmaes":
        numbers = [parameter for parameter in definition.parameters if isinstance(parameter, Range)]
        if len(numbers) < len(definition.parameters):
            yield where, "the sampler cmaes takes numbers only, but the space has choices; use tpe-multivariate"
        elif sum(not parameter.when for parameter in numbers) < 2:
            yield where, "the sampler cmaes needs at least two parameters without `when`; use tpe-multivariate"
        if len(definition.objectives) > 1:
            yield where, "the sampler cmaes has one objective, got two; use tpe-multivariate"
    if name == "grid":
        endless = [p for p in definition.parameters if isinstance(p, Range) and not (p.is_finite or p.points)]
        for parameter in endless:
            text = "the sampler grid needs `step` or `points` for a range of type float, got neither; add points: 5"
            yield ("space", parameter.name), text
        if not endless and (definition.size or MAX_GRID + 1) > MAX_GRID:
            yield where, f"the sampler grid takes at most {MAX_GRID} settings, the space has more; use tpe-multivariate"


def _find_wrong_objectives(definition: SearchDefinition) -> Mistakes:
    known = definition.config.metrics
    metrics, best_epoch = tuple(known.names), known.objective
    direction = "minimize" if best_epoch in known.lower_is_better else "maximize"
    names = [target.metric for target in definition.objectives]
    for index, target in enumerate(definition.objectives):
        where = ("objective", index, "metric")
        if target.metric not in (*metrics, *COSTS):
            text = f"unknown metric `{target.metric}`; {explain_unknown(target.metric, (*metrics, *COSTS))}"
            yield where, text
        elif target.metric in names[:index]:
            yield where, f"the objectives must differ, got `{target.metric}` twice"
        elif index == 0 and target != Target(metric=best_epoch, direction=direction):
            must = f"the first objective must be to {direction} {best_epoch}"
            rule = f"{must}, which picks the best epoch of every training"
            way_out = "put it second"
            if target.metric in metrics:
                way_out += f", or let it pick the best epoch: selection.criterion={target.metric}"
            yield where, f"{rule}, got {target.direction} {target.metric}; {way_out}"


def _find_wrong_units(definition: SearchDefinition) -> Mistakes:
    """Finds limits in epochs where steps are counted, and the other way round."""
    other = "epoch" if definition.unit == "step" else "step"
    why = "with" if definition.unit == "step" else "without"
    for section, key in (("scheduler", f"grace_{other}s"), ("limits", f"{other}s")):
        given = getattr(definition, section)
        if getattr(given, key) != getattr(type(given), key):
            own = key.replace(other, definition.unit)
            yield (section, key), f"{why} `train.steps` a search counts {definition.unit}s, got `{key}`; give `{own}`"


def _find_wrong_lengths(definition: SearchDefinition) -> Mistakes:
    units, length = f"{definition.unit}s", definition.length
    if definition.scheduler.name != "none" and definition.grace > length:
        rule = f"`grace_{units}` must not be above `train.{units}`, or no trial is ever stopped"
        text = f"{rule}, got {definition.grace} and {length}; lower it or use the scheduler none"
        yield ("scheduler", f"grace_{units}"), text
    needed = definition.trial_length
    if 0 < definition.budget < needed:
        rule = f"`{units}` must be enough for one whole trial (`train.{units}` times `seeds`)"
        yield ("limits", units), f"{rule}, got {definition.budget} and {needed}; raise it"


def _find_refused_points(definition: SearchDefinition) -> Mistakes:
    """Builds the settings at the ends of all parameters, of pairs of them, and at random points."""
    refusal = partial(_refusal, definition)
    refused: set[str] = set()
    for size in (1, 2):
        for group in combinations(definition.parameters, size):
            names = [parameter.name for parameter in group]
            points = product(*(parameter.ends for parameter in group))
            reasons = (refusal(dict(zip(names, point, strict=True))) for point in points)
            if refused.isdisjoint(names) and (reason := next(filter(None, reasons), None)):
                refused.update(names)
                yield ("space", names[0]), reason
    if not refused:
        yield from _find_refused_random_point(definition, refusal)


def _refusal(definition: SearchDefinition, values: Mapping[str, Any]) -> str | None:
    """Returns why published settings with these values are refused; None if not, or if they cannot meet."""
    parameters = {parameter.name: parameter for parameter in definition.parameters}
    wanted = dict(values)
    waiting = list(values)
    while waiting:  # what makes the values exist
        for parent, allowed in parameters[waiting.pop()].when.items():
            if parent in parameters and parent not in wanted:
                own = definition.configured[parent]
                wanted[parent] = own if own in allowed else allowed[0]
                waiting.append(parent)
    point = definition.complete(wanted)
    return _reason(definition, point, values) if values.keys() <= point.keys() else None


def _reason(definition: SearchDefinition, point: Mapping[str, Any], shown: Mapping[str, Any]) -> str | None:
    try:
        definition.settings(point)
    except UserError as error:
        values = ", ".join(f"{name} {value}" for name, value in shown.items())
        return f"every setting of the space must be valid, got {values}: {str(error).removeprefix(f'{ORIGIN}: ')}"
    return None


def _find_refused_random_point(
    definition: SearchDefinition, refusal: Callable[[Mapping[str, Any]], str | None]
) -> Mistakes:
    import optuna

    with quiet_optuna():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_NUM_RANDOM_POINTS):
            point = definition.suggest(study.ask())
            if text := _reason(definition, point, point):
                alone = ((name, found) for name, value in point.items() if (found := refusal({name: value})))
                name, found = next(alone, (None, text))
                yield ("space", name) if name else ("space",), found
                return
