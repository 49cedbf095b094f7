"""One layer for any triple: what its op takes is made from the hidden state, what it returns goes back into it.

    layer = Layer(zoo.get("gated_deltanet").triple, hidden_size=256, num_heads=4, head_dim=32, expand_v=2)
    y = layer(x)                                     # [B, T, 256], chunk-parallel
    y, state = layer(x, output_state=True)           # then token by token: layer(x_t, state=state, output_state=True)

Which projections and parameters a layer has is read off `op.recurrence.inputs` and the architecture; how each is made
stands in `RECIPES`. No model's name appears here: what a published layer adds to its recurrence are options (`choices`).
"""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unify.distributed import ContextParallel, check_group, context_parallel
from unify.errors import UnifyError
from unify.op import compile
from unify.recurrence import Input
from unify.symbols import SIZE
from unify.triple import Triple

TRITON = importlib.util.find_spec("triton") is not None
CONTENT = ("q", "k", "v", "p", "a", "b")
"""Arguments that carry content: a full projection and the short convolution. All others are gates or parameters."""


@dataclass(frozen=True)
class Recipe:
    """How a raw number becomes an argument of the op.

    to: raw -> a value that the op allows. start: the raw value at the outset, of a static argument the parameter itself,
    of another a bias; None is no bias. full: its projection is not low-rank, because the argument carries content.
    """

    to: Callable[[Tensor], Tensor]
    start: float | None = None
    full: bool = False


def _itself(x: Tensor) -> Tensor:
    return x


def _raw(step: float) -> float:
    """softplus(raw) = step."""
    return math.log(math.expm1(step))


RECIPES = {
    "beta": Recipe(torch.sigmoid),
    "erase": Recipe(torch.sigmoid),
    "write": Recipe(torch.sigmoid),
    "mix": Recipe(torch.sigmoid),
    "importance": Recipe(torch.sigmoid),  # times a scale per head
    "strength": Recipe(torch.sigmoid),  # of the evidence
    "rate": Recipe(torch.sigmoid),  # of a key that is made from another
    "temperature": Recipe(lambda x: torch.sigmoid(x).clamp(min=1e-4), 0.0),  # it divides
    "noise": Recipe(F.softplus, _raw(0.01)),
    "prior_precision": Recipe(torch.exp, 0.0),
    "gain": Recipe(torch.exp, 0.0),
    "ridge": Recipe(torch.exp, math.log(0.02)),
    "bonus": Recipe(_itself, 1.0),
    "prior_mean": Recipe(_itself, 0.0),
    # forgetting; per token and head it is a `Decay`, fixed it is `_retention`
    "g of key": Recipe(lambda x: F.logsigmoid(x) / 16, 0.0),
    "g of complement": Recipe(F.logsigmoid, full=True),  # the key is 1 - alpha
    "g of tempered": Recipe(lambda x: -F.softplus(x), 0.0),  # times the temperature, below
    "g of entry": Recipe(lambda x: -torch.exp(x), math.log(0.01)),
}


def wide(x: Tensor) -> Tensor:
    """At least float32: what gates, norms and precisions are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gate(nn.Module):
    """An argument of the op: a projection of the hidden state, or, where it is static, a parameter of its own.

    rank: of the projection; None is full. learned: whether a static one is a parameter; if not it is a buffer.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: tuple[int, ...],
        hidden_size: int,
        rank: int | None = None,
        *,
        static: bool = False,
        learned: bool = True,
    ):
        super().__init__()
        self.recipe, self.shape = recipe, shape
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank and not static else None
        self.up = None if static else nn.Linear(rank or hidden_size, math.prod(shape), bias=False)
        if learned:
            self.raw = None if recipe.start is None else nn.Parameter(torch.empty(shape))
        else:
            self.register_buffer("raw", torch.empty(shape))

    def start(self) -> dict[str, Tensor]:
        """What its own parameters start from."""
        return {} if self.raw is None else {"raw": torch.full_like(self.raw, self.recipe.start)}

    def forward(self, x: Float[Tensor, "B T D"]) -> Tensor:
        """[B, T, *shape], or [*shape] where it is static; at least float32."""
        if self.up is None:
            return self.recipe.to(wide(self.raw))
        raw = wide(self.up(x if self.down is None else self.down(x))).unflatten(-1, self.shape)
        return self.recipe.to(raw if self.raw is None else raw + wide(self.raw))


