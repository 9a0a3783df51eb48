"""What `pyproject.toml` promises: every package that a file imports is declared, and every declared one is locked."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-") for requirement in requirements}


RUN_TIME = names(PROJECT["dependencies"])
DEVELOPMENT = RUN_TIME | names(PROJECT["optional-dependencies"]["dev"])


def optional():
    return RUN_TIME.union(*map(names, PROJECT["optional-dependencies"].values()))


def imported(folder):
    """Returns the first part of each name that a folder's files import, by the file that does."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found.update({module.partition(".")[0]: path.relative_to(ROOT) for module in modules})
    return found


@pytest.mark.parametrize(
    ("folder", "declared"),
    [("harma_ray", optional()), ("tests", DEVELOPMENT | optional()), ("benchmarks", DEVELOPMENT | optional())],
)
def test_every_import_is_of_a_declared_package(folder, declared):
    own = {"harma_ray", *(path.stem for path in (ROOT / folder).rglob("*.py"))}
    distributions = packages_distributions()
    strangers = {
        f"{module} ({file})"
        for module, file in imported(folder).items()
        if module not in sys.stdlib_module_names | own
        and not {name.lower().replace("_", "-") for name in distributions.get(module, [module])} & declared
    }
    assert not strangers


def test_every_declared_package_is_locked_with_versions_only():
    lock = (ROOT / "requirements.lock").read_text()
    locked = {
        line.partition("==")[0].partition("[")[0] for line in lock.splitlines() if re.match(r"[\w.-]+(\[.*\])?==", line)
    }
    assert locked >= DEVELOPMENT
    assert "://" not in lock
