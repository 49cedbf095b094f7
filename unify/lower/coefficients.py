"""Recurrence -> Triton: everything a schedule asks for at every token, in one kernel, and its gradient.

A family's kernels take decays, keys, reads, queries, scaled values. Here the lines of the recurrence that lead to them are
printed as a loop over the R tokens of a block, one head a program. Small linear states (a decay and a drive that read no
state) go along in registers, from what a scan over blocks brought to the block's start: see `unify.kernels.coefficients`.
Rows of several tokens are asked for before any of them is worked on, for a load waits behind the stores printed before it.

The gradient is the straight line differentiated, with the small states' own recurrence turned around in its middle; values
are recomputed. What does not print like this - a matrix, a solve, a nonlinear state - is left to torch, coefficient by
coefficient.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy as sp

from unify.adjoint import emit, reverse, shapes
from unify.recurrence import Assign, Recurrence
from unify.structure import Structure
from unify.symbols import SIZE, K, V, array, arrays, at_index, contract, i, j, name_of

from .parallel import Request, log_of
from .printer import indices, precise
from .triton import (
    PAD_ONE,
    Printed,
    Slot,
    TritonPrinter,
    block_shape,
    comment,
    content_key,
    equations,
    row_of,
    slots,
)


class TokenPrinter(TritonPrinter):
    """One token: vectors and scalars. A constant is made what it stands for, a scalar or a vector."""

    def code(self, expr: sp.Expr, dims: tuple) -> str:
        """Source of an expression; the logarithm of a size needs a tensor."""
        return "tl.log(tl.full([], K, ACC))" if expr == sp.log(K) else super().code(expr, dims)

    def _sum(self, expr: sp.Add, dims: tuple) -> str:
        """Contractions over one channel are one: their terms are added before lanes are."""
        joined = _together(expr) if not dims else expr if expr.has(sp.Sum) else sp.factor_terms(expr)
        return super()._sum(joined, dims) if isinstance(joined, sp.Add) else self.code(joined, dims)

    def assignment(self, step: Assign) -> str:
        """One assignment."""
        text, shape = self.code(precise(step.expr), step.dims), block_shape(tuple(map(str, step.dims)))
        if not arrays(step.expr):
            return f"{step.name} = tl.full({shape}, {text}, ACC)"
        spread = bool(step.dims) and not indices(step.expr)
        return f"{step.name} = {text}{f' + tl.zeros({shape}, ACC)' if spread else ''}"


def _together(expr: sp.Add) -> sp.Expr:
    """A number with its contractions over key channels taken together, and so those over value channels."""
    found: dict[sp.Symbol, list] = {}
    rest = []
    for term in expr.args:
        totals = [x for x in sp.Mul.make_args(term) if isinstance(x, sp.Sum)]
        if len(totals) != 1 or len(totals[0].limits) != 1:
            rest.append(term)
            continue
        bound = totals[0].limits[0][0]
        axis = i if SIZE[bound] == V else j
        found.setdefault(axis, []).append(term / totals[0] * at_index(totals[0].function, bound, axis))
    if all(len(x) == 1 for x in found.values()):
        return expr
    return sp.Add(*rest, *(contract(sp.Add(*x), axis) for axis, x in found.items()))


@dataclass(frozen=True)
class Output:
    """A coefficient as the kernel writes it: [tokens steps, H, *dims], in the caller's dtype if it is a factor."""

    name: str
    dims: tuple[str, ...]
    steps: int
    factor: bool

    def names(self) -> list[str]:
        """The program's names, one a step."""
        return [f"c_{self.name}" + (f"_{n + 1}" if self.steps > 1 else "") for n in range(self.steps)]

    def row(self, step: int) -> str:
        """Which row of channels a token's step has."""
        return "t * H + h" if self.steps == 1 else f"(t * {self.steps} + {step}) * H + h"


@dataclass(frozen=True)
class Small:
    """A small linear state: its channels and those of its decay."""

    name: str
    dims: tuple[str, ...]
    decay: tuple[str, ...]


