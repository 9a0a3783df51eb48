"""Folders of InternVL and InternViT, read strictly and without executing anything in them, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harma_ray.errors import UserError, first_few
from harma_ray.models.containers import read_container
from harma_ray.models.foreign import read_foreign
from harma_ray.models.internvl.configs import require_transformers
from harma_ray.models.internvl.folders import CONFIG, WEIGHTS, weight_files
from harma_ray.models.internvl.keys import (
    NATIVE_VISION,
    VISION_MARKS,
    is_original,
    to_native,
    to_original,
    vision_part,
    vision_to_native,
    vision_to_original,
)
from harma_ray.models.internvl.layouts import (
    check_tensors,
    original_settings,
    original_vision_settings,
    read_config,
    read_vision_config,
)
from harma_ray.models.weights import check_fit

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, InternVLVisionModel

TRANSLATED = "names of InternVL's own code translated"
"""Note of what was read."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""As safetensors calls them."""
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
Layout = Literal["hf", "original"]
"""``hf``: names of transformers' `InternVLVisionModel`; ``original``: of `InternVisionModel` in InternVL's own code."""


def read_internvl(folder: Path, *, data: bool = True) -> tuple[InternVLConfig, dict[str, Tensor], tuple[str, ...]]:
    """Reads a whole model, in the layout of transformers or of InternVL's own code.

    Args:
        folder: With a configuration and weights, in one file or several with an index.
        data: Whether the numbers are wanted; without them tensors are on the meta device, and not all is checked.

    Returns:
        transformers' configuration; the state dict that fits it exactly, in the files' dtypes; what was done to it.

    Raises:
        UserError: If a file is missing or damaged, holds code, or does not fit the configuration, by what differs.
    """
    config: Any = read_config(folder)
    tensors = _read_tensors(weight_files(folder), data)
    native = to_native(tensors)
    notes = [TRANSLATED] if is_original(tensors) else []
    if config.tie_word_embeddings and _EMBEDDINGS in native:
        if _HEAD not in native:
            native[_HEAD] = native[_EMBEDDINGS]
            notes.append("the output head is the language model's embeddings")
        elif data and not torch.equal(native[_HEAD], native[_EMBEDDINGS]):
            raise UserError(f"{folder} must hold one matrix as embeddings and output head, as it says; it holds two")
    check_tensors(config.vision_config, vision_part(native)[0], str(folder))
    if data:
        with torch.device("meta"):
            expected = build_empty(config).state_dict()
        check_fit(expected, native, str(folder))
    return config, native, tuple(notes)


def read_vision(
    path: Path, like: InternVLVisionConfig | None = None
) -> tuple[InternVLVisionConfig, dict[str, Tensor], tuple[str, ...]]:
    """Reads a vision transformer: alone, as ViTP's ``extract_vit`` writes it, or out of a whole model, in any layout.

    Args:
        path: A folder as for `read_internvl`; or a file with weights, with or without a configuration beside it.
        like: The configuration of a file that has none beside it.

    Returns:
        transformers' configuration; the state dict of its `InternVLVisionModel`, in the files' dtypes; what was done.

    Raises:
        UserError: As `read_internvl`.
    """
    require_transformers()
    folder = path.parent if path.is_file() else path
    own = like is None or not path.is_file() or (folder / CONFIG).is_file()
    config: Any = read_vision_config(folder) if own else like
    tensors, notes = _vision_tensors(path)
    check_tensors(config, tensors, str(path))
    with torch.device("meta"):
        expected = build_vision(config).state_dict()
    check_fit(expected, tensors, str(path))
    return config, tensors, notes


def _vision_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads a vision transformer's tensors, under transformers' names, and what was done to find them."""
    if path.is_file():
        found = read_foreign(path, VISION_MARKS)
        translated = (TRANSLATED,) if is_original(found.tensors) else ()
        return vision_to_native(found.tensors), (*found.notes, *translated)
    tensors = _read_tensors(weight_files(path), True)
    native, beside = vision_part(tensors)
    notes = [TRANSLATED] if is_original(tensors) else []
    notes += [f"left out what is not the vision transformer's: {first_few(beside)}"] if beside else []
    return native, tuple(notes)


def read_outline(folder: Path) -> dict[str, Tensor]:
    """Returns the names, shapes and dtypes of a folder's tensors as its files have them, on the meta device.

    Raises:
        UserError: If a file is missing or damaged, or holds code.
    """
    return _read_tensors(weight_files(folder), False)


def build_empty(config: InternVLConfig, *, draw: bool = False) -> InternVLForConditionalGeneration:
    """Returns transformers' model in fp32, on torch's default device, its weights drawn by torch's generator or not."""
    from transformers import InternVLForConditionalGeneration
    from transformers.initialization import no_init_weights

    if draw:
        return InternVLForConditionalGeneration(config)
    with no_init_weights():
        model = InternVLForConditionalGeneration(config)
    model.tie_weights()
    return model


