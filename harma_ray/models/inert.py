"""Pickled tensors read as data: no class or function that a pickle names is ever imported or called.

A pickle is a small program that may name any function and call it. Here the few names that tensors need are answered
by code of this module, and every other one by an `Inert` object that only keeps what it was given: the
`argparse.Namespace` of a training program, or the modules of a whole pickled model or of a TorchScript archive, whose
parameters can then be picked out.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, Self

import torch
from torch import Tensor

_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_CONTAINERS = {"set": set, "frozenset": frozenset, "bytearray": bytearray, "complex": complex, "slice": slice}
_CODE = {
    "builtins", "os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "importlib", "socket", "pty", "code",
    "ctypes", "types", "marshal", "pickle", "multiprocessing", "threading", "urllib", "http", "requests", "webbrowser",
    "timeit", "pdb", "pip",
}  # fmt: skip
"""Modules whose functions no file of weights needs; none is run either way, the file is refused for naming them."""


class CodeFound(Exception):
    """A pickle names a function that would act on the machine if an ordinary reader called it."""


class Inert:
    """An object of another program's class: what it was made of and given, as plain data."""

    origin = ""
    """Module and name of the class, or of the function that would have made it."""
    arguments: tuple[Any, ...]
    entries: dict[Any, Any]
    state: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keeps the arguments."""
        made = object.__new__(cls)
        made.arguments, made.entries, made.state = arguments, {}, None
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Does nothing: pickles call it with what `__new__` kept."""

    def __setstate__(self, state: Any) -> None:
        """Keeps the state; nothing of the class is run with it."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keeps an entry of a class that was a mapping."""
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Keeps an element of a class that was a list."""
        self.entries[len(self.entries)] = value

    add = append


class InertUnpickler(pickle.Unpickler):
    """Reads one pickle that torch wrote into an archive.

    Args:
        stream: The pickle.
        read_storage: Returns the numbers of a storage, by its key, dtype and count, as a flat tensor.

    Attributes:
        origins: Names of the classes that became inert objects, in the order of appearance.

    Raises:
        CodeFound: The pickle names a function that would act on the machine.
    """

    def __init__(self, stream: IO[bytes], read_storage: Callable[[str, torch.dtype, int], Tensor]):
        """Prepares to read; `load` reads."""
        super().__init__(stream, encoding="utf-8")
        self._read_storage = read_storage
        self._storages: dict[str, Tensor] = {}
        self._inert: dict[str, type[Inert]] = {}
        first, call = self._first, self._call
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            ("torch._tensor", "_rebuild_from_type_v2"): call,
            **{("torch.jit._pickle", f"build_{kind}list"): first for kind in ("int", "double", "bool", "tensor")},
            ("torch.jit._pickle", "restore_type_tag"): first,
        }

    @property
    def origins(self) -> list[str]:
        """Names of the classes that became inert objects."""
        return list(self._inert)

    def find_class(self, module: str, name: str) -> Any:
        """Answers a name with this class's own code, a dtype, or a new kind of inert object; imports nothing."""
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "builtins" and name in _CONTAINERS:
            return _CONTAINERS[name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        origin = f"{module}.{name}"
        if module.partition(".")[0] in _CODE:
            raise CodeFound(origin)
        if origin not in self._inert:
            self._inert[origin] = type("Inert", (Inert,), {"origin": origin})
        return self._inert[origin]

    def persistent_load(self, pid: Any) -> Tensor:
        """Returns a storage, which torch writes beside the pickle, as a flat tensor."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        if key not in self._storages:
            self._storages[key] = self._read_storage(str(key), dtype, int(count))
        return self._storages[key]

    # Methods, not functions: a pickle can set attributes of what it is given, and those of a method it cannot.
    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return torch.as_strided(storage, tuple(size), tuple(stride), offset)  # checks the bounds

    def _typed_tensor(
        self, storage: Tensor, offset: int, size: Any, stride: Any, _: Any, __: Any, dtype: Any
    ) -> Tensor:
        return self._tensor(storage.view(dtype), offset, size, stride)

    def _first(self, value: Any, *_: Any) -> Any:
        return value

    def _call(self, function: Callable[..., Any], _: Any, arguments: Any, __: Any) -> Any:
        return function(*arguments)
