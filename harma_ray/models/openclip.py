"""open_clip, imported without what nothing here needs of its imports: a fifth of what a process takes to import.

That is transformers, for text towers that a `DualEncoder` refuses, and Weights & Biases, which timm takes along where
it is installed; timm itself is imported for the first image tower that is one of its. Whoever needs open_clip takes it
from here.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from harma_ray.compiler import deferred_compiler

__all__ = ["QuickGELU", "Transformer", "VisionTransformer", "open_clip"]


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Lets imports of a package fail that is not there yet, as if it were not installed."""
    modules: dict[str, Any] = sys.modules
    is_there = name in modules
    if not is_there:
        modules[name] = None
    try:
        yield
    finally:
        if not is_there:
            del modules[name]


with deferred_compiler(), _without("wandb"), _without("transformers"), _without("timm"):
    import open_clip
    import open_clip.timm_model
    from open_clip.transformer import QuickGELU, Transformer, VisionTransformer


def _make_timm_tower(*arguments: Any, **options: Any) -> Any:
    """Makes an image tower as open_clip would have, had it found timm, and lets it find timm from now on."""
    with deferred_compiler(), _without("wandb"):
        tower = importlib.reload(open_clip.timm_model).TimmModel
    setattr(open_clip.model, tower.__name__, tower)
    return tower(*arguments, **options)


if open_clip.timm_model.timm is None:
    setattr(open_clip.model, open_clip.timm_model.TimmModel.__name__, _make_timm_tower)
