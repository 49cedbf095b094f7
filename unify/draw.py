"""Draw the map of models: a directed graph in which a child is a special case, or a limit, of its parent.

The picture is layered from left (general) to right (special). Families are horizontal tinted bands. An edge runs only
where no box can be: in the gaps between two columns, and, where it must cross a column, in a lane between two rows.
That is what keeps edges off the boxes on any graph, not only on the one that was looked at.

    draw_map(nodes, edges, "map.svg")        # or .png, .pdf
    layout(nodes, edges)                     # the same geometry without the picture, in inches, y pointing down
"""

import math
import random
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from .errors import UnifyError

SLIDE = (40 / 3, 7.5)  # inches; a larger map gets a larger page of the same shape
FONT, FACE = 9.5, "DejaVu Sans"  # points, on the slide; matplotlib brings this face along
WRAP = 14  # a longer label is broken at its spaces
MARGIN, INSET, HEAD, FOOT = 0.3, 0.12, 0.64, 0.48  # around the page; inside a band; for the title; for the legend
PAD_X, PAD_Y = 0.09, 0.045  # between a label and its box
GAP = 0.5  # least room between two columns
ROOM, LANE, CLEAR, BAND = 0.09, 0.075, 0.065, 0.1  # least between rows; lane to lane; lane to box; extra between bands
ARROW = 0.085
# Okabe and Ito's colours, which stay apart for colour-blind readers (the purple is darkened, to carry thin lines).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#B65A96", "#56B4E9", "#7F7F7F")


@dataclass(frozen=True)
class MapNode:
    """A model; `label` is what the reader sees, `family` the band it is drawn in."""

    name: str
    label: str
    family: str


@dataclass(frozen=True)
class MapEdge:
    """`child` is a special case or a limit of `parent`. Several edges may join the same two nodes."""

    parent: str
    child: str
    kind: str  # "exact" or "limit"
    order: int | None = None  # of a limit: the error is O(eps ** order)
    label: str = ""  # the substitution in words; too long for the picture, so it is not drawn


