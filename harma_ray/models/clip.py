"""The dual encoder that the recipes train: open_clip's CLIP plus temperatures.

Shape letters: B batch, L tokens, D width of the text tower, E embedding.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harma_ray.errors import UserError
from harma_ray.models.adapters import Padding
from harma_ray.models.architectures import pixel_statistics
from harma_ray.models.kernels import SelfAttention, use_kernels
from harma_ray.models.openclip import open_clip
from harma_ray.models.packing import Packing


class DualEncoder(nn.Module):
    """An open_clip CLIP with HarMA's temperature: images and captions in, comparable unit vectors out.

    Args:
        clip_model: open_clip's `CLIP`, with or without adapters.
        temperature: start of the learnable temperature; logits are divided by it.
        affiliation_temperature: start of the affiliation loss's own temperature; None: there is none.
        text_tokens: "full": all positions of the context, no padding mask, as HarMA's released weights expect;
            "trim": cut to the longest caption of the batch, padding hidden from the adapters' attention, so that
            a caption's embedding depends on that caption alone, at a third of the work.

    Captions of unequal lengths are not to be encoded by two threads at once: their padding waits at the model's parts.

    Attributes:
        clip: the open_clip model; its parameters lie under `clip.`.
        packs_text: whether trimmed captions are encoded without any padding, with equal results; None: on a CPU, where
            it spares work. A GPU whose host is busy with launching has to be asked first (``benchmarks/gpu.py``).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        clip_model: nn.Module,
        *,
        temperature: float = 0.07,
        affiliation_temperature: float | None = None,
        text_tokens: str = "full",
    ):
        super().__init__()
        pooling = getattr(clip_model, "text_pool_type", None)
        if not isinstance(clip_model, open_clip.CLIP) or pooling != "argmax":
            raise UserError(
                "a dual encoder needs open_clip's `CLIP` with captions pooled at the end-of-text token (`argmax`), "
                f"got `{type(clip_model).__name__}` with {pooling!r}; choose an architecture such as ViT-B-32"
            )
        if text_tokens == "trim" and clip_model.attn_mask is None:
            raise UserError("`text_tokens: trim` needs a causal text tower, or padding would be seen; use `full`")
        use_kernels(clip_model)
        self.clip = clip_model
        self.text_tokens = text_tokens
        self.packs_text: bool | None = None
        self._is_compiled = False
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.affiliation_temperature = None
        if affiliation_temperature is not None:
            self.affiliation_temperature = nn.Parameter(torch.tensor(float(affiliation_temperature)))
        mean, std = pixel_statistics(clip_model)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def embedding_width(self) -> int:
        """E, the width of the embeddings."""
        visual: Any = self.clip.visual
        return visual.output_dim

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
        self.clip.set_grad_checkpointing(enable)

    def compile_blocks(self) -> None:
        """Let `torch.compile` fuse what each block of the towers does, in place, on the first call.

        Blocks of a tower are alike, so that one is compiled for all; captions of a second length make it one for any.
        What this process compiled before is forgotten, since dynamo compiles a function for a few models alone.
        Captions are not packed in training then: that would be compiled for every number of tokens.
        """
        torch.compiler.reset()
        self._is_compiled = True
        for tower in (self.clip.visual, self.clip):
            transformer: Any = getattr(tower, "transformer", None)
            for part in (tower,) if transformer is None else transformer.resblocks:
                part.compile()

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Encode pairs.

        Args:
            image: see `encode_image`.
            text: see `encode_text`; or (B, K, L), K captions of each image.

        Returns:
            `image` and `text`, (B, E) or (B, K, E), fp32, L2-normalised; `temperature` and, if there is one,
            `affiliation_temperature`, scalars.
        """
        captions = self.encode_text(text.flatten(0, -2)).unflatten(0, text.shape[:-1])
        return self.outputs(self.encode_image(image), captions)

    def outputs(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Return what `forward` does, of vectors that are there."""
        found = {"text": text, "image": image, "temperature": self.temperature}
        if self.affiliation_temperature is not None:
            found["affiliation_temperature"] = self.affiliation_temperature
        return found

    def encode_image(self, image: Tensor, *, normalize: bool = True) -> Tensor:
        """Encode images.

        Args:
            image: (B, 3, H, W) on the model's device, uint8 in [0, 255], or floating point and normalised already.
            normalize: give unit vectors.

        Returns:
            (B, E), at least fp32 if normalised.
        """
        if image.dtype == torch.uint8:
            image = (image.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std
        elif not image.is_floating_point():
            raise ValueError(f"images must be uint8 or floating point, got {image.dtype}")
        return unit(self.clip.encode_image(image)) if normalize else self.clip.encode_image(image)

    def encode_text(self, text: Tensor, *, normalize: bool = True) -> Tensor:
        """Encode captions.

        At the full length this computes open_clip's `CLIP.encode_text`.

        Args:
            text: token ids, integers (B, L), L at most the context length; end-of-text has the highest id. With
                `text_tokens: trim`, tokens on the CPU spare a GPU from being waited for.
            normalize: give unit vectors.

        Returns:
            (B, E), at least fp32 if normalised.
        """
        features = self.encode_tokens(self.cut(text), self._packing(text))
        return unit(features) if normalize else features

    def cut(self, text: Tensor, multiple: int = 1) -> Tensor:
        """Return captions as the text tower runs them: on the model's device, cut with `text_tokens: trim`.

        Args:
            text: see `encode_text`.
            multiple: lengths that are cut to are rounded up to a multiple of this, where the context is that long.
        """
        clip: Any = self.clip
        context = len(clip.positional_embedding)
        if text.shape[1] > context:
            raise UserError(
                f"captions must have at most {context} tokens, got {text.shape[1]}; "
                "use the architecture's own tokenizer"
            )
        longest = _longest(text) if self.text_tokens == "trim" else text.shape[1]
        return text.to(self.temperature.device, non_blocking=True)[:, : -(-longest // multiple) * multiple]

    def encode_tokens(self, text: Tensor, packing: Packing | None = None) -> Tensor:
        """Return the features (B, E) of captions that are cut, on the model's device; nothing waits for it.

        Args:
            text: what `cut` returns.
            packing: how they are packed; None: they are not.
        """
        clip: Any = self.clip
        ends = text.argmax(dim=-1)
        length, dtype = text.shape[1], clip.transformer.get_cast_dtype()
        # contiguous, so that what is compiled for one length fits any
        causal = None if clip.attn_mask is None else clip.attn_mask[:length, :length].contiguous()
        x_BLD = clip.token_embedding(text).to(dtype) + clip.positional_embedding[:length].to(dtype)
        if packing is not None:
            end_BD = self._run_text_blocks(packing.pack(x_BLD), causal, packing)[packing.ends]
        else:
            is_trimmed = self.text_tokens == "trim"
            hidden = torch.arange(length, device=text.device) > ends[:, None] if is_trimmed else None
            x_BLD = self._run_text_blocks(x_BLD, causal, hidden)
            end_BD = x_BLD[torch.arange(text.shape[0], device=text.device), ends]
        features = clip.ln_final(end_BD)
        if isinstance(clip.text_projection, nn.Linear):
            return clip.text_projection(features)
        return features if clip.text_projection is None else features @ clip.text_projection

    def _packing(self, text: Tensor) -> Packing | None:
        """Return how captions (B, L) are packed; None: they are not, as there is nothing to gain."""
        packs = self.temperature.device.type == "cpu" if self.packs_text is None else self.packs_text
        blocks: Any = self.clip.transformer
        fits = all(isinstance(block.attn, SelfAttention) for block in blocks.resblocks)
        is_compiled = torch.compiler.is_compiling() or (self._is_compiled and torch.is_grad_enabled())
        if not packs or not fits or self.text_tokens != "trim" or is_compiled:
            return None  # a compiled graph knows few shapes of captions, not every number of tokens
        lengths = text.argmax(dim=-1).cpu() + 1
        packing = Packing(lengths, self.temperature.device)
        return packing if packing.num_tokens < len(lengths) * int(lengths.max()) else None

    def _run_text_blocks(self, x: Tensor, causal: Tensor | None, padding: Padding) -> Tensor:
        transformer: Any = self.clip.transformer
        for block in transformer.resblocks:
            if transformer.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_run_text_block, block, x, causal, padding, use_reentrant=False)
            else:
                x = _run_text_block(block, x, causal, padding)
        return x


def unit(features: Tensor) -> Tensor:
    """Return L2-normalised features, computed in fp32 or finer."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _longest(text: Tensor) -> int:
    """Return how many positions the longest of (B, L) tokens takes; all while a graph is exported.

    A graph's shapes must not depend on its inputs; results are the same.
    """
    return text.shape[1] if torch.compiler.is_exporting() else int(text.argmax(dim=-1).max()) + 1


def _run_text_block(block: nn.Module, x: Tensor, causal: Tensor | None, padding: Padding) -> Tensor:
    """Run one block with the padding known to its parts; repeatable, so fit for activation checkpointing."""
    adapter = getattr(block.mlp, "adapter", None)
    with ExitStack() as stack:
        if adapter is not None and padding is not None:
            stack.enter_context(adapter.masking(padding))
        if isinstance(padding, Packing):
            attention: Any = block.attn
            stack.enter_context(attention.packed(padding))
        return block(x, attn_mask=causal)
