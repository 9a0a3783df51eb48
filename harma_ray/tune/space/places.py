"""Where searches lie, and the search spaces that come with the program, which any working folder can name."""

import sysconfig
from pathlib import Path

from harma_ray.errors import UserError
from harma_ray.files import CONFIG_NAME, RUNS, SEARCH_NAME, did_you_mean, kept_path, near_folders, near_paths
from harma_ray.shell import launch_command

_FOLDER = "search_spaces"
_ENDINGS = (".yaml", ".yml")


def search_folder(folder: str | Path) -> Path:
    """Returns the absolute folder of a search.

    Raises:
        UserError: If it is none.
    """
    folder = kept_path(folder, "the search")
    if not (folder / SEARCH_NAME).is_file():
        if (folder / CONFIG_NAME).is_file():
            way_out = f"go on with it: {launch_command('train', '--resume', folder)}"
            raise UserError(f"{folder} is not the folder of a search, but of a run; {way_out}")
        near = did_you_mean(near_folders(folder, lambda place: (place / SEARCH_NAME).is_file(), RUNS))
        raise UserError(f"{folder} is not the folder of a search (it has no {SEARCH_NAME}){near}")
    return folder


def find_space(name: str | Path) -> Path:
    """Returns the file of a search space: as it is named, else one of those that come with the program.

    ``quick``, ``quick.yaml`` and ``search_spaces/quick.yaml`` mean one of these where the working folder has no such
    file.

    Raises:
        UserError: If there is none; naming the place that was tried, and those that come with the program.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():  # a pipe, too
        return path
    known = {file.stem: file for folder in _shipped() for file in sorted(folder.glob("*.yaml"))}
    if path.parts[:-1] in ((), (_FOLDER,)) and path.suffix in ("", *_ENDINGS) and path.stem in known:
        return known[path.stem]
    ours = f"one of {', '.join(sorted(known))}" if known else "those of the source's search_spaces"
    near = did_you_mean(near_paths(path, Path.is_file))
    raise UserError(f"search space {path.absolute()} does not exist; give a YAML file, or {ours}{near}")


def _shipped() -> list[Path]:
    """Returns the folders that come with the program: of an installed package, and beside a checkout's launch.py."""
    installed = Path(sysconfig.get_path("data")) / "share" / "harma_ray" / _FOLDER
    checkout = Path(__file__).parents[3]
    return [installed, *([checkout / _FOLDER] if (checkout / "launch.py").is_file() else [])]