@dataclass(frozen=True)
class Coefficients(Printed):
    """A printed module and what its launcher must know.

    inputs: the arguments that are read, one slot for each. graded: those with a gradient. kernels: name and pointers of each.
    """

    inputs: tuple[Slot, ...]
    states: tuple[Small, ...]
    outputs: tuple[Output, ...]
    graded: tuple[str, ...]
    kernels: tuple[tuple[str, tuple[str, ...]], ...]
    family = "coefficients"


# -- what to compute ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """A small linear state: the assignments whose values decay it and are added to it after each token."""

    name: str
    log: Assign
    drive: Assign

    @property
    def dims(self) -> tuple:
        """Channels of the state."""
        return self.drive.dims

    @property
    def small(self) -> Small:
        """What the launcher must know."""
        return Small(self.name, tuple(map(str, self.dims)), tuple(map(str, self.log.dims)))


@dataclass(frozen=True)
class Program:
    """drives: the lines up to the small states' decays and drives; reads: those from the states to the coefficients."""

    inputs: tuple[Slot, ...]
    drives: tuple[Assign, ...]
    scans: tuple[Scan, ...]
    reads: tuple[Assign, ...]
    outputs: tuple[Output, ...]
    repeats: int


@dataclass(frozen=True)
class Gradient:
    """The adjoint of a program: what the coefficients take from the states, and then all of it.

    ends: an input's name -> its adjoint's.
    """

    local: tuple[Assign, ...]
    whole: tuple[Assign, ...]
    ends: dict[str, str]


def _reads(expr: sp.Expr) -> set[str]:
    return {name_of(x) for x in arrays(expr)}


def _needed(lines: Iterable[Assign], names: Iterable[str]) -> list[Assign]:
    """The lines that lead to these names."""
    wanted, out = set(names), []
    for x in reversed(list(lines)):
        if x.name in wanted:
            wanted |= _reads(x.expr)
            out.append(x)
    return out[::-1]


def _denominators(expr: sp.Expr) -> list[tuple[sp.Expr, sp.Expr]]:
    """Each whole power below a fraction line, as often as it stands there, and its base in a channel's first spelling."""
    out = []
    for x in sp.preorder_traversal(expr):
        if isinstance(x, sp.Pow) and x.exp.is_Integer and x.exp < 0 and arrays(x.base):
            base = x.base
            for index in indices(base):
                base = at_index(base, index, i if SIZE[index] == V else j)
            out.append((x, base))
    return out


def _one_log(expr: sp.Expr) -> sp.Expr:
    """A sum with log(x) - log(y) in it as log(x/y): a logarithm takes 25 instructions a channel, and no digits cancel."""
    logs = [x for x in sp.Add.make_args(expr) if isinstance(x, sp.log)]
    less = [x for x in sp.Add.make_args(expr) if isinstance(-x, sp.log)]
    for x, y in zip(logs, less, strict=False):
        expr += sp.log(x.args[0] / (-y).args[0]) - x - y
    return expr


def _inverted(lines: Iterable[Assign]) -> list[Assign]:
    """What several fractions divide by is inverted once: a division takes eight instructions a channel, a product one."""
    lines = [replace(x, expr=_one_log(x.expr)) for x in lines]
    times = Counter(base for x in lines for _, base in _denominators(x.expr))
    known: dict[sp.Expr, str] = {}
    out = []
    for x in lines:
        swap = {}
        for power, base in _denominators(x.expr):
            if times[base] > 1:
                if base not in known:
                    known[base] = f"inverse_{len(known) + 1}"
                    out.append(Assign("inverse", known[base], indices(base), 1 / base))
                swap[power] = array(known[base], indices(power)) ** -power.exp
        out.append(replace(x, expr=x.expr.xreplace(swap)))
    return out


def _used(lines: Iterable[Assign]) -> set[str]:
    return set().union(*(_reads(x.expr) for x in lines))


def _prints(expr: sp.Expr, known: set[str]) -> bool:
    """Whether an expression holds nothing but rows: no matrix, no square, one channel at a time."""
    if not _reads(expr) <= known or expr.has(sp.KroneckerDelta) or len(indices(expr)) > 1:
        return False
    for total in expr.atoms(sp.Sum):
        bound = {x[0] for x in total.limits}
        _, inside = total.function.as_independent(*bound, as_Add=False)
        if len(bound) > 1 or set(indices(inside)) != bound:
            return False
    return True