@dataclass(frozen=True)
class Box:
    """A rectangle in inches; y points down."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def centre(self):
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def overlaps(self, other, gap=0.0):
        return (self.x0 < other.x1 + gap and other.x0 < self.x1 + gap
                and self.y0 < other.y1 + gap and other.y0 < self.y1 + gap)  # fmt: skip

    def holds(self, x, y):
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1

    def inside(self, other):
        return other.x0 <= self.x0 and self.x1 <= other.x1 and other.y0 <= self.y0 and self.y1 <= other.y1


@dataclass(frozen=True)
class Route:
    """One drawn line. `knots` are the points of a chain of cubic Bezier curves: start, (control, control, end)*."""

    parent: str
    child: str
    kind: str
    mark: str
    knots: tuple
    mark_box: Box | None = None

    def points(self, steps=24):
        """The curve as a polyline."""
        found = [self.knots[0]]
        for first in range(0, len(self.knots) - 1, 3):
            p, q, r, s = self.knots[first : first + 4]
            for t in (n / steps for n in range(1, steps + 1)):
                a, b, c, d = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t * t, t**3
                found.append(tuple(a * p[i] + b * q[i] + c * r[i] + d * s[i] for i in (0, 1)))
        return found


@dataclass(frozen=True)
class Layout:
    """The whole picture but its ink."""

    width: float
    height: float
    labels: dict  # name -> the label as drawn, with its line breaks
    boxes: dict  # name -> Box
    bands: dict  # family -> Box
    routes: tuple


def overlapping(boxes, gap=0.0):
    """The pairs of keys in `boxes` whose rectangles overlap, or come closer than `gap`."""
    items = sorted(boxes.items(), key=lambda item: item[1].x0)
    return [(a, b) for i, (a, p) in enumerate(items) for b, q in items[i + 1 :] if p.overlaps(q, gap)]


def layout(nodes, edges):
    """Place the nodes and route the edges; the same input always gives the same answer."""
    nodes, edges = list(nodes), list(edges)
    _check(nodes, edges)
    lines = _merge(edges)
    grid = _Grid(nodes, list(lines))
    grid.improve()
    lanes = _choose_lanes(grid)
    return _Sheet(nodes, lines, grid, lanes).layout()


# --- the graph -------------------------------------------------------------------------------------------------------


def _check(nodes, edges):
    if not nodes:
        raise UnifyError("an empty map", "it has no nodes, so there is nothing to draw", "pass at least one MapNode")
    counts = Counter(node.name for node in nodes)
    for name, count in counts.items():
        if count > 1:
            raise UnifyError(
                f"the node {name!r}", f"it appears {count} times in the map", "give each node its own name"
            )
    for edge in edges:
        given = f"the edge {edge.parent} -> {edge.child}"
        for end in (edge.parent, edge.child):
            if end not in counts:
                raise UnifyError(given, f"{end!r} is not a node of the map", f"add a MapNode named {end!r}")
        if edge.kind not in ("exact", "limit"):
            raise UnifyError(given, f"its kind is {edge.kind!r}", "use 'exact' or 'limit'")


def _merge(edges):
    """One line per pair: (parent, child) -> (kind, mark). A pair that also holds exactly is drawn solid."""
    pairs = defaultdict(list)
    for edge in edges:
        pairs[edge.parent, edge.child].append(edge)
    lines = {}
    for pair, group in sorted(pairs.items()):  # so that the picture does not depend on the order of the edges
        orders = Counter(edge.order for edge in group if edge.kind == "limit")
        exact = sum(edge.kind == "exact" for edge in group)
        marks = [_order_mark(order) + _times(n) for order, n in sorted(orders.items(), key=lambda item: item[0] or 0)]
        if exact > 1:
            marks.insert(0, "=" + _times(exact))
        lines[pair] = ("exact" if exact else "limit", ", ".join(marks))
    return lines


def _times(count):
    return f" ×{count}" if count > 1 else ""


def _order_mark(order):
    digits = str(order).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {None: "lim", 1: "ε"}.get(order, "ε" + digits)


def _layers(names, pairs):
    """Longest path from the roots: every edge points right."""
    parents = defaultdict(list)
    for parent, child in pairs:
        parents[child].append(parent)
    layer = {}

    def visit(name, trail):
        if name in trail:
            cycle = " -> ".join([*trail[trail.index(name) :], name][::-1])
            fails = f"the edges run in a circle, {cycle}, so nothing is more general"
            raise UnifyError("the map", fails, "keep one direction of an equivalence")
        if name not in layer:
            layer[name] = max((visit(parent, [*trail, name]) + 1 for parent in parents[name]), default=0)
        return layer[name]

    for name in names:
        visit(name, [])
    return layer


# --- where each node goes: columns and rows --------------------------------------------------------------------------


class _Grid:
    """Nodes on a grid of columns (layers) and rows; each family owns consecutive rows."""

    def __init__(self, nodes, pairs):
        linked = {name for pair in pairs for name in pair}
        self.names = [node.name for node in nodes if node.name in linked]
        self.loose = [node.name for node in nodes if node.name not in linked]
        self.family = {node.name: node.family for node in nodes}
        self.families = list(dict.fromkeys(self.family.values()))
        self.pairs = pairs
        self.touching = {name: [i for i, pair in enumerate(pairs) if name in pair] for name in self.family}
        # Lines that share a node never count as crossing.
        self.rivals = [[j for j, other in enumerate(pairs) if not {*pair} & {*other}] for pair in pairs]
        self.layer = _layers(self.names, pairs)
        # At least as many columns as make a page of the usual shape.
        self.depth = max([round(min(6, len(nodes) ** 0.5)), *(1 + column for column in self.layer.values())])
        self._balance()
        self.rows, self.row, self.slot, self.at = Counter(), {}, {}, {}
        for name in self.names:  # the first free row of the column
            column, family = self.layer[name], self.family[name]
            self.row[name] = next(r for r in range(len(nodes)) if (column, family, r) not in self.slot)
            self.slot[column, family, self.row[name]] = name
            self.rows[family] = max(self.rows[family], self.row[name] + 1)
        self._stack()

    def _stack(self):
        """Rows count from 0 inside a family; `top` says where the family starts, `at` is (column, row of the page)."""
        self.top, self.height = {}, 0
        for family in self.families:
            self.top[family] = self.height
            self.height += self.rows[family]
        self.at = {name: (self.layer[name], self.top[self.family[name]] + self.row[name]) for name in self.names}
        self.ends = [(*self.at[parent], *self.at[child]) for parent, child in self.pairs]

    def span(self, name):
        """The first and last column that keep every edge of `name` pointing right."""
        touching = [self.pairs[i] for i in self.touching[name]]
        low = max((self.layer[p] + 1 for p, c in touching if c == name), default=0)
        high = min((self.layer[c] - 1 for p, c in touching if p == name), default=self.depth - 1)
        return low, high

    def _balance(self):
        """Move nodes inside their spans towards short edges and families that need few rows."""

        def cost():
            crowd = Counter((self.family[name], self.layer[name]) for name in self.names)
            rows = sum(max((n for (f, _), n in crowd.items() if f == family), default=0) for family in self.families)
            length = sum(self.layer[c] - self.layer[p] for p, c in self.pairs)
            return length + 3 * rows + 0.3 * sum(n * n for n in crowd.values())

        best, improved = cost(), True
        while improved:
            improved = False
            for name in self.names:
                low, high = self.span(name)
                for column in range(low, high + 1):
                    before, self.layer[name] = self.layer[name], column
                    if cost() < best - 1e-9:
                        best, improved = cost(), True
                    else:
                        self.layer[name] = before

    # The cost is that of straight lines: a good stand-in for the routes, and cheap enough to search with.

    def _crossings(self, i, skip):
        ax, ay, bx, by = self.ends[i]
        slope, count = (by - ay) / (bx - ax), 0
        for j in self.rivals[i]:
            cx, cy, dx, dy = self.ends[j]
            if cx < bx and ax < dx and not (j in skip and j < i):
                other, left, right = (dy - cy) / (dx - cx), max(ax, cx), min(bx, dx)
                offset = ay - slope * ax - cy + other * cx
                count += (offset + (slope - other) * left) * (offset + (slope - other) * right) <= 0
        return count

    def _covers(self, i, x, y):
        ax, ay, bx, by = self.ends[i]
        return ax < x < bx and abs(ay + (by - ay) * (x - ax) / (bx - ax) - y) < 0.45

    def cost(self, names):
        """The part of the cost that depends on where `names` are."""
        mine, total = {i for name in names for i in self.touching[name]}, 0.0
        for i in mine:
            ax, ay, bx, by = self.ends[i]
            total += abs(by - ay) + 1.5 * (bx - ax - 1) + 2.5 * self._crossings(i, mine)
            if bx - ax > 1:
                total += 3.0 * sum(self._covers(i, *self.at[name]) for name in self.names)
        others = [i for i, (ax, _, bx, _) in enumerate(self.ends) if bx - ax > 1 and i not in mine]
        return total + 3.0 * sum(self._covers(i, *self.at[name]) for i in others for name in names)

    def _place(self, name, column, row):
        """Put `name` into a slot of its family; whoever was there takes the old slot."""
        family, old = self.family[name], (self.layer[name], self.row[name])
        other = self.slot.pop((column, family, row), None)
        del self.slot[old[0], family, old[1]]
        for who, (x, y) in ((name, (column, row)), (other, old)):
            if who is not None:
                self.layer[who], self.row[who] = x, y
                self.slot[x, family, y] = who
                self.at[who] = x, self.top[family] + y
                for i in self.touching[who]:
                    parent, child = self.pairs[i]
                    self.ends[i] = (*self.at[parent], *self.at[child])

    def _swap_bands(self, i, j):
        self.families[i], self.families[j] = self.families[j], self.families[i]
        self._stack()

    def _try_move(self, pick):
        """Make a random move; return how to undo it and the change in cost."""
        nothing = (lambda: None), 0.0
        if pick(25) == 0:
            i, j = pick(len(self.families)), pick(len(self.families))
            before = self.cost(self.names)
            self._swap_bands(i, j)
            return lambda: self._swap_bands(i, j), self.cost(self.names) - before
        name = self.names[pick(len(self.names))]
        old = self.layer[name], self.row[name]
        low, high = self.span(name)
        column, row = low + pick(high - low + 1), pick(self.rows[self.family[name]])
        other = self.slot.get((column, self.family[name], row))
        if other == name:
            return nothing
        if other is not None and column != old[0]:
            low, high = self.span(other)
            if not low <= old[0] <= high or (name, other) in self.pairs or (other, name) in self.pairs:
                return nothing
        moved = [name, other] if other else [name]
        before = self.cost(moved)
        self._place(name, column, row)
        return lambda: self._place(name, *old), self.cost(moved) - before

    def improve(self, steps=4000, hot=6.0, cold=0.15):
        """Simulated annealing with a fixed seed; only rng.random() is used, whose stream never changes with Python."""
        rng = random.Random(0)
        current = best = self.cost(self.names)
        saved = self._save()
        for step in range(steps if self.names else 0):
            heat = hot * (cold / hot) ** (step / steps)
            undo, change = self._try_move(lambda n: int(rng.random() * n))
            if change > 0 and rng.random() >= math.exp(-change / heat):
                undo()
                continue
            current += change
            if current < best - 1e-9:
                best, saved = current, self._save()
        self.layer, self.row, self.slot, self.families = saved
        self._close_up()
        self._settle()

    def _save(self):
        return dict(self.layer), dict(self.row), dict(self.slot), list(self.families)

    def _close_up(self):
        """Remove the rows that the search left empty."""
        for family in self.families:
            mine = [name for name in self.names if self.family[name] == family]
            used = sorted({self.row[name] for name in mine})
            self.rows[family] = len(used)
            self.row.update({name: used.index(self.row[name]) for name in mine})
        self.families.sort(key=lambda family: not self.rows[family])  # those without a linked node go last
        self.slot = {(self.layer[name], self.family[name], self.row[name]): name for name in self.names}
        self._stack()

    def _settle(self):
        """Nodes without edges fill the free places of their family, from the bottom row, left to right."""
        for name in self.loose:
            family = self.family[name]
            places = [(x, y) for y in reversed(range(self.rows[family])) for x in range(self.depth)]
            free = [(x, y) for x, y in places if (x, family, y) not in self.slot and not any(
                self._covers(i, x, self.top[family] + y) for i in range(len(self.pairs)))]  # fmt: skip
            if not free:
                free = [(0, self.rows[family])]
                self.rows[family] += 1
            self.layer[name], self.row[name] = free[0]
            self.slot[free[0][0], family, free[0][1]] = name
            self.names.append(name)
            self._stack()


# --- how each edge crosses the columns in between --------------------------------------------------------------------


def _choose_lanes(grid):
    """For each edge, its rows at every column from parent to child. A lane is a half-integer row (between two rows)
    or an empty place of the grid; the cheapest chain of lanes is found edge by edge, short edges first."""
    taken = set(grid.at.values())
    between = [row - 0.5 for row in range(grid.height + 1)]
    free = [between + [y for y in range(grid.height) if (x, y) not in taken] for x in range(grid.depth)]
    crowd, drawn, paths = Counter(), defaultdict(list), {}

    def step(column, y0, y1):
        crossings = sum((y0 - a) * (y1 - b) < 0 for a, b in drawn[column])
        return abs(y1 - y0) + 0.1 * (y1 - y0) ** 2 + 2.0 * crossings

    for i in sorted(range(len(grid.pairs)), key=lambda i: grid.ends[i][2] - grid.ends[i][0]):
        ax, ay, bx, by = grid.ends[i]
        best = {ay: (0.0, (ay,))}
        for column in range(ax + 1, bx + 1):
            options = [by] if column == bx else free[column]
            # A lane between two boxes is narrow; an empty place has room for several.
            fee = {y: (0.2 + 0.4 * crowd[column, y]) if y % 1 else 0.1 * crowd[column, y] for y in options}
            best = {
                y: min((cost + step(column, path[-1], y) + fee[y], (*path, y)) for cost, path in best.values())
                for y in options
            }
        paths[grid.pairs[i]] = path = best[by][1]
        for column, (y0, y1) in enumerate(pairwise(path), ax + 1):
            drawn[column].append((y0, y1))
            crowd[column, y1] += 1
    return paths


# --- inches ----------------------------------------------------------------------------------------------------------


def _text_size(text, size, weight="normal"):
    """Width and height in inches of a text as matplotlib sets it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(family=FACE, size=size, weight=weight)
    lines = text.split("\n")
    width = max(TextToPath().get_text_width_height_descent(line, font, False)[0] for line in lines)
    return width / 72, 1.2 * size * len(lines) / 72


