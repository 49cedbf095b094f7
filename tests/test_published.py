"""The hand-typed recurrences of models/published.py against numbers and closed forms that were not typed there.

Two kinds of evidence: golden vectors (outputs of the models' own reference code) and, for what has no golden file, a
second form of the same mathematics: a sum over all past tokens, a regression solved at once, a filter in its other
parametrisation, numbers worked out on paper. Every model must have at least one of the two.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, EXACT, GOLDEN, TOLERANCE, assert_agree

import unify.models.published as published
from unify.models.published import PUBLISHED


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_golden_file_is_used():
    assert sorted(CASES) == sorted(path.stem for path in GOLDEN.glob("*.npz"))


@pytest.mark.parametrize("file", CASES)
def test_published_equals_the_golden_numbers(file):
    model, inputs, expected = CASES[file]()
    assert_agree(PUBLISHED[model](**inputs), expected, TOLERANCE)


@pytest.mark.parametrize("file", CASES)
def test_the_comparison_sees_one_wrong_element_in_every_array(file):
    model, inputs, expected = CASES[file]()
    result = PUBLISHED[model](**inputs)
    for name in expected:
        wrong = {**result, name: result[name].clone(memory_format=torch.contiguous_format)}
        wrong[name].view(-1)[-1] += 1e-3
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            assert_agree(wrong, expected, TOLERANCE)


def test_the_comparison_sees_a_missing_array_a_broadcast_and_a_nan():
    expected = {"o": torch.zeros(2, 3)}
    assert_agree({"o": torch.zeros(2, 3)}, expected, TOLERANCE)
    with pytest.raises(AssertionError, match="missing"):
        assert_agree({}, expected, TOLERANCE)
    with pytest.raises(AssertionError, match="shape"):
        assert_agree({"o": torch.zeros(1, 3)}, expected, TOLERANCE)
    with pytest.raises(AssertionError, match="finite"):
        assert_agree({"o": torch.full((2, 3), torch.nan)}, expected, TOLERANCE)


@pytest.mark.parametrize(
    "file, other, drop",
    [
        ("comba", "comba_decayed", ()),
        ("comba_decayed_read", "comba", ()),
        ("rwkv6", "gla", ("bonus",)),
        ("gated_deltanet", "mamba2", ("beta",)),
        ("kda", "gla", ("beta",)),
        ("palimpsa", "mamba2", ("importance", "prior_precision")),
        ("preconditioned_gated_deltanet", "gated_deltanet", ("importance", "g_importance")),
    ],
)
def test_a_neighbouring_model_does_not_pass_for_the_right_one(file, other, drop):
    _, inputs, expected = CASES[file]()
    inputs = {name: value for name, value in inputs.items() if name not in drop}
    with pytest.raises(AssertionError, match="o is off by"):
        assert_agree(PUBLISHED[other](**inputs), {"o": expected["o"]}, TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# Random inputs for any model, made from its argument names
# ---------------------------------------------------------------------------------------------------------------------
B, T, H, K, V = 2, 6, 3, 4, 5  # all different, so that no axis passes for another
PER_HEAD = {"retnet", "lightning", "meta_retnet"}
PER_CHANNEL = {"gla", "hgrn2", "lightnet", "rodimus", "rwkv6", "kda", "gated_deltanet2", "rwkv7", "preconditioned_kda"}
PER_CHANNEL |= {"kdn", "meta_gla", "meta_hgrn2", "meta_kda"}
KEY_IMPORTANCE = {"palimpsa_key", "meta_deltanet", "meta_gdn", "meta_kda", "preconditioned_gdn", "preconditioned_kda"}
SCALE_ONE = {"mamba2", "metamamba2", "rwkv6", "rwkv7", "gated_deltaproduct", "mesanet", "kla"}


def shapes(model):
    """Shape and kind (any sign, positive, in (0,1), logarithm of a decay) of every tensor argument."""
    n = 2 if model == "gated_deltaproduct" else 1
    g = (H,) if model in PER_HEAD else (B, T, H, K) if model in PER_CHANNEL else (B, T, H)
    table = {
        "q": ((B, T, H, K), "any"),
        "k": ((B, n * T, H, K), "any"),
        "v": ((B, n * T, H, V), "any"),
        "g": (g, "log"),
        "beta": ((B, n * T, H), "unit"),
        "importance": ((B, T, H) if model in KEY_IMPORTANCE else (B, T, H, V), "positive"),
        "g_importance": ((B, T, H), "log"),
        "prior_precision": ((H, K) if model == "mesanet" else (H,), "positive"),
        "temperature": ((B, T, H, K), "unit"),
        "bonus": ((H, K), "any"),
        "erase": ((B, T, H, K), "unit"),
        "write": ((B, T, H, V), "unit"),
        "p": ((B, T, H, K), "any"),
        "a": ((B, T, H, K), "any"),
        "b": ((B, T, H, K), "any"),
        "mix": ((B, T, H), "unit"),
        "ridge": ((H,), "unit"),
        "noise": ((B, T, H, K), "positive"),
        "gain": ((H,), "positive"),
    }
    if model == "kla":
        table |= {"g": ((H, K, V), "log"), "noise": ((H, K, V), "positive"), "beta": ((B, T, H, V), "positive")}
    return table


def inputs_of(model, seed=0):
    make = torch.Generator().manual_seed(seed)
    inputs = {}
    for name in inspect.signature(PUBLISHED[model]).parameters:
        if name in shapes(model):
            shape, kind = shapes(model)[name]
            x = torch.randn(shape, generator=make)
            kinds = {"any": 0.6 * x, "positive": 0.2 + x.abs(), "unit": x.sigmoid(), "log": -0.05 - 0.5 * x.abs()}
            inputs[name] = kinds[kind]
    return inputs


def split(inputs, at):
    """The inputs of the first `at` tokens and of the rest; what has no batch axis belongs to both."""
    first, rest = {}, {}
    for name, x in inputs.items():
        n = x.shape[1] // T if x.shape[0] == B else 0
        first[name] = x[:, : n * at] if n else x
        rest[name] = x[:, n * at :] if n else x
    return first, rest


def outputs(result):
    return {name: result[name] for name in ("o", "variance") if name in result}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_sequence_cut_in_two_gives_the_same_result(model):
    inputs = inputs_of(model)
    whole = PUBLISHED[model](**inputs)
    first, rest = split(inputs, 4)
    one = PUBLISHED[model](**first)
    two = PUBLISHED[model](**rest, initial_state={n: x for n, x in one.items() if n not in ("o", "variance")})
    joined = {name: torch.cat([one[name], two[name]], 1) for name in outputs(whole)}
    assert_agree({**two, **joined}, whole, EXACT)


@pytest.mark.parametrize("model", PUBLISHED)
def test_outputs_have_the_shape_and_dtype_of_the_values_and_the_scale_is_linear(model):
    inputs = inputs_of(model)
    result = PUBLISHED[model](**inputs)
    for x in outputs(result).values():
        assert x.shape == (B, T, H, V)
    assert all(x.dtype == torch.float32 for x in PUBLISHED[model](**{n: x.float() for n, x in inputs.items()}).values())
    default = 1.0 if model in SCALE_ONE else K**-0.5
    doubled = PUBLISHED[model](**inputs, scale=2 * default)
    factors = {"o": 2, "variance": 4}
    assert_agree(doubled, {n: factors.get(n, 1) * x for n, x in result.items()}, EXACT)


@pytest.mark.parametrize("model", PUBLISHED)
def test_arguments_are_keyword_only_and_the_docstring_names_a_source(model):
    function = PUBLISHED[model]
    assert {p.kind for p in inspect.signature(function).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert "Source: " in function.__doc__
    assert "Shapes: " in function.__doc__


def test_the_oracle_imports_torch_and_nothing_of_the_project():
    tree = ast.parse(Path(published.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "collections.abc", "math", "torch"}


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms. Each test names the models it is evidence for.
# ---------------------------------------------------------------------------------------------------------------------
SECOND_FORM = set()


def second_form(*models):
    """Record that a test checks these models against an independent form; parametrise over them if it takes `model`."""
    SECOND_FORM.update(models)

    def mark(test):
        takes = "model" in inspect.signature(test).parameters
        return pytest.mark.parametrize("model", models)(test) if takes else test

    return mark


def per_channel(g):
    """log decays as [B,T,H,1] or [B,T,H,K]."""
    g = torch.zeros(B, T, H) if g is None else g
    g = g.expand(B, T, H) if g.ndim == 1 else g
    return g[..., None] if g.ndim == 3 else g


def weights(g):
    """What is left at t of what was written at s: exp(sum of g over s < u <= t), 0 for s > t; [B,T,S,H,1 or K]."""
    G = per_channel(g).cumsum(1)
    past = torch.ones(T, T, dtype=torch.bool).tril()[None, :, :, None, None]
    return (G[:, :, None] - G[:, None]).masked_fill(~past, -torch.inf).exp()


def summed(g, k, v):
    """sum over s <= t of weight * k_s v_s^T for every t at once: [B,T,H,K,V]."""
    return torch.einsum("btshk,bshk,bshv->bthkv", weights(g).expand(-1, -1, -1, -1, K), k, v)


def key_of(model, x):
    """The key a model writes with."""
    if model in ("hgrn2", "lightnet", "meta_hgrn2"):
        return 1 - x["g"].exp()
    if model == "rodimus":
        return x["k"] * (-x["g"] / x["temperature"]) ** x["temperature"]
    return x["k"]


@second_form("linear_attention", "retnet", "lightning", "mamba2", "gla", "hgrn2", "lightnet", "rodimus")
def test_additive_memories_are_weighted_sums_over_the_past(model):
    x = inputs_of(model)
    S = summed(x.get("g"), key_of(model, x), x["v"])
    o = torch.einsum("bthkv,bthk->bthv", S, x["q"]) * (1.0 if model in SCALE_ONE else K**-0.5)
    assert_agree(PUBLISHED[model](**x), {"o": o, "S": S[:, -1]}, EXACT)


PALIMPSAS = ("palimpsa", "metamamba2", "palimpsa_key", "meta_linear_attention", "meta_retnet", "meta_gla", "meta_hgrn2")


@second_form(*PALIMPSAS)
def test_metaplastic_memories_are_a_ratio_of_two_weighted_sums(model):
    x = inputs_of(model)
    k, b, scale = key_of(model, x), x["importance"], 1.0 if model in SCALE_ONE else K**-0.5
    b = b[..., None].expand(B, T, H, V) if model in KEY_IMPORTANCE else b
    M, Ibar = summed(x.get("g"), k, x["v"]), summed(x.get("g"), k**2, b)
    I = Ibar + x["prior_precision"][:, None, None]
    o = scale * torch.einsum("bthkv,bthk->bthv", M / I, x["q"])
    variance = scale**2 * torch.einsum("bthkv,bthk->bthv", 1 / I, x["q"] ** 2)
    final = Ibar[:, -1, ..., 0] if model in KEY_IMPORTANCE else Ibar[:, -1]
    assert_agree(PUBLISHED[model](**x), {"o": o, "variance": variance, "M": M[:, -1], "Ibar": final}, EXACT)


@second_form("lightnet")
def test_lightnet_is_a_causal_softmax_over_time():
    x = torch.randn(B, T, H, K, generator=torch.Generator().manual_seed(1))
    z = x.logcumsumexp(1)
    g = torch.cat([torch.full_like(z[:, :1], -torch.inf), z[:, :-1]], 1) - z
    assert torch.allclose(1 - g.exp(), (x - z).exp(), atol=1e-14)
    rest = inputs_of("lightnet")
    S = torch.stack(
        [torch.einsum("bshk,bshv->bhkv", x[:, : t + 1].softmax(1), rest["v"][:, : t + 1]) for t in range(T)]
    )
    o = K**-0.5 * torch.einsum("tbhkv,bthk->bthv", S, rest["q"])
    assert_agree(PUBLISHED["lightnet"](q=rest["q"], v=rest["v"], g=g), {"o": o, "S": S[-1]}, EXACT)


@second_form("hgrn2", "meta_hgrn2")
def test_hgrn2_is_gla_with_what_was_forgotten_as_its_key(model):
    x = inputs_of(model)
    expected = PUBLISHED[model.replace("hgrn2", "gla")](**x, k=1 - x["g"].exp())
    assert_agree(PUBLISHED[model](**x), expected, EXACT)


@second_form("rodimus")
def test_rodimus_gates_come_from_one_softplus():
    """k * softplus(u)^tau with decay softplus: written from u, as the paper does, not from g."""
    x = inputs_of("rodimus")
    u, tau = torch.randn(B, T, H, K), x["temperature"]
    softplus = torch.log1p(u.exp())
    expected = PUBLISHED["gla"](q=x["q"], k=x["k"] * softplus**tau, v=x["v"], g=-softplus * tau)
    assert_agree(PUBLISHED["rodimus"](**{**x, "g": -softplus * tau}), expected, EXACT)


@second_form("longhorn")
def test_longhorn_is_the_argmin_of_its_objective_at_every_token():
    """|S' - S|^2 + beta |v - S'^T k|^2 has the normal equations (I + beta k k^T) S' = S + beta k v^T."""
    x = inputs_of("longhorn")
    S, o = torch.zeros(B, H, K, V), []
    for t in range(T):
        k, b = x["k"][:, t], x["beta"][:, t, :, None, None]
        left = torch.eye(K) + b * k[..., :, None] * k[..., None, :]
        S = torch.linalg.solve(left, S + b * k[..., :, None] * x["v"][:, t, :, None, :])
        o.append(K**-0.5 * torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]))
    assert_agree(PUBLISHED["longhorn"](**x), {"o": torch.stack(o, 1), "S": S}, EXACT)


