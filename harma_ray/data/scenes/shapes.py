"""The objects of scenes, as seen from above."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """An object seen from above: polygons in local coordinates, whose long axis is y.

    Attributes:
        parts: Pairs of (tone, points); a tone is a material, or paint, shade (darker paint) or light (paler paint).
        scale: Scene units of one local unit where there is room for it.
        height: Factor on the length of the shadow.
        num_solid: How many of the first parts get an edge and throw a shadow.
    """

    parts: tuple[tuple[str, np.ndarray], ...]
    scale: float
    height: float
    num_solid: int

    def measure(self) -> tuple[float, float, float]:
        """Returns the half extents along x and y and the radius, in local units."""
        points = np.concatenate([points for _, points in self.parts])
        half_x, half_y = np.abs(points).max(axis=0)
        return float(half_x), float(half_y), float(np.hypot(*points.T).max())


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """Returns corners as an array, fp64[P, 2]."""
    return np.array(points, dtype=np.float64)


def box(half_x: float, half_y: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Returns the corners of an upright box around (x, y), fp64[4, 2]."""
    corners = polygon((-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y))
    return corners + np.array([x, y])


def ellipse(radius_x: float, radius_y: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Returns 18 points of an upright ellipse around (x, y), fp64[18, 2]."""
    angles = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    return np.stack([radius_x * np.cos(angles) + x, radius_y * np.sin(angles) + y], axis=1)


_PARTS: dict[str, tuple[tuple[str, np.ndarray], ...]] = {
    "plane": (
        ("paint", polygon((-0.86, 0.3), (-0.86, 0.02), (0, -0.45), (0.86, 0.02), (0.86, 0.3), (0, 0.18))),
        ("paint", polygon((-0.42, 1), (-0.42, 0.84), (0, 0.6), (0.42, 0.84), (0.42, 1))),
        ("paint", polygon((-0.2, 0.9), (-0.2, -0.72), (0, -1), (0.2, -0.72), (0.2, 0.9))),
        ("glass", polygon((-0.12, -0.7), (0, -0.9), (0.12, -0.7))),
    ),
    "helicopter": (
        ("paint", box(0.13, 0.5, 0, 0.5)),
        ("paint", box(0.34, 0.09, 0, 0.9)),
        ("paint", ellipse(0.44, 0.6, 0, -0.38)),
        ("glass", ellipse(0.24, 0.16, 0, -0.76)),
        ("sleeper", polygon((-0.55, -0.9), (-0.49, -0.95), (0.55, 0.16), (0.49, 0.21))),
        ("sleeper", polygon((0.55, -0.9), (0.49, -0.95), (-0.55, 0.16), (-0.49, 0.21))),
    ),
    "boat": (
        ("paint", polygon((0, -1), (0.36, -0.4), (0.4, 0.85), (0.28, 1), (-0.28, 1), (-0.4, 0.85), (-0.36, -0.4))),
        ("shade", box(0.24, 0.3, 0, 0.5)),
        ("marking", box(0.16, 0.16, 0, 0.5)),
        ("shade", box(0.05, 0.3, 0, -0.3)),
    ),
    "barge": (
        ("shade", polygon((-0.3, -0.9), (-0.18, -1), (0.18, -1), (0.3, -0.9), (0.3, 1), (-0.3, 1))),
        ("paint", box(0.23, 0.24, 0, -0.6)),
        ("paint", box(0.23, 0.24, 0, -0.02)),
        ("paint", box(0.23, 0.16, 0, 0.46)),
        ("marking", box(0.2, 0.1, 0, 0.82)),
    ),
    "car": (
        ("paint", polygon((-0.4, 1), (-0.46, 0), (-0.38, -1), (0.38, -1), (0.46, 0), (0.4, 1))),
        ("glass", box(0.32, 0.13, 0, -0.38)),
        ("glass", box(0.3, 0.1, 0, 0.64)),
    ),
    "bus": (
        ("paint", box(0.3, 1)),
        ("glass", box(0.25, 0.07, 0, -0.9)),
        ("shade", box(0.16, 0.12, 0, -0.4)),
        ("shade", box(0.16, 0.12, 0, 0.1)),
        ("shade", box(0.16, 0.12, 0, 0.6)),
    ),
    "tank": (
        ("shade", ellipse(1, 1)),
        ("paint", ellipse(0.82, 0.82)),
        ("light", ellipse(0.3, 0.3, -0.22, -0.22)),
    ),
    "field": (("paint", box(0.9, 0.9)), *(("shade", box(0.06, 0.86, x, 0)) for x in (-0.6, -0.2, 0.2, 0.6))),
    "house": (
        ("paint", box(0.72, 0.95)),
        ("shade", box(0.36, 0.95, 0.36, 0)),
        ("light", box(0.05, 0.95)),
        ("roof", box(0.13, 0.13, -0.36, 0.5)),
    ),
    "court": (
        ("paint", box(0.68, 1)),
        ("marking", box(0.54, 0.84)),
        ("paint", box(0.45, 0.75)),
        ("marking", box(0.6, 0.05)),
        ("marking", box(0.045, 0.42)),
    ),
    "tent": (
        ("paint", box(0.85, 0.85)),
        ("shade", polygon((0, 0), (0.85, -0.85), (0.85, 0.85))),
        ("shade", polygon((0, 0), (-0.85, -0.85), (-0.85, 0.85))),
    ),
    "panel": (
        ("rim", box(0.64, 1)),
        *(("paint", box(0.25, 0.27, x, y)) for x in (-0.3, 0.3) for y in (-0.64, 0, 0.64)),
    ),
    "truck": (
        ("truck", box(0.46, 0.62, 0, 0.38)),
        ("truck", box(0.4, 0.3, 0, -0.7)),
        ("glass", box(0.4, 0.1, 0, -0.4)),
    ),
    "shed": (("roof", box(0.9, 0.9)), ("roof_shade", box(0.45, 0.9, 0.45, 0))),
    "tree": (("crown", ellipse(1, 1)), ("crown_light", ellipse(0.5, 0.5, -0.2, -0.2))),
    "pool": (("rim", box(0.78, 1)), ("pool", box(0.54, 0.76))),
}
# Scale, height and number of solid parts of each kind of object.
_SIZES = {
    "plane": (0.115, 0.6, 3),
    "helicopter": (0.105, 0.6, 3),
    "boat": (0.115, 0.5, 1),
    "barge": (0.115, 0.4, 1),
    "car": (0.09, 0.5, 1),
    "bus": (0.135, 0.7, 1),
    "tank": (0.1, 1.0, 1),
    "field": (0.13, 0.0, 1),
    "house": (0.095, 0.8, 1),
    "court": (0.125, 0.0, 1),
    "tent": (0.085, 0.7, 1),
    "panel": (0.115, 0.4, 1),
    "truck": (0.06, 0.7, 2),
    "shed": (0.052, 0.8, 1),
    "tree": (0.055, 0.9, 1),
    "pool": (0.058, 0.0, 1),
}
SHAPES = {kind: Shape(parts, *_SIZES[kind]) for kind, parts in _PARTS.items()}