def wrap(text, width=WRAP):
    """Break at spaces, into three lines or so if the text is long."""
    width = max(width, len(text) // 3 + 4)
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)) or text


class _Sheet:
    """Turns the grid and the lanes into inches."""

    def __init__(self, nodes, lines, grid, paths):
        self.lines, self.grid, self.paths = lines, grid, paths
        self.labels = {node.name: wrap(node.label) for node in nodes}
        self.families = {family: _text_size(wrap(family, 11), 11, "bold") for family in grid.families}
        self.lanes = defaultdict(list)  # (column, row) -> the pairs that pass there, from top to bottom
        for pair, path in paths.items():
            for i in range(1, len(path) - 1):
                key = (path[i - 1] + path[i + 1], path[i + 1])
                self.lanes[grid.layer[pair[0]] + i, path[i]].append((key, pair))
        self.lanes = {spot: [pair for _, pair in sorted(found)] for spot, found in self.lanes.items()}
        wide, (tall, between) = self._widths(), self._heights()
        gutter = max(width for width, _ in self.families.values()) + 0.32
        spare_x = SLIDE[0] - (2 * MARGIN + INSET + gutter + sum(wide) + GAP * (grid.depth - 1))
        spare_y = SLIDE[1] - (HEAD + FOOT + sum(tall) + sum(between))
        scale = max(1 - spare_x / SLIDE[0], 1 - spare_y / SLIDE[1], 1)
        self.width, self.height = SLIDE[0] * scale, SLIDE[1] * scale
        self._place_columns(wide, gutter, spare_x + self.width - SLIDE[0])
        self._place_rows(tall, between, spare_y + self.height - SLIDE[1])

    def _widths(self):
        wide = [0.6] * self.grid.depth
        for name, label in self.labels.items():
            column = self.grid.layer[name]
            wide[column] = max(wide[column], _text_size(label, FONT)[0] + 2 * PAD_X)
        return wide

    def _heights(self):
        """Of the rows, and of the spaces above, between and below them."""
        grid = self.grid
        tall, between = [0.0] * grid.height, [ROOM] * (grid.height + 1)
        for name in grid.names:
            row = grid.at[name][1]
            tall[row] = max(tall[row], self._box_height(name))
        for (_, row), pairs in self.lanes.items():
            if row % 1:
                i = int(row + 0.5)
                between[i] = max(between[i], 2 * CLEAR + LANE * (len(pairs) - 1))
            else:
                tall[row] = max(tall[row], LANE * len(pairs))
        for family, (_, height) in self.families.items():
            first, last = grid.top[family], grid.top[family] + grid.rows[family]
            between[first] += BAND
            short = height + 0.1 - sum(tall[first:last]) - sum(between[first + 1 : last])
            tall[first:last] = [h + max(0.0, short) / (last - first) for h in tall[first:last]]
        between[-1] += BAND
        return tall, between

    def _place_columns(self, wide, gutter, spare):
        """Spread the columns over the page; a gap that many lines must climb through gets more of the spare room."""
        rise = [1.0] * (self.grid.depth - 1)
        for pair, path in self.paths.items():
            for i, (y0, y1) in enumerate(pairwise(path), self.grid.layer[pair[0]]):
                rise[i] += abs(y1 - y0)
        shares = [0.5 * r / sum(rise) + 0.5 / len(rise) for r in rise]
        gaps = [GAP + min(1.2, spare * share) for share in shares]
        left = MARGIN + gutter + 0.5 * (spare + GAP * len(gaps) - sum(gaps))
        self.columns = []
        for width, gap in zip(wide, [*gaps, 0.0], strict=True):
            self.columns.append((left, left + width))
            left += width + gap

    def _place_rows(self, tall, between, spare):
        more = min(0.3, spare / len(between))
        y = HEAD + 0.5 * (spare - more * len(between))
        self.row_spans, self.lane_spans = [], []
        for gap, height in zip(between, [*tall, 0.0], strict=True):
            self.lane_spans.append((y, y + gap + more))
            self.row_spans.append((y + gap + more, y + gap + more + height))
            y = self.row_spans[-1][1]

    def _box_height(self, name):
        lines = [self.grid.pairs[i] for i in self.grid.touching[name]]
        busiest = max(sum(pair[0] == name for pair in lines), sum(pair[1] == name for pair in lines))
        return max(_text_size(self.labels[name], FONT)[1] + 2 * PAD_Y, 0.05 * (busiest + 1))

    def _box(self, name):
        column, row = self.grid.at[name]
        (x0, x1), (top, bottom) = self.columns[column], self.row_spans[row]
        half = self._box_height(name) / 2
        return Box(x0, (top + bottom) / 2 - half, x1, (top + bottom) / 2 + half)

    def _lane_y(self, column, row, pair):
        pairs = self.lanes[column, row]
        top, bottom = self.lane_spans[int(row + 0.5)] if row % 1 else self.row_spans[row]
        pitch = min(0.12, (bottom - top - (2 * CLEAR if row % 1 else 0)) / max(1, len(pairs) - 1))
        return (top + bottom) / 2 + pitch * (pairs.index(pair) - (len(pairs) - 1) / 2)

    def _ports(self, boxes, end):
        """Where each line meets the box of its parent (end 0) or child (end 1), in the order of where it comes from."""
        meet = defaultdict(list)
        for pair, path in self.paths.items():
            near = len(path) - 2 if end else 1
            direct = len(path) == 2
            lane = (self.grid.layer[pair[0]] + near, path[near], pair)
            meet[pair[end]].append((boxes[pair[1 - end]].centre[1] if direct else self._lane_y(*lane), pair))
        found = {}
        for name, lines in meet.items():
            box = boxes[name]
            pitch = min(0.07, (box.y1 - box.y0 - 0.08) / max(1, len(lines) - 1))
            for i, (_, pair) in enumerate(sorted(lines)):
                found[pair] = box.centre[1] + pitch * (i - (len(lines) - 1) / 2)
        return found

    def _stops(self, pair, starts, ends):
        """The heights of a line at its columns, from the parent's port to the child's."""
        path, first = self.paths[pair], self.grid.layer[pair[0]]
        lanes = [self._lane_y(first + i, path[i], pair) for i in range(1, len(path) - 1)]
        return [starts[pair], *lanes, ends[pair]]

    def _leans(self, stops):
        """(gap, pair) -> how far left (-) or right (+) of the gap's middle a steep line climbs. Lines that climb the
        same way would run on top of each other; nested, the outermost turning first, they stay apart."""
        steep = defaultdict(list)
        for pair, heights in stops.items():
            for gap, (y0, y1) in enumerate(pairwise(heights), self.grid.layer[pair[0]]):
                if abs(y1 - y0) > 0.4:
                    steep[gap, y1 < y0].append((y0 + y1 if y1 < y0 else -y0 - y1, pair))
        leans = defaultdict(float)
        for (gap, _), lines in steep.items():
            for rank, (_, pair) in enumerate(sorted(lines)):
                leans[gap, pair] = min(0.28, 0.06 * len(lines)) * (2 * (rank + 0.5) / len(lines) - 1)
        return leans

    def _route(self, pair, heights, leans):
        """Level through the columns, one S-shaped curve across each gap."""
        first, last = self.grid.layer[pair[0]], len(heights) - 1
        knots = [(self.columns[first][1], heights[0])]
        for i in range(1, last + 1):
            left, right = self.columns[first + i]
            (x0, y0), (x1, y1) = knots[-1], (left - (ARROW if i == last else 0.0), heights[i])
            lean = leans[first + i - 1, pair]
            knots += [(x0 + (0.55 + lean) * (x1 - x0), y0), (x1 - (0.55 - lean) * (x1 - x0), y1), (x1, y1)]
            if i < last:
                knots += [(x1 + (right - x1) / 3, y1), (right - (right - x1) / 3, y1), (right, y1)]
        return Route(*pair, *self.lines[pair], tuple(knots))

    def _band(self, family):
        """The rows of a family; the middle between two bands is left white."""
        first, last = self.grid.top[family], self.grid.top[family] + self.grid.rows[family]
        above, below = self.lane_spans[first], self.lane_spans[last]
        top = sum(above) / 2 + 0.03 if first else above[0]
        bottom = sum(below) / 2 - 0.03 if last < self.grid.height else below[1]
        return Box(MARGIN, top, self.width - MARGIN, bottom)

    def layout(self):
        boxes = {name: self._box(name) for name in self.grid.names}
        bands = {family: self._band(family) for family in self.grid.families}
        starts, ends = self._ports(boxes, 0), self._ports(boxes, 1)
        stops = {pair: self._stops(pair, starts, ends) for pair in self.lines}
        leans = self._leans(stops)
        routes = [self._route(pair, heights, leans) for pair, heights in stops.items()]
        return Layout(self.width, self.height, self.labels, boxes, bands, _place_marks(routes, boxes))