def normal_equations(x):
    """sum over the past of weight * beta * (k k^T, k v^T), at every token: [B,T,H,K,K], [B,T,H,K,V]."""
    k = x["beta"][..., None] * x["k"]
    left = torch.einsum("btshk,bshk,bshl->bthkl", weights(x["g"]).expand(-1, -1, -1, -1, K), k, x["k"])
    return left, summed(x["g"], k, x["v"])


@second_form("mesanet")
def test_mesanet_is_weighted_ridge_regression_on_all_past_tokens():
    """Least squares on the stacked rows sqrt(weight beta) k and sqrt(lambda) e_i, by QR: no normal equations at all."""
    x = inputs_of("mesanet")
    rows = (weights(x["g"])[..., 0] * x["beta"][:, None]).sqrt()  # [B,T,S,H]
    design = (rows[..., None] * x["k"][:, None]).permute(0, 1, 3, 2, 4)  # [B,T,H,S,K]
    ridge = x["prior_precision"].sqrt().diag_embed().expand(B, T, H, K, K)
    target = (rows[..., None] * x["v"][:, None]).permute(0, 1, 3, 2, 4)
    Q, R = torch.linalg.qr(torch.cat([design, ridge], -2))
    W = torch.linalg.solve_triangular(R, Q[..., :T, :].mT @ target, upper=True)
    half = torch.linalg.solve_triangular(R.mT, x["q"][..., None], upper=False)
    o = torch.einsum("bthkv,bthk->bthv", W, x["q"])
    variance = (half**2).sum((-1, -2))[..., None].expand(B, T, H, V)
    P, M = normal_equations(x)
    expected = {"o": o, "variance": variance, "P": P[:, -1], "M": M[:, -1]}
    assert_agree(PUBLISHED["mesanet"](**x), expected, EXACT)


