"""open_clip, imported without what nothing here needs of its imports: a fifth of what a process takes to import.

That is transformers, for text towers that a `DualEncoder` refuses, and Weights & Biases, which timm takes along where
it is installed. Whoever needs open_clip takes it from here.
"""

import contextlib
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


with deferred_compiler(), _without("wandb"), _without("transformers"):
    import open_clip
    from open_clip.transformer import QuickGELU, Transformer, VisionTransformer
