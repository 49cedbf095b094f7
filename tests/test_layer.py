"""One layer for any triple: the whole zoo and random triples; chunks, steps, splits, padding and packing agree."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from apart import apart
from hypothesis import given
from hypothesis import strategies as st

from unify.errors import UnifyError
from unify.models import layer as module
from unify.models.layer import RECIPES, Layer, Packing, bound_keys, rotate, short_convolution, unit_keys
from unify.models.zoo import ZOO, get
from unify.testing import assert_close, cu_seqlens, triples
from unify.triple import Architecture, Observation, Posterior, Prior, Triple

TRIPLES = {name: model.triple for name, model in ZOO.items()} | {
    "everything twice": Triple(
        Architecture(
            value="observation",
            precision="value",
            importance="value",
            write_gate=True,
            read="before",
            bonus=True,
            observations=(Observation("-b", "a", target=False), Observation(read="p")),
            repeats=2,
            maps=("l2", "rotary"),
        ),
        Posterior(curvature=("none", "diagonal"), anchor="predicted", anchor_weight="head"),
        Prior(precision="key", mean="entry", dynamics="diffusion", noise="head"),
    ),
    "evidence twice": Triple(
        Architecture(forgetting="fixed", importance="head", repeats=2),
        Posterior(curvature="key"),
        Prior(dynamics="diffusion", noise="fixed"),
    ),
}
SIZES = {"hidden_size": 12, "num_heads": 2, "head_dim": 4, "expand_v": 1.5, "rank": 3}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def strength(triple):
    return "gate" if triple.architecture.value == "evidence" else None


def make(triple, seed=0, **options):
    torch.manual_seed(seed)
    return Layer(triple, **{**SIZES, **options})


def tokens(B=2, T=7, seed=1, size=12):
    return torch.randn(B, T, size, generator=torch.Generator().manual_seed(seed))


def stepped(layer, x, cuts):
    """The layer's output and state where a sequence is cut at `cuts` and the state carried."""
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, state = layer(x[:, start:stop], state=state, output_state=True)
        parts.append(y)
    return torch.cat(parts, 1), state


def same_state(found, expected, rtol):
    assert type(found.memory) is type(expected.memory)
    for name, x, y in zip(expected.memory._fields, found.memory, expected.memory, strict=True):
        assert_close(x, y, rtol, f"state {name}")
    assert_close(found.conv, expected.conv, rtol, "the convolution's state")
    assert found.length.tolist() == expected.length.tolist()


def check_parts(layer, x, cuts, rtol):
    """Whole = in parts, padded = alone, packed = alone; returns the whole's output."""
    B, T, _ = x.shape
    y, state = layer(x, output_state=True)
    found, last = stepped(layer, x, cuts)
    assert_close(found, y, rtol, "the output in parts")
    same_state(last, state, rtol)
    assert_close(layer(x.reshape(1, B * T, -1), cu_seqlens=torch.arange(0, B * T + 1, T)).view_as(y), y, rtol, "packed")
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, 0], mask[-1, T // 2] = 0, 0  # on the left, and in the middle
    out, state = layer(x, attention_mask=mask, output_state=True)
    for n in range(B):
        alone, left = layer(x[n : n + 1, mask[n].bool()], output_state=True)
        assert_close(out[n, mask[n].bool()], alone[0], rtol, "padded")
        for a, b in zip(state.memory, left.memory, strict=True):
            assert_close(a[n], b[0], rtol, "a padded sequence's state")
    assert not out[mask == 0].any()
    return y


def check_gradients(layer, y):
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert p.grad.any(), f"the gradient of {name} is 0"


# ---- any triple --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIPLES)
def test_every_model_of_the_zoo_is_a_layer(name):
    layer = make(TRIPLES[name], num_v_heads=4, skip=True, conv_bias=True, strength=strength(TRIPLES[name]))
    check_gradients(layer, check_parts(layer, tokens(), range(1, 7), 1e-11))


def test_random_triples_are_layers():
    @given(triples(), st.integers(0, 99), st.sampled_from((0, 1, 4)), st.sampled_from((2, 4)))
    def check(triple, seed, conv_size, v_heads):
        layer = make(triple, seed, conv_size=conv_size, num_v_heads=v_heads, strength=strength(triple))
        y = check_parts(layer, tokens(T=5, seed=seed), (2, 3), 1e-7)
        y.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    check()


def test_a_carried_state_that_is_wrong_is_seen():
    layer = make(get("palimpsa").triple)
    x = tokens()
    right = layer.forward

    def forgets(x, *, state=None, **options):
        return right(x, state=None if state is None else state._replace(conv=0 * state.conv), **options)

    layer.forward = forgets
    with pytest.raises(AssertionError, match="in parts"):
        check_parts(layer, x, (3,), 1e-9)


def test_padding_that_is_written_is_seen(monkeypatch):
    real = Packing.of_mask
    monkeypatch.setattr(Packing, "of_mask", lambda mask: real(torch.ones_like(mask)))
    with pytest.raises(AssertionError, match="padded"):
        check_parts(make(get("gla").triple), tokens(), (3,), 1e-9)


def test_a_missing_gradient_is_seen():
    layer = make(get("gla").triple)
    y = layer(tokens())
    layer.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match="extra has no gradient"):
        check_gradients(layer, y)


