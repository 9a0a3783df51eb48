"""A dual encoder whose passes are recorded as CUDA graphs: a GPU gets them at once, not kernel by kernel from the host.

A step of ViT-B/32 with adapters is some thousand short kernels forward and as many back. Launching them takes a host
longer than running them takes a fast GPU (``benchmarks/RESULTS.md``).
"""

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harma_ray.models.clip import DualEncoder, unit
from harma_ray.models.openclip import Transformer, VisionTransformer

LENGTH_MULTIPLE = 16
"""Trimmed captions are padded to a multiple of this many tokens: each length that is recorded holds memory."""

_logger = logging.getLogger(__name__)

Pass = Callable[..., Tensor]
"""Takes a batch and the parameters that are trained by it; returns vectors with a gradient."""


def record(encode: Pass, samples: tuple[Tensor, ...], pool: Any) -> Pass:
    """Return a pass, and the way back from it, as CUDA graphs for inputs of the samples' shapes.

    Other threads may allocate memory meanwhile, as the one that reads batches does. Autocast must not keep what it
    converts from one pass to the next, where it would be computed in one graph and used in another.
    """
    make: Any = torch.cuda.make_graphed_callables
    options = {"pool": pool, "allow_unused_input": True, "capture_error_mode": "thread_local"}
    known = inspect.signature(make).parameters  # torch before 2.14 knows no mode
    kind = samples[0].device.type
    converted = {"enabled": torch.is_autocast_enabled(kind), "cache_enabled": False}
    with torch.autocast(kind, torch.get_autocast_dtype(kind), **converted), warnings.catch_warnings():
        # torch before 2.14 does not record on the stream that it warmed up on, and warns of that
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        return make(encode, samples, **{name: value for name, value in options.items() if name in known})


def is_recordable(model: DualEncoder) -> bool:
    """Whether passes of a model compute the same however often: open_clip's own towers, without random parts.

    A pass runs a few times before it is recorded, which would move the statistics of batch normalisation. Activation
    checkpointing reads the state of random numbers on the host, which cannot be recorded.
    """
    visual, text = model.clip.visual, model.clip.transformer
    return (
        isinstance(visual, VisionTransformer)
        and isinstance(visual.patch_dropout, nn.Identity)
        and isinstance(text, Transformer)
        and not (visual.transformer.grad_checkpointing or text.grad_checkpointing)
    )


class RecordedEncoder(nn.Module):
    """Computes what a `DualEncoder` does, in training by recorded graphs, one for each shape that comes.

    The kernels are those of the model, and so are the numbers, but that trimmed captions have other lengths. A pass
    must be gone back through before the same tower runs again: its outputs lie where the next one's will, and the
    gradients, where they are not copied or added to others, where the next ones will. Without gradients the model
    runs as it is, and so it does, with one warning, at shapes that could not be recorded, for lack of memory above all.

    Args:
        model: on a GPU, with the parameters that it will have; see `is_recordable`.
        record: what records.
    """

    def __init__(self, model: DualEncoder, record: Callable[..., Pass] = record):
        super().__init__()
        self.model = model
        self._record = record
        self._weights = [*model.clip.parameters()]
        self._state: list[tuple] = []
        self._warned = False
        text = _Tower(model, lambda tokens: unit(model.encode_tokens(tokens)))
        self._towers = text, _Tower(model, model.encode_image)  # in a tuple, for the parameters are the model's

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Return what `DualEncoder.forward` does."""
        if not torch.is_grad_enabled():
            return self.model(image, text)
        self._forget_other_weights()
        captions, images = self._towers
        vectors = self._run(captions, self.model.cut(text.flatten(0, -2), LENGTH_MULTIPLE))
        return self.model.outputs(self._run(images, image), vectors.unflatten(0, text.shape[:-1]))

    def _forget_other_weights(self) -> None:
        """Forget what is recorded if it reads other memory than the weights', or numbers that have changed."""
        state = [
            # of frozen ones the numbers too, which may have been kept in bf16 when they were recorded
            (weight.data_ptr(), weight.requires_grad, weight.requires_grad or weight._version)
            for weight in self._weights
        ]
        if state == self._state:
            return
        self._state = state
        captions, images = self._towers
        for tower in self._towers:
            tower.passes.clear()
            tower.trained.clear()
            tower.pool = None
        for name, weight in self.model.clip.named_parameters(prefix="model.clip", remove_duplicate=False):
            if weight.requires_grad:  # a shared one is trained by both
                tower = images if name.startswith("model.clip.visual.") else captions
                tower.trained[name] = weight

    def _run(self, tower: "_Tower", batch: Tensor) -> Tensor:
        key = (batch.shape, batch.dtype, torch.is_autocast_enabled(batch.device.type))
        if key not in tower.passes:
            if tower.pool is None and batch.is_cuda:
                tower.pool = torch.cuda.graph_pool_handle()
            names = [*tower.trained]
            # Not the parameters themselves: a graph would keep their gradients' nodes on the stream that it is recorded
            # on, and DDP has them on another.
            alike = [nn.Parameter(weight.detach()) for weight in tower.trained.values()]
            encode = lambda x, *given: functional_call(tower, dict(zip(names, given, strict=True)), (x,))  # noqa: E731
            try:
                tower.passes[key] = self._record(encode, (batch.clone(), *alike), tower.pool)
            except RuntimeError as error:  # of too little memory, too; a mistake of the model's own comes again
                tower.passes[key] = lambda x, *_: tower(x)
                if not self._warned:
                    _logger.warning(
                        "passes of %s could not be recorded and are launched as they come, as with "
                        "train.cuda_graphs=false: %s", tuple(batch.shape), error,
                    )  # fmt: skip
                self._warned = True
        return tower.passes[key](batch, *tower.trained.values())


class _Tower(nn.Module):
    """A tower as a module, which it is not in open_clip, and what is recorded of it."""

    def __init__(self, model: DualEncoder, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.encode = model, encode
        self.trained: dict[str, nn.Parameter] = {}
        self.passes: dict[tuple, Pass] = {}
        self.pool: Any = None

    def forward(self, batch: Tensor) -> Tensor:
        return self.encode(batch)
