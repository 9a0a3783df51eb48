"""A small InternVL with noise in every weight, and talks about tiles: 4 image tokens a tile, 4 x 4 patches."""

import torch

from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.models.internvl.token_drop import TOKEN_DROPS

SIDE, PATCH, FEATURES, VOCABULARY, IMAGE = 32, 8, 4, 60, 59
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": PATCH,
    "attention_bias": True,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "tie_word_embeddings": False,
}


def small_config(vision=None, text=None, **whole):
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    return InternVLConfig(
        **{
            "vision_config": InternVLVisionConfig(**VISION | (vision or {})),
            "text_config": Qwen2Config(**TEXT | (text or {})),
            "image_token_id": IMAGE,
            "image_seq_length": FEATURES,
            "tie_word_embeddings": False,
        }
        | whole
    )


def small_core(seed=0, config=None):
    from transformers import InternVLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = InternVLForConditionalGeneration(config or small_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return core.eval()


def small_model(token_drop=TOKEN_DROPS["none"], seed=0, config=None):
    return VisualInstructionModel(small_core(seed, config), token_drop)


def tiles(count, seed=1, side=SIDE):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def talks(num_tiles, seed=2, padding=0):
    """Returns a sample for each number of tiles: words, image tokens, words of which the last few are supervised."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count in num_tiles:
        before, after = (int(n) for n in torch.randint(2, 7, (2,), generator=generator))
        words = torch.randint(1, VOCABULARY - 1, (before + after + 2,), generator=generator)
        ids = torch.cat([words[:before], torch.full((FEATURES * count,), IMAGE), words[before:]])
        labels = ids.clone()
        labels[:-after] = IGNORED
        samples.append((ids, labels))
    return pad(samples, padding)


def pad(samples, more=0):
    length = max(len(ids) for ids, _ in samples) + more
    batch = {
        "input_ids": torch.zeros(len(samples), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), IGNORED),
    }
    for row, (ids, labels) in enumerate(samples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = labels
    return batch


def samples_of(batch):
    return [
        (ids[mask.bool()], labels[mask.bool()])
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
