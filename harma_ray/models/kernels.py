"""Linear layers, patches and self-attention with torch's parameters, computed quicker; numbers differ by rounding.

torch takes MKL for fp32 matrices on a CPU; oneDNN, which it has with it, is a fifth faster on AMD's (where both use
AVX-512) at the shapes of a transformer; others were not measured. torch's `nn.MultiheadAttention` goes through tokens
before samples, so that a batch-first input is projected in strided parts and copied back.

Shape letters: B batch, L tokens, T tokens of a packed batch, D features, H heads.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from harma_ray.models.packing import Packing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear`, by oneDNN where that is here and would compute the same."""
    return _OneDnnLinear.apply(x, weight, bias) if _fits_onednn(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what `nn.Linear` does."""
        return linear(input, held(self, "weight"), held(self, "bias"))


class PatchEmbedding(nn.Conv2d):
    """`nn.Conv2d` that a GPU computes as one matrix product where its patches do not overlap.

    In bf16 cuDNN took 3.5 ms of a step of 57 ms, 428 images in patches of 32 on an H200.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return what `nn.Conv2d` does."""
        return self.product(input) if input.is_cuda and self._has_patches(input) else super().forward(input)

    def product(self, x: Tensor) -> Tensor:
        """Return it by a matrix product, for (B, C, H, W) that is a grid of whole patches."""
        (height, width), weight = self.kernel_size, held(self, "weight")
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return linear(patches, weight.flatten(1), held(self, "bias")).permute(0, 3, 1, 2)

    def _has_patches(self, x: Tensor) -> bool:
        size = self.kernel_size
        return (
            x.ndim == 4
            and size == self.stride != (1, 1)
            and not any(length % side for length, side in zip(x.shape[2:], size, strict=True))
            and self.padding == (0, 0)
            and self.dilation == (1, 1)
            and self.groups == 1
        )


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that projects and attends batch-first where a block asks for self-attention alone.

    Attributes:
        packing: of what comes in, (T, D); set only while a text block runs, see `packed`.
    """

    packing: Packing | None = None

    @contextmanager
    def packed(self, packing: Packing) -> Iterator[None]:
        """Take packed tokens while the block around it runs, which passes nothing but tokens and their causal mask."""
        self.packing = packing
        try:
            yield
        finally:
            self.packing = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, attn_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `nn.MultiheadAttention` does; (B, L, D) and no weights where none are needed."""
        if args or options != {"need_weights": False} or not self._is_plain(query, key, value, attn_mask):
            assert self.packing is None, "torch's own attention would take packed captions for one"
            return super().forward(query, key, value, *args, attn_mask=attn_mask, **options)
        projected = linear(query, held(self, "in_proj_weight"), held(self, "in_proj_bias"))
        attended = attend(projected, self.num_heads, attn_mask, self.packing)
        return linear(attended, held(self.out_proj, "weight"), held(self.out_proj, "bias")), None

    def _is_plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether this is self-attention of a batch without what only torch's own way knows."""
        return (
            query is key is value
            and query.ndim == (2 if self.packing else 3)
            and self.batch_first
            and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
            and self.in_proj_weight is not None
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.dropout and self.training)
        )


def attend(projected: Tensor, num_heads: int, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
    """Return the attention of each sample's tokens to each other, (B, L, D) or, packed, (T, D).

    Args:
        projected: queries, keys and values beside each other, (B, L, 3 D) or (T, 3 D).
        num_heads: H; must divide D.
        mask: what `F.scaled_dot_product_attention` takes, of the padded batch.
        packing: of packed tokens.
    """
    if packing is not None:
        return packing.pack(attend(packing.spread(projected), num_heads, mask))
    batch, length, _ = projected.shape
    query, key, value = projected.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).reshape(batch, length, -1)


_IN_BF16: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Tensor]]] = WeakKeyDictionary()
"""Of modules, frozen parameters in bf16, each with what tells its numbers; not in the modules, which are copied."""


def held(module: nn.Module, name: str) -> Any:
    """Return a module's parameter, or None; under bf16 autocast a frozen one in bf16, which is kept from call to call.

    Autocast itself keeps what it has converted of parameters that need a gradient alone, and within one step. Numbers
    that are written through ``.data``, which torch does not count, are not noticed.
    """
    parameter = getattr(module, name)
    if parameter is None or parameter.requires_grad or parameter.dtype != torch.float32 or not _rounds(parameter):
        return parameter
    kept = _IN_BF16.setdefault(module, {})
    state = (parameter.device, parameter.data_ptr(), parameter._version)  # of the numbers that were converted
    if name not in kept or kept[name][0] != state:
        kept[name] = state, parameter.detach().to(torch.bfloat16)
    return kept[name][1]


def use_kernels(model: nn.Module) -> None:
    """Let a model's linear layers, attentions and patches compute as those of this file; parameters and names stay.

    Layers of other classes, torch's subclasses among them, are left alone.
    """
    own = {nn.Linear: Linear, nn.MultiheadAttention: SelfAttention, nn.Conv2d: PatchEmbedding}
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))


class _OneDnnLinear(torch.autograd.Function):
    """x W^T + b; gradients of what needs one alone, those of weights by MKL, which is faster at the adapters' sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, rows = grad.contiguous(), grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "") if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _rounds(parameter: Tensor) -> bool:
    """Whether autocast turns matrices on this device into bf16; a compiled graph converts them by itself."""
    place = parameter.device.type
    return (
        place != "meta"
        and not torch.compiler.is_compiling()
        and not parameter.is_inference()
        and not torch.is_inference_mode_enabled()  # what is made in it cannot be kept for a training
        and torch.is_autocast_enabled(place)
        and torch.get_autocast_dtype(place) == torch.bfloat16
    )


@functools.cache
def _has_onednn() -> bool:
    """Whether torch is built with oneDNN and its linear layer, which `torch.compile` uses too."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes these: fp32 on a CPU, run as it stands, neither converted nor compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and _has_onednn()
    )
