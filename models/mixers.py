"""Adapters: how the operators that other libraries' mixers call become one of our ops, with an importance.

One class a family, whose methods carry the operators' own names and signatures; `graft` puts them where the mixer calls
them. Projections, convolutions, norms and gates stay the mixer's. An operator's state here is a packed row a sequence, the
memory [H, K, V] and behind it the importance it has accumulated, [H, K] or [H, K, V]: [B, H K V + H K] or [B, 2 H K V].
Both start at zero, so a cache that keeps, zeroes, reorders or repeats what it is given needs to know nothing of it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unify.errors import UnifyError
from unify.models.graft import calls, graft, methods
from unify.models.zoo import get
from unify.op import Op, compile
from unify.triple import Architecture, Triple

SHAPES = {"key": "head", "diagonal": "value"}
"""The posterior's new curvature -> the shape of the importance that it needs."""


class Importance(nn.Module):
    """b = sigmoid(up(down(x))) |scale|: the importance of a token, one number a head or one a value channel.

    scale: [H], starts at 0, where the metaplastic memory is its source. Its absolute value is taken with slope 1 at 0, so
    that it has a gradient there and a step past 0 comes back; softplus would have neither.
    """

    def __init__(self, hidden: int, heads: int, channels: int, rank: int, like: Tensor):
        super().__init__()
        place = {"device": like.device, "dtype": like.dtype if like.is_floating_point() else torch.float32}
        self.heads, self.channels = heads, channels
        self.down = nn.Linear(hidden, rank, bias=False, **place)
        self.up = nn.Linear(rank, heads * channels, bias=False, **place)
        self.scale = nn.Parameter(torch.zeros(heads, **place))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, hidden] -> [B, T, H] (one channel) or [B, T, H, V], float32, >= 0."""
        raw = self.up(self.down(x.to(self.down.weight.dtype))).unflatten(-1, (self.heads, self.channels))
        b = raw.float().sigmoid() * torch.where(self.scale >= 0, self.scale, -self.scale)[:, None]
        return b[..., 0] if self.channels == 1 else b


class Adapter:
    """What every family has in common.

    source: the triple the mixer runs. projections: names of what may read its input. operators: names of what may run it.
    classes: "module.class" of mixers that call no operator by name. op: the metaplastic op, on the grafted class.
    """

    source: Triple
    projections: tuple[str, ...]
    operators: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    op: Op
    importance: Importance

    def _memory(
        self, seen, q, k, v, *, scale, state, importance=None, cu_seqlens=None, in_place=False, **gates
    ) -> tuple[Tensor, Tensor]:
        """The op from a packed state to a packed state (in_place: the same tensor). q and k may have fewer heads, each
        serving several of v's."""
        heads, keys, values = v.shape[2], q.shape[-1], v.shape[-1]
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) if x.shape[2] != heads else x for x in (q, k))
        start = None if state is None else self._unpacked(state, heads, keys, values)
        o, new = self.op(
            q, k, v, scale=scale, initial_state=start, cu_seqlens=cu_seqlens, output_final_state=True,
            importance=self.importance(seen) if importance is None else importance,
            **{name: x.float() for name, x in gates.items()},
        )  # fmt: skip
        if not in_place:
            return o, torch.cat([x.flatten(1) for x in new], 1)
        for old, x in zip(start, new, strict=True):
            old.copy_(x)
        return o, state

    def _unpacked(self, state: Tensor, heads: int, keys: int, values: int) -> tuple[Tensor, Tensor]:
        """Memory and importance as views of a packed state, contiguous where it holds one sequence."""
        size, per_value = heads * keys * values, () if self.importance.channels == 1 else (values,)
        memory, importance = state[:, :size], state[:, size:]
        return memory.unflatten(1, (heads, keys, values)), importance.unflatten(1, (heads, keys, *per_value))


def _unit(x: Tensor) -> Tensor:
    """L2 norm as the field's kernels have it, the epsilon under the root."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _refuse(**wanted) -> None:
    """An operator's option that changes what it computes and that no op of ours has."""
    for name, x in wanted.items():
        if x is not None and x is not False:
            given = f"{name} {list(x.shape)}" if torch.is_tensor(x) else f"{name}={x!r}"
            raise UnifyError(given, "a metaplastic mixer has no such option", f"leave {name} at its default")


