"""Each model's recurrence, typed by hand from its paper as a plain token loop.

This file is an oracle. The rest of the project *derives* recurrences from a free energy; the tests compare what was
derived with what is written here. So this file is deliberately not derived, imports nothing of the project, knows no
kernel and no shortcut: one Python loop over tokens, one line for each equation of the paper, in the dtype it is given.
It is slow on purpose. Where several papers share one recurrence they share one private loop, and each public name keeps
its own citation.

Every function is keyword-only and returns a dict: "o" [B,T,H,V], for the models that have one "variance" [B,T,H,V], and
the final states by name. `PUBLISHED` maps the models' names to the functions.

Shapes, unless a docstring says otherwise (sequence first; K key channels, V value channels):
    q, k [B,T,H,K]; v [B,T,H,V]; beta [B,T,H], the write strength; g, the natural logarithm of the decay alpha,
    [B,T,H] (one a head) or [B,T,H,K] (one a key channel); importance [B,T,H,V], the observation precision that the
    importance state accumulates; prior_precision I_p [H] or [H,K], None for one.
    State S [B,H,K,V] is a memory (a posterior mean), M [B,H,K,V] a natural mean (precision times mean), P [B,H,K,K] a
    second moment of the keys, Lambda a precision, Ibar a precision less its prior.
`scale` None means K**-0.5, or one where the docstring says "scale 1". `initial_state` is a dict with the same names as
the returned states; None starts the model where its paper starts it.

In the equations S' is the new state, * is elementwise along the key channels, and k v^T an outer product.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["PUBLISHED"]

Output = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers: nothing here is a model.
# ---------------------------------------------------------------------------------------------------------------------
def _scale_of(scale, q, default=None):
    """The read scale: what was asked for, else the model's default, else K**-0.5."""
    if scale is not None:
        return scale
    return q.shape[-1] ** -0.5 if default is None else default


def _decay(g, like):
    """alpha = exp(g) as [B,T,H,1] or [B,T,H,K]; g [H], [B,T,H], [B,T,H,K], or None for no forgetting."""
    if g is None:
        return torch.ones_like(like[..., :1])
    if g.ndim == 1:
        g = g.expand(like.shape[:3])
    if g.ndim == 3:
        g = g[..., None]
    return g.exp()


def _prior(prior_precision, like):
    """I_p as [H,1] or [H,K]; None is one."""
    if prior_precision is None:
        return like.new_ones(like.shape[2], 1)
    return prior_precision[:, None] if prior_precision.ndim == 1 else prior_precision


def _start(initial_state, name, like, *shape, value=0.0):
    """The named starting state, or the model's own start: a constant of shape [B,H,*shape]."""
    if initial_state is not None:
        return initial_state[name]
    return like.new_full((like.shape[0], like.shape[2], *shape), value)


def _outer(k, v):
    """k v^T for every head: [B,H,K], [B,H,V] -> [B,H,K,V]."""
    return k[..., :, None] * v[..., None, :]


def _read(S, q):
    """S^T q for every head: [B,H,K,V], [B,H,K] -> [B,H,V]."""
    return (S * q[..., :, None]).sum(-2)