@second_form("gated_kalmanet")
def test_gated_kalmanet_damps_each_eigenvector_of_the_key_moment():
    x = inputs_of("gated_kalmanet")
    P, M = normal_equations(x)
    e, U = torch.linalg.eigh(P)
    damp = 1 / (e + x["ridge"][:, None] * (e**2).sum(-1, keepdim=True).sqrt())
    filtered = torch.einsum("bthkl,bthl,bthml,bthm->bthk", U, damp, U, x["q"])
    mixed = x["q"] + x["mix"][..., None] * (filtered - x["q"])
    o = K**-0.5 * torch.einsum("bthkv,bthk->bthv", M, mixed)
    assert_agree(PUBLISHED["gated_kalmanet"](**x), {"o": o, "P": P[:, -1], "M": M[:, -1]}, EXACT)
    unmixed = PUBLISHED["gated_kalmanet"](**{**x, "mix": torch.zeros(B, T, H)})["o"]
    additive = PUBLISHED["mamba2"](q=x["q"], k=x["beta"][..., None] * x["k"], v=x["v"], g=x["g"], scale=K**-0.5)["o"]
    assert_agree({"o": unmixed}, {"o": additive}, EXACT)


@second_form("kla")
def test_kla_is_a_scalar_kalman_filter_in_gain_form():
    x = inputs_of("kla")
    a, w = x["g"].exp(), x["noise"]
    mean, P, o, variance = torch.zeros(B, H, K, V), torch.ones(B, H, K, V), [], []
    for t in range(T):
        k, v, r = x["k"][:, t, :, :, None], x["v"][:, t, :, None], 1 / x["beta"][:, t, :, None]
        mean, P = a * mean, a**2 * P + w
        gain = P * k / (k**2 * P + r)
        mean, P = mean + gain * (v - k * mean), (1 - gain * k) * P
        o.append(torch.einsum("bhkv,bhk->bhv", mean, x["q"][:, t]))
        variance.append(torch.einsum("bhkv,bhk->bhv", P, x["q"][:, t] ** 2))
    expected = {"o": torch.stack(o, 1), "variance": torch.stack(variance, 1), "Lambda": 1 / P, "M": mean / P}
    assert_agree(PUBLISHED["kla"](**x), expected, EXACT)


