"""Draws the content of an overhead scene in one of several styles.

A scene is laid out in canonical coordinates: `u` runs along the scene and `v` across it, both in [0, 1]. The main
objects stand at v < 0.6, a feature such as a road runs through the strip around v = 0.7, and the extra objects stand
at v > 0.82. The whole is then turned and mirrored by the frame of the scene. The place of each item follows from
(layout seed, identity of the item) alone, so that a change to one item leaves every other item where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from harma_ray.errors import UserError

if TYPE_CHECKING:
    from harma_ray.data.scenes import SceneContent

RGB = tuple[int, int, int]

MIN_SIZE = 32
_SUPERSAMPLING = 2
_STRIP_V = 0.70
_EXTRAS_V = 0.895

# Identities of what has a random stream of its own.
_FRAME, _GROUND, _BACKDROP, _FEATURE, _MAIN, _MAIN_SLOTS, _EXTRA, _EXTRA_SLOTS, _SENSOR = range(9)


@dataclass(frozen=True)
class Look:
    """The palette, light and sensor of one style.

    Attributes:
        grounds: The two colours of each ground material.
        paints: The colour that each painted colour name has in this style.
        materials: The colour of everything else.
        shadow_length: Length of the shadow of an object of height 1, as a fraction of the scene's side.
        shadow_tint: Factor on each channel inside a shadow, of 255.
        contrast: Factor on the distance from mid grey.
        brightness: Offset added after the contrast, in grey levels.
        blur_fraction: Standard deviation of the blur, as a fraction of the scene's side.
        noise: Standard deviation of the sensor noise per pixel, in grey levels.
        banding: Standard deviation of the sensor noise per column, in grey levels.
    """

    grounds: dict[str, tuple[RGB, RGB]]
    paints: dict[str, RGB]
    materials: dict[str, RGB]
    shadow_length: float
    shadow_tint: RGB
    contrast: float
    brightness: float
    blur_fraction: float
    noise: float
    banding: float


# Colours by style, in the order of STYLES; each ground material has two, which its texture mixes.
STYLES = ("summer", "infrared", "winter")
_GROUNDS = {
    "grass": (((92, 142, 62), (124, 168, 84)), ((196, 56, 62), (226, 92, 92)), ((204, 218, 208), (142, 170, 138))),
    "sand": (
        ((222, 200, 150), (206, 182, 130)),
        ((196, 198, 150), (176, 180, 134)),
        ((234, 222, 196), (214, 198, 164)),
    ),
    "concrete": (
        ((186, 186, 182), (172, 172, 168)),
        ((152, 172, 180), (138, 158, 168)),
        ((186, 192, 204), (172, 178, 192)),
    ),
    "asphalt": (((86, 88, 94), (110, 112, 116)), ((60, 74, 88), (80, 96, 110)), ((104, 108, 122), (138, 144, 156))),
    "soil": (((128, 90, 62), (158, 116, 82)), ((112, 132, 108), (142, 158, 124)), ((216, 214, 216), (126, 106, 96))),
}
_PAINTS = {
    "white": ((248, 248, 246), (250, 252, 252), (252, 252, 255)),
    "red": ((214, 36, 36), (96, 214, 40), (172, 48, 58)),
    "blue": ((36, 84, 222), (112, 24, 150), (48, 72, 158)),
    "yellow": ((248, 216, 32), (30, 232, 232), (222, 188, 72)),
    "green": ((24, 200, 120), (30, 60, 236), (52, 140, 98)),
    "purple": ((152, 60, 190), (248, 146, 20), (128, 78, 158)),
    "black": ((26, 26, 30), (8, 8, 10), (34, 34, 42)),
}
_MATERIALS = {
    "water": ((50, 110, 150), (14, 22, 48), (124, 156, 180)),
    "ripple": ((74, 134, 172), (28, 40, 70), (206, 220, 230)),
    "crown": ((36, 92, 40), (142, 16, 34), (74, 82, 78)),
    "crown_light": ((66, 128, 58), (186, 40, 54), (206, 214, 220)),
    "road": ((66, 68, 74), (42, 54, 68), (88, 92, 104)),
    "marking": ((240, 238, 225), (226, 238, 240), (236, 238, 244)),
    "ballast": ((138, 126, 116), (112, 128, 140), (146, 144, 150)),
    "sleeper": ((66, 54, 48), (48, 58, 72), (72, 66, 70)),
    "truck": ((240, 130, 24), (168, 236, 120), (206, 122, 56)),
    "roof": ((228, 150, 142), (206, 160, 224), (208, 142, 142)),
    "roof_shade": ((168, 98, 94), (150, 108, 176), (150, 92, 98)),
    "pool": ((80, 214, 236), (34, 30, 92), (132, 196, 214)),
    "rim": ((240, 240, 236), (228, 236, 238), (112, 118, 132)),
    "glass": ((40, 48, 60), (14, 18, 28), (46, 50, 64)),
    "bank": ((168, 150, 112), (130, 150, 140), (170, 166, 164)),
}


def _look(style: str, **light) -> Look:
    """Returns a style's look from its column of the palettes and from its light and sensor."""
    column = STYLES.index(style)
    return Look(
        grounds={name: colours[column] for name, colours in _GROUNDS.items()},
        paints={name: colours[column] for name, colours in _PAINTS.items()},
        materials={name: colours[column] for name, colours in _MATERIALS.items()},
        **light,
    )


