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


PUBLISHED = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "vision_config": ORIGINAL_VISION
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "initializer_factor": 0.1,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "use_flash_attn": True,
    },
}
"""What InternVL2.5-1B says of itself."""


def published_shapes(settings):
    """The original's names of tensors, written anew, with their shapes."""
    vision, text = settings["vision_config"], settings["llm_config"]
    width, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tokens = (vision["image_size"] // side) ** 2 + 1
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, tokens, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, side, side),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for number in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}"
        shapes |= {f"{layer}.{name}": (width,) for name in ("ls1", "ls2")}
        shapes |= {f"{layer}.{norm}.{name}": (width,) for norm in ("norm1", "norm2") for name in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    size, vocabulary = text["hidden_size"], text["vocab_size"]
    keys = size // text["num_attention_heads"] * text["num_key_value_heads"]
    for number in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{number}"
        for name, rows in (("q", size), ("k", keys), ("v", keys)):
            shapes |= {
                f"{layer}.self_attn.{name}_proj.weight": (rows, size),
                f"{layer}.self_attn.{name}_proj.bias": (rows,),
            }
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (size, size),
            f"{layer}.mlp.gate_proj.weight": (text["intermediate_size"], size),
            f"{layer}.mlp.up_proj.weight": (text["intermediate_size"], size),
            f"{layer}.mlp.down_proj.weight": (size, text["intermediate_size"]),
            f"{layer}.input_layernorm.weight": (size,),
            f"{layer}.post_attention_layernorm.weight": (size,),
        }
    return shapes | {
        "language_model.model.embed_tokens.weight": (vocabulary, size),
        "language_model.model.norm.weight": (size,),
        "language_model.lm_head.weight": (vocabulary, size),
        "mlp1.0.weight": (4 * width,),
        "mlp1.0.bias": (4 * width,),
        "mlp1.1.weight": (size, 4 * width),
        "mlp1.1.bias": (size,),
        "mlp1.3.weight": (size, size),
        "mlp1.3.bias": (size,),
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