class Mamba2(Adapter):
    """Mamba-2 and the hybrids with its mixer: q = C, k = B, v = dt x, g = A dt, and D x beside it."""

    source = get("mamba2").triple
    projections = ("in_proj",)
    operators = ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "mamba2_selective_state_update")

    def mamba2_split_conv1d_scan_combined(self, *args, **kwargs) -> None:
        """Everything in one kernel: not here, and the mixer goes on step by step."""

    def mamba2_chunk_scan(
        self, hidden_states, dt, A, B, C, chunk_size=None, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
        dt_limit=(0.0, float("inf")), return_final_states=False, z=None, seq_idx=None, *, seen, **kwargs,
    ):  # fmt: skip
        """hidden_states: [B, T, H, P]; dt: [B, T, H]; A: [H], < 0; B, C: [B, T, G, N]; the state is packed."""
        dt = _step(dt, dt_bias, dt_softplus).clamp(*dt_limit)
        o, state = self._scan(hidden_states, dt, A, B, C, D, z, initial_states, seen, cu_seqlens=_offsets(seq_idx))
        return (o, state) if return_final_states else o

    def mamba2_selective_state_update(
        self, state, hidden_states, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, seen, **kwargs
    ):
        """One token, the state in place. hidden_states, dt: [B, H, P]; A: [H, P, N]; B, C: [B, G, N]; D, dt_bias: [H, P]."""
        dt = _step(dt[..., 0], dt_bias if dt_bias is None else dt_bias[:, 0], dt_softplus)
        x, dt, B, C, z = (None if y is None else y[:, None] for y in (hidden_states, dt, B, C, z))
        o, _ = self._scan(x, dt, A[:, 0, 0], B, C, D if D is None else D[:, 0], z, state, seen, in_place=True)
        return o[:, 0].to(x.dtype)

    def _scan(self, x, dt, A, B, C, D, z, state, seen, **options) -> tuple[Tensor, Tensor]:
        # a GPU multiplies in the model's own precision, as its kernels do
        narrow = x.dtype if x.is_cuda else torch.float32
        b = self.importance(seen)
        o, state = self._memory(
            seen, C.to(narrow), B.to(narrow), (x * dt[..., None]).to(narrow), g=A.float() * dt, scale=1.0, state=state,
            importance=b * (dt if b.ndim == 3 else dt[..., None]), **options,
        )  # fmt: skip
        if D is not None:  # products with a float32 factor, as dt is too, are float32
            o = torch.addcmul(o, (D if D.ndim == 2 else D[:, None]).float(), x)
        return (o if z is None else o * F.silu(z.float())), state


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The step size in float32, its bias added in the step's own precision, as the hosts do."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).float()


def _offsets(seq_idx: Tensor | None) -> Tensor | None:
    """Offsets of packed sequences from the index of each token's sequence, [1, T]."""
    if seq_idx is None:
        return None
    if seq_idx.shape[0] != 1:
        raise UnifyError(f"seq_idx {list(seq_idx.shape)}", "packed sequences lie in one row", "pass a batch of 1")
    inner = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero()[:, 0] + 1
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=seq_idx.shape[1])


class FlaMamba2(Mamba2):
    """flash-linear-attention's Mamba-2: the scan is written into its two paths, which here are one."""

    operators = ()
    classes = ("fla.layers.mamba2.Mamba2",)

    def torch_forward(self, hidden_states, last_state=None, use_cache=False, attention_mask=None):
        """As the host's: (output, convolution state [B, C, W], packed state); but any number of tokens may follow a state."""
        B, T, W = *hidden_states.shape[:2], self.conv_kernel_size
        heads, groups, side = (self.num_heads, -1), (self.n_groups, -1), self.n_groups * self.ssm_state_size
        gate, xbc, dt = self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        past, state, mask = xbc.new_zeros(B, self.conv_dim, W), None, 1
        if last_state is not None:
            past, state = last_state["conv_state"].to(xbc.dtype), last_state["recurrent_state"]
        elif attention_mask is not None and attention_mask.shape == (B, T):
            mask = attention_mask[..., None].to(xbc.dtype)
        line = torch.cat([past, (xbc * mask).mT], -1)
        xbc = F.conv1d(line[..., 1:], self.conv1d.weight, self.conv1d.bias, groups=self.conv_dim).mT
        x, k, q = (self.act(xbc) * mask).split([self.intermediate_size, side, side], -1)
        dt = _step(dt, self.dt_bias, True).clamp(*self.dt_limit)
        x, k, q = x.unflatten(-1, heads), k.unflatten(-1, groups), q.unflatten(-1, groups)
        A = -self.A_log.float().exp()
        o, state = self._scan(x, dt, A, k, q, self._get_D(), None, state, hidden_states)
        o = o.flatten(2).to(hidden_states.dtype)
        o = o * self.act(gate) if self.norm is None else self.norm(o, gate)
        return self.out_proj(o), line[..., -W:], state

    cuda_kernels_forward = torch_forward


