"""A trained run from Python: encode images and captions, compare them.

from harma_ray.api import load_run
run = load_run("runs/NAME")
scores = run.similarity(["bridge.tif", "farm.png"], ["a bridge over a river", "green fields"])
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from harma_ray.data.captions import clean_caption
from harma_ray.data.image_files import readable_name
from harma_ray.data.image_reading import read_picture
from harma_ray.data.images import MAX_PIXELS, BadImage, decode_stored, is_wide, to_rgb
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.data.transforms import eval_transform
from harma_ray.errors import UserError
from harma_ray.models.architectures import image_size
from harma_ray.models.clip import DualEncoder
from harma_ray.retrieval.encoding import encode_texts
from harma_ray.runs import Run, open_run
from harma_ray.task import Task
from harma_ray.training.checkpoint import read_meta
from harma_ray.training.step import evaluating

_logger = logging.getLogger(__name__)

ImageLike = str | Path | bytes | Image.Image


class Retriever:
    """A dual encoder that takes images and captions as people have them."""

    def __init__(self, model: DualEncoder, task: Task, device: str, rendering: Rendering | None = None):
        """Wraps a model; see `load_run`."""
        self.model, self.config, self.rendering = model.to(device).eval(), task.config, rendering
        self._size, self._tokenizer = image_size(model), task.backbone.tokenizer()

    def encode_images(self, images: Sequence[ImageLike], batch_size: int = 64) -> Tensor:
        """Encodes images as evaluation does.

        Args:
            images: N paths, encoded bytes or PIL images.
            batch_size: Images at a time.

        Returns:
            fp32[N, E] on CPU, L2-normalised.

        Raises:
            UserError: Naming an image that cannot be read.
        """
        _check_list("images", images, batch_size)
        parts = [torch.empty(0, self.model.embedding_width)]
        for start in range(0, len(images), batch_size):
            parts.append(self.encode_prepared([self.prepare(image) for image in images[start : start + batch_size]]))
        return torch.cat(parts)

    def prepare(self, image: ImageLike) -> Tensor:
        """Decodes an image and resizes it as evaluation does: uint8[3, S, S].

        Raises:
            UserError: Naming the image, if it cannot be read, or has more than 8 bits and there is no rule.
        """
        name = readable_name(image) if isinstance(image, str | Path) else f"{type(image).__name__} image"
        try:
            if isinstance(image, Image.Image):
                if is_wide(image):
                    raise BadImage(f"its mode {image.mode} is more than 8 bits; give the file's path")
                return eval_transform(to_rgb(ImageOps.exif_transpose(image)), self._size)
            file = image if isinstance(image, bytes) else Path(image).expanduser()
            picture = read_picture(file, self.rendering, max_pixels=self.config.data.max_pixels or MAX_PIXELS)
            return eval_transform(picture.image, self._size)
        except OSError as error:
            raise UserError(f"cannot read image {name} ({error.strerror or error})") from error
        except BadImage as error:
            raise UserError(f"{name}: {error}") from error

    def prepare_stored(self, data: bytes) -> Tensor:
        """Decodes an image that a converted data set holds; else as `prepare`.

        Raises:
            BadImage: It is damaged.
        """
        return eval_transform(decode_stored(data, max_pixels=self.config.data.max_pixels), self._size)

    def encode_prepared(self, images: Sequence[Tensor]) -> Tensor:
        """Encodes one batch of prepared images: fp32[N, E] on CPU, L2-normalised."""
        device = self.model.temperature.device
        with evaluating(self.config.train, device):
            return self.model.encode_image(torch.stack(list(images)).to(device)).float().cpu()

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Encodes captions, cleaned as in training.

        Args:
            texts: M captions.
            batch_size: Captions at a time.

        Returns:
            fp32[M, E] on CPU, L2-normalised.

        Raises:
            UserError: If nothing is left of a caption after cleaning.
        """
        _check_list("texts", texts, batch_size)
        cleaned = [clean_caption(text) for text in texts]
        if "" in cleaned:
            raise UserError(f"caption {texts[cleaned.index('')]!r} holds no word")
        if not cleaned:
            return torch.empty(0, self.model.embedding_width)
        return self.encode_cleaned(cleaned, batch_size)

    def encode_cleaned(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """Encodes captions that are clean already; see `encode_texts`."""
        with evaluating(self.config.train, self.model.temperature.device):
            return encode_texts(self.model, self._tokenizer, texts, batch_size)

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Returns cosines, fp32[N, M], of N images and M captions."""
        return self.encode_images(images) @ self.encode_texts(texts).T


def _check_list(name: str, items: Sequence, batch_size: int) -> None:
    if isinstance(items, str | bytes | Path | Image.Image):
        raise UserError(f"`{name}` must be a list, got one {type(items).__name__}; put it in brackets")
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, got {batch_size}")


def load_run(path: str | Path, device: str | None = None, *, rendering: Rendering | None = None) -> Retriever:
    """Opens a run and loads its best weights.

    Args:
        path: Folder of the run.
        device: Such as ``cpu`` or ``cuda:1``; None = a GPU if there is one.
        rendering: How images of more than 8 bits are shown, such as ``Rendering.parse(stretch="percentile:2,98")``;
            None = as those of the run's data set were, if they were and it is still there.

    Raises:
        UserError: If the folder is no run of image-text retrieval, or has no checkpoint.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = open_run(path)
    return load_retriever(run, device, rendering or find_rendering(run))


def find_rendering(run: Run) -> Rendering | None:
    """Returns the rule by which the images were rendered that a run was trained on; None if it cannot be found.

    A data set that was converted anew since tells another rule, or none: it is not asked, with a warning.
    """
    try:
        split = open_split(run.config.data.path, run.config.data.train_split)
    except UserError:
        return None
    rendered = split.manifest.rendered
    if rendered is None or rendered.rule is None:
        return None
    known = read_meta(run.best_checkpoint()).data.get(split.name)
    if known is not None and known["fingerprint"] != split.fingerprint:
        _logger.warning(
            "%s was converted anew since run %s was trained on it: how images of more than 8 bits are shown is not "
            "taken from there", split.path, run.path,
        )  # fmt: skip
        return None
    return Rendering.from_dict(rendered.rule)


def load_retriever(run: Run, device: str, rendering: Rendering | None = None) -> Retriever:
    """Loads a run's best weights; see `load_run`."""
    task = run.task
    encoder = task.joint_encoder(run.load_model())
    if encoder is None:
        raise UserError(f"run {run.path} is of recipe {run.config.recipe}, which is not image-text retrieval")
    return Retriever(encoder, task, device, rendering)