LOOKS = {
    "summer": _look(
        "summer",
        shadow_length=0.022,
        shadow_tint=(128, 133, 148),
        contrast=1.0,
        brightness=0.0,
        blur_fraction=0.003,
        noise=4.0,
        banding=0.0,
    ),
    "infrared": _look(
        "infrared",
        shadow_length=0.036,
        shadow_tint=(87, 92, 107),
        contrast=1.12,
        brightness=-6.0,
        blur_fraction=0.0055,
        noise=7.0,
        banding=4.0,
    ),
    "winter": _look(
        "winter",
        shadow_length=0.075,
        shadow_tint=(153, 168, 204),
        contrast=0.90,
        brightness=2.0,
        blur_fraction=0.004,
        noise=3.0,
        banding=0.0,
    ),
}

# Number of texture cells along the scene: few give blotches, many give grain.
_TEXTURE_CELLS = {"grass": 30, "sand": 6, "concrete": 5, "asphalt": 60, "soil": 16}


@dataclass(frozen=True)
class _Shape:
    """An object seen from above: polygons in local coordinates, whose long axis is y.

    Attributes:
        parts: Pairs of (tone, points); a tone is a material, or paint, shade (darker paint) or light (paler paint).
        num_solid: How many of the first parts get an edge and throw a shadow.
        scale: Scene units of one local unit where there is room for it.
        height: Factor on the length of the shadow.
    """

    parts: tuple[tuple[str, np.ndarray], ...]
    num_solid: int
    scale: float
    height: float

    def measure(self) -> tuple[float, float, float]:
        """Returns the half extents along x and y and the radius, in local units."""
        points = np.concatenate([points for _, points in self.parts])
        half_x, half_y = np.abs(points).max(axis=0)
        return float(half_x), float(half_y), float(np.hypot(*points.T).max())


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def _box(half_x: float, half_y: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    corners = _polygon((-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y))
    return corners + np.array([x, y])


def _ellipse(radius_x: float, radius_y: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    return np.stack([radius_x * np.cos(angles) + x, radius_y * np.sin(angles) + y], axis=1)


def _shape(scale: float, height: float, num_solid: int, *parts: tuple[str, np.ndarray]) -> _Shape:
    return _Shape(parts, num_solid, scale, height)


_SHAPES = {
    "plane": _shape(
        0.115,
        0.6,
        3,
        ("paint", _polygon((-0.86, 0.3), (-0.86, 0.02), (0, -0.45), (0.86, 0.02), (0.86, 0.3), (0, 0.18))),
        ("paint", _polygon((-0.42, 1), (-0.42, 0.84), (0, 0.6), (0.42, 0.84), (0.42, 1))),
        ("paint", _polygon((-0.2, 0.9), (-0.2, -0.72), (0, -1), (0.2, -0.72), (0.2, 0.9))),
        ("glass", _polygon((-0.12, -0.7), (0, -0.9), (0.12, -0.7))),
    ),
    "helicopter": _shape(
        0.105,
        0.6,
        3,
        ("paint", _box(0.13, 0.5, 0, 0.5)),
        ("paint", _box(0.34, 0.09, 0, 0.9)),
        ("paint", _ellipse(0.44, 0.6, 0, -0.38)),
        ("glass", _ellipse(0.24, 0.16, 0, -0.76)),
        ("sleeper", _polygon((-0.55, -0.9), (-0.49, -0.95), (0.55, 0.16), (0.49, 0.21))),
        ("sleeper", _polygon((0.55, -0.9), (0.49, -0.95), (-0.55, 0.16), (-0.49, 0.21))),
    ),
    "boat": _shape(
        0.115,
        0.5,
        1,
        ("paint", _polygon((0, -1), (0.36, -0.4), (0.4, 0.85), (0.28, 1), (-0.28, 1), (-0.4, 0.85), (-0.36, -0.4))),
        ("shade", _box(0.24, 0.3, 0, 0.5)),
        ("marking", _box(0.16, 0.16, 0, 0.5)),
        ("shade", _box(0.05, 0.3, 0, -0.3)),
    ),
    "barge": _shape(
        0.115,
        0.4,
        1,
        ("shade", _polygon((-0.3, -0.9), (-0.18, -1), (0.18, -1), (0.3, -0.9), (0.3, 1), (-0.3, 1))),
        ("paint", _box(0.23, 0.24, 0, -0.6)),
        ("paint", _box(0.23, 0.24, 0, -0.02)),
        ("paint", _box(0.23, 0.16, 0, 0.46)),
        ("marking", _box(0.2, 0.1, 0, 0.82)),
    ),
    "car": _shape(
        0.09,
        0.5,
        1,
        ("paint", _polygon((-0.4, 1), (-0.46, 0), (-0.38, -1), (0.38, -1), (0.46, 0), (0.4, 1))),
        ("glass", _box(0.32, 0.13, 0, -0.38)),
        ("glass", _box(0.3, 0.1, 0, 0.64)),
    ),
    "bus": _shape(
        0.135,
        0.7,
        1,
        ("paint", _box(0.3, 1)),
        ("glass", _box(0.25, 0.07, 0, -0.9)),
        ("shade", _box(0.16, 0.12, 0, -0.4)),
        ("shade", _box(0.16, 0.12, 0, 0.1)),
        ("shade", _box(0.16, 0.12, 0, 0.6)),
    ),
    "tank": _shape(
        0.1,
        1.0,
        1,
        ("shade", _ellipse(1, 1)),
        ("paint", _ellipse(0.82, 0.82)),
        ("light", _ellipse(0.3, 0.3, -0.22, -0.22)),
    ),
    "field": _shape(
        0.13, 0.0, 1, ("paint", _box(0.9, 0.9)), *(("shade", _box(0.06, 0.86, x, 0)) for x in (-0.6, -0.2, 0.2, 0.6))
    ),
    "house": _shape(
        0.095,
        0.8,
        1,
        ("paint", _box(0.72, 0.95)),
        ("shade", _box(0.36, 0.95, 0.36, 0)),
        ("light", _box(0.05, 0.95)),
        ("roof", _box(0.13, 0.13, -0.36, 0.5)),
    ),
    "court": _shape(
        0.125,
        0.0,
        1,
        ("paint", _box(0.68, 1)),
        ("marking", _box(0.54, 0.84)),
        ("paint", _box(0.45, 0.75)),
        ("marking", _box(0.6, 0.05)),
        ("marking", _box(0.045, 0.42)),
    ),
    "tent": _shape(
        0.085,
        0.7,
        1,
        ("paint", _box(0.85, 0.85)),
        ("shade", _polygon((0, 0), (0.85, -0.85), (0.85, 0.85))),
        ("shade", _polygon((0, 0), (-0.85, -0.85), (-0.85, 0.85))),
    ),
    "panel": _shape(
        0.115,
        0.4,
        1,
        ("rim", _box(0.64, 1)),
        *(("paint", _box(0.25, 0.27, x, y)) for x in (-0.3, 0.3) for y in (-0.64, 0, 0.64)),
    ),
    "truck": _shape(
        0.06,
        0.7,
        2,
        ("truck", _box(0.46, 0.62, 0, 0.38)),
        ("truck", _box(0.4, 0.3, 0, -0.7)),
        ("glass", _box(0.4, 0.1, 0, -0.4)),
    ),
    "shed": _shape(0.052, 0.8, 1, ("roof", _box(0.9, 0.9)), ("roof_shade", _box(0.45, 0.9, 0.45, 0))),
    "tree": _shape(0.055, 0.9, 1, ("crown", _ellipse(1, 1)), ("crown_light", _ellipse(0.5, 0.5, -0.2, -0.2))),
    "pool": _shape(0.058, 0.0, 1, ("rim", _box(0.78, 1)), ("pool", _box(0.54, 0.76))),
}


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
    half_x, half_y, radius = _SHAPES[content.kind].measure()
    natural = _SHAPES[content.kind].scale
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
        items.append(_Item(content.extra_kind, None, at, np.pi / 2 + 0.35 * turn, _SHAPES[content.extra_kind].scale))
    return items


class _Canvas:
    """A supersampled image on which scene coordinates are drawn through the frame of the scene."""

    def __init__(self, content: SceneContent, look: Look, size: int):
        self.content, self.look = content, look
        self.pixels = size * _SUPERSAMPLING
        rng = _stream(content, _FRAME)
        angle = np.pi / 2 * rng.integers(4) + rng.uniform(-0.07, 0.07)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.frame = turn @ np.diag([rng.choice([-1.0, 1.0]), 1.0])
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
            shape = _SHAPES[item.kind]
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
            canvas.line(_polygon((at, -0.2), (at, 1.2)), 0.006, _mix(second, (0, 0, 0), 0.22))
            canvas.line(_polygon((-0.2, at), (1.2, at)), 0.006, _mix(second, (0, 0, 0), 0.22))
    elif canvas.content.ground == "sand":
        along = np.linspace(-0.2, 1.2, 16)
        for at in np.linspace(0.0, 1.0, 10):
            canvas.line(np.stack([along, at + 0.012 * np.sin(18 * along)], axis=1), 0.006, _mix(first, second, 1.6))


def _draw_water(canvas: _Canvas, outline: np.ndarray, rng: np.random.Generator, lowest: float, highest: float) -> None:
    """Fills an outline with water and draws short ripples between two values of v."""
    canvas.fill(outline, canvas.look.materials["water"])
    for u, v in rng.uniform((0.0, lowest), (1.0, highest), (16, 2)):
        canvas.line(_polygon((u - 0.03, v), (u + 0.03, v)), 0.007, canvas.look.materials["ripple"])


def _draw_backdrop(canvas: _Canvas) -> None:
    """Draws what marks the class of the scene, beneath its objects."""
    rng, label, materials = _stream(canvas.content, _BACKDROP), canvas.content.label, canvas.look.materials
    along = np.linspace(-0.2, 1.2, 24)
    if label == "airport":
        for edge, dashes in ((0.02, 0.05), (0.61, 0.58)):
            canvas.line(_polygon((-0.2, edge), (1.2, edge)), 0.012, materials["marking"])
            for u in np.arange(-0.15, 1.2, 0.16):
                canvas.line(_polygon((u, dashes), (u + 0.08, dashes)), 0.012, materials["marking"])
    elif label == "parking lot":
        for u in 0.05 + 0.15 * np.arange(7):
            canvas.line(_polygon((u, 0.03), (u, 0.2)), 0.008, materials["marking"])
            canvas.line(_polygon((u, 0.43), (u, 0.6)), 0.008, materials["marking"])
    elif label in ("storage tanks", "solar farm"):
        inner = _polygon((0.02, 0.02), (0.98, 0.02), (0.98, 0.605), (0.02, 0.605), (0.02, 0.02))
        canvas.line(inner, 0.016 if label == "storage tanks" else 0.008, materials["bank"])
    elif label == "farmland":
        furrow = _mix(canvas.look.grounds[canvas.content.ground][0], (20, 20, 20), 0.2)
        for v in np.arange(-0.1, 1.1, 0.045):
            canvas.line(_polygon((-0.2, v), (1.2, v)), 0.008, furrow)
    elif label == "harbor":
        _draw_water(canvas, _box(0.8, 0.5, 0.5, 0.1), rng, 0.03, 0.57)
        canvas.line(_polygon((-0.2, 0.605), (1.2, 0.605)), 0.014, materials["marking"])
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
            canvas.line(_polygon((u, v - 0.034), (u, v + 0.034)), 0.009, materials["sleeper"])
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
            canvas.fill(_ellipse(reach + grown, 0.085 + grown, middle, _STRIP_V), materials[tone])


def _draw_clearings(canvas: _Canvas, items: list[_Item]) -> None:
    """Opens the forest around each object, so that its ground shows."""
    for item in items:
        reach = 1.25 * item.scale * max(_SHAPES[item.kind].measure())
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


def check_style(style: str) -> None:
    """Raises UserError unless `style` is one of the styles."""
    if style not in LOOKS:
        raise UserError(f"unknown scene style {style!r}; use one of {', '.join(STYLES)}")


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