@second_form("kdn")
def test_kdn_is_a_dense_kalman_update_whose_precision_keeps_its_diagonal():
    """Information form, full matrices: (P^-1 + beta k k^T) S' = P^-1 S~ + beta k v^T; the gain multiplies beta k^2."""
    x = inputs_of("kdn")
    S, precision = torch.zeros(B, H, K, V), x["prior_precision"][:, None].expand(B, H, K)
    o, variance = [], []
    for t in range(T):
        alpha, k = x["g"][:, t].exp(), x["k"][:, t]
        information = torch.diag_embed(1 / (alpha**2 / precision + x["noise"][:, t]))
        seen = x["beta"][:, t, :, None, None] * k[..., :, None] * k[..., None, :]
        evidence = information @ (alpha[..., None] * S)
        evidence = evidence + (x["beta"][:, t, :, None] * k)[..., :, None] * x["v"][:, t, :, None, :]
        S = torch.linalg.solve(information + seen, evidence)
        precision = (information + x["gain"][:, None, None] * seen).diagonal(dim1=-2, dim2=-1)
        o.append(K**-0.5 * torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]))
        variance.append((x["q"][:, t] ** 2 / precision / K).sum(-1, keepdim=True).expand(B, H, V))
    expected = {"o": torch.stack(o, 1), "variance": torch.stack(variance, 1), "S": S, "Lambda": precision}
    assert_agree(PUBLISHED["kdn"](**x), expected, EXACT)


