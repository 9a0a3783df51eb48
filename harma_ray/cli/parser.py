"""The parser of all commands: argparse, which refuses what is given twice and knows what a mistyped word may mean.

All mistakes are a `UserError` of one line.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from harma_ray.errors import UserError
from harma_ray.settings import explain_unknown, flat_settings, nearest, to_dict
from harma_ray.shell import launch_command

_GIVEN = "given"
"""What of a namespace holds the options that have been given, with their values."""
_NAME = re.compile(r"[A-Za-z][\w.-]*")


class _StoreOnce(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Stores it.

        Raises:
            UserError: If the option has been given before.
        """
        if option:
            name, value = self.option_strings[0], values if isinstance(values, list) else [values]
            given = vars(namespace).setdefault(_GIVEN, {})
            if name in given:
                both = f"`{_join(given[name])}` and `{_join(value)}`"
                way_out = ", or run the command once for each data set" if name == "--data" else ""
                raise UserError(f"`{name}` is given once, got {both}; leave one out{way_out}")
            given[name] = value
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Parses a command, or the commands of a program."""

    def __init__(self, *arguments: Any, **options: Any):
        """Takes what `argparse.ArgumentParser` takes."""
        super().__init__(*arguments, **options)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses arguments, all of which must be known.

        Raises:
            UserError: If they are not, or one is given twice.
        """
        words = sys.argv[1:] if args is None else list(args)
        self._check_words(words)
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            raise UserError(f"{self.prog} does not take `{rest[0]}`; see {self.prog} --help")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Raises the user's error that a message of argparse tells."""
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            kind = str(action.metavar).lower()
            raise UserError(f"unknown {kind} `{value}`; {explain_unknown(value, action.choices)}")
        super()._check_value(action, value)

    def _check_words(self, words: Sequence[str]) -> None:
        """Raises UserError for an unknown option, and for settings without the ``--set`` that they need."""
        waiting, corrected, forgotten = list(words), [], []
        while waiting and waiting[0] != "--" and (self._subparsers is None or waiting[0].startswith("-")):
            word = waiting.pop(0)
            name, separator, value = word.partition("=")
            option = self._find_option(name)
            setting = None if option else self._find_setting(word, words)
            if setting:
                if not separator:
                    value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "VALUE"
                forgotten.append(name)
                corrected += ["--set", f"{setting}={value}"]
                continue
            corrected.append(word)
            if option and option.nargs != 0 and not separator and waiting:
                corrected.append(waiting.pop(0))
        if forgotten:
            command = launch_command(*self.prog.split()[1:], *corrected, *waiting)
            raise UserError(f"a setting needs --set, got `{forgotten[0]}` without; did you mean: {command}")

    def _find_option(self, name: str) -> argparse.Action | None:
        """Returns the option that a name, or its beginning, is."""
        options = self._option_string_actions
        known = (action for option, action in options.items() if name.startswith("--") and option.startswith(name))
        return options.get(name) or next(known, None)

    def _find_setting(self, word: str, words: Sequence[str]) -> str | None:
        """Returns the setting that a word is or gives a value to, if it lacks its ``--set``.

        Args:
            word: Is no option of this command.
            words: All, for the recipe's name.

        Raises:
            UserError: If it looks like an option and is none, nor a setting.
        """
        name, separator, _ = word.partition("=")
        is_option, bare = name.startswith("-"), _bare(name)
        if not _NAME.fullmatch(bare) or not (is_option or separator) or os.path.exists(word):
            return None
        meant = self._settings_like(bare, words)
        options = {_bare(option): option for option in self._option_string_actions if option.startswith("--")}
        if meant and bare in (meant[0], meant[0].rpartition(".")[2]) and bare not in options:
            return meant[0]
        if is_option:
            near = [f"`{options[option]}`" for option in nearest(bare, options)]
            if near or not meant:
                way_out = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
                raise UserError(f"{self.prog} has no option `{name}`; {way_out}")
        return meant[0] if meant else None

    def _settings_like(self, name: str, words: Sequence[str]) -> list[str]:
        """Returns the settings that a name may mean, of the recipe that is named, or of all; none without ``--set``."""
        if "--set" not in self._option_string_actions:
            return []
        from harma_ray.recipes import RECIPES

        recipes = [recipe for recipe in RECIPES if recipe in words] or list(RECIPES)
        known = (flat_settings(to_dict(RECIPES[recipe]())) for recipe in recipes)
        return nearest(name, dict.fromkeys(key for settings in known for key in settings))


def _bare(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _join(values: Sequence[Any]) -> str:
    return shlex.join(map(str, values))
