"""What tells weights from all others: a SHA-256 of them, computed once for files that stay as they are.

The fingerprint of given weights never changes: runs, searches and data sets keep it. Hashing a gigabyte takes seconds,
so that of weights from files is remembered in the user's cache folder, under all by which the system tells one file,
and one state of it, from others. Nothing is taken for known there that was not hashed: a sample of the bytes would let
other weights pass.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harma_ray.errors import UserError, count
from harma_ray.files import atomic, cache_folder, settled_state
from harma_ray.models.weights import QUICK_GELU, has_quick_gelu, own_tensors

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def backbone_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a CLIP's own weights, the same before and after adapters are inserted.

    Names, dtypes, shapes and bytes enter, in the order of the names, and whether the activation is quick GELU;
    temperatures of a `DualEncoder` do not, nor do modules that say `is_added`. Another device changes nothing, another
    dtype does. Hashing ViT-B/32 takes about a second.

    Args:
        model: an open_clip model, or a `DualEncoder` around one.

    Returns:
        64 hexadecimal digits.
    """
    clip_model = getattr(model, "clip", model)
    digest = hashlib.sha256(QUICK_GELU.encode() if has_quick_gelu(clip_model) else b"")
    for name, tensor in sorted(own_tensors(clip_model).items()):
        digest.update(_head(name, tensor))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def built_from(files: Sequence[Path], build: Callable[[], nn.Module], beneath: str = "") -> nn.Module:
    """Builds a CLIP from files and notes on it which they were, for `fingerprint_as_built`.

    Args:
        files: All that the weights are read from; none: they come from elsewhere.
        build: Reads them.
        beneath: Fingerprint of weights that do not come from these files, if some do not.
    """
    before = _identity(files) if files else ""
    model: Any = build()
    model.weights_source = f"{beneath} {before}" if before and before == _identity(files) else ""
    model.weights_fingerprint = ""
    return model


def fingerprint_as_built(model: nn.Module) -> str:
    """Returns the `backbone_fingerprint` that a CLIP had when it was built, computed once.

    Args:
        model: A CLIP or a model around one, its weights as they were built, or trained since if this was asked before.
    """
    clip_model: Any = getattr(model, "clip", model)
    known = getattr(clip_model, "weights_fingerprint", "")
    if not known:
        source = getattr(clip_model, "weights_source", "")
        facts = b"".join(_head(name, tensor) for name, tensor in sorted(own_tensors(clip_model).items()))
        key = f"{source} {has_quick_gelu(clip_model)} {hashlib.sha256(facts).hexdigest()}" if source else ""
        known = clip_model.weights_fingerprint = _remembered(key, lambda: backbone_fingerprint(clip_model))
    return known


def folder_fingerprint(folder: Path) -> str:
    """Returns the SHA-256 of the weights in a Hugging Face folder, however many files they are spread over.

    No model is built; one tensor is in memory at a time. Names, dtypes, shapes and bytes enter, in the order of the
    names; the configuration beside them does not.

    Args:
        folder: With ``model.safetensors``, or with ``model.safetensors.index.json`` and the files that it names.

    Raises:
        UserError: If there are none, a file is missing or damaged, or the index names other tensors.
    """
    index = folder / _INDEX
    try:
        named = json.loads(index.read_text())["weight_map"] if index.is_file() else None
        files = sorted({folder / file for file in named.values()}) if named else [folder / _WHOLE]
        return _remembered(_identity([*files, *([index] if named else [])]), lambda: _hash_files(files, named))
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} must hold weights in {_WHOLE}, or in the files of {_INDEX} ({reason})") from error


def file_fingerprint(file: Path) -> str:
    """Returns the SHA-256 of the tensors in a safetensors file, as `folder_fingerprint` counts them."""
    return _remembered(_identity([file]), lambda: _hash_files([file], None))


def _hash_files(files: Sequence[Path], named: dict[str, str] | None) -> str:
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118, they are no mappings
        if named and where.keys() != named.keys():
            raise ValueError(f"they differ in {count(len(where.keys() ^ named.keys()), 'tensor')}")
        for name, file in sorted(where.items(), key=lambda item: item[0]):
            tensor = file.get_tensor(name)
            digest.update(_head(name, tensor))
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _identity(files: Sequence[Path]) -> str:
    """Returns what the system tells files by, and their states; empty if one is missing, or changed just now."""
    facts = []
    for file in files:
        try:
            path = file.expanduser().resolve(strict=True)
            state = settled_state(path.stat())
        except OSError:
            return ""
        if state is None:
            return ""
        facts += [str(path), *state]
    return json.dumps(facts)


def _remembered(source: str, compute: Callable[[], str]) -> str:
    """Returns a fingerprint that was computed before, or computes and keeps it; a cache that fails is none."""
    cache = cache_folder("fingerprints")
    if not source or cache is None:
        return compute()
    file = cache / hashlib.sha256(source.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known = file.read_text("ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    fingerprint = compute()
    with contextlib.suppress(OSError), atomic(file) as made:
        made.write_text(fingerprint)
    return fingerprint


def _head(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