def _reachable(recurrence: Recurrence, known: set[str]) -> dict[str, Assign]:
    """The recurrence's lines that can be printed from these names."""
    out: dict[str, Assign] = {}
    for s in recurrence.steps:
        if s.solve is None and len(s.dims) < 2 and _prints(s.expr, known | out.keys()):
            out[s.name] = s
    return out


def _scans(recurrence: Recurrence, structure: Structure, known: set[str]) -> list[Scan]:
    """The small linear states whose decay and drive read no state."""
    out, known = [], known | _reachable(recurrence, known).keys()
    for x in structure.autonomous:
        if x.decay is None or len(x.dims) > 1:
            continue
        decay = log_of(x.decay)
        if _prints(decay, known) and _prints(x.drive, known):
            log = Assign("drive", f"{x.name}_log", x.dims if indices(decay) else (), decay)
            out.append(Scan(x.name, log, Assign("drive", f"{x.name}_drive", x.dims, x.drive)))
    return out


def _moving(recurrence: Recurrence, inputs: Iterable[Slot], states: Iterable[str]) -> set[str]:
    """Names that differ from token to token."""
    out = {x.name for x in inputs if x.per != "static"} | set(states)
    for s in recurrence.steps:
        if _reads(s.expr) & out:
            out.add(s.name)
    return out


def program(request: Request) -> Program | None:
    """The lines for those coefficients that a kernel computes: not bare arguments, nor what is the same at all tokens."""
    recurrence = request.recurrence
    inputs = tuple(x for x in slots(recurrence)[0] if len(x.dims) < 2)
    given = {x.name for x in inputs} | {"scale"}
    scans = _scans(recurrence, request.structure, given)
    known = given | {x.name for x in scans}
    lines = _reachable(recurrence, known)
    moving = _moving(recurrence, inputs, known - given)
    outputs, ends = [], []
    for x in request.asked.values():
        if x.name in request.arguments or not all(_prints(y, known | lines.keys()) for y in x.exprs):
            continue
        if not any(_reads(y) & moving for y in x.exprs):
            continue
        own = tuple(d for d in x.dims if any(d in indices(y) for y in x.exprs))
        outputs.append(Output(x.name, tuple(map(str, own)), len(x.exprs), x.factor))
        ends += [Assign("coefficient", n, own, y) for n, y in zip(outputs[-1].names(), x.exprs, strict=True)]
    if not outputs and not scans:
        return None
    drives = [y for x in scans for y in (x.log, x.drive)]
    drives = [*_needed(_reachable(recurrence, given).values(), _used(drives)), *drives]
    reads = [x for x in _needed(lines.values(), _used(ends)) if x not in drives]
    repeats = recurrence.triple.architecture.repeats
    return Program(inputs, tuple(drives), tuple(scans), (*reads, *ends), tuple(outputs), repeats)


def gradient(recurrence: Recurrence, line: Program) -> Gradient:
    """Differentiate a program: back through the reads, through the states' own recurrence, through the drives."""
    dims = shapes(recurrence)
    total = {y.name: array(f"d_{y.name}", y.dims) for y in line.reads if y.phase == "coefficient"}
    local, slopes = reverse(line.reads, total), []
    for x in line.scans:
        local.append(Assign("adjoint", f"d_{x.name}", x.dims, total.pop(x.name, sp.S.Zero)))
        slope = sp.exp(array(x.log.name, x.log.dims)) * array(x.name, x.dims) * array(f"d_{x.drive.name}", x.dims)
        for d in set(x.dims) - set(x.log.dims):
            slope = contract(slope, d)
        slopes.append(Assign("adjoint", f"d_{x.log.name}", x.log.dims, slope))
        total |= {y.name: array(f"d_{y.name}", y.dims) for y in (x.log, x.drive)}
    rest = reverse(line.drives, total)
    names = sorted({x.name for x in line.inputs} & {name for name, expr in total.items() if expr != 0})
    for name in names:
        emit(rest, name, dims[name], total[name])
    return Gradient(tuple(local), (*local, *slopes, *rest), {name: f"d_{name}" for name in names})


# -- printing -----------------------------------------------------------------------------------------------------------