def _stack(tokens):
    """Per-token [B,H,...] -> [B,T,H,...]."""
    return torch.stack(tokens, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Additive memories: S' = alpha * S + k v^T.
# ---------------------------------------------------------------------------------------------------------------------
def _additive(q, k, v, g, scale, initial_state) -> Output:
    alpha = _decay(g, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S + _outer(k[:, t], v[:, t])
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def linear_attention(*, q, k, v, scale=None, initial_state=None) -> Output:
    """Linear attention: S' = S + k v^T; o = scale S'^T q (without the normaliser of the paper's equation).

    Shapes: the module's. State S.
    Source: Angelos Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear
    Attention", 2020, arXiv 2006.16236.
    """
    return _additive(q, k, v, None, _scale_of(scale, q), initial_state)


def retnet(*, q, k, v, g, scale=None, initial_state=None) -> Output:
    """RetNet: S' = gamma_h S + k v^T; o = scale S'^T q, gamma_h = exp(g_h) fixed (the paper's is 1 - 2^(-5-h)).

    Shapes: g [H]. State S. The rotation of q and k happens outside.
    Source: Yutao Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023,
    arXiv 2307.08621.
    """
    return _additive(q, k, v, g, _scale_of(scale, q), initial_state)


def lightning(*, q, k, v, g, scale=None, initial_state=None) -> Output:
    """Lightning attention: S' = lambda_h S + k v^T; o = scale S'^T q, lambda_h = exp(g_h) fixed per head and layer.

    Shapes: g [H]. State S.
    Source: Zhen Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large
    Language Models", 2024, arXiv 2401.04658.
    """
    return _additive(q, k, v, g, _scale_of(scale, q), initial_state)


def mamba2(*, q, k, v, g, scale=None, initial_state=None) -> Output:
    """Mamba2 (SSD): S' = exp(-A dt) S + B (dt x)^T; o = S'^T C. Here q = C, k = B, v = dt x, g = -A dt; scale 1.

    Shapes: g [B,T,H]. State S. The skip D x is added outside.
    Source: Tri Dao et al., "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024, arXiv 2405.21060.
    """
    return _additive(q, k, v, g, _scale_of(scale, q, 1.0), initial_state)


def gla(*, q, k, v, g, scale=None, initial_state=None) -> Output:
    """Gated linear attention: S' = diag(alpha) S + k v^T; o = scale S'^T q.

    Shapes: g [B,T,H,K]. State S.
    Source: Songlin Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023,
    arXiv 2312.06635.
    """
    return _additive(q, k, v, g, _scale_of(scale, q), initial_state)


def hgrn2(*, q, v, g, scale=None, initial_state=None) -> Output:
    """HGRN2: S' = diag(alpha) S + (1 - alpha) v^T; o = scale S'^T q. What is forgotten makes room for what is written.

    Shapes: g [B,T,H,K]; there is no k. State S.
    Source: Zhen Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024, arXiv 2404.07904.
    """
    return _additive(q, 1 - g.exp(), v, g, _scale_of(scale, q), initial_state)


def lightnet(*, q, v, g, scale=None, initial_state=None) -> Output:
    """LightNet: S' = diag(e^(z_(t-1) - z_t)) S + e^(x_t - z_t) v^T, z = logcumsumexp(x); o = scale S'^T q.

    With g = z_(t-1) - z_t the key is 1 - e^g, because z_t = logaddexp(z_(t-1), x_t): HGRN2's recurrence. The first
    token of a sequence has g = -inf.
    Shapes: g [B,T,H,K]; there is no k. State S.
    Source: Zhen Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024,
    arXiv 2405.21022.
    """
    return _additive(q, 1 - g.exp(), v, g, _scale_of(scale, q), initial_state)


def rodimus(*, q, k, v, g, temperature, scale=None, initial_state=None) -> Output:
    """Rodimus: S' = diag(e^g) S + (a^tau * k) v^T with g = -a tau, a = softplus(.); o = scale S'^T q.

    The amplitude a is recovered as -g / tau, so that decay and write share one gate as in the paper.
    Shapes: g and temperature tau > 0 [B,T,H,K]. State S. v already carries the paper's input gate.
    Source: Zhihao He et al., "Rodimus*: Breaking the Accuracy-Efficiency Trade-Off with Efficient Attentions", 2024,
    arXiv 2410.06577.
    """
    amplitude = -g / temperature
    return _additive(q, amplitude**temperature * k, v, g, _scale_of(scale, q), initial_state)


def rwkv6(*, q, k, v, g, bonus, scale=None, initial_state=None) -> Output:
    """RWKV-6: o = (S + (u * k) v^T)^T q, read first, then S' = diag(alpha) S + k v^T. Scale 1.

    Shapes: g [B,T,H,K]; bonus u [H,K]. State S. q is the paper's receptance r.
    Source: Bo Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024,
    arXiv 2404.05892.
    """
    scale, alpha = _scale_of(scale, q, 1.0), _decay(g, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        kv = _outer(k[:, t], v[:, t])
        o.append(scale * _read(S + bonus[:, :, None] * kv, q[:, t]))
        S = alpha[:, t, :, :, None] * S + kv
    return {"o": _stack(o), "S": S}


# ---------------------------------------------------------------------------------------------------------------------
# Delta rules: read what is stored, write the residual.
# ---------------------------------------------------------------------------------------------------------------------
def _delta(q, write_key, read_key, v, g, scale, initial_state) -> Output:
    """S~ = alpha * S; S' = S~ + write_key (v - S~^T read_key)^T: the residual is taken after forgetting."""
    alpha = _decay(g, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S
        S = S + _outer(write_key[:, t], v[:, t] - _read(S, read_key[:, t]))
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def deltanet(*, q, k, v, beta, scale=None, initial_state=None) -> Output:
    """DeltaNet: S' = S + beta k (v - S^T k)^T; o = scale S'^T q.

    Shapes: beta [B,T,H]. State S.
    Source: Imanol Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021, arXiv 2102.11174;
    Songlin Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
    arXiv 2406.06484.
    """
    return _delta(q, beta[..., None] * k, k, v, None, _scale_of(scale, q), initial_state)


def gated_deltanet(*, q, k, v, g, beta, scale=None, initial_state=None) -> Output:
    """Gated DeltaNet: S~ = alpha S; S' = S~ + beta k (v - S~^T k)^T; o = scale S'^T q.

    Shapes: g, beta [B,T,H]. State S.
    Source: Songlin Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv 2412.06464.
    """
    return _delta(q, beta[..., None] * k, k, v, g, _scale_of(scale, q), initial_state)


def kda(*, q, k, v, g, beta, scale=None, initial_state=None) -> Output:
    """Kimi delta attention: S~ = diag(alpha) S; S' = S~ + beta k (v - S~^T k)^T; o = scale S'^T q.

    Shapes: g [B,T,H,K]; beta [B,T,H]. State S.
    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, arXiv 2510.26692.
    """
    return _delta(q, beta[..., None] * k, k, v, g, _scale_of(scale, q), initial_state)


def gated_deltanet2(*, q, k, v, g, erase, write, scale=None, initial_state=None) -> Output:
    """Gated DeltaNet-2: S~ = diag(alpha) S; S' = S~ + k (w * v - S~^T (b * k))^T; o = scale S'^T q.

    Shapes: g and erase b [B,T,H,K]; write w [B,T,H,V]. State S.
    Source: Ali Hatamizadeh et al., "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention", 2026,
    arXiv 2605.22791.
    """
    return _delta(q, k, erase * k, write * v, g, _scale_of(scale, q), initial_state)


def comba(*, q, k, v, g, beta, p, scale=None, initial_state=None) -> Output:
    """Comba: S' = alpha S + beta k (v - S^T p)^T; o = scale S'^T q. The residual is taken *before* forgetting.

    Shapes: g, beta [B,T,H]; read key p [B,T,H,K]. State S. The output correction q - d p happens outside.
    Source: Jiaxi Hu et al., "Comba: Improving Bilinear RNNs with Closed-loop Control", 2025, arXiv 2506.02475; this is
    the form its kernels compute (see comba_decayed).
    """
    scale, alpha = _scale_of(scale, q), _decay(g, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        residual = v[:, t] - _read(S, p[:, t])
        S = alpha[:, t, :, :, None] * S + _outer(beta[:, t, :, None] * k[:, t], residual)
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def comba_decayed(*, q, k, v, g, beta, p, scale=None, initial_state=None) -> Output:
    """Comba, reading the decayed memory: S~ = alpha S; S' = S~ + beta k (v - S~^T p)^T; o = scale S'^T q.

    A second meaning of the same name in public code (its step-by-step reference), kept apart: the numbers differ.
    Shapes: g, beta [B,T,H]; read key p [B,T,H,K]. State S.
    Source: as comba.
    """
    return _delta(q, beta[..., None] * k, p, v, g, _scale_of(scale, q), initial_state)


def gated_deltaproduct(*, q, k, v, g, beta, scale=None, initial_state=None) -> Output:
    """Gated DeltaProduct: S~ = alpha S once, then n times S~ <- S~ + beta_j k_j (v_j - S~^T k_j)^T, one read. Scale 1.

    Shapes: q [B,T,H,K]; g [B,T,H]; k [B,nT,H,K], v [B,nT,H,V], beta [B,nT,H], a token's n observations one after the
    other. State S.
    Source: Julien Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025,
    arXiv 2502.10297.
    """
    scale, alpha = _scale_of(scale, q, 1.0), _decay(g, q)
    n = k.shape[1] // q.shape[1]
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S
        for j in range(n * t, n * (t + 1)):
            S = S + _outer(beta[:, j, :, None] * k[:, j], v[:, j] - _read(S, k[:, j]))
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def rwkv7(*, q, k, v, g, a, b, scale=None, initial_state=None) -> Output:
    """RWKV-7: S' = diag(alpha) S + b (a^T S) + k v^T; o = S'^T q. a reads the undecayed memory; scale 1.

    Shapes: g, a, b [B,T,H,K]. State S. In the paper a = -kappa^ and b = kappa^ * in-context learning rate.
    Source: Bo Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv 2503.14456.
    """
    scale, alpha = _scale_of(scale, q, 1.0), _decay(g, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S + _outer(b[:, t], _read(S, a[:, t])) + _outer(k[:, t], v[:, t])
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def _squashed_gain(A, base, centre, eps):
    """base**(-r / (1 + |r|)) with r = log(A + eps) - centre: at most a factor `base` up or down."""
    r = (A + eps).log() - centre
    return torch.exp(-math.log(base) * r / (1 + r.abs()))


def _preconditioned(q, k, v, g, beta, importance, g_importance, squash, scale, initial_state) -> Output:
    forget = _decay(g_importance, k)
    A = _start(initial_state, "A", q, q.shape[-1])
    gain = []
    for t in range(q.shape[1]):
        A = forget[:, t] * A + importance[:, t, :, None] * k[:, t] ** 2
        gain.append(_squashed_gain(A, *squash))
    # The preconditioner never looks at S, so the delta rule can run after it with a rescaled write key.
    write_key = beta[..., None] * _stack(gain) * k
    return {**_delta(q, write_key, k, v, g, scale, initial_state), "A": A}


def preconditioned_gdn(
    *,
    q,
    k,
    v,
    g,
    beta,
    importance,
    g_importance,
    squash_base=1.5,
    squash_centre=-0.2,
    squash_eps=1e-6,
    scale=None,
    initial_state=None,
) -> Output:
    """Preconditioned GDN: A' = e^(g_A) A + b k^2; S~ = alpha S; S' = S~ + beta (m(A') * k) (v - S~^T k)^T.

    m(A) = base^(-r / (1 + |r|)), r = log(A + eps) - centre; o = scale S'^T q.
    Shapes: g, beta, importance b, g_importance g_A [B,T,H]. States S, A [B,H,K].
    Source: Neehal Tumma et al., "Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear Recurrences",
    2026, arXiv 2604.21100.
    """
    squash = (squash_base, squash_centre, squash_eps)
    return _preconditioned(q, k, v, g, beta, importance, g_importance, squash, _scale_of(scale, q), initial_state)


def preconditioned_kda(
    *,
    q,
    k,
    v,
    g,
    beta,
    importance,
    g_importance,
    squash_base=1.5,
    squash_centre=-0.2,
    squash_eps=1e-6,
    scale=None,
    initial_state=None,
) -> Output:
    """Preconditioned KDA: A' = e^(g_A) A + b k^2; S~ = diag(alpha) S; S' = S~ + beta (m(A') * k) (v - S~^T k)^T.

    m as in preconditioned_gdn; o = scale S'^T q.
    Shapes: g [B,T,H,K]; beta, importance b, g_importance g_A [B,T,H]. States S, A [B,H,K].
    Source: Neehal Tumma et al., "Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear Recurrences",
    2026, arXiv 2604.21100.
    """
    squash = (squash_base, squash_centre, squash_eps)
    return _preconditioned(q, k, v, g, beta, importance, g_importance, squash, _scale_of(scale, q), initial_state)


# ---------------------------------------------------------------------------------------------------------------------
# Exact regressions: the whole second moment of the keys counts.
# ---------------------------------------------------------------------------------------------------------------------
def longhorn(*, q, k, v, beta, scale=None, initial_state=None) -> Output:
    """Longhorn: S' = S + beta / (1 + beta k.k) k (v - S^T k)^T; o = scale S'^T q.

    The exact minimiser of |S' - S|^2 + beta |v - S'^T k|^2. The paper's released layer keeps only the diagonal k^2 of
    k k^T in the erasing part.
    Shapes: beta [B,T,H]. State S.
    Source: Bo Liu et al., "Longhorn: State Space Models are Amortized Online Learners", 2024, arXiv 2407.14207.
    """
    scale = _scale_of(scale, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        kt, bt = k[:, t], beta[:, t, :, None]
        step = bt / (1 + bt * (kt * kt).sum(-1, keepdim=True))
        S = S + _outer(step * kt, v[:, t] - _read(S, kt))
        o.append(scale * _read(S, q[:, t]))
    return {"o": _stack(o), "S": S}


def _moments(P, M, alpha, beta, k, v):
    """One token of the normal equations: P' = alpha P + beta k k^T, M' = alpha M + beta k v^T (alpha [B,H,1])."""
    P = alpha[..., None] * P + _outer(beta[..., None] * k, k)
    M = alpha[..., None] * M + _outer(beta[..., None] * k, v)
    return P, M


def mesanet(*, q, k, v, g, beta, prior_precision, scale=None, initial_state=None) -> Output:
    """MesaNet: P' = alpha P + beta k k^T; M' = alpha M + beta k v^T; o = M'^T (P' + diag(lambda))^-1 q. Scale 1.

    variance = scale^2 q^T (P' + diag(lambda))^-1 q, the same for every value channel.
    Shapes: g, beta [B,T,H]; prior_precision lambda [H,K]. States M, P [B,H,K,K].
    Source: Johannes von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", 2025,
    arXiv 2506.05233.
    """
    scale, alpha, K = _scale_of(scale, q, 1.0), _decay(g, q), q.shape[-1]
    ridge = torch.diag_embed(_prior(prior_precision, q).expand(-1, K))
    P = _start(initial_state, "P", q, K, K)
    M = _start(initial_state, "M", q, K, v.shape[-1])
    o, variance = [], []
    for t in range(q.shape[1]):
        P, M = _moments(P, M, alpha[:, t], beta[:, t], k[:, t], v[:, t])
        x = torch.linalg.solve(P + ridge, q[:, t])
        o.append(scale * _read(M, x))
        variance.append(scale**2 * (q[:, t] * x).sum(-1, keepdim=True).expand_as(v[:, t]))
    return {"o": _stack(o), "variance": _stack(variance), "M": M, "P": P}


def gated_kalmanet(*, q, k, v, g, beta, mix, ridge, scale=None, initial_state=None) -> Output:
    """Gated KalmaNet: P' = alpha P + beta k k^T; M' = alpha M + beta k v^T; o = scale M'^T ((1 - mix) q + mix x).

    x = (P' + lambda I)^-1 q with the adaptive lambda = ridge |P'|_F, solved exactly (the paper iterates Chebyshev).
    Normalisation: here beta multiplies k k^T and k v^T once. The released code multiplies both k and v by its gate
    before accumulating, which is this recurrence with beta set to that gate squared.
    Shapes: g, beta, mix [B,T,H]; ridge [H]. States M, P [B,H,K,K]. P' = 0 (all keys zero so far) has no solution.
    Source: Liangzu Peng et al., "Gated KalmaNet: A Fading Memory Layer Through Test-Time Ridge Regression", 2025,
    arXiv 2511.21016.
    """
    scale, alpha, K = _scale_of(scale, q), _decay(g, q), q.shape[-1]
    eye = torch.eye(K, dtype=q.dtype, device=q.device)
    P = _start(initial_state, "P", q, K, K)
    M = _start(initial_state, "M", q, K, v.shape[-1])
    o = []
    for t in range(q.shape[1]):
        P, M = _moments(P, M, alpha[:, t], beta[:, t], k[:, t], v[:, t])
        adaptive = ridge * torch.linalg.matrix_norm(P)
        x = torch.linalg.solve(P + adaptive[..., None, None] * eye, q[:, t])
        share = mix[:, t, :, None]
        o.append(scale * _read(M, (1 - share) * q[:, t] + share * x))
    return {"o": _stack(o), "M": M, "P": P}


# ---------------------------------------------------------------------------------------------------------------------
# Kalman filters: forgetting adds process noise.
# ---------------------------------------------------------------------------------------------------------------------
def kdn(*, q, k, v, g, noise, beta, gain=None, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Kalman delta network, diagonal: p^ = alpha^2 p + w; kappa = p^ * k / (r + sum p^ k^2); 1/p' = 1/p^ + c k^2 / r.

    S~ = diag(alpha) S; S' = S~ + kappa (v - S~^T k)^T; o = scale S'^T q; r = 1 / beta; variance = scale^2 sum q^2 p'.
    Written with beta instead of r, so that beta = 0 is allowed.
    Shapes: g and noise w [B,T,H,K]; beta [B,T,H]; gain c [H], None for the released model's c = K (c = 1 is the
    projection of the exact posterior); prior_precision [H] or [H,K], p starts at its inverse. States S,
    Lambda = 1/p [B,H,K].
    Source: "Kalman Delta Networks: Uncertainty-aware Associative Memory", 2026, arXiv 2609.07816.
    """
    scale, alpha, K = _scale_of(scale, q), _decay(g, q), q.shape[-1]
    gain = q.new_full((q.shape[2],), float(K)) if gain is None else gain
    S = _start(initial_state, "S", q, K, v.shape[-1])
    if initial_state is None:
        p = (1 / _prior(prior_precision, q)).expand(q.shape[0], -1, K)
    else:
        p = 1 / initial_state["Lambda"]
    o, variance = [], []
    for t in range(q.shape[1]):
        kt, bt = k[:, t], beta[:, t, :, None]
        p = alpha[:, t] ** 2 * p + noise[:, t]
        kappa = bt * p * kt / (1 + bt * (p * kt**2).sum(-1, keepdim=True))
        S = alpha[:, t, :, :, None] * S
        S = S + _outer(kappa, v[:, t] - _read(S, kt))
        p = 1 / (1 / p + gain[:, None] * bt * kt**2)
        o.append(scale * _read(S, q[:, t]))
        variance.append(scale**2 * (q[:, t] ** 2 * p).sum(-1, keepdim=True).expand_as(v[:, t]))
    return {"o": _stack(o), "variance": _stack(variance), "S": S, "Lambda": 1 / p}


def kla(*, q, k, v, beta, g, noise, scale=None, initial_state=None) -> Output:
    """Kalman linear attention: d = a^2 + w L; L' = L / d + beta k^2; M' = a M / d + beta v k; o = sum_k q M' / L'.

    A filter s_t = a s_(t-1) + noise of variance w in information form, one for each key and value channel; scale 1.
    variance = scale^2 sum_k q^2 / L'. L starts at 1, M at 0.
    Shapes: beta [B,T,H,V]; g = log a and noise w [H,K,V], constant in time. States M, Lambda = L [B,H,K,V].
    Source: Vaisakh Shaj et al., "Kalman Linear Attention: Parallel Bayesian Filtering For Efficient Language Modelling
    and State Tracking", 2026, arXiv 2602.10743.
    """
    scale, a, shape = _scale_of(scale, q, 1.0), g.exp(), (q.shape[-1], v.shape[-1])
    M = _start(initial_state, "M", q, *shape)
    L = _start(initial_state, "Lambda", q, *shape, value=1.0)
    o, variance = [], []
    for t in range(q.shape[1]):
        spread = a**2 + noise * L
        M = a * M / spread + _outer(k[:, t], beta[:, t] * v[:, t])
        L = L / spread + _outer(k[:, t] ** 2, beta[:, t])
        o.append(scale * _read(M / L, q[:, t]))
        variance.append(scale**2 * _read(1 / L, q[:, t] ** 2))
    return {"o": _stack(o), "variance": _stack(variance), "M": M, "Lambda": L}


# ---------------------------------------------------------------------------------------------------------------------
# Metaplastic additive memories: an importance that grows with what was observed and falls back to a prior.
# ---------------------------------------------------------------------------------------------------------------------
def _metaplastic(q, k, v, g, importance, prior_precision, scale, initial_state) -> Output:
    alpha, shape = _decay(g, q), (q.shape[-1], v.shape[-1])
    prior = _prior(prior_precision, q)[..., None]
    M = _start(initial_state, "M", q, *shape)
    # Start at I = I_p. Forgetting (1 - alpha) I_p refills exactly what it took from the prior: only I - I_p decays.
    Ibar = _start(initial_state, "Ibar", q, *shape)
    o, variance = [], []
    for t in range(q.shape[1]):
        M = alpha[:, t, :, :, None] * M + _outer(k[:, t], v[:, t])
        Ibar = alpha[:, t, :, :, None] * Ibar + _outer(k[:, t] ** 2, importance[:, t])
        I = Ibar + prior
        o.append(scale * _read(M / I, q[:, t]))
        variance.append(scale**2 * _read(1 / I, q[:, t] ** 2))
    return {"o": _stack(o), "variance": _stack(variance), "M": M, "Ibar": Ibar}


def palimpsa(*, q, k, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Palimpsa: M' = f M + k v^T; I' = f I + (1 - f) I_p + k^2 b^T; o = scale sum_k q M' / I'; I starts at I_p.

    variance = scale^2 sum_k q^2 / I'. v is the evidence (observation precision times observation).
    Shapes: g = log f [B,T,H]; importance b [B,T,H,V]; prior_precision I_p [H] or [H,K]. States M (natural mean),
    Ibar = I - I_p [B,H,K,V].
    Source: Djohan Bonnet et al., "Learning to Remember, Learn, and Forget in Attention-Based Models", 2026,
    arXiv 2602.09075.
    """
    return _metaplastic(q, k, v, g, importance, prior_precision, _scale_of(scale, q), initial_state)


def metamamba2(*, q, k, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """MetaMamba2: Palimpsa's recurrence on Mamba2's inputs, q = C, k = B, v = dt x; scale 1 and I_p = 1.

    Shapes: g [B,T,H]; importance [B,T,H,V]; prior_precision [H] or [H,K]. States M, Ibar [B,H,K,V].
    Source: Djohan Bonnet et al., "Learning to Remember, Learn, and Forget in Attention-Based Models", 2026,
    arXiv 2602.09075.
    """
    return _metaplastic(q, k, v, g, importance, prior_precision, _scale_of(scale, q, 1.0), initial_state)


def palimpsa_key(*, q, k, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Palimpsa, one importance a key channel: M' = f M + k v^T; I' = f I + (1 - f) I_p + b k^2.

    o = scale M'^T (q / I'); variance = scale^2 sum_k q^2 / I', the same for every value channel.
    Shapes: g = log f and importance b [B,T,H]; prior_precision [H] or [H,K]. States M [B,H,K,V], Ibar [B,H,K].
    Source: no paper: Palimpsa (Djohan Bonnet et al., 2026, arXiv 2602.09075) with b shared by the value channels.
    """
    scale, alpha, prior = _scale_of(scale, q), _decay(g, q), _prior(prior_precision, q)
    M = _start(initial_state, "M", q, q.shape[-1], v.shape[-1])
    Ibar = _start(initial_state, "Ibar", q, q.shape[-1])
    o, variance = [], []
    for t in range(q.shape[1]):
        M = alpha[:, t, :, :, None] * M + _outer(k[:, t], v[:, t])
        Ibar = alpha[:, t] * Ibar + importance[:, t, :, None] * k[:, t] ** 2
        scaled_q = q[:, t] / (Ibar + prior)
        o.append(scale * _read(M, scaled_q))
        variance.append(scale**2 * (q[:, t] * scaled_q).sum(-1, keepdim=True).expand_as(v[:, t]))
    return {"o": _stack(o), "variance": _stack(variance), "M": M, "Ibar": Ibar}


def meta_linear_attention(*, q, k, v, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic linear attention: M' = M + k v^T; I' = I + k^2 b^T; o = scale sum_k q M' / I'.

    Shapes: importance b [B,T,H,V]; prior_precision [H] or [H,K]. States M, Ibar [B,H,K,V]. variance as Palimpsa.
    Source: no paper: Palimpsa (Djohan Bonnet et al., 2026, arXiv 2602.09075) without forgetting.
    """
    return _metaplastic(q, k, v, None, importance, prior_precision, _scale_of(scale, q), initial_state)


def meta_retnet(*, q, k, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic RetNet: M' = gamma_h M + k v^T; I' = gamma_h I + (1 - gamma_h) I_p + k^2 b^T.

    o and variance as Palimpsa.
    Shapes: g = log gamma [H]; importance b [B,T,H,V]; prior_precision [H] or [H,K]. States M, Ibar [B,H,K,V].
    Source: no paper: Palimpsa (Djohan Bonnet et al., 2026, arXiv 2602.09075) with RetNet's fixed forgetting.
    """
    return _metaplastic(q, k, v, g, importance, prior_precision, _scale_of(scale, q), initial_state)


def meta_gla(*, q, k, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic GLA: M' = diag(f) M + k v^T; I' = diag(f) I + (1 - f) I_p + k^2 b^T.

    o and variance as Palimpsa.
    Shapes: g = log f [B,T,H,K]; importance b [B,T,H,V]; prior_precision [H] or [H,K]. States M, Ibar [B,H,K,V].
    Source: no paper: Palimpsa (Djohan Bonnet et al., 2026, arXiv 2602.09075) with GLA's forgetting.
    """
    return _metaplastic(q, k, v, g, importance, prior_precision, _scale_of(scale, q), initial_state)


def meta_hgrn2(*, q, v, g, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic HGRN2: meta_gla with k = 1 - f.

    Shapes: g = log f [B,T,H,K]; importance [B,T,H,V]; no k; prior_precision [H] or [H,K]. States M, Ibar [B,H,K,V].
    variance as Palimpsa.
    Source: no paper: Palimpsa (Djohan Bonnet et al., 2026, arXiv 2602.09075) with HGRN2's key and forgetting.
    """
    return _metaplastic(q, 1 - g.exp(), v, g, importance, prior_precision, _scale_of(scale, q), initial_state)


# ---------------------------------------------------------------------------------------------------------------------
# Metaplastic delta rules: the memory is a posterior mean, the importance is one vector over the key channels.
# ---------------------------------------------------------------------------------------------------------------------
def _meta_delta(q, k, v, g, beta, importance, prior_precision, scale, initial_state) -> Output:
    alpha, prior = _decay(g, q), _prior(prior_precision, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    Ibar = _start(initial_state, "Ibar", q, q.shape[-1])
    o, variance = [], []
    for t in range(q.shape[1]):
        kt, I_old = k[:, t], Ibar + prior
        # D = alpha I + (1 - alpha) I_p, with the prior's two parts added up.
        D = alpha[:, t] * Ibar + prior
        Ibar = alpha[:, t] * Ibar + importance[:, t, :, None] * kt**2
        I_new = Ibar + prior
        S = (alpha[:, t] * I_old / D)[..., None] * S
        S = S + _outer(beta[:, t, :, None] * kt / I_new, v[:, t] - _read(S, kt))
        o.append(scale * _read(S, q[:, t]))
        variance.append(scale**2 * (q[:, t] ** 2 / I_new).sum(-1, keepdim=True).expand_as(v[:, t]))
    return {"o": _stack(o), "variance": _stack(variance), "S": S, "Ibar": Ibar}


def meta_deltanet(*, q, k, v, beta, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic DeltaNet: I' = I + b k^2; S' = S + (k / I') beta (v - S^T k)^T; o = scale S'^T q.

    variance = scale^2 sum q^2 / I', the same for every value channel.
    Shapes: beta (write strength) and importance b [B,T,H]; prior_precision [H] or [H,K]. States S, Ibar = I - I_p
    [B,H,K].
    Source: no paper: DeltaNet (arXiv 2406.06484) with the importance of Palimpsa (arXiv 2602.09075).
    """
    return _meta_delta(q, k, v, None, beta, importance, prior_precision, _scale_of(scale, q), initial_state)


def meta_gdn(*, q, k, v, g, beta, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic Gated DeltaNet: D = alpha I + (1 - alpha) I_p; I' = D + b k^2; m = (alpha I / D) * S.

    S' = m + (k / I') beta (v - m^T k)^T; o = scale S'^T q; variance = scale^2 sum q^2 / I'.
    Shapes: g, beta (write strength), importance b [B,T,H]; prior_precision [H] or [H,K]. States S, Ibar = I - I_p
    [B,H,K].
    Source: no paper: Gated DeltaNet (arXiv 2412.06464) with the importance of Palimpsa (arXiv 2602.09075).
    """
    return _meta_delta(q, k, v, g, beta, importance, prior_precision, _scale_of(scale, q), initial_state)


def meta_kda(*, q, k, v, g, beta, importance, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Metaplastic KDA: meta_gdn with one alpha a key channel.

    Shapes: g [B,T,H,K]; beta (write strength), importance [B,T,H]; prior_precision [H] or [H,K]. States S,
    Ibar = I - I_p [B,H,K]. variance as meta_gdn.
    Source: no paper: KDA (arXiv 2510.26692) with the importance of Palimpsa (arXiv 2602.09075).
    """
    return _meta_delta(q, k, v, g, beta, importance, prior_precision, _scale_of(scale, q), initial_state)


def mean_field_delta(*, q, k, v, g, beta, prior_precision=None, scale=None, initial_state=None) -> Output:
    """Mean-field variational delta rule: (D + beta k k^T) S' = D m + beta k v^T; L' = D + beta k^2.

    D = alpha L + (1 - alpha) L_0; m = (alpha L / D) * S; o = scale S'^T q; variance = scale^2 sum q^2 / L'. The mean
    solves the coupled system; Palimpsa, which drops the products k_j k_l, is a different posterior.
    Shapes: g, beta [B,T,H]; prior_precision L_0 [H] or [H,K]. States S, Ibar = L - L_0 [B,H,K].
    Source: no paper: the minimiser, over factorised Gaussians, of E[beta/2 |v - S^T k|^2] + alpha KL(. | previous)
    + (1 - alpha) KL(. | prior).
    """
    scale, alpha, prior = _scale_of(scale, q), _decay(g, q), _prior(prior_precision, q)
    S = _start(initial_state, "S", q, q.shape[-1], v.shape[-1])
    Ibar = _start(initial_state, "Ibar", q, q.shape[-1])
    o, variance = [], []
    for t in range(q.shape[1]):
        kt, write = k[:, t], beta[:, t, :, None] * k[:, t]
        D = alpha[:, t] * Ibar + prior
        # D m = alpha L S: the natural mean after forgetting (the prior's mean is zero).
        target = (alpha[:, t] * (Ibar + prior))[..., None] * S + _outer(write, v[:, t])
        S = torch.linalg.solve(torch.diag_embed(D) + _outer(write, kt), target)
        Ibar = alpha[:, t] * Ibar + write * kt
        L = Ibar + prior
        o.append(scale * _read(S, q[:, t]))
        variance.append(scale**2 * (q[:, t] ** 2 / L).sum(-1, keepdim=True).expand_as(v[:, t]))
    return {"o": _stack(o), "variance": _stack(variance), "S": S, "Ibar": Ibar}


PUBLISHED: dict[str, Callable[..., Output]] = {
    f.__name__: f
    for f in (
        linear_attention,
        retnet,
        lightning,
        mamba2,
        gla,
        hgrn2,
        lightnet,
        rodimus,
        rwkv6,
        deltanet,
        gated_deltanet,
        kda,
        gated_deltanet2,
        comba,
        comba_decayed,
        gated_deltaproduct,
        rwkv7,
        preconditioned_gdn,
        preconditioned_kda,
        longhorn,
        mesanet,
        gated_kalmanet,
        kdn,
        kla,
        palimpsa,
        metamamba2,
        palimpsa_key,
        meta_linear_attention,
        meta_retnet,
        meta_gla,
        meta_hgrn2,
        meta_deltanet,
        meta_gdn,
        meta_kda,
        mean_field_delta,
    )
}
