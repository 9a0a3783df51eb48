"""The tokenizer of the tiny model: byte-level pairs learned from what is said about drawn scenes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from harma_ray.data.scenes.content import sample_content
from harma_ray.data.scenes.looks import STYLES
from harma_ray.data.scenes.phrasing import captions
from harma_ray.data.scenes.talks import QUESTION_KINDS, add_up, ask
from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZE = 900
"""Tokens, the special ones apart."""
_PAD = "<|endoftext|>"
_NUM_SCENES = 400


@functools.cache
def vocabulary() -> PreTrainedTokenizerFast:
    """Returns the tokenizer; the same in every process. Any text can be encoded, letter by letter if need be.

    Raises:
        UserError: If the packages for it are not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(f'this recipe needs {error.name}; run: pip install "harma-ray[vitp]"') from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([_PAD, TURN_START, TURN_END, IMAGE_START, IMAGE_TOKEN, IMAGE_END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=_PAD)


def _texts() -> list[str]:
    """Returns questions, answers and captions about scenes that no data set is likely to have, of all styles."""
    texts = []
    rng = np.random.default_rng(0)
    for index in range(_NUM_SCENES):
        content, style = sample_content(2**31 - 1, index), STYLES[index % len(STYLES)]
        texts += captions(content, style)
        for kind in QUESTION_KINDS:
            texts += add_up(rng) if kind == "compare" else ask(kind, content, style, rng)
    return ["user\nassistant\nsystem\nDo both images show the same kind of place? yes no", *texts]