class Decay(nn.Module):
    """Forgetting per token and head: g = -exp(A_log) dt, dt = softplus(proj x + dt_bias).

    Starts with A uniform in [1, 16] and dt log-uniform in [1e-3, 1e-1], as Mamba-2 and its successors do.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    def start(self) -> dict[str, Tensor]:
        """What its own parameters start from."""
        dt = torch.exp(math.log(1e-3) + torch.rand_like(self.dt_bias) * math.log(1e-1 / 1e-3))
        return {
            "A_log": torch.log(1 + 15 * torch.rand_like(self.A_log)),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # softplus of it is dt
        }

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """(g, dt), at least float32."""
        dt = F.softplus(wide(self.proj(x)) + wide(self.dt_bias))
        return -torch.exp(wide(self.A_log)) * dt, dt


def _retention(heads: int, like: Tensor) -> Float[Tensor, " H"]:
    """Fixed decays: alpha = 1 - 2^(-5 - h) (RetNet)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=like.device, dtype=wide(like).dtype)))


# --- where sequences begin and end ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Sequences of a batch laid one after the other in one row, which is how an op takes them.

    shape: (B, T) of the batch. cu_seqlens: [N + 1], offsets of the sequences. index: [n], flat positions of the real
    tokens; None if all are. rows: [N], the batch row of each sequence, for its state; None if they are all rows in order.
    """

    shape: tuple[int, int]
    cu_seqlens: Tensor
    index: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    @torch.compiler.disable  # how many sequences there are is known to the data alone
    def of_mask(cls, mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Packing | None:
        """The real tokens of a padded batch, wherever the padding is; None if all are."""
        mask = mask.bool()
        if mask.all():
            return None
        lengths = mask.sum(1)
        rows = lengths.nonzero().flatten()
        offsets = F.pad(lengths[rows].cumsum(0), (1, 0))
        return cls(
            tuple(mask.shape), offsets, mask.flatten().nonzero().flatten(), rows if len(rows) < len(mask) else None
        )

    @classmethod
    @torch.compiler.disable
    def of_positions(cls, position_ids: Int[Tensor, "B T"]) -> Packing | None:
        """Sequences packed in rows, a new one wherever the positions do not go on by one; None if each row is one."""
        ahead = position_ids[:, 1:] != position_ids[:, :-1] + 1
        first = F.pad(ahead, (1, 0), value=True).flatten().nonzero().flatten()
        if len(first) == len(position_ids):
            return None
        return cls(tuple(position_ids.shape), F.pad(first, (0, 1), value=position_ids.numel()))

    def positions(self) -> Int[Tensor, "1 n"]:
        """Each packed token's place in its own sequence."""
        n = math.prod(self.shape) if self.index is None else len(self.index)
        at = torch.arange(n, device=self.cu_seqlens.device)
        return (at - self.cu_seqlens[_sequence(self.cu_seqlens, at)])[None]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, n, ...]."""
        x = x.flatten(0, 1)
        return (x if self.index is None else x[self.index])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, n, ...] -> [B, T, ...], 0 at padding."""
        x = x[0]
        if self.index is not None:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, self.shape)


