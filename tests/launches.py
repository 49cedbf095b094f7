"""Launches a kernel directly and through Triton, on arguments of every kind, for a Hopper GPU that is not there: which compiled kernel got
which arguments both ways, as JSON. A second column comes from a launcher that forgets the alignment of tensors.

Run as a process of its own, because the test session's kernels are interpreted.
"""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

from hopper import NoGPU  # first: it sets how kernels run

import torch  # isort: skip
import triton
import triton.language as tl
from triton.runtime import driver

from unify.kernels import direct

seen: list = []


class Recorder(NoGPU):
    """A driver that compiles for a GPU and notes what it is given to launch."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 18, "multiprocessor_count": 132},
        load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
    )

    def launcher_cls(self, source, metadata):
        """What a compiled kernel is run by."""

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            run = [v.data_ptr() if torch.is_tensor(v) else v for v in arguments[:5]]
            seen.append([metadata.hash, metadata.num_warps, launch_metadata.get()["name"], x, y, z, run])

        return launch


@triton.jit
def kernel(x, y, n, m, c, A: tl.constexpr, B: tl.constexpr = 16):
    """Something of every argument."""
    i = tl.arange(0, B)
    tl.store(y + i * m, tl.load(x + i + n) * c + A)


class Careless(direct.Direct):
    """Takes tensors of another alignment for the same."""

    def launch(self, grid, *arguments, **options):
        apart = [v.view(v.dtype) if torch.is_tensor(v) else v for v in arguments]
        for v in apart:
            if torch.is_tensor(v):
                v.data_ptr = lambda: 0
        super().launch(grid, *apart, **options)


def cases():
    """Arguments and options of launches, so that most differ from others in one thing only."""
    x = torch.zeros(4096)
    tensors = x, x[1:], x.bfloat16(), x.bfloat16()[1:], x.double(), x.long()
    numbers = 1, 2, 16, 17, 0, -16, 2**31, 2**33 + 1
    for a, b in product(tensors, tensors[:2]):
        yield (a, b, 2, 2, 0.5, 3), {}
    for n, m in product(numbers, numbers[:4]):
        yield (x, x, n, m, 0.5, 3), {}
    for c in (0.5, 1.0, 2.0, 1, 16, 3):
        yield (x, x, 2, 2, c, 3), {}
    for constant, options in product(
        (3, 3.0, 4, 0.5, 1, True), ({}, {"B": 32}, {"num_warps": 2}, {"num_warps": 2, "B": 32})
    ):
        yield (x, x, 2, 2, 0.5, constant), options
        yield (x, x, 2, 2, 0.5), {"A": constant, **options}


def launched(kernel, arguments, options) -> list:
    """What the driver got to see."""
    seen.clear()
    kernel[3, 2](*arguments, **options)
    return list(seen)


def main() -> None:
    driver.set_active(Recorder())
    ours, careless, found = direct.direct(kernel), Careless(kernel), []
    for round_ in range(2):  # in the second all are known
        for arguments, options in cases():
            ways = [launched(x, arguments, options) for x in (kernel, ours, careless)]
            found.append({"round": round_, "triton": ways[0], "direct": ways[1], "careless": ways[2]})
    print(json.dumps({"launches": found, "known": len(ours.known)}))


if __name__ == "__main__":
    main()
