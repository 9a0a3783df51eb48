"""Encoding of texts, the work shared by all workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harma_ray.data.order import worker_rows
from harma_ray.distributed import gather_rows, rank, world_size
from harma_ray.models.clip import DualEncoder


@torch.no_grad()
def encode_texts(
    model: DualEncoder, tokenizer: Callable[..., Tensor], texts: list[str], batch_size: int, *, normalize: bool = True
) -> Tensor:
    """Encodes captions, equal ones once, the work shared by all workers.

    Args:
        model: The unwrapped model.
        tokenizer: Its backbone's; cuts captions that are too long.
        texts: M captions, the same on every worker.
        batch_size: Captions at a time.
        normalize: Give unit vectors.

    Returns:
        fp32[M, E] on CPU, the same on every worker.
    """
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    place = {text: number for number, text in enumerate(distinct)}
    own = [distinct[i] for i in worker_rows(len(distinct), rank(), world_size())]
    parts = [
        model.encode_text(tokenizer(own[start : start + batch_size]), normalize=normalize).float()
        for start in range(0, len(own), batch_size)
    ]
    width = model.embedding_width
    encoded = torch.cat(parts) if parts else torch.empty(0, width, device=model.temperature.device)
    return gather_rows(encoded).cpu()[[place[text] for text in texts]]
