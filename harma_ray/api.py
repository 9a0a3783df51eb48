"""A trained run from Python: encode images and captions, compare them, compose queries of both.

from harma_ray.api import load_run
run = load_run("runs/NAME")
scores = run.similarity(["bridge.tif", "farm.png"], ["a bridge over a river", "green fields"])
found = (run.compose(["bridge.tif"], ["add a boat"]) @ run.encode_images(gallery).T).topk(10)
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from harma_ray.config import RunConfig
from harma_ray.data.image_files import readable_name
from harma_ray.data.image_reading import read_picture
from harma_ray.data.images import MAX_PIXELS, BadImage, is_wide, to_rgb
from harma_ray.data.order import iterate_slices
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError, count
from harma_ray.models.fingerprints import file_fingerprint
from harma_ray.retrieval.encoding import Encoder, VectorIdentity
from harma_ray.runs import Run, open_run
from harma_ray.task import Answerer, Task
from harma_ray.training.checkpoint import WEIGHTS_NAME, list_checkpoints, read_meta

_logger = logging.getLogger(__name__)

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""An image: a path, an encoded file, a PIL image, or uint8[H, W, 3] (RGB) or uint8[H, W] (grey)."""


class Retriever:
    """A trained model that takes images and captions as people have them."""

    def __init__(
        self,
        encoder: Encoder,
        config: RunConfig,
        rendering: Rendering | None = None,
        answerer: Answerer | None = None,
    ):
        """Wraps an encoder and what answers questions; see `load_run`."""
        self.encoder, self.config, self.rendering, self.answerer = encoder, config, rendering, answerer

    def ask(self, image: ImageLike | Sequence[ImageLike], question: str, max_tokens: int = 64) -> str:
        """Answers a question about images, always alike: the likeliest token follows each.

        Args:
            image: An image or several (or none), as for `encode_images`; ``<image>`` in the question says where each
                of them belongs, without which they come first.
            question: The question.
            max_tokens: Most tokens of the answer, at least 1.

        Raises:
            UserError: If the model answers no questions, an image cannot be read, or the marks are not as many as the
                images.
        """
        if self.answerer is None:
            raise UserError(f"a model of recipe {self.config.recipe} answers no questions")
        if max_tokens < 1:
            raise UserError(f"`max_tokens` must be at least 1, got {max_tokens}")
        images = [image] if isinstance(image, ImageLike) else image
        return self.answerer(question, [self._open(each) for each in images], max_tokens)

    def encode_images(self, images: Sequence[ImageLike], batch_size: int = 64) -> Tensor:
        """Encodes images as evaluation does.

        Args:
            images: N paths, encoded files, PIL images or arrays: uint8[H, W, 3] in RGB, or uint8[H, W].
            batch_size: Images at a time.

        Returns:
            fp32[N, E] on CPU, L2-normalised.

        Raises:
            UserError: Naming an image that cannot be read.
        """
        _check_list("images", images, batch_size)
        encoder, parts = self.encoder, [torch.empty(0, self.encoder.width)]
        for part in iterate_slices(len(images), batch_size):
            parts.append(encoder.encode_images(torch.stack([self._prepare(image) for image in images[part]])))
        return torch.cat(parts)

    def _prepare(self, image: ImageLike) -> Tensor:
        with _named(image):
            return self.encoder.prepare(self._open(image))

    def _open(self, image: ImageLike) -> Image.Image:
        with _named(image):
            return open_picture(image, self.rendering, self.config.data.max_pixels)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Encodes captions, cleaned as in training; composed retrieval trains on them as they are.

        Args:
            texts: M captions.
            batch_size: Captions at a time.

        Returns:
            fp32[M, E] on CPU, L2-normalised.

        Raises:
            UserError: If nothing is left of a caption after cleaning, or the model takes no texts.
        """
        _check_list("texts", texts, batch_size)
        if self.encoder.encode_texts is None:
            raise UserError(f"a model of recipe {self.config.recipe} takes no texts; compare images with each other")
        cleaned = [self._read_text(text) for text in texts]
        parts = [self.encoder.encode_texts(cleaned[part]) for part in iterate_slices(len(cleaned), batch_size)]
        return torch.cat([torch.empty(0, self.encoder.width), *parts])

    def _read_text(self, text: object, what: str = "caption") -> str:
        if not isinstance(text, str):
            raise UserError(f"a {what} must be a text, got {text!r}")
        cleaned = self.encoder.prepare_text(text)
        if not cleaned:
            raise UserError(f"{what} {text!r} holds no word")
        return cleaned

    def compose(
        self,
        images: Sequence[ImageLike],
        captions: Sequence[str | Sequence[str]],
        query: str | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Makes queries of composed retrieval, as evaluation does: compare them with `encode_images` of a gallery.

        Args:
            images: Q reference images, as for `encode_images`.
            captions: The relative caption of each, which tells what changes; or two, as in FashionIQ.
            query: How, such as ``sum``; None = the model's own way.
            batch_size: Queries at a time.

        Returns:
            fp32[Q, E] on CPU, L2-normalised.

        Raises:
            UserError: If the model composes no queries, or not in this way, there are not one or two relative captions
                for each image, or one of them holds no word; naming an image that cannot be read.
        """
        for name, items in (("images", images), ("captions", captions)):
            _check_list(name, items, batch_size)
        ways = self.encoder.compose
        if not ways:
            raise UserError(f"a model of recipe {self.config.recipe} composes no queries; give a run of CLIP4Cir")
        query = query or next(iter(ways))
        if query not in ways:
            raise UserError(f"`query` must be one of {', '.join(ways)} for this model, got {query}")
        if len(images) != len(captions):
            numbers = f"{count(len(images), 'image')} and {count(len(captions), 'relative caption')}"
            raise UserError(f"every image needs its relative caption, or two, got {numbers}")
        told = [[*own] if isinstance(own, list | tuple) else [own] for own in captions]
        counts = {len(own) for own in told} - {1, 2}
        if counts:
            raise UserError(f"a query has one or two relative captions, got {counts.pop()}")
        told = [[self._read_text(text, "relative caption") for text in own] for own in told]
        parts = [torch.empty(0, self.encoder.width)]
        for part in iterate_slices(len(images), batch_size):
            prepared = torch.stack([self._prepare(image) for image in images[part]])
            parts.append(ways[query](prepared, told[part]))
        return torch.cat(parts)

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Returns cosines, fp32[N, M], of N images and M captions."""
        return self.encode_images(images) @ self.encode_texts(texts).T


def open_picture(image: ImageLike, rendering: Rendering | None, max_pixels: int) -> Image.Image:
    """Opens an image that is in no data set: RGB, upright.

    Args:
        image: A path, an encoded file, a PIL image, or an array, uint8[H, W, 3] in RGB or uint8[H, W].
        rendering: How more than 8 bits are shown; None = they are refused.
        max_pixels: Largest width times height; 0 = ``MAX_PIXELS``.

    Raises:
        BadImage: It cannot be read, is none of these, or has more than 8 bits and there is no rule.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
            raise BadImage(f"an array must be uint8[H, W, 3] in RGB or uint8[H, W], got {image.dtype}{[*image.shape]}")
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    if not isinstance(image, ImageLike):
        raise BadImage("an image must be a path, an encoded file, a PIL image or a NumPy array uint8[H, W, 3]")
    try:
        if isinstance(image, Image.Image):
            if is_wide(image):
                raise BadImage(f"its mode {image.mode} is more than 8 bits; give the file's path")
            return to_rgb(ImageOps.exif_transpose(image))
        file = image if isinstance(image, bytes) else Path(image).expanduser()
        return read_picture(file, rendering, max_pixels=max_pixels or MAX_PIXELS).image
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror or error})") from error


