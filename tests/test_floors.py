"""The structure that the design promises: floors, and imports that do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: ["errors", "files", "config", "ranking", "metrics", "composed_metrics", "distributed", "data.schema",
        "data.order", "data.identity", "data.captions", "data.queries", "data.relative_captions", "shell",
        "health"],
    1: ["models.", "evaluation", "losses", "optim", "data.images", "data.image_files", "data.headers",
        "data.rasters", "data.rendering", "data.raster_statistics", "data.image_reading", "data.transforms",
        "data.padding", "data.scenes"],
    2: ["cluster", "ray_address", "ray_folder", "ray_start", "plans", "task", "accumulation", "checkpoint",
        "tracking", "data.stream", "data.ray_stream", "data.convert.", "engine", "train_state", "worker_deaths",
        "encoding", "foreign_formats", "pictures", "composed_pictures", "report", "figures", "page", "image_text_page"],
    3: ["recipes", "runs", "exchange", "tune.results", "tune.parameters", "tune.definition",
        "tune.located", "tune.checks", "tune.space", "tune.storage", "tune.study", "tune.scheduling", "tune.folder",
        "tune.drawing", "tune.figures", "tune.parameter_figures", "tune.importance", "tune.confirmed", "tune.scale",
        "tune.report", "tune.progress", "tune.sharing"],
    4: ["loop", "train", "embed", "features", "api", "tune.trial", "tune.search"],
    5: ["session", "header", "demo", "cli", "tune.session"],
}  # fmt: skip


def floor_of(module: str) -> int:
    for floor, names in FLOORS.items():
        for name in names:
            if module == name or module.startswith(name.rstrip(".") + "."):
                return floor
    raise AssertionError(f"harma_ray.{module} has no floor; add it to FLOORS")


def modules() -> dict[str, Path]:
    package = ROOT / "harma_ray"
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "models", "data", "data.convert", "tune"):
            found[name] = path
    return found


def run_time_imports(path: Path) -> set[str]:
    """Returns this package's modules that a file imports, however it writes it, those inside functions too."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    named = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("harma_ray.") for name in named if name.startswith("harma_ray.")}


def test_a_module_imports_its_own_floor_or_lower():
    wrong = [
        f"{name} (floor {floor_of(name)}) imports {other} (floor {floor_of(other)})"
        for name, path in modules().items()
        for other in run_time_imports(path)
        if other in modules() and floor_of(other) > floor_of(name)
    ]
    assert not wrong


@pytest.mark.timeout(120)
def test_floors_0_and_1_import_without_ray_and_do_nothing_at_import():
    names = [f"harma_ray.{name}" for name in modules() if floor_of(name) < 2]
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
