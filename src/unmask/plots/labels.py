"""Labels beside points: placed one after the other where they cover nothing, with a thin line where they stand off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Points = Sequence[tuple[float, float]]


class Label(NamedTuple):
    """Text beside the point (x, y) of the axes' data; one that is not needed is left out where there is no room."""

    x: float
    y: float
    text: str
    colour: str
    needed: bool = True
    weight: str = "normal"


class _Box(NamedTuple):
    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: _Box) -> float:
        """Area that both cover, pixels."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return max(across, 0.0) * max(min(self.high, other.high) - max(self.low, other.low), 0.0)

    def holds(self, point: tuple[float, float]) -> bool:
        """Whether a point lies in the box."""
        return self.left <= point[0] <= self.right and self.low <= point[1] <= self.high


_NEAR, _FAR = (7, 11, 16), (24, 34, 46, 60, 76, 94, 114, 136)
"""Distances of a label from its point, pixels at 100 dpi; only needed labels go far."""
_ANGLES = [0, 90, 180, 270, 45, 135, 225, 315, 22, 67, 112, 157, 202, 247, 292, 337]
_MARKER = 4.5
"""Half the side of a point's mark, pixels."""


def place_labels(
    axes: Any,
    labels: Sequence[Label],
    marked: Sequence[Points],
    size: float,
    *,
    plain: Sequence[Points] = (),
    large: Points = (),
) -> None:
    """Write the labels, whose axes must have their final place and limits.

    marked: lines whose points have a mark, which no label shall cover. plain: lines without. large: points with a large
    mark. size: of the letters, points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    to_pixels, pixel = axes.transData.transform, 72 / axes.figure.dpi
    marks = [_around(to_pixels(point), _MARKER) for line in marked for point in line]
    marks += [_around(to_pixels(point), 2 * _MARKER) for point in large]
    path = [at for line in (*marked, *plain) for at in _along([to_pixels(point) for point in line])]
    frame = _Box(*axes.get_window_extent(renderer).extents)
    placed: list[_Box] = []
    for label in sorted(labels, key=lambda label: not label.needed):
        text = axes.annotate(label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", ha="left",
                             va="bottom", fontsize=size, color=label.colour, fontweight=label.weight)  # fmt: skip
        extent = text.get_window_extent(renderer)
        at = to_pixels((label.x, label.y))
        cost, distance, box = min(
            (_cost(at, box, distance, frame, placed, marks, path), distance, box)
            for distance, box in _places(at, extent.width + 2, extent.height + 1, label.needed)
        )
        if cost >= _COVERS and not label.needed:
            text.remove()
            continue
        text.set_position(((box.left + 1 - at[0]) * pixel, (box.low + 0.5 - at[1]) * pixel))
        if distance in _FAR:
            (x, y), (to_x, to_y) = (axes.transData.inverted().transform(end) for end in (at, _nearest(at, box)))
            axes.plot([x, to_x], [y, to_y], color=label.colour, linewidth=0.6, zorder=1)
        placed.append(box)


def loneliest(number: int, lines: Sequence[Points]) -> int:
    """Index of the point of line `number` that stands farthest from the points of the others: where its name fits."""
    spans = [(max(values) - min(values)) or 1.0 for values in zip(*(p for line in lines for p in line), strict=True)]
    others = [p for i, line in enumerate(lines) if i != number for p in line]

    def room(point: tuple[float, float]) -> float:
        return min((sum(abs(a - b) / s for a, b, s in zip(point, p, spans, strict=True)) for p in others), default=0.0)

    return max(range(len(lines[number])), key=lambda i: room(lines[number][i]))


_COVERS = 1e4
"""Cost of a place in which something could not be read."""


def _cost(
    at: tuple[float, float],
    box: _Box,
    distance: float,
    frame: _Box,
    placed: Sequence[_Box],
    marks: Sequence[_Box],
    path: Points,
) -> float:
    """How bad a place is: worst what hides text, then what hides a mark, then lines behind the text, then distance."""
    outside = (box.right - box.left) * (box.high - box.low) - box.overlap(frame)
    hidden = sum(box.overlap(other) for other in placed) + outside
    marked = sum(box.overlap(mark) for mark in marks)
    crossed = sum(box.holds(point) for point in path)
    leader = list(_along([at, _nearest(at, box)])) if distance in _FAR else []
    through = any(other.holds(point) for other in placed for point in leader)
    cost = 20 * crossed + distance + 500 * through
    if hidden > 0.5:
        cost += 10 * _COVERS + 100 * hidden
    if marked > 0.5:
        cost += _COVERS + 50 * marked
    return cost


def _places(at: tuple[float, float], width: float, height: float, needed: bool) -> Iterator[tuple[float, _Box]]:
    """Distance, and the box of a text, around a point."""
    for distance in (*_NEAR, *_FAR) if needed else _NEAR:
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = at[0] + distance * across + (width / 2) * (round(across, 6) - 1)
            low = at[1] + distance * up + (height / 2) * (round(up, 6) - 1)
            yield distance, _Box(left, low, left + width, low + height)


def _around(at: tuple[float, float], side: float) -> _Box:
    return _Box(at[0] - side, at[1] - side, at[0] + side, at[1] + side)


def _along(line: Points) -> Iterator[tuple[float, float]]:
    """Points every few pixels of a line."""
    for (x, y), (to_x, to_y) in pairwise(line):
        number = max(1, int(math.hypot(to_x - x, to_y - y) / 4))
        for i in range(number):
            yield x + (to_x - x) * i / number, y + (to_y - y) * i / number


def _nearest(at: tuple[float, float], box: _Box) -> tuple[float, float]:
    """The place of a box that is nearest to a point."""
    return min(max(at[0], box.left), box.right), min(max(at[1], box.low), box.high)