@second_form("kdn")
def test_kdn_with_a_pinned_covariance_is_kda():
    """w = 1 - alpha^2 and no information gained keep p = 1; on unit keys the gain is 1 / (1 + r)."""
    x = inputs_of("kdn")
    x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    pinned = {
        "noise": 1 - (2 * x["g"]).exp(),
        "gain": torch.zeros(H),
        "prior_precision": torch.ones(H),
    }
    shared = {name: x[name] for name in ("q", "k", "v", "g")}
    expected = PUBLISHED["kda"](**shared, beta=1 / (1 + 1 / x["beta"]))
    assert_agree(PUBLISHED["kdn"](**{**x, **pinned}), expected, EXACT)


def test_kdn_gains_k_times_the_information_unless_told_otherwise():
    x = inputs_of("kdn")
    x["gain"] = torch.full((H,), float(K))
    unsaid = {name: value for name, value in x.items() if name != "gain"}
    assert_agree(PUBLISHED["kdn"](**unsaid), PUBLISHED["kdn"](**x), EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Delta rules, preconditioned and metaplastic
# ---------------------------------------------------------------------------------------------------------------------
@second_form("preconditioned_kda")
def test_preconditioned_kda_meets_kda_and_preconditioned_gdn():
    x = inputs_of("preconditioned_kda")
    shared = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    A = torch.einsum("btsh,bsh,bshk->bthk", weights(x["g_importance"])[..., 0], x["importance"], x["k"] ** 2)
    expected = {**PUBLISHED["kda"](**shared), "A": A[:, -1]}
    assert_agree(PUBLISHED["preconditioned_kda"](**x, squash_base=1.0), expected, EXACT)
    x["g"] = x["g"][..., :1].expand(B, T, H, K)
    expected = PUBLISHED["preconditioned_gdn"](**{**x, "g": x["g"][..., 0]})
    assert_agree(PUBLISHED["preconditioned_kda"](**x), expected, EXACT)


def test_the_squash_on_paper():
    """K = 1, k = 1, b = e^0.8, centre -0.2: log A = 0.8, r = 1, m = 1.5^(-1/2); S = beta m v = sqrt(2/3) * 3 / 2."""
    one = torch.ones(1, 1, 1, 1)
    b = torch.full((1, 1, 1), 0.8).exp()
    zero, half = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.5)
    result = PUBLISHED["preconditioned_gdn"](
        q=one, k=one, v=3 * one, g=zero, beta=half, importance=b, g_importance=zero, squash_eps=0.0
    )
    assert_agree(result, {"o": one * 1.5 * (2 / 3) ** 0.5}, 1e-14)


def scalars(*values):
    """A sequence of numbers as [1,T,1,1]."""
    return torch.tensor(values)[None, :, None, None]


