"""Weights files of other programs: the models in them, found by their tensors' names whatever is wrapped around them.

Training programs save a state dict bare or in a section (``state_dict``, ``model``, ``ema``), beside counters, settings
and the optimiser, and under prefixes of whatever held the model (``module.``, ``_orig_mod.``, ``clip.``). A model is
known by names that every model of its kind has, so any section and any prefix will do, as long as one model is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harma_ray.errors import UserError, count, first_few
from harma_ray.models.containers import Container, read_container
from harma_ray.models.inert import Inert
from harma_ray.models.names import OWN_FORMAT

CLIP_MARK = "token_embedding.weight"
"""A tensor that every CLIP has, beside those under `visual.`."""
ACTIVATION = "activation"
"""Under which a safetensors file of this program says which activation its CLIP was trained with."""
QUICK_GELU, GELU = "quick GELU", "GELU"
_CLIP4CIR_SECTION = "CLIP"
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
_GEORSCLIP = "RS5M_ViT-B-32"
"""How the names of GeoRSCLIP's releases begin that were fine-tuned from OpenAI's weights."""
_WRAPPERS = ("module.", "_orig_mod.")
_TRAINING = ("optim", "sched", "scaler")
"""In the names of sections that hold a training's state."""
_MAX_DEPTH = 5


@dataclass(frozen=True)
class ForeignWeights:
    """One model of a file."""

    path: Path
    """The file."""
    tensors: Mapping[str, Tensor]
    """Under the names that the model's own program gives them; on the CPU, in the file's dtypes."""
    mark: str = ""
    """The tensor by which the model was found, such as `CLIP_MARK`; empty: by none, it is of no known kind."""
    section: str = ""
    """Where in the file they lie, such as ``state_dict``; empty: at the top."""
    prefix: str = ""
    """What stood before every name."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of the same section that do not belong to the model."""
    container_notes: tuple[str, ...] = ()
    """What was done to get at the section."""
    quick_gelu: bool | None = None
    """Whether it was trained with quick GELU; None: the file does not say."""
    activation_source: str = ""
    """How the file says so."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """What the file says beside its tensors: texts of a safetensors file, plain values and mappings of one of torch."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to read it."""
        prefix = (f"prefix `{self.prefix}` taken off the names",) if self.prefix else ()
        names = list(self.beside)
        left_out = (f"{count(len(names), 'tensor')} without that prefix left out: {first_few(names)}",) if names else ()
        return (*self.container_notes, *prefix, *left_out)

    @property
    def label(self) -> str:
        """What tells this model apart from others in the file."""
        return ".".join(part for part in (self.section, self.prefix.rstrip(".")) if part) or "(top)"


@dataclass(frozen=True)
class _Section:
    """A mapping or a module with tensors in it."""

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    classes: frozenset[str] = frozenset()


def read_foreign(
    path: str | Path, marks: Sequence[str] = (CLIP_MARK,), *, section: str = "", data: bool = True
) -> ForeignWeights:
    """Reads the model of a file without executing anything in it.

    Args:
        path: The file; its content counts, not its suffix.
        marks: Names of tensors by which models are known; models of other kinds are left aside.
        section: Which of several models, by its section, its prefix, or both (``ema``, ``student``).
        data: Whether the numbers are wanted, see `harma_ray.models.containers.read_container`.

    Raises:
        UserError: If the file is missing, damaged, holds code, no tensors, or several models and none is chosen.
    """
    path = Path(path).expanduser()
    models = read_models(path, marks, data=data)
    if section:
        chosen = [m for m in models if section in (m.label, m.section, m.prefix.rstrip("."))]
        if len(chosen) != 1:
            raise UserError(f"{path} has no single model `{section}`; there are {_labels(models)}")
        return chosen[0]
    if len(models) > 1 and not data:
        return read_foreign(path, marks)  # equal copies are one model, which only the numbers tell
    if len(models) > 1:
        raise UserError(
            f"{path} holds {len(models)} models that differ: {_labels(models)}; take one out with launch.py checkpoint "
            f"import {path} --section {models[0].label} --recipe RECIPE --out FOLDER"
        )
    return models[0]


