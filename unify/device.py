"""The Triton backend on a device, against the float64 loop on that device: what `verify(model, device=...)` adds.

Everything is compared at once: outputs, variance, final states and every gradient, initial states included, as
||found - exact|| / ||exact||. In bfloat16 the gates and precisions stay float32, as a model passes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from .errors import UnifyError
from .op import GATES, Op
from .testing import random_inputs, random_state

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""The largest relative error that is rounding."""

CONDITION = 4.0
"""A result in bfloat16 may be off by so many times what half a last place of its arguments does to it, where that is more: the
gradient of a decay that all tokens share is a sum over them that may cancel (RetNet's by 25 times in one of the cases)."""

FLOOR = 1e-6
"""What is smaller than this share of the largest result, such as a gradient behind a closed gate, counts as this large."""


@dataclass(frozen=True)
class Case:
    """Packed sequences to run: their lengths, the sizes, and a regime of `testing.GATES`."""

    lengths: tuple[int, ...]
    H: int
    K: int
    V: int
    gates: str

    def __str__(self):
        return f"lengths {' '.join(map(str, self.lengths))}, H {self.H}, K {self.K}, V {self.V}, {self.gates} gates"


# One odd size for all gates, because a kernel is compiled for each; several chunks, and sequences that end inside one.
REAL = (
    Case((1, 63, 64, 65, 257), 2, 40, 72, "mixed"),
    Case((1, 130, 319), 2, 40, 72, "weak"),
    Case((1, 130, 319), 2, 40, 72, "strong"),
    Case((128, 384), 2, 64, 128, "moderate"),
)
TINY = (Case((1, 2, 66), 1, 3, 5, "mixed"), Case((1, 35), 1, 3, 5, "weak"), Case((1, 35), 1, 3, 5, "strong"))


def usable(device: str) -> torch.device:
    """The device, if Triton runs on it: a GPU, or the CPU in Triton's interpreter. Raises UnifyError otherwise."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UnifyError(f"device={device!r}", "kernels run on CUDA GPUs, or interpreted on a CPU", "use cuda or cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnifyError(
            f"device={device!r}",
            "torch finds no GPU",
            "install a CUDA build of torch on a machine with one, or use device='cpu', Triton's interpreter",
        )
    if kind == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        other = interpreted() != (kind == "cpu")
    except ImportError as error:
        raise UnifyError(
            f"device={device!r}", f"Triton cannot be imported ({error})", "install triton 3.6 or later"
        ) from error
    if other:
        works = "set TRITON_INTERPRET=1 before" if kind == "cpu" else "unset TRITON_INTERPRET and"
        raise UnifyError(f"device={device!r}", "Triton is loaded for the other kind of device", f"{works} start Python")
    return torch.device(device)


def interpreted() -> bool:
    """Whether Triton was imported as an interpreter. Raises ImportError where it is missing."""
    import triton

    return triton.knobs.runtime.interpret


def versions(device: str) -> str:
    """What ran: GPU, Triton and torch."""
    import triton

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "Triton's interpreter"
    return f"{name}, Triton {triton.__version__}, torch {torch.__version__}"


def checks(loop: Op, kernels: Op, device: str, seed: int) -> dict[str, Callable[[], tuple[float, str]]]:
    """The checks by name: each returns its worst relative error and a note, or raises AssertionError.

    fp32      the kernels with ieee dots, outputs and all gradients, against the float64 loop
    bf16      the same with every argument but gates and precisions in bfloat16
    parts     a sequence cut into prefill, single tokens and the rest, and packed beside others: the whole's numbers
    repeat    the same call twice: the same bits
    """
    at = usable(device)
    cases = REAL if at.type == "cuda" else TINY
    return {
        "fp32": lambda: _exact(loop, kernels, at, seed, cases, torch.float32),
        "bf16": lambda: _exact(loop, kernels, at, seed, cases, torch.bfloat16),
        "parts": lambda: _parts(loop, kernels, at, seed, cases[0]),
        "repeat": lambda: _repeat(loop, kernels, at, seed, cases[0]),
    }


def draw(op: Op, case: Case, device: torch.device, dtype: torch.dtype, seed: int):
    """Arguments in `dtype` (gates and precisions at least in float32), states in float32, and the offsets.

    op: the loop: a state is one that it reaches, on the CPU, where random numbers are drawn.
    """
    x = random_inputs(op, seed, B=1, T=sum(case.lengths), H=case.H, K=case.K, V=case.V, gates=case.gates)
    per = {y.name: y.per for y in op.recurrence.inputs}
    for name in x.keys() & {"g", "g_importance"}:
        if "temperature" in x:  # (-g / tau) ** tau has no derivative where nothing is forgotten
            x[name] = x[name].clamp(max=-1e-3)
        if per[name] == "static":  # nothing but rounding is left of the gradient of a constant that forgets everything
            x[name] = x[name].clamp(min=-3.0)
    state = random_state(op, x, seed, len(case.lengths))
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    wide = torch.promote_types(dtype, torch.float32)
    given = {name: y.to(device, wide if name in GATES else dtype) for name, y in x.items()}
    return given, tuple(y.to(device, wide) for y in state), offsets


def run(op: Op, x: dict[str, Tensor], state: tuple, offsets: Tensor, seed: int) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random weighting of all of them, by name; no gradient is zero."""
    x = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    start = [y.detach().clone().requires_grad_() for y in state]
    o, variance, end = op(
        **x, initial_state=tuple(start), cu_seqlens=offsets, return_variance=True, output_final_state=True
    )
    out = {"o": o, "variance": variance, **end._asdict()}
    rng = torch.Generator().manual_seed(seed)
    loss = sum((y.double() * _weight(name, y, rng)).sum() for name, y in out.items())
    grads = torch.autograd.grad(loss, [*x.values(), *start], allow_unused=True)
    for name, y, grad in zip([*x, *(f"initial {n}" for n in end._fields)], [*x.values(), *start], grads, strict=True):
        out[f"d {name}"] = _symmetric(name, torch.zeros_like(y) if grad is None else grad)
    return {name: y.detach() for name, y in out.items()}