def test_retnet_on_paper():
    """gamma = 1/2, k = (1, 2), v = (4, 1), q = (3, 1): S = 4, then 2 + 2 = 4."""
    g = torch.tensor([0.5]).log()
    result = PUBLISHED["retnet"](q=scalars(3, 1), k=scalars(1, 2), v=scalars(4, 1), g=g)
    assert_agree(result, {"o": scalars(12, 4), "S": torch.full((1, 1, 1, 1), 4.0)}, 1e-14)


def test_palimpsa_on_paper():
    """f = 1/2, I_p = 2: M = 3, I = 3; then M = 3/2 + 2 = 7/2, I = 3/2 + 1 + 4/2 = 9/2."""
    g = scalars(0.5, 0.5)[..., 0].log()
    result = PUBLISHED["palimpsa"](
        q=scalars(1, 1),
        k=scalars(1, 2),
        v=scalars(3, 1),
        g=g,
        importance=scalars(1, 0.5),
        prior_precision=torch.tensor([2.0]),
    )
    states = {"M": torch.full((1, 1, 1, 1), 3.5), "Ibar": torch.full((1, 1, 1, 1), 2.5)}
    assert_agree(result, {"o": scalars(1, 7 / 9), "variance": scalars(1 / 3, 2 / 9), **states}, 1e-14)


@second_form("meta_gdn", "meta_kda")
def test_meta_delta_rules_on_paper(model):
    """alpha = 1/2, I_p = 1, write strength and importance apart.

    t = 1: D = 1, I = 1 + 1 = 2, m = 0, S = 1/2 * 1/2 * 4 = 1. t = 2 (k = 2, b = 1/2, beta = 1, v = 3):
    D = 1 + 1/2 = 3/2, I = 3/2 + 2 = 7/2, m = 2/3, S = 2/3 + (2 / (7/2)) (3 - 4/3) = 2/3 + 20/21 = 34/21.
    """
    g = scalars(0.5, 0.5).log()
    result = PUBLISHED[model](
        q=scalars(1, 1),
        k=scalars(1, 2),
        v=scalars(4, 3),
        g=g if model == "meta_kda" else g[..., 0],
        beta=scalars(0.5, 1)[..., 0],
        importance=scalars(1, 0.5)[..., 0],
    )
    expected = {"o": scalars(1, 34 / 21), "variance": scalars(1 / 2, 2 / 7), "Ibar": torch.tensor([[[2.5]]])}
    assert_agree(result, expected, 1e-14)


@second_form("meta_deltanet", "meta_gdn", "meta_kda")
def test_meta_delta_rules_are_one_observation_expanded_at_the_predicted_mean(model):
    """With importance = write strength b, in natural means and dense matrices, C = diag(b k^2) and anchor m:

    h' = alpha h + b v k - (b k k^T - C) m, precision D + C, mean h' / I'.
    """
    x = inputs_of(model)
    x["beta"] = x["importance"]
    prior = x["prior_precision"][:, None]
    h, I, o = torch.zeros(B, H, K, V), prior.expand(B, H, K), []
    for t in range(T):
        alpha, k, b = per_channel(x.get("g"))[:, t].exp(), x["k"][:, t], x["beta"][:, t, :, None]
        h, I = alpha[..., None] * h, alpha * I + (1 - alpha) * prior
        anchor = h / I[..., None]
        full = b[..., None] * k[..., :, None] * k[..., None, :]
        kept = torch.diag_embed(b * k**2)
        h = h + (b * k)[..., :, None] * x["v"][:, t, :, None, :] - (full - kept) @ anchor
        I = I + b * k**2
        o.append(K**-0.5 * torch.einsum("bhkv,bhk->bhv", h / I[..., None], x["q"][:, t]))
    expected = {"o": torch.stack(o, 1), "S": h / I[..., None], "Ibar": I - prior}
    assert_agree(PUBLISHED[model](**x), expected, EXACT)


SOURCES = {
    "palimpsa": "mamba2",
    "metamamba2": "mamba2",
    "palimpsa_key": "mamba2",
    "meta_linear_attention": "linear_attention",
    "meta_retnet": "retnet",
    "meta_gla": "gla",
    "meta_hgrn2": "hgrn2",
    "meta_deltanet": "deltanet",
    "meta_gdn": "gated_deltanet",
    "meta_kda": "kda",
}