def _sequence(cu_seqlens: Tensor, at: Tensor) -> Tensor:
    """Which sequence the tokens at some places of a packed row belong to, without a wait for the device."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def short_convolution(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    state: Float[Tensor, "N gap C"],
    cu_seqlens: Int[Tensor, " offsets"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "N gap C"]]:
    """silu of a causal convolution of each channel over the last W tokens, never across sequences.

    state: [N, W - 1, C], what came before each sequence; 0 before the first token. cu_seqlens: with B = 1, as in an op.
    Returns y [B, T, C] and the new state.
    """
    last = _last(x, state.to(x), cu_seqlens)
    if state.shape[1] <= 64 and on_kernels(x):  # as far back as a program's tokens reach
        from unify.kernels.convolution import convolution

        batch, T = x.shape[:2]
        offsets = torch.arange(0, batch * T + 1, T, device=x.device) if cu_seqlens is None else cu_seqlens
        return convolution(x, weight, bias, state, offsets), last
    gap, T = weight.shape[1] - 1, x.shape[1]
    if cu_seqlens is None:
        line = torch.cat([state.to(x), x], 1)
    else:  # one line: each sequence behind its state
        token, n = torch.arange(T, device=x.device), torch.arange(cu_seqlens.shape[0] - 1, device=x.device)
        at = token + gap * (1 + _sequence(cu_seqlens, token))
        ahead = (cu_seqlens[:-1] + gap * n)[:, None] + torch.arange(gap, device=x.device)
        line = x.new_zeros(T + gap * len(n), x.shape[2]).index_copy(0, at, x[0])
        line = line.index_copy(0, ahead.flatten(), state.to(x).flatten(0, 1))[None]
    y = F.conv1d(line.mT, weight[:, None], bias, groups=len(weight)).mT
    return F.silu(y if cu_seqlens is None else y[:, at - gap]), last


def on_kernels(x: Tensor) -> bool:
    """Whether kernels run where x is."""
    return x.is_cuda and TRITON


def _last(x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each sequence, [N, W - 1, C], from what came before where it is shorter."""
    T, gap = x.shape[1], state.shape[1]
    if cu_seqlens is None:
        return x[:, T - gap :] if gap <= T else torch.cat([state[:, T:], x], 1)
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    at = ends - gap + torch.arange(gap, device=x.device)
    before = (at - starts + gap).clamp(0, max(gap - 1, 0))[..., None].expand_as(state)
    return torch.where((at >= starts)[..., None], x[0, at.clamp(min=0)], state.gather(1, before))


