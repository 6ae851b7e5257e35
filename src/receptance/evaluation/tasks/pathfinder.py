"""Pathfinder of Long Range Arena: two dashed paths, two marks; are both on the same path?

Written anew from drewlinsley/pathfinder (snakes2.py) and the parameters that
google-research/long-range-arena names (lra_benchmarks/data/pathfinder.py). Lines and disks are
drawn here by sampling each pixel, so single pixels differ from those that Pillow and OpenCV draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from receptance.data.labeled import Problem, Split
from receptance.evaluation.tasks.drawing import Point, dilated, disk_offsets, moved, stroke
from receptance.evaluation.tasks.generated import GeneratedExamples

PATHFINDER_SIZES: dict[Split, int] = {"train": 160_000, "validation": 20_000, "test": 20_000}
"""The sizes of the release: 200,000 images, divided 8 : 1 : 1."""

# Trials as in the script: of a dash of a path, and of a whole distractor.
_DASH_TRIALS, _PATH_TRIALS = 3, 5
# No dash may cover another one: the sum of masks stays below this.
_CROSSING = 1.8
# Less room than this share of the image, and no further distractor is begun.
_LEAST_ROOM = 0.01


@dataclass(frozen=True, kw_only=True)
class PathfinderDifficulty:
    """The parameters of the script, by its names for them."""

    window: int = 32
    """The side of the image, in pixels."""
    padding: int = 1
    seed_distance: int = 7
    """The distance between the beginnings of both paths."""
    marker_radius: float = 1.5
    contour_length: int = 14
    """The dashes of a path: 6, 9 and 14 are easy, intermediate and hard."""
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    paddle_margins: tuple[int, ...] = (1,)
    """The free pixels around a dash; each image has one of these."""
    continuity: float = 1.0
    """How strongly a path is bent: larger is straighter."""
    distractors: int = 20
    """The dashes of all distractors; each has a third of a path's."""
    target_contrast: float = 1.5
    distractor_contrast: float = 2.0

    def __post_init__(self) -> None:
        for name in ("window", "contour_length", "paddle_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of pathfinder is {getattr(self, name)}; at least 1")
        if self.window < 4 * self.seed_distance + 2:
            raise ValueError(
                f"window of pathfinder is {self.window}; with a seed_distance of "
                f"{self.seed_distance} it must be at least {4 * self.seed_distance + 2}"
            )

    @property
    def distractor_length(self) -> int:
        """The dashes of a distractor."""
        return max(1, self.contour_length // 3)


PATHFINDER: dict[int, PathfinderDifficulty] = {
    32: PathfinderDifficulty(),
    64: PathfinderDifficulty(
        window=64,
        seed_distance=12,
        marker_radius=2.5,
        paddle_length=5,
        paddle_thickness=1.0,
        continuity=1.8,
        distractors=22,
        target_contrast=0.8,
        distractor_contrast=0.8,
    ),
    128: PathfinderDifficulty(
        window=128,
        seed_distance=20,
        marker_radius=3.0,
        paddle_length=5,
        paddle_thickness=1.5,
        paddle_margins=(2, 3),
        continuity=1.8,
        distractors=35,
        target_contrast=0.9,
        distractor_contrast=0.9,
    ),
}
"""The difficulties of the release by the side of the image; 128 is that of Path-X."""


class Pathfinder(GeneratedExamples):
    """Pathfinder, generated: gray images row by row, and whether both marks are on one path."""

    def __init__(
        self,
        difficulty: PathfinderDifficulty | None = None,
        sizes: Mapping[Split, int] = PATHFINDER_SIZES,
        seed: int = 0,
    ) -> None:
        super().__init__(sizes, seed)
        self.difficulty = difficulty or PathfinderDifficulty()

    @property
    def problem(self) -> Problem:
        """One of two classes for a row of gray levels."""
        return Problem(kind="classify", outputs=2, channels=1)

    @property
    def about(self) -> Mapping[str, Any]:
        """The parameters, and the number of examples."""
        numbers = vars(self.difficulty)
        return {"task": "pathfinder", **numbers, **self.sized, "drawn from": self.seed}

    @property
    def chance(self) -> float:
        """Half of the images have each class."""
        return 0.5

    def make(self, rng: random.Random) -> tuple[np.ndarray, int]:
        """Draw an image, [H*W,1] of bytes, and its class."""
        image, label = picture(self.difficulty, rng)
        return image.reshape(-1, 1), label


def picture(difficulty: PathfinderDifficulty, rng: random.Random) -> tuple[np.ndarray, int]:
    """An image [H,W] uint8 and its class: 1 if both marks are at the ends of one path."""
    label = rng.randrange(2)
    drawing = None
    while drawing is None or drawing.failed:
        drawing = _Drawing(difficulty, rng)
        tips = drawing.targets()
    drawing.add_distractors()
    first = rng.randrange(2)
    last = first if label else 1 - first
    for tip in (tips[first][0], tips[last][1]):
        drawing.image = np.maximum(drawing.image, drawing.disk(tip))
    levels = drawing.image / drawing.image.max()
    return np.rint(255 * levels).astype(np.uint8), label


@dataclass
class _Path:
    """A path that grows at its end."""

    mask: np.ndarray
    """The last dash with its margin, which only the next one but one must avoid."""
    pivot: Point
    angle: float
    first: Point
    last: Point


class _Drawing:
    """An image, and the mask of what is taken."""

    def __init__(self, difficulty: PathfinderDifficulty, rng: random.Random) -> None:
        self.d, self.rng = difficulty, rng
        self.margin = rng.choice(difficulty.paddle_margins)
        side, edge = difficulty.window, difficulty.padding
        self.image = np.zeros((side, side))
        self.mask = np.ones((side, side))
        self.mask[edge : side - edge, edge : side - edge] = 0
        self.failed = False

    # ---- paths ----------------------------------------------------------------------------------

    def targets(self) -> list[tuple[Point, Point]]:
        """Draw both paths; the first and the last point of each. Sets `failed` if they do not fit.

        They grow in turns, so that none is favored.
        """
        near = 2 * self.d.seed_distance
        first = self._seed(near)
        second = None if first is None else self._beside(first.first)
        if first is None or second is None:
            self.failed = True
            return []
        paths = [first, second]
        for _ in range(self.d.contour_length - 1):
            for path in paths:
                if not self._extend(path, self.d.target_contrast):
                    self.failed = True
                    return []
        for path in paths:
            self.mask = np.maximum(self.mask, path.mask)
        return [(path.first, path.last) for path in paths]

    def add_distractors(self) -> None:
        """Draw shorter paths wherever there is room; those that do not fit are left out."""
        for _ in range(self.d.distractors // self.d.distractor_length):
            for _ in range(_PATH_TRIALS):
                if (self.mask < 1).mean() < _LEAST_ROOM:
                    return
                before = self.image, self.mask
                if self._distractor():
                    break
                self.image, self.mask = before

    def _distractor(self) -> bool:
        path = self._seed(1, self.d.distractor_contrast)
        if path is None:
            return False
        for _ in range(self.d.distractor_length - 1):
            if not self._extend(path, self.d.distractor_contrast):
                return False
        self.mask = np.maximum(self.mask, path.mask)
        return True

    def _seed(self, edge: int, contrast: float | None = None) -> _Path | None:
        """Begin a path at least `edge` pixels from the border, where its first dash has room."""
        for _ in range(_DASH_TRIALS):
            angle = math.radians(self.rng.randrange(-180, 180))
            taken = np.ones_like(self.mask)
            inner = slice(edge, self.d.window - edge)
            taken[inner, inner] = self.mask[inner, inner]
            rows, columns = np.nonzero(self._room(taken, angle))
            if not len(rows):
                return None
            at = self.rng.randrange(len(rows))
            tail = int(rows[at]), int(columns[at])
            if (path := self._begin(tail, angle, contrast)) is not None:
                return path
        return None

    def _beside(self, other: Point) -> _Path | None:
        """Begin the second path at a distance from the first."""
        for _ in range(_DASH_TRIALS):
            angle = math.radians(self.rng.randrange(-180, 180))
            around = math.radians(self.rng.randrange(360))
            tail = (
                round(other[0] + self.d.seed_distance * math.sin(around)),
                round(other[1] + self.d.seed_distance * math.cos(around)),
            )
            if (path := self._begin(tail, angle, None)) is not None:
                return path
        return None

    def _begin(self, tail: Point, angle: float, contrast: float | None) -> _Path | None:
        """Draw a first dash from its tail; None if it would leave the image."""
        d = self.d
        head = moved(tail, angle, d.paddle_length)
        pivot = moved(head, angle + math.pi, d.paddle_length + self.margin)
        if not all(0 <= x < d.window for point in (tail, head, pivot) for x in point):
            return None
        mask = self._draw(tail, angle, d.target_contrast if contrast is None else contrast)
        return _Path(mask, pivot, angle, tail, head)

    def _extend(self, path: _Path, contrast: float) -> bool:
        """Draw the next dash of a path; False if there is no place for it."""
        d = self.d
        pivot = moved(path.pivot, path.angle, d.paddle_length + 2 * self.margin)
        places, angles, weights = self._candidates(pivot, path.angle)
        if not weights or sum(weights) <= 0:
            return False
        for _ in range(_DASH_TRIALS):
            chosen = self.rng.choices(range(len(places)), weights)[0]
            head, angle = places[chosen], angles[chosen]
            line, mask = self._dash(head, angle + math.pi)
            if (self.mask + mask).max() < _CROSSING:
                self.image = np.maximum(self.image, contrast * line)
                self.mask = np.maximum(self.mask, path.mask)
                path.mask, path.pivot, path.angle, path.last = mask, pivot, angle, head
                return True
        return False

    def _candidates(
        self, pivot: Point, angle: float
    ) -> tuple[list[Point], list[float], list[float]]:
        """Where the next dash may end: places on a circle, their directions and weights.

        A weight falls with the turn as cos^2, and is 0 next to what is taken.
        """
        d = self.d
        reach = d.paddle_length + self.margin
        around = np.arange(0, 2 * math.pi, 1 / reach)
        rows, columns = pivot[0] + reach * np.sin(around), pivot[1] + reach * np.cos(around)
        inside = (rows >= 0) & (rows < d.window) & (columns >= 0) & (columns < d.window)
        pairs = {(int(y), int(x)) for y, x in zip(rows[inside], columns[inside], strict=True)} - {
            pivot
        }
        taken = dilated(self.mask, disk_offsets(self.margin))
        places = sorted(pairs)
        angles = [math.atan2(y - pivot[0], x - pivot[1]) for y, x in places]
        weights = []
        for place, direction in zip(places, angles, strict=True):
            turn = abs((direction - angle + math.pi) % (2 * math.pi) - math.pi)
            weight = math.cos(min(turn * d.continuity, math.pi / 2)) ** 2
            weights.append(weight * max(0.0, 1 - float(taken[place])))
        return places, angles, weights

    # ---- drawing --------------------------------------------------------------------------------

    def _draw(self, start: Point, angle: float, contrast: float) -> np.ndarray:
        """Draw a dash and return its mask."""
        line, mask = self._dash(start, angle)
        self.image = np.maximum(self.image, contrast * line)
        return mask

    def _dash(self, start: Point, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """A dash and its mask, which is wider by the margin: coverage from 0 to 1, [H,W] each."""
        d = self.d
        return tuple(  # type: ignore[return-value]
            stroke(d.window, start, angle, d.paddle_length, d.paddle_thickness / 2 + wider)
            for wider in (0, self.margin)
        )

    def _room(self, taken: np.ndarray, angle: float) -> np.ndarray:
        """The tails from which a dash of this direction meets nothing: [H,W] bool."""
        d = self.d
        reach = d.paddle_length + self.margin + 1
        center = (reach, reach)
        width = d.paddle_thickness / 2 + self.margin
        shape = stroke(2 * reach + 1, center, angle, d.paddle_length, width)
        offsets = [(int(y) - reach, int(x) - reach) for y, x in np.argwhere(shape > 0.5)]
        return dilated(taken, offsets) < 0.3

    def disk(self, center: Point) -> np.ndarray:
        """A mark: coverage of each pixel, [H,W]."""
        return stroke(self.d.window, center, 0.0, 0, self.d.marker_radius)
