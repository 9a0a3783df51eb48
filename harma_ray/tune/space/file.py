"""The file that describes a search: read with all its mistakes listed at once, and written."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from harma_ray.config import RunConfig, SharedByTrials, TrainConfig
from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics
from harma_ray.recipes import RECIPES, recipe_config
from harma_ray.settings import build_config, explain_unknown, flat_settings, load_yaml, marked_settings, to_dict
from harma_ray.tune.space.checks import find_mistakes
from harma_ray.tune.space.definition import COSTS, Limits, Sampler, Scheduler, SearchDefinition, Target
from harma_ray.tune.space.lines import Location, YamlFile, dump_yaml
from harma_ray.tune.space.parameters import Choices, Parameter, Range

_KEYS = ("recipe", "fixed", "space", "start", "sampler", "scheduler", "objective", "limits", "seeds", "concurrent",
         "storage", "study")  # fmt: skip
_SAME_FOR_ALL = {
    "train.epochs": "trials are compared, stopped and counted by epochs",
    "train.steps": "trials are compared, stopped and counted by steps",
    "train.eval_every_epochs": "trials report every epoch",
    "train.eval_every_steps": "trials report after equally many steps",
    "train.select_on": "trials are compared on one split",
    "train.early_stopping_patience": "the scheduler decides who is stopped early",
    "train.threads": "it changes how fast a trial is, not how good",
}
"""Settings of `train` that are no part of what is compared, and why."""
_DEFAULT_LIMITS = Limits(trials=20)
_PARAMETER = TypeAdapter[Parameter](Parameter)


def load_search(path: str | Path, *, overrides: Mapping[str, Any] = {}) -> SearchDefinition:
    """Reads the description of a search.

    Args:
        path: YAML file; ``search_spaces`` has examples.
        overrides: Settings of the command line by dotted name: like the file's `fixed` ones, but they win.

    Raises:
        UserError: Listing all mistakes, each with its line and column.
    """
    file = YamlFile(path)
    definition = _SearchReader(file, flat_settings(overrides)).read()
    file.refuse_mistakes()
    assert definition is not None
    return definition


def read_recipe(path: str | Path) -> str:
    """Returns the recipe that the description of a search names; nothing if it names none that there is."""
    recipe = load_yaml(path).get("recipe")
    return recipe if isinstance(recipe, str) and recipe in RECIPES else ""


def to_yaml(definition: SearchDefinition) -> str:
    """Returns YAML that `load_search` reads back, without overrides, as an equal definition."""
    published = flat_settings(to_dict(recipe_config(definition.config.recipe)))
    raw = {
        "recipe": definition.config.recipe,
        "fixed": {name: value for name, value in definition.configured.items() if value != published[name]},
        "space": {
            parameter.name: _PARAMETER.dump_python(parameter, by_alias=True, exclude_defaults=True, exclude={"name"})
            for parameter in definition.parameters
        },
        "start": definition.enqueued,
        "sampler": dataclasses.asdict(definition.sampler),
        "scheduler": {name: value for name, value in dataclasses.asdict(definition.scheduler).items() if value},
        "objective": [dataclasses.asdict(target) for target in definition.objectives],
        "limits": {name: value for name, value in dataclasses.asdict(definition.limits).items() if value},
        "seeds": definition.seeds,
        "concurrent": definition.concurrent,
    }
    raw |= {name: value for name in ("storage", "study") if (value := getattr(definition, name))}
    return dump_yaml(raw)


class _SearchReader:
    """Reads one file; goes on after a mistake with what is right, so that the next mistake shows too."""

    def __init__(self, file: YamlFile, overrides: Mapping[str, Any]) -> None:
        self._file = file
        self._overrides = overrides
        self._raw: Mapping[str, Any] = {}
        self._fixed: dict[str, Location] = {}

    def read(self) -> SearchDefinition | None:
        """Returns the search, or what is left of it where there were mistakes."""
        if not isinstance(self._file.value, dict):
            self._file.add_mistake((), f"a search must be a mapping with `recipe` and `space`, of {', '.join(_KEYS)}")
            return None
        self._raw = self._file.value
        for key in self._raw:
            if key not in _KEYS:
                self._file.add_mistake((key,), f"unknown key `{key}`; {explain_unknown(key, _KEYS)}")
        config = self._read_config()
        plan = self._read_plan(config)
        parameters = self._read_parameters(config)
        enqueued = self._read_enqueued()
        if config is None:
            return None
        definition = SearchDefinition(config=config, parameters=parameters, enqueued=enqueued, **plan)
        space = self._raw.get("space")
        for where, text in find_mistakes(definition, known=space if isinstance(space, dict) else ()):
            self._file.add_mistake(where, text)
        return definition

    # --- Everything but settings ---

    def _read_plan(self, config: RunConfig | None) -> dict[str, Any]:
        """Returns the parts that were given without mistakes."""
        sampler = self._parse_named(Sampler, "sampler")
        limits = self._file.parse(Limits, ("limits",), self._raw.get("limits", {}))
        if limits == Limits() and not (sampler and sampler.name == "grid"):
            limits = _DEFAULT_LIMITS
        plan = {
            "sampler": sampler,
            "scheduler": self._read_scheduler(),
            "objectives": self._read_objectives(config.metrics if config else None),
            "limits": limits,
        }
        hints = get_type_hints(SearchDefinition, include_extras=True)
        for key in ("seeds", "concurrent", "storage", "study"):
            if key in self._raw:
                plan[key] = self._file.parse(hints[key], (key,), self._raw[key])
        return {name: part for name, part in plan.items() if part is not None}

    def _parse_named(self, shape: Any, key: str) -> Any:
        value = self._raw.get(key, {})
        return self._file.parse(shape, (key,), {"name": value} if isinstance(value, str) else value)

    def _read_scheduler(self) -> Scheduler | None:
        """Returns the scheduler; none with two objectives, unless it is asked for: it judges by the first alone."""
        raw = self._raw.get("objective")
        if "scheduler" not in self._raw and isinstance(raw, list) and len(raw) > 1:
            return Scheduler(name="none")
        return self._parse_named(Scheduler, "scheduler")

    def _read_objectives(self, metrics: Metrics | None) -> tuple[Target, ...] | None:
        raw = self._raw.get("objective", metrics.objective if metrics else "")
        items = raw if isinstance(raw, list) else [raw]
        if not 1 <= len(items) <= 2:
            self._file.add_mistake(("objective",), f"`objective` must be one metric or two, got {len(items)}")
            return None
        targets = []
        for index, item in enumerate(items):
            entry = {"metric": item} if isinstance(item, str) else item
            if isinstance(entry, dict):
                minimized = (*COSTS, *(metrics.lower_is_better if metrics else ()))
                entry = {"direction": "minimize" if entry.get("metric") in minimized else "maximize"} | entry
            where = ("objective", index) if isinstance(raw, list) else ("objective",)
            targets.append(self._file.parse(Target, where, entry))
        return None if None in targets else tuple(targets)

    # --- Settings ---

    def _read_config(self) -> RunConfig | None:
        """Returns the recipe's settings with what is fixed; None without a recipe."""
        recipe = self._raw.get("recipe")
        if not isinstance(recipe, str):
            self._file.add_mistake(("recipe",), f"`recipe` must name the recipe to improve, got {recipe!r}")
            return None
        try:
            config = recipe_config(recipe)
        except UserError as error:
            self._file.add_mistake(("recipe",), str(error))
            return None
        config = self._with_fixed(config)
        if "recipe" in self._overrides:
            self._file.add_mistake(None, "--set: `recipe` must be the file's; change it there")
            return config
        config, problem = _change(config, self._overrides)
        if problem:
            self._file.add_mistake(None, f"--set: {problem}")
        self._check_evaluations(config.train)
        return config

    def _check_evaluations(self, train: TrainConfig) -> None:
        """Notes what keeps trials from being evaluated after equal parts of their trainings."""
        if train.steps:
            wrong = {} if train.eval_every_steps else {"train.eval_every_steps": ("above 0", 0)}
            why = "trials that are counted in `train.steps` report after equally many"
        else:
            found = {"train.eval_every_epochs": (1, train.eval_every_epochs)}
            found["train.eval_every_steps"] = (0, train.eval_every_steps)
            wrong = {name: (needed, value) for name, (needed, value) in found.items() if value != needed}
            why = "the trials of a search report every epoch unless `train.steps` is set"
        for name, (needed, value) in wrong.items():
            where = None if name in self._overrides else self._fixed.get(name, ("recipe",))
            self._file.add_mistake(where, f"`{name}` must be {needed}, because {why}, got {value}")

    def _with_fixed(self, config: RunConfig) -> RunConfig:
        """Returns the settings with what is `fixed`, as far as that is right."""
        fixed = self._raw.get("fixed", {})
        if not isinstance(fixed, dict):
            self._file.add_mistake(("fixed",), f"`fixed` must be a mapping from settings to values, got {fixed!r}")
            return config
        changes: dict[str, Any] = {}
        for where, value in _leaves(fixed, ("fixed",)):
            name = ".".join(map(str, where[1:]))
            if name in self._fixed:
                self._file.add_mistake(where, f"a setting stands once, got `{name}` again")
            elif name == "recipe":
                self._file.add_mistake(where, "the recipe is named at the top; remove it here")
            elif problem := _explain_setting(name, config):
                self._file.add_mistake(where, problem)
            else:
                changes[name] = value
            self._fixed.setdefault(name, where)
        changed, problem = _change(config, changes)
        if not problem:
            return changed
        alone = {name: why for name, value in changes.items() if (why := _change(config, {name: value})[1])}
        for name, why in alone.items():
            self._file.add_mistake(self._fixed[name], why)
        if not alone:
            self._file.add_mistake(("fixed",), problem)
        return _change(config, {name: value for name, value in changes.items() if name not in alone})[0]

    def _read_parameters(self, config: RunConfig | None) -> tuple[Parameter, ...]:
        """Returns the parameters without mistakes of their own."""
        space = self._raw.get("space")
        if not isinstance(space, dict) or not space:
            text = f"`space` must be a mapping from settings to ranges or choices, one or more, got {space!r}"
            self._file.add_mistake(("space",), text)
            return ()
        parameters = []
        for name, entry in space.items():
            parameter = self._read_parameter(name, entry)
            problem = config and self._explain_unsearchable(name, config)
            if problem:
                self._file.add_mistake(("space", name), problem)
            elif parameter:
                parameters.append(parameter)
        return tuple(parameters)

    def _explain_unsearchable(self, name: str, config: RunConfig) -> str | None:
        if name.partition(".")[0] in marked_settings(config, SharedByTrials):
            return f"`{name}` cannot be searched, because it is no part of what a trial is: all trials share it"
        if name in _SAME_FOR_ALL:
            return f"`{name}` cannot be searched, because {_SAME_FOR_ALL[name]}"
        if name in self._fixed:
            line = self._file.position(self._fixed[name]).line
            return f"`{name}` must be searched or fixed, got both; remove it here or on line {line}"
        if name in self._overrides:
            return f"`{name}` must be searched or fixed, got both; remove it here or `--set {name}`"
        return _explain_setting(name, config)

    def _read_parameter(self, name: str, entry: Any) -> Parameter | None:
        where = ("space", name)
        if not isinstance(entry, dict) or not entry:
            example = "{type: float, low: 0.1, high: 0.9} or {choices: [a, b]}"
            self._file.add_mistake(where, f"a parameter must be a mapping such as {example}, got {entry!r}")
            return None
        when = self._read_when(entry.get("when", {}), (*where, "when"))
        shape = Range if entry.keys() & {"type", "low", "high"} and "choices" not in entry else Choices
        return self._file.parse(shape, where, entry | {"when": when}, name=name)

    def _read_when(self, when: Any, where: Location) -> dict[str, tuple[Any, ...]]:
        if not isinstance(when, dict):
            self._file.add_mistake(where, f"`when` must be a mapping from a parameter to its values, got {when!r}")
            return {}
        conditions = {}
        for parent, values in when.items():
            if values == []:
                self._file.add_mistake((*where, parent), f"`when` must list at least one value of `{parent}`, got none")
            else:
                conditions[parent] = tuple(values) if isinstance(values, list) else (values,)
        return conditions

    def _read_enqueued(self) -> tuple[dict[str, Any], ...]:
        points = self._raw.get("start", [])
        if not isinstance(points, list):
            self._file.add_mistake(("start",), f"`start` must be a list of settings to try first, got {points!r}")
            return ()
        for index, start in enumerate(points):
            if not isinstance(start, dict):
                text = f"a start must be a mapping from parameters to values, got {start!r}"
                self._file.add_mistake(("start", index), text)
        return tuple(start if isinstance(start, dict) else {} for start in points)


def _leaves(settings: Mapping[str, Any], where: Location) -> Iterator[tuple[Location, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*where, key))
        else:
            yield (*where, key), value


def _change(config: RunConfig, changes: Mapping[str, Any]) -> tuple[RunConfig, str | None]:
    """Returns changed settings; if the changes do not fit, the settings as they were, and why."""
    try:
        return build_config(config, changes, origin="settings"), None
    except UserError as error:
        return config, str(error).removeprefix("settings: ")


def _explain_setting(name: str, config: RunConfig) -> str | None:
    """Returns what is wrong with a setting's name; None if there is such a setting."""
    names = flat_settings(to_dict(config))
    if name in names:
        return None
    if inside := [inner for inner in names if inner.startswith(f"{name}.")]:
        return f"`{name}` is a section; name one of its settings: {', '.join(inside)}"
    return f"unknown setting `{name}`; {explain_unknown(name, names)}"
