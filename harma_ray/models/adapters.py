"""HarMA's adapters, inserted into a stock open_clip model (paper: arXiv 2404.18253; formulas as its released code).

Shape letters: B batch, L tokens, D width of the tower, A width of the adapter, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.kernels import Linear, attend, linear
from harma_ray.models.openclip import open_clip
from harma_ray.models.packing import Packing

if TYPE_CHECKING:
    from harma_ray.models.clip import DualEncoder

Padding = Tensor | Packing | None
"""What nobody may look at: bool (B, L), true where a position is padding; or how tokens are packed, without any."""


class TokenAttention(nn.Module):
    """Multi-head self-attention over the tokens of each sample, with the parameters of `nn.MultiheadAttention`.

    It is batch-first by construction: samples of a batch never see each other. No causal mask is applied.

    Args:
        width: A, features of a token.
        num_heads: H; must divide `width`.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLA: Tensor, padding: Padding = None) -> Tensor:
        """Attend.

        Args:
            x_BLA: tokens; (T, A) if they are packed.
            padding: see `Padding`.

        Returns:
            The same shape, without a residual.
        """
        projected = linear(x_BLA, self.in_proj_weight, self.in_proj_bias)
        if isinstance(padding, Packing):
            return self.out_proj(attend(projected, self.num_heads, padding.visible, padding))
        visible = None if padding is None else ~padding[:, None, None, :]
        return self.out_proj(attend(projected, self.num_heads, visible))


class SharedAdapter(nn.Module):
    """The shared adapter S: `y = l1(x)`; `S(x) = x + l2(s(g) attn(y) + (1 - s(g)) y)`, s the sigmoid; l2 starts at 0.

    Args:
        width: A, features coming in and going out.
        shared_width: features inside.
        num_heads: heads of the attention; must divide `shared_width`.
        gate_init: g before training.
    """

    def __init__(self, width: int, shared_width: int, num_heads: int, gate_init: float):
        super().__init__()
        self.l1 = Linear(width, shared_width)
        self.l2 = Linear(shared_width, width)
        self.attention = TokenAttention(shared_width, num_heads)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        nn.init.zeros_(self.l2.weight)
        nn.init.zeros_(self.l2.bias)

    def forward(self, x_BLA: Tensor, padding: Padding = None) -> Tensor:
        """Return S(x), (B, L, A); see `Padding`."""
        y = self.l1(x_BLA)
        share = torch.sigmoid(self.gate)
        return x_BLA + self.l2(share * self.attention(y, padding) + (1 - share) * y)


class Adapter(nn.Module):
    """The adapter A: `d = GELU(W_down m)`; `a = attn(attn(d))`; `A(m) = m + W_up(s(g) d + (1 - s(g)) a)`.

    Both attentions are one module used twice; where a shared adapter S is given it works between them. W_up starts
    at 0, so A is the identity before training.

    Args:
        model_width: D of the tower.
        width: A.
        num_heads: heads of the attention; must divide `width`.
        gate_init: g before training.
        shared: S of this block, or None.
    """

    def __init__(self, model_width: int, width: int, num_heads: int, gate_init: float, shared: SharedAdapter | None):
        super().__init__()
        self.down = Linear(model_width, width)
        self.up = Linear(width, model_width)
        self.attention = TokenAttention(width, num_heads)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.shared = shared
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, m_BLD: Tensor, padding: Padding = None) -> Tensor:
        """Return A(m) - m, (B, L, D): the caller adds m; see `Padding`."""
        d = F.gelu(self.down(m_BLD))
        a = self.attention(d, padding)
        if self.shared is not None:
            a = self.shared(a, padding)
        a = self.attention(a, padding)
        share = torch.sigmoid(self.gate)
        return self.up(share * d + (1 - share) * a)


class GatedAdapter(nn.Module):
    """The stage appended to a block's `mlp`: `s(g_block) A(m) + (1 - s(g_block)) m` for the output m of the mlp.

    It is computed as `m + s(g_block) (A(m) - m)`: the same number, and exactly m while W_up is 0.

    Args:
        adapter: A.
        gate_init: g_block before training.

    Attributes:
        padding: set only while a text block runs, see `masking`.
        is_added: says that this is no part of the backbone, see `harma_ray.models.weights.own_tensors`.
    """

    is_added = True

    def __init__(self, adapter: Adapter, gate_init: float):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.bottleneck = adapter
        self.padding: Padding = None

    @contextmanager
    def masking(self, padding: Padding) -> Iterator[None]:
        """Hide padding from the adapter's attention while the block around it runs.

        open_clip's blocks pass nothing but the hidden states to `mlp`, so it waits here. Entering this inside the
        function that activation checkpointing repeats makes the repetition see the mask of its own forward pass.
        """
        self.padding = padding
        try:
            yield
        finally:
            self.padding = None

    def forward(self, m_BLD: Tensor) -> Tensor:
        """Return the gated mixture, (B, L, D)."""
        return m_BLD + torch.sigmoid(self.gate) * self.bottleneck(m_BLD, self.padding)