def build_vision(config: InternVLVisionConfig) -> InternVLVisionModel:
    """Returns transformers' vision transformer in fp32, on torch's default device; its weights are to be loaded."""
    from transformers import InternVLVisionModel
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return InternVLVisionModel(config)


@dataclass(frozen=True)
class Extraction:
    """What was taken out of a model."""

    kept: tuple[str, ...]
    """Names of the model's tensors that were written."""
    dropped: tuple[str, ...]
    """Names of those that were not."""


def write_vision(
    model: InternVLForConditionalGeneration, folder: Path, layout: Layout = "hf", dtype: torch.dtype = torch.float32
) -> Extraction:
    """Writes a model's vision transformer as a Hugging Face folder.

    Args:
        model: transformers' whole model.
        folder: Is made if it is not there; ``config.json`` and ``model.safetensors`` are written into it.
        layout: Under which names.
        dtype: Of the numbers; ViTP's ``extract_vit`` writes bf16.

    Raises:
        UserError: If the layout has no place for what the transformer has.
    """
    state, tower = model.state_dict(), model.model.vision_tower
    own = {name.removeprefix(NATIVE_VISION): t for name, t in state.items() if name.startswith(NATIVE_VISION)}
    settings = tower.config.to_dict() | {"architectures": ["InternVLVisionModel"], "dtype": _name(dtype)}
    if layout == "original":
        _require_original(own)
        own, settings = vision_to_original(own), original_vision_settings(tower.config, dtype)
    elif layout != "hf":
        raise UserError(f"the layout must be hf or original, got {layout!r}")
    _write(folder, own, settings, dtype)
    kept = tuple(name for name in state if name.startswith(NATIVE_VISION))
    return Extraction(kept, tuple(name for name in state if name not in kept))


def write_internvl(model: InternVLForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a whole model in the layout of InternVL's own code, without its tokenizer.

    Args:
        model: transformers' whole model.
        folder: Is made if it is not there; ``config.json`` and ``model.safetensors`` are written into it.
        dtype: Of the numbers.

    Raises:
        UserError: If the layout has no place or no words for what the model has.
    """
    state = model.state_dict()
    _require_original(vision_part(state)[0])
    if model.config.tie_word_embeddings:
        del state[_HEAD]
    _write(folder, to_original(state), original_settings(model.config, dtype), dtype)


def _require_original(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError if the original has no place for what a vision transformer has."""
    if "layernorm.weight" in tensors or "embeddings.mask_token" in tensors:
        raise UserError("the original's InternViT has no final norm and no mask token; use layout hf")


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: t.detach().to("cpu", dtype).contiguous().clone() for name, t in tensors.items()}
    save_file(written, folder / WEIGHTS[0], metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_tensors(files: list[Path], data: bool) -> dict[str, Tensor]:
    """Reads the tensors of files, each name once."""
    found: dict[str, Tensor] = {}
    for file in files:
        own = _read_file(file, data)
        twice = sorted(found.keys() & own.keys())
        if twice:
            raise UserError(f"{file} holds tensors that another file of its folder holds, too: {first_few(twice)}")
        found |= own
    return found


def _read_file(file: Path, data: bool) -> dict[str, Tensor]:
    if not data and file.suffix == ".safetensors":
        return _outline(file)
    content = read_container(file, data=data).content
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)} if _is_plain(content) else {}
    )
    if not tensors:
        raise UserError(f"{file} must hold tensors under their names, and nothing else")
    return tensors


def _is_plain(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(name, str) for name in content)


def _outline(file: Path) -> dict[str, Tensor]:
    """Returns names, shapes and dtypes of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            parts = {name: opened.get_slice(name) for name in names}
            return {
                name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta")
                for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is cut off or damaged; fetch it again") from error
