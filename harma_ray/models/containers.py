"""Files that hold tensors: what kind a file is, told from its first bytes, and its content read as data."""

import codecs
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.models.inert import CodeFound, InertUnpickler

_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch wrote before version 1.6: its magic number, pickled."""
_PACKED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
_OTHER = {
    b"\x89HDF": "an HDF5 file (Keras)", b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy array", b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image", b"%PDF": "a PDF",
}  # fmt: skip
_HEAD = 4096


@dataclass(frozen=True)
class Container:
    """What a file holds."""

    content: Any
    """Mappings, lists, plain values, tensors, and `harma_ray.models.inert.Inert` objects."""
    form: str
    """``safetensors``, ``torch`` or ``TorchScript``."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Texts that a safetensors file carries beside its tensors."""
    origins: tuple[str, ...] = ()
    """Classes of other programs that the file names; they were not imported."""


def read_container(path: Path, *, data: bool = True) -> Container:
    """Reads a file by its content, whatever its name; nothing in it is executed.

    Args:
        path: The file.
        data: Whether the numbers are wanted; without them, tensors of torch's archives lie on the ``meta`` device,
            which takes milliseconds whatever the size.

    Raises:
        UserError: If the file is missing, cut off, damaged, holds code, or is something else, which is then named.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(b"PK\x03\x04"):
            return _read_archive(path, data)
        if head.startswith(_OLD_TORCH):
            return Container(_read_old(path), "torch")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**9:
            return _read_safetensors(path)
    except FileNotFoundError as error:
        raise UserError(f"the weights file must exist, got {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    raise UserError(f"{path} {_name_kind(head, path.stat().st_size)}")


def _read_archive(path: Path, data: bool) -> Container:
    """Reads what `torch.save` or `torch.jit.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
            if pickled is None:
                listed = ", ".join(names[:3])
                raise UserError(
                    f"{path} is a zip archive without weights of torch (it holds {listed}); unpack it first"
                )
            root = pickled.removesuffix("data.pkl")
            if f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big":
                raise UserError(f"{path} was written on a big-endian machine; save it anew on an ordinary one")
            unpickler = InertUnpickler(io.BytesIO(archive.read(pickled)), _storage_reader(archive, root, data))
            content = unpickler.load()
    except CodeFound as error:
        raise _holds_code(path, str(error)) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is cut off or damaged ({path.stat().st_size:,} bytes); fetch it again") from error
    except (
        pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, MemoryError,
        NotImplementedError, OverflowError,
    ) as error:  # fmt: skip
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: its list of tensors cannot be read; fetch it again") from error
    form = "TorchScript" if f"{root}constants.pkl" in names else "torch"
    return Container(content, form, origins=tuple(unpickler.origins))


def _storage_reader(archive: zipfile.ZipFile, root: str, data: bool):
    def read(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not data:
            return torch.empty(count, dtype=dtype, device="meta")
        numbers = bytearray(archive.read(f"{root}data/{key}"))
        return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)

    return read


def _read_old(path: Path) -> Any:
    """Reads what torch wrote before version 1.6."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise _holds_code(path, named[1]) from error
        raise UserError(f"{path} is cut off or damaged ({path.stat().st_size:,} bytes); fetch it again") from error


def _read_safetensors(path: Path) -> Container:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return Container(load_file(path, device="cpu"), "safetensors", metadata)
    except SafetensorError as error:
        reason = str(error).partition("\n")[0].removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{path} is a safetensors file that is cut off or damaged ({path.stat().st_size:,} bytes; {reason}); fetch "
            "it again"
        ) from error


def _holds_code(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} holds code (`{name}`), which weights have no need of, and cannot be read without running code from "
        "it: refused; ask its author for a file with the state dict alone, best as .safetensors"
    )


def _name_kind(head: bytes, size: int) -> str:
    """Says what a file is that is none of weights, and the way out."""
    if not size:
        return "is empty; fetch it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        whole = re.search(rb"size (\d+)", head)
        told = f" of {int(whole[1]) / 1e6:,.0f} MB" if whole else ""
        return f"is a Git LFS pointer: the file{told} itself was not fetched; run `git lfs pull` where it was cloned"
    if b"/annex/objects/" in head:
        return "is a git-annex pointer: the file itself was not fetched; run `git annex get` where it was cloned"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"(?i)<(!doctype html|html|head|\?xml)", text):
        title = re.search(rb"(?is)<title[^>]*>(.*?)</title>", text)
        told = f" (`{' '.join(title[1].decode('utf-8', 'replace').split())[:80]}`)" if title else ""
        return f"is a web page{told}, not the file that was to be fetched; open its address in a browser"
    for start, name in _PACKED.items():
        if head.startswith(start):
            return f"is packed ({name}); unpack it first"
    if head[257:262] == b"ustar":
        return "is packed (tar); unpack it first"
    for start, name in _OTHER.items():
        if head.startswith(start):
            return f"is {name}, not weights of torch; give a .safetensors, .pt or .pth file"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return (
            "is a plain pickle, which cannot be read without running code from it: refused; load it yourself if you "
            "trust it, and save its tensors with safetensors"
        )
    if text and _is_text(text):
        is_json = _is_json(text, size)
        start = " ".join(text[:60].decode("utf-8", "replace").split())
        return f"is {'JSON' if is_json else 'a text'} that begins with `{start}`, not weights; fetch the file itself"
    return "is no file of weights that torch or safetensors wrote, or is damaged; fetch it again"


def _is_text(head: bytes) -> bool:
    try:
        decoded = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in decoded)


def _is_json(text: bytes, size: int) -> bool:
    if size > _HEAD:
        return text[:1] in b"{["
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
