"""A vision-language model that learns to answer: transformers' InternVL, called so that a step trains all of it.

Shape letters: T tiles, S side in pixels, B batch, L tokens, K tokens that are left, F features of a tile, N features of
all tiles, D width of the vision transformer, W of the language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harma_ray.errors import UserError
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.token_drop import (
    TOKEN_DROPS,
    Remaining,
    TokenDrop,
    choose_tokens,
    remaining_tokens,
)
from harma_ray.models.internvl.vision import check_layer, hidden_states

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration


class VisualInstructionModel(nn.Module):
    """An InternVL whose loss is that of the supervised tokens alone.

    What it is called with may lie on the CPU, all but the tiles: then nothing in a step waits for a GPU; else each call
    waits once for what was computed before.

    Attributes:
        core: transformers' model; its parameters lie under ``core.``. Those that no loss depends on (layers above the
            one that the language model is shown) are frozen.
        token_drop: What happens to image tokens in training.
    """

    def __init__(self, core: InternVLForConditionalGeneration, token_drop: TokenDrop = TOKEN_DROPS["none"]):
        """Wraps a model.

        Raises:
            UserError: If it shows the language model other features than one layer's patches.
        """
        super().__init__()
        self.core, self.token_drop = core, token_drop
        config: Any = core.config
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise UserError(f"the language model must be shown one layer's patches, got {layer} and {strategy!r}")
        if set(config.text_config.layer_types) != {"full_attention"}:
            raise UserError("the language model must attend to all earlier tokens; set use_sliding_window to false")
        core.set_attn_implementation("sdpa")  # `_language_states` rests on it
        self._layer = layer
        for module in _unused_parts(self.vision_tower, layer):
            module.requires_grad_(False)
        if self.vision_tower.embeddings.mask_token is not None:
            self.vision_tower.embeddings.mask_token.requires_grad_(False)
        class_token = self.vision_tower.embeddings.cls_token
        if class_token.requires_grad:  # a single tile's gradient is a view, which DDP copies more slowly, and warns
            class_token.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))

    @property
    def vision_tower(self) -> Any:
        """The vision transformer, transformers' `InternVLVisionModel`."""
        return self.core.model.vision_tower

    @property
    def tokens_per_tile(self) -> int:
        """F, the image tokens that stand for a tile of the transformer's own size."""
        config: Any = self.core.config
        side = config.vision_config.image_size[0] // config.vision_config.patch_size[0] * config.downsample_ratio
        return int(side) ** 2

    def layers(self) -> list[nn.Module]:
        """Returns the layers of the vision transformer and of the language model, which make up nearly all of it."""
        return [*self.vision_tower.encoder.layer, *self.core.model.language_model.layers]

    def set_grad_checkpointing(self) -> None:
        """Keeps only the layers' inputs for the backward pass and computes the rest again: less memory, more time."""
        self.core.activation_checkpointing_enable({"use_reentrant": False})
        self.core.disable_input_require_grads()  # a frozen part would be gone back through for nothing

    def freeze(
        self,
        *,
        vision: bool = False,
        projector: bool = False,
        language_model: bool = False,
        lm_head: bool = False,
        vision_layers: int = 0,
    ) -> None:
        """Stops training parts of the model, before it is wrapped; what is frozen computes as in evaluation.

        Args:
            vision: The vision transformer.
            projector: What turns its features into the language model's.
            language_model: The language model, without its output head.
            lm_head: The output head.
            vision_layers: The first so many layers of the vision transformer and its embeddings; 0: none.

        Raises:
            UserError: If there are not so many layers, or parts that share weights are told apart.
        """
        model, layers = self.core.model, self.vision_tower.encoder.layer
        if not 0 <= vision_layers <= len(layers):
            raise UserError(f"vision layers to freeze must be 0 to {len(layers)}, got {vision_layers}")
        if self.core.lm_head.weight is model.get_input_embeddings().weight and lm_head != language_model:
            raise UserError("the output head is the language model's own embeddings; freeze both or neither")
        first = [self.vision_tower.embeddings, *layers[:vision_layers]] if vision_layers else []
        chosen = [
            (vision, [model.vision_tower]),
            (projector, [model.multi_modal_projector]),
            (language_model, [model.language_model]),
            (lm_head, [self.core.lm_head]),
            (True, first),
        ]
        for module in (module for asked, modules in chosen if asked for module in modules):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> VisualInstructionModel:
        """Sets training or evaluation; what is wholly frozen stays in evaluation, so its drop path does nothing."""
        super().train(mode)
        for module in self.core.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        for layer in self.layers():  # a frozen layer is gone back through, but checkpointed by its own flag alone
            layer.training |= mode and bool(layer.gradient_checkpointing)
        return self

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Returns what the language model is shown of tiles [T, 3, S, S], see `hidden_states`, as [T, F, W]."""
        model: Any = self.core.model
        x_TND = hidden_states(self.vision_tower, pixels, self._layer)[:, 1:]
        side = int(x_TND.shape[1] ** 0.5)
        grid = model.pixel_shuffle(x_TND.unflatten(1, (side, side)), scale_factor=self.core.config.downsample_ratio)
        return model.multi_modal_projector(grid.flatten(1, 2))

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        drop: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss of talks.

        Args:
            pixels: [T, 3, S, S], uint8, or floating point and normalised; the tiles in the order of their tokens, at
                least one. Those that no token stands for change nothing, but give every parameter a gradient.
            input_ids: int64[B, L].
            attention_mask: [B, L], 0 in padding, on either side.
            labels: int64[B, L], the ids that are supervised, and `IGNORED`.
            drop: Whether `token_drop` happens, a boolean scalar, the same on all workers; never in evaluation.
            scores: [B, L], in [0, 1): of a sample's image tokens those with the lowest are lost; None: drawn by torch.

        Returns:
            Scalars: ``loss``, the mean cross-entropy over the supervised tokens, each predicted by the token that is
            left before it, in fp32 (0 if there are none); without gradients ``right``, how many of them are the
            likeliest; ``tokens`` and ``kept``, the tokens before and after the drop.

        Raises:
            UserError: If there are fewer tiles than the tokens stand for.
        """
        ids, present, labels = input_ids.cpu(), attention_mask.cpu().bool(), labels.cpu()
        image_mask = (ids == self.core.config.image_token_id) & present
        lost = self._lost(image_mask, drop, scores)
        is_zeroed = self.token_drop.mode == "zero"
        remaining = remaining_tokens(present, torch.zeros_like(lost) if is_zeroed else lost)
        features = self.encode_tiles(pixels)
        zeroed = lost[image_mask] if is_zeroed else None
        x_BKW, unused = self._embed(ids, image_mask, remaining, features, zeroed)
        states = self._language_states(x_BKW, remaining.position_ids)
        targets = remaining.take(labels, IGNORED)[:, 1:]
        places = (targets != IGNORED).nonzero()
        where = _send(places[:, 0] * x_BKW.shape[1] + places[:, 1], states.device)
        wanted = _send(targets[targets != IGNORED], states.device)
        logits = self.core.lm_head(states.flatten(0, 1)[where]).float()
        loss = F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(places))
        counts = _send(torch.stack([remaining.mask.sum(), present.sum()]), states.device)
        return {
            "loss": loss + 0 * unused.float().sum(),
            "right": (logits.detach().argmax(1) == wanted).sum(),
            "kept": counts[0],
            "tokens": counts[1],
        }

    @torch.no_grad()
    def answer(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """Returns the likeliest continuation of each sample, token by token, as int64[B, at most `max_new_tokens`].

        It ends with a token that the model's ``generation_config`` says ends an answer, followed by padding.

        Args:
            pixels: See `forward`; may be none for texts alone.
            input_ids: See `forward`.
            attention_mask: See `forward`.
            max_new_tokens: At least 1.

        Raises:
            UserError: As `forward`.
        """
        ids, present = input_ids.cpu(), attention_mask.cpu().bool()
        image_mask = (ids == self.core.config.image_token_id) & present
        remaining = remaining_tokens(present, torch.zeros_like(present))
        no_tiles = self.core.lm_head.weight.new_zeros(0, 1, self.core.lm_head.in_features)
        features = self.encode_tiles(pixels) if len(pixels) else no_tiles
        x_BKW, _ = self._embed(ids, image_mask, remaining, features, None)
        # answers begin where texts end, so padding goes to the left
        to_left = remaining.mask.to(torch.uint8).argsort(dim=1, stable=True)
        rows = torch.arange(len(ids))[:, None]
        mask = _send(remaining.mask[rows, to_left], x_BKW.device)
        embeds = x_BKW[_send(rows, x_BKW.device), _send(to_left, x_BKW.device)]
        core: Any = self.core
        pad = core.generation_config.pad_token_id
        return core.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
            synced_gpus=False,  # workers answer different numbers of questions, each with the whole model
        )

    def _lost(self, image_mask: Tensor, drop: Tensor | None, scores: Tensor | None) -> Tensor:
        """Returns which image tokens are dropped, or become zero, as bool[B, L]."""
        if not self.training or drop is None or not bool(drop):
            return torch.zeros_like(image_mask)
        scores = torch.rand(image_mask.shape) if scores is None else scores.cpu()
        return choose_tokens(image_mask, self.token_drop.ratio, scores)

    def _embed(
        self, ids_BL: Tensor, image_mask_BL: Tensor, remaining: Remaining, features: Tensor, zeroed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the input [B, K, W] of the language model, and the features that no token stands for."""
        device, x_NW = features.device, features.flatten(0, 1)
        num_tokens = int(image_mask_BL.sum())
        if num_tokens > len(x_NW):
            raise UserError(
                f"every image token needs a feature, got {num_tokens} tokens and {len(features)} tiles of "
                f"{features.shape[1]} features; the tokens must be those of the tiles"
            )
        numbers_BL = (image_mask_BL.flatten().cumsum(0) - 1).view_as(ids_BL)
        is_image = remaining.take(image_mask_BL, 0)
        used = _send(remaining.take(numbers_BL, 0)[is_image], device)
        texts_BKW = self.core.get_input_embeddings()(_send(remaining.take(ids_BL, 0), device))
        shown = x_NW[used].to(texts_BKW.dtype)
        if zeroed is not None:
            shown = shown.masked_fill(_send(zeroed, device)[used][:, None], 0)
        where = _send(is_image.flatten().nonzero()[:, 0], device)
        return texts_BKW.flatten(0, 1).index_copy(0, where, shown).view_as(texts_BKW), x_NW[num_tokens:]

    def _language_states(self, x_BKW: Tensor, position_ids_BK: Tensor) -> Tensor:
        """Returns the last hidden states [B, K, W], right for every token that is no padding.

        Padding lies to the right, where no token of a sample looks, so causal attention is all that is needed. It is
        asked for by name: given no mask, transformers takes positions with gaps for several texts in a row; given a
        two-dimensional one, it makes the host wait to see whether anything is padded.
        """
        outputs = self.core.model.language_model(
            inputs_embeds=x_BKW,
            attention_mask={"full_attention": None},
            position_ids=_send(position_ids_BK, x_BKW.device),
            use_cache=False,
        )
        return outputs.last_hidden_state


def _unused_parts(vision_tower: Any, layer: int) -> list[nn.Module]:
    """Returns the parts of the vision transformer that come after the layer whose hidden states are taken."""
    layers = vision_tower.encoder.layer
    number = check_layer(len(layers), layer)
    return [*layers[number:], *([vision_tower.layernorm] if number < len(layers) else [])]


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on a device, without waiting for what the device still has to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
