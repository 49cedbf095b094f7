"""Plain torch in place of flash-linear-attention's Triton functions, so that its models run without a GPU.

Importing fla takes transformers' model types mamba and mamba2 for itself, so this module is for a process of its own
(tests/fla_hosts.py). The operators are fla's own naive references, wrapped to the operators' signatures: an oracle that
knows nothing of ours.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch
from fla.modules.activations import ACT2FN
from fla.modules.norm.layernorm_gated import rms_norm_ref
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.gate import naive_gdn_gate
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from torch.nn import functional as F

# -- modules -----------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    """x: [..., D] -> norm of x + residual; with prenorm also the sum."""
    x = x if residual is None else x + residual
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
    return (y, x) if prenorm else y


def rms_norm_gated(x, g, weight, bias, activation="swish", eps=1e-6, **options):
    """x, g: [..., D] -> norm of x, times the activation of g."""
    gate = torch.sigmoid(g.float()) if activation == "sigmoid" else F.silu(g.float())
    return (rms_norm(x.float(), weight, bias, eps=eps) * gate).to(x.dtype)


def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend=None, cu_seqlens=None, chunk_indices=None,
):  # fmt: skip
    """x: [B, T, D], weight: [D, W], states: [N, D, W] -> output and the last W inputs of each sequence."""
    D, W = weight.shape

    def one(x, past):
        line = torch.cat([past, x.mT], -1)
        return F.conv1d(line[..., 1:], weight[:, None], bias, groups=D).mT, line[..., -W:]

    rows = _rows(x.shape, cu_seqlens)
    past = (
        x.new_zeros(x.shape[0] if cu_seqlens is None else len(rows), D, W) if initial_state is None else initial_state
    )
    done = [one(x[:, a:b], past if cu_seqlens is None else past[n : n + 1]) for n, (a, b) in enumerate(rows)]
    y, state = torch.cat([y for y, _ in done], 1), torch.cat([state for _, state in done])
    y = y if activation is None else F.silu(y)
    return y if residual is None else y + residual, state if output_final_state else None


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """One token a sequence, x: [N, 1, D] or [1, N, D]; the cache [N, D, W] changes in place."""
    y, state = causal_conv1d(x.reshape(len(cache), 1, -1), weight, bias, None, cache, True, activation)
    cache.copy_(state)
    y = y.reshape(x.shape)
    return y if residual is None else y + residual, cache


def rotary_embedding(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None
):
    """x: [B, T, H, D] turned by its position in its sequence, plus the sequence's offset."""
    offsets = torch.as_tensor(seqlen_offsets, device=x.device)
    rows = _rows(x.shape, cu_seqlens)
    if cu_seqlens is None:
        at = torch.arange(x.shape[1], device=x.device) + offsets.reshape(-1, 1).expand(x.shape[0], 1)
    else:
        offsets = offsets.expand(len(rows))
        at = torch.cat([torch.arange(b - a, device=x.device) + offsets[n] for n, (a, b) in enumerate(rows)])[None]
    a, b = x.chunk(2, -1)
    c, s = cos[at][:, :, None], sin[at][:, :, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def swiglu_linear(x, y, weight, bias):
    """The second half of a gated MLP."""
    return F.linear(F.silu(x) * y, weight, bias)


def _rows(shape, cu_seqlens) -> list[tuple[int, int]]:
    """Where each sequence begins and ends; without offsets all rows of the batch are one."""
    ends = [0, shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(ends))


# -- operators ---------------------------------------------------------------------------------------------------------


def simple_gla(q, k, v, g, initial_state=None, output_final_state=False):
    """fla's naive GLA with one decay a head."""
    return naive_recurrent_simple_gla(q, k, v, g, None, initial_state, output_final_state)


def retention(q, k, v, initial_state=None, output_final_state=False):
    """RetNet is simple GLA with head h's fixed decay: fla's own naive retention has no state, and is compared with this."""
    g = torch.log1p(-torch.exp2(-5.0 - torch.arange(q.shape[2], device=q.device))).expand(q.shape[:3])
    return simple_gla(q, k, v, g, initial_state, output_final_state)


def delta_rule(q, k, v, beta, initial_state=None, output_final_state=False):
    """fla's naive delta rule, heads moved to where it wants them."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    o, state = delta_rule_recurrence(q, k, v, beta, initial_state, output_final_state)
    return o.transpose(1, 2), state


def gated_delta_rule(q, k, v, g, beta, initial_state=None, output_final_state=False):
    """fla's naive gated delta rule; each key head serves several value heads."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    o, state = naive_recurrent_gated_delta_rule(q, k, v, beta, g, None, initial_state, output_final_state)
    return o.to(v.dtype), state


def gla(q, k, v, gk=None, g=None, initial_state=None, output_final_state=False):
    """fla's naive GLA; the recurrent operator calls the gate gk, the chunked one g."""
    return naive_recurrent_gla(q, k, v, g if gk is None else gk, initial_state, output_final_state)


def operator(naive: Callable) -> Callable:
    """A naive reference with the options of the operator it stands for."""

    def run(
        *, cu_seqlens=None, initial_state=None, output_final_state=False, state_v_first=False, A_log=None, dt_bias=None,
        lower_bound=None, safe_gate=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, **x,
    ):  # fmt: skip
        if use_qk_l2norm_in_kernel:
            x |= {name: x[name] / (x[name].square().sum(-1, keepdim=True) + 1e-6).sqrt() for name in ("q", "k")}
        if use_beta_sigmoid_in_kernel:
            x["beta"] = x["beta"].sigmoid() * (1 + allow_neg_eigval)
        if use_gate_in_kernel and x["g"].ndim == 3:
            x["g"] = naive_gdn_gate(x["g"], A_log, dt_bias)
        elif use_gate_in_kernel and lower_bound is None:
            x["g"] = naive_kda_gate(x["g"], A_log, dt_bias)
        elif use_gate_in_kernel:
            x["g"] = naive_kda_lowerbound_gate(x["g"], A_log, dt_bias, lower_bound)
        turn = lambda state: state.mT if state_v_first and state is not None else state  # noqa: E731
        past, rows = turn(initial_state), _rows(x["v"].shape, cu_seqlens)
        done = []
        for n, (a, b) in enumerate(rows):
            own = past if past is None or cu_seqlens is None else past[n : n + 1]
            done.append(naive(**{name: y[:, a:b] for name, y in x.items()}, initial_state=own, output_final_state=True))
        o, state = torch.cat([o for o, _ in done], 1), torch.cat([state for _, state in done])
        return o, turn(state) if output_final_state else None

    return run


# -- where they go -----------------------------------------------------------------------------------------------------

MODULES = {
    "fla.modules.norm.layernorm.rms_norm": rms_norm,
    "fla.modules.norm.fused_norm_gate.rms_norm_gated": rms_norm_gated,
    "fla.modules.norm.layernorm_gated.rmsnorm_fn": rms_norm_ref,
    "fla.modules.causal_conv1d.ops.causal_conv1d": causal_conv1d,
    "fla.modules.causal_conv1d.ops.causal_conv1d_update": causal_conv1d_update,
    "fla.layers.gated_deltanet.causal_conv1d": causal_conv1d,
    "fla.modules.rotary.ops.rotary_embedding": rotary_embedding,
    "fla.modules.mlp.swiglu_linear": swiglu_linear,
}
OPERATORS = {
    "fla.layers.gla": (gla, "chunk_gla", "fused_recurrent_gla"),
    "fla.layers.simple_gla": (simple_gla, "chunk_simple_gla", "fused_recurrent_simple_gla"),
    "fla.layers.multiscale_retention": (retention, "chunk_retention", "fused_recurrent_retention"),
    "fla.layers.delta_net": (delta_rule, "chunk_delta_rule", "fused_recurrent_delta_rule"),
    "fla.layers.gated_deltanet": (
        gated_delta_rule,
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    ),
    "fla.layers.kda": (naive_recurrent_kda, "chunk_kda", "fused_recurrent_kda"),
}


@contextmanager
def installed() -> Iterator[None]:
    """Every double in its place."""
    places = dict(MODULES)
    for module, (naive, *names) in OPERATORS.items():
        places |= {f"{module}.{name}": operator(naive) for name in names}
    silu = dict.fromkeys(("silu", "swish"), F.silu)
    with ExitStack() as all_of_them:
        for place, double in places.items():
            all_of_them.enter_context(patch(place, double))
        all_of_them.enter_context(patch.dict(ACT2FN, silu))
        yield


# -- are they right? ---------------------------------------------------------------------------------------------------


def errors(eps: float = 1e-5) -> dict[str, float]:
    """Largest error of each double against torch's own modules or a formula written otherwise. eps: of the norms."""
    torch.manual_seed(0)
    B, T, H, D, W = 2, 9, 3, 8, 4
    x, g, w = torch.randn(B, T, D), torch.randn(B, T, D), torch.randn(D)
    norm = lambda z: z * w / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    grouped = F.rms_norm((x * F.silu(g)).view(B, T, 2, D // 2), (D // 2,), eps=1e-5).flatten(2) * w
    pairs = {
        "rms_norm": (rms_norm(x, w, None, g, eps, True)[0], norm(x + g)),
        "rms_norm_gated": (rms_norm_gated(x, g, w, None, eps=eps), norm(x) * g * g.sigmoid()),
        "rms_norm_gated, sigmoid": (rms_norm_gated(x, g, w, None, "sigmoid", eps), norm(x) / (1 + g.neg().exp())),
        "rmsnorm_fn": (rms_norm_ref(x, w, None, g, eps, D // 2, False), grouped),
        "swiglu_linear": (swiglu_linear(x, g, torch.diag(w), None), x * x.sigmoid() * g * w),
    }
    conv = torch.nn.Conv1d(D, D, W, groups=D, padding=W - 1)
    whole = F.silu(conv(x.mT)[..., :T].mT)
    kernel = {"weight": conv.weight[:, 0], "bias": conv.bias, "activation": "silu"}
    packed, state = causal_conv1d(
        x[:, :5].reshape(1, 10, D), cu_seqlens=torch.tensor([0, 5, 10]), output_final_state=True, **kernel
    )
    step, state = causal_conv1d_update(x[:, 5:6], state, **kernel)
    rest, _ = causal_conv1d(x[:, 6:], initial_state=state, **kernel)
    pairs["causal_conv1d"] = (torch.cat([packed.view(B, 5, D), step, rest], 1), whole)
    y = torch.randn(B, T, H, D)
    angle = torch.outer(torch.arange(2 * T), 10000.0 ** (-torch.arange(0, D, 2) / D))
    turned = [
        torch.complex(*y.chunk(2, -1))[n] * torch.polar(torch.ones(T, 1, 1), angle[n : n + T, None]) for n in range(B)
    ]
    turned = torch.stack([torch.cat([z.real, z.imag], -1) for z in turned])
    at = {"seqlen_offsets": torch.arange(B)}
    pairs["rotary_embedding"] = (rotary_embedding(y, angle.cos(), angle.sin(), **at), turned)
    packed = rotary_embedding(
        y.view(1, B * T, H, D), angle.cos(), angle.sin(), cu_seqlens=torch.tensor([0, T, B * T]), **at
    )
    pairs["rotary_embedding, packed"] = (packed.view(y.shape), turned)
    heads = [z.transpose(1, 2) for z in (y, y.roll(1, 1), y.exp())]
    pairs["retention"] = (retention(y, y.roll(1, 1), y.exp())[0], naive_retention(*heads).transpose(1, 2))
    return {name: (found - expected).abs().max().item() for name, (found, expected) in pairs.items()}
