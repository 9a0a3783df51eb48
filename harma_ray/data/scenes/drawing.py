"""Draws the content of an overhead scene in one of several styles.

A scene is laid out in canonical coordinates: `u` runs along the scene and `v` across it, both in [0, 1]. The main
objects stand at v < 0.6, a feature such as a road runs through the strip around v = 0.7, and the extra objects stand
at v > 0.82. The whole is then turned and mirrored by the frame of the scene. The place of each item follows from
(layout seed, identity of the item) alone, so that a change to one item leaves every other item where it is.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from harma_ray.data.scenes.content import SceneContent
from harma_ray.data.scenes.looks import LOOKS, RGB, STYLES, Look, check_style
from harma_ray.data.scenes.shapes import SHAPES, box, ellipse, polygon
from harma_ray.errors import UserError

MIN_SIZE = 32
_SUPERSAMPLING = 2
_STRIP_V = 0.70
_EXTRAS_V = 0.895

# Identities of what has a random stream of its own.
_FRAME, _GROUND, _BACKDROP, _FEATURE, _MAIN, _MAIN_SLOTS, _EXTRA, _EXTRA_SLOTS, _SENSOR = range(9)

# Number of texture cells along the scene: few give blotches, many give grain.
_TEXTURE_CELLS = {"grass": 30, "sand": 6, "concrete": 5, "asphalt": 60, "soil": 16}


@dataclass(frozen=True)
class _Item:
    """One object with its place: centre in scene coordinates, angle in radians, scene units per local unit."""

    kind: str
    colour: str | None
    at: tuple[float, float]
    angle: float
    scale: float


def _stream(content: SceneContent, *identity: int) -> np.random.Generator:
    """Returns the random stream of one identity in the layout of a scene."""
    return np.random.default_rng(np.random.SeedSequence([content.layout_seed, *identity]))


def _place_main(content: SceneContent) -> list[_Item]:
    """Places the main objects; the place of object i does not depend on how many there are."""
    slots = _stream(content, _MAIN_SLOTS)
    half_x, half_y, radius = SHAPES[content.kind].measure()
    natural = SHAPES[content.kind].scale
    turned = np.pi * float(slots.integers(2))
    if content.arrangement == "row":
        order = np.array([2, 3, 1, 4, 0, 5])  # from the middle outwards, so that a shorter row has no gap
        centres = np.stack([0.5 + 0.156 * (order - 2.5), np.full(6, 0.32)], axis=1)
        scale, jitter, swing = min(natural, 0.054 / half_x, 0.2 / half_y), 0.004, 0.04
    elif content.arrangement == "rows":
        columns = np.array([0, 0, 1, 1, -1, -1])
        centres = np.stack([0.5 + 0.285 * columns, 0.19 + 0.26 * np.array([0, 1, 0, 1, 0, 1])], axis=1)
        scale, jitter, swing = min(natural, 0.125 / half_x, 0.112 / half_y), 0.006, 0.05
    else:
        slot = slots.permutation(6)
        column, level = slot // 2, slot % 2
        centres = np.stack([0.19 + 0.31 * column, 0.17 + 0.27 * level + 0.04 * (column == 1)], axis=1)
        scale, jitter, swing = min(natural, 0.108 / radius), 0.03, np.pi
    items = []
    for index in range(content.num_main):
        rng = _stream(content, _MAIN, index)
        du, dv = rng.uniform(-jitter, jitter, 2)
        angle = turned + rng.uniform(-swing, swing)
        u, v = centres[index]
        items.append(_Item(content.kind, content.colour, (float(u + du), float(v + dv)), angle, scale))
    return items


def _place_extras(content: SceneContent) -> list[_Item]:
    """Places the extra objects in the strip at the edge of the scene."""
    if content.num_extras == 0:
        return []
    slots = _stream(content, _EXTRA_SLOTS).permutation(6)
    items = []
    for index in range(content.num_extras):
        rng = _stream(content, _EXTRA, index)
        du, dv, turn = rng.uniform(-1, 1, 3)
        at = (0.5 + 0.15 * (float(slots[index]) - 2.5) + 0.012 * du, _EXTRAS_V + 0.008 * dv)
        items.append(_Item(content.extra_kind, None, at, np.pi / 2 + 0.35 * turn, SHAPES[content.extra_kind].scale))
    return items


def _draw_frame(rng: np.random.Generator) -> np.ndarray:
    """Draws how a scene is turned and mirrored about its middle: float64[2, 2]."""
    angle = np.pi / 2 * rng.integers(4) + rng.uniform(-0.07, 0.07)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.diag([rng.choice([-1.0, 1.0]), 1.0])


def locate_main(content: SceneContent) -> tuple[float, float]:
    """Returns the mean place of the main objects in the image: parts of its width, from the left, and height."""
    u, v = np.mean([item.at for item in _place_main(content)], axis=0)
    return _locate(content, float(u), float(v))


def locate_feature(content: SceneContent) -> tuple[float, float]:
    """Returns the middle of the strip that the road, stream, railway, trees or pond lie in, as `locate_main` does."""
    return _locate(content, 0.5, _STRIP_V)


def _locate(content: SceneContent, u: float, v: float) -> tuple[float, float]:
    x, y = _draw_frame(_stream(content, _FRAME)) @ (np.array([u, v]) - 0.5) + 0.5
    return float(x), float(y)


class _Canvas:
    """A supersampled image on which scene coordinates are drawn through the frame of the scene."""

    def __init__(self, content: SceneContent, look: Look, size: int):
        self.content, self.look = content, look
        self.pixels = size * _SUPERSAMPLING
        rng = _stream(content, _FRAME)
        self.frame = _draw_frame(rng)
        sun = rng.uniform(0, 2 * np.pi)
        self.shadow = look.shadow_length * self.pixels * np.array([np.cos(sun), np.sin(sun)])
        mottle = _stream(content, _GROUND).integers(0, 256, (_TEXTURE_CELLS[content.ground],) * 2, dtype=np.uint8)
        mask = Image.fromarray(mottle).resize((self.pixels, self.pixels), Image.Resampling.BICUBIC)
        first, second = (Image.new("RGB", mask.size, colour) for colour in look.grounds[content.ground])
        self.image = Image.composite(second, first, mask)
        self.pen = ImageDraw.Draw(self.image)

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Maps scene coordinates (n, 2) to pixels (n, 2)."""
        return ((points - 0.5) @ self.frame.T + 0.5) * self.pixels

    def fill(self, points: np.ndarray, colour: RGB) -> None:
        self.pen.polygon(self.to_pixels(points).ravel().tolist(), fill=colour)

    def line(self, points: np.ndarray, width: float, colour: RGB) -> None:
        thickness = max(1, round(width * self.pixels))
        self.pen.line(self.to_pixels(points).ravel().tolist(), fill=colour, width=thickness, joint="curve")

    def disc(self, u: float, v: float, radius: float, colour: RGB) -> None:
        (x, y), reach = self.to_pixels(np.array([[u, v]]))[0].tolist(), radius * self.pixels
        self.pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

    def crown(self, u: float, v: float, radius: float) -> None:
        """Draws a tree that throws no shadow."""
        self.disc(u, v, radius, self.look.materials["crown"])
        self.disc(u - 0.2 * radius, v - 0.2 * radius, 0.5 * radius, self.look.materials["crown_light"])

    def items(self, items: list[_Item]) -> None:
        """Draws objects and, on the ground between them, their shadows."""
        mask = Image.new("L", self.image.size, 0)
        shade = ImageDraw.Draw(mask)
        drawn = []
        for item in items:
            shape = SHAPES[item.kind]
            cos, sin = np.cos(item.angle) * item.scale, np.sin(item.angle) * item.scale
            turn = np.array([[cos, -sin], [sin, cos]])
            outlines = [(tone, self.to_pixels(points @ turn.T + item.at)) for tone, points in shape.parts]
            drawn.append((item, shape, outlines))
            length = float(np.hypot(*self.shadow)) * shape.height
            for step in np.arange(1, 1 + int(np.ceil(length / 3.0))) * 3.0:
                offset = self.shadow * shape.height * min(1.0, step / length)
                for _, points in outlines[: shape.num_solid]:
                    shade.polygon((points + offset).ravel().tolist(), fill=255)
        if mask.getbbox() is not None:
            tint = Image.new("RGB", self.image.size, self.look.shadow_tint)
            self.image.paste(ImageChops.multiply(self.image, tint), mask=mask)
        for item, shape, outlines in drawn:
            tones = self.tones(item.colour)
            for order, (tone, points) in enumerate(outlines):
                flat = points.ravel().tolist()
                edge = _mix(tones[tone], (20, 20, 24), 0.45) if order < shape.num_solid else None
                self.pen.polygon(flat, fill=tones[tone], outline=edge)

    def tones(self, colour: str | None) -> dict[str, RGB]:
        """Returns the colour of each tone for an object painted in `colour`."""
        if colour is None:
            return self.look.materials
        paint = self.look.paints[colour]
        shades = {"paint": paint, "shade": _mix(paint, (20, 20, 24), 0.28), "light": _mix(paint, (255, 255, 255), 0.4)}
        return self.look.materials | shades