def rotate(x: Float[Tensor, "B T H K"], position_ids: Int[Tensor, "B T"], theta: float = 10000.0) -> Tensor:
    """Rotary positions: channels j and j + K/2 turn by position * theta^(-2 j / K). Computed in at least float32."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=wide(x).dtype) / half)
    angle = (position_ids.to(speed.dtype)[..., None] * speed)[..., None, :]
    one, two = wide(x).split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)


# --- what keys are made of --------------------------------------------------------------------------------------------


def bound_keys(triple: Triple, given: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """Which key is made from which other: name -> (the other, sign).

    An observation that reads the memory along one key and writes along another takes off what it read, and stays a
    contraction where the one is the other times a rate in (0, 1). So one is projected (k, if it is there) and the other
    is rate times it, with the sign that makes key . read positive.
    """
    bound: dict[str, tuple[str, int]] = {}
    for o in triple.architecture.observations:
        key, read = o.key.strip("-"), o.read.strip("-") or o.key.strip("-")
        base, other = (read, key) if key != "k" else (key, read)
        free = (
            {base, other} <= set(given)
            and not {base, other} & set(bound)
            and other not in {b for b, _ in bound.values()}
        )
        if key != read and free:
            bound[other] = base, -1 if o.key.startswith("-") != o.read.startswith("-") else 1
    return bound


def unit_keys(triple: Triple, qk_norm: str | None) -> set[str]:
    """Keys of length 1: what the maps (or qk_norm) say, and any that corrects the memory without a curvature that would."""
    names = {"q", "k", "p"} if "l2" in (qk_norm, *triple.architecture.maps) else set()
    for o, anchor, curvature in zip(triple.architecture.stages, triple.anchors, triple.curvatures, strict=True):
        if anchor != "prior" and curvature != "full":
            names |= {o.key.strip("-"), (o.read or o.key).strip("-")}
    return names


# --- the layer --------------------------------------------------------------------------------------------------------


class LayerState(NamedTuple):
    """What a layer carries from call to call.

    conv: [B, W - 1, C], the last inputs of the short convolution. memory: the op's state. length: [B], tokens seen.
    """

    conv: Tensor
    memory: tuple
    length: Tensor


class Readout(NamedTuple):
    """What a hook of `Layer.register_readout_hook` is given.

    importance: the gate [B, T, H] or [B, T, H, V] that entered the curvature (n T of them for n observations a token),
    None where the triple has none of its own. variance: [B, T, H, V], of the read. memory: the op's state after the call.
    """

    layer: nn.Module
    importance: Tensor | None
    variance: Tensor
    memory: tuple


class Layer(nn.Module):
    """Any triple as a layer: x [B, T, hidden_size] -> y [B, T, hidden_size].

    q, k, v = silu(conv(proj x)), q and k normalised and rotated as the architecture's maps say; gates and precisions from
    x through their own projections, in at least float32;  y = out_proj(norm(op(q, k, v, gates) + D v) * gate(x)).

    triple: the memory. num_heads, head_dim: of q and k, K = head_dim. expand_v: V = expand_v * head_dim.
    num_v_heads: heads of v and of the memory, a multiple of num_heads (each q and k then serves several); None is num_heads.
    conv_size: taps of the short convolution on q, k, v and other keys; 0 is none (and no silu). conv_bias: its bias.
    qk_norm: "l2" for unit q and k where the triple's maps do not say so.
    rank: of the projections of gates that have channels (importance, forgetting per key, ...); 0 is full.
    strength: what multiplies evidence and importance: "gate" (a sigmoid per head), "dt" (the decay's step) or None.
    gate: "swish", "sigmoid" or None. norm: "head" (per head, before the gate) or "inner" (over all heads, after it).
    skip: whether v is passed by the memory, with a factor D per head. learn_prior: whether the prior precision is trained.
    backend: of `unify.compile`. Raises UnifyError for sizes or options that do not fit.
    """

    def __init__(
        self,
        triple: Triple,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float | int = 1,
        *,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        qk_norm: str | None = None,
        rank: int = 16,
        strength: str | None = None,
        gate: str | None = "swish",
        norm: str = "head",
        norm_eps: float = 1e-6,
        skip: bool = False,
        learn_prior: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        self.triple, self.op, self.hidden_size = triple, compile(triple, backend), hidden_size
        self.pieces: ContextParallel | None = None
        self.num_heads, self.num_v_heads = num_heads, num_v_heads or num_heads
        self.head_dim, self.value_dim = head_dim, round(head_dim * expand_v)
        self.strength, self.gate, self.norm, self.conv_size = strength, gate, norm, conv_size
        self._check(expand_v, qk_norm)
        self._make_content(qk_norm, conv_bias, rank)
        self._make_gates(rank, learn_prior)
        inner = self.num_v_heads * self.value_dim
        self.D = nn.Parameter(torch.empty(self.num_v_heads)) if skip else None
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False) if gate else None
        self.out_norm = nn.RMSNorm(self.value_dim if norm == "head" else inner, eps=norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self._readout_hooks: dict[int, Callable] = OrderedDict()
        self.reset_parameters()

    def _check(self, expand_v: float | int, qk_norm: str | None) -> None:
        a = self.triple.architecture
        choices = {
            "strength": (self.strength, (None, "gate", "dt")),
            "gate": (self.gate, (None, "swish", "sigmoid")),
            "norm": (self.norm, ("head", "inner")),
            "qk_norm": (qk_norm, (None, "l2")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise UnifyError(
                    f"{name}={value!r}", f"a layer has no such {name}", f"use {', '.join(map(repr, allowed))}"
                )
        sizes = (self.hidden_size, self.num_heads, self.head_dim)
        if min(sizes) < 1:
            raise UnifyError(f"hidden_size, num_heads, head_dim = {sizes}", "a size is empty", "use 1 or more")
        unknown = set(a.maps) - {"l2", "rotary"}
        if unknown:
            raise UnifyError(f"maps={a.maps!r}", "architecture: a layer has no such map", "use 'l2' and 'rotary'")
        if self.num_v_heads % self.num_heads:
            given = f"num_v_heads={self.num_v_heads} with num_heads={self.num_heads}"
            raise UnifyError(
                given, "each q and k serves as many heads of v as any other", "use a multiple of num_heads"
            )
        if self.value_dim < 1 or abs(self.value_dim - self.head_dim * expand_v) > 1e-6:
            given = f"expand_v={expand_v} with head_dim={self.head_dim}"
            raise UnifyError(given, "their product is the number of value channels of a head", "make it a whole number")
        if "rotary" in a.maps and self.head_dim % 2:
            raise UnifyError(f"head_dim={self.head_dim}", "rotary positions turn pairs of channels", "use an even one")
        if self.strength and a.value != "evidence":
            given = f"strength={self.strength!r} with value={a.value!r}"
            raise UnifyError(
                given, "architecture: an observation has its beta", "use strength=None, or value='evidence'"
            )
        if self.strength == "dt" and a.forgetting != "head":
            given = f"strength='dt' with forgetting={a.forgetting!r}"
            raise UnifyError(
                given, "architecture: there is no step per token and head", "use forgetting='head', or 'gate'"
            )

    # -- making -------------------------------------------------------------------------------------------------------

    def _sizes(self, x: Input) -> tuple[int, ...]:
        """An argument's channels."""
        return tuple({"K": self.head_dim, "V": self.value_dim}[str(SIZE[d])] for d in x.dims)

    def _each(self, x: Input) -> int:
        """How many of an argument a token has."""
        return self.triple.architecture.repeats if x.per == "observation" else 1

    def _make_content(self, qk_norm: str | None, conv_bias: bool, rank: int) -> None:
        """Projections of q, k, v and other keys, and their convolution."""
        given = {x.name: x for x in self.op.recurrence.inputs if x.name in CONTENT}
        self._bound, self._unit = bound_keys(self.triple, tuple(given)), unit_keys(self.triple, qk_norm)
        self._shapes = {
            name: (self._each(x), self.num_v_heads if name == "v" else self.num_heads, *self._sizes(x))
            for name, x in given.items()
        }
        self._width = {name: math.prod(s) for name, s in self._shapes.items() if name not in self._bound}
        self.proj = nn.ModuleDict({n: nn.Linear(self.hidden_size, w, bias=False) for n, w in self._width.items()})
        self.rates = nn.ModuleDict(
            {name: Gate(RECIPES["rate"], self._shapes[name], self.hidden_size, rank) for name in self._bound}
        )
        channels = sum(self._width.values())
        make = self.conv_size > 0
        self.conv_weight = nn.Parameter(torch.empty(channels, self.conv_size)) if make else None
        self.conv_bias = nn.Parameter(torch.empty(channels)) if make and conv_bias else None

    def _make_gates(self, rank: int, learn_prior: bool) -> None:
        """Everything else that the op takes, by `RECIPES`."""
        a, heads = self.triple.architecture, self.num_v_heads
        self.gates = nn.ModuleDict()
        for x in self.op.recurrence.inputs:
            static, kind = x.per == "static", x.name
            if kind == "g":
                kind = f"g of {a.key if a.key != 'free' else a.forgetting}"
            if kind in ("g of head", "g_importance"):
                self.gates[x.name] = Decay(self.hidden_size, heads)
            elif x.name not in CONTENT and kind != "g of fixed":
                recipe, lead = RECIPES[kind], () if static else (self._each(x),)
                low = rank if x.dims and not recipe.full else None
                shape, learned = (*lead, heads, *self._sizes(x)), learn_prior or x.name != "prior_precision"
                self.gates[x.name] = Gate(recipe, shape, self.hidden_size, low, static=static, learned=learned)
        if self.strength == "gate":
            shape = (self._shapes["v"][0], heads)
            self.gates["strength"] = Gate(RECIPES["strength"], shape, self.hidden_size)
        self.importance_scale = nn.Parameter(torch.empty(heads)) if "importance" in self.gates else None

    def start(self) -> dict[str, Tensor]:
        """What its own parameters, those of its parts aside, start from."""
        out = {name: torch.ones_like(x) for name in ("D", "importance_scale") if (x := getattr(self, name)) is not None}
        if self.conv_weight is not None:
            bound = self.conv_size**-0.5
            out["conv_weight"] = torch.empty_like(self.conv_weight).uniform_(-bound, bound)
        if self.conv_bias is not None:
            out["conv_bias"] = torch.zeros_like(self.conv_bias)
        return out

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: projections as torch does, everything else by its `start()`."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.RMSNorm):
                module.reset_parameters()
            elif hasattr(module, "start"):
                for name, value in module.start().items():
                    getattr(module, name).copy_(value)
        spare_from_decay(self)

    def register_readout_hook(self, hook: Callable[[Readout], Any]) -> RemovableHandle:
        """Call hook(readout) after every forward. Without a hook nothing of it is computed. Returns a removable handle."""
        handle = RemovableHandle(self._readout_hooks)
        self._readout_hooks[handle.id] = hook
        return handle

    def context_parallel(self, group: Any = None) -> Layer:
        """From now on x is this rank's piece of a sequence that lies over a group of torch.distributed; returns itself.

        y = the same rows of the layer on the whole sequence. A state that is given is the same on every rank, and so is
        the one returned. Gradients of parameters are shares: the sum over ranks is the gradient. Raises UnifyError where
        `unify.context_parallel` does; a piece shorter than the convolution's reach is refused when it is called.
        """
        self.pieces = context_parallel(self.op, group)
        return self

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        attention_mask: Tensor | Packing | None = None,
        cu_seqlens: Int[Tensor, " offsets"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        state: LayerState | None = None,
        output_state: bool = False,
    ):
        """y [B, T, D]; with output_state (y, state), from which the next call goes on.

        attention_mask: [B, T], 1 where a token is real; padding, wherever it is, leaves state and convolution untouched.
        cu_seqlens: int64 offsets [N + 1] of packed sequences, with B = 1. position_ids: for rotary keys; None counts on.
        state: of the sequences of the batch, or of the N packed ones. Raises UnifyError as the op does.
        """
        if self.pieces is not None:  # a mask of nothing but ones too: another rank's may not be
            check_group(cu_seqlens if attention_mask is None else attention_mask)
        packing = _layout(x, attention_mask, cu_seqlens)
        if packing is not None and len(packing.cu_seqlens) == 1:  # padding and nothing else
            y = torch.zeros_like(x)
            return (y, state or self._fresh(x, len(x))) if output_state else y
        if packing is not None:
            x, position_ids = packing.pack(x), None if position_ids is None else packing.pack(position_ids)
        before, rows = state, None if packing is None else packing.rows
        count = len(x) if packing is None else len(packing.cu_seqlens) - 1
        state = self._begin(x, count) if before is None else _select(before, rows)
        y, state, readout = self._run(x, state, packing, position_ids, output_state or bool(self._readout_hooks))
        for hook in self._readout_hooks.values():
            hook(readout)
        y = y if packing is None else packing.unpack(y)
        if not output_state:
            return y
        return y, state if rows is None else _spread(before or self._fresh(x, packing.shape[0]), state, rows)

    def _begin(self, x: Tensor, count: int) -> LayerState:
        """Before the first token of `count` sequences; the memory is the op's own affair."""
        conv = x.new_zeros(count, max(self.conv_size - 1, 0), sum(self._width.values()) if self.conv_size else 0)
        return LayerState(conv, (), torch.zeros(count, dtype=torch.int64, device=x.device))

    def _run(self, x: Tensor, state: LayerState, packing: Packing | None, position_ids: Tensor | None, final: bool):
        """(y, the new state, what hooks are shown), of sequences laid out as the op takes them."""
        offsets, show = None if packing is None else packing.cu_seqlens, bool(self._readout_hooks)
        op, length, seen = self.op, state.length, x.shape[1] if offsets is None else offsets.diff()
        if self.pieces is not None:
            op, (ahead, seen) = self.pieces, self.pieces.lengths(x)
            length = length + ahead
        content, conv = self._content(x, state.conv, offsets)
        if "rotary" in self.triple.architecture.maps:
            at = self._positions(x, length, packing) if position_ids is None else position_ids
            turned = {name: rotate(y, self._per(y, at)) for name, y in content.items() if name in ("q", "k")}
            content |= turned
        passed = (
            0 if self.D is None else self.D.to(x.dtype)[:, None] * content["v"].unflatten(1, (x.shape[1], -1)).sum(2)
        )
        gates = self._gates(x)
        self._strengthen(gates, content)
        options = {"initial_state": state.memory or None, "cu_seqlens": offsets}
        out = op(**content, **gates, **options, return_variance=show, output_final_state=final)
        o, *rest = out if isinstance(out, tuple) else (out,)
        y = self._output(x, o + passed)
        if not final:
            return y, None, None
        readout = Readout(self, *self._shown(gates, rest[0], packing), rest[-1]) if show else None
        return y, LayerState(conv, rest[-1], state.length + seen), readout

    def _shown(self, gates: dict, variance: Tensor, packing: Packing | None) -> tuple[Tensor | None, Tensor]:
        """Importance and variance where the tokens of the batch are."""
        b = gates.get("importance")
        if packing is None:
            return b, variance
        if b is not None:  # several observations of a token stay together
            b = packing.unpack(b.unflatten(1, (variance.shape[1], -1))).flatten(1, 2)
        return b, packing.unpack(variance)

    def _positions(self, x: Tensor, length: Tensor, packing: Packing | None) -> Int[Tensor, "B T"]:
        """Counting on from what was seen."""
        if packing is None:
            return length[:, None] + torch.arange(x.shape[1], device=x.device)
        return packing.positions() + length.repeat_interleave(packing.cu_seqlens.diff())

    @staticmethod
    def _per(x: Tensor, each: Tensor) -> Tensor:
        """A number per token [B, T, ...] for each of the n T observations that x has."""
        n = x.shape[1] // each.shape[1]
        return each if n == 1 else each.repeat_interleave(n, 1)

    def _content(self, x: Tensor, conv: Tensor, offsets: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """q, k, v and other keys at all heads of the memory, observations one after the other; the convolution's state."""
        mixed = torch.cat([layer(x) for layer in self.proj.values()], -1)
        if self.conv_weight is not None:
            last = None
            if self.pieces is not None:
                conv, last = self.pieces.before(mixed, self.conv_size - 1, conv)
            mixed, conv = short_convolution(mixed, self.conv_weight, self.conv_bias, conv, offsets)
            conv = conv if last is None else last
        parts = dict(zip(self._width, mixed.split(list(self._width.values()), -1), strict=True))
        parts = {name: part.unflatten(-1, self._shapes[name]) for name, part in parts.items()}
        for name in [name for name in parts if name in self._unit]:
            parts[name] = _unit(parts[name])
        for name, (base, sign) in self._bound.items():
            parts[name] = (sign * self.rates[name](x) * parts[base]).to(parts[base].dtype)
        groups = self.num_v_heads // self.num_heads
        spread = lambda name, part: part if name == "v" or groups == 1 else part.repeat_interleave(groups, -2)  # noqa: E731
        return {name: spread(name, part).flatten(1, 2) for name, part in parts.items()}, conv

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """The op's other arguments, and the strength."""
        gates: dict[str, Tensor] = {}
        for name, gate in self.gates.items():
            value = gate(x)
            if isinstance(gate, Decay):
                value, dt = value
                if name == "g" and self.strength == "dt":
                    gates["strength"] = dt
            elif gate.up is not None:  # [B, T, n, H, ...]: observations one after the other
                value = value.flatten(1, 2)
            gates[name] = value
        if self.triple.architecture.forgetting == "fixed":
            gates["g"] = _retention(self.num_v_heads, x)
        if "temperature" in gates:
            gates["g"] = gates["g"] * gates["temperature"]
        return gates

    def _strengthen(self, gates: dict[str, Tensor], content: dict[str, Tensor]) -> None:
        """Give importance its scale, and evidence and importance their strength."""
        v, b, strength = content["v"], gates.get("importance"), gates.pop("strength", None)
        scale = None if b is None else F.softplus(wide(self.importance_scale))
        if strength is not None:
            content["v"] = (v * self._per(v, strength)[..., None]).to(v.dtype)
            scale = None if b is None else scale * self._per(b, strength)
        if b is not None:
            gates["importance"] = b * (scale if b.ndim == 3 else scale[..., None])

    def _output(self, x: Tensor, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        """Norm, gate and projection."""
        act = {"swish": F.silu, "sigmoid": torch.sigmoid, None: None}[self.gate]
        shape = (*o.shape[-2:],) if self.norm == "head" else (-1,)
        o = o.flatten(-2).unflatten(-1, shape)
        g = act(self.gate_proj(x)).unflatten(-1, shape) if act else 1
        norm = lambda y: self.out_norm(y.to(self.out_norm.weight.dtype))  # noqa: E731, autocast narrows o only
        o = norm(o) * g if self.norm == "head" else norm(o * g)
        return self.out_proj(o.flatten(2))

    def _fresh(self, x: Tensor, count: int) -> LayerState:
        """Before the first token, the memory written out."""
        static = {name: gate(x) for name, gate in self.gates.items() if isinstance(gate, Gate) and gate.up is None}
        sizes = {"B": count, "H": self.num_v_heads, "K": self.head_dim, "V": self.value_dim}
        memory = self.op._initial(None, {"q": x, **static}, count, sizes, wide(x).dtype)
        return self._begin(x, count)._replace(memory=self.op.state_type(*memory))


def _layout(x: Tensor, mask: Tensor | Packing | None, cu_seqlens: Tensor | None) -> Packing | None:
    """Where the sequences of x are, if not one a row. Raises UnifyError for a mask or offsets that do not fit x."""
    if mask is not None and tuple(mask.shape) != tuple(x.shape[:2]):
        given = f"attention_mask {list(mask.shape)}"
        raise UnifyError(given, f"x is {list(x.shape)}", f"pass {list(x.shape[:2])}: a mask of the tokens of this call")
    packing = Packing.of_mask(mask) if torch.is_tensor(mask) else mask
    if cu_seqlens is not None:
        if mask is not None or len(x) != 1:
            given = f"cu_seqlens with B={len(x)}{'' if mask is None else ' and attention_mask'}"
            raise UnifyError(
                given, "packed sequences lie in one row, without padding", "pass cu_seqlens alone, with B=1"
            )
        packing = Packing(tuple(x.shape[:2]), cu_seqlens)
        if x.device.type == "cpu" and cu_seqlens[-1] != x.shape[1]:  # on a GPU a look would wait
            given = f"cu_seqlens up to {int(cu_seqlens[-1])}"
            raise UnifyError(given, f"the offsets do not cut T = {x.shape[1]} into sequences", f"end with {x.shape[1]}")
    return packing


def spare_from_decay(module: nn.Module) -> None:
    """Flag (`_no_weight_decay`) the scales, rates and biases of layers: an optimizer must not pull them towards 0."""
    own = ("A_log", "dt_bias", "D", "raw", "importance_scale", "conv_bias")
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in own:
            parameter._no_weight_decay = True


def _unit(x: Tensor) -> Tensor:
    """Length 1, in at least float32: x / sqrt(|x|^2 + 1e-6)."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _spread(before: LayerState, after: LayerState, rows: Tensor) -> LayerState:
    """The state of a batch of which only some rows went on; the others' is what it was."""
    put = lambda old, new: old.index_copy(0, rows, new.to(old.dtype))  # noqa: E731
    memory = type(after.memory)(*map(put, before.memory, after.memory))
    return LayerState(put(before.conv, after.conv), memory, put(before.length, after.length))


def _select(state: LayerState, rows: Tensor | None) -> LayerState:
    """The state of some rows."""
    if rows is None:
        return state
    return LayerState(state.conv[rows], tuple(x[rows] for x in state.memory), state.length[rows])
