"""Lines, disks and their neighborhoods on small images, by sampling each pixel."""

from __future__ import annotations

import functools
import math

import numpy as np

Point = tuple[int, int]
"""A pixel: row and column."""

_SAMPLES = 4  # a pixel's coverage is the mean over so many points in each direction


def moved(point: Point, angle: float, distance: float) -> Point:
    """The pixel at a distance in a direction; like the script, it rounds up."""
    return (
        math.ceil(round(point[0] + distance * math.sin(angle), 9)),
        math.ceil(round(point[1] + distance * math.cos(angle), 9)),
    )


def stroke(side: int, start: Point, angle: float, length: float, radius: float) -> np.ndarray:
    """How much of each pixel lies within `radius` of a line: [side,side], from 0 to 1."""
    out = np.zeros((side, side))
    end = start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)
    reach = math.ceil(radius) + 1
    top, left = (max(0, math.floor(min(a, b)) - reach) for a, b in zip(start, end, strict=True))
    bottom, right = (
        min(side, math.ceil(max(a, b)) + reach + 1) for a, b in zip(start, end, strict=True)
    )
    if top >= bottom or left >= right:
        return out
    shifts = (np.arange(_SAMPLES) + 0.5) / _SAMPLES - 0.5
    y = (np.arange(top, bottom)[:, None] + shifts).ravel()[:, None] - start[0]
    x = (np.arange(left, right)[:, None] + shifts).ravel()[None] - start[1]
    along = np.clip(y * math.sin(angle) + x * math.cos(angle), 0, length)
    distance = np.hypot(y - along * math.sin(angle), x - along * math.cos(angle))
    covered = (distance <= radius).reshape(bottom - top, _SAMPLES, right - left, _SAMPLES)
    out[top:bottom, left:right] = covered.mean(axis=(1, 3))
    return out


def dilated(mask: np.ndarray, offsets: list[Point]) -> np.ndarray:
    """At each pixel the largest value of the mask at the pixel plus any offset; outside is 1."""
    reach = max(max(abs(y), abs(x)) for y, x in offsets) if offsets else 0
    wide = np.pad(mask, reach, constant_values=1.0)
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y, x in offsets:
        np.maximum(
            out, wide[reach + y : reach + y + height, reach + x : reach + x + width], out=out
        )
    return out


@functools.cache
def disk_offsets(radius: int) -> list[Point]:
    """The pixels of a disk around 0."""
    around = range(-radius, radius + 1)
    return [(y, x) for y in around for x in around if y * y + x * x <= radius * radius]
