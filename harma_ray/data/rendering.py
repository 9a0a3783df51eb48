"""The rule by which numbers of more than 8 bits become a picture, and the picture that it makes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from pydantic import TypeAdapter

from harma_ray.data.images import BadImage
from harma_ray.errors import UserError

Method = Literal["none", "bits", "minmax", "percentile"]
METHODS: tuple[Method, ...] = get_args(Method)
Limits = tuple[tuple[float, float], ...]
"""For every band of a picture (one if it is grey, else three) what becomes 0 and what becomes 255."""

OPTIONS = "--stretch none|bits|minmax|percentile, and --bands R,G,B where there are more than three"
"""The way out that messages name."""

_DEFAULTS: dict[Method, tuple[float, ...]] = {"none": (), "bits": (), "minmax": (), "percentile": (2.0, 98.0)}


@dataclass(frozen=True)
class Rendering:
    """How rasters become 8-bit pictures; of 8 bits it only chooses the bands, in TIFF and JPEG 2000 of several."""

    bands: tuple[int, ...] | None = None
    """Bands, counted from 1, that are red, green and blue; None = those that the file names so, else its only one or
    its three."""
    stretch: Method | None = None
    """How numbers are mapped to 0..255; None = rasters of more than 8 bits are refused.

    "none": they are 0..255 already, others are refused; "bits": 0 to 2^n - 1; "minmax": from the smallest to the
    largest, or between two given numbers; "percentile": between two percentiles. The last two map each band by itself.
    """
    parameters: tuple[float, ...] = ()
    """bits: n (none = what the split's largest number needs); minmax: low and high (none = as found); percentile: both
    percentages, 2 and 98 unless given."""
    nodata: tuple[float, ...] | None = None
    """Numbers that stand for no data beside those that a file's own tags name; None = files that seem to have such a
    number without a tag are refused; empty = they are not."""
    statistics: Literal["image", "split"] = "image"
    """What smallest, largest and percentiles are taken of: of every image by itself, or of all images of a split, which
    is the data set's train split if it was rendered by the same rule before."""
    limits: Mapping[str, Limits] | None = None
    """Such a split's statistics, by what a picture is made from (`Raster.key`); None = not known."""

    @classmethod
    def parse(
        cls,
        *,
        bands: str | None = None,
        stretch: str | None = None,
        nodata: str | None = None,
        statistics: str | None = None,
    ) -> Self | None:
        """Makes a rule of what a user writes, such as ``3,2,1``, ``percentile:1,99``, ``-9999,nan`` and ``split``.

        Returns:
            The rule; None if nothing is given.

        Raises:
            UserError: If something is not as it should be.
        """
        if bands is stretch is nodata is statistics is None:
            return None
        method, parameters = _parse_stretch(stretch) if stretch is not None else (None, ())
        if statistics not in (None, "image", "split"):
            raise UserError(f"`--statistics` must be image or split, got {statistics}")
        if statistics is not None and (method not in ("minmax", "percentile") or (method == "minmax" and parameters)):
            raise UserError("`--statistics` says what minmax or percentile is taken of; give --stretch with it")
        return cls(
            bands=None if bands is None else _parse_bands(bands),
            stretch=method,
            parameters=parameters,
            nodata=None if nodata is None else _parse_nodata(nodata),
            statistics="split" if statistics == "split" else "image",
        )

    @property
    def needs_split(self) -> bool:
        """Whether the images of a split must be read once before any can be rendered."""
        return self.limits is None and self.rests_on_data and (self.stretch == "bits" or self.statistics == "split")

    @property
    def rests_on_data(self) -> bool:
        """Whether the numbers that are found, of an image or of a split, decide what becomes 0 and 255."""
        return self.stretch == "percentile" or (self.stretch in ("bits", "minmax") and not self.parameters)

    @property
    def options(self) -> str:
        """The options of the command line that say the same; limits have none."""
        parts = []
        if self.bands is not None:
            parts.append(f"--bands {','.join(map(str, self.bands))}")
        if self.stretch is not None:
            numbers = ",".join(f"{number:g}" for number in self.parameters)
            parts.append(f"--stretch {self.stretch}{':' if numbers else ''}{numbers}")
        if self.nodata is not None:
            parts.append(f"--nodata={','.join(map(repr, self.nodata)) or 'none'}")
        if self.statistics == "split":
            parts.append("--statistics split")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the rule as JSON's types."""
        nodata = None if self.nodata is None else [str(number) for number in self.nodata]
        return json.loads(json.dumps({**asdict(self), "nodata": nodata}))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Makes the rule of what `to_dict` returned."""
        return TypeAdapter(cls).validate_python(raw)


@dataclass(frozen=True)
class Raster:
    """The bands of an image file that a picture is made from."""

    values: np.ndarray
    """[C, H, W] with one band (grey) or three; the file's own numbers, or float32 means of them."""
    valid: np.ndarray
    """bool[C, H, W]: what is no gap in the data."""
    counted: np.ndarray | None
    """bool[H, W]: pixels that take part in statistics, for the file's alpha does not hide them; None = all."""
    held: str
    """What a pixel of the file is, such as ``4 x uint16``."""
    dtype: str
    """Type of the file's numbers."""
    bits: int
    """Bits of the file's numbers."""
    is_wide: bool
    """Whether the file's numbers need a rule."""

    @property
    def key(self) -> str:
        """What statistics are kept apart by: number of bands and type, such as ``3 x uint16``."""
        return f"{len(self.values)} x {self.dtype}"

    @property
    def nodata_fraction(self) -> float:
        """Part of the pixels that hold data in no band."""
        return float(1 - self.valid.any(0).mean())

    def samples(self) -> list[np.ndarray]:
        """Returns for every band the numbers that statistics are taken of."""
        masks = self.valid if self.counted is None else self.valid & self.counted
        return [values[mask] for values, mask in zip(self.values, masks, strict=True)]


def render(raster: Raster, rule: Rendering | None) -> np.ndarray:
    """Makes a picture of a raster: uint8[H, W, 3], gaps in the data black.

    A number v becomes 255 (v - low) / (high - low), rounded, cut off at 0 and 255.

    Raises:
        BadImage: If the rule does not fit the numbers.
    """
    limits = _find_limits(raster, rule) if raster.is_wide else ((0.0, float(2**raster.bits - 1)),) * len(raster.values)
    picture = np.empty((*raster.values.shape[1:], 3), np.uint8)
    for band, (low, high) in enumerate(limits):
        scale = 255 / (high - low) if high > low else 0.0
        # float32 has too few digits for some numbers of 32 and 64 bits, of which only the difference to `low` matters.
        exact = np.float64 if raster.values.dtype.itemsize > 2 else np.float32
        levels = np.where(raster.valid[band], raster.values[band], low).astype(exact)
        levels = np.rint(np.clip((levels - exact(low)) * exact(scale), 0, 255))
        picture[..., band] = np.where(raster.valid[band], levels, 0)
    if len(limits) == 1:
        picture[..., 1:] = picture[..., :1]
    return picture


def _find_limits(raster: Raster, rule: Rendering | None) -> Limits:
    """Returns what becomes 0 and 255 of every band."""
    count = len(raster.values)
    if rule is None or rule.stretch is None:
        raise BadImage(f"{raster.held} is more than 8 bits: say how to scale it ({OPTIONS})")
    if rule.stretch == "none":
        outside = [part for part in raster.samples() if part.size and (part.min() < 0 or part.max() > 255)]
        if outside:
            raise BadImage(
                f"holds numbers from {outside[0].min():g} to {outside[0].max():g}, which do not fit in 0..255: "
                "choose another --stretch than none"
            )
        return ((0.0, 255.0),) * count
    if rule.stretch == "bits":
        _check_bits(raster)
    if rule.limits is not None:
        if raster.key not in rule.limits:
            raise BadImage(
                f"{raster.key} has no statistics in the split they are taken from, which has {', '.join(rule.limits)}"
            )
        return rule.limits[raster.key]
    if rule.stretch == "bits":
        if not rule.parameters:
            raise BadImage("how many bits are used is not known; give their number, such as --stretch bits:11")
        return ((0.0, 2.0 ** rule.parameters[0] - 1),) * count
    if rule.stretch == "minmax" and rule.parameters:
        return ((rule.parameters[0], rule.parameters[1]),) * count
    percents = rule.parameters if rule.stretch == "percentile" else (0.0, 100.0)
    return tuple(
        tuple(float(value) for value in np.percentile(part, percents)) if part.size else (0.0, 0.0)
        for part in raster.samples()
    )  # type: ignore[return-value]


def _check_bits(raster: Raster) -> None:
    if raster.dtype.startswith("float"):
        raise BadImage(f"{raster.held} has no bits to scale by: choose --stretch minmax or percentile")
    if any(part.size and part.min() < 0 for part in raster.samples()):
        raise BadImage(f"{raster.held} holds negative numbers: choose --stretch minmax or percentile")


def _parse_bands(text: str) -> tuple[int, ...]:
    try:
        bands = tuple(int(part) for part in text.split(","))
    except ValueError:
        bands = ()
    if len(bands) not in (1, 3) or min(bands) < 1:
        raise UserError(f"`--bands` must be three numbers from 1 (red, green, blue), or one, such as 3,2,1; got {text}")
    return bands


def _parse_stretch(text: str) -> tuple[Method, tuple[float, ...]]:
    name, _, rest = text.partition(":")
    try:
        numbers = tuple(float(part) for part in rest.split(",")) if rest else ()
    except ValueError as error:
        raise UserError(f"`--stretch` must end in numbers, such as percentile:2,98, got {text}") from error
    if name not in METHODS:
        raise UserError(f"`--stretch` must be one of {', '.join(METHODS)}, got {text}")
    numbers = numbers or _DEFAULTS[name]
    good = {
        "none": not numbers,
        "bits": not numbers or (len(numbers) == 1 and numbers[0] in range(1, 65)),
        "minmax": not numbers or (len(numbers) == 2 and numbers[0] < numbers[1]),
        "percentile": len(numbers) == 2 and 0 <= numbers[0] < numbers[1] <= 100,
    }
    if not good[name]:
        forms = "none, bits:11, minmax, minmax:0,3000, percentile, percentile:2,98"
        raise UserError(f"`--stretch` must be of a form such as {forms}, got {text}")
    return name, numbers


def _parse_nodata(text: str) -> tuple[float, ...]:
    if text == "none":
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"`--nodata` must be numbers with commas between them, or none, got {text}") from error