AHEAD = 36  # registers of a thread for the rows of tokens that are asked for together; else each token waits for memory by itself
WIDTH = {"j": "K", "i": "V"}
_BLOCK = "slot * H + h"
_TOKEN = "t * H + h"


def _zero(name: str, dims: tuple) -> str:
    shape = block_shape(tuple(map(str, dims)))
    return f"{name} = tl.zeros({shape}, ACC)" if dims else f"{name} = tl.full([], 0.0, ACC)"


def _place(pointer: str, row: str, dims: tuple, further: str = "") -> str:
    """Where a row of channels lies."""
    if not dims:
        return f"{pointer}_ptr + {row}{further}"
    return f"{pointer}_ptr + ({row}) * {WIDTH[str(dims[0])]} + {dims[0]}{further}"


def _inside(dims: tuple) -> str:
    return f"{dims[0]} < {WIDTH[str(dims[0])]}"


def _load(name: str, place: str, dims: tuple, live: str = "") -> str:
    """Load a row under a name: past the last channel lies 0, or 1 where it divides. live: whether there is such a row."""
    other = "1.0" if name in PAD_ONE else "0.0"
    masks = [*([live] if live else []), *([f"({_inside(dims)})" if live else _inside(dims)] if dims else [])]
    mask = f", mask={' & '.join(masks)}, other={other}" if masks else ""
    return f"{name} = tl.load({place}{mask})"


def _read(name: str, pointer: str, row: str, dims: tuple) -> str:
    return f"{_load(name, _place(pointer, row, dims), dims)}.to(ACC)"


def _keep(pointer: str, row: str, dims: tuple, value: str) -> str:
    return _store(_place(pointer, row, dims), dims, value)


def _store(place: str, dims: tuple, value: str) -> str:
    return f"tl.store({place}, {value}{f', mask={_inside(dims)}' if dims else ''})"


def _forward(x: Scan) -> str:
    return f"{x.name} = tl.exp({x.log.name}) * {x.name} + {x.drive.name}"


