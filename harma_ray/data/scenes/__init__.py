"""Small overhead scenes with true captions, drawn from a seed: the demo data that comes with the package.

What a scene holds (`content`), how it looks (`drawing`, `shapes`, `looks`) and how it is told (`phrasing`) are apart;
so is what changes one scene into another (`edits`). All styles share one distribution of contents; a style changes the
palette, the light, the sensor and the phrasing.
Everything follows from (seed, index, style) alone and is the same in every process.
"""

from dataclasses import dataclass

from PIL import Image

from harma_ray.data.scenes.content import LABEL_NAMES, SceneContent, sample_content
from harma_ray.data.scenes.drawing import draw
from harma_ray.data.scenes.edits import composed_scene as composed_scene
from harma_ray.data.scenes.phrasing import captions


@dataclass(frozen=True)
class Scene:
    """One drawn scene with its captions and class.

    Attributes:
        image: RGB image, size x size pixels.
        captions: Different true captions.
        label: Index of the class in LABEL_NAMES.
        label_name: Name of the class.
        content: What the scene holds.
    """

    image: Image.Image
    captions: tuple[str, ...]
    label: int
    label_name: str
    content: SceneContent


def scene(seed: int, index: int, style: str, size: int = 96, num_captions: int = 5) -> Scene:
    """Makes scene `index` of a seed in a style: its image, captions and class.

    Raises:
        UserError: The style is unknown, the size or a count out of range, or the seed or index negative.
    """
    content = sample_content(seed, index)
    return Scene(
        image=draw(content, style, size),
        captions=tuple(captions(content, style, num_captions)),
        label=LABEL_NAMES.index(content.label),
        label_name=content.label,
        content=content,
    )
