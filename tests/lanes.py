"""Runs a kernel compiled for a Hopper GPU lane by lane, without one: Triton's interpreter has one copy of a vector, a GPU's lanes many.

python tests/lanes.py    solves squares with `tile.solve`, inverts scores with `rank_one._invert`: the worst relative errors as JSON

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

from unify.kernels.rank_one import _invert
from unify.kernels.tile import solve

TYPES = {
    "b16": np.uint16,
    "u16": np.uint16,
    "bf16": np.uint16,
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


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of a bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Bytes of the words b, a as the selector's four digits say; their eighth bits, which would repeat a sign, are not known here."""
    assert not (selector & 0x8888).any()
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    picked = [
        (both >> (8 * (selector.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(7)))) & np.uint64(255)
        for n in range(4)
    ]
    return sum(x << np.uint64(8 * n) for n, x in enumerate(picked)).astype(np.uint32)


def pairs(words: np.ndarray) -> np.ndarray:
    """Two bfloat16 a word, the lower half first."""
    return widened(np.stack([words & 0xFFFF, words >> 16], -1))


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
        if name in ("mma", "ldmatrix"):
            return self.multiply(given) if name == "mma" else self.matrices(rest, given)
        if (
            name == "mov" and len(given) == 3 and given[0].startswith(("%rs", "_"))
        ):  # a word taken apart, perhaps one half of it
            word = self.value(given[2], np.uint32)
            self.put(given[0], (word & 0xFFFF).astype(np.uint16), where)
            return self.put(given[1], (word >> 16).astype(np.uint16), where)
        if name == "mov" and len(given) == 3:
            low, high = (self.value(x, np.uint16).astype(np.uint32) for x in given[1:])
            x = low | high << 16
        elif name == "prmt":
            x = permuted(*(self.value(y, np.uint32) for y in given[1:]))
        elif name == "cvt" and "bf16x2" in rest:
            high, low = (rounded(self.value(y, np.float32)).astype(np.uint32) for y in given[1:])
            x = low | high << 16
        elif name == "cvt" and "bf16" in rest:
            x = (
                widened(self.value(given[1], np.uint16))
                if rest[-1] == "bf16"
                else rounded(self.value(given[1], np.float32))
            )
        elif name == "shfl":
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

    def multiply(self, given: list[str]) -> None:
        """m16n8k16 of bfloat16, sums in float32: lane 4 g + t holds rows g and g + 8, columns 2 t, 2 t + 1 and 8 on."""
        g, t = self.lane // 4, self.lane % 4 * 2
        A, B, C = (np.zeros((len(self.lane) // 32, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        warp, row = self.lane // 32, g % 8
        for n in range(4):
            word = pairs(self.value(given[4 + n], np.uint32))
            for half in range(2):
                A[warp, row + 8 * (n % 2), t + half + 8 * (n // 2)] = word[:, half]
                if n < 2:
                    B[warp, t + half + 8 * n, row] = pairs(self.value(given[8 + n], np.uint32))[:, half]
            C[warp, row + 8 * (n // 2), t + n % 2] = self.value(given[10 + n], np.float32)
        D = (A.astype(np.float64) @ B + C).astype(np.float32)
        for n in range(4):
            self.put(given[n], D[warp, row + 8 * (n // 2), t + n % 2], True)

    def matrices(self, rest: list[str], given: list[str]) -> None:
        """Squares of 8 from shared memory, the rows of square n at the addresses of lanes 8 n on."""
        count = int(rest[3][1:])
        base = self.value(given[count], np.uint64).astype(np.int64) + (int(given[-1]) if len(given) > count + 1 else 0)
        for n in range(count):
            at = base.reshape(-1, 32)[:, 8 * n : 8 * n + 8]  # of each warp
            squares = self.memory[at[..., None] + np.arange(16)].view(np.uint16)  # [warp, row, column]
            squares = squares.swapaxes(1, 2) if "trans" in rest else squares
            words = np.ascontiguousarray(squares).view(np.uint32)  # [warp, row, 4]
            self.put(given[n], words.reshape(-1), True)

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


def inverse(n: int, seeds: int = 2) -> float:
    """The largest error of `_invert` on bfloat16 scores of n tokens, as a part of the largest entry, before it is rounded."""
    names = "A inverse offsets N H C DT ACC".split()
    types = dict(zip(names, ("*bf16", "*fp32", "*i64", "i32", "i32", *3 * ("constexpr",)), strict=True))
    source = ASTSource(
        _invert.kernel,
        types,
        {(5,): 64, (6,): tl.bfloat16, (7,): tl.float32},
        {(x,): [["tt.divisibility", 16]] for x in range(3)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    errors = []
    for seed in range(seeds):
        keys = np.random.default_rng(seed).normal(size=(n, 12))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        bits = np.zeros((n, 64), np.uint16)
        bits[:, :n] = rounded(np.tril(1.8 * keys @ keys.T, -1).astype(np.float32))
        block = Block(compiled.asm["ptx"], 1, [0, SPACE // 8, SPACE // 4, 1, 1])
        block.memory[: bits.nbytes] = bits.reshape(-1).view(np.uint8)
        block.memory[SPACE // 4 :][:16] = np.array([0, n]).view(np.uint8)
        found = block.run()[SPACE // 8 :][: 4 * 64 * n].view(np.float32).reshape(n, 64)[:, :n]
        wanted = np.linalg.inv(np.eye(n) + widened(bits)[:, :n].astype(np.float64))
        errors.append(np.abs(found - wanted).max() / np.abs(wanted).max())
    return float(np.max(errors))


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        print(json.dumps({
            "solve": {K: worst(K, warps) for K, warps in ((3, 2), (12, 2), (20, 2), (40, 4))},
            "inverse": {n: inverse(n) for n in (64, 37)},
        }))  # fmt: skip