def _place_marks(routes, boxes):
    """Put each order mark on its own line, near the middle, where the fewest other lines pass."""
    cloud = [(route, point) for route in routes for point in route.points(30)]
    taken, done = list(boxes.values()), []
    for route in routes:
        if route.mark:
            width, height = _text_size(route.mark, FONT)
            points = route.points(10)
            middle, choices = points[len(points) // 2], []
            for x, y in points[1:-1]:
                spot = Box(x - width / 2 - 0.02, y - height / 2, x + width / 2 + 0.02, y + height / 2)
                clash = sum(spot.overlaps(box, 0.03) for box in taken)
                lines = {id(other) for other, point in cloud if other is not route and spot.holds(*point)}
                choices.append((clash, len(lines) + math.dist((x, y), middle), x, spot))
            route = replace(route, mark_box=min(choices, key=lambda choice: choice[:3])[3])
            taken.append(route.mark_box)
        done.append(route)
    return tuple(done)


# --- ink -------------------------------------------------------------------------------------------------------------


def _mix(colour, other, part):
    """`part` of `other` mixed into `colour`; both are #rrggbb."""
    channels = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in channels)


def draw_map(nodes, edges, path, *, title="The map of models"):
    """Draw the map to `path`, as SVG, PNG or PDF by its suffix; the file is the same byte for byte on every run."""
    import matplotlib

    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UnifyError(f"the file {path.name!r}", "its suffix names no known format", "use .svg, .png or .pdf")
    with matplotlib.rc_context({"svg.hashsalt": "map", "font.family": FACE, "text.parse_math": False}):
        figure = _figure(list(nodes), list(edges), title)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": None}[path.suffix]
        figure.savefig(path, dpi=200, metadata=undated)


