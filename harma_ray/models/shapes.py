"""State dicts described by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import open_clip
from torch import Tensor

from harma_ray.models.backbones import image_size


def describe_tensors(state: Mapping[str, Tensor]) -> str:
    """Returns lines with counts, dtypes and the sizes of adapters, ours or the released ones."""
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    lines = [f"tensors     {len(state)}, {sum(tensor.numel() for tensor in state.values()):,} numbers ({kinds})"]
    downs = [t for name, t in state.items() if re.search(r"(img_proj_down|bottleneck\.down)\.weight$", name)]
    shared = {len(t) for name, t in state.items() if re.search(r"(BiShareAdapterxx|shared)\.l1\.weight$", name)}
    if downs:
        widths = "/".join(str(width) for width in sorted({len(tensor) for tensor in downs}))
        inner = "/".join(str(width) for width in sorted(shared)) or "none"
        lines.append(f"adapters    {len(downs)}, width {widths}, shared width {inner}")
    return "\n".join(lines)


def guess_architecture(state: Mapping[str, Tensor]) -> str:
    """Names the architectures of these shapes; the activation is not in the file, so there can be several."""
    names = {re.sub(r"^model\.", "", name): tensor for name, tensor in state.items()}
    needed = ("conv1.weight", "proj", "positional_embedding")
    if not {*(f"visual.{name}" for name in needed), "token_embedding.weight"} <= names.keys():
        return "a CLIP whose image tower is no plain ViT"
    width, _, patch, _ = names["visual.conv1.weight"].shape
    side = patch * round((len(names["visual.positional_embedding"]) - 1) ** 0.5)
    layers, text_layers = (
        len({name.split(".")[-3] for name in names if re.match(rf"{tower}resblocks\.\d+\.ln_1\.weight$", name)})
        for tower in (r"visual\.transformer\.", r"transformer\.")
    )
    words, text_width = names["token_embedding.weight"].shape
    found = (names["visual.proj"].shape[1], width, patch, side, layers, words, text_width, text_layers)
    image_size("scenes-tiny")  # makes this package's own architectures known to open_clip
    fitting = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        shape = (vision.get("width", 768), vision.get("patch_size", 16), vision.get("image_size", 224))
        tail = (text.get("vocab_size", 49408), text.get("width", 512), text.get("layers", 12))
        own_text_tower = "hf_model_name" not in text and "multimodal_cfg" not in config
        if own_text_tower and (config.get("embed_dim"), *shape, vision.get("layers", 12), *tail) == found:
            fitting.append(name)
    facts = f"a ViT of width {width}, {layers} layers and patch {patch}, for images of {side} px"
    return f"{' or '.join(sorted(fitting, key=len)[:3])} by its shapes ({facts})" if fitting else f"a CLIP with {facts}"
