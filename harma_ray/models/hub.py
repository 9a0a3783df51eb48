"""Where open_clip's weights come from: what of them is on this machine, and whether the rest can be fetched.

The libraries that fetch try a place that cannot be reached for a minute or more, once in every process; here it is
asked once, for seconds, before. What is in the cache is taken from there, and nothing newer is asked for.
Names are open_clip's own: ``hf-hub:ORG/NAME`` for a repository with ``open_clip_config.json``, ``local-dir:/PATH`` for
a folder like one.
"""

import contextlib
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from harma_ray.errors import UserError
from harma_ray.models.names import FOLDER, HUB
from harma_ray.models.openclip import open_clip

_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_CONFIGURATION = "open_clip_config.json"
_SETTING = "--set model.pretrained=FILE"
_PATIENCE_SECONDS = 5.0


def read_configuration(name: str) -> dict[str, Any]:
    """Returns what the ``open_clip_config.json`` of a repository or folder holds; it is fetched if need be.

    Raises:
        UserError: If there is none, it is none of open_clip's, or the hub cannot be reached.
    """
    file = _find(name, [_CONFIGURATION])
    try:
        found = json.loads(file.read_text("utf-8"))
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= found["model_cfg"].keys():
            raise ValueError("`model_cfg` lacks embed_dim, vision_cfg or text_cfg")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} of `{name}` must be a configuration of open_clip's ({error})") from error
    return found


def find_weights(name: str) -> Path:
    """Returns the weights of a repository or folder; they are fetched if need be.

    Raises:
        UserError: If there are none, or the hub cannot be reached.
    """
    return _find(name, _WEIGHTS)


def known_weights(name: str) -> Path | None:
    """Returns the weights of a repository or folder if they are on this machine; None if they can be fetched.

    Raises:
        UserError: If they can not.
    """
    repository = _repository(name)
    if repository is None:
        return _find(name, _WEIGHTS)
    found = _cached(repository, _WEIGHTS)
    if found is None:
        _require_hub(repository, f"`{name}`", _WEIGHTS)
    return found


def require_tag(architecture: str, tag: str) -> None:
    """Raises UserError if the weights of a tag are neither on this machine nor can be fetched, saying how to."""
    what = f"the weights `{tag}` of `{architecture}`"
    repository, names, url = _origin(architecture, tag)
    if repository:
        if _cached(repository, names) is None:
            _require_hub(repository, what, names)
    elif url and not _in_clip_cache(url).is_file():
        reason = _silence(url)
        if reason:
            raise _unreachable(what, url, reason, f"fetch {url}, and name the file here: {_SETTING}")


@contextlib.contextmanager
def from_cache(architecture: str, tag: str) -> Iterator[None]:
    """Lets open_clip take a tag's weights from the cache, if they are there, without asking the network."""
    repository, names, _ = _origin(architecture, tag)
    asks = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = asks or bool(repository and _cached(repository, names))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = asks


def _origin(architecture: str, tag: str) -> tuple[str, Sequence[str], str]:
    """Returns where a tag's weights are, as open_clip chooses: repository and names of its file, or an URL."""
    found = open_clip.get_pretrained_cfg(architecture, tag) or {}
    repository, name = os.path.split(found.get("hf_hub", ""))
    names = [f"{os.path.splitext(name)[0]}.safetensors", name] if name else _WEIGHTS
    return repository, names, found.get("url", "")


def _repository(name: str) -> str | None:
    """Returns the repository of a name; None: it is that of a folder."""
    if name.startswith(FOLDER):
        return None
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"a model of the Hugging Face hub must be named {HUB}ORG/NAME, got {name!r}")
    return repository


def _find(name: str, files: Sequence[str]) -> Path:
    """Returns the first of some files that a repository or folder has."""
    repository = _repository(name)
    if repository is None:
        folder = Path(name.removeprefix(FOLDER))
        found = next((folder / file for file in files if (folder / file).is_file()), None)
        if not folder.is_absolute() or found is None:
            raise UserError(f"`{name}` must be {FOLDER} and the absolute path of a folder with {' or '.join(files)}")
        return found
    found = _cached(repository, files)
    if found is not None:
        return found
    _require_hub(repository, f"`{name}`", files)
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the repository has no such file
            reason = " ".join(str(error).split())
            raise UserError(
                f"`{name}` cannot be fetched from {constants.ENDPOINT} ({reason}); check the name"
            ) from error
    raise UserError(f"`{name}` has no {' or '.join(files)}; name a repository made for open_clip, or another file")


def _cached(repository: str, files: Sequence[str]) -> Path | None:
    found = (try_to_load_from_cache(repository, file) for file in files)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _require_hub(repository: str, what: str, files: Sequence[str]) -> None:
    """Raises UserError if the hub cannot be reached, or must not be."""
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)
    if not reason:
        return
    fetch = f"fetch {' or '.join(files)} of {constants.ENDPOINT}/{repository}"
    if _CONFIGURATION in files:
        way_out = f"{fetch} and its weights into a folder, and name that: {FOLDER}/FOLDER"
    else:
        way_out = f"{fetch}, and name the file here: {_SETTING}"
    raise _unreachable(what, constants.ENDPOINT, reason, way_out)


def _unreachable(what: str, place: str, reason: str, way_out: str) -> UserError:
    return UserError(
        f"{what} must be fetched, but {place} cannot be reached ({reason}); where there is a network {way_out}"
    )


def _in_clip_cache(url: str) -> Path:
    """Returns where open_clip keeps what it has from other places than the hub."""
    return Path("~/.cache/clip").expanduser() / os.path.basename(url)


def _silence(url: str) -> str:
    """Returns why nothing answers at a place, asked once, through the user's proxies; empty: something does."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "harma_ray"})
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS).close()
    except urllib.error.HTTPError:
        return ""
    except ValueError as error:  # HF_ENDPOINT without https://
        return str(error)
    except HTTPException:
        return ""  # something is there, if nothing of HTTP: who fetches tells what
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return ""  # it is there; who fetches has certificates of its own
        return getattr(reason, "strerror", None) or str(reason)
    return ""
