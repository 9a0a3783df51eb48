"""What an export is asked for, and what is wrong with that as far as it shows without torch and the model."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from harma_ray.errors import UserError, first_few
from harma_ray.files import output_path
from harma_ray.formats import require_clip
from harma_ray.runs import CONFIG_NAME, Run
from harma_ray.training.run_files import FOLDER, META_NAME, REPORT_NAME, WEIGHTS_NAME, read_meta

EXPORTS = ("released", "adapter", "open_clip", "onnx", "huggingface")
CARD_NAME = "README.md"
BACKBONE_NAME = "backbone.safetensors"
GRAPHS_NAME = "onnx.json"
CLIP_NAME = "open_clip_config.json"
CLIP_WEIGHTS = "open_clip_model.safetensors"
LIBRARY = "harma-ray"
"""By which model cards that were made here are known."""
BackboneChoice = Literal["include", "name"]
_TOKENIZER = ("tokeniz*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*")
_INTERNVL = ("config.json", "model.safetensors", *_TOKENIZER)
_CHECKPOINT = f"{FOLDER}/step_*"
_TOWERS = ("image", "text", "combiner")
_MADE = {
    (CARD_NAME,): (
        *(CARD_NAME, CONFIG_NAME, REPORT_NAME, BACKBONE_NAME),
        *(f"{_CHECKPOINT}/{META_NAME}", f"{_CHECKPOINT}/{WEIGHTS_NAME}"),
        *(f"*/{name}" for name in _INTERNVL),
    ),
    (GRAPHS_NAME,): (GRAPHS_NAME, *(f"{tower}.onnx{part}" for tower in _TOWERS for part in ("", ".data"))),
    (CLIP_NAME,): (CLIP_NAME, CLIP_WEIGHTS),
    ("config.json", "model.safetensors"): _INTERNVL,
}
"""Files by which a folder is known to be an export, and patterns of all that such an export writes."""
_OTHER_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt")
_FOR_GRAPHS = ("onnx", "onnxscript")
"""Packages that torch's exporter needs."""


@dataclass(frozen=True)
class HubOptions:
    """What may be chosen for ``huggingface``."""

    backbone: BackboneChoice | None = None
    """Whether the weights that a CLIP started from are in the folder; None: those of files are."""
    figures: Sequence[str | Path] = ()
    """Files of ``evaluate --json``, whose figures have intervals."""


def check_export(
    run: Run, format: str, out: str | Path, *, metric: str | None, overwrite: bool, hub: HubOptions
) -> tuple[Path, Path]:
    """Returns where an export is written and the checkpoint that it is of.

    Args: as for `harma_ray.exports.checkpoint.export_checkpoint`.

    Raises:
        UserError: If the format does not fit the run, a package is missing, or `out` exists or cannot be written.
    """
    path = output_path(out)
    _require_free(path, overwrite=overwrite)
    if format not in EXPORTS:
        raise UserError(f"the format must be one of {', '.join(EXPORTS)}, got `{format}`")
    if format != "huggingface" and hub != HubOptions():
        raise UserError("`--backbone` and `--figures` are for --format huggingface; leave them out")
    checkpoint = run.best_checkpoint(metric)
    run.config.check_export(format)
    if format == "adapter" and not read_meta(checkpoint).trainable:
        raise UserError(f"run {run.path} trained nothing; export it as `open_clip`")
    if format == "open_clip":
        require_clip(run.config)
        if path.suffix in _OTHER_WEIGHTS:
            raise UserError(f"a CLIP is written as .safetensors, or as a folder, got `{path.name}`; name it otherwise")
    if format == "onnx":
        require_packages()
    return path, checkpoint


def require_packages() -> None:
    """Raises UserError if a package is missing that graphs are written with."""
    missing = [name for name in _FOR_GRAPHS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX graphs need {" and ".join(missing)}; run: pip install "harma-ray[onnx]"')


def _require_free(path: Path, *, overwrite: bool) -> None:
    """Raises UserError if what is there may not be replaced; of folders those alone that hold what an export made."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out, or replace it with --overwrite")
    if not path.is_dir() or not any(path.iterdir()):
        return
    known = next((patterns for names, patterns in _MADE.items() if _is_marked(path, names)), None)
    if known is None:
        raise UserError(f"{path} is a folder that no export made, which is not replaced; choose another --out")
    found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())
    others = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in known)]
    if others:
        raise UserError(
            f"{path} holds what no such export writes ({first_few(others)}) and is not replaced; choose another --out"
        )


def _is_marked(path: Path, names: Sequence[str]) -> bool:
    """Tells whether a folder holds the files by which an export is known; a card must be of ours."""
    return all((path / name).is_file() and (name != CARD_NAME or _is_own_card(path / name)) for name in names)


def _is_own_card(path: Path) -> bool:
    """Tells whether a file is a model card that was made here."""
    return f"library_name: {LIBRARY}\n" in path.read_text(encoding="utf-8", errors="replace")
