"""open_clip, imported without what nothing here needs of its imports: a fifth of what a process takes to import.

That is transformers, for text towers that a `DualEncoder` refuses, and Weights & Biases, which timm takes along where
it is installed; timm itself is imported for the first image tower that is one of its. Whoever needs open_clip takes it
from here.
"""

import contextlib
import functools
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
            modules.pop(name, None)


with deferred_compiler(), _without("wandb"), _without("transformers"), _without("timm"):
    import open_clip
    import open_clip.timm_model
    from open_clip.transformer import QuickGELU, Transformer, VisionTransformer


def _import_timm_later(tower: Any) -> None:
    """Has the class of timm's image towers import timm when the first is made or unpickled."""
    with_timm, restore = tower.__init__, tower.__setstate__

    def import_now() -> None:
        with deferred_compiler(), _without("wandb"):
            import timm
        names = {name: name for name in ("RotAttentionPool2d", "Mlp", "to_2tuple")}
        names |= {"AbsAttentionPool2d": "AttentionPool2d"}
        found = {name: getattr(timm.layers, theirs) for name, theirs in names.items()}
        vars(sys.modules[tower.__module__]).update(found, timm=timm)
        if tower.__init__ is make_first:
            tower.__init__ = with_timm
        if vars(tower).get("__setstate__") is restore_first:
            del tower.__setstate__

    @functools.wraps(with_timm)
    def make_first(*arguments: Any, **options: Any) -> None:
        import_now()
        with_timm(*arguments, **options)

    def restore_first(self: Any, state: Any) -> None:
        import_now()
        restore(self, state)

    tower.__init__, tower.__setstate__ = make_first, restore_first


if open_clip.timm_model.timm is None:
    _import_timm_later(open_clip.timm_model.TimmModel)
