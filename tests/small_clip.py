"""Small models for the tests of this folder."""

import open_clip
import torch

from harma_ray.models.adapters import set_tuning
from harma_ray.models.clip import DualEncoder

END_OF_TEXT = 99
CONTEXT_LENGTH = 12
ADAPTERS = {"width": 16, "num_heads": 4, "shared_width": 8}


def small_clip(*, quick_gelu=False, layers=(2, 2), seed=0, **vision):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "head_width": 8, "layers": layers[0]} | vision,
            text_cfg={"context_length": 12, "vocab_size": 100, "width": 24, "heads": 3, "layers": layers[1]},
            quick_gelu=quick_gelu,
        )


def randomised(module, names, seed=1):
    """Fill the named parameters with noise, so that nothing an adapter computes is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in names:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def adapted(*, text_tokens="full", quick_gelu=False, layers=(2, 2), affiliation_temperature=None, **options):
    """Return a dual encoder with randomised adapters and the names that train."""
    clip_model = small_clip(quick_gelu=quick_gelu, layers=layers)
    model = DualEncoder(clip_model, text_tokens=text_tokens, affiliation_temperature=affiliation_temperature)
    names = set_tuning(model, "adapters", **ADAPTERS | options)
    randomised(model, [name for name in names if name.startswith("clip.")])
    return model, names


def images(count, seed=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def captions(lengths, seed=3, context_length=CONTEXT_LENGTH):
    """Token ids: a start token, words, an end token; then zeros."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, 98, (length,), generator=generator)
        row[0], row[length - 1] = 98, END_OF_TEXT
    return text
