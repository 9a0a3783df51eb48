"""``recipes``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from harma_ray.cli import shared
from harma_ray.errors import UserError

if TYPE_CHECKING:
    from harma_ray.config import RunConfig

_WIDTH = 120
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TINY = "scenes-tiny"


def add_commands(commands: shared.Commands) -> None:
    """Adds ``recipes``."""
    parser = shared.make_command(
        commands, "recipes", _recipes, "List the recipes, or the settings of one: type, range, value, meaning.",
        "examples:\n  launch.py recipes\n  launch.py recipes harma-rsitmd-vit\n"
        "  launch.py recipes harma-rsitmd-vit optim",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", help="recipe whose settings are listed (default: list the recipes)")
    parser.add_argument("section", nargs="?", help="only the settings of this section, such as optim")


def _recipes(options: argparse.Namespace) -> None:
    print("\n".join(_list_settings(options.name, options.section) if options.name else _list_recipes()))


def _list_recipes() -> Iterator[str]:
    from harma_ray.recipes import PUBLISHED, RECIPES
    from harma_ray.settings import to_dict

    models = {name: to_dict(make()).get("model", {}) for name, make in RECIPES.items()}
    drawn = {name for name, model in models.items() if model.get("architecture") == _TINY}
    for title, names in (
        ("published settings; quoted figures, not measured here", [name for name in RECIPES if name not in drawn]),
        ("drawn scenes: tiny models that train in minutes, published by nobody", [n for n in RECIPES if n in drawn]),
    ):
        yield f"{title}\n"
        for name in names:
            weights = models[name].get("pretrained") or "weights to be named (model.pretrained)"
            about = [inspect.getdoc(RECIPES[name]) or "", f"Backbone: {models[name].get('architecture')}, {weights}."]
            for found in PUBLISHED.get(name, ()):
                metric, value = list(found.figures.items())[-1]  # a mean, if there is one, stands last
                about.append(f"Published: {metric} {value:.2f} on {found.data} {found.split}.")
            yield _wrap(f"{name:20} {' '.join(about)}", 2, 23)
        yield ""
    yield "the settings of one: launch.py recipes NAME [SECTION]"


def _list_settings(name: str, only: str | None) -> Iterator[str]:
    """Yields lines on the settings of a recipe, section by section."""
    from harma_ray.recipes import recipe_config
    from harma_ray.settings import explain_unknown

    config = recipe_config(name)
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: value for name, value in sections.items() if dataclasses.is_dataclass(value)}
    if only and only not in sections:
        raise UserError(f"recipe {name} has no section `{only}`; {explain_unknown(only, sections)}")
    about = sentences(type(config))
    if not only:
        yield _wrap(f"{name}: the value of each setting, its type and range, and what it is; change one with --set, "
                    "such as --set optim.learning_rate=1e-3", 0, 0)  # fmt: skip
        yield ""
        yield from _describe(config, "", [field for field in about if field not in (*sections, "recipe")])
    for section, values in sections.items():
        if only in (None, section):
            yield "\n" + _wrap(f"{section}: {about.get(section, '')}", 0, 0) + "\n"
            yield from _describe(values, f"{section}.", [field.name for field in dataclasses.fields(values)])


def _describe(section: RunConfig | Any, prefix: str, names: list[str]) -> Iterator[str]:
    from pydantic import TypeAdapter

    from harma_ray.settings import show_override

    hints, about = get_type_hints(type(section), include_extras=True), sentences(type(section))
    for name in names:
        shape = describe_type(TypeAdapter(hints[name]).json_schema())
        yield _wrap(f"{show_override(f'{prefix}{name}', getattr(section, name))}   ({shape})", 2, 6)
        if name in about:
            yield _wrap(about[name], 6, 6)


def sentences(kind: type) -> dict[str, str]:
    """Returns what stands under the fields of a dataclass in its source, those of the classes it extends included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found[ast.unparse(statement.target)] = " ".join(text.split())
    return found


def describe_type(schema: Mapping[str, Any]) -> str:
    """Returns a JSON schema in words, such as ``number > 0``."""
    if "anyOf" in schema:
        return " or ".join(map(describe_type, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) if value == "" else str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("prefixItems", [])
        return (
            f"list of {len(items)}, {describe_type(items[0])}" if items else f"list, {describe_type(schema['items'])}"
        )
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join(filter(None, (_TYPES[schema["type"]], " and ".join(bounds))))


def _wrap(text: str, first: int, others: int) -> str:
    return textwrap.fill(
        text.replace("``", "`"),
        _WIDTH,
        initial_indent=" " * first,
        subsequent_indent=" " * others,
        break_on_hyphens=False,
        break_long_words=False,
    )