def read_models(path: Path, marks: Sequence[str] = (CLIP_MARK,), *, data: bool = True) -> list[ForeignWeights]:
    """Reads all models of a file, equal copies once; arguments and errors as for `read_foreign`."""
    container = read_container(path, data=data)
    sections = list(_sections(container.content))
    if not sections:
        raise UserError(f"{path} must hold tensors under their names, got {_describe(container.content)}")
    found = [model for section in sections for model in _models_of(path, container, section, marks)]
    if container.metadata.get("format") == OWN_FORMAT:
        found, sections = [], sections[:1]
    if not found:
        plain = [section for section in sections if not any(word in ".".join(section.path) for word in _TRAINING)]
        if len(plain) != 1:
            listed = ", ".join(f"`{'.'.join(section.path)}`" for section in plain or sections)
            raise UserError(
                f"{path} holds tensors in several sections, and no CLIP or other known model in any: {listed[:200]}"
            )
        return [_unknown(path, container, plain[0])]
    different: list[ForeignWeights] = []
    for model in found:
        if not (data and any(_same(model, other) for other in different)):
            different.append(model)
    return different


def _models_of(path: Path, container: Container, section: _Section, marks: Sequence[str]) -> Iterator[ForeignWeights]:
    """Finds the models in a section by the names that their kinds have."""
    for mark in marks:
        for name in section.tensors:
            prefix = name.removesuffix(mark)
            if not name.endswith(mark) or (prefix and not prefix.endswith(".")):
                continue
            own = {n.removeprefix(prefix): t for n, t in section.tensors.items() if n.startswith(prefix)}
            if mark == CLIP_MARK and not any(n.startswith("visual.") for n in own):
                continue
            strange = [n for n in section.others if n.startswith(prefix) and "." in n.removeprefix(prefix)]
            if strange:
                raise UserError(
                    f"{path} must hold tensors alone in its state dict, got other things under {first_few(strange)}"
                )
            quick_gelu, source = _activation(path, container, section, own)
            yield ForeignWeights(
                path, own, mark, ".".join(section.path), prefix,
                {n: tensor for n, tensor in section.tensors.items() if not n.startswith(prefix)},
                _container_notes(container, section), quick_gelu, source, _entries(container),
            )  # fmt: skip


def _unknown(path: Path, container: Container, section: _Section) -> ForeignWeights:
    """Returns tensors of no known model, without the usual wrappers' prefixes."""
    tensors, prefix = section.tensors, ""
    for wrapper in _WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors):
            tensors, prefix = {name.removeprefix(wrapper): t for name, t in tensors.items()}, prefix + wrapper
    notes, where = _container_notes(container, section), ".".join(section.path)
    return ForeignWeights(path, tensors, "", where, prefix, container_notes=notes, entries=_entries(container))


def _entries(container: Container) -> dict[str, Any]:
    content = container.content if isinstance(container.content, Mapping) else {}
    kinds = (str, int, float, Mapping)
    plain = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, kinds)}
    return {**plain, **container.metadata}