def _mix(first: RGB, second: RGB, share: float) -> RGB:
    """Returns `first` with a share of `second` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _band(offsets: np.ndarray, half_width: float, along: np.ndarray) -> np.ndarray:
    """Returns the outline of a band of constant width about the curve v = offsets(along)."""
    upper = np.stack([along, offsets - half_width], axis=1)
    lower = np.stack([along, offsets + half_width], axis=1)
    return np.concatenate([upper, lower[::-1]])


def _draw_ground_pattern(canvas: _Canvas) -> None:
    """Draws the joints of concrete and the ripples of sand."""
    first, second = canvas.look.grounds[canvas.content.ground]
    if canvas.content.ground == "concrete":
        for at in np.linspace(0.06, 0.94, 6):
            canvas.line(polygon((at, -0.2), (at, 1.2)), 0.006, _mix(second, (0, 0, 0), 0.22))
            canvas.line(polygon((-0.2, at), (1.2, at)), 0.006, _mix(second, (0, 0, 0), 0.22))
    elif canvas.content.ground == "sand":
        along = np.linspace(-0.2, 1.2, 16)
        for at in np.linspace(0.0, 1.0, 10):
            canvas.line(np.stack([along, at + 0.012 * np.sin(18 * along)], axis=1), 0.006, _mix(first, second, 1.6))


def _draw_water(canvas: _Canvas, outline: np.ndarray, rng: np.random.Generator, lowest: float, highest: float) -> None:
    """Fills an outline with water and draws short ripples between two values of v."""
    canvas.fill(outline, canvas.look.materials["water"])
    for u, v in rng.uniform((0.0, lowest), (1.0, highest), (16, 2)):
        canvas.line(polygon((u - 0.03, v), (u + 0.03, v)), 0.007, canvas.look.materials["ripple"])


def _draw_backdrop(canvas: _Canvas) -> None:
    """Draws what marks the class of the scene, beneath its objects."""
    rng, label, materials = _stream(canvas.content, _BACKDROP), canvas.content.label, canvas.look.materials
    along = np.linspace(-0.2, 1.2, 24)
    if label == "airport":
        for edge, dashes in ((0.02, 0.05), (0.61, 0.58)):
            canvas.line(polygon((-0.2, edge), (1.2, edge)), 0.012, materials["marking"])
            for u in np.arange(-0.15, 1.2, 0.16):
                canvas.line(polygon((u, dashes), (u + 0.08, dashes)), 0.012, materials["marking"])
    elif label == "parking lot":
        for u in 0.05 + 0.15 * np.arange(7):
            canvas.line(polygon((u, 0.03), (u, 0.2)), 0.008, materials["marking"])
            canvas.line(polygon((u, 0.43), (u, 0.6)), 0.008, materials["marking"])
    elif label in ("storage tanks", "solar farm"):
        inner = polygon((0.02, 0.02), (0.98, 0.02), (0.98, 0.605), (0.02, 0.605), (0.02, 0.02))
        canvas.line(inner, 0.016 if label == "storage tanks" else 0.008, materials["bank"])
    elif label == "farmland":
        furrow = _mix(canvas.look.grounds[canvas.content.ground][0], (20, 20, 20), 0.2)
        for v in np.arange(-0.1, 1.1, 0.045):
            canvas.line(polygon((-0.2, v), (1.2, v)), 0.008, furrow)
    elif label == "harbor":
        _draw_water(canvas, box(0.8, 0.5, 0.5, 0.1), rng, 0.03, 0.57)
        canvas.line(polygon((-0.2, 0.605), (1.2, 0.605)), 0.014, materials["marking"])
    elif label == "river":
        shore = 0.015 * np.sin(7 * along + rng.uniform(0, 6))
        outline = np.concatenate(
            [np.stack([along, 0.075 + shore], axis=1), np.stack([along, 0.585 + shore], axis=1)[::-1]]
        )
        _draw_water(canvas, outline, rng, 0.1, 0.56)
        canvas.line(np.concatenate([outline, outline[:1]]), 0.014, materials["bank"])
    elif label == "forest":
        for column in range(9):
            for level in range(9):
                du, dv, radius = rng.uniform((-0.03, -0.03, 0.036), (0.03, 0.03, 0.056))
                canvas.crown(0.06 + 0.11 * column + du, 0.06 + 0.11 * level + dv, radius)


def _draw_feature(canvas: _Canvas) -> None:
    """Draws the road, stream, railway, trees or pond of the strip beside the main objects."""
    content, materials, rng = canvas.content, canvas.look.materials, _stream(canvas.content, _FEATURE)
    phase, middle = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.7)
    along = np.linspace(-0.2, 1.2, 40)
    course = np.full(40, _STRIP_V) + 0.042 * np.sin(8 * along + phase) * (content.feature_variant == "curved")
    if content.feature == "road":
        canvas.fill(_band(course, 0.042, along), materials["marking"])
        canvas.fill(_band(course, 0.036, along), materials["road"])
        for start in range(0, 39, 2):
            canvas.line(np.stack([along, course], axis=1)[start : start + 2], 0.010, materials["marking"])
    elif content.feature == "stream":
        canvas.fill(_band(course, 0.056, along), materials["bank"])
        canvas.fill(_band(course, 0.044, along), materials["water"])
    elif content.feature == "railway":
        canvas.fill(_band(course, 0.040, along), materials["ballast"])
        fine = np.linspace(-0.2, 1.2, 56)
        for u, v in zip(fine, np.interp(fine, along, course), strict=True):
            canvas.line(polygon((u, v - 0.034), (u, v + 0.034)), 0.009, materials["sleeper"])
        for offset in (-0.018, 0.018):
            canvas.line(np.stack([along, course + offset], axis=1), 0.008, materials["marking"])
    elif content.feature == "trees":
        num_trees = 14 if content.feature_variant == "dense" else 5
        for index in range(num_trees):
            du, dv, radius = rng.uniform((-0.01, -0.012, 0.042), (0.01, 0.012, 0.054))
            canvas.crown((index + 0.5) / num_trees + du, _STRIP_V + dv, radius)
    elif content.feature == "pond":
        reach = 0.085 if content.feature_variant == "round" else 0.26
        for grown, tone in ((0.012, "bank"), (0.0, "water")):
            canvas.fill(ellipse(reach + grown, 0.085 + grown, middle, _STRIP_V), materials[tone])


def _draw_clearings(canvas: _Canvas, items: list[_Item]) -> None:
    """Opens the forest around each object, so that its ground shows."""
    for item in items:
        reach = 1.25 * item.scale * max(SHAPES[item.kind].measure())
        canvas.disc(*item.at, reach, canvas.look.grounds[canvas.content.ground][0])


def _expose(canvas: _Canvas, style: str) -> Image.Image:
    """Reduces the canvas to its final size and adds the blur, contrast and noise of the style's sensor."""
    look, rng = canvas.look, _stream(canvas.content, _SENSOR, STYLES.index(style))
    image = canvas.image.reduce(_SUPERSAMPLING)
    image = image.filter(ImageFilter.GaussianBlur(look.blur_fraction * image.width))
    pixels = (np.asarray(image, dtype=np.float32) - 128.0) * look.contrast + (128.0 + look.brightness)
    pixels += look.noise * rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
    if look.banding:
        pixels += look.banding * rng.standard_normal((1, image.width, 1), dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def draw(content: SceneContent, style: str, size: int = 96) -> Image.Image:
    """Draws a scene as an RGB image of size x size pixels.

    Args:
        content: What to draw.
        style: One of STYLES.
        size: Side of the image in pixels, at least 32.

    Raises:
        UserError: The style is unknown or the size too small.
    """
    check_style(style)
    if size < MIN_SIZE:
        raise UserError(f"a scene needs a `size` of at least {MIN_SIZE} pixels, got {size}")
    canvas = _Canvas(content, LOOKS[style], size)
    items = _place_main(content) + _place_extras(content)
    _draw_ground_pattern(canvas)
    _draw_backdrop(canvas)
    _draw_feature(canvas)
    if content.label == "forest":
        _draw_clearings(canvas, items)
    canvas.items(items)
    return _expose(canvas, style)
