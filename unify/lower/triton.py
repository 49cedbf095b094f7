"""Recurrence -> Triton: leaf functions of one token (the step and its adjoint) and the kernels that drive them.

The printed module is a real source file, keyed by its content, in the user's cache folder: tracebacks and profilers point
into it, and Triton's own cache works. Nothing here knows a model: whatever can be derived gets a forward and a backward.

Layout inside a program: [j] is a vector over BK key channels, [i] over BV value channels, [j, i] a tile, [j, l] a square.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import sympy as sp

from unify.adjoint import Adjoint, adjoint
from unify.errors import UnifyError
from unify.recurrence import Assign, Recurrence
from unify.symbols import i, j, l

from .printer import TorchPrinter, expm1, indices, precise

PAD_ONE = ("prior_precision", "temperature", "Lambda", "gain")  # what divides is padded with 1, everything else with 0


class TritonPrinter(TorchPrinter):
    """The Triton dialect: scalars broadcast, contractions are sums over an axis of a tile."""

    functions = {sp.exp: "tl.exp", expm1: "expm1", sp.log: "tl.log", sp.Abs: "tl.abs", sp.sign: "sign"}  # noqa: RUF012

    def root(self, text: str) -> str:
        """Square root."""
        return f"tl.sqrt({text})"

    def whole(self, base: sp.Expr, power: sp.Integer, dims: tuple) -> str:
        """A whole power: by `square`, or as repeated products."""
        if power == 2:
            return f"square({self.code(base, dims)})"
        return (
            " * ".join([self._atom(base, dims)] * int(power))
            if power == 1
            else f"({' * '.join([self._atom(base, dims)] * int(power))})"
        )

    def general(self, base: sp.Expr, power: sp.Expr, dims: tuple) -> str:
        """base ** power for a base >= 0 (0 ** power is 0); of a number the logarithm is taken here, in full precision."""
        if base.is_number:
            return f"tl.exp({float(sp.log(base))!r} * {self._atom(power, dims)})"
        return f"power({self.code(base, dims)}, {self.code(power, dims)})"

    def _atom(self, expr: sp.Expr, dims: tuple) -> str:
        squared = isinstance(expr, sp.Pow) and expr.exp == 2  # a call needs no parentheses
        return self.code(expr, dims) if squared else super()._atom(expr, dims)

    def layout(self, name: str, own: tuple, dims: tuple) -> str:
        """Place a vector or tile among the axes of a tile; scalars need no place."""
        if len(dims) > 2:
            raise UnifyError(f"{name}{list(own)} among {dims}", "a tile has two axes", "use backend='torch'")
        if not own or own == dims:
            return name
        if len(own) == 2:
            return f"tl.trans({name})"
        return f"{name}[{', '.join(':' if d in own else 'None' for d in dims)}]" if len(dims) == 2 else name

    def contraction(self, total: sp.Sum, dims: tuple) -> str:
        """Sum over an axis (over both, for a double sum) of the product's tile."""
        outside, inside = total.function.as_independent(*(x[0] for x in total.limits), as_Add=False)
        inner = _axes(inside)
        text = self.code(inside, inner)
        bound = [x[0] for x in total.limits]
        for d in [x for x in inner if x in bound][::-1]:
            text = f"tl.sum({text}, {inner.index(d)})"
            inner = tuple(x for x in inner if x != d)
        text = self.layout(text, inner, dims)
        return text if outside == 1 else f"{self._group(outside, dims)} * {text}"

    def assignment(self, step: Assign) -> str:
        """One assignment; a solve eliminates the square in place."""
        if step.solve is None:
            text = f"{step.name} = {self.code(precise(step.expr), step.dims)}"
            lost = step.dims in ((j,), (i,)) and not indices(step.expr)  # a constant where a vector is expected
            return f"{text} + tl.zeros_like({'q' if step.dims == (j,) else 'v'})" if lost else text
        if i in step.dims:
            raise UnifyError(
                str(step),
                "every value channel has a full precision of its own: three channels in one tile",
                "use backend='torch'",
            )
        return f"{step.name} = solve({self.code(step.solve, (j, l))}, {self.code(step.expr, (j,))}, BK)"