class _Kernel:
    """One kernel: a loop over a block's tokens, with the lines that lead to what it needs and the rows they need."""

    def __init__(self, name: str, line: Program, lines: Iterable[Assign], ends: Iterable[str], back: bool = False):
        self.name, self.line, self.step = name, line, "-" if back else "+"
        self.lines = _inverted(_needed(lines, ends))
        self.used = set(ends) | _used(self.lines)
        self.rows = self._rows()  # what a token needs of memory: name, pointer, which row, channels
        self.start: list[str] = []  # before the loop, after static arguments are loaded
        self.token: list[str] = []  # for each token, ahead of the lines
        self.then: list[str] = []  # for each token, after them
        self.end: list[str] = []  # after the loop

    def _rows(self) -> list[tuple[str, str, str, tuple]]:
        """Arguments, and the coefficients' adjoints."""
        moving = [x for x in self.line.inputs if x.name in self.used and x.per != "static"]
        out = [(x.name, x.argument, row_of(x, self.line.repeats), x.dims) for x in moving]
        for x in self.line.outputs:
            adjoints = [(f"d_{c}", f"d_c_{x.name}", x.row(n), x.dims) for n, c in enumerate(x.names())]
            out += [y for y in adjoints if y[0] in self.used]
        return out

    def together(self) -> int:
        """Of how many tokens rows are asked for at a time: as many, at 128 channels and half precision, as AHEAD is room for."""
        wide = {f"d_{c}" for x in self.line.outputs if not x.factor for c in x.names()}
        taken = sum((4 if name in wide else 2) if dims else 1 for name, _, _, dims in self.rows)
        return max(n for n in (1, 2, 4, 8) if n == 1 or n * taken <= AHEAD)

    def place(self, pointer: str, row: str, dims: tuple) -> str:
        """Where a token's row lies: at a distance from the group's first that is a constant, so that no address is computed."""
        times = re.search(r"t \* (\d+)", row)
        apart = ["n", *([times[1]] if times else []), "H", *(WIDTH[str(d)] for d in dims)]
        return _place(pointer, re.sub(r"\bt\b", "first", row), dims, f" {self.step} {' * '.join(apart)}")

    def keep(self, pointer: str, row: str, dims: tuple, value: str) -> str:
        """Store a value as a token's row."""
        return _store(self.place(pointer, row, dims), dims, value)

    def reader(self) -> str:
        """A function that asks for a token's rows, which stay as they lie in memory until it is the token's turn."""
        loads = [_load(name, self.place(pointer, row, dims), dims, "live") for name, pointer, row, dims in self.rows]
        head = f"def {self.name}_rows(first, n: tl.constexpr, live, {self._places()}):"
        return "\n".join(["@triton.jit", head, *(f"    {x}" for x in loads), f"    return ({self._names()},)"])

    def _names(self) -> str:
        return ", ".join(x[0] for x in self.rows)

    def _places(self) -> str:
        pointers = dict.fromkeys(f"{x[1]}_ptr" for x in self.rows)
        return ", ".join([*pointers, "h", "j", "i", "H: tl.constexpr", "K: tl.constexpr", "V: tl.constexpr"])

    def loop(self, body: list[str]) -> list[str]:
        """Over the tokens, as many at a time as have their rows asked for together."""
        given, together = self._places().replace(": tl.constexpr", ""), self.together()
        return [
            "count = (end - begin).to(tl.int32)",
            f"for turn in range(0, count, {together}):",
            f"    first = {'begin + turn' if self.step == '+' else 'end - 1 - turn'}",
            "    rows = (",
            *(f"        {self.name}_rows(first, {n}, turn + {n} < count, {given})," for n in range(together)),
            "    )",
            f"    for n in tl.static_range({together}):",
            "        if turn + n < count:",
            f"            ({self._names()},) = rows[n]",
            *(f"            {x[0]} = {x[0]}.to(ACC)" for x in self.rows),
            *("            " + x for x in body),
        ]

    def source(self) -> str:
        """The kernel's text."""
        where = "locate(slot, offsets, N, R)" if self.line.scans else "slot * R, tl.minimum(slot * R + R, T)"
        static = [x for x in self.line.inputs if x.name in self.used and x.per == "static"]
        body = [
            "pid = tl.program_id(0)",
            "slot, h = (pid // H).to(tl.int64), pid % H  # a block of R tokens; a head",
            f"begin, end = {where}",
            "j, i = tl.arange(0, BK), tl.arange(0, BV)",
            *(_read(x.name, x.argument, row_of(x, self.line.repeats), x.dims) for x in static),
            *self.start,
            *self.loop([*self.token, *(x[4:] for x in equations(self.lines, TokenPrinter())), *self.then]),
            *self.end,
        ]
        text = "\n".join(f"    {x}" for x in body)
        pointers = ", ".join(self.pointers(text))
        sizes = ", ".join(f"{x}: tl.constexpr" for x in ("H", "K", "V", "R", "BK", "BV", "ACC"))
        head = f"@direct\n@triton.jit\ndef {self.name}({pointers}, offsets, scale, N, T,\n{' ' * (5 + len(self.name))}{sizes}):"
        return f"{self.reader()}\n\n\n{head}\n{text}"

    def pointers(self, text: str) -> tuple[str, ...]:
        """Pointers in the order in which a kernel's text mentions them."""
        return tuple(dict.fromkeys(re.findall(r"\w+_ptr", text[text.find("@direct") + 1 :])))


def _deposit(line: Program) -> _Kernel:
    """What each block makes of the small states: its decay and what it leaves of nothing."""
    out = _Kernel("deposit", line, line.drives, {y.name for x in line.scans for y in (x.log, x.drive)})
    for x in line.scans:
        out.start += [_zero(x.name, x.dims), _zero(f"{x.name}_total", x.log.dims)]
        out.then += [_forward(x), f"{x.name}_total += {x.log.name}"]
        out.end += [_keep(f"{x.name}_gain", _BLOCK, x.dims, x.name)]
        out.end += [_keep(f"{x.name}_total", _BLOCK, x.log.dims, f"{x.name}_total")]
    return out