def insert_adapters(
    clip_model: nn.Module,
    *,
    width: int = 128,
    num_heads: int = 8,
    shared_width: int = 64,
    share_across_modalities: bool = False,
    gate_init: float = 0.6,
    seed: int = 0,
) -> tuple[str, ...]:
    """Append an adapter to every block of both towers and freeze everything else, `logit_scale` included.

    Every key of the model's state dict stays as it is; the new ones lie under `...resblocks.{i}.mlp.adapter.`.
    Before training the model computes exactly what it did without adapters.

    Paper: S is shared by both towers; released code and default here: a separate S for each text block, none for
    images. With `share_across_modalities`, block i of both towers uses the same S_i; where one tower is deeper, its
    remaining blocks have no partner and keep the default form. The state dict then lists S_i under both towers, the
    returned names list it once.

    Args:
        clip_model: an open_clip `CLIP` with transformer towers; changed in place.
        width: features inside an adapter.
        num_heads: attention heads of A and of S; must divide `width` and `shared_width`.
        shared_width: features inside S.
        share_across_modalities: see above.
        gate_init: start of all gates, before the sigmoid.
        seed: draws the weights; the caller's random state is left alone.

    Returns:
        The names of the new parameters, each tensor once, as `clip_model.named_parameters()` calls them.

    Raises:
        UserError: the model is not of this kind, or has adapters already.
    """
    image_blocks, text_blocks = _blocks(clip_model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        shared = [SharedAdapter(width, shared_width, num_heads, gate_init) for _ in text_blocks]
        image_shared = shared[: len(image_blocks)] if share_across_modalities else []
        clip_model.requires_grad_(False)
        for blocks, shares in ((image_blocks, image_shared), (text_blocks, shared)):
            for index, block in enumerate(blocks):
                share = shares[index] if index < len(shares) else None
                mlp: Any = block.mlp
                base = mlp.c_proj.weight
                stage = GatedAdapter(Adapter(base.shape[0], width, num_heads, gate_init, share), gate_init)
                mlp.add_module("adapter", stage.to(device=base.device, dtype=base.dtype))
    return tuple(name for name, _ in clip_model.named_parameters() if ".mlp.adapter." in name)


def set_tuning(model: "DualEncoder", mode: str, **adapter_options) -> tuple[str, ...]:
    """Decide what of a model trains; every other parameter is frozen.

    Args:
        model: a `DualEncoder`; changed in place.
        mode: "adapters": insert adapters and train them with the temperatures; "full": everything of CLIP except
            `logit_scale` and `logit_bias`, which the losses do not use, with the temperatures; "none": nothing.
        adapter_options: for "adapters", the keyword arguments of `insert_adapters`.

    Returns:
        The names of the trainable parameters, as `model.named_parameters()` calls them.
    """
    if mode == "adapters":
        chosen = {f"clip.{name}" for name in insert_adapters(model.clip, **adapter_options)}
    elif mode == "full":
        unused = {"logit_scale", "logit_bias"}
        chosen = {f"clip.{name}" for name, _ in model.clip.named_parameters() if name not in unused}
    else:
        chosen = set()
    if mode != "none":
        chosen |= {name for name, _ in model.named_parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return tuple(name for name, _ in model.named_parameters() if name in chosen)


def _blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return the blocks of the image and the text tower.

    Raises:
        UserError: the towers are not open_clip's own batch-first transformers, or have adapters.
    """
    if not isinstance(model, open_clip.CLIP):
        raise UserError(
            f"adapters need open_clip's `CLIP` with its built-in text tower, got `{type(model).__name__}`; "
            "choose a ViT architecture without a custom text tower, such as ViT-B-32"
        )
    found = []
    for tower, owner in (("image", model.visual), ("text", model)):
        transformer: Any = getattr(owner, "transformer", None)
        if not hasattr(transformer, "resblocks"):
            raise UserError(
                f"adapters need towers with `transformer.resblocks`, but the {tower} tower is a "
                f"`{type(owner).__name__}`; choose a ViT architecture such as ViT-B-32"
            )
        if not getattr(transformer, "batch_first", False):
            raise UserError(
                f"the {tower} tower must run batch-first, or adapters would attend across the batch; "
                "install open_clip_torch 3.3 or newer"
            )
        for index, block in enumerate(transformer.resblocks):
            if hasattr(block.mlp, "adapter"):
                raise UserError(f"block {index} of the {tower} tower has an adapter already; build the model anew")
            if not isinstance(block.mlp, nn.Sequential) or not hasattr(block.mlp, "c_proj"):
                raise UserError(
                    f"adapters need blocks whose `mlp` is a sequence with `c_proj`, but block {index} of the {tower} "
                    f"tower is a `{type(block).__name__}`; choose another architecture"
                )
        found.append(transformer.resblocks)
    return found[0], found[1]
