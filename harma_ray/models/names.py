"""Weights by the names that settings give them: what is wrong with these is told without torch."""

from pathlib import Path

from harma_ray.errors import UserError
from harma_ray.files import did_you_mean, near_paths

HUB, FOLDER = "hf-hub:", "local-dir:"
OWN_FORMAT = "harma_ray adapter"
"""What an adapter file of this program says of itself."""
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def is_elsewhere(name: str) -> bool:
    """Tells whether a name is that of a repository of the hub, or of a folder like one."""
    return name.startswith((HUB, FOLDER))


def require_file(architecture: str, pretrained: str) -> None:
    """Raises UserError for what can be nothing but a file with a CLIP's weights, and is not there."""
    is_path = "/" in pretrained or Path(pretrained).suffix in _SUFFIXES
    if is_path and not is_elsewhere(pretrained) and not Path(pretrained).expanduser().is_file():
        near = did_you_mean(near_paths(Path(pretrained).expanduser(), Path.is_file))
        raise unknown_weights(architecture, pretrained, f"there is no such file{near}")


def unknown_weights(architecture: str, pretrained: str, near: str) -> UserError:
    """Returns what is told of weights that a CLIP cannot have; `near` says what may have been meant."""
    return UserError(
        "`pretrained` must be `random`, an existing file, hf-hub:ORG/NAME, or a tag of the architecture, got "
        f"{pretrained!r} for `{architecture}`; {near}"
    )


def require_named(recipe: str, pretrained: str, other_way: str = "") -> None:
    """Raises UserError if nobody named the weights of a CLIP that stays frozen; `other_way` is one more way out."""
    if not pretrained:
        raise UserError(
            f"recipe {recipe} keeps the backbone frozen, so its weights must be named; give {other_way}"
            "--set model.pretrained=FILE (`checkpoint export --format open_clip` writes one), or "
            "--set model.pretrained=random if a random backbone is what you want"
        )
