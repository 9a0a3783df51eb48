"""A tokenizer with InternVL's special tokens, and room for them in a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import InternVLConfig, PreTrainedTokenizerBase


def read_tokenizer(folder: Path, config: InternVLConfig) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a Hugging Face folder; nothing in it is executed, nothing fetched.

    Args:
        folder: The folder.
        config: Its configuration: transformers, left to read the original's by itself, warns of an unknown model.

    Raises:
        UserError: If there is none that transformers knows by itself.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} must hold a tokenizer that transformers can read by itself ({reason})") from error


def require_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], origin: str) -> None:
    """Raises UserError, naming those that are missing, if a tokenizer has not all of some tokens."""
    known: Any = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if missing:
        raise UserError(
            f"{origin} must have a tokenizer with the tokens that talks are written with, but it lacks "
            f"{', '.join(missing)}; take the tokenizer of an InternVL, with its model"
        )


def with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer, to which `SPECIAL_TOKENS` were added if it had them not."""
    known: Any = tokenizer.get_vocab()
    absent = [token for token in SPECIAL_TOKENS if token not in known]
    if absent:
        tokenizer.add_tokens(absent, special_tokens=True)
    return tokenizer


def make_room(model: Any, num_tokens: int, num_new: int) -> None:
    """Gives a model rows for all tokens of a tokenizer, those of new tokens at the mean of the others', in place.

    The original shrinks a vocabulary that has rows to spare; here they stay.

    Args:
        model: transformers' model.
        num_tokens: Of the tokenizer.
        num_new: The last so many of them were added to it.

    Raises:
        UserError: If the tokenizer is not the model's.
    """
    known = num_tokens - num_new
    embeddings, head = model.get_input_embeddings(), model.lm_head
    if known > len(embeddings.weight):
        rows = f"{len(embeddings.weight):,}"
        raise UserError(f"the tokenizer has {known:,} tokens, but the model {rows} rows; take both from one model")
    if not num_new:
        return
    is_tied = head.weight is embeddings.weight
    embeddings.weight = _extended(embeddings.weight, known, num_tokens)
    head.weight = embeddings.weight if is_tied else _extended(head.weight, known, num_tokens)
    embeddings.num_embeddings = head.out_features = model.config.text_config.vocab_size = len(head.weight)


def _extended(weight: Tensor, known: int, num_tokens: int) -> nn.Parameter:
    """Returns rows for `num_tokens`, of which those after the known ones are the known ones' mean."""
    rows = torch.cat([weight, weight.new_empty(max(0, num_tokens - len(weight)), weight.shape[1])]).detach()
    rows[known:num_tokens] = rows[:known].mean(0)
    return nn.Parameter(rows)
