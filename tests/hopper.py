"""Compiles every kernel that some ops launch for a Hopper GPU, without one: what the compiler says about them, as JSON.

python tests/hopper.py MODEL:K:V[:DTYPE] ...    each on bfloat16 arguments or of that type, forward and backward, the second time with
                                                its variance; "planted", "uneven" and "refused" are kernels with a fault
python tests/hopper.py random:N                 what N random triples launch

Run as a process of its own, because the test session's kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoGPU:
    """A driver that knows for which GPU to compile, and launches nothing."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def refilled_early(code: str) -> list[str]:
    """Buffers of operands of asynchronous products with fewer places than others in the same pipelined loop: such a one is
    refilled for the next turn while the product of this turn may still be reading it. code: in Triton's GPU dialect."""
    places = {m[1]: int(m[2]) for m in re.finditer(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", code)}
    root = {name: name for name in places}
    for m in re.finditer(r"(%\S+) = ttg\.memdesc_(?:index|trans|subslice|reshape) (%\w+)", code):
        if m[2] in root:
            root[m[1]] = root[m[2]]
    products = re.finditer(r"= ttng\.warp_group_dot (%\w+), (%\w+), %\S+ \{[^}]*isAsync = true", code)
    used = {root[x] for m in products for x in m.groups() if x in root}
    return sorted(x for x in used if places[x] < max(2, *(places[y] for y in used)))


def uneven_sums(code: str) -> int:
    """How often a lane adds a product of its own, not rounded, to one of another lane's: the sums they hold then differ, see
    `tile.inner`. code: PTX."""
    others = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+),", code))
    return sum(m[1] in others for m in re.finditer(r"fma\.rn\.f32\s+%r\d+, %r\d+, %r\d+, (%r\d+);", code))


@triton.jit
def uneven(x, out, N, C: tl.constexpr):
    """A sum of products, one a lane: rows that start anywhere are not loaded four channels at once."""
    i = tl.arange(0, C)
    square = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(out + i, tl.sum(square * square, 1))


@triton.jit
def planted(x, y, out, N, C: tl.constexpr):
    """A sum of products, and a sum over one of their operands: one load with two uses."""
    i = tl.arange(0, C)
    total, extra = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for at in range(0, N, C):
        first = tl.load(x + i[:, None] * N + at + i[None, :])
        second = tl.load(y + i[:, None] * N + at + i[None, :])
        total += tl.dot(first, tl.trans(second))
        extra += tl.sum(second.to(tl.float32), 1)
    tl.store(out + i[:, None] * C + i[None, :], total + extra[None, :])


@triton.jit
def refused(x, C: tl.constexpr):
    """A product that no compiler takes."""
    i = tl.arange(0, C)
    tile = tl.load(x + i[:, None] * C + i[None, :])
    tl.store(x + i[:, None] * C + i[None, :], tl.dot(tile, i[None, :]))


def attempt(triple, K: int, V: int, dtype: str, H: int = 16) -> None:
    """Everything an op launches, forward and backward: walks over whole sequences, and in pieces; then states and the variance."""
    from unify.device import Case, draw, run
    from unify.kernels import chunk
    from unify.op import compile

    op, loop = compile(triple, "triton", checked=False), compile(triple, "reference")
    x, state, offsets = draw(loop, Case((256,), H, K, V, "mixed"), torch.device("cpu"), getattr(torch, dtype), 0)
    cut = chunk.cut
    for pieces in (1, 3):
        chunk.cut = lambda at, programs, pieces=pieces: pieces
        o = op(**{name: y.detach().requires_grad_() for name, y in x.items()})
        o.backward(torch.ones_like(o))
    run(op, x, state, offsets, 0)
    chunk.cut = cut


def strangers(count: int) -> None:
    """Random triples; one may be refused, with a word on what would work."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from unify.errors import UnifyError
    from unify.testing import triples

    sizes = st.sampled_from([(24, 40), (96, 192), (20, 24), (256, 64), (1, 7)])
    types = st.sampled_from(["bfloat16", "float16", "float32"])

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(triples(), sizes, types)
    def attempts(triple, size, dtype):
        try:
            attempt(triple, *size, dtype, H=2)
        except UnifyError as refusal:
            if "backend='torch'" not in str(refusal):
                raise

    attempts()


def launch(name: str) -> None:
    """Everything a model launches: MODEL:K:V[:DTYPE], or random triples, or a planted fault."""
    if name == "uneven":
        uneven[(1,)](torch.zeros(32, 33), torch.zeros(32), 33, C=32)
        return
    if name == "refused":
        refused[(1,)](torch.zeros(64, 64), C=64)
        return
    if name == "planted":
        x = torch.zeros(64, 256, dtype=torch.bfloat16)
        planted[(1,)](x, x, torch.zeros(64, 64), 256, C=64, num_warps=4, num_stages=2)
        return
    from unify.kernels import direct, elementwise
    from unify.models.zoo import get

    direct.KNOWN = 0  # every launch comes by here
    tile = elementwise._Launch.tile
    elementwise._Launch.tile = lambda self, shape: (options := tile(self, shape))[0].update(FAST=True) or options
    model, *sizes = name.split(":")
    if model == "random":
        strangers(int(sizes[0]))
    else:
        K, V, dtype = (*sizes, "bfloat16")[:3]
        attempt(get(model).triple, int(K), int(V), dtype)
    elementwise._Launch.tile = tile


def main(names: list[str]) -> None:
    driver.set_active(NoGPU())
    run, found, current = JITFunction.run, [], ""

    def only_compile(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        facts = {"early": refilled_early(kernel.asm["ttgir"]), "uneven": uneven_sums(kernel.asm["ptx"])}
        found.append({"of": current, "kernel": self.fn.__name__, "shared": kernel.metadata.shared, **facts})
        return kernel

    JITFunction.run = only_compile
    for current in names:
        launch(current)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
