"""A frozen backbone that all trials of a search share: one copy a machine, in Ray's object store."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harma_ray.models.backbones import Backbone


@dataclass(frozen=True)
class SharedModule:
    """A module taken apart so that Ray maps its numbers into every process instead of copying them."""

    skeleton: bytes
    """The module without numbers, pickled."""
    arrays: dict[str, np.ndarray]
    """The bytes of every parameter and buffer, by name."""

    @staticmethod
    def of(module: nn.Module) -> SharedModule:
        """Takes a module on CPU apart; it is left as it is."""
        arrays = {name: _bytes_of(tensor) for name, tensor in _tensors(module).items()}
        # the memo lets deepcopy pass over the numbers
        memo = {id(tensor): _hollow(tensor) for tensor in _tensors(module).values()}
        buffer = io.BytesIO()
        pickle.Pickler(buffer, protocol=5).dump(copy.deepcopy(module, memo))
        return SharedModule(buffer.getvalue(), arrays)

    def build(self) -> nn.Module:
        """Returns the module; its parameters and buffers are views of `arrays`, and read-only if these are."""
        module = pickle.loads(self.skeleton)
        made: dict[int, Tensor] = {}  # one tensor under several names stays one
        for name, hollow in _tensors(module).items():
            owner_name, _, leaf = name.rpartition(".")
            tensor = made.get(id(hollow))
            if tensor is None:
                tensor = _tensor_of(self.arrays[name], hollow)
                if isinstance(hollow, nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=hollow.requires_grad)
                made[id(hollow)] = tensor
            setattr(module.get_submodule(owner_name), leaf, tensor)
        return module


class SharedBackbone(Backbone):
    """A backbone whose numbers lie in Ray's object store."""

    def __init__(self, original: Backbone, fetch: Callable[[], SharedModule], *, is_shared: bool = True):
        """Takes another's place.

        Args:
            original: That other one, whose `build` is not called.
            fetch: Returns what that would have built.
            is_shared: Whether what is built is read-only; else it is a copy.
        """
        self._original, self._fetch, self.is_shared = original, fetch, is_shared

    @property
    def name(self) -> str:
        """The original's."""
        return self._original.name

    @property
    def image_size(self) -> int:
        """The original's."""
        return self._original.image_size

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The original's."""
        return self._original.pixel_statistics

    def tokenizer(self) -> Callable[..., Any]:
        """Returns the original's."""
        return self._original.tokenizer()

    def build(self) -> nn.Module:
        """Returns the module."""
        module = self._fetch().build()
        return module if self.is_shared else copy.deepcopy(module)

    def outline(self) -> nn.Module:
        """Returns the original's."""
        return self._original.outline()

    def fingerprint(self, model: nn.Module) -> str:
        """Returns the original's."""
        return self._original.fingerprint(model)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, persistent or not, shared ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor_of(array: np.ndarray, like: Tensor) -> Tensor:
    if not array.size:
        return torch.empty(like.shape, dtype=like.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes: it is frozen
        return torch.from_numpy(array).view(like.dtype).view(like.shape)
