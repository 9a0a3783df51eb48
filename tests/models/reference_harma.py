"""HarMA's forward pass written from its formulas with torch's own attention, to compare the package with."""

import torch
from torch import nn
from torch.nn import functional as F


def reference_attention(attention, x, padding):
    """torch's own multi-head attention with the same weights."""
    torch_attention = nn.MultiheadAttention(x.shape[-1], attention.num_heads, batch_first=True)
    torch_attention.load_state_dict(attention.state_dict())
    return torch_attention(x, x, x, key_padding_mask=padding, need_weights=True)[0]


def reference_gated_adapter(stage, m, padding):
    """The formulas of the paper's code, term by term."""
    adapter, sigmoid = stage.bottleneck, torch.sigmoid
    d = F.gelu(m @ adapter.down.weight.T + adapter.down.bias)
    a = reference_attention(adapter.attention, d, padding)
    if adapter.shared is not None:
        shared = adapter.shared
        y = a @ shared.l1.weight.T + shared.l1.bias
        g = sigmoid(shared.gate)
        inner = g * reference_attention(shared.attention, y, padding) + (1 - g) * y
        a = a + inner @ shared.l2.weight.T + shared.l2.bias
    a = reference_attention(adapter.attention, a, padding)
    g = sigmoid(adapter.gate)
    adapted_m = m + (g * d + (1 - g) * a) @ adapter.up.weight.T + adapter.up.bias
    g = sigmoid(stage.gate)
    return g * adapted_m + (1 - g) * m


def reference_block(block, x, causal, padding):
    normed = block.ln_1(x)
    x = x + block.attn(normed, normed, normed, attn_mask=causal, need_weights=True)[0]
    m = block.mlp.c_proj(block.mlp.gelu(block.mlp.c_fc(block.ln_2(x))))
    return x + reference_gated_adapter(block.mlp.adapter, m, padding)


def reference_encodings(clip, image, text, padding):
    patches = clip.visual.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([clip.visual.class_embedding.expand(len(image), 1, -1), patches], dim=1)
    x = clip.visual.ln_pre(x + clip.visual.positional_embedding)
    for block in clip.visual.transformer.resblocks:
        x = reference_block(block, x, None, None)
    image_features = F.normalize(clip.visual.ln_post(x)[:, 0] @ clip.visual.proj, dim=-1)
    x = clip.token_embedding(text) + clip.positional_embedding
    for block in clip.transformer.resblocks:
        x = reference_block(block, x, clip.attn_mask, padding)
    x = clip.ln_final(x)[range(len(text)), text.argmax(-1)]
    return image_features, F.normalize(x @ clip.text_projection, dim=-1)
