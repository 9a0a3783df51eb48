"""How the styles of scenes look: palettes, light and sensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harma_ray.errors import UserError

RGB = tuple[int, int, int]


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


# Colours, light and sensor, each in the order of STYLES; a ground material has two colours, which its texture mixes.
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


_LIGHT = {
    "shadow_length": (0.022, 0.036, 0.075),
    "shadow_tint": ((128, 133, 148), (87, 92, 107), (153, 168, 204)),
    "contrast": (1.0, 1.12, 0.90),
    "brightness": (0.0, -6.0, 2.0),
    "blur_fraction": (0.003, 0.0055, 0.004),
    "noise": (4.0, 7.0, 3.0),
    "banding": (0.0, 4.0, 0.0),
}


def _column(table: Mapping[str, tuple[Any, ...]], style: str) -> dict[str, Any]:
    """Returns what a table has for a style."""
    return {name: values[STYLES.index(style)] for name, values in table.items()}


LOOKS = {
    style: Look(_column(_GROUNDS, style), _column(_PAINTS, style), _column(_MATERIALS, style), **_column(_LIGHT, style))
    for style in STYLES
}


def check_style(style: str) -> None:
    """Raises UserError unless `style` is one of the styles."""
    if style not in LOOKS:
        raise UserError(f"unknown scene style {style!r}; use one of {', '.join(STYLES)}")
