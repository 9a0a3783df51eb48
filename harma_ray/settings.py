"""Settings: read from YAML and the command line, checked at the door, written, and compared.

Everything a user writes (YAML files, ``--set a.b=value``) goes through `build_config`, which refuses unknown keys,
wrong types and values out of range, each with its dotted path, all problems at once.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.constructor import ConstructorError

from harma_ray.config import AddedLater, Incidental, RunConfig
from harma_ray.errors import UserError

ConfigT = TypeVar("ConfigT", bound=RunConfig)
MarkT = TypeVar("MarkT")

_COUNTED = {"train.epochs": "train.steps", "train.eval_every_epochs": "train.eval_every_steps"}
"""Settings of which the second counts unless it is 0."""
_PLAIN_WORDS = {
    "Input should be greater than or equal to": "must be at least",
    "Input should be greater than": "must be above",
    "Input should be less than or equal to": "must be at most",
    "Input should be less than": "must be below",
    "Input should": "must",
    "valid tuple": "list",
}
"""Parts of pydantic's messages."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested plain dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in flat_settings(value).items()}
        else:
            flat[key] = value
    return flat


def marked_settings(config: Any, kind: type[MarkT], prefix: str = "") -> dict[str, tuple[Any, MarkT]]:
    """Returns the values of the settings that carry a mark of a kind, with their marks, by dotted name."""
    found: dict[str, tuple[Any, MarkT]] = {}
    for name, value, marks in _fields(config):
        if dataclasses.is_dataclass(value):
            found |= marked_settings(value, kind, f"{prefix}{name}.")
        found |= {f"{prefix}{name}": (value, mark) for mark in marks if isinstance(mark, kind)}
    return found


def _fields(section: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yields name, value and the `Annotated` marks of what a section holds."""
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        yield name, getattr(section, name), getattr(hint, "__metadata__", ())


def to_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML that `build_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: RunConfig) -> str:
    """Returns a SHA-256 over every setting that changes what the run computes."""
    raw = json.loads(json.dumps(_identity(config)), parse_int=float)  # 256 and 256.0 are the same setting
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _identity(section: Any) -> dict[str, Any]:
    """Returns what a section holds, without what changes nothing that is computed; an incidental section is empty."""
    kept: dict[str, Any] = {}
    for name, value, marks in _fields(section):
        incidental = any(isinstance(mark, Incidental) for mark in marks)
        if any(isinstance(mark, AddedLater) and value == mark.before for mark in marks):
            continue
        if dataclasses.is_dataclass(value):
            kept[name] = {} if incidental else _identity(value)
        elif not incidental:
            kept[name] = value
    return kept


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"a key stands once, got `{key.value}` again", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        UserError: If the file cannot be read or is not a mapping; a syntax error names line and column.
    """
    try:
        raw = yaml.load(read_text(path), _Loader)  # a safe one
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, got {type(raw).__name__}")
    return raw


def read_text(path: str | Path) -> str:
    """Reads a text file.

    Raises:
        UserError: If it cannot be read, or is none.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (UTF-8)") from error


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Turns ``a.b=value`` assignments into a flat mapping from dotted keys to values; values are read as YAML.

    Raises:
        UserError: If an assignment has no ``=``, its value is no YAML, or a setting has two values.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise UserError(f"`--set` takes key=value, got `{assignment}`; for example --set optim.learning_rate=2e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"`--set {assignment}`: the value is not valid YAML") from error
        add_setting(overrides, key.strip(), value, "--set")
    return overrides


def add_setting(settings: dict[str, Any], name: str, value: Any, origin: str) -> None:
    """Adds a setting that an option gives.

    Raises:
        UserError: If another one has given it another value.
    """
    if name in settings and settings[name] != value:
        raise UserError(
            f"`{name}` must have one value, got {settings[name]!r} from --set and {value!r} from {origin}; leave "
            "one out"
        )
    settings[name] = value


def show_override(key: str, value: Any) -> str:
    """Returns an assignment from which `parse_overrides` reads the value back, whatever characters a text has."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        plain = yaml.safe_load(text) == value
    except yaml.YAMLError:
        plain = False
    return f"{key}={text if plain else json.dumps(value)}"


def build_config(base: ConfigT, changes: Mapping[str, Any], *, origin: str = "--set") -> ConfigT:
    """Returns `base` with some settings changed.

    Args:
        base: The recipe's published settings.
        changes: Nested mappings, or flat dotted keys, or both.
        origin: Named in errors.

    Raises:
        UserError: Listing every unknown key (with the nearest valid ones) and every value of a wrong type or range.
    """
    raw = to_dict(base)
    problems = _merge(raw, changes, "", flat_settings(raw).keys())
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems))
    try:
        return _adapter(type(base)).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def require_effect(config: RunConfig, given: Mapping[str, Any], *, origin: str = "--set") -> None:
    """Raises UserError for a number of epochs that a user gives, nested or dotted, where one of steps counts instead.

    Args:
        config: The settings that it became part of.
        given: What the user gave; with the number of steps beside it nothing is refused.
        origin: Named in errors.
    """
    settings, named = flat_settings(to_dict(config)), flat_settings(given)
    for epochs, steps in _COUNTED.items():
        if epochs in named and steps not in named and settings[steps]:
            raise UserError(
                f"{origin}: `{epochs}` has no effect, because recipe {config.recipe} counts `{steps}` "
                f"({settings[steps]}); set that, or {steps}=0 beside it"
            )


