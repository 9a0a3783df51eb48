"""torch's compiler, imported by what compiles.

Torch 2.14 imports it for every optimizer and every `DistributedDataParallel`, and torchvision 0.29 and timm when they
are imported, all to leave it alone: with sympy, triton and its backend a third of what a process of this package takes
to start. Here something stands in its place that answers what they ask for, and imports it for everything else.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import FunctionType, ModuleType
from typing import Any

_NAME = "torch._dynamo"
_UTILS = f"{_NAME}.utils"


def defer_compiler() -> None:
    """Puts the import of torch's compiler off, in this process, until something of it is used; imports nothing."""
    if _NAME in sys.modules:
        return
    compiler, utils = _NotYet(_NAME), _NotYet(_UTILS)
    compiler.graph_break = _graph_break
    compiler.disable = _disable
    compiler.utils = utils
    utils.get_optimize_ddp_mode = _get_optimize_ddp_mode
    utils.is_compile_supported = _is_compile_supported
    sys.modules.update({_NAME: compiler, _UTILS: utils})
    sys.meta_path.insert(0, _FINDER)


@contextlib.contextmanager
def deferred_compiler() -> Iterator[None]:
    """Puts the import off during the block, and leaves nothing in its place."""
    is_own = _NAME not in sys.modules
    defer_compiler()
    try:
        yield
    finally:
        if is_own:
            _withdraw()


class _NotYet(ModuleType):
    """Stands for a module; imports the compiler when it is asked for something else than what it was given."""

    __path__: list[str]
    graph_break: Any
    disable: Any
    utils: Any
    get_optimize_ddp_mode: Any
    is_compile_supported: Any

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package, whose modules `_Finder` finds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by what looks through all modules
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Finder(MetaPathFinder):
    """Finds the compiler's own modules, by importing it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns a module that is imported already, which Python would load twice otherwise; None for all others."""
        return spec_from_loader(fullname, _Loaded(_real(fullname))) if fullname.startswith(f"{_NAME}.") else None


class _Loaded(Loader):
    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns what is there."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing, and gives the module back what Python has changed of it."""
        module.__spec__ = self._spec


_FINDER = _Finder()


def _real(name: str) -> ModuleType:
    """Imports the compiler, if that has not happened, and returns one of its modules."""
    _withdraw()
    importlib.import_module(_NAME)
    return importlib.import_module(name)


def _withdraw() -> None:
    for name in (_NAME, _UTILS):
        if isinstance(sys.modules.get(name), _NotYet):
            del sys.modules[name]
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _is_there() -> bool:
    return _NAME in sys.modules and not isinstance(sys.modules[_NAME], _NotYet)


def _graph_break(msg: str = "") -> None:
    """Does nothing, as outside of what is compiled."""


def _disable(fn: Any = None, *options: Any, **named: Any) -> Any:
    """Returns a function that is not compiled: as it is, until there is a compiler to be told."""
    if fn is None:
        return functools.partial(_disable, **named)
    if not isinstance(fn, FunctionType):
        return _real(_NAME).disable(fn, *options, **named)
    told: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not told and _is_there():
            told.append(_real(_NAME).disable(fn, *options, **named))
        return (told[0] if told else fn)(*arguments, **keywords)

    return run


def _get_optimize_ddp_mode() -> str:
    """Returns the compiler's default; nobody has set another one without importing it."""
    return "ddp_optimizer"


def _is_compile_supported(device_type: Any) -> bool:
    return _real(_UTILS).is_compile_supported(device_type)