@pytest.mark.parametrize("name", TRIPLES)
def test_arguments_are_legal_at_any_weight(name):
    layer = make(TRIPLES[name], num_heads=1, num_v_heads=2, strength=strength(TRIPLES[name]))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(30)
        layer(30 * tokens(T=4))  # the op refuses g > 0, a precision below 0 and NaN


# ---- the parts ---------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_short_convolution_never_crosses(data, T, W, bias):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    offsets = data.draw(cu_seqlens(T))
    x, weight, b = draw(1, T, 3), draw(3, W), draw(3) if bias else None
    state = draw(len(offsets) - 1, W - 1, 3)
    y, last = short_convolution(x, weight, b, state, offsets)
    for n, (start, stop) in enumerate(itertools.pairwise(offsets)):
        line = torch.cat([state[n], x[0, start:stop]])
        windows = torch.stack([line[t : t + W] for t in range(stop - start)])
        assert_close(y[0, start:stop], F.silu(torch.einsum("twc,cw->tc", windows, weight) + (b if bias else 0)), 1e-12)
        assert torch.equal(last[n], line[len(line) - W + 1 :])
        alone, _ = short_convolution(x[:, start:stop], weight, b, state[n : n + 1])
        assert_close(alone[0], y[0, start:stop], 1e-12)


def test_rotation_is_relative_and_keeps_lengths():
    q, k = torch.randn(2, 1, 1, 1, 6).unbind(0)
    at = lambda t: torch.tensor([[t]])  # noqa: E731
    near, far = (rotate(q, at(5 + s)).flatten() @ rotate(k, at(2 + s)).flatten() for s in (0, 40))
    assert_close(near, far, 1e-12)
    assert_close(rotate(q, at(9)).norm(), q.norm(), 1e-12)
    assert (rotate(q, at(1)) - q).abs().max() > 0.01


def test_grouped_heads_share_queries_and_keys():
    triple = get("gated_deltanet").triple
    few, many = make(triple, num_v_heads=4), make(triple, num_heads=4)
    weights = few.state_dict()
    for name in ("proj.q.weight", "proj.k.weight"):
        weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    q, k, v = weights["conv_weight"].split((8, 8, 24))
    twice = [x.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for x in (q, k)]
    many.load_state_dict({**weights, "conv_weight": torch.cat([*twice, v])})
    assert_close(few(tokens()), many(tokens()), 1e-12)