@functools.cache
def _adapter(kind: type[ConfigT]) -> TypeAdapter[ConfigT]:
    return TypeAdapter(kind)


def _merge(raw: dict[str, Any], changes: Mapping[str, Any], prefix: str, names: Collection[str]) -> list[str]:
    """Changes settings in place; returns what is wrong, `names` being those of all settings."""
    problems = []
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")
        path = f"{prefix}{head}"
        if head not in raw:
            problems.append(f"unknown key `{prefix}{key}`; {explain_unknown(f'{prefix}{key}', names)}")
        elif rest:
            if isinstance(raw[head], dict):
                problems += _merge(raw[head], {rest: value}, f"{path}.", names)
            else:
                problems.append(f"`{path}` is a single value, so `{prefix}{key}` does not exist")
        elif isinstance(raw[head], dict):
            if isinstance(value, Mapping):
                problems += _merge(raw[head], value, f"{path}.", names)
            else:
                problems.append(f"`{path}` is a section (keys: {', '.join(raw[head])}), got {value!r}")
        else:
            raw[head] = _repair_number(raw[head], value)
    return problems


def explain_unknown(name: str, valid: Collection[str]) -> str:
    """Returns what a name that is not valid may have meant, or which are valid."""
    near = nearest(name, valid)
    if near:
        return f"did you mean {' or '.join(f'`{candidate}`' for candidate in near)}?"
    sections = dict.fromkeys(candidate.partition(".")[0] for candidate in valid)
    return f"there are {', '.join(valid if len(valid) <= 20 else sections)}"


def nearest(name: str, valid: Collection[str]) -> list[str]:
    """Returns up to three names that one may have meant; ``lr`` and ``learning_rate`` are ``optim.learning_rate``."""
    leaf = name.rpartition(".")[2]
    leaves = {candidate: candidate.rpartition(".")[2] for candidate in valid}
    near = (
        [candidate for candidate, own in leaves.items() if leaf in (own, _initials(own))]
        or difflib.get_close_matches(name, valid, cutoff=0.8)
        or [candidate for candidate, own in leaves.items() if difflib.get_close_matches(leaf, [own])]
        or difflib.get_close_matches(name, valid)
    )
    return near[:3]


def _initials(leaf: str) -> str:
    return "".join(word[:1] for word in leaf.split("_")) if "_" in leaf else leaf


def _repair_number(old: Any, value: Any) -> Any:
    """YAML 1.1 reads ``4e-6`` as a string; where a number stood, a string that is a number is one."""
    if isinstance(value, str) and isinstance(old, (int, float)) and not isinstance(old, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"`{path}`: {message}" if path else message
    return f"`{path}` {explain_rule(problem)}"


def explain_rule(problem: Mapping[str, Any]) -> str:
    """Returns which rule of pydantic's was broken, and the value, in plain words such as "must be at most 1, got 2"."""
    rule = problem["msg"]
    for technical, plain in _PLAIN_WORDS.items():
        rule = rule.replace(technical, plain)
    return f"{rule[0].lower()}{rule[1:]}, got {problem['input']!r}"
