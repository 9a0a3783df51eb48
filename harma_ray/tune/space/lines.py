"""YAML that remembers where everything stands, its check against types, and its mistakes, listed all at once."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from harma_ray.errors import UserError
from harma_ray.settings import explain_rule, explain_unknown, read_text

Location = tuple[str | int, ...]
"""Keys and list indices that lead to a value."""

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers that YAML 1.2 knows and 1.1, which PyYAML speaks, reads as text: 1e-5."""


class Position(NamedTuple):
    """Counted from 1."""

    line: int
    column: int


class _Loader(yaml.SafeLoader):
    """Knows 1e-5, and no aliases: with them, a value would stand in several places, or in itself."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not read here; write the value out", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number; tuples are lists."""


_Dumper.add_representer(tuple, _Dumper.represent_list)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """Returns YAML that `YamlFile` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


class YamlFile:
    """A YAML file of mappings, lists and single values; keys are text.

    Attributes:
        value: What the file holds; of a key given twice, the first value.

    Raises:
        UserError: If the file cannot be read; a syntax error names line and column.
    """

    value: Any

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._positions: dict[Location, Position] = {}
        self._mistakes: list[tuple[Position | None, str]] = []
        try:
            loader = _Loader(read_text(path))
            node = loader.get_single_node()
            self.value = None if node is None else self._read(loader, node, ())
        except RecursionError as error:
            raise UserError(f"{path} is nested too deeply") from error
        except yaml.MarkedYAMLError as error:
            self._mistakes = [(_position(error.problem_mark), f"this YAML cannot be read: {error.problem}")]
            self.refuse_mistakes()
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error

    def parse(self, shape: Any, location: Location, value: Any, **given: Any) -> Any:
        """Returns a value as another type, or None after a mistake.

        Args:
            shape: The type, such as a dataclass.
            location: Where the value stands.
            value: What stands there.
            given: Fields of the dataclass that are not the file's to give.
        """
        adapter = TypeAdapter(shape)
        for key in given:
            if key in value:
                self.add_mistake((*location, key), f"unknown key `{key}`; remove it")
        try:
            return adapter.validate_python(value | given if given else value)
        except ValidationError as error:
            keys = [key for key in adapter.json_schema().get("properties", ()) if key not in given]
            holder = next(str(part) for part in reversed(location) if isinstance(part, str))
            for problem in error.errors():
                self.add_mistake((*location, *problem["loc"]), _explain(problem, holder, keys))
            return None

    def add_mistake(self, location: Location | None, text: str) -> None:
        """Notes a mistake at a location, or at what holds it if there is no such location; None = not in the file."""
        self._mistakes.append((None if location is None else self.position(location), text))

    def position(self, location: Location) -> Position:
        """Returns where a key or an item of a list stands."""
        while location and location not in self._positions:
            location = location[:-1]
        return self._positions.get(location, Position(1, 1))

    def refuse_mistakes(self) -> None:
        """Raises UserError with all mistakes in the order of the file, if there are any."""
        if not self._mistakes:
            return
        ordered = sorted(self._mistakes, key=lambda mistake: mistake[0] or Position(0, 0))
        lines = [f"line {where.line}, column {where.column}: {text}" if where else text for where, text in ordered]
        if len(lines) == 1:
            raise UserError(f"{self._path}, {lines[0]}")
        raise UserError("\n  ".join([f"{self._path} has {len(lines)} mistakes:", *lines]))

    def _read(self, loader: _Loader, node: yaml.Node, location: Location) -> Any:
        self._positions.setdefault(location, _position(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == loader.DEFAULT_MAPPING_TAG:
            return self._read_mapping(loader, node.value, location)
        if isinstance(node, yaml.SequenceNode) and node.tag == loader.DEFAULT_SEQUENCE_TAG:
            return [self._read(loader, item, (*location, index)) for index, item in enumerate(node.value)]
        try:
            value = loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else node
        except ValueError as error:  # such as the 31st of February, or !!int x
            raise ConstructorError(None, None, str(error), node.start_mark) from error
        if not isinstance(value, (str, int, float, bool, type(None))):
            problem = f"a value is text, a number, true, false or null, got {node.tag}; text can be quoted"
            raise ConstructorError(None, None, problem, node.start_mark)
        return value

    def _read_mapping(self, loader: _Loader, entries: Sequence[tuple[yaml.Node, yaml.Node]], location: Location) -> Any:
        values: dict[str, Any] = {}
        for key_node, node in entries:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key is a single value", key_node.start_mark)
            key, where = key_node.value, _position(key_node.start_mark)
            if key in values:
                first = self._positions[(*location, key)]
                self._mistakes.append((where, f"a key stands once, got `{key}` again (first on line {first.line})"))
                continue
            self._positions[(*location, key)] = where
            values[key] = self._read(loader, node, (*location, key))
        return values


def _position(mark: Any) -> Position:
    return Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)


def _explain(problem: Mapping[str, Any], holder: str, keys: Collection[str]) -> str:
    """Returns one of pydantic's problems with the value of the key `holder`, in the words of a user."""
    key = str(problem["loc"][-1]) if problem["loc"] else holder
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"`{holder}` must have `{key}`, got none"
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key `{key}`; {explain_unknown(key, keys)}"
    if problem["type"] == "dataclass_type":
        return f"`{key}` must be a mapping, with keys such as {', '.join(keys)}, got {problem['input']!r}"
    path = f"{holder}.{key}" if problem["loc"] else holder
    return f"`{path}` {explain_rule(problem)}"
