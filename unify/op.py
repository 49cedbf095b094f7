"""Triple -> Op: a checked callable that runs a recurrence on torch tensors."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, no_type_check

import torch

from .derive import derive
from .errors import UnifyError
from .plan import Plan, plan
from .recurrence import Recurrence
from .structure import Structure, structure
from .symbols import K, V, concrete
from .triple import Triple

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "reference")
POSITIVE = ("prior_precision", "temperature")
NOT_NEGATIVE = ("beta", "importance", "erase", "noise", "ridge", "gain")


@dataclass(frozen=True)
class Op:
    """One triple, ready to run. Made by `compile`; printable at every stage (`triple`, `recurrence`, `structure`, `plan`).

    backend: "torch" (chunk-parallel where the plan has such a form, the token loop where it has none), "triton" (printed
        kernels; on a CPU only in Triton's interpreter), "reference" (the float64 token loop, whatever the plan says), or
        "auto" (triton for tensors on a GPU, torch elsewhere).
    checked: whether values (NaN, sign) are checked besides shapes and dtypes; None checks on a CPU only, because a look
        at values makes a GPU wait.
    """

    triple: Triple
    recurrence: Recurrence
    structure: Structure
    plan: Plan
    backend: str
    checked: bool | None = None

    @cached_property
    def state_type(self) -> type:
        """The named tuple of this op's states."""
        return namedtuple("State", [s.name for s in self.recurrence.states])

    @property
    def source(self) -> str:
        """The token step as printed from the recurrence, with its equations as comments."""
        from .lower.torch import source

        return source(self.recurrence)

    def explain(self) -> str:
        """Recurrence, structure and plan as text."""
        return f"{self.recurrence}\n\n{self.structure}\nplan         {self.plan}\nbackend      {self.backend}"

    @no_type_check  # the checks below say which leg or axis is at fault; a type checker would get there first
    def __call__(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B nT H K"] | None = None,
        v: Float[Tensor, "B nT H V"] | None = None,
        *,
        scale: float | None = None,
        initial_state: tuple[Float[Tensor, "N H ..."], ...] | None = None,
        output_final_state: bool = False,
        cu_seqlens: Int[Tensor, " N+1"] | None = None,
        return_variance: bool = False,
        **gates: Float[Tensor, ...],
    ):
        """Run the recurrence: o_t = scale * mu_t^T q_t, mu_t the posterior mean of the memory after token t.

        q, k: [B, T, H, K]; v: [B, T, H, V] (k, v: [B, n T, H, ...] for n observations per token, one after the other).
        gates: the triple's other arguments, by name (`op.recurrence.inputs` lists them with shapes): g, the natural
            logarithm of the decay, <= 0; beta, an observation precision, >= 0; importance; prior_precision; ...
        scale: factor on the query; None is the architecture's, or K^-1/2.
        initial_state: one tensor [B, H, ...] per state ([N, H, ...] with N packed sequences), in `state_type`'s order.
        cu_seqlens: int64 offsets [N + 1] of packed sequences, with B = 1.
        Returns o [B, T, H, V] in q's dtype; then the variance [B, T, H, V] if asked for; then the final state.
        Raises UnifyError for an argument the triple does not use, a missing one, a wrong shape, dtype or value.
        """
        inputs = {name: x for name, x in {"q": q, "k": k, "v": v, **gates}.items() if x is not None}
        sizes = self._check(inputs)
        if self.checked or (self.checked is None and q.device.type == "cpu"):
            self._check_values(inputs)
        if self._chosen(q) == "triton":
            return self._triton(
                inputs, sizes, initial_state, output_final_state, cu_seqlens, return_variance, self._scale(scale, sizes)
            )
        offsets = self._offsets(cu_seqlens, sizes)
        wide = torch.float64 if self.backend == "reference" or q.dtype == torch.float64 else torch.float32
        inputs = {name: x.to(wide) for name, x in inputs.items()}
        count = sizes["B"] if offsets is None else len(offsets) - 1
        state = self._initial(initial_state, inputs, count, sizes)
        scale = self._scale(scale, sizes)
        if offsets is None:
            o, var, final = self._run(inputs, state, scale, return_variance)
        else:
            o, var, final = self._packed(inputs, state, scale, return_variance, offsets)
        return self._result(
            o.to(q.dtype), var.to(q.dtype) if return_variance else None, final if output_final_state else None
        )

    def _result(self, o, var, final):
        out = (o,)
        out += (var,) if var is not None else ()
        out += (self.state_type(*final),) if final is not None else ()
        return out if len(out) > 1 else out[0]

    # -- running ------------------------------------------------------------------------------------------------------

    def _chosen(self, q) -> str:
        return self.backend if self.backend != "auto" else "triton" if q.is_cuda else "torch"

    def _triton(
        self, inputs: dict, sizes: dict, initial: Any, final: bool, cu_seqlens: Any, variance: bool, scale: float
    ):
        """Printed kernels take packed sequences and half precision as they are; states are at least float32."""
        from .lower.launch import run

        q = inputs["q"]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        if cu_seqlens is None:
            count, offsets = sizes["B"], torch.arange(sizes["B"] + 1, device=q.device) * sizes["T"]
        else:
            self._check_offsets(cu_seqlens, sizes)
            count, offsets = len(cu_seqlens) - 1, cu_seqlens.to(device=q.device, dtype=torch.int64)
            if q.device.type == "cpu":
                self._offsets(cu_seqlens, sizes)
        state = self._initial(initial, {**inputs, "q": q.to(wide)}, count, sizes)
        o, var, end = run(self.recurrence, self.structure, self.plan, inputs, state, offsets, scale, variance)
        return self._result(o, var, end if final else None)

    def _run(self, inputs: dict, state: tuple, scale: float, variance: bool):
        if self.backend != "reference" and self.plan.chunked:
            from .lower import parallel

            return parallel.run(self.recurrence, self.structure, self.plan, inputs, state, scale, variance)
        from .lower.torch import loop

        return loop(self.recurrence, inputs, state, scale, variance)

    def _packed(self, inputs: dict, state: tuple, scale: float, variance: bool, offsets: list[int]):
        """Each packed sequence by itself, from its own initial state."""
        per, n = {x.name: x.per for x in self.recurrence.inputs}, self.triple.architecture.repeats
        parts = []
        for at, (start, stop) in enumerate(pairwise(offsets)):
            step = {"token": 1, "observation": n}
            cut = {
                name: x if per[name] == "static" else x[:, start * step[per[name]] : stop * step[per[name]]]
                for name, x in inputs.items()
            }
            parts.append(self._run(cut, tuple(s[at : at + 1] for s in state), scale, variance))
        o = torch.cat([p[0] for p in parts], 1)
        var = torch.cat([p[1] for p in parts], 1) if variance else None
        return o, var, tuple(torch.cat(column) for column in zip(*(p[2] for p in parts), strict=True))

    def _scale(self, scale: float | None, sizes: dict) -> float:
        if scale is None:
            scale = self.triple.architecture.scale
        if scale is None:
            return sizes["K"] ** -0.5
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
            raise UnifyError(
                f"scale={scale!r}",
                "the query's scale must be a positive number",
                "pass a float above 0, or None for K^-1/2",
            )
        return float(scale)

    def _initial(self, given: Any, inputs: dict, count: int, sizes: dict) -> tuple:
        """The caller's state, checked, or what the recurrence starts from."""
        q, states = inputs["q"], self.recurrence.states
        if isinstance(given, dict):
            given = self._by_name(given)
        if given is not None and (not isinstance(given, tuple | list) or len(given) != len(states)):
            raise UnifyError(
                f"initial_state of type {type(given).__name__}",
                f"this triple carries {len(states)} state(s)",
                f"pass ({', '.join(f'{s.name} {s.shape}' for s in states)})",
            )
        out = []
        for n, s in enumerate(states):
            want = (count, sizes["H"], *(sizes[_size(d)] for d in s.dims))
            if given is None:
                out.append(_start(s, inputs, sizes, self.recurrence).to(q.dtype).expand(want))
                continue
            x = given[n]
            if not torch.is_tensor(x) or tuple(x.shape) != want or not x.is_floating_point():
                found = f"{x.dtype} {list(x.shape)}" if torch.is_tensor(x) else type(x).__name__
                raise UnifyError(
                    f"initial_state.{s.name}: {found}",
                    f"state {s.name} is {s.shape}",
                    f"pass a floating-point tensor {list(want)}",
                )
            if x.device != q.device:
                raise UnifyError(f"initial_state.{s.name} on {x.device}", f"q is on {q.device}", "move it there")
            out.append(x.to(q.dtype))
        return tuple(out)

    def _by_name(self, given: dict) -> tuple:
        names = [s.name for s in self.recurrence.states]
        if set(given) != set(names):
            raise UnifyError(
                f"initial_state with {sorted(given)}",
                f"this triple carries {', '.join(names)}",
                f"pass exactly {', '.join(names)}",
            )
        return tuple(given[name] for name in names)

    # -- checking -----------------------------------------------------------------------------------------------------

    def _check(self, inputs: dict) -> dict:
        """Names, types and shapes; returns the sizes B, T, H, K, V."""
        wanted = {x.name: x for x in self.recurrence.inputs}
        takes = ", ".join(f"{x.name} {x.shape}" for x in self.recurrence.inputs)
        for name in inputs:
            if name not in wanted:
                raise UnifyError(f"argument {name!r}", f"not used by this triple ({self.brief})", f"it takes {takes}")
        for name in wanted:
            if name not in inputs:
                raise UnifyError(f"no argument {name!r}", f"this triple needs it ({self.brief})", f"it takes {takes}")
        for name, x in inputs.items():
            if not torch.is_tensor(x) or not x.is_floating_point():
                found = str(x.dtype) if torch.is_tensor(x) else type(x).__name__
                raise UnifyError(
                    f"{name}: {found}",
                    f"{name} must be a floating-point tensor",
                    "pass float64, float32, bfloat16 or float16",
                )
            if x.device != inputs["q"].device:
                raise UnifyError(
                    f"{name} on {x.device}", f"q is on {inputs['q'].device}", "put all arguments on one device"
                )
        return self._sizes(inputs, wanted)

    def _sizes(self, inputs: dict, wanted: dict) -> dict:
        n = self.triple.architecture.repeats
        for name in ("q", "v"):
            if inputs[name].ndim != 4:
                raise UnifyError(
                    f"{name} {list(inputs[name].shape)}",
                    f"{name} is {wanted[name].shape}, sequence first",
                    "pass four dimensions",
                )
        batch, length, heads, keys = inputs["q"].shape
        sizes = {"B": batch, "T": length, "H": heads, "K": keys, "V": inputs["v"].shape[-1]}
        if 0 in sizes.values():
            raise UnifyError(f"sizes {sizes}", "an axis is empty", "pass at least one of each")
        for name, x in inputs.items():
            lead = {"token": (batch, length, heads), "observation": (batch, n * length, heads), "static": (heads,)}[
                wanted[name].per
            ]
            want = (*lead, *(sizes[_size(d)] for d in wanted[name].dims))
            if tuple(x.shape) != want:
                differ = [at for at, (a, b) in enumerate(zip(x.shape, want, strict=False)) if a != b]
                axis = f"axis {differ[0]}" if x.ndim == len(want) else "the number of axes"
                raise UnifyError(
                    f"{name} {list(x.shape)}",
                    f"{axis} does not fit q {list(inputs['q'].shape)}",
                    f"{name} is {wanted[name].shape} = {list(want)}",
                )
        return sizes

    def _check_values(self, inputs: dict) -> None:
        for name, x in inputs.items():
            rule = "a number" if name not in (*POSITIVE, *NOT_NEGATIVE, "g", "g_importance") else ""
            if torch.isnan(x).any():
                raise UnifyError(
                    f"{name} holds NaN",
                    f"{name} must be {rule or 'a number'} everywhere",
                    "look upstream, or compile(..., checked=False) to let NaN through",
                )
            if name in ("g", "g_importance") and (x > 0).any():
                raise UnifyError(
                    f"{name} up to {x.max().item():g}",
                    f"{name} is the natural logarithm of a decay in (0, 1]",
                    "pass log(alpha) <= 0",
                )
            if name in NOT_NEGATIVE and (x < 0).any():
                raise UnifyError(
                    f"{name} down to {x.min().item():g}",
                    f"{name} is a precision, a variance or a share",
                    f"pass {name} >= 0",
                )
            if name in POSITIVE and (x <= 0).any():
                raise UnifyError(f"{name} down to {x.min().item():g}", f"{name} divides", f"pass {name} > 0")

    def _offsets(self, cu_seqlens: Any, sizes: dict) -> list[int] | None:
        if cu_seqlens is None:
            return None
        works = self._check_offsets(cu_seqlens, sizes)
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != sizes["T"] or any(b <= a for a, b in pairwise(offsets)):
            raise UnifyError(
                f"cu_seqlens={offsets if len(offsets) < 9 else '...'}",
                f"the offsets do not cut T = {sizes['T']} into sequences",
                works,
            )
        return offsets

    def _check_offsets(self, cu_seqlens: Any, sizes: dict) -> str:
        works = f"pass an int64 tensor [0, ..., {sizes['T']}], strictly increasing"
        if (
            not torch.is_tensor(cu_seqlens)
            or cu_seqlens.ndim != 1
            or cu_seqlens.dtype not in (torch.int64, torch.int32)
            or len(cu_seqlens) < 2
        ):
            raise UnifyError(
                f"cu_seqlens={cu_seqlens!r}", "offsets of packed sequences are a vector of integers", works
            )
        if sizes["B"] != 1:
            raise UnifyError(
                f"cu_seqlens with B={sizes['B']}",
                "packed sequences lie one after the other in one batch row",
                "flatten to B = 1",
            )
        return works

    @property
    def brief(self) -> str:
        """The triple in one line, for messages."""
        p, a = self.triple.posterior, self.triple.architecture
        return f"forgetting {a.forgetting}, value {a.value}, curvature {p.curvature}, anchor {p.anchor}"


def _size(d) -> str:
    from .symbols import SIZE

    return str(SIZE[d])


def _start(state, inputs: dict, sizes: dict, recurrence: Recurrence):
    """A state before the first token: 0, 1, or an argument of the prior's."""
    q = inputs["q"]
    if state.initial.is_number:
        return torch.full([sizes[_size(d)] for d in state.dims], float(state.initial), dtype=q.dtype, device=q.device)
    from .lower.printer import code

    return eval(code(state.initial, state.dims), {"torch": torch, **inputs})


@lru_cache(maxsize=512)
def _compile(triple: Triple, backend: str, checked: bool | None) -> Op:
    recurrence = derive(triple)
    found = structure(recurrence)
    return Op(triple, recurrence, found, plan(found), backend, checked)


def compile(triple: Triple, backend: str = "auto", *, checked: bool | None = None) -> Op:
    """Make a triple callable: derive, find the structure, plan, lower. Cached by the triple.

    backend: "auto", "torch", "triton" or "reference"; see `Op`. Raises UnifyError for anything else.
    """
    if not isinstance(triple, Triple):
        raise UnifyError(
            f"compile({type(triple).__name__})",
            "an op is made from a Triple",
            "pass Triple(architecture, posterior, prior), or zoo.get(name).triple",
        )
    if backend not in BACKENDS:
        raise UnifyError(f"backend={backend!r}", "there is no such backend", f"use one of {', '.join(BACKENDS)}")
    return _compile(triple, backend, checked)


__all__ = ["K", "V", "Op", "compile", "concrete"]
