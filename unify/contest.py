"""Who runs in the benchmark on a GPU, on which arguments, and the check that comes before any timing.

Ours are ops of the zoo; each may have a counterpart in flash-linear-attention that computes the same recurrence from the
same arguments. Both are compared with the float64 token loop on the device before either is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UnifyError
from .op import Op, compile
from .symbols import SIZE

Call = Callable[[Mapping[str, Tensor]], Tensor]


class Size(NamedTuple):
    """Batch, tokens, heads, key and value channels of a head."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self):
        return "x".join(map(str, self))


SIZES = (Size(2, 4096, 16, 96, 192), Size(8, 2048, 16, 48, 48), Size(1, 32768, 8, 128, 128))
"""The Palimpsa authors' layer of a model of 760M parameters; many short sequences; one long one."""

CHECKED = (
    208  # tokens compared first: three chunks and a part of one, and a multiple of 16, as Triton specializes on that
)
TOLERANCE = 1e-2  # of the norm, output and every gradient: bfloat16 arguments, float32 sums
DTYPE = torch.bfloat16  # of all that comes per token, gates included; what is learned per head stays float32
RANGES = {"g": (1e-3, 0.3), "importance": (1e-2, 1.0), "beta": (0.0, 1.0), "prior_precision": (0.5, 2.0)}
"""-g and importance are drawn log-uniformly, beta and the prior's precision uniformly."""


@dataclass(frozen=True)
class Contestant:
    """One function to time.

    name: how the record calls it. model: the model of the zoo whose arguments it takes. module: where the function of
    that name is imported from, for one that is not ours. renamed: our name of an argument -> its own. options: more of it.
    """

    name: str
    model: str
    module: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is an op of the zoo."""
        return not self.module

    def prepare(self) -> Call:
        """The function, arguments by our names -> o [B, T, H, V]; imports what it needs."""
        if self.ours:
            op = self.op()
            return lambda given: op(**given)
        function = getattr(import_module(self.module), self.name)
        return lambda given: function(**{self.renamed.get(n, n): x for n, x in given.items()}, **self.options)[0]

    def op(self, backend: str = "auto") -> Op:
        """Our op of the model."""
        from .models import zoo

        return compile(zoo.get(self.model).triple, backend)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What it is timed at: flash-linear-attention's MesaNet takes V = K only, so both run there."""
        return tuple(s._replace(V=s.K) if self.model == "mesanet" else s for s in SIZES)


MODELS = "palimpsa palimpsa_key mamba2 gla gated_deltanet kda meta_gdn mesanet".split()
_RIVALS = (  # all sequence first, no normalization of q and k inside, q scaled by K^-1/2 where nothing else is said
    Contestant("chunk_simple_gla", "mamba2", "fla.ops.simple_gla", options={"scale": 1.0}),
    Contestant("chunk_gla", "gla", "fla.ops.gla"),
    Contestant("chunk_gated_delta_rule", "gated_deltanet", "fla.ops.gated_delta_rule"),
    Contestant("chunk_kda", "kda", "fla.ops.kda"),
    Contestant("chunk_mesa_net", "mesanet", "fla.ops.mesa_net", renamed={"prior_precision": "lamb"}),
)
CONTESTANTS = {c.name: c for c in (*map(Contestant, MODELS, MODELS), *_RIVALS)}
RIVAL = {c.model: c.name for c in _RIVALS} | {"meta_gdn": "chunk_kda"}
"""A model's counterpart; meta-GDN's has another recurrence with the same work: one key read, one written, decay per key."""


def lineup(only: list[str], rivals: bool) -> list[str]:
    """Names of contestants in the order they run: each of ours is followed by its counterpart, unless `rivals` is off.

    only: names of contestants, or nothing for all of ours. Raises UnifyError for an unknown one.
    """
    for name in only:
        if name not in CONTESTANTS:
            raise UnifyError(f"--only {name}", "nothing of that name is timed", f"use some of {', '.join(CONTESTANTS)}")
    found = [x for name in only or MODELS for x in (name, *([RIVAL[name]] if rivals and name in RIVAL else []))]
    return list(dict.fromkeys(found))


def draw(op: Op, size: Size, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments as a trained layer would give them: keys of length 1, memories of 3 to 1000 tokens."""
    make = torch.Generator(device).manual_seed(seed)
    out = {}
    for x in op.recurrence.inputs:
        lead = (size.H,) if x.per == "static" else (size.B, size.T, size.H)
        shape = (*lead, *(getattr(size, str(SIZE[d])) for d in x.dims))
        dtype = torch.float32 if x.per == "static" else DTYPE
        out[x.name] = _draw(x.name, shape, make).to(dtype)
    return out


def _draw(name: str, shape: tuple[int, ...], make: torch.Generator) -> Tensor:
    if name not in RANGES:
        x = torch.randn(shape, generator=make, device=make.device, dtype=DTYPE)
        return x / x.norm(dim=-1, keepdim=True) if name == "k" else x
    low, high = RANGES[name]
    share = torch.rand(shape, generator=make, device=make.device)
    if name in ("g", "importance"):
        x = torch.exp(log(low) + log(high / low) * share)
        return -x if name == "g" else x
    return low + (high - low) * share


class WrongResultError(Exception):
    """A contestant computed something else than the token loop."""


def outcome(call: Call, given: Mapping[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    """o, and with weights [B, T, H, V] the gradient of (weights * o).sum() for every argument."""
    if weights is None:
        with torch.no_grad():
            return {"o": call(given)}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    o = call(leaves)
    slopes = torch.autograd.grad(o, list(leaves.values()), weights.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": slope for name, slope in zip(leaves, slopes, strict=True)}}


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """norm(found - exact) / norm(exact) of each tensor; infinite where one is not a number."""
    gap = {name: (found[name].double() - x).norm() / x.norm() for name, x in exact.items()}
    return {name: x.nan_to_num(nan=torch.inf).item() for name, x in gap.items()}


def accept(found: Mapping[str, float], what: str) -> float:
    """The largest error. Raises WrongResultError where it passes the tolerance."""
    worst = max(found, key=found.__getitem__)
    if not found[worst] <= TOLERANCE:
        raise WrongResultError(f"{worst} is off by {found[worst]:.1e} {what}, {TOLERANCE:.0e} is allowed")
    return found[worst]


def check(contestant: Contestant, call: Call, size: Size, measure: str, device: str) -> dict[str, float]:
    """Errors of `call` against the float64 token loop at that size and `CHECKED` tokens.

    measure: "forward" compares the output, "both" every gradient as well.
    """
    op = contestant.op("reference")
    size = size._replace(T=CHECKED)
    given = draw(op, size, device, seed=1)
    make = torch.Generator(device).manual_seed(2)
    weights = torch.randn(given["v"].shape, generator=make, device=device, dtype=DTYPE) if measure == "both" else None
    found = outcome(call, given, weights)
    exact = outcome(lambda x: op(**x), {name: x.double() for name, x in given.items()}, weights)
    return errors(found, exact)
