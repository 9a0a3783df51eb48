"""The structure that the design promises: layers, and imports that do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["errors", "shell", "distributed", "config", "compiler"],
    ["files", "parallel", "progress", "settings"],
    ["resources", "models", "data.scenes"],
    ["data"],
    ["data.convert", "evaluation", "retrieval"],
    ["task"],
    ["formats", "training"],
    ["report"],
    ["recipes.harma", "recipes.clip4cir"],
    ["recipes"],
    ["runs", "tune.space"],
    ["preflight", "import_export", "exports", "extraction", "api"],
    ["on_ray"],
    ["vectors", "tune"],
    ["tune.report"],
    ["cli"],
]
"""Folders (and files beside them) from the ground up: each imports what is below it, and none of its own height."""
WITHOUT_RAY = 12
"""So many layers import without Ray."""


def room_of(module: str) -> str:
    """Returns the folder, or file, of `LAYERS` that a module is in: the innermost."""
    rooms = [room for layer in LAYERS for room in layer if f"{module}.".startswith(f"{room}.")]
    assert rooms, f"harma_ray.{module} has no layer; add its folder to LAYERS"
    return max(rooms, key=len)


def height_of(module: str) -> int:
    return next(height for height, layer in enumerate(LAYERS) if room_of(module) in layer)


def modules() -> dict[str, Path]:
    package = ROOT / "harma_ray"
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


def run_time_imports(path: Path) -> set[str]:
    """Returns what a file imports, inside functions too, but not what it imports for type checkers alone."""
    tree = ast.parse(path.read_text())
    for_types = (node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_type_checking(node.test))
    skipped = {id(inner) for node in for_types for statement in node.body for inner in ast.walk(statement)}
    named = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def arrows() -> set[tuple[str, str]]:
    """Returns which module imports which, where they are not in one folder."""
    known = {f"harma_ray.{name}": name for name in modules()}
    pairs = ((name, known.get(other)) for name, path in modules().items() for other in run_time_imports(path))
    return {(name, other) for name, other in pairs if other and room_of(name) != room_of(other)}


def test_a_folder_imports_only_what_lies_below_it():
    assert not {(name, other) for name, other in arrows() if height_of(other) >= height_of(name)}


def test_the_lower_layers_never_import_ray():
    paths = [path for name, path in modules().items() if height_of(name) < WITHOUT_RAY]
    assert not [path for path in paths for name in run_time_imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if TYPE_CHECKING:\n    import ray", set()),
        ("if not TYPE_CHECKING:\n    import ray", {"ray"}),
        ("if TYPE_CHECKING:\n    import ray\nelse:\n    import ray.data", {"ray.data"}),
        ("def late():\n    from harma_ray import cli", {"harma_ray", "harma_ray.cli"}),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert run_time_imports(path) == found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["on_ray.stream", "on_ray.tasks", "data.convert.commands"])
def test_what_only_hands_samples_on_imports_without_torch(name):
    code = f"import sys; sys.modules['torch'] = None; import harma_ray.{name}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.timeout(120)
def test_the_lower_layers_import_without_ray_and_do_nothing_at_import():
    names = [f"harma_ray.{name}" for name in modules() if height_of(name) < WITHOUT_RAY]
    code = f"""
import importlib, logging, os, random, sys
sys.modules["ray"] = None
before = set(os.listdir("."))
import numpy, torch, open_clip
state, threads, handlers = torch.get_rng_state(), torch.get_num_threads(), list(logging.getLogger().handlers)
for name in {names!r}:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == threads
assert logging.getLogger().handlers == handlers
assert set(os.listdir(".")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.timeout(120)
def test_importing_any_module_does_nothing():
    names = [f"harma_ray.{name}" for name in modules()]
    code = f"""
import importlib, logging, os, signal, sys, threading
import numpy, torch, open_clip, ray, ray.data, ray.train
state, threads, running = torch.get_rng_state(), torch.get_num_threads(), threading.active_count()
handlers, before = list(logging.getLogger().handlers), set(os.listdir("."))
environment, on_interrupt = dict(os.environ), signal.getsignal(signal.SIGTERM)
for name in {names!r}:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), state)
assert (torch.get_num_threads(), threading.active_count()) == (threads, running)
assert logging.getLogger().handlers == handlers
assert set(os.listdir(".")) == before
assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (environment, on_interrupt)
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.timeout(120)
def test_the_command_line_helps_without_importing_ray():
    code = "import sys; sys.modules['ray'] = None; from harma_ray.cli import main; main(['train', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert "harma-rsitmd-vit" in result.stdout


if __name__ == "__main__":
    rooms = {(room_of(name), room_of(other)) for name, other in arrows()}
    print(f"{len({room_of(name) for name in modules()})} rooms, {len(LAYERS)} floors, {len(rooms)} arrows")