def _evaluate(line: Program) -> _Kernel:
    """The coefficients of every token."""
    lines, ends = (*line.drives, *line.reads), {c for x in line.outputs for c in x.names()}
    read = [x for x in line.scans if x.name in _used(_needed(lines, ends))]
    out = _Kernel("evaluate", line, lines, ends | {y.name for x in read for y in (x.log, x.drive)})
    out.start = [_read(x.name, f"{x.name}_start", _BLOCK, x.dims) for x in read]
    for x in line.outputs:
        out.then += [out.keep(f"c_{x.name}", x.row(n), x.dims, c) for n, c in enumerate(x.names())]
    out.then += map(_forward, read)
    return out


def _contribute(line: Program, back: Gradient) -> _Kernel:
    """What each block adds to the adjoint of the states at its start; and the states each token finds, for `backward`."""
    ends = {n for x in line.scans for n in (f"d_{x.name}", x.log.name, x.drive.name)}
    out = _Kernel("contribute", line, (*line.drives, *line.reads, *back.local), ends)
    for x in line.scans:
        past, gain = f"{x.name}_past", f"d_{x.name}_gain"
        out.start += [_read(x.name, f"{x.name}_start", _BLOCK, x.dims), _zero(past, x.log.dims), _zero(gain, x.dims)]
        out.token += [out.keep(f"{x.name}_found", _TOKEN, x.dims, x.name)]
        out.then += [f"{gain} += tl.exp({past}) * d_{x.name}", f"{past} += {x.log.name}", _forward(x)]
        out.end += [_keep(gain, _BLOCK, x.dims, gain)]
    return out


def _backward(line: Program, back: Gradient) -> _Kernel:
    """Gradients of the arguments, from a block's last token to its first."""
    carried = {n for x in line.scans for n in (f"d_{x.name}", x.log.name)}
    out = _Kernel("backward", line, (*line.drives, *line.reads, *back.whole), {*back.ends.values(), *carried}, True)
    for x in line.scans:
        drive = f"d_{x.drive.name}"
        out.start += [_read(drive, f"d_{x.name}_end", _BLOCK, x.dims)]
        out.rows += [(x.name, f"{x.name}_found", _TOKEN, tuple(map(str, x.dims)))] if x.name in out.used else []
        out.then += [f"{drive} = tl.exp({x.log.name}) * {drive} + d_{x.name}"]
    for x in line.inputs:
        name, pointer = back.ends.get(x.name), f"d_{x.argument}"
        if x.argument not in {y.argument for y in line.inputs if y.name in back.ends}:
            continue
        if x.per == "static":
            out.start += [_zero(f"sum_{name}", x.dims)]
            out.then.insert(0, f"sum_{name} += {name}")
            out.end += [_keep(pointer, _BLOCK, x.dims, f"sum_{name}")]
        else:  # a share of an argument that nothing reads has the gradient 0
            nothing = f"tl.zeros({block_shape(x.dims)}, ACC)" if x.dims else "0.0"
            out.then.insert(0, out.keep(pointer, row_of(x, line.repeats), x.dims, name or nothing))
    return out


_HEAD = '''"""Printed by unify from a recurrence; do not edit.

{triple}
"""

import triton
import triton.language as tl

from unify.kernels.chunk import locate
from unify.kernels.direct import direct
from unify.kernels.tile import expm1, power, sign, square'''


@lru_cache(maxsize=256)
def module(request: Request) -> Coefficients | None:
    """Print the kernels of what is asked for; None where there is nothing for them to do."""
    line = program(request)
    if line is None:
        return None
    back = gradient(request.recurrence, line)
    kernels = [_deposit(line)] if line.scans else []
    kernels += [_evaluate(line)] if line.outputs else []
    kernels += [_contribute(line, back)] if line.scans else []
    kernels += [_backward(line, back)]
    texts = {x.name: x.source() for x in kernels}
    whole = "\n\n\n".join([_HEAD.format(triple=comment(str(request.recurrence.triple))), *texts.values()])
    pointers = {x.name: x.pointers(texts[x.name]) for x in kernels}
    mentioned = set().union(*pointers.values())
    return Coefficients(
        whole + "\n",
        content_key(whole),
        tuple(x for x in line.inputs if x.share == 0 and f"{x.argument}_ptr" in mentioned),
        tuple(x.small for x in line.scans),
        line.outputs,
        tuple(x.argument for x in line.inputs if x.share == 0 and f"d_{x.argument}_ptr" in mentioned),
        tuple(pointers.items()),
    )