def test_the_importance_layer_is_its_authors():
    """Palimpsa's layer written out: v = x bs, b = sigmoid(low rank) softplus(scale) bs, D x beside, norm, then swish."""
    layer = make(get("palimpsa").triple, qk_norm="l2", strength="gate", skip=True, expand_v=1)
    x, w = tokens(B=1), dict(layer.named_parameters())
    with torch.no_grad():
        w["D"].uniform_(), w["importance_scale"].uniform_(), w["gates.prior_precision.raw"].uniform_()
    mixed = torch.cat([x @ w[f"proj.{name}.weight"].T for name in "qkv"], -1)
    mixed = F.pad(mixed, (0, 0, 3, 0))
    mixed = F.silu(sum(mixed[:, n : n + 7] * w["conv_weight"][:, n] for n in range(4)))
    q, k, v = (part.view(1, 7, 2, 4) for part in mixed.split(8, -1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    bs = torch.sigmoid(x @ w["gates.strength.up.weight"].T)
    b = torch.sigmoid(x @ w["gates.importance.down.weight"].T @ w["gates.importance.up.weight"].T).view(1, 7, 2, 4)
    b = b * F.softplus(w["importance_scale"])[:, None] * bs[..., None]
    f = torch.exp(-w["gates.g.A_log"].exp() * F.softplus(x @ w["gates.g.proj.weight"].T + w["gates.g.dt_bias"]))
    prior = w["gates.prior_precision.raw"].exp()[:, None, None]
    M, precision, out = torch.zeros(2, 4, 4), prior.expand(2, 4, 4), []
    for t in range(7):
        a = f[0, t][:, None, None]
        M = a * M + k[0, t][:, :, None] * (v * bs[..., None])[0, t][:, None]
        precision = a * precision + (1 - a) * prior + k[0, t].square()[:, :, None] * b[0, t][:, None]
        out.append(torch.einsum("hk,hkv->hv", q[0, t] / 2, M / precision) + w["D"][:, None] * v[0, t])
    o = torch.stack(out)[None]
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["out_norm.weight"]
    o = o.flatten(2) * F.silu(x @ w["gate_proj.weight"].T)
    assert_close(layer(x), o @ w["out_proj.weight"].T, 1e-12)


def test_strength_dt_and_the_inner_norm():
    """Mamba-2's: evidence dt x, and one norm over all heads behind the gate."""
    layer = make(get("mamba2").triple, strength="dt", norm="inner", expand_v=1)
    seen = {}
    op = layer.op
    layer.op = lambda **given: seen.update(given) or op(**given)
    x = tokens()
    y = layer(x)
    g, dt = layer.gates["g"](x)
    v = layer._content(x, torch.zeros(2, 3, 24), None)[0]["v"]
    assert_close(seen["v"], v * dt[..., None], 1e-12)
    assert torch.equal(seen["g"], g)
    o = op(**seen).flatten(2) * F.silu(layer.gate_proj(x))
    assert_close(y, layer.out_proj(o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()), 1e-12)


def test_which_keys_are_made_from_which():
    given = ("q", "k", "v", "a", "b", "p")
    assert bound_keys(get("rwkv7").triple, given) == {"b": ("a", -1)}
    assert bound_keys(get("comba").triple, given) == {"p": ("k", 1)}
    assert bound_keys(get("kda").triple, given) == {}
    two = Observation("-b", "a", target=False), Observation("a", "b")
    circle = Triple(Architecture(value="observation", observations=two), Posterior(anchor="predicted"))
    assert bound_keys(circle, given) == {"b": ("a", -1)}
    assert unit_keys(get("rwkv7").triple, None) == {"a", "b"}
    assert unit_keys(get("gla").triple, None) == set()
    assert unit_keys(get("gla").triple, "l2") == {"q", "k", "p"}
    assert unit_keys(get("longhorn").triple, None) == set()


def test_every_recipe_is_tried():
    kind = lambda a: a.key if a.key != "free" else a.forgetting  # noqa: E731
    inputs = {(x.name, kind(t.architecture)) for t in TRIPLES.values() for x in module.compile(t).recurrence.inputs}
    found = {f"g of {kind}" if name == "g" else name for name, kind in inputs} | {"strength", "rate"}
    assert found - set(module.CONTENT) - {"g of head", "g of fixed", "g_importance"} == set(RECIPES)


# ---- starting, dtypes, hooks -------------------------------------------------------------------------------------


def test_decays_start_as_the_field_does():
    decay = make(get("gated_deltanet").triple, hidden_size=8, num_heads=512, head_dim=1, expand_v=1).gates["g"]
    A, dt = decay.A_log.exp(), F.softplus(decay.dt_bias)
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1
    assert abs(dt.log().mean().exp() - 1e-2) < 1e-3  # log-uniform
    retnet = make(get("retnet").triple)
    assert_close(module._retention(2, torch.zeros(1)).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6.0]), 1e-12)
    assert "g" not in retnet.gates