class _Delta(Adapter):
    """Delta rules: v is observed with strength beta, and corrected by what the memory already says."""

    projections = ("in_proj_qkvz", "in_proj_qkv", "q_proj")

    def _delta(
        self, q, k, v, g, beta, *, seen, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, cu_seqlens=None,
        gv=None, reverse=False, cp_context=None, **kwargs,
    ):  # fmt: skip
        _refuse(gv=gv, reverse=reverse, cp_context=cp_context)
        dtype = q.dtype
        if use_qk_l2norm_in_kernel:
            q, k = _unit(q), _unit(k)
        if not v.is_cuda:
            q, k, v = q.float(), k.float(), v.float()
        if use_beta_sigmoid_in_kernel:
            beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
        gates = {"beta": beta} if g is None else {"g": g, "beta": beta}
        o, state = self._memory(
            seen, q.to(v.dtype), k.to(v.dtype), v, scale=scale, state=initial_state, cu_seqlens=cu_seqlens, **gates
        )
        return o.to(dtype), state if output_final_state else None


class DeltaNet(_Delta):
    """DeltaNet: no forgetting."""

    source = get("deltanet").triple
    operators = ("chunk_delta_rule", "fused_recurrent_delta_rule")

    def chunk_delta_rule(self, q, k, v, beta, **options):
        """q, k: [B, T, H, K]; v: [B, T, H, V]; beta: [B, T, H]."""
        return self._delta(q, k, v, None, beta, **options)

    fused_recurrent_delta_rule = chunk_delta_rule


class GatedDeltaNet(_Delta):
    """Gated DeltaNet: one decay a value head; beta, and the gate, possibly still to be computed."""

    source = get("gated_deltanet").triple
    operators = (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    )

    def chunk_gated_delta_rule(
        self, q, k, v, g=None, beta=None, *, use_gate_in_kernel=False, A_log=None, dt_bias=None, gk=None, **options
    ):
        """q, k: [B, T, H, K]; v: [B, T, HV, V]; g, beta: [B, T, HV]; A_log, dt_bias: [HV]."""
        _refuse(gk=gk)
        if use_gate_in_kernel:
            g = -A_log.float().exp() * F.softplus(g.float() + (0.0 if dt_bias is None else dt_bias.float()))
        return self._delta(q, k, v, g, beta, **options)

    torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    torch_recurrent_gated_delta_rule = chunk_gated_delta_rule
    fused_recurrent_gated_delta_rule = chunk_gated_delta_rule


class KDA(_Delta):
    """Kimi delta attention: one decay a key channel."""

    source = get("kda").triple
    operators = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "chunk_kda", "fused_recurrent_kda")

    def chunk_kda(
        self, q, k, v, g, beta, *, use_gate_in_kernel=False, A_log=None, dt_bias=None, lower_bound=None, **options
    ):
        """q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K]; beta: [B, T, HV]; A_log: [HV]; dt_bias: [HV K]."""
        if use_gate_in_kernel:
            g = g.float() if dt_bias is None else g.float() + dt_bias.float().view(g.shape[-2:])
            rate = 1.0 if A_log is None else A_log.float().exp().view(-1, 1)
            g = -rate * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)
        return self._delta(q, k, v, g, beta, **options)

    chunk_kimi_delta_attention = chunk_kda
    recurrent_kimi_delta_attention = chunk_kda
    fused_recurrent_kda = chunk_kda


class _Evidence(Adapter):
    """Plain decayed sums: what is written does not depend on what is known."""

    projections = ("q_proj",)

    def _sum(
        self, q, k, v, g, *, seen, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        gv=None, reverse=False, **kwargs,
    ):  # fmt: skip
        _refuse(gv=gv, reverse=reverse)
        dtype = q.dtype
        if not v.is_cuda:
            q, k, v = q.float(), k.float(), v.float()
        o, state = self._memory(seen, q, k, v, g=g, scale=scale, state=initial_state, cu_seqlens=cu_seqlens)
        return o.to(dtype), state if output_final_state else None


