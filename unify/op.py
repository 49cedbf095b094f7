"""Triple -> Op: a checked callable that runs a recurrence on torch tensors."""

from __future__ import annotations

import warnings
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch.utils import _pytree

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
GATES = ("g", "g_importance", *POSITIVE, *NOT_NEGATIVE)  # what decides about other numbers: keep it in float32


@dataclass(frozen=True)
class Op:
    """One triple, ready to run. Made by `compile`; printable at every stage (`triple`, `recurrence`, `structure`, `plan`).

    backend: "torch" (chunk-parallel where the plan has such a form, the token loop where it has none or there is but one
        token), "triton" (printed kernels; on a CPU only in Triton's interpreter), "reference" (the float64 token loop,
        whatever the plan says), or "auto" (triton for tensors on a GPU, torch elsewhere).
    checked: whether values (NaN, sign) are checked besides shapes and dtypes; None checks on a CPU only, because a look
        at values makes a GPU wait.
    """

    triple: Triple
    recurrence: Recurrence
    structure: Structure
    plan: Plan
    backend: str
    checked: bool | None = None
    state_type: type = field(init=False, repr=False, compare=False)  # the named tuple of this op's states
    constant: _Constant = field(init=False, repr=False, compare=False)  # made ahead: torch.compile makes neither

    def __post_init__(self):
        object.__setattr__(self, "state_type", namedtuple("State", [s.name for s in self.recurrence.states]))
        object.__setattr__(self, "constant", _Constant(self))

    def __reduce__(self):
        return _compile, (self.triple, self.backend, self.checked)  # derived again where it is unpickled

    @property
    def source(self) -> str:
        """What is printed from the recurrence, its equations as comments: the token step in torch for the backends "torch"
        and "reference", the step and its adjoint in Triton for "triton", both for "auto". Raises UnifyError where a
        kernel cannot be printed and nothing else is asked for."""
        from .lower import torch as on_torch

        if self.backend in ("torch", "reference"):
            return on_torch.source(self.recurrence)
        from .lower.triton import leaves

        try:
            kernels = leaves(self.recurrence)
        except UnifyError as error:
            if self.backend == "triton":
                raise
            kernels = f"# no Triton: {error}\n"
        return kernels if self.backend == "triton" else f"{on_torch.source(self.recurrence)}\n\n{kernels}"

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
        Returns o [B, T, H, V] in q's dtype; then the variance [B, T, H, V] if asked for; then the final state, at least
        float32. Gates and precisions belong in float32 beside narrower q, k and v; autocast changes nothing in here.
        Raises UnifyError for an argument the triple does not use, a missing one, a wrong shape, dtype or value.
        """
        inputs = {"q": q, "k": k, "v": v, **gates}
        options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
        options = {name: x for name, x in options.items() if x is not None}  # no place for None among a graph's inputs
        inputs = {name: x for name, x in inputs.items() if x is not None}
        if torch.compiler.is_compiling():
            out = torch._dynamo.nonstrict_trace(_traced)(self.constant, inputs, return_variance, options)
        else:
            out = self._run(inputs, return_variance, **options)
        shown = out[: 1 + return_variance]
        final = (self.state_type(*out[1 + return_variance :]),) if output_final_state else ()
        return (*shown, *final) if len(shown) + len(final) > 1 else out[0]

    # -- running ------------------------------------------------------------------------------------------------------

    def _chosen(self, q) -> str:
        return self.backend if self.backend != "auto" else "triton" if q.is_cuda else "torch"

    def _run(self, inputs, variance, traced=False, *, scale=None, initial_state=None, cu_seqlens=None) -> tuple:
        """Check and run: (o, the variance if wanted, *final states). traced: for a graph, where nothing has a value."""
        sizes = self._check(inputs)
        scale, q = self._scale(scale, sizes), inputs["q"]
        if not traced and (self.checked or (self.checked is None and q.device.type == "cpu")):
            self._check_values(inputs)
        backend = self._chosen(q)
        on_triton = backend == "triton"
        offsets = None if cu_seqlens is None else self._offsets(cu_seqlens, sizes, q, on_triton, traced)
        double = q.dtype == torch.float64 or backend == "reference"
        count = sizes["B"] if offsets is None else offsets.shape[0] - 1
        with uncast(q.device.type):
            state = self._initial(initial_state, inputs, count, sizes, torch.float64 if double else torch.float32)
            run = self._triton if on_triton else self._in_graph if traced else self.schedules
            o, var, final = run(inputs, state, offsets, variance, scale)
        return (o, var, *final) if variance else (o, *final)

    def _triton(self, inputs: dict, state: tuple, offsets: Any, variance: bool, scale: float):
        """Printed kernels take packed sequences and half precision as they are; states are at least float32."""
        from .lower.launch import run

        if offsets is None:
            batch, length, device = *inputs["q"].shape[:2], inputs["q"].device
            offsets = torch.arange(0, batch * length + 1, length, device=device)
        return run(self.recurrence, self.structure, self.plan, inputs, state, offsets, scale, variance)

    def _in_graph(self, inputs: dict, state: tuple, offsets: Any, variance: bool, scale: float):
        """`schedules` as one node of a graph."""
        from .lower.graph import run

        return run(self, inputs, state, offsets, variance, scale)

    def schedules(self, inputs: dict, state: tuple, offsets: Any, variance: bool, scale: float):
        """The chunk-parallel form or, without one and for a single token, the token loop, in the states' type.

        inputs: the arguments; state: one tensor [N, H, ...] each; offsets: of N packed sequences, or None for N = B.
        Returns o and the variance (or None) in q's dtype, and the final states.
        """
        dtype = inputs["q"].dtype
        inputs = {name: x.to(state[0].dtype) for name, x in inputs.items()}
        if offsets is None:
            o, var, final = self._schedule(inputs, state, scale, variance)
        else:
            o, var, final = self._packed(inputs, state, scale, variance, offsets.tolist())
        return o.to(dtype), var.to(dtype) if variance else None, final

    def _schedule(self, inputs: dict, state: tuple, scale: float, variance: bool):
        if self.backend != "reference" and self.plan.chunked and inputs["q"].shape[1] > 1:  # one token is one step
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
            parts.append(self._schedule(cut, tuple(s[at : at + 1] for s in state), scale, variance))
        o = torch.cat([p[0] for p in parts], 1)
        var = torch.cat([p[1] for p in parts], 1) if variance else None
        return o, var, tuple(torch.cat(column) for column in zip(*(p[2] for p in parts), strict=True))

    def _scale(self, scale: float | None, sizes: dict) -> float:
        if scale is None:
            scale = self.triple.architecture.scale
        if scale is None:
            return float(sizes["K"] ** -0.5)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
            raise UnifyError(
                f"scale={scale!r}",
                "the query's scale must be a positive number",
                "pass a float above 0, or None for K^-1/2",
            )
        return float(scale)

    def _initial(self, given: Any, inputs: dict, count: int, sizes: dict, dtype: torch.dtype) -> tuple:
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
        for n, (s, dims, start) in enumerate(self._starts):
            want = (count, sizes["H"], *(sizes[d] for d in dims))
            if given is None:
                out.append(_start(start, want[2:], inputs, dtype).expand(want))
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
            out.append(x.to(dtype))
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
        wanted = self._wanted
        if inputs.keys() != wanted.keys():
            self._refuse_names(inputs, {name: x for name, (x, _) in wanted.items()})
        device = getattr(inputs["q"], "device", None)
        for name, x in inputs.items():
            if not torch.is_tensor(x) or not x.is_floating_point():
                found = str(x.dtype) if torch.is_tensor(x) else type(x).__name__
                raise UnifyError(
                    f"{name}: {found}",
                    f"{name} must be a floating-point tensor",
                    "pass float64, float32, bfloat16 or float16",
                )
            if x.device != device:
                raise UnifyError(f"{name} on {x.device}", f"q is on {device}", "put all arguments on one device")
        return self._sizes(inputs)

    def _refuse_names(self, inputs: dict, wanted: dict) -> None:
        takes = f"it takes {', '.join(f'{x.name} {x.shape}' for x in wanted.values())}"
        for name in inputs:
            if name not in wanted:
                raise UnifyError(f"argument {name!r}", f"not used by this triple ({self.brief})", takes)
        for name in wanted:
            if name not in inputs:
                raise UnifyError(f"no argument {name!r}", f"this triple needs it ({self.brief})", takes)

    @cached_property
    def _wanted(self) -> dict:
        """The arguments by name, each with the names of its channels' sizes."""
        return {x.name: (x, tuple(map(_size, x.dims))) for x in self.recurrence.inputs}

    @cached_property
    def _starts(self) -> list:
        """The states, each with the names of its channels' sizes, and the number or the code of what it starts from."""
        from .lower.printer import code

        first = [float(s.initial) if s.initial.is_number else code(s.initial, s.dims) for s in self.recurrence.states]
        return [(s, tuple(map(_size, s.dims)), x) for s, x in zip(self.recurrence.states, first, strict=True)]

    def _sizes(self, inputs: dict) -> dict:
        n = self.triple.architecture.repeats
        for name in ("q", "v"):
            if inputs[name].ndim != 4:
                raise UnifyError(
                    f"{name} {list(inputs[name].shape)}",
                    f"{name} is {self._wanted[name][0].shape}, sequence first",
                    "pass four dimensions",
                )
        batch, length, heads, keys = inputs["q"].shape
        sizes = {"B": batch, "T": length, "H": heads, "K": keys, "V": inputs["v"].shape[-1]}
        if 0 in sizes.values():
            raise UnifyError(f"sizes {sizes}", "an axis is empty", "pass at least one of each")
        lead = {"token": (batch, length, heads), "observation": (batch, n * length, heads), "static": (heads,)}
        for name, x in inputs.items():
            wanted, dims = self._wanted[name]
            want = (*lead[wanted.per], *[sizes[d] for d in dims])
            if x.shape != want:
                differ = [at for at, (a, b) in enumerate(zip(x.shape, want, strict=False)) if a != b]
                axis = f"axis {differ[0]}" if x.ndim == len(want) else "the number of axes"
                raise UnifyError(
                    f"{name} {list(x.shape)}",
                    f"{axis} does not fit q {list(inputs['q'].shape)}",
                    f"{name} is {wanted.shape} = {list(want)}",
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

    def _offsets(self, cu_seqlens: Any, sizes: dict, q: Any, on_triton: bool, traced: bool):
        """The caller's offsets, checked, as int64 beside q; their values only where a look costs nothing or is needed."""
        if (
            not torch.is_tensor(cu_seqlens)
            or cu_seqlens.ndim != 1
            or cu_seqlens.dtype not in (torch.int64, torch.int32)
            or cu_seqlens.shape[0] < 2
        ):
            raise UnifyError(
                f"cu_seqlens={cu_seqlens!r}",
                "offsets of packed sequences are a vector of integers",
                f"pass an int64 tensor [0, ..., {sizes['T']}], strictly increasing",
            )
        if sizes["B"] != 1:
            raise UnifyError(
                f"cu_seqlens with B={sizes['B']}",
                "packed sequences lie one after the other in one batch row",
                "flatten to B = 1",
            )
        if not traced and (not on_triton or q.device.type == "cpu"):
            check_offsets(cu_seqlens.tolist(), sizes["T"])
        return cu_seqlens.to(device=q.device, dtype=torch.int64)

    @property
    def brief(self) -> str:
        """The triple in one line, for messages."""
        p, a = self.triple.posterior, self.triple.architecture
        return f"forgetting {a.forgetting}, value {a.value}, curvature {p.curvature}, anchor {p.anchor}"


def check_offsets(offsets: list[int], length: int) -> None:
    """Whether offsets cut `length` tokens into sequences of at least one. Raises UnifyError where they do not."""
    if offsets[0] != 0 or offsets[-1] != length or any(b <= a for a, b in pairwise(offsets)):
        raise UnifyError(
            f"cu_seqlens={offsets if len(offsets) < 9 else '...'}",
            f"the offsets do not cut T = {length} into sequences",
            f"pass an int64 tensor [0, ..., {length}], strictly increasing",
        )


class _Constant:
    """An op inside a graph of torch.compile: a constant, and another op is another graph."""

    def __init__(self, op: Op):
        self.op = op

    def __eq__(self, other):
        return isinstance(other, _Constant) and self.op == other.op

    def __hash__(self):
        return hash((self.op.triple, self.op.backend, self.op.checked))


_pytree.register_constant(_Constant)


def uncast(device: str):
    """Autocast switched off, where there is such a thing: the arguments' dtypes say what may be narrow, and sums never are."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _traced(constant: _Constant, inputs: dict, variance: bool, options: dict) -> tuple:
    """A call whose Python torch.compile does not read: of the torch backend one operator is left, of kernels theirs and what joins them."""
    try:
        return constant.op._run(inputs, variance, True, **options)
    except UnifyError as error:  # dynamo raises an error of its own in its place
        warnings.warn(str(error), stacklevel=2)
        raise


@cache
def _size(d) -> str:
    from .symbols import SIZE

    return str(SIZE[d])


def _start(value: float | str, shape: tuple, inputs: dict, dtype: torch.dtype):
    """A state before the first token: a number, or what the code makes of an argument of the prior's."""
    if isinstance(value, float):
        return inputs["q"].new_full(shape, value, dtype=dtype)
    return eval(value, {"torch": torch, **inputs}).to(dtype)


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