@contextmanager
def _named(image: ImageLike) -> Iterator[None]:
    """Names an image that cannot be used."""
    try:
        yield
    except BadImage as error:
        name = readable_name(image) if isinstance(image, str | Path) else f"{type(image).__name__} image"
        raise UserError(f"{name}: {error}") from error


def _check_list(name: str, items: Sequence, batch_size: int) -> None:
    if isinstance(items, ImageLike) and not (isinstance(items, np.ndarray) and items.ndim == 4):
        raise UserError(f"`{name}` must be a list, got one {type(items).__name__}; put it in brackets")
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, got {batch_size}")


def load_run(path: str | Path, device: str | None = None, *, rendering: Rendering | None = None) -> Retriever:
    """Opens a run and loads its best weights; of a run that is not finished, those so far, with a logged warning.

    Args:
        path: Folder of the run.
        device: Such as ``cpu`` or ``cuda:1``; None = a GPU if there is one.
        rendering: How images of more than 8 bits are shown, such as ``Rendering.parse(stretch="percentile:2,98")``;
            None = as those of the run's data set were, if they were and it is still there.

    Raises:
        UserError: If the folder is no run whose model gives vectors, or has no checkpoint.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = open_run(path)
    require_encoder(run)
    model = run.load_model()
    encoder, answerer = _encoder_of(run, model, device), run.task.answerer(model, device)
    return Retriever(encoder, run.config, rendering or find_rendering(run), answerer)


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
    known = next((read_meta(path).data.get(split.name) for path in list_checkpoints(run.path)[-1:]), None)
    if known is not None and known["fingerprint"] != split.fingerprint:
        _logger.warning(
            "%s was converted anew since run %s was trained on it: how images of more than 8 bits are shown is not "
            "taken from there", split.path, run.path,
        )  # fmt: skip
        return None
    return Rendering.from_dict(rendered.rule)


def require_encoder(run: Run) -> None:
    """Raises UserError, without the model, if the recipe of a run gives no vectors."""
    if type(run.task).encoder is Task.encoder:
        raise UserError(f"run {run.path} is of recipe {run.config.recipe}, which gives no vectors")


def load_encoder(run: Run, checkpoint: Path, device: str) -> tuple[Encoder, VectorIdentity]:
    """Loads what the weights of one of a run's checkpoints encode with; see `load_run`."""
    require_encoder(run)
    encoder = _encoder_of(run, run.load_checkpoint(checkpoint), device)
    values = {
        "recipe": run.config.recipe,
        "backbone": read_meta(checkpoint).backbone,
        "weights": file_fingerprint(checkpoint / WEIGHTS_NAME),
        "precision": run.config.train.eval_precision,
        **encoder.depends_on,
    }
    return encoder, VectorIdentity(values)


def _encoder_of(run: Run, model: nn.Module, device: str) -> Encoder:
    encoder = run.task.encoder(model, device)
    if encoder is None:
        raise UserError(f"run {run.path} gives no vectors that could be compared")
    return encoder
