"""The error of a limit against eps, on two logarithmic axes, as the coordinates of an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 46  # room for the labels of the axes


@dataclass(frozen=True)
class Plot:
    """points: (x, y) in pixels. xs, ys: (pixel, power of 10) of the decades. line: a slope of the claimed order."""

    points: tuple[tuple[float, float], ...]
    xs: tuple[tuple[float, int], ...]
    ys: tuple[tuple[float, int], ...]
    line: tuple[tuple[float, float], tuple[float, float]]
    width: int = WIDTH
    height: int = HEIGHT
    frame: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)

    @property
    def path(self) -> str:
        """The points as a polyline."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


def plot(eps: Sequence[float], errors: Sequence[float], order: int) -> Plot:
    """Place the points, the decades, and the line through the smallest eps that falls as eps ** order."""
    xs, ys = [math.log10(x) for x in eps], [math.log10(y) for y in errors]
    x0, x1 = math.floor(min(xs) + 1e-9), math.ceil(max(xs) - 1e-9)
    last = min(range(len(xs)), key=xs.__getitem__)
    end = ys[last] + order * (x1 - xs[last])
    y0, y1 = math.floor(min(ys)), math.ceil(max(*ys, end))
    place_x = lambda x: round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)  # noqa: E731
    place_y = lambda y: round(TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)  # noqa: E731
    return Plot(
        tuple((place_x(x), place_y(y)) for x, y in zip(xs, ys, strict=True)),
        tuple((place_x(n), n) for n in range(x0, x1 + 1)),
        tuple((place_y(n), n) for n in range(y0, y1 + 1, 2 if y1 - y0 > 6 else 1)),
        ((place_x(xs[last]), place_y(ys[last])), (place_x(x1), place_y(end))),
    )