def _figure(nodes, edges, title):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = layout(nodes, edges)
    figure = Figure(figsize=(plan.width, plan.height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, plan.width), ylim=(plan.height, 0))
    axes.axis("off")
    axes.text(MARGIN, 0.38, title, size=18, weight="bold", color="#222222", va="center")
    colours = {family: PALETTE[i % len(PALETTE)] for i, family in enumerate(dict.fromkeys(n.family for n in nodes))}
    _draw_bands(axes, plan, colours)
    _draw_routes(axes, plan, {node.name: colours[node.family] for node in nodes})
    _draw_boxes(axes, plan, {node.name: colours[node.family] for node in nodes})
    _draw_legend(axes, plan)
    return figure


def _rectangle(axes, box, radius, **style):
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((box.x0, box.y0), box.x1 - box.x0, box.y1 - box.y0, boxstyle=shape, **style))


def _draw_bands(axes, plan, colours):
    for family, box in plan.bands.items():
        _rectangle(axes, box, 0.08, facecolor=_mix(colours[family], "#ffffff", 0.91), edgecolor="none", zorder=0)
        axes.text(box.x0 + INSET, box.centre[1], wrap(family, 11), size=11, weight="bold", va="center", ha="left",
                  color=_mix(colours[family], "#000000", 0.35), zorder=1)  # fmt: skip


