"""InternVL as its own code has it: configurations, folders, and a forward pass over its names of tensors."""

import json

import torch
from safetensors.torch import save_file
from small_internvl import IMAGE, SIDE, TEXT
from torch.nn import functional as F

ORIGINAL_VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": 8,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "initializer_factor": 1.0,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
    "torch_dtype": "bfloat16",
}
ORIGINAL = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": SIDE,
    "template": "internvl2_5",
    "torch_dtype": "bfloat16",
    "vision_config": ORIGINAL_VISION,
    "llm_config": TEXT
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": 100,
        "max_window_layers": 1,
        "use_cache": False,
    },
}


def language_config(vocabulary=TEXT["vocab_size"]):
    from transformers import Qwen2Config

    return Qwen2Config(
        **TEXT | {"vocab_size": vocabulary},
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )


def write_original(folder, tensors, settings=ORIGINAL, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / name)
    return folder


def original_states(state, pixels, heads=3):
    """The original vision transformer's hidden states, from its own names: the embeddings, then each layer's."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["embeddings.patch_embedding.weight"]
    patches = F.conv2d(pixels, kernel, state["embeddings.patch_embedding.bias"], stride=kernel.shape[-1])
    first = state["embeddings.class_embedding"].expand(len(pixels), 1, -1)
    found = [torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + state["embeddings.position_embedding"]]
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")}
    for number in sorted(layers):
        at, x = f"encoder.layers.{number}", found[-1]
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1))
        q, k, v = qkv.unbind(2)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + state[f"{at}.ls1"] * linear(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), f"{at}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        found.append(x + state[f"{at}.ls2"] * linear(inner, f"{at}.mlp.fc2"))
    return found


def inner_of(state):
    return {n.removeprefix("vision_model."): t for n, t in state.items() if n.startswith("vision_model.")}


def original_loss(state, pixels, batch, image_token=IMAGE):
    """The original's loss, its language model being transformers' own Qwen2."""
    from transformers import Qwen2ForCausalLM

    patches = original_states(inner_of(state), pixels)[-1][:, 1:].unflatten(1, (4, 4))
    shuffled = [
        torch.cat([patches[:, 2 * i + a, 2 * j + b] for a in range(2) for b in range(2)], 1)
        for i in range(2)
        for j in range(2)
    ]
    x = torch.stack(shuffled, 1)
    x = F.layer_norm(x, x.shape[-1:], state["mlp1.0.weight"], state["mlp1.0.bias"])
    x = F.gelu(x @ state["mlp1.1.weight"].T + state["mlp1.1.bias"]) @ state["mlp1.3.weight"].T + state["mlp1.3.bias"]
    prefix = "language_model."
    language = Qwen2ForCausalLM(language_config(len(state[f"{prefix}lm_head.weight"]))).eval()
    language.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    embeds = language.get_input_embeddings()(batch["input_ids"]).clone()
    embeds[batch["input_ids"] == image_token] = x.flatten(0, 1)
    return language(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