def test_scales_and_rates_are_spared_from_weight_decay():
    layer = make(get("palimpsa").triple, skip=True)
    spared = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert spared == {"gates.g.A_log", "gates.g.dt_bias", "D", "importance_scale", "gates.prior_precision.raw"}


def test_a_prior_that_is_not_learned_is_a_buffer():
    layer = make(get("palimpsa").triple, learn_prior=False)
    assert "gates.prior_precision.raw" in layer.state_dict()
    assert "gates.prior_precision.raw" not in dict(layer.named_parameters())
    assert_close(layer(tokens()), make(get("palimpsa").triple)(tokens()), 1e-15)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_gates_stay_wide_beside_narrow_content(how):
    torch.set_default_dtype(torch.float32)
    layer = make(get("palimpsa").triple)
    x = tokens().float()
    exact = layer(x)
    seen = {}
    op = layer.op
    layer.op = lambda **given: seen.update(given) or op(**given)
    if how == "bfloat16":
        y, state = layer.to(torch.bfloat16)(x.bfloat16(), output_state=True)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(x, output_state=True)
    assert {seen[name].dtype for name in "qkv"} == {torch.bfloat16}
    assert {seen[name].dtype for name in ("g", "importance", "prior_precision")} == {torch.float32}
    assert {s.dtype for s in state.memory} == {torch.float32}
    assert_close(y.float(), exact, 0.05)


def test_hooks_read_importance_and_variance():
    layer = make(get("palimpsa").triple)
    x, seen, given = tokens(), [], []
    op = layer.op
    layer.op = lambda **options: given.append(options) or op(**options)
    plain = layer(x)
    assert not given[-1]["return_variance"]
    assert not given[-1]["output_final_state"]
    handle = layer.register_readout_hook(seen.append)
    assert_close(layer(x), plain, 1e-12)
    mask = torch.ones(2, 7)
    mask[0, :3] = 0
    layer(x, attention_mask=mask.long())
    handle.remove()
    layer(x)
    assert not given[-1]["return_variance"]
    whole, padded = seen
    assert whole.layer is layer
    assert whole.memory._fields == ("M", "Ibar")
    options = {**given[1], "output_final_state": True}
    assert torch.equal(whole.variance, op(**options)[1])
    assert torch.equal(whole.importance, given[1]["importance"])
    for name in ("variance", "importance"):
        assert_close(getattr(padded, name)[1], getattr(whole, name)[1], 1e-12)
        assert not getattr(padded, name)[0, :3].any()
    twice = make(replace(get("meta_gdn").triple, architecture=replace(get("meta_gdn").triple.architecture, repeats=2)))
    twice.register_readout_hook(seen.append)
    twice(x, attention_mask=mask.long())
    assert seen[-1].importance.shape == (2, 14, 2)
    assert not seen[-1].importance[0, :6].any()
    assert seen[-1].importance[0, 6:].all()
    fixed = make(get("gla").triple)
    fixed.register_readout_hook(seen.append)
    fixed(x)
    assert seen[-1].importance is None
    assert (seen[-1].variance > 0).all()


