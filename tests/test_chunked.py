"""The chunk-parallel schedules against token loops written here, in float64: values, states, gradients."""

import pytest
import torch

from unify.lower import chunked

LENGTHS = [1, 63, 64, 65, 130]


# ---- how two results are compared ------------------------------------------------------------------------------------


def check(got, want, tol):
    """Nothing but finite numbers, and the largest difference at most tol times the largest value."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert torch.isfinite(want).all()
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp_min(1e-6)
        assert error <= tol, f"relative error {error:.1e} > {tol:.0e}"


def test_check_sees_planted_errors():
    want = torch.randn(4, 5, dtype=torch.float64)
    check(want.clone(), want, 1e-15)
    off = want.clone()
    off[2, 3] += 1e-8 * want.abs().max()
    check(off, want, 1e-7)
    with pytest.raises(AssertionError, match="relative error"):
        check(off, want, 1e-9)
    off[2, 3] = float("nan")
    for bad in (off, want[:3]):
        with pytest.raises(AssertionError):
            check(bad, want, 1e-9)


def agree(fast, slow, inputs, tol=1e-9, grad_tol=1e-8):
    """Same values, and same gradients of a random functional of all outputs with respect to every input."""
    names = [n for n, x in inputs.items() if x is not None]
    both = []
    for f in (fast, slow):
        leaves = {n: inputs[n].clone().requires_grad_() for n in names}
        out = [x for x in f(**{n: leaves.get(n) for n in inputs}) if x is not None]
        with torch.no_grad():
            plain = [x for x in f(**inputs) if x is not None]
        torch.manual_seed(7)
        loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in out)
        both.append((out, plain, torch.autograd.grad(loss, list(leaves.values()))))
    (got, got_plain, got_grads), (want, _, want_grads) = both
    assert len(got) == len(want)
    for x, y, z in zip(got, want, got_plain, strict=True):
        check(x, y, tol)
        check(z, y, tol)
    for name, x, y in zip(names, got_grads, want_grads, strict=True):
        try:
            check(x, y, grad_tol)
        except AssertionError as e:
            raise AssertionError(f"gradient of {name}: {e}") from None


# ---- inputs ----------------------------------------------------------------------------------------------------------

B, H, K, V = 2, 3, 5, 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gates(*shape, kind="mixed"):
    """Log decays: everything from none to total in one sequence, or a plain learned-looking gate."""
    if kind == "soft":
        return -torch.rand(*shape, dtype=torch.float64) * 0.2
    levels = torch.tensor([0.0, -1e-6, -0.05, -1.0, -30.0, -800.0], dtype=torch.float64)
    rare = torch.tensor([0.25, 0.3, 0.3, 0.09, 0.04, 0.02], dtype=torch.float64)
    return levels[torch.multinomial(rare, torch.Size(shape).numel(), replacement=True)].view(shape)


def gate_shape(T, wide):
    return (B, T, H, K) if wide else (B, T, H)


def column(g):
    """exp(g) of one token as a factor of the state."""
    return g.exp()[..., None, None] if g.ndim == 2 else g.exp()[..., None]


def outer(x, y):
    return x[..., :, None] * y[..., None, :]


def read(S, q):
    return torch.einsum("bhk,bhkv->bhv", q, S)


def keys(*shape):
    """Unit keys, so that random delta rules do not explode."""
    return torch.nn.functional.normalize(randn(*shape), dim=-1)


# ---- decayed sums and boundary states --------------------------------------------------------------------------------


def sum_loop(g, x, x0):
    y, out = x0, []
    for t in range(x.shape[1]):
        y = g[:, t].exp() * y + x[:, t]
        out.append(y)
    return torch.stack(out, 1), y


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dims, gate", [((), ()), ((K,), (1,)), ((K,), (K,)), ((K, V), (1, 1)), ((K, V), (K, 1))])
def test_decayed_sum(T, dims, gate):
    torch.manual_seed(T)
    inputs = {"g": gates(B, T, H, *gate), "x": randn(B, T, H, *dims), "x0": randn(B, H, *dims)}
    agree(chunked.decayed_sum, sum_loop, inputs)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("chunk", [4, 64])
def test_later(T, chunk):
    torch.manual_seed(T)

    def slow(g):
        after = [g[:, t + 1 :].sum(1) for t in range(T)]
        return torch.stack(after, 1), g.sum(1)

    agree(lambda g: chunked.later(g, chunk), slow, {"g": gates(B, T, K)})


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("chunk", [16, 24])
def test_boundary_states(T, wide, chunk):
    torch.manual_seed(T)
    inputs = {"g": gates(*gate_shape(T, wide)), "k": randn(B, T, H, K), "v": randn(B, T, H, V), "s0": randn(B, H, K, V)}

    def slow(g, k, v, s0):
        S, out = s0, []
        for t in range(T):
            if t % chunk == 0:
                out.append(S)
            S = column(g[:, t]) * S + outer(k[:, t], v[:, t])
        return torch.stack(out, 1), S

    agree(lambda g, k, v, s0: chunked.boundary_states(g, k, v, s0, chunk), slow, inputs)


# ---- linear and rank one ---------------------------------------------------------------------------------------------


def linear_loop(q, k, v, g, s0, before=False):
    S, out = s0, []
    for t in range(q.shape[1]):
        old, S = S, column(g[:, t]) * S + outer(k[:, t], v[:, t])
        out.append(read(old if before else S, q[:, t]))
    return torch.stack(out, 1), S


def linear_inputs(T, wide, kind="mixed"):
    return {
        "q": randn(B, T, H, K),
        "k": randn(B, T, H, K),
        "v": randn(B, T, H, V),
        "g": gates(*gate_shape(T, wide), kind=kind),
        "s0": randn(B, H, K, V),
    }


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_linear(T, wide, before):
    torch.manual_seed(T)
    agree(
        lambda **x: chunked.linear(**x, before=before),
        lambda **x: linear_loop(**x, before=before),
        linear_inputs(T, wide),
    )


def rank_one_loop(q, r, w, k, v, g, s0, before=False):
    S, out = s0, []
    for t in range(q.shape[1]):
        y = read(S, r[:, t])
        old, S = S, column(g[:, t]) * S - outer(w[:, t], y) + outer(k[:, t], v[:, t])
        out.append(read(old if before else S, q[:, t]))
    return torch.stack(out, 1), S


def rank_one_inputs(T, wide, kind="mixed"):
    x = linear_inputs(T, wide, kind)
    g = x["g"] if wide else x["g"][..., None]
    k = keys(B, T, H, K)
    return x | {"r": g.exp() * k, "w": torch.rand(B, T, H, 1, dtype=torch.float64) * k, "k": keys(B, T, H, K)}


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_rank_one(T, wide, before):
    torch.manual_seed(T)
    agree(
        lambda **x: chunked.rank_one(**x, before=before),
        lambda **x: rank_one_loop(**x, before=before),
        rank_one_inputs(T, wide),
    )


@pytest.mark.parametrize("T", [1, 65, 130])
@pytest.mark.parametrize("wide", [False, True])
def test_rank_one_delta_rule_shares_its_write_key(T, wide):
    torch.manual_seed(T)
    inputs = rank_one_inputs(T, wide)
    del inputs["k"]
    agree(
        lambda w, **x: chunked.rank_one(w=w, k=w, **x),
        lambda w, **x: rank_one_loop(w=w, k=w, **x),
        inputs,
    )


def test_rank_one_with_unrelated_vectors():
    """r and w of their own, not a delta rule: the transition is any diagonal plus rank one."""
    torch.manual_seed(0)
    inputs = rank_one_inputs(70, True, "soft")
    inputs |= {"r": 0.3 * keys(B, 70, H, K), "w": 0.3 * keys(B, 70, H, K)}
    agree(chunked.rank_one, rank_one_loop, inputs)


# ---- elementwise -----------------------------------------------------------------------------------------------------


def elementwise_loop(q, k, v, b, g, prior, M0, I0, spread=None, bonus=None, before=False, variance=False):
    spread = k * k if spread is None else spread
    M, I, out, var = M0, I0, [], []
    for t in range(q.shape[1]):
        if before:
            extra = 0 if bonus is None else outer(bonus * k[:, t], v[:, t])
            out.append(read((M + extra) / (prior + I), q[:, t]))
            var.append(read(1 / (prior + I), q[:, t] ** 2))
        a = column(g[:, t])
        M, I = a * M + outer(k[:, t], v[:, t]), a * I + outer(spread[:, t], b[:, t])
        if not before:
            out.append(read(M / (prior + I), q[:, t]))
            var.append(read(1 / (prior + I), q[:, t] ** 2))
    return torch.stack(out, 1), torch.stack(var, 1) if variance else None, M, I


def elementwise_inputs(T, wide, prior=(K, V), kind="mixed"):
    x = linear_inputs(T, wide, kind)
    x["M0"] = x.pop("s0")
    return x | {
        "b": torch.rand(B, T, H, V, dtype=torch.float64),
        "prior": torch.rand(H, *prior, dtype=torch.float64) + 0.5,
        "I0": torch.rand(B, H, K, V, dtype=torch.float64),
    }


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("variance", [False, True])
def test_elementwise(T, wide, variance):
    torch.manual_seed(T)
    prior = {1: (1, 1), 63: (K, 1), 64: (K, V), 65: (K, V), 130: (1, 1)}[T]
    agree(
        lambda **x: chunked.elementwise(**x, variance=variance),
        lambda **x: elementwise_loop(**x, variance=variance),
        elementwise_inputs(T, wide, prior),
    )


@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_elementwise_read_before(T, variance, bonus):
    torch.manual_seed(T)
    inputs = elementwise_inputs(T, True)
    inputs["bonus"] = randn(H, K) if bonus else None
    agree(
        lambda **x: chunked.elementwise(**x, before=True, variance=variance),
        lambda **x: elementwise_loop(**x, before=True, variance=variance),
        inputs,
    )


def test_elementwise_with_its_own_spread():
    torch.manual_seed(0)
    inputs = elementwise_inputs(70, False)
    inputs["spread"] = torch.rand(B, 70, H, K, dtype=torch.float64)
    agree(chunked.elementwise, elementwise_loop, inputs)


# ---- solve -----------------------------------------------------------------------------------------------------------


def solve_loop(q, k, v, b, g, prior, M0, P0, ridge=None, mix=None, before=False, variance=False):
    M, P, out, var = M0, P0, [], []

    def at(t):
        if ridge is None:
            diagonal = prior.expand(B, H, K)
        else:
            square = (P * P).sum((-2, -1))
            some = square > 0
            root = torch.where(some, square, torch.ones_like(square)).sqrt()
            diagonal = torch.where(some, ridge * root, torch.ones_like(root))[..., None].expand(B, H, K)
        x = torch.linalg.solve(P + torch.diag_embed(diagonal), q[:, t])
        m = 1 if mix is None else mix[:, t, :, None]
        out.append(read(M, (1 - m) * q[:, t] + m * x))
        var.append((q[:, t] * x).sum(-1, keepdim=True).expand(B, H, V))

    for t in range(q.shape[1]):
        if before:
            at(t)
        a = column(g[:, t])
        M, P = a * M + outer(k[:, t], v[:, t]), a * P + b[:, t, :, None, None] * outer(k[:, t], k[:, t])
        if not before:
            at(t)
    return torch.stack(out, 1), torch.stack(var, 1) if variance else None, M, P


def solve_inputs(T, ridge, mix, kind="mixed", empty=False):
    x = linear_inputs(T, False, kind)
    x["M0"] = x.pop("s0") * (not empty)
    root = randn(B, H, K, K)
    return x | {
        "b": torch.rand(B, T, H, dtype=torch.float64),
        "prior": None if ridge else torch.rand(H, K, dtype=torch.float64) + 0.5,
        "P0": (root @ root.mT + 0.1 * root) * (not empty),  # its gradient need not be symmetric, so let it not be
        "ridge": torch.rand(H, dtype=torch.float64) + 0.1 if ridge else None,
        "mix": torch.rand(B, T, H, dtype=torch.float64) if mix else None,
    }


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("ridge, mix", [(False, False), (True, True)])
def test_solve(T, before, ridge, mix):
    torch.manual_seed(T)
    agree(
        lambda **x: chunked.solve(**x, before=before, variance=T != 63),
        lambda **x: solve_loop(**x, before=before, variance=T != 63),
        solve_inputs(T, ridge, mix),
    )


@pytest.mark.parametrize("before", [False, True])
def test_solve_with_a_ridge_and_nothing_seen_yet(before):
    """P = 0 makes the system singular; the read of an empty memory is 0 all the same, and so are its gradients."""
    torch.manual_seed(0)
    inputs = solve_inputs(20, True, False, empty=True)
    inputs["k"][:, :3] = 0
    agree(
        lambda **x: chunked.solve(**x, before=before, variance=True),
        lambda **x: solve_loop(**x, before=before, variance=True),
        inputs,
    )


# ---- all schedules ---------------------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": (chunked.linear, linear_inputs, ("s0",)),
    "rank one": (chunked.rank_one, rank_one_inputs, ("s0",)),
    "elementwise": (chunked.elementwise, elementwise_inputs, ("M0", "I0")),
    "solve": (chunked.solve, lambda T, wide: solve_inputs(T, False, False), ("M0", "P0")),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_sequence_may_be_cut_anywhere(name, wide, cut):
    run, make, states = SCHEDULES[name]
    torch.manual_seed(cut)
    inputs = make(130, wide)
    whole = run(**inputs)

    def part(a, z):
        return {n: x[:, a:z] if x is not None and x.ndim > 2 and x.shape[1] == 130 else x for n, x in inputs.items()}

    first = run(**part(0, cut))
    second = run(**(part(cut, 130) | dict(zip(states, first[-len(states) :], strict=True))))
    check(torch.cat((first[0], second[0]), 1), whole[0], 1e-10)
    for x, y in zip(second[-len(states) :], whole[-len(states) :], strict=True):
        check(x, y, 1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wide", [False, True])
def test_chunk_lengths_agree(name, wide):
    run, make, _ = SCHEDULES[name]
    torch.manual_seed(1)
    inputs = make(130, wide)
    want = run(**inputs)
    for chunk in (1, 2, 13, 128, 512):
        for x, y in zip(run(**inputs, chunk=chunk), want, strict=True):
            if y is not None:
                check(x, y, 1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wide", [False, True])
def test_slabs_agree(name, wide, monkeypatch):
    """Long sequences and many heads are worked on in pieces; the size of a piece is not seen in the result."""
    run, make, _ = SCHEDULES[name]
    torch.manual_seed(2)
    inputs = make(130, wide)
    want = run(**inputs, chunk=16)
    for slab in (1, 4000, 40000):
        monkeypatch.setattr(chunked, "_SLAB", slab)
        monkeypatch.setattr(chunked, "_STATES", slab)
        for x, y in zip(run(**inputs, chunk=16), want, strict=True):
            if y is not None:
                check(x, y, 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wide", [False, True])
def test_float32_is_computed_in_float32_and_stays_accurate(name, wide):
    """Strong gates do not cost the weak ones their digits: single precision holds with -30 and -1e-6 in one chunk."""
    run, make, _ = SCHEDULES[name]
    torch.manual_seed(3)
    inputs = make(130, wide)
    want = run(**inputs)
    got = run(**{n: x if x is None else x.float() for n, x in inputs.items()})
    for x, y in zip(got, want, strict=True):
        if y is not None:
            assert x.dtype == torch.float32
            check(x.double(), y, 1e-5)


def test_inputs_are_left_alone():
    for name, (run, make, _) in SCHEDULES.items():
        inputs = make(20, False)
        copies = {n: x if x is None else x.clone() for n, x in inputs.items()}
        run(**inputs)
        for n, x in inputs.items():
            assert x is None or torch.equal(x, copies[n]), (name, n)