def _axes(expr: sp.Expr) -> tuple[sp.Symbol, ...]:
    """The axes of a tile to be summed: as its matrices have them, where they agree, so that none is transposed."""
    axes = indices(expr)
    own = {x.indices for x in expr.atoms(sp.Indexed) if len(set(x.indices)) == 2}
    return own.pop() if len(own) == 1 and len(axes) == 2 and set(axes) == set(next(iter(own))) else axes


@dataclass(frozen=True)
class Slot:
    """One tensor of a kernel: its name in the program, in the call, its channels, and how often it is given."""

    name: str
    argument: str
    dims: tuple[str, ...]
    per: str
    share: int = 0


@dataclass(frozen=True)
class Printed:
    """A printed source file."""

    source: str
    key: str
    family: ClassVar[str]

    @property
    def path(self) -> Path:
        """Where the source lies on disk."""
        base = (
            os.environ.get("UNIFY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unify"
        )
        return Path(base) / f"{self.family}_{self.key}.py"

    def load(self):
        """Write the file (once) and import it."""
        name = f"unify_generated_{self.key}"
        if name not in sys.modules:
            if not self.path.exists() or self.path.read_text() != self.source:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                draft = self.path.with_suffix(f".{os.getpid()}")
                draft.write_text(self.source)
                draft.replace(self.path)
            spec = importlib.util.spec_from_file_location(name, self.path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return sys.modules[name]


def content_key(source: str) -> str:
    """What names a source file."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Module(Printed):
    """A printed recurrence and what its launcher must know."""

    inputs: tuple[Slot, ...]
    states: tuple[Slot, ...]
    graded: tuple[str, ...]
    repeats: int
    family = "recurrent"


@lru_cache(maxsize=256)
def slots(recurrence: Recurrence) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Tensors of a recurrence under the program's names: its arguments, an observation's once for each share, and its states."""
    tempered = recurrence.triple.architecture.key == "tempered"
    inputs = []
    for x in recurrence.inputs:
        shares = recurrence.triple.architecture.repeats if x.per == "observation" else 1
        for n in range(shares):
            name = x.name if n == 0 else f"{x.name}_{n + 1}"
            inputs.append(
                Slot("k_raw" if tempered and name == "k" else name, x.name, tuple(map(str, x.dims)), x.per, n)
            )
    states = tuple(Slot(s.name, s.name, tuple(map(str, s.dims)), "state") for s in recurrence.states)
    return tuple(inputs), states


@lru_cache(maxsize=256)
def module(recurrence: Recurrence) -> Module:
    """Print the Triton module of a recurrence. Raises UnifyError where a tile would need three channels."""
    inputs, states = slots(recurrence)
    if any(len(s.dims) > 2 for s in states):
        raise UnifyError(
            str(recurrence.triple),
            "every value channel has a full precision of its own: three channels in one tile",
            "use backend='torch'",
        )
    back = adjoint(recurrence, variance=True)
    graded = tuple(x.name for x in inputs if x.name in dict(back.inputs))
    parts = (
        _HEAD.format(triple=comment(str(recurrence.triple))),
        _step(recurrence, inputs, states),
        _adjoint(recurrence, back, inputs, states, graded),
        _forward_kernel(recurrence, inputs, states),
        _backward_kernel(recurrence, inputs, states, graded),
    )
    text = "\n\n\n".join(parts)
    return Module(text + "\n", content_key(text), inputs, states, graded, recurrence.triple.architecture.repeats)


def leaves(recurrence: Recurrence) -> str:
    """The step and its adjoint as printed: what a person reads."""
    inputs, states = slots(recurrence)
    back = adjoint(recurrence, variance=True)
    graded = tuple(x.name for x in inputs if x.name in dict(back.inputs))
    return _step(recurrence, inputs, states) + "\n\n\n" + _adjoint(recurrence, back, inputs, states, graded) + "\n"


_HEAD = '''"""Printed by unify from a recurrence; do not edit.

{triple}
"""

import triton
import triton.language as tl

from unify.kernels.direct import direct
from unify.kernels.tile import expm1, power, sign, solve, square'''


def comment(text: str) -> str:
    """Text for a module's docstring."""
    return "\n".join(line.rstrip() for line in text.splitlines())


WIDTH = 120  # of a printed line


def equations(steps, printer: TritonPrinter) -> list[str]:
    """Assignments, each under its equation; the forward ones say which phase of the token they belong to."""
    out = []
    for s in steps:
        phase = "" if s.phase == "adjoint" else f"{s.phase}: "
        out += [*_wrap(f"{phase}{s}", "    # ", "    #     "), *_broken(printer.assignment(s))]
    return out


def _wrap(text: str, first: str, rest: str) -> list[str]:
    """Lines of at most WIDTH, broken at spaces, but not between an array's indices or before an annotation."""
    tied = re.sub(r"(?<=[,:]) (?=[^\[\]]*\]|tl)", "\xa0", text)
    lines = textwrap.wrap(
        tied, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\xa0", " ") for line in lines]


def _broken(line: str) -> list[str]:
    """An assignment, broken before each of its terms where it is too long."""
    name, text = line.split(" = ", 1)
    if len(line) + 4 <= WIDTH:
        return [f"    {line}"]
    depth, at, terms = 0, 0, []
    for n, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and text[n : n + 3] in (" + ", " - "):
            terms.append(text[at:n])
            at = n + 1
    if not terms:
        return [f"    {line}"]
    return [f"    {name} = (", *(f"        {term}" for term in [*terms, text[at:]]), "    )"]


def _signature(name: str, arguments: Iterable[str], doc: str) -> list[str]:
    inside = ", ".join([*arguments, "scale", "K", "BK: tl.constexpr"])
    line = f"def {name}({inside}):"
    head = [line] if len(line) <= WIDTH else [f"def {name}(", *_wrap(f"{inside},", "    ", "    "), "):"]
    return ["@triton.jit", *head, f'    """{doc}"""']


def _eye(steps) -> list[str]:
    """The unit matrix, where one of the assignments needs it."""
    if any(s.expr.has(sp.KroneckerDelta) or s.solve is not None for s in steps):
        return ["    eye = (tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :]).to(q.dtype)"]
    return []


def _step(recurrence: Recurrence, inputs: tuple, states: tuple) -> str:
    """The forward leaf: one token of one head."""
    names = [*(x.name for x in inputs), *(s.name for s in states)]
    new = ", ".join(name for _, name in recurrence.updates)
    doc = "One token of one head: the read-out, its variance and the state after the token."
    body = [*_eye(recurrence.steps), *equations(recurrence.steps, TritonPrinter()), f"    return o, variance, {new}"]
    return "\n".join([*_signature("step", names, doc), *body])


def _adjoint(recurrence: Recurrence, back: Adjoint, inputs: tuple, states: tuple, graded: tuple) -> str:
    """The backward leaf: recomputes the token from its previous state, then runs the adjoint assignments."""
    outside = [f"d_{n}" for n in ("o", "variance")] + [f"d_{new}" for _, new in recurrence.updates]
    names = [*(x.name for x in inputs), *(s.name for s in states), *outside]
    ends, new = dict(back.inputs), dict(recurrence.updates)
    results = ", ".join([*(ends[n] for n in graded), *(ends.get(s.name, f"d_{new[s.name]} * 0") for s in states)])
    doc = "The token again from the state before it, then back through it: d_x is the loss's gradient by x."
    forward = [s for s in recurrence.steps if s.name not in ("o", "variance")]
    body = [*_eye((*recurrence.steps, *back.steps)), *equations([*forward, *back.steps], TritonPrinter())]
    return "\n".join([*_signature("step_adjoint", names, doc), *body, f"    return {results}"])


# -- the kernels around the leaves --------------------------------------------------------------------------------------


def _offset(dims: tuple[str, ...]) -> str:
    """Offset inside one token's (or state's) channels."""
    return {
        (): "0",
        ("j",): "j",
        ("i",): "i",
        ("j", "i"): "j[:, None] * V + i[None, :]",
        ("j", "l"): "j[:, None] * K + j[None, :]",
    }[dims]


def _mask(dims: tuple[str, ...]) -> str:
    return {
        (): "True",
        ("j",): "j < K",
        ("i",): "i < V",
        ("j", "i"): "(j < K)[:, None] & (i < V)[None, :]",
        ("j", "l"): "(j < K)[:, None] & (j < K)[None, :]",
    }[dims]


def block_shape(dims: tuple[str, ...]) -> str:
    """Shape of a tile over these channels."""
    return "[" + ", ".join({"j": "BK", "l": "BK", "i": "BV"}[d] for d in dims) + "]"


def _width(dims: tuple[str, ...]) -> str:
    return " * ".join({"j": "K", "l": "K", "i": "V"}[d] for d in dims)


def load_line(name: str, pointer: str, row: str, dims: tuple[str, ...]) -> str:
    """Load the channels of a row under a name; past the last channel lies 0, or 1 where it divides."""
    other = "1.0" if name in PAD_ONE else "0.0"
    where = f"{pointer} + ({row}) * {_width(dims)}" if dims else f"{pointer} + {row}"
    if not dims:
        return f"{name} = tl.load({where}).to(ACC)"
    return f"{name} = tl.load({where} + {_offset(dims)}, mask={_mask(dims)}, other={other}).to(ACC)"


def store_line(pointer: str, row: str, dims: tuple[str, ...], value: str) -> str:
    """Store a value as the channels of a row."""
    where = f"{pointer} + ({row}) * {_width(dims)}" if dims else f"{pointer} + {row}"
    if not dims:
        return f"tl.store({where}, {value})"
    return f"tl.store({where} + {_offset(dims)}, {value} + tl.zeros({block_shape(dims)}, ACC), mask={_mask(dims)})"


def row_of(x: Slot, repeats: int) -> str:
    """Which row of channels a token has in an argument."""
    return {"token": "t * H + h", "static": "h"}.get(x.per, f"(t * {repeats} + {x.share}) * H + h")


def _loads(inputs: tuple, repeats: int, per_token: bool, indent: str) -> list[str]:
    return [
        indent + load_line(x.name, f"{x.argument}_ptr", row_of(x, repeats), x.dims)
        for x in inputs
        if (x.per != "static") == per_token
    ]


def _pointers(inputs: tuple) -> list[str]:
    return list(dict.fromkeys(f"{x.argument}_ptr" for x in inputs))


_PROLOGUE = """    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)  # a block of value channels; a sequence and head
    n, h = row // H, row % H
    first, last = tl.load(offsets + n), tl.load(offsets + n + 1)
    j, i = tl.arange(0, BK), block * BV + tl.arange(0, BV)"""


def _forward_kernel(recurrence: Recurrence, inputs: tuple, states: tuple) -> str:
    repeats = recurrence.triple.architecture.repeats
    args = [
        *_pointers(inputs),
        *(f"{s.name}_start" for s in states),
        *(f"{s.name}_end" for s in states),
        *(f"{s.name}_marks" for s in states),
    ]
    call = ", ".join([*(x.name for x in inputs), *(s.name for s in states)])
    got = ", ".join(f"{s.name}" for s in states)
    lines = [
        "@direct",
        "@triton.jit",
        f"def forward({', '.join(args)}, o_ptr, variance_ptr, offsets, mark_offsets, scale, H, K, V, every,",
        "            BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, VARIANCE: tl.constexpr, MARKS: tl.constexpr):",
        _PROLOGUE,
        *_loads(inputs, repeats, False, "    "),
        *(f"    {load_line(s.name, f'{s.name}_start', 'row', s.dims)}" for s in states),
        "    mark = tl.load(mark_offsets + n)",
        "    for t in range(first, last):",
        "        if MARKS:",
        "            if (t - first) % every == 0:",
        *(f"                {store_line(f'{s.name}_marks', 'mark * H + h', s.dims, s.name)}" for s in states),
        "                mark += 1",
        *_loads(inputs, repeats, True, "        "),
        f"        o, variance, {got} = step({call}, scale, K, BK)",
        f"        {store_line('o_ptr', 't * H + h', ('i',), 'o')}",
        "        if VARIANCE:",
        f"            {store_line('variance_ptr', 't * H + h', ('i',), 'variance')}",
        *(f"    {store_line(f'{s.name}_end', 'row', s.dims, s.name)}" for s in states),
    ]
    return "\n".join(lines)


def _backward_kernel(recurrence: Recurrence, inputs: tuple, states: tuple, graded: tuple) -> str:
    """Segments from the last to the first: replay from a mark keeping every state, then step back through them."""
    repeats = recurrence.triple.architecture.repeats
    mine = [x for x in inputs if x.name in graded]
    fixed = [x for x in mine if x.per == "static"]
    saved = [f"{s.name}_{what}" for what in ("marks", "kept") for s in states]
    ends = [f"d_{s.name}_end" for s in states]
    grads = [f"d_{x.argument}_ptr" for x in {x.argument: x for x in mine}.values()]
    args = [*_pointers(inputs), *saved, *ends, *grads, *(f"d_{s.name}_start" for s in states)]
    zero = lambda x: f"tl.zeros({block_shape(x.dims) if x.dims else '[1]'}, ACC)"  # noqa: E731
    start = lambda s: "row" if "i" in s.dims else "block * rows + row"  # noqa: E731
    lines = [
        "@direct",
        "@triton.jit",
        f"def backward({', '.join(args)}, d_o_ptr, d_variance_ptr, offsets, mark_offsets, scale, H, K, V, tokens, rows,",
        "             every, BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, VARIANCE: tl.constexpr):",
        _PROLOGUE,
        *_loads(inputs, repeats, False, "    "),
        *(f"    {load_line(f'd_{s.name}', f'd_{s.name}_end', 'row', s.dims)}" for s in states),
        *(f"    d_{s.name} = tl.where(block == 0, d_{s.name}, 0.0)" for s in states if "i" not in s.dims),
        *(f"    d_{x.name} = {zero(x)}" for x in fixed),
        "    marks, segments = tl.load(mark_offsets + n), tl.cdiv(last - first, every)",
        "    for back in range(0, segments):",
        "        segment = segments - 1 - back",
        "        begin = first + segment * every",
        "        length = tl.minimum(every, last - begin)",
        *_segment(inputs, states, mine, repeats),
        *(f"    {_store_fixed(x)}" for x in fixed),
        *(f"    {store_line(f'd_{s.name}_start', start(s), s.dims, f'd_{s.name}')}" for s in states),
    ]
    return "\n".join(lines)


def _segment(inputs: tuple, states: tuple, mine: list[Slot], repeats: int) -> list[str]:
    """One segment of the backward kernel: forward through it keeping the states, then backward through it."""
    given = ", ".join([*(x.name for x in inputs), *(s.name for s in states)])
    outside = ", ".join(["d_o", "d_variance", *(f"d_{s.name}" for s in states)])
    results = ", ".join([*(f"now_{x.name}" for x in mine), *(f"d_{s.name}" for s in states)])
    kept = "(tl.program_id(0) + row * tl.num_programs(0)) * every + at"
    deep = " " * 12
    moving = [x for x in mine if x.per != "static"]
    return [
        *(f"        {load_line(s.name, f'{s.name}_marks', '(marks + segment) * H + h', s.dims)}" for s in states),
        "        for at in range(0, length):",
        f"{deep}t = begin + at",
        *(f"{deep}{store_line(f'{s.name}_kept', kept, s.dims, s.name)}" for s in states),
        *_loads(inputs, repeats, True, deep),
        f"{deep}o, variance, {', '.join(s.name for s in states)} = step({given}, scale, K, BK)",
        "        tl.debug_barrier()",
        "        for step_back in range(0, length):",
        f"{deep}at = length - 1 - step_back",
        f"{deep}t = begin + at",
        *(f"{deep}{load_line(s.name, f'{s.name}_kept', kept, s.dims)}" for s in states),
        *_loads(inputs, repeats, True, deep),
        f"{deep}{load_line('d_o', 'd_o_ptr', 't * H + h', ('i',))}",
        f"{deep}d_variance = tl.zeros([BV], ACC)",
        f"{deep}if VARIANCE:",
        f"{deep}    {load_line('d_variance', 'd_variance_ptr', 't * H + h', ('i',))}",
        f"{deep}{results} = step_adjoint({given}, {outside}, scale, K, BK)",
        *(f"{deep}d_{x.name} += now_{x.name}" for x in mine if x.per == "static"),
        *(f"{deep}{store_line(f'd_{x.argument}_ptr', _grad_row(x, repeats), x.dims, f'now_{x.name}')}" for x in moving),
        "        tl.debug_barrier()",
    ]


def _grad_row(x: Slot, repeats: int) -> str:
    """A gradient without value channels is one block's share: [blocks, tokens, H, ...]."""
    lead = "" if "i" in x.dims else f"block.to(tl.int64) * tokens * {repeats if x.per == 'observation' else 1} * H + "
    return lead + row_of(x, repeats)


def _store_fixed(x: Slot) -> str:
    row = "row" if "i" in x.dims else "block * rows + row"
    if not x.dims:
        return f"tl.store(d_{x.argument}_ptr + ({row}) + tl.arange(0, 1), d_{x.name})"
    return store_line(f"d_{x.argument}_ptr", row, x.dims, f"d_{x.name}")