@pytest.mark.parametrize("name", ["kla", "kdn", "palimpsa"])
def test_sequences_that_have_not_begun_start_later(name):
    layer, x = make(get(name).triple), tokens(B=3, T=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]])
    whole, end = layer(x, attention_mask=mask, output_state=True)
    state, parts = None, []
    for t in (0, 2, 4):  # in the first part nobody has
        y, state = layer(x[:, t : t + 2], attention_mask=mask[:, t : t + 2], state=state, output_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, 1e-12)
    same_state(state, end, 1e-12)
    y, still = layer(x, attention_mask=0 * mask, state=state, output_state=True)
    same_state(still, end, 1e-12)
    assert not y.any()
    assert not layer(x, attention_mask=0 * mask).any()


def test_it_is_made_without_memory_and_keeps_its_weights():
    triple = get("meta_kda").triple
    with torch.device("meta"):
        empty = make(triple)
    real = make(triple, seed=5)
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(empty(tokens()), real(tokens()))


def test_a_layer_needs_no_transformers_and_is_one_graph(tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import unify, unify.models\nprint('torch' in sys.modules)\n"
        "from unify.models import Layer\nfrom unify.models.zoo import get\nfrom unify.errors import UnifyError\n"
        "import torch; layer, x = Layer(get('gla').triple, 8, 2, 4), torch.randn(2, 9, 8)\n"
        "print(torch.equal(torch.compile(layer, backend='aot_eager', fullgraph=True)(x), layer(x)))\n"
        "try:\n    unify.models.UnifyConfig\nexcept UnifyError as error:\n    print(error)"
    )
    heavy, equal, refusal = apart(code, tmp_path)
    assert heavy == "False"
    assert equal == "True"
    assert "pip install 'unify-attention[hf]'" in refusal


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gla", {"num_v_heads": 3}, "use a multiple of num_heads"),
        ("gla", {"expand_v": 1.3}, "make it a whole number"),
        ("gla", {"gate": "relu"}, "use None, 'swish', 'sigmoid'"),
        ("gla", {"norm": "layer"}, "use 'head', 'inner'"),
        ("gla", {"qk_norm": "l1"}, "use None, 'l2'"),
        ("gla", {"strength": "dt"}, "use forgetting='head', or 'gate'"),
        ("kda", {"strength": "gate"}, "an observation has its beta"),
        ("retnet", {"head_dim": 5, "expand_v": 1}, "use an even one"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, says):
    with pytest.raises(UnifyError, match=says):
        make(get(name).triple, **options)


def test_maps_sizes_and_masks_that_do_not_fit_are_refused():
    triple = get("gla").triple
    with pytest.raises(UnifyError, match="use 'l2' and 'rotary'"):
        make(replace(triple, architecture=replace(triple.architecture, maps=("elu",))))
    with pytest.raises(UnifyError, match="a size is empty"):
        make(triple, num_heads=0)
    layer, ones = make(triple), torch.ones(2, 7, dtype=torch.int64)
    with pytest.raises(UnifyError, match=r"pass \[2, 7\]"):
        layer(tokens(), attention_mask=ones[:, 1:])
    with pytest.raises(UnifyError, match="pass cu_seqlens alone, with B=1"):
        layer(tokens(), cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(UnifyError, match="end with 7"):
        layer(tokens(B=1), cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize("name", ["palimpsa", "gated_deltanet", "mesanet"])
def test_kernels_take_what_a_layer_makes(name, monkeypatch, tmp_path):
    """Views, bfloat16 beside float32 and packed sequences, in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))
    torch.set_default_dtype(torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = []
    for backend in ("torch", "triton"):
        layer = make(get(name).triple, num_v_heads=4, backend=backend).bfloat16()
        y, state = layer(tokens(T=5).bfloat16(), attention_mask=mask, output_state=True)
        y.float().square().sum().backward()
        step = layer(tokens(T=1).bfloat16(), state=state)
        found.append((y.float(), step.float(), *(p.grad.float() for p in layer.parameters())))
    for x, expected in zip(*reversed(found), strict=True):
        assert_close(x, expected, 0.05)