def _draw_line(axes, knots, kind, colour):
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Curve

    curve = Curve(knots, [Curve.MOVETO] + [Curve.CURVE4] * (len(knots) - 1))
    dashes = "solid" if kind == "exact" else (0, (4, 2.2))
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=1.15, linestyle=dashes, zorder=2))
    x, y = knots[-1]
    tip = [(x, y - 0.035), (x + ARROW, y), (x, y + 0.035)]
    axes.add_patch(Polygon(tip, facecolor=colour, edgecolor="none", zorder=3))


def _draw_routes(axes, plan, colours):
    for route in plan.routes:
        _draw_line(axes, route.knots, route.kind, _mix(colours[route.parent], "#000000", 0.15))
        if route.mark_box:
            ink = _mix(colours[route.parent], "#000000", 0.5)
            _rectangle(axes, route.mark_box, 0.05, facecolor="white", edgecolor="none", alpha=0.9, zorder=4)
            axes.text(*route.mark_box.centre, route.mark, size=FONT, color=ink, ha="center", va="center", zorder=5)


def _draw_boxes(axes, plan, colours):
    for name, box in plan.boxes.items():
        fill = _mix(colours[name], "#ffffff", 0.72)
        _rectangle(axes, box, 0.06, facecolor=fill, edgecolor=colours[name], linewidth=1.1, zorder=6)
        axes.text(*box.centre, plan.labels[name], size=FONT, color="#111111", ha="center", va="center", zorder=7,
                  linespacing=1.1)  # fmt: skip


def _draw_legend(axes, plan):
    x, y, grey = MARGIN + INSET, plan.height - 0.27, "#333333"
    entries = {
        "exact": "exact: the child is the parent with a choice fixed",
        "limit": "limit: approached with an error of the order marked (ε, ε² …; ×3: in three ways)",
    }
    for kind, text in entries.items():
        _draw_line(axes, ((x, y), (x + 0.2, y), (x + 0.3, y), (x + 0.5, y)), kind, grey)
        axes.text(x + 0.7, y, text, size=10, color=grey, va="center")
        x += 0.7 + _text_size(text, 10)[0] + 0.5
    axes.text(plan.width - MARGIN - INSET, 0.38, "general  →  special", size=11, color=grey,
              va="center", ha="right")  # fmt: skip
