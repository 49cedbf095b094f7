"""The map as an inline SVG: `unify.draw`'s layout, with a link on every model and every edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unify.draw import ARROW, FONT, INSET, Box, Layout, MapEdge, MapNode, Route, layout, wrap

UNIT = 100  # of the picture, an inch
HALF = 0.035  # of an arrow's tip, inches


@dataclass(frozen=True)
class Shape:
    """A rectangle with lines of text: (x, y, width, height) and (x, y, line)."""

    name: str
    x: float
    y: float
    width: float
    height: float
    lines: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Line:
    """An edge: the curve, its tip, and the mark of its order with the place where it stands."""

    parent: str
    child: str
    kind: str
    curve: str
    tip: str
    mark: str
    mark_box: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Graph:
    """What the page draws, in hundredths of an inch."""

    width: float
    height: float
    bands: tuple[Shape, ...]
    lines: tuple[Line, ...]
    nodes: tuple[Shape, ...]
    font: float = round(FONT / 72 * UNIT, 1)


def graph(nodes: list[MapNode], edges: list[MapEdge]) -> Graph:
    """Lay the map out and put it into the picture's units; the title's room at the top is cut away."""
    plan = layout(nodes, edges)
    top = min(box.y0 for box in plan.bands.values()) - 0.05
    bottom = max(box.y1 for box in plan.bands.values()) + 0.05
    side = min(box.x0 for box in plan.bands.values()) - 0.05
    move = _Move(side, top)
    return Graph(
        round((plan.width - 2 * side) * UNIT, 1),
        round((bottom - top) * UNIT, 1),
        tuple(_band(move, *item) for item in plan.bands.items()),
        tuple(_line(move, route) for route in plan.routes),
        _in_reading_order([_node(move, name, box, plan.labels) for name, box in plan.boxes.items()], plan),
    )


@dataclass(frozen=True)
class _Move:
    """Inches of the page as units of the picture."""

    left: float
    top: float

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        return round((x - self.left) * UNIT, 1), round((y - self.top) * UNIT, 1)

    def box(self, box: Box) -> tuple[float, float, float, float]:
        """(x, y, width, height)."""
        return *self(box.x0, box.y0), round((box.x1 - box.x0) * UNIT, 1), round((box.y1 - box.y0) * UNIT, 1)


def _node(move: _Move, name: str, box: Box, labels: Mapping[str, str]) -> Shape:
    return Shape(name, *move.box(box), _text(move(*box.centre), labels[name].split("\n"), FONT))


def _band(move: _Move, family: str, box: Box) -> Shape:
    lines = wrap(family, 11).split("\n")
    return Shape(family, *move.box(box), _text(move(box.x0 + INSET, box.centre[1]), lines, 11))


def _text(at: tuple[float, float], lines: list[str], size: float) -> tuple[tuple[float, float, str], ...]:
    """Lines around a middle: (x, y of the base line, text)."""
    pitch = 1.2 * size / 72 * UNIT
    first = at[1] - pitch * (len(lines) - 1) / 2 + 0.35 * size / 72 * UNIT
    return tuple((at[0], round(first + n * pitch, 1), line) for n, line in enumerate(lines))


def _line(move: _Move, route: Route) -> Line:
    (x, y), *rest = (move(*knot) for knot in route.knots)
    curve = f"M{x:g} {y:g}C" + " ".join(f"{a:g} {b:g}" for a, b in rest)
    tx, ty = route.knots[-1]
    corners = (move(*p) for p in ((tx, ty - HALF), (tx + ARROW, ty), (tx, ty + HALF)))
    tip = " ".join(f"{a:g},{b:g}" for a, b in corners)
    mark = move.box(route.mark_box) if route.mark_box else None
    return Line(route.parent, route.child, route.kind, curve, tip, route.mark, mark)


def _in_reading_order(nodes: list[Shape], plan: Layout) -> tuple[Shape, ...]:
    """Band by band from the top, and in a band from left to right: the order in which the keyboard walks."""
    tops = sorted(plan.bands.values(), key=lambda band: band.y0)
    row = {name: next(n for n, band in enumerate(tops) if box.inside(band)) for name, box in plan.boxes.items()}
    return tuple(sorted(nodes, key=lambda s: (row[s.name], s.x, s.y)))