def _weight(name: str, y: Tensor, rng: torch.Generator) -> Tensor:
    """What the loss multiplies an output by: the gradient that comes from outside, so exact in every dtype."""
    return _symmetric(name, torch.randn(y.shape, generator=rng).bfloat16().to(y.device, torch.float64))


def _symmetric(name: str, x: Tensor) -> Tensor:
    """A matrix precision is symmetric, and only that part of its gradient means something."""
    return (x + x.mT) / 2 if name.split()[-1] == "P" else x


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """||found - exact|| / ||exact|| by name, `FLOOR` heeded; infinite where NaN is. What is exactly zero has no size of its own,
    and of a sum that should cancel rounding is left: it counts as large as the largest."""
    sizes = {name: y.double().norm().item() for name, y in exact.items()}
    largest = max(sizes.values())
    least = FLOOR * largest
    sizes = {name: size or largest for name, size in sizes.items()}
    gaps = {
        name: (found[name].double() - y.double()).norm().nan_to_num(nan=torch.inf).item() for name, y in exact.items()
    }
    return {name: gap / max(sizes[name], least) if gap else 0.0 for name, gap in gaps.items()}


def compare(
    found: dict[str, Tensor], exact: dict[str, Tensor], allowed: float, what: str, shaken: Callable = dict
) -> float:
    """The worst error. Raises AssertionError that says whose it is, if it is more than allowed.

    shaken: asked where one is: errors by name that rounding of the arguments makes. A result counts as its share of `CONDITION`
    times that, where that is more than allowed.
    """
    every = errors(found, exact)
    if not max(every.values()) <= allowed:
        every = {name: error / max(1.0, CONDITION * shaken().get(name, 0.0) / allowed) for name, error in every.items()}
    worst = max(every, key=every.get)
    if not every[worst] <= allowed:
        raise AssertionError(f"{worst} is off by {every[worst]:.1e}, allowed {allowed:.0e} ({what})")
    return every[worst]


def shake(
    loop: Op, x: dict[str, Tensor], state: tuple, offsets: Tensor, seed: int, exact: dict[str, Tensor]
) -> dict[str, float]:
    """Errors by name of the float64 loop when bfloat16 arguments move by up to half a last place; wider ones stay."""
    rng = torch.Generator().manual_seed(seed)
    moved = {}
    for name, y in x.items():
        share = (torch.rand(y.shape, generator=rng, dtype=torch.float64) - 0.5).to(y.device)
        moved[name] = y.double() * (1 + 2**-8 * share) if y.dtype == torch.bfloat16 else y.double()
    return errors(run(loop, moved, tuple(y.double() for y in state), offsets, seed), exact)


def _exact(loop: Op, kernels: Op, device, seed: int, cases: tuple[Case, ...], dtype) -> tuple[float, str]:
    worst = []
    for case in cases:
        x, state, offsets = draw(loop, case, device, dtype, seed)
        exact = run(loop, {n: y.double() for n, y in x.items()}, tuple(y.double() for y in state), offsets, seed)
        moved = cache(partial(shake, loop, x, state, offsets, seed, exact))
        worst.append(compare(run(kernels, x, state, offsets, seed), exact, ROUNDING[dtype], str(case), moved))
    return max(worst), f"{len(cases)} cases of packed sequences, {cases[0]}"


def _parts(loop: Op, op: Op, device, seed: int, case: Case) -> tuple[float, str]:
    from .verify import everything, tokens

    x, state, offsets = draw(loop, case, device, torch.float32, seed)
    packed = everything(op, x, cu_seqlens=offsets, initial_state=state)
    bounds, found = offsets.tolist(), []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        cuts = sorted({start, *range(max(start, stop - 5), stop - 1), stop})  # prefill, three tokens, the rest
        now = tuple(y[n : n + 1] for y in state)
        for ends in pairwise(cuts):
            found.append(everything(op, tokens(op, x, *ends), initial_state=now))
            now = tuple(found[-1][name] for name in op.state_type._fields)
        found[-1]["end"] = now
    joined = {name: torch.cat([part[name] for part in found], 1) for name in ("o", "variance")}
    ends = zip(*(part["end"] for part in found if "end" in part), strict=True)
    joined |= {name: torch.cat(y) for name, y in zip(op.state_type._fields, ends, strict=True)}
    return compare(joined, packed, ROUNDING[torch.float32], "in parts"), "prefill, three single tokens, the rest"


def _repeat(loop: Op, op: Op, device, seed: int, case: Case) -> tuple[float, str]:
    x, state, offsets = draw(loop, case, device, torch.bfloat16, seed)
    first, second = (run(op, x, state, offsets, seed) for _ in range(2))
    differ = [name for name, y in first.items() if not torch.equal(y, second[name])]
    if differ:
        raise AssertionError(f"{', '.join(differ)} came out differently the second time")
    return 0.0, "outputs and gradients, bit for bit"


__all__ = ["ROUNDING", "Case", "checks", "usable", "versions"]
