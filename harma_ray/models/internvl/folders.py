"""Which files a folder of an InternVL or an InternViT has; imports no torch."""

import json
from pathlib import Path

from harma_ray.errors import UserError, first_few

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def require_config(folder: Path) -> None:
    """Raises UserError unless a folder is there and has a configuration."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} must be a folder with {CONFIG}, as Hugging Face's are")


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with a folder's weights, safetensors before torch's.

    Raises:
        UserError: If there are none, an index cannot be read, or one that it names is missing.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            named = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(f"{index} must map tensors to files under weight_map, but cannot be read so") from error
        missing = [file for file in named if Path(file).name != file or not (folder / file).is_file()]
        if missing or not named:
            raise UserError(
                f"{folder} lacks files of weights that its index names: {first_few(missing) or 'none named'}"
            )
        return [folder / file for file in named]
    raise UserError(f"{folder} must hold weights in {' or '.join(WEIGHTS)}, or in several files with an index")


def files_of(path: Path) -> list[Path]:
    """Returns all files that `read_internvl` or `read_vision` read: weights, and the configuration beside them.

    Raises:
        UserError: If weights are missing.
    """
    files = [path] if path.is_file() else weight_files(path)
    config = files[0].parent / CONFIG
    return [*files, *([config] if config.is_file() else [])]
