"""Compiled kernels launched without asking Triton at every call which of them it is.

`JITFunction.run` binds the arguments to the signature, finds out of each what a kernel may be specialized on, makes a key of all that
and of the options, and looks the compiled kernel up: 6 to 16 us, growing with the arguments. What it finds depends on the type and the
alignment of a tensor, on the value of an integer (1 and multiples of 16 have kernels of their own) and on the values of constants and
options. Those are the key here, values as they are: it may keep apart what Triton joins, and never joins what Triton keeps apart. What
is not known yet goes to Triton.
"""

from __future__ import annotations

from functools import partial

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

KNOWN = 4096  # launches of a kernel that are remembered: lengths of sequences make new ones without end


class Direct:
    """A kernel of `triton.jit` whose tensors and numbers come first and by position, then its constants."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.known = kernel, {}
        self.count = sum(not x.is_constexpr for x in kernel.params)
        self.constants = (None,) * (len(kernel.params) - self.count)  # places that the launcher skips
        if any(x.is_constexpr for x in kernel.params[: self.count]):
            raise TypeError(f"{kernel.fn.__name__} takes a constant ahead of a tensor or number")

    def __getitem__(self, grid: tuple[int, ...]):
        """The kernel on a grid of one or two dimensions, to be called with its arguments and options."""
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments, **options) -> None:
        given, device, runtime = arguments[: self.count], driver.active.get_current_device(), knobs.runtime
        key = (
            tuple([
                (x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else float if isinstance(x, float) else x for x in given
            ]),
            arguments[self.count :], tuple(options), tuple(options.values()),
            device, runtime.debug, knobs.compilation.instrumentation_mode,
        )  # fmt: skip
        compiled = self.known.get(key)
        if compiled is None or runtime.add_stages_inspection_hook is not None:
            compiled = self.kernel.run(*arguments, grid=grid, warmup=False, **options)
            on_nvidia = compiled and compiled.metadata.target.backend == "cuda"  # others look at sizes of tensors too
            if on_nvidia and len(given) == self.count and len(self.known) < KNOWN:
                self.known[key] = compiled
            return
        stream = driver.active.get_current_stream(device)
        compiled.run(
            grid[0], grid[1] if len(grid) > 1 else 1, 1, stream, compiled.function, compiled.packed_metadata,
            compiled.launch_metadata(grid, stream), runtime.launch_enter_hook, runtime.launch_exit_hook, *given, *self.constants,
        )  # fmt: skip


def direct(kernel):
    """Decorator above `triton.jit`; what Triton interprets stays as it is."""
    return Direct(kernel) if isinstance(kernel, triton.JITFunction) else kernel
