"""A trained run from Python: encode images and captions, compare them.

from harma_ray.api import load_run
run = load_run("runs/NAME")
scores = run.similarity(["bridge.tif", "farm.png"], ["a bridge over a river", "green fields"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.captions import clean_caption
from harma_ray.data.transforms import BadImage, decode_image, eval_transform
from harma_ray.errors import UserError
from harma_ray.models.clip import DualEncoder, image_size
from harma_ray.recipes.harma import HarmaConfig, encode_texts
from harma_ray.runs import open_run

ImageLike = str | Path | bytes | Image.Image


class Retriever:
    """A dual encoder that takes images and captions as people have them."""

    def __init__(self, model: DualEncoder, config: HarmaConfig, device: str):
        """Wraps a model; see `load_run`."""
        self.model, self.config = model.to(device).eval(), config
        self._size = image_size(model)

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageLike], *, batch_size: int = 64) -> Tensor:
        """Encodes images as evaluation does.

        Args:
            images: N paths, encoded bytes or PIL images.
            batch_size: Images at a time.

        Returns:
            fp32[N, E] on CPU, L2-normalised.

        Raises:
            UserError: Naming an image that cannot be read.
        """
        device = self.model.temperature.device
        parts = [torch.empty(0, self.model.embedding_width)]
        for start in range(0, len(images), batch_size):
            batch = [eval_transform(self._open(image), self._size) for image in images[start : start + batch_size]]
            parts.append(self.model.encode_image(torch.stack(batch).to(device)).float().cpu())
        return torch.cat(parts)

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Encodes captions, cleaned as in training.

        Args:
            texts: M captions.
            batch_size: Captions at a time.

        Returns:
            fp32[M, E] on CPU, L2-normalised.

        Raises:
            UserError: If nothing is left of a caption after cleaning.
        """
        cleaned = [clean_caption(text) for text in texts]
        if "" in cleaned:
            raise UserError(f"caption {texts[cleaned.index('')]!r} holds no word")
        if not cleaned:
            return torch.empty(0, self.model.embedding_width)
        return encode_texts(self.model, self.config.model.architecture, cleaned, batch_size)

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Returns cosines, fp32[N, M], of N images and M captions."""
        return self.encode_images(images) @ self.encode_texts(texts).T

    def _open(self, image: ImageLike) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        try:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            return decode_image(data, max_pixels=self.config.data.max_pixels)
        except OSError as error:
            raise UserError(f"cannot read image {image} ({error.strerror})") from error
        except BadImage as error:
            name = "image bytes" if isinstance(image, bytes) else str(image)
            raise UserError(f"{name}: {error}") from error


def load_run(path: str | Path, *, device: str | None = None) -> Retriever:
    """Opens a run and loads its best weights.

    Args:
        path: Folder of the run.
        device: Such as ``cpu`` or ``cuda:1``; None = a GPU if there is one.

    Raises:
        UserError: If the folder is no run of image-text retrieval, or has no checkpoint.
    """
    run = open_run(path)
    model = run.load_model()
    if not isinstance(model, DualEncoder) or not isinstance(run.config, HarmaConfig):
        raise UserError(f"run {run.path} is of recipe {run.config.recipe}, which has no image and text encoder")
    return Retriever(model, run.config, device or ("cuda" if torch.cuda.is_available() else "cpu"))
