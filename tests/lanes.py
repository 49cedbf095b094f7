"""Runs a kernel compiled for a Hopper GPU lane by lane, without one: Triton's interpreter has one copy of a vector, a GPU's lanes many.

python tests/lanes.py    solves squares with `tile.solve`: prints the worst relative error by K as JSON

Run as a process of its own, because the test session's kernels are interpreted. It knows as much of PTX as these kernels use. All
warps go in step, so what a missing barrier does is not seen; lanes that part at a branch are an error. Of lanes that store different
values in one place the last wins: which does is not defined, and with the last comes what an H200 gave.
"""

from __future__ import annotations

import json
import os
import re

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unify.kernels.tile import solve

TYPES = {
    "f32": np.float32,
    "s32": np.int32,
    "s64": np.int64,
    "u32": np.uint32,
    "u64": np.uint64,
    "b32": np.uint32,
    "b64": np.uint64,
}
TESTS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "gt": np.greater,
    "le": np.less_equal,
    "ge": np.greater_equal,
}
TESTS |= {
    "leu": lambda a, b: ~(a > b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
SPACE = 1 << 20  # bytes; the upper half is shared memory


def _fused(a, b, c):
    return (a.astype(np.float64) * b + c).astype(a.dtype) if a.dtype == np.float32 else a * b + c


DO = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b, "fma": _fused,
    "mad": _fused, "neg": lambda a: -a, "abs": np.abs, "max": np.fmax, "min": np.fmin, "mov": lambda a: a, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "selp": lambda a, b, p: np.where(p, a, b),
    "shl": lambda a, n: a << n.astype(a.dtype), "shr": lambda a, n: a >> n.astype(a.dtype),
    "bfe": lambda a, at, n: a << (32 - at - n) >> (32 - n),  # of 32 bits
}  # fmt: skip


class Block:
    """One program's lanes. Registers hold what was written, and are read as the type that an instruction states."""

    def __init__(self, ptx: str, warps: int, arguments: list):
        body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", ptx[ptx.index("{") + 1 :], flags=re.MULTILINE)
        self.code = [x.strip() for x in re.findall(r"\$[\w$]+:|[@a-z][^;{}]*(?:\{[^}]*\}[^;{}]*)*;", body)]
        self.labels = {x[:-1]: n for n, x in enumerate(self.code) if x.endswith(":")}
        self.lane = np.arange(32 * warps)
        self.memory, self.registers, self.arguments = np.zeros(SPACE, np.uint8), {}, arguments

    def value(self, name: str, kind: type) -> np.ndarray:
        """An operand in every lane."""
        fixed = {"%tid.x": self.lane, "%ctaid.x": 0, "%ctaid.y": 0, "global_smem": SPACE // 2}
        if name.startswith("0f"):  # bits
            return np.full(self.lane.shape, int(name[2:], 16), np.uint32).view(kind)
        if name.startswith("%") and name not in fixed:
            x = self.registers[name]
            return x if x.dtype == bool else x.view(kind) if x.itemsize == np.dtype(kind).itemsize else x.astype(kind)
        x = fixed[name] if name in fixed else int(name, 0)
        return np.broadcast_to(np.asarray(x).astype(kind), self.lane.shape)

    def put(self, name: str, x: np.ndarray, where) -> None:
        old = self.registers.get(name, np.zeros_like(x))
        self.registers[name] = np.where(where, x, old.view(x.dtype))

    def run(self) -> np.ndarray:
        """Until the kernel returns: its memory."""
        at = 0
        while True:
            line, at = self.code[at], at + 1
            found = re.match(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*([^;]*);", line)
            if found is None or found[3].startswith(("bar", "reg")):
                continue
            where = self.registers[found[2]] ^ bool(found[1]) if found[2] else np.ones(self.lane.shape, bool)
            name, *rest = found[3].split(".")
            if name == "ret":
                return self.memory
            if name == "bra":
                assert where.all() or not where.any(), f"lanes part at {line}"
                at = self.labels[found[4].strip()] if where.all() else at
                continue
            self.step(name, rest, re.findall(r"[^\s,\[\]{}+]+", found[4]), where)

    def step(self, name: str, rest: list[str], given: list[str], where) -> None:
        """One instruction but for branches. given: destinations first, without brackets."""
        kind = TYPES.get(rest[-1], np.uint32)
        if name in ("ld", "st"):
            return self.move(name, rest, given, kind, where)
        if name == "shfl":
            other = self.value(given[2], np.int32)
            x = self.value(given[1], np.uint32)[self.lane ^ other if rest[1] == "bfly" else self.lane & ~31 | other]
        elif name == "cvt":
            x = self.value(given[1], kind).astype(TYPES[rest[-2]])
        elif name == "setp":
            x = TESTS[rest[0]](self.value(given[1], kind), self.value(given[2], kind))
        elif rest[0] == "pred":
            x = DO[name](*(self.registers[y] if y.startswith("%") else self.value(y, np.int32) != 0 for y in given[1:]))
        elif "wide" in rest:
            wide = {np.int32: np.int64, np.uint32: np.uint64}[kind]
            a, b = (self.value(y, kind).astype(wide) for y in given[1:3])
            x = a * b + (self.value(given[3], wide) if name == "mad" else wide(0))
        else:
            shift = name in ("shl", "shr")
            x = DO[name](*(self.value(y, np.uint32 if shift and n else kind) for n, y in enumerate(given[1:])))
        return self.put(given[0], x, where)

    def move(self, name: str, rest: list[str], given: list[str], kind: type, where) -> None:
        """Loads and stores, of arguments too."""
        if rest[0] == "param":
            return self.put(
                given[0], np.full(self.lane.shape, self.arguments[int(given[1].split("_")[-1])]).astype(kind), where
            )
        size = np.dtype(kind).itemsize
        count = int(rest[1][1:]) if rest[1][0] == "v" else 1
        names, place = (given[:count], given[count:]) if name == "ld" else (given[-count:], given[:-count])
        base = self.value(place[0], np.uint64).astype(np.int64) + (int(place[1]) if len(place) > 1 else 0)
        for n, register in enumerate(names):
            at = (base + n * size)[:, None] + np.arange(size)
            if name == "ld":
                found = self.memory[np.where(where[:, None], at, 0)].view(kind)[:, 0]
                self.put(register, found, where)
            else:
                self.memory[at[where]] = self.value(register, kind)[where].copy().view(np.uint8).reshape(-1, size)
        return None


@triton.jit
def again(matrix, x, out, K, BK: tl.constexpr):
    """out = x again: matrix out = matrix x, the right-hand side a sum as the gradient's is."""
    j = tl.arange(0, BK)
    inside = (j < K)[:, None] & (j < K)[None, :]
    square = tl.load(matrix + j[:, None] * K + j[None, :], mask=inside, other=0.0)
    square += tl.where((j[:, None] == j[None, :]) & ~inside, 1.0, 0.0)  # as a prior beside padding
    right = tl.sum(square * tl.load(x + j, mask=j < K, other=0.0)[None, :], 1)
    tl.store(out + j, solve(square, right, BK), mask=j < K)


def worst(K: int, warps: int, seeds: int = 8) -> float:
    """The largest relative error of `again` in float32; NaN where a solve is."""
    signature = {"matrix": "*fp32", "x": "*fp32", "out": "*fp32", "K": "i32", "BK": "constexpr"}
    source = ASTSource(
        again, signature, {(4,): triton.next_power_of_2(K)}, {(n,): [["tt.divisibility", 16]] for n in range(3)}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    errors = []
    for seed in range(seeds):
        make = np.random.default_rng(seed)
        keys, x = make.normal(size=(4 * K, K)) / K**0.5, make.normal(size=K).astype(np.float32)
        matrix = (np.eye(K) + keys.T @ keys).astype(np.float32)
        block = Block(compiled.asm["ptx"], warps, [0, SPACE // 8, SPACE // 4, K])
        block.memory[: 4 * K * K] = matrix.reshape(-1).view(np.uint8)
        block.memory[block.arguments[1] :][: 4 * K] = x.view(np.uint8)
        out = block.run()[block.arguments[2] :][: 4 * K].view(np.float32)
        errors.append(np.linalg.norm(out - x) / np.linalg.norm(x))
    return float(np.max(errors))


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        print(json.dumps({K: worst(K, warps) for K, warps in ((3, 2), (12, 2), (20, 2), (40, 4))}))
