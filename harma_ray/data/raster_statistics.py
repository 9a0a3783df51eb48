"""Statistics of many rasters together, on which the rule of a split's pictures may rest."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace

import numpy as np

from harma_ray.data.rendering import Limits, Raster, Rendering

_FLOAT_KEY_BITS = 20  # of a float32's 32: sign, exponent and 11 bits of the fraction, so a key spans 1/2048 at most


@dataclass
class Histogram:
    """How often numbers occur in one band, in memory that does not grow with their count.

    Integers of up to 16 bits are counted exactly; others in bins of 1/2048 of themselves.
    """

    keys: np.ndarray
    """int64[N], ascending: the number itself, or its bin."""
    counts: np.ndarray
    """int64[N]."""
    exact: bool
    """Whether a key is the number itself."""
    low: float
    """Smallest number, exactly; infinite if there is none."""
    high: float
    """Largest number, exactly."""

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """Counts the numbers of an array."""
        exact = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
        if not values.size:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), exact, math.inf, -math.inf)
        keys, counts = np.unique(values if exact else _to_keys(values), return_counts=True)
        return cls(keys.astype(np.int64), counts.astype(np.int64), exact, float(values.min()), float(values.max()))

    def __add__(self, other: Histogram) -> Histogram:
        if self.exact != other.exact:  # means of whole numbers beside whole numbers
            return self._binned() + other._binned()
        keys, places = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, other.counts]))
        return Histogram(keys, counts, self.exact, min(self.low, other.low), max(self.high, other.high))

    def _binned(self) -> Histogram:
        if not self.exact:
            return self
        keys, places = np.unique(_to_keys(self.keys), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, self.counts)
        return Histogram(keys.astype(np.int64), counts, False, self.low, self.high)

    def percentile(self, percent: float) -> float:
        """Returns a percentile, between two neighbours in proportion, as numpy does; 0 if nothing was counted."""
        if not len(self.counts):
            return 0.0
        ends = np.cumsum(self.counts)
        position = percent / 100 * (ends[-1] - 1)
        below, above = (
            np.searchsorted(ends, place, side="right") for place in (math.floor(position), math.ceil(position))
        )
        first, second = self._value(int(below)), self._value(int(above))
        return first + (second - first) * (position - math.floor(position))

    def _value(self, index: int) -> float:
        value = float(self.keys[index]) if self.exact else _from_key(int(self.keys[index]))
        return min(max(value, self.low), self.high)


@dataclass
class SplitStatistics:
    """Histograms of the rasters of a split, by what a picture is made from and by band."""

    bands: dict[str, list[Histogram]] = field(default_factory=dict)
    """For every `Raster.key` one of each band."""

    def add(self, raster: Raster) -> None:
        """Counts a raster's numbers."""
        self._join(raster.key, [Histogram.of(part) for part in raster.samples()])

    def merge(self, other: SplitStatistics) -> None:
        """Counts what another has counted."""
        for key, histograms in other.bands.items():
            self._join(key, histograms)

    def _join(self, key: str, histograms: list[Histogram]) -> None:
        there = self.bands.get(key)
        self.bands[key] = histograms if there is None else [a + b for a, b in zip(there, histograms, strict=True)]

    def to_bytes(self) -> bytes:
        """Returns the histograms as a file of numpy's."""
        arrays = {}
        for key, histograms in self.bands.items():
            for band, one in enumerate(histograms):
                arrays[f"{key}/{band}/counts"] = np.stack([one.keys, one.counts])
                arrays[f"{key}/{band}/ends"] = np.array([one.exact, one.low, one.high], np.float64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> SplitStatistics:
        """Reads what `to_bytes` returned."""
        made = SplitStatistics()
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for name in arrays.files:
                key, band, what = name.split("/")
                if what == "counts":
                    (keys, counts), (exact, low, high) = arrays[name], arrays[f"{key}/{band}/ends"]
                    made.bands.setdefault(key, []).append(Histogram(keys, counts, bool(exact), low, high))
        return made

    def resolve(self, rule: Rendering) -> Rendering:
        """Returns a rule with the limits that these statistics give it."""
        return replace(rule, limits={key: _limits_of(rule, ones) for key, ones in sorted(self.bands.items())})


def _limits_of(rule: Rendering, histograms: list[Histogram]) -> Limits:
    if rule.stretch == "bits":
        high = max(0.0, *(one.high for one in histograms if len(one.counts))) if histograms else 0.0
        return ((0.0, 2.0 ** max(1, int(high).bit_length()) - 1),) * len(histograms)
    if rule.stretch == "minmax":
        return tuple((one.low, one.high) if len(one.counts) else (0.0, 0.0) for one in histograms)
    low, high = rule.parameters
    return tuple((one.percentile(low), one.percentile(high)) for one in histograms)


def _to_keys(values: np.ndarray) -> np.ndarray:
    """Returns for every number a bin; bins ascend with the numbers."""
    raw = values.astype(np.float32).view(np.uint32)
    ordered = np.where(raw >> 31, ~raw, raw | np.uint32(1 << 31))
    return ordered >> np.uint32(32 - _FLOAT_KEY_BITS)


def _from_key(key: int) -> float:
    """Returns the middle of a bin."""
    shift = 32 - _FLOAT_KEY_BITS
    ordered = np.uint32((key << shift) | (1 << (shift - 1)))
    raw = ordered & np.uint32(0x7FFFFFFF) if ordered >> 31 else ~ordered
    return float(np.uint32(raw).view(np.float32))