class GLA(_Evidence):
    """GLA: one decay a key channel."""

    source = get("gla").triple
    operators = ("chunk_gla", "fused_chunk_gla", "fused_recurrent_gla")

    def chunk_gla(self, q, k, v, g=None, *, gk=None, **options):
        """q, k, g: [B, T, H, K]; v: [B, T, H, V]."""
        return self._sum(q, k, v, gk if g is None else g, **options)

    fused_chunk_gla = chunk_gla
    fused_recurrent_gla = chunk_gla


class SimpleGLA(_Evidence):
    """GLA with one decay a head."""

    source = Triple(Architecture(forgetting="head"))
    operators = ("chunk_simple_gla", "fused_recurrent_simple_gla")

    def chunk_simple_gla(self, q, k, v, g=None, *, g_gamma=None, **options):
        """q, k: [B, T, H, K]; v: [B, T, H, V]; g: [B, T, H]."""
        _refuse(g_gamma=g_gamma)
        return self._sum(q, k, v, g, **options)

    fused_recurrent_simple_gla = chunk_simple_gla


class RetNet(_Evidence):
    """RetNet: head h forgets at the fixed rate 1 - 2^(-5 - h)."""

    source = get("retnet").triple
    operators = ("chunk_retention", "fused_chunk_retention", "parallel_retention", "fused_recurrent_retention")

    def chunk_retention(self, q, k, v, **options):
        """q, k: [B, T, H, K]; v: [B, T, H, V]."""
        h = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
        return self._sum(q, k, v, torch.log1p(-torch.exp2(-5 - h)), **options)

    fused_chunk_retention = chunk_retention
    parallel_retention = chunk_retention
    fused_recurrent_retention = chunk_retention


class Lightning(Adapter):
    """MiniMax's lightning attention: fixed decays. It calls no operator, so its forward is written out here."""

    source = get("lightning").triple
    projections = ("qkv_proj",)
    classes = ("transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        """As the host's: (output, packed state), the state also in the cache, whichever name transformers has for it."""
        cache = past_key_values if cache is None else cache
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).split(self.head_dim, -1)
        if not v.is_cuda:
            q, k, v = q.float(), k.float(), v.float()
        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        o, state = self._memory(hidden_states, q, k, v, g=-self.slope_rate.flatten(), scale=1.0, state=state)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        o = self.norm(o.flatten(2).to(hidden_states.dtype))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * o), state


FAMILIES: tuple[type[Adapter], ...] = (
    FlaMamba2,
    Mamba2,
    DeltaNet,
    GatedDeltaNet,
    KDA,
    GLA,
    SimpleGLA,
    RetNet,
    Lightning,
)


# Where fla's mixers run their operator on the tokens they read, once. Others route tokens (MoM), stack them (Gated
# DeltaProduct) or share states between layers (YOCO) around operators of the same names.
FLA = ("gla", "simple_gla", "multiscale_retention", "delta_net", "gated_deltanet", "kda", "mamba2")


def family(mixer: nn.Module) -> type[Adapter] | None:
    """The adapter of a mixer, known by the operators its code calls (or by its class's full name), or None."""
    cls = type(mixer)
    if isinstance(mixer, Adapter):  # it has one already
        return next(f for f in FAMILIES if issubclass(cls, f))
    if cls.__module__.startswith("fla.layers.") and cls.__module__.split(".")[2] not in FLA:
        return None
    called = set().union(*map(calls, methods(cls).values()))
    name = f"{cls.__module__}.{cls.__qualname__}"
    return next((f for f in FAMILIES if called & set(f.operators) or name in f.classes), None)


@cache
def grafted(cls: type, adapter: type[Adapter], curvature: str) -> type:
    """The metaplastic class of a mixer. Raises UnifyError where its code cannot be exchanged."""
    op = compile(adapter.source.metaplastic(SHAPES[curvature]), checked=False)
    return graft(cls, adapter, adapter.operators, adapter.projections, {"op": op})


def sizes(mixer: nn.Module) -> tuple[int, int, int, Tensor]:
    """Hidden size, value heads, value channels a head, and the weight of the projection that reads the input."""
    first = lambda *names: next(getattr(mixer, n) for n in names if hasattr(mixer, n))  # noqa: E731
    projection = first(*family(mixer).projections)
    heads = first("num_v_heads", "num_heads", "num_attention_heads")
    return projection.in_features, heads, first("head_v_dim", "head_dim"), projection.weight
