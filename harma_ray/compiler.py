"""torch's compiler, imported by what compiles.

Torch imports it for every optimizer and every `DistributedDataParallel`, and torchvision and timm when they are
imported, all to leave it alone (torch 2.15, torchvision 0.29). With sympy, triton and its backend it is a quarter of
what a worker imports. Here something stands in its place that answers what they ask for, and imports it for everything
else. A process group that is made later imports it, too.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import FunctionType, ModuleType
from typing import Any

_NAME = "torch._dynamo"
_UTILS = f"{_NAME}.utils"


def defer_compiler() -> None:
    """Puts the import of torch's compiler off until something of it is used; imports nothing.

    For processes of this package, as it lasts: whoever imports the package gets `deferred_compiler`.
    """
    _FINDER.lasts = True
    _install()


@contextlib.contextmanager
def deferred_compiler() -> Iterator[None]:
    """Puts the import off during the block; what was asked for in it keeps on answering."""
    is_own = _install()
    try:
        yield
    finally:
        if is_own and not _FINDER.lasts:
            _withdraw()


def _install() -> bool:
    """Puts the stand-ins in place and returns True; False: there is something already."""
    if _NAME in sys.modules:
        return False
    sys.modules.update(_STAND_INS)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return True


class _Deferred(ModuleType):
    """Stands for a module; imports the compiler when it is asked for something else than what it was given."""

    __path__: list[str]

    def __init__(self, name: str, **answers: Any) -> None:
        super().__init__(name)
        self.__path__ = []  # a package, whose modules `_Finder` finds
        del self.__spec__  # found when it is asked for
        vars(self).update(answers)

    def __getattr__(self, name: str) -> Any:
        if name == "__spec__":
            spec = find_spec("torch")
            for full in (_NAME, _UTILS)[: 1 + (self.__name__ == _UTILS)]:
                spec = PathFinder.find_spec(full, spec.submodule_search_locations) if spec else None
            self.__spec__ = spec
            return spec
        if name.startswith("__") and name != "__all__":  # asked of all modules, by what looks through them
            raise AttributeError(name)
        return getattr(_import_real(self.__name__), name)


class _Finder(MetaPathFinder):
    """Finds the compiler's own modules while it is deferred, by importing it."""

    lasts = False
    """Whether the compiler is deferred beyond the block of `deferred_compiler`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns a module that is imported already, which Python would load twice otherwise; None for all others."""
        if path is not _compiler.__path__:
            return None
        return spec_from_loader(fullname, _Loaded(_import_real(fullname)))


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
"""Stays among Python's finders: another thread, at a later one of the list, would miss one if it were taken out."""
_disabled: list[FunctionType] = []
"""Functions that are not to be compiled; torch keeps with each what `_disable` has returned for it."""


def _import_real(name: str) -> ModuleType:
    """Imports the compiler, if that has not happened, and returns one of its modules."""
    _withdraw()
    importlib.import_module(_NAME)
    for module in _STAND_INS.values():  # somebody may hold them
        for answer in [own for own in [*vars(module)] if not own.startswith("__")]:
            vars(module).pop(answer, None)
    for function in [*_disabled]:
        vars(function).pop("__dynamo_disable", None)  # torch asks the real one at the next call
    _disabled.clear()
    return importlib.import_module(name)


def _withdraw() -> None:
    for name, module in _STAND_INS.items():
        if sys.modules.get(name) is module:
            sys.modules.pop(name, None)


def _is_imported() -> bool:
    return _NAME in sys.modules and not isinstance(sys.modules[_NAME], _Deferred)


def _graph_break(msg: str = "") -> None:
    """Does nothing, as outside of what is compiled."""
    if _is_imported():
        _import_real(_NAME).graph_break(msg)


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Returns a function that is not compiled: as it is, until there is a compiler to be asked."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **options)
    if _is_imported() or not isinstance(fn, FunctionType):
        return _import_real(_NAME).disable(fn, recursive, **options)
    _disabled.append(fn)
    wrapped: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not wrapped and _is_imported():
            wrapped.append(_import_real(_NAME).disable(fn, recursive, **options))
        return (wrapped[0] if wrapped else fn)(*arguments, **keywords)

    return run


def _get_optimize_ddp_mode() -> str:
    """Returns the compiler's default; nobody has set another one without importing it."""
    return _import_real(_UTILS).get_optimize_ddp_mode() if _is_imported() else "ddp_optimizer"


def _is_compile_supported(device_type: Any) -> bool:
    return _import_real(_UTILS).is_compile_supported(device_type)


_is_compile_supported._dynamo_marked_constant = True  # as of the real one, which the compiler does not look into
_utils = _Deferred(_UTILS, get_optimize_ddp_mode=_get_optimize_ddp_mode, is_compile_supported=_is_compile_supported)
_compiler = _Deferred(_NAME, graph_break=_graph_break, disable=_disable, utils=_utils)
_STAND_INS = {_NAME: _compiler, _UTILS: _utils}
