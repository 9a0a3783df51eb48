"""HarMA's training step as its released code takes it, over the weights of one of this package's models.

Written from the method's formulas, to time against: fp32 throughout, tokens before samples (L, B, D), attention of the
adapters by torch's own module, which computes its weights for the caller too, all 77 positions of a caption, an
optimiser that is not fused, and figures read from the device in every step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harma_ray.models.clip import DualEncoder
from harma_ray.models.kernels import Linear


def _attention(like: Any, num_heads: int) -> nn.MultiheadAttention:
    """Returns torch's own attention, tokens first, with the weights of another."""
    found = nn.MultiheadAttention(like.out_proj.in_features, num_heads)
    found.load_state_dict(like.state_dict())
    return found.requires_grad_(like.in_proj_weight.requires_grad)


class ReleasedAdapter(nn.Module):
    """The adapter of one block."""

    def __init__(self, stage: Any):
        """Takes the weights of a `GatedAdapter`."""
        super().__init__()
        own: Any = stage.bottleneck
        self.down, self.up, self.gate, self.block_gate = own.down, own.up, own.gate, stage.gate
        self.attention = _attention(own.attention, own.attention.num_heads)
        self.shared = own.shared
        if own.shared is not None:
            self.shared_attention = _attention(own.shared.attention, own.shared.attention.num_heads)

    def forward(self, m: Tensor) -> Tensor:
        """Returns the gated mixture of [L, B, D]."""
        d = F.gelu(self.down(m))
        a, _ = self.attention(d, d, d)
        if self.shared is not None:
            y, gate = self.shared.l1(a), self.shared.gate.sigmoid()
            a = a + self.shared.l2(gate * self.shared_attention(y, y, y)[0] + (1 - gate) * y)
        a, _ = self.attention(a, a, a)
        gate = self.gate.sigmoid()
        adapted = m + self.up(gate * d + (1 - gate) * a)
        gate = self.block_gate.sigmoid()
        return gate * adapted + (1 - gate) * m


class ReleasedTower(nn.Module):
    """The blocks of one tower."""

    def __init__(self, blocks: Any):
        """Takes the weights of open_clip's blocks with this package's adapters."""
        super().__init__()
        self.blocks = blocks
        self.attentions: Any = nn.ModuleList(_attention(block.attn, block.attn.num_heads) for block in blocks)
        self.adapters: Any = nn.ModuleList(ReleasedAdapter(block.mlp.adapter) for block in blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns [L, B, D] of [L, B, D]."""
        for block, attention, adapter in zip(self.blocks, self.attentions, self.adapters, strict=True):
            normed = block.ln_1(x)
            x = x + attention(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            mlp = block.mlp
            x = x + adapter(mlp.c_proj(mlp.gelu(mlp.c_fc(block.ln_2(x)))))
        return x


class ReleasedStep:
    """Takes steps over batches."""

    def __init__(self, model: DualEncoder, learning_rate: float = 4e-4):
        """Takes over a model's weights, on its device; the model is not to be used beside it."""
        layers: Any = [module for module in model.modules() if isinstance(module, Linear)]
        for layer in layers:
            layer.__class__ = nn.Linear  # as torch computes it
        self.clip: Any = model.clip
        visual, device = self.clip.visual, model.temperature.device
        self.towers = nn.ModuleList(
            ReleasedTower(tower.resblocks) for tower in (visual.transformer, self.clip.transformer)
        ).to(device)
        self.temperature = model.temperature
        trained = dict.fromkeys(p for part in (self.towers, model) for p in part.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(
            self._used(trained), lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.04
        )

    def _used(self, trained: Iterable[Tensor]) -> list[Tensor]:
        """Leaves out the attentions that copies stand for."""
        replaced = {
            id(p) for name, p in self.towers.named_parameters() if ".bottleneck.attention." in name
            or ".shared.attention." in name
        }  # fmt: skip
        return [parameter for parameter in trained if id(parameter) not in replaced]

    def encode(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit vectors [B, E] of normalised images [B, 3, H, W] and of tokens [B, L]."""
        clip, visual = self.clip, self.clip.visual
        patches = visual.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(image), 1, -1), patches], dim=1) + visual.positional_embedding
        x = self.towers[0](visual.ln_pre(x).transpose(0, 1))
        images = visual.ln_post(x[0]) @ visual.proj
        x = (clip.token_embedding(text) + clip.positional_embedding).transpose(0, 1)
        x = clip.ln_final(self.towers[1](x, clip.attn_mask)).transpose(0, 1)
        texts = x[torch.arange(len(text), device=text.device), text.argmax(-1)] @ clip.text_projection
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def losses(self, image: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the contrastive and the weighted triplet term; see `encode`, and image ids [B]."""
        images, texts = self.encode(image, text)
        scores = images @ texts.T
        logits = scores / self.temperature
        same = (ids[:, None] == ids[None]).float()
        target = same / same.sum(1, keepdim=True)
        rows = -(F.log_softmax(logits, 1) * target).sum(1).mean()
        columns = -(F.log_softmax(logits.T, 1) * target).sum(1).mean()
        own = scores.diag()[:, None]
        eye = torch.eye(len(scores), device=scores.device) > 0.5
        total = scores.new_zeros(())
        for distance in (0.2 + scores - own, 0.2 + scores - own.T):
            excess = distance.clamp(min=0).masked_fill(eye, 0)
            total = total + ((1 - torch.exp(-excess)) ** 2.0 * excess).sum()
        return (rows + columns) / 2, total / 2

    def step(self, image: Tensor, text: Tensor, ids: Tensor) -> float:
        """Takes one step on a batch that lies on the CPU, images normalised; returns its loss."""
        device = self.temperature.device
        terms = self.losses(*(x.to(device, non_blocking=True) for x in (image, text, ids)))
        (terms[0] + terms[1]).backward()
        return self.update(terms)

    def update(self, terms: Sequence[Tensor]) -> float:
        """Moves the weights by their gradients; returns the loss."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(float(term.detach()) for term in terms)  # read one by one, as meters do