def _sections(content: Any, path: tuple[str, ...] = ()) -> Iterator[_Section]:
    """Walks through mappings and modules for tensors under names."""
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(content, Inert) and (_is_module(content) or content.origin.startswith("__torch__.")):
        classes: set[str] = set()
        tensors = dict(_module_tensors(content, "", classes, set()))
        if tensors:
            yield _Section(path, tensors, module=content.origin, classes=frozenset(classes))
            return
    entries = content.entries if isinstance(content, Inert) else content
    if not isinstance(entries, Mapping):
        return
    named = {name: value for name, value in entries.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
    if tensors:
        yield _Section(path, tensors, others)
    for name, value in others.items():
        yield from _sections(value, (*path, name))


def _is_module(value: Inert) -> bool:
    return isinstance(value.state, Mapping) and {"_parameters", "_modules"} <= value.state.keys()


def _module_tensors(module: Inert, prefix: str, classes: set[str], above: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Picks parameters and buffers out of a pickled `nn.Module` or a TorchScript module, which are inert here."""
    state = module.state if isinstance(module.state, Mapping) else {}
    classes.add(module.origin.rpartition(".")[2])
    if _is_module(module):
        hidden = state.get("_non_persistent_buffers_set") or ()
        buffers = {name: t for name, t in (state.get("_buffers") or {}).items() if name not in hidden}
        state = {**state["_parameters"], **buffers, **state["_modules"]}
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert) and id(value) not in above:
            yield from _module_tensors(value, f"{prefix}{name}.", classes, above | {id(module)})


def _activation(
    path: Path, container: Container, section: _Section, own: Mapping[str, Tensor]
) -> tuple[bool | None, str]:
    """Returns whether a file says that its CLIP was trained with quick GELU, and how it says so."""
    if container.metadata.get(ACTIVATION) in (QUICK_GELU, GELU):
        return container.metadata[ACTIVATION] == QUICK_GELU, "says so itself"
    if section.path[-1:] == (_CLIP4CIR_SECTION,):
        return True, "is a CLIP4Cir file"
    if all(name in own for name in _OPENAI_EXTRAS):
        return True, "is OpenAI's own file"
    if {"QuickGELU", "GELU"} & section.classes:
        return "QuickGELU" in section.classes, "holds its layers' classes"
    if path.name.startswith(_GEORSCLIP):
        return True, "is GeoRSCLIP's, by its name"
    return None, ""


def _container_notes(container: Container, section: _Section) -> tuple[str, ...]:
    notes = []
    if section.module and container.form == "TorchScript":
        notes.append("TorchScript archive: its tensors were read as data, its code was not run")
    elif section.module:
        notes.append(f"whole pickled model (`{section.module}`): its tensors were read as data, its code was not run")
    elif container.origins:
        notes.append(f"objects of other programs were left out unread: {first_few(list(container.origins))}")
    if section.path:
        notes.append(f"section `{'.'.join(section.path)}`")
        top = container.content if isinstance(container.content, Mapping) else {}
        rest = [str(name) for name in top if name != section.path[0]]
        notes += [f"left out beside it: {first_few(rest)}"] if rest else []
    elif section.others:
        notes.append(f"left out what is no tensor: {first_few(list(section.others))}")
    return tuple(notes)


def fitted(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Drops what is no weight and fills in what nothing depends on; everything else stays for a strict check.

    Args:
        expected: What the model has.
        given: A file's tensors under the model's names.

    Returns:
        Tensors to load, and what was done.
    """
    kept = {name: tensor for name, tensor in given.items() if name in expected or not _is_no_weight(name, tensor)}
    notes = []
    dropped = [name for name in given if name not in kept]
    if dropped:
        notes.append(f"left out, as they are no weights of this model: {first_few(dropped)}")
    for name, tensor in kept.items():
        if name in expected and tensor.numel() == expected[name].numel() == 1 and tensor.shape != expected[name].shape:
            kept[name] = tensor.reshape(expected[name].shape)
    unused = [n for n in expected if n not in kept and n.rpartition(".")[2] in ("logit_scale", "num_batches_tracked")]
    if unused:
        notes.append(f"not in the file, and not used here: {first_few(unused)}")
        kept |= {name: expected[name] for name in unused}
    converted = sorted({
        f"{str(tensor.dtype).removeprefix('torch.')} to {str(expected[name].dtype).removeprefix('torch.')}"
        for name, tensor in kept.items()
        if name in expected and tensor.dtype != expected[name].dtype
    })  # fmt: skip
    if converted:
        notes.append(f"converted from {', '.join(converted)}")
    return kept, notes


def _is_no_weight(name: str, tensor: Tensor) -> bool:
    """Tells whether a tensor is a constant or serves a loss: OpenAI's sizes, masks, positions, SigLIP's bias."""
    leaf = name.rpartition(".")[2]
    if name.removeprefix("model.") in (*_OPENAI_EXTRAS, "logit_bias"):
        return tensor.numel() == 1
    if leaf == "position_ids":
        return tensor.is_meta or torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()))
    if leaf == "attn_mask" and tensor.ndim == 2 and tensor.is_floating_point():
        return tensor.is_meta or torch.equal(tensor.float(), torch.full(tensor.shape, -torch.inf).triu(1))
    return False


def _same(one: ForeignWeights, other: ForeignWeights) -> bool:
    if one.mark != other.mark or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def _labels(models: list[ForeignWeights]) -> str:
    return ", ".join(f"`{model.label}`" for model in models)


def _describe(content: Any) -> str:
    if isinstance(content, Inert):
        return f"an object of `{content.origin}`"
    if isinstance(content, Mapping):
        return f"a mapping of {first_few([str(name) for name in content])}" if content else "an empty mapping"
    return f"a {type(content).__name__}"
