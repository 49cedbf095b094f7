"""Conversion of transformers' models: nothing changes, everything can be undone, and the importance is the one we say."""

import copy
import json
import warnings

import pytest
import torch
from hosts import HOSTS, host
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import unify
from unify.errors import UnifyError
from unify.models import mixers as families
from unify.models.checkpoint import Check, check
from unify.models.convert import branches, metaplastic, mixers, save_adapter, unmetaplastic
from unify.models.mixers import Importance, family, grafted

KINDS = ["key", "diagonal"]


@pytest.fixture(autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)


def tokens(*shape, low=1):
    return torch.randint(low, 97, shape)


def awake(model, low=0.2, high=0.8):
    """The model with an importance that has been trained away from zero, some of it below zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("importance.scale"):
                p.uniform_(low, high).mul_(torch.tensor([1.0, -1.0]).repeat(p.numel() // 2))
    return model


def converted(name, kind=None, **changes):
    return awake(metaplastic(host(name, **changes), kind, quiet=True, train="all"))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# -- nothing changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTS)
def test_logits_are_the_host_s_padded_in_text_and_decoding_and_the_scale_can_learn(name, kind):
    model = host(name)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    result = check(model, lambda m: metaplastic(m, kind, quiet=True))
    assert result.bound == 1e-5
    assert result.ok, str(result)
    after = {n: x for n, x in model.state_dict().items() if ".importance." not in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[n]) for n, x in before.items())
    ids = tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        if n.endswith("importance.scale"):
            assert p.grad.isfinite().all()
            assert p.grad.norm() > 0
        elif ".importance." not in n:
            assert p.grad is None


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "minimax"])
def test_the_comparison_sees_an_importance_that_is_not_zero(name):
    result = check(host(name), lambda m: awake(metaplastic(m, quiet=True), 0.01, 0.01))
    assert not result.ok
    assert min(result.errors.values()) > result.bound


def test_the_comparison_sees_a_state_that_is_not_carried(monkeypatch):
    whole = families.Adapter._memory
    monkeypatch.setattr(families.Adapter, "_memory", lambda self, *a, state, **o: whole(self, *a, state=None, **o))
    result = check(host("qwen3_next"), lambda m: metaplastic(m, quiet=True))
    assert result.errors["decoding"] > result.bound
    assert result.errors["text"] < result.bound


@pytest.mark.parametrize("training", [True, False])
def test_the_comparison_leaves_training_as_it_was_even_where_it_fails(training):
    model = host("mamba2").train(training)
    with pytest.raises(UnifyError, match="rank=0"):
        check(model, lambda m: metaplastic(m, rank=0))
    assert model.training == training


def test_the_comparison_sees_a_nan():
    assert not Check({"text": float("nan")}, 1.0).ok


def first_mixer_s_output(model, ids):
    """What the first mixer makes of the embeddings, float32 (later layers may send a rounding to another expert)."""
    found = []
    hook = next(iter(mixers(model).values())).register_forward_hook(lambda m, args, out: found.append(out))
    logits(model, ids)
    hook.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0]).float()


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "minimax"])
def test_in_half_precision_it_is_no_further_from_float32_than_its_host(name):
    ids = tokens(2, 40)
    exact = first_mixer_s_output(host(name), ids)
    model = host(name).bfloat16()
    rounded = off(first_mixer_s_output(model, ids), exact)
    metaplastic(model, quiet=True)
    assert 0 < off(first_mixer_s_output(model, ids), exact) < 1.1 * rounded
    assert {x.dtype for x in branches(model).values()} == {torch.bfloat16}
    with pytest.raises(UnifyError, match="half precision hides a difference"):
        check(unmetaplastic(model), metaplastic)


@pytest.mark.parametrize("name", HOSTS)
def test_undone_it_is_the_host_bit_for_bit(name):
    model = host(name)
    next(model.parameters()).requires_grad_(False)  # what did not train before does not train after
    was = {n: (type(m), m.training) for n, m in model.named_modules()}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    ids = tokens(2, 9)
    expected = logits(model, ids)
    unmetaplastic(awake(metaplastic(model, quiet=True)))
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == was
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert "save_pretrained" not in vars(model)
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(UnifyError, match="it is not metaplastic"):
        unmetaplastic(model)


# -- the importance is the one we say ----------------------------------------------------------------------------------


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def by_hand(mixer, x):
    """Importance b = sigmoid(W_up W_down x) |s|, [B, T, H, V or 1]."""
    b = torch.sigmoid(x @ mixer.importance.down.weight.T @ mixer.importance.up.weight.T)
    return b.view(*x.shape[:2], len(mixer.importance.scale), -1) * mixer.importance.scale.abs()[:, None]


def convolved(mixer, x):
    """A causal depthwise convolution and SiLU, [B, T, C]."""
    width, T = mixer.conv1d.weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = sum(padded[:, i : i + T] * mixer.conv1d.weight[:, 0, i] for i in range(width))
    return F.silu(taps + (0 if mixer.conv1d.bias is None else mixer.conv1d.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mamba2_mixer_is_metamamba2_written_by_hand(kind):
    mixer = converted("mamba2", kind).double().backbone.layers[0].mixer
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    H, P, N, G = 8, 8, 8, 2
    z, xBC, dt = (x @ mixer.in_proj.weight.T).split([H * P, H * P + 2 * G * N, H], -1)
    value, B, C = convolved(mixer, xBC).split([H * P, G * N, G * N], -1)
    value = value.view(2, 11, H, P)
    B, C = (y.view(2, 11, G, N).repeat_interleave(H // G, 2) for y in (B, C))
    dt = F.softplus(dt + mixer.dt_bias)
    alpha = (-mixer.A_log.exp() * dt).exp()
    b = by_hand(mixer, x) * dt[..., None]
    M, I = torch.zeros(2, H, N, P).double(), torch.ones(2, H, N, P).double()
    out = []
    for t in range(11):
        a, k = alpha[:, t, :, None, None], B[:, t, :, :, None]
        M = a * M + k * (dt[:, t, :, None] * value[:, t])[:, :, None]
        I = a * I + (1 - a) + k**2 * b[:, t, :, None]
        out.append((C[:, t, :, :, None] * M / I).sum(2) + mixer.D[:, None] * value[:, t])
    y = torch.stack(out, 1).flatten(2) * F.silu(z)
    y = y.view(2, 11, G, -1)
    y = (y / (y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).sqrt()).flatten(2) * mixer.norm.weight
    with torch.no_grad():
        assert off(mixer(x), y @ mixer.out_proj.weight.T) < 1e-5  # the mixer computes its scan in float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_deltanet_mixer_is_meta_gdn_written_by_hand(kind):
    mixer = converted("olmo_hybrid", kind, linear_num_key_heads=2).model.layers[0].linear_attn
    x = torch.randn(2, 11, 32)
    q, k, v = (convolved_part for convolved_part in convolved_qkv(mixer, x))
    H = mixer.num_v_heads
    beta = 2 * torch.sigmoid(mixer.b_proj(x))
    alpha = (-mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias)).exp()
    b = by_hand(mixer, x)
    K, V = q.shape[-1], v.shape[-1]
    S, I = torch.zeros(2, H, K, V), torch.ones(2, H, K, V)
    out = []
    for t in range(11):
        a, key = alpha[:, t, :, None, None], k[:, t, :, :, None]
        D = a * I + (1 - a)
        mean = a * I / D * S
        I = D + key**2 * b[:, t, :, None]
        S = mean + key / I * (beta[:, t, :, None] * (v[:, t] - (mean * key).sum(2)))[:, :, None]
        out.append((q[:, t, :, :, None] * S).sum(2) * K**-0.5)
    expected = torch.stack(out, 1)
    seen = []
    mixer.o_norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        mixer(x)
        assert off(seen[0].reshape(expected.shape), expected) < 1e-5


def convolved_qkv(mixer, x):
    """q, k of unit length and v, [B, T, H, ...], each key head serving several value heads."""
    qkv = convolved(mixer, torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1))
    q, k, v = qkv.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    groups = mixer.num_v_heads // mixer.num_k_heads
    q, k = (unit(y.unflatten(-1, (mixer.num_k_heads, -1))).repeat_interleave(groups, 2) for y in (q, k))
    return q, k, v.unflatten(-1, (mixer.num_v_heads, -1))


def test_an_importance_is_never_negative_and_never_stuck():
    branch = Importance(8, 2, 3, 4, torch.zeros(1))
    with torch.no_grad():
        branch.scale.copy_(torch.tensor([0.0, -0.5]))
    b = branch(torch.randn(1, 5, 8))
    assert b.shape == (1, 5, 2, 3)
    assert b.dtype == torch.float32
    assert (b[:, :, 0] == 0).all()
    assert (b[:, :, 1] > 0).all()
    b.sum().backward()
    assert branch.scale.grad[0] > 0
    assert branch.scale.grad[1] < 0


def test_importance_alone_learns_and_the_host_stays():
    model = metaplastic(host("mamba2"), quiet=True)
    ids = tokens(4, 24)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert moved == set(branches(model))


def test_the_count_of_what_trains_is_printed(capsys):
    model = metaplastic(host("mamba2"), "key", rank=4)
    added = 2 * (32 * 4 + 4 * 8 + 8)
    total = sum(p.numel() for p in model.parameters())
    line = capsys.readouterr().out
    assert line == (
        f"2 mixers with a key importance: {added:,} of {total:,} parameters added ({added / total:.2%}); "
        "the importance alone trains\n"
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == added
    assert "everything trains" in str(metaplastic(host("mamba2"), train="all", quiet=True).metaplasticity)


def test_rank_and_kind_have_their_defaults():
    model = metaplastic(host("qwen3_next"), quiet=True)
    assert set(model.metaplasticity.mixers.values()) == {"key"}
    assert set(metaplastic(host("bamba"), quiet=True).metaplasticity.mixers.values()) == {"diagonal"}
    assert model.metaplasticity.rank == 4
    assert metaplastic(host("qwen3_next", hidden_size=256), quiet=True).metaplasticity.rank == 8


# -- caches, batches, the rest of torch --------------------------------------------------------------------------------

# Zamba2 is left out: its own cached logits are 8e-5 from its uncached ones with these weights
MIXED = ["mamba2", "falcon_h1", "bamba", "qwen3_next", "kimi_linear", "minimax"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXED)
def test_awake_cached_is_uncached_and_a_padded_row_is_alone(name, kind):
    model, ids = converted(name, kind), tokens(2, 13)
    cache = "cache_params" if name == "mamba2" else "past_key_values"
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :9], use_cache=True)
        parts = [out.logits]
        for t in range(9, 13):  # these two count positions by their first layer, which keeps none
            where = {"position_ids": torch.full((2, 1), t)} if name in ("minimax", "bamba") else {}
            parts.append(model(ids[:, t : t + 1], use_cache=True, **{cache: out[cache]}, **where).logits)
    assert off(torch.cat(parts, 1), whole) < 1e-5
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:1, :8]], 1)
    both, mask = torch.cat([padded, ids[1:]]), torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    found = logits(model, both, attention_mask=mask)
    assert off(found[0, 5:], logits(model, ids[:1, :8])[0]) < 1e-5
    assert off(found[1:], whole[1:]) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "kimi_linear", "minimax"])
def test_awake_on_kernels_it_is_what_it_is_on_torch(name, kind, device):
    """Prefill and decoding through the Triton backend, on a CPU in the interpreter."""
    pytest.importorskip("triton")
    ids, options = tokens(1, 37), {"max_new_tokens": 2, "do_sample": False, "output_logits": True}

    def run(model):
        with torch.no_grad():
            out = model.generate(ids.to(model.device), **options, return_dict_in_generate=True, pad_token_id=0)
        return torch.stack(out.logits).cpu()

    model = converted(name, kind, **({"num_hidden_layers": 1} if name == "mamba2" else {}))
    expected = run(model)
    for mixer in mixers(model).values():  # a class of its own, so that no other test sees it
        kernels = unify.compile(mixer.op.triple, backend="triton", checked=False)
        mixer.__class__ = type("OnKernels", (type(mixer),), {"op": kernels})
    assert off(run(model.to(device)), expected) < 1e-5


@given(
    st.sampled_from([(8, 2), (8, 1), (4, 4), (6, 3)]),
    st.sampled_from([1, 2]),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(0, 6),
)
def test_awake_mamba2_of_any_shape_cached_is_uncached_padded_is_alone(heads, expand, conv, bias, kind, cut, pad):
    heads, groups = heads
    sizes = {
        "num_heads": heads,
        "n_groups": groups,
        "head_dim": 32 * expand // heads,
        "hidden_size": 32,
        "expand": expand,
    }
    if heads * sizes["head_dim"] != 32 * expand:
        sizes |= {"hidden_size": 6 * 8 // expand, "head_dim": 8}
    model = converted("mamba2", kind, **sizes, conv_kernel=conv, use_conv_bias=bias)
    ids = tokens(1, 13)
    mask = torch.cat([torch.zeros(1, pad), torch.ones(1, 13)], 1).long()
    padded = torch.cat([torch.zeros(1, pad).long(), ids], 1)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(padded[:, : pad + cut], attention_mask=mask[:, : pad + cut], use_cache=True)
        parts = [first.logits[:, pad:]]
        for t in range(pad + cut, pad + 13):
            step = {"attention_mask": mask[:, : t + 1], "cache_params": first.cache_params, "use_cache": True}
            parts.append(model(padded[:, t : t + 1], **step).logits)
    assert off(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {}])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "kimi_linear"])
def test_generate_with_a_cache_is_generate_without(name, how):
    model, ids = converted(name), tokens(2, 9)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "disable_compile": True, **how}
    found = []
    for cached in (True, False):
        torch.manual_seed(1)
        if not cached:
            options.pop("cache_implementation", None)
        found.append(model.generate(ids, use_cache=cached, **options))
    assert torch.equal(*found)
    assert found[0].shape == (2, 15)


def test_packed_sequences_of_a_mamba2_mixer_do_not_see_each_other():
    """seq_idx, as packed training has it: the memory is new at each sequence (the convolution is the library's affair)."""
    mixer = converted("mamba2").backbone.layers[0].mixer
    x, dt, B, C = torch.randn(1, 9, 8, 8), torch.randn(1, 9, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    A, seen = -torch.rand(8), torch.randn(1, 9, 32)

    def scan(at, **more):
        now = {"hidden_states": x[:, at], "dt": dt[:, at], "B": B[:, at], "C": C[:, at], "seen": seen[:, at]}
        return mixer.mamba2_chunk_scan(A=A, dt_softplus=True, **now, **more)

    with torch.no_grad():
        packed = scan(slice(0, 9), seq_idx=torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2]]))
        alone = torch.cat([scan(slice(0, 3)), scan(slice(3, 4)), scan(slice(4, 9))], 1)
    assert off(packed, alone) < 1e-6
    assert off(packed, scan(slice(0, 9))) > 1e-3
    with pytest.raises(UnifyError, match="packed sequences lie in one row"):
        scan(slice(0, 9), seq_idx=torch.zeros(2, 9))


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "minimax"])
def test_checkpointing_and_compiling_change_nothing_and_a_copy_is_its_own(name):
    model, ids = converted(name), tokens(2, 7)

    def graded():
        model.zero_grad()
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.eval()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = graded()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, graded(), strict=True))
    model.gradient_checkpointing_disable()
    expected = logits(model, ids)
    torch._dynamo.reset()
    mixer = next(iter(mixers(model).values()))
    if name == "mamba2":  # one whole mixer as one graph: the op is in it
        x = torch.randn(2, 7, 32)
        with torch.no_grad():
            assert torch.equal(torch.compile(mixer, backend="aot_eager", fullgraph=True)(x), mixer(x))
    twin = copy.deepcopy(model)
    awake(twin, 3.0, 3.0)
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(twin, ids), expected)
    assert twin.save_pretrained.__self__ is twin


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A saved metaplastic model, and its logits."""
    model, ids = converted("mamba2"), tokens(2, 9)
    model.save_pretrained(tmp_path / "both")
    return tmp_path / "both", ids, logits(model, ids)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "minimax", "zamba2"])
def test_saved_and_loaded_it_is_itself_and_without_unify_it_is_the_host(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = converted(name), tokens(2, 9)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    back = unify.load(tmp_path)
    assert torch.equal(logits(back, ids), expected)
    assert back.metaplasticity == model.metaplasticity
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(plain, ids), logits(unmetaplastic(model), ids))


def test_a_half_precision_model_comes_back_in_half_precision(tmp_path):
    metaplastic(host("mamba2").bfloat16(), quiet=True).save_pretrained(tmp_path)
    assert unify.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert {p.dtype for p in unify.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_an_adapter_alone_goes_onto_its_host(tmp_path):
    model, ids = awake(metaplastic(host("qwen3_5"), quiet=True)), tokens(1, 9)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "unify_adapter.json",
        "unify_adapter.safetensors",
    ]
    fresh = host("qwen3_5")
    assert unify.load(tmp_path / "adapter", base=fresh) is fresh
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    assert fresh.metaplasticity == model.metaplasticity
    unmetaplastic(fresh).save_pretrained(tmp_path / "host")
    assert torch.equal(logits(unify.load(tmp_path / "adapter", base=tmp_path / "host"), ids), logits(model, ids))
    with pytest.raises(UnifyError, match="no host"):
        unify.load(tmp_path / "adapter")
    with pytest.raises(UnifyError, match="its host has other mixers"):
        unify.load(tmp_path / "adapter", base=host("mamba2"))


def edit(path, change):
    """Rewrite a safetensors file."""
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


NAME = "backbone.layers.0.mixer.importance.scale"
DAMAGE = {
    "an adapter's tensor missing": ("unify_adapter.safetensors", lambda s: s.pop(NAME), "scale is missing"),
    "an adapter's tensor too many": (
        "unify_adapter.safetensors",
        lambda s: s.update(x=torch.ones(1)),
        "x is not wanted",
    ),
    "an adapter's tensor wrongly shaped": (
        "unify_adapter.safetensors",
        lambda s: s.update({NAME: torch.ones(3)}),
        r"is \[3\], the host needs \[8\]",
    ),
    "a host's tensor missing": (
        "model.safetensors",
        lambda s: s.pop("backbone.layers.0.mixer.A_log"),
        "missing: .*A_log",
    ),
    "a host's tensor too many": ("model.safetensors", lambda s: s.update(x=torch.ones(1)), "extra: x"),
    "a host's tensor wrongly shaped": (
        "model.safetensors",
        lambda s: s.update({"backbone.layers.0.mixer.A_log": torch.ones(3)}),
        "A_log|mismatch|shape",
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_tensors_are_named(folder, fault):
    path, *_ = folder
    name, change, sentence = DAMAGE[fault]
    edit(path / name, change)
    with pytest.raises(UnifyError, match=sentence):
        unify.load(path)


@pytest.mark.parametrize("name", ["unify_adapter.safetensors", "model.safetensors"])
def test_a_truncated_file_is_refused(folder, name):
    path, *_ = folder
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UnifyError, match=r"cannot be (read|loaded)"):
        unify.load(path)


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"format": 2}', '{"format": 1, "mixers": {"a": "odd"}, "rank": 1, "train": "all"}', None]
)
def test_a_damaged_record_is_refused(folder, record):
    path, *_ = folder
    if record is None:
        (path / "unify_adapter.json").unlink()
    else:
        (path / "unify_adapter.json").write_text(record)
    with pytest.raises(UnifyError, match="unify_adapter"):
        unify.load(path)


def test_a_model_given_as_base_is_as_it_was_after_a_failure(folder):
    path, ids, _ = folder
    model = host("mamba2")
    expected = logits(model, ids)
    edit(path / "unify_adapter.safetensors", lambda s: s.pop(NAME))
    with pytest.raises(UnifyError, match="is missing"):
        unify.load(path, base=model)
    assert not mixers(model).keys() & {n.rpartition(".importance")[0] for n in model.state_dict() if "importance" in n}
    assert torch.equal(logits(model, ids), expected)


# -- refusals ----------------------------------------------------------------------------------------------------------


def other(kind, **needs):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, **needs}))


@pytest.mark.parametrize("kind, named", [("llama", "LlamaAttention"), ("mamba", "MambaMixer")])
def test_an_unknown_mixer_is_named(kind, named):
    with pytest.raises(UnifyError, match=f"{named}.*no mixer that can be made metaplastic exactly"):
        metaplastic(other(kind, **({"num_key_value_heads": 4} if kind == "llama" else {})))


def test_what_makes_no_sense_is_refused():
    model = metaplastic(host("mamba2"), quiet=True)
    with pytest.raises(UnifyError, match="it is metaplastic already"):
        metaplastic(model)
    for wrong in ({"importance": "full"}, {"rank": 0}, {"train": "host"}):
        with pytest.raises(UnifyError, match="key"):
            metaplastic(host("mamba2"), **wrong)


def test_an_option_no_op_of_ours_has_is_refused():
    mixer = converted("qwen3_next").model.layers[0].linear_attn
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(UnifyError, match=r"gv \[1, 3, 4, 8\]: a metaplastic mixer has no such option"):
        mixer.chunk_gated_delta_rule(q, q, q, q[..., 0], q[..., 0], gv=q, seen=None)


# -- grafting ----------------------------------------------------------------------------------------------------------


class Hung(torch.nn.Module):
    """A mixer whose operator hangs on it: no name to exchange."""

    def __init__(self):
        super().__init__()
        self.chunk_gla, self.q_proj = None, torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.chunk_gla(self.q_proj(x))


class Fed(torch.nn.Module):
    """A mixer that is given its projections."""

    def forward(self, q, k, v):
        return chunk_gla(q, k, v)  # noqa: F821


def test_a_mixer_that_cannot_be_grafted_is_refused():
    assert family(Hung()) is None
    assert family(Fed()) is families.GLA
    with pytest.raises(UnifyError, match=r"Fed\.forward: it calls an operator and none of the projections q_proj"):
        grafted(Fed, families.GLA, "key")
    scope = {"torch": torch, "chunk_gla": None}
    exec("class Made(torch.nn.Module):\n def forward(self, x):\n  return chunk_gla(self.q_proj(x))", scope)
    with pytest.raises(UnifyError, match="its source cannot be read"):
        grafted(scope["Made"], families.GLA, "key")


def test_a_grafted_class_is_its_host_s_and_knows_where_its_code_stands():
    model = host("mamba2")
    mixer = model.backbone.layers[0].mixer
    cls = type(mixer)
    metaplastic(model, quiet=True)
    assert isinstance(mixer, cls)
    assert type(mixer) is not cls
    assert type(model.backbone.layers[1].mixer) is type(mixer)
    code, original = type(mixer).forward.__wrapped__.__code__, cls.forward.__wrapped__.__code__
    assert (code.co_filename, code.co_firstlineno) == (original.co_filename, original.co_firstlineno)
    assert type(mixer).forward.__globals__ is cls.forward.__globals__


def test_a_forward_that_accelerate_has_wrapped_is_exchanged_too():
    model, ids = host("mamba2"), tokens(1, 5)
    for mixer in mixers(model).values():
        mixer._old_forward = mixer.forward
        mixer.forward = lambda *a, _m=mixer, **o: _m._old_forward(*a, **o)
    before = logits(model, ids)
    metaplastic(model, quiet=True)
    assert off(logits(model, ids), before) < 1e-5
    assert off(logits(awake(model), ids), before) > 1e-4
    assert off(logits(unmetaplastic(model), ids), before) == 0


def test_no_warning_comes_from_us():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(converted("olmo_hybrid"), tokens(1, 5))


def test_the_record_is_readable(folder):
    record = json.loads((folder[0] / "unify_adapter.json").read_text())
    assert record == {
        "format": 1,
        "mixers": {f"backbone.layers.{i}.mixer": "diagonal" for i in (0, 1)},
        "rank": 4,
        "host": "mamba2",
        "train": "all",
    }