@pytest.mark.parametrize("model, source", SOURCES.items())
def test_a_metaplastic_model_without_importance_is_its_source(model, source):
    """And with importance the two differ: the comparison is not blind to it."""
    x = inputs_of(model)
    shared = {name: value for name, value in x.items() if name not in ("importance", "prior_precision")}
    expected = {"o": PUBLISHED[source](**shared, scale=0.7)["o"]}
    x["prior_precision"] = torch.ones(H)
    none = PUBLISHED[model](**{**x, "importance": torch.zeros_like(x["importance"])}, scale=0.7)
    assert_agree(none, expected, EXACT)
    with pytest.raises(AssertionError, match="o is off by"):
        assert_agree(PUBLISHED[model](**x, scale=0.7), expected, TOLERANCE)


@second_form("palimpsa_key")
def test_palimpsa_key_is_palimpsa_with_one_importance_for_all_values():
    x = inputs_of("palimpsa_key")
    expected = PUBLISHED["palimpsa"](**{**x, "importance": x["importance"][..., None].expand(B, T, H, V)})
    assert_agree(PUBLISHED["palimpsa_key"](**x), {**outputs(expected), "M": expected["M"]}, EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Mean field: where the free energy itself is the second form
# ---------------------------------------------------------------------------------------------------------------------
def kl(mean, log_precision, other_mean, other_precision):
    """KL between factorised Gaussians, summed over channels."""
    ratio = other_precision / log_precision.exp()
    return 0.5 * (ratio + other_precision * (mean - other_mean) ** 2 - 1 - ratio.log()).sum()


def free_energy(mean, log_precision, x, t, before, prior):
    """E_q[beta/2 |v - S^T k|^2] + alpha KL(q | previous) + (1 - alpha) KL(q | prior): first sequence, first head."""
    k, v, beta, alpha = x["k"][0, t, 0], x["v"][0, t, 0], x["beta"][0, t, 0], x["g"][0, t, 0].exp()
    spread = (k[:, None] ** 2 / log_precision.exp()).sum()
    loss = 0.5 * beta * (((v - mean.mT @ k) ** 2).sum() + spread)
    old = (before["S"][0, 0], (before["Ibar"][0, 0] + prior)[:, None].expand(K, V))
    start = (torch.zeros(K, V), prior.expand(K, V))
    return loss + alpha * kl(mean, log_precision, *old) + (1 - alpha) * kl(mean, log_precision, *start)


@second_form("mean_field_delta")
def test_mean_field_delta_is_a_stationary_point_of_the_free_energy():
    x = inputs_of("mean_field_delta")
    prior = x["prior_precision"][0]
    before = PUBLISHED["mean_field_delta"](**split(x, T - 1)[0])
    after = PUBLISHED["mean_field_delta"](**x)
    mean = after["S"][0, 0].clone().requires_grad_()
    log_precision = (after["Ibar"][0, 0] + prior).log()[:, None].repeat(1, V).requires_grad_()
    gradients = torch.autograd.grad(free_energy(mean, log_precision, x, T - 1, before, prior), (mean, log_precision))
    assert max(g.abs().max() for g in gradients) < EXACT
    elsewhere = torch.autograd.grad(free_energy(mean + 0.01, log_precision, x, T - 1, before, prior), mean)[0]
    assert elsewhere.abs().max() > 1e-3


@second_form("mean_field_delta")
def test_mean_field_delta_without_forgetting_is_a_noiseless_kdn_with_gain_one():
    x = inputs_of("mean_field_delta")
    still = {"g": torch.zeros(B, T, H, K), "noise": torch.zeros(B, T, H, K), "gain": torch.ones(H)}
    expected = PUBLISHED["kdn"](**{**x, **still})
    x["g"] = torch.zeros(B, T, H)
    result = PUBLISHED["mean_field_delta"](**x)
    prior = x["prior_precision"][:, None]
    assert_agree(result, {**outputs(expected), "S": expected["S"], "Ibar": expected["Lambda"] - prior}, EXACT)


def test_mean_field_is_not_the_metaplastic_delta_rule():
    """One variance, two means: meta_gdn evaluates the products k_j k_l at the predicted mean instead of solving."""
    x = inputs_of("mean_field_delta")
    expected = PUBLISHED["mean_field_delta"](**x)
    other = PUBLISHED["meta_gdn"](**x, importance=x["beta"])
    assert_agree(other, {"Ibar": expected["Ibar"], "variance": expected["variance"]}, EXACT)
    with pytest.raises(AssertionError, match="o is off by"):
        assert_agree(other, {"o": expected["o"]}, TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# Edges between models that are exact identities
# ---------------------------------------------------------------------------------------------------------------------
def edge(parent, child, change, seed=0):
    """Parent's inputs after `change` give child's outputs on child's inputs."""
    x = inputs_of(child, seed)
    shared = {name: x[name] for name in ("q", "k", "v")}
    expected = PUBLISHED[child](**x, scale=0.7)
    assert_agree(PUBLISHED[parent](**{**shared, **change(x)}, scale=0.7), expected, EXACT)


def widen(g):
    return g[..., None].expand(*g.shape, K)


@pytest.mark.parametrize(
    "parent, child, change",
    [
        ("kda", "gated_deltanet", lambda x: {"g": widen(x["g"]), "beta": x["beta"]}),
        ("gated_deltanet", "deltanet", lambda x: {"g": torch.zeros(B, T, H), "beta": x["beta"]}),
        ("gla", "mamba2", lambda x: {"g": widen(x["g"])}),
        ("mamba2", "retnet", lambda x: {"g": x["g"].expand(B, T, H)}),
        ("gated_deltanet2", "kda", lambda x: {
            "g": x["g"], "erase": widen(x["beta"]), "write": x["beta"][..., None].expand(B, T, H, V)}),
        ("gated_deltanet2", "gla", lambda x: {
            "g": x["g"], "erase": torch.zeros(B, T, H, K), "write": torch.ones(B, T, H, V)}),
        ("comba", "gated_deltanet", lambda x: {
            "g": x["g"], "beta": x["beta"], "p": x["g"][..., None].exp() * x["k"]}),
        ("comba_decayed", "gated_deltanet", lambda x: {"g": x["g"], "beta": x["beta"], "p": x["k"]}),
        ("comba", "mamba2", lambda x: {"g": x["g"], "beta": torch.ones(B, T, H), "p": torch.zeros(B, T, H, K)}),
        ("rwkv7", "kda", lambda x: {
            "g": x["g"], "a": x["g"].exp() * x["k"], "b": -x["beta"][..., None] * x["k"],
            "k": x["beta"][..., None] * x["k"]}),
        ("rwkv7", "comba", lambda x: {
            "g": widen(x["g"]), "a": x["p"], "b": -x["beta"][..., None] * x["k"], "k": x["beta"][..., None] * x["k"]}),
        ("gated_deltaproduct", "gated_deltanet", lambda x: {"g": x["g"], "beta": x["beta"]}),
        ("rwkv6", "linear_attention", lambda x: {"g": torch.zeros(B, T, H, K), "bonus": torch.ones(H, K)}),
        ("meta_gla", "palimpsa", lambda x: {
            "g": widen(x["g"]), "importance": x["importance"], "prior_precision": x["prior_precision"]}),
    ],
)  # fmt: skip
def test_exact_edges(parent, child, change):
    edge(parent, child, change)


def test_kla_without_noise_and_palimpsa_without_forgetting_are_the_same_filter():
    """Palimpsa's v is the evidence beta * v; KLA's is the observation."""
    x = inputs_of("kla")
    still = {"g": torch.zeros(H, K, V), "noise": torch.zeros(H, K, V)}
    result = PUBLISHED["kla"](**{**x, **still})
    expected = PUBLISHED["palimpsa"](
        q=x["q"], k=x["k"], v=x["beta"] * x["v"], g=torch.zeros(B, T, H), importance=x["beta"], scale=1.0
    )
    assert_agree(result, {**outputs(expected), "M": expected["M"], "Lambda": expected["Ibar"] + 1}, EXACT)


def test_mesanet_with_one_hot_keys_is_palimpsa():
    """One-hot keys make the key moment diagonal, so nothing is lost by keeping the diagonal only."""
    x = inputs_of("mesanet")
    x["k"] = torch.eye(K)[torch.arange(B * T * H).reshape(B, T, H) % K] * x["k"]
    expected = PUBLISHED["mesanet"](**x)
    result = PUBLISHED["palimpsa"](
        q=x["q"],
        k=x["k"],
        v=x["beta"][..., None] * x["v"],
        g=x["g"],
        importance=x["beta"][..., None].expand(B, T, H, V),
        prior_precision=x["prior_precision"],
        scale=1.0,
    )
    assert_agree(result, {**outputs(expected), "M": expected["M"]}, EXACT)


def test_every_model_has_golden_numbers_or_a_second_form():
    golden = {CASES[file]()[0] for file in CASES}
    assert set(PUBLISHED) == golden | SECOND_FORM
