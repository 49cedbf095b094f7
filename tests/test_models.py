"""UnifyForCausalLM: cached = whole, padded = alone, packed = apart, over random configurations; and what transformers asks."""

import json
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from apart import apart
from test_cli import complaint, unify
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Mamba2Config, StaticCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridConfig, OlmoHybridGatedDeltaNet

from unify.errors import UnifyError
from unify.models import UnifyConfig, UnifyForCausalLM, budget, preset, read
from unify.models.choices import PUBLISHED
from unify.models.configuration import PRESETS
from unify.models.layer import Layer, Packing
from unify.models.modeling import Memory
from unify.models.zoo import ZOO, get
from unify.testing import assert_close, triples
from unify.triple import Prior, Squash, Triple

HYBRID = ["gated_deltanet", "sliding_attention", "palimpsa", "full_attention"]
WORDS = 23


def config(layers, depth=None, **changes):
    """A tiny model; large weights, so that nothing hides in a flat softmax."""
    layers = [layers] if isinstance(layers, str) else layers
    options = {"num_heads": 2, "head_dim": 4, "rank": 3, **changes.pop("layer", {})}
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": depth or len(layers)}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    start = {"initializer_range": 0.3}
    return UnifyConfig(layers=layers, layer=options, **{**sizes, **attention, **tokens, **start, **changes})


def make(layers, seed=0, **changes):
    torch.manual_seed(seed)
    return UnifyForCausalLM(config(layers, **changes)).double().eval()


def words(B=2, T=9, seed=1):
    return torch.randint(1, WORDS, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- cached, padded, packed --------------------------------------------------------------------------------------


def check_cached(model, ids, cuts, mask=None):
    """Logits of a prompt in parts, a cache carried = its logits at once, at every real token."""
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(config=model.config), []
    for start, stop in pairwise((0, *cuts, ids.shape[1])):
        so_far = None if mask is None else mask[:, :stop]
        parts.append(model(ids[:, start:stop], attention_mask=so_far, past_key_values=cache).logits)
    assert cache.get_seq_length() == ids.shape[1]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(torch.cat(parts, 1)[real], whole[real], 1e-9, "logits with a cache")
    return whole


def check_padded(model, ids, mask):
    """Logits of a padded batch = each sequence's alone."""
    logits = model(ids, attention_mask=mask).logits
    for n, row in enumerate(mask.bool()):
        assert_close(logits[n, row], model(ids[n : n + 1, row]).logits[0], 1e-9, "logits of a padded batch")


def check_packed(model, ids, offsets):
    """Logits of packed sequences, told by offsets or by positions = each one's alone."""
    apart = torch.cat([model(ids[:, a:b]).logits for a, b in pairwise(offsets.tolist())], 1)
    assert_close(model(ids, cu_seqlens=offsets).logits, apart, 1e-9, "logits of packed sequences")
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(offsets.tolist())])[None]
    rows = {"input_ids": torch.cat([ids.flip(1), ids]), "position_ids": torch.cat([positions + 0 * ids, positions])}
    assert_close(model(**rows).logits[1:], apart, 1e-9, "logits of packed sequences by position")


@st.composite
def configs(draw):
    """Heads, groups, expand, convolution, norm, gate, and one to three layers of any kind."""
    names = st.sampled_from((*ZOO, "full_attention", "sliding_attention"))
    heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    options = {
        "num_heads": heads,
        "num_v_heads": heads * groups,
        "head_dim": draw(st.sampled_from((2, 4))),
        "expand_v": draw(st.sampled_from((0.5, 1, 2))),
        "conv_size": draw(st.integers(0, 4)),
        "gate": draw(st.sampled_from((None, "swish", "sigmoid"))),
        "norm": draw(st.sampled_from(("head", "inner"))),
        "skip": draw(st.booleans()),
    }
    more = {"intermediate_size": draw(st.sampled_from((0, 24))), "tie_word_embeddings": draw(st.booleans())}
    return config(draw(st.lists(names, min_size=1, max_size=3)), layer=options, **more)


@given(configs(), st.data())
def test_random_configurations(cfg, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model, T = UnifyForCausalLM(cfg).double().eval(), data.draw(st.integers(3, 8))
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=3)))
    left = torch.tensor(data.draw(st.lists(st.integers(0, T - 1), min_size=2, max_size=2)))
    mask = (torch.arange(T) >= torch.tensor([0, *left])[:, None]).long()
    with torch.no_grad():
        check_cached(model, words(2, T), cuts)
        check_cached(model, words(3, T), cuts, mask)
        check_padded(model, words(3, T), mask.flip(1) if data.draw(st.booleans()) else mask)
        check_packed(model, words(1, T), torch.tensor([0, *cuts, T]))


@pytest.mark.parametrize("layers", [["palimpsa"], ["kla", "kdn"], ["meta_retnet"], HYBRID], ids="_".join)
def test_chosen_configurations(layers):
    model = make(layers)
    check_cached(model, words(), range(1, 9))  # token by token
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = mask[1, :7] = 0
    check_cached(model, words(3), (2, 5), mask)  # in the first part some have not begun
    check_padded(model, words(3), mask)
    check_padded(model, words(3), mask.flip(1))  # on the right, as in training
    check_packed(model, words(1), torch.tensor([0, 1, 5, 9]))


def test_checks_see_what_they_look_for(monkeypatch):
    model, mask = make(HYBRID), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    load = Memory.load
    monkeypatch.setattr(Memory, "load", lambda self: None)
    with pytest.raises(AssertionError, match="with a cache"):
        check_cached(model, words(), (4,))
    monkeypatch.setattr(Memory, "load", load)
    real = Packing.of_mask
    monkeypatch.setattr(Packing, "of_mask", lambda mask: real(torch.ones_like(mask)))
    with pytest.raises(AssertionError, match="padded batch"):
        check_padded(model, words(), mask)
    monkeypatch.setattr(Packing, "of_positions", lambda positions: None)
    with pytest.raises(AssertionError, match="by position"):
        check_packed(model, words(1), torch.tensor([0, 4, 9]))


# ---- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [["palimpsa", "mesanet"], HYBRID], ids="_".join)
def test_generation(layers):
    model, ids = make(layers), words()
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0

    def write(ids, mask, **how):
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, **how)[:, ids.shape[1] :]

    greedy = write(ids, mask)
    assert torch.equal(greedy, write(ids, mask, use_cache=False))
    assert torch.equal(greedy[:1], write(ids[:1, 4:], mask[:1, 4:]))
    assert torch.equal(greedy, write(ids, mask, cache_implementation="static"))
    assert torch.equal(greedy, write(ids, mask, prefill_chunk_size=2))
    wider = F.pad(ids, (3, 0)), F.pad(mask, (3, 0))  # whole chunks of padding
    assert torch.equal(greedy, write(*wider, prefill_chunk_size=2))
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(write(ids, mask, **beams), write(ids, mask, **beams, use_cache=False))
    assert not torch.equal(greedy, write(ids, mask, num_beams=3))  # or the state was not put to a test
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        sampled.append(write(ids, mask, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("attention", ["full_attention", "sliding_attention"])
def test_masks_are_sized_by_attention_whatever_transformers_takes_a_memory_for(attention, monkeypatch):
    """transformers 5.24 counts a memory among layers that keep keys."""
    model, ids, mask = make(["gated_deltanet", attention]), words(), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4)
    monkeypatch.setattr(StaticCache, "is_linear", property(lambda cache: [False] * len(cache.layers)))
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", max_new_tokens=4)
    assert torch.equal(static, expected)


def test_positions_may_be_one_row_for_all():
    model, mask = make(["meta_retnet", "full_attention"]), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    shared = model(words(), attention_mask=mask, position_ids=torch.arange(9)[None]).logits[1]
    assert_close(shared, model(words()).logits[1], 1e-9)


def test_generation_goes_on_from_a_cache():
    model, ids = make(HYBRID), words(1)
    first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat([first.sequences, words(1, 2, seed=5)], 1)
    going_on = model.generate(more, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(going_on, model.generate(more, max_new_tokens=3))


def test_a_cache_is_reordered_repeated_selected_and_reset():
    model, ids = make(["kdn", "gated_deltanet"]), words(3)
    after = lambda change: _next(model, _filled(model, ids), change)  # noqa: E731
    plain = after(lambda cache: None)
    order = torch.tensor([2, 0, 0])
    assert_close(after(lambda cache: cache.reorder_cache(order)), plain[order], 1e-12)
    assert_close(after(lambda cache: cache.batch_select_indices(order[:2])), plain[order[:2]], 1e-12)
    assert_close(after(lambda cache: cache.batch_repeat_interleave(2)), plain.repeat_interleave(2, 0), 1e-12)
    fresh = model(torch.ones(3, 1, dtype=torch.int64)).logits[:, -1]
    assert_close(after(lambda cache: cache.reset()), fresh, 1e-12)  # though kdn does not start at 0
    static = StaticCache(config=model.config, max_cache_len=20)
    assert_close(model(ids, past_key_values=static).logits, model(ids).logits, 1e-12)
    with pytest.raises(UnifyError, match="use store"):
        static.update(torch.zeros(1), torch.zeros(1), 0)


def _filled(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return cache


def _next(model, cache, change):
    """Logits of one more token, the same for all, after a change to the cache."""
    change(cache)
    rows = len(next(x for x in cache.layers[0].recurrent_states.values()))
    return model(torch.ones(rows, 1, dtype=torch.int64), past_key_values=cache).logits[:, -1]


# ---- transformers' own mixers, with the same weights ------------------------------------------------------------


def shaken(module):
    """Every parameter drawn anew, so that none is at a value that hides it."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=rng))
    return module


def mamba2_pair():
    """One group of B and C, so that its grouped norm is one norm over all heads."""
    cfg = Mamba2Config(hidden_size=16, expand=2, num_heads=4, head_dim=8, state_size=6, n_groups=1, num_hidden_layers=1)
    theirs = shaken(Mamba2Mixer(cfg, 0)).eval()
    options = {**PUBLISHED["mamba2"], "norm_eps": cfg.layer_norm_epsilon}
    ours = Layer(get("mamba2").triple, 16, 1, 6, 8 / 6, num_v_heads=4, **options)
    z, x, B, C, dt = theirs.in_proj.weight.split((32, 32, 6, 6, 4))
    turned = lambda p: torch.cat(p.split((32, 6, 6))[::-1])  # noqa: E731, they convolve x, B, C; we q, k, v
    ours.load_state_dict(
        {
            **{"proj.q.weight": C, "proj.k.weight": B, "proj.v.weight": x, "gate_proj.weight": z},
            **{"conv_weight": turned(theirs.conv1d.weight.squeeze(1)), "conv_bias": turned(theirs.conv1d.bias)},
            **{
                "gates.g.proj.weight": dt,
                "gates.g.A_log": theirs.A_log,
                "gates.g.dt_bias": theirs.dt_bias,
                "D": theirs.D,
            },
            **{"out_norm.weight": theirs.norm.weight, "out_proj.weight": theirs.out_proj.weight},
        }
    )
    return theirs, ours


def gated_deltanet_pair():
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
    }
    layers = ["linear_attention", "full_attention"]
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": 20}
    cfg = OlmoHybridConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, layer_types=layers, **sizes, **tokens
    )
    cfg.linear_allow_neg_eigval = False
    theirs = shaken(OlmoHybridGatedDeltaNet(cfg, 0)).eval()
    ours = Layer(get("gated_deltanet").triple, 16, 2, 6, 8 / 6, num_v_heads=4, norm_eps=1e-5)
    names = {f"proj.{x}.weight": getattr(theirs, f"{x}_proj").weight for x in "qkv"}
    ours.load_state_dict(
        {
            **names,
            **{"conv_weight": theirs.conv1d.weight.squeeze(1), "gate_proj.weight": theirs.g_proj.weight},
            **{"gates.g.proj.weight": theirs.a_proj.weight, "gates.beta.up.weight": theirs.b_proj.weight},
            **{"gates.g.A_log": theirs.A_log, "gates.g.dt_bias": theirs.dt_bias},
            **{"out_norm.weight": theirs.o_norm.weight, "out_proj.weight": theirs.o_proj.weight},
        }
    )
    return theirs, ours


@pytest.mark.parametrize("pair", [mamba2_pair, gated_deltanet_pair])
def test_the_layer_is_transformers_mixer(pair):
    theirs, ours = pair()
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(2))
    assert_close(ours(x), theirs(x), 2e-5)  # both in float32


# ---- training ----------------------------------------------------------------------------------------------------


def test_loss_is_the_next_tokens():
    model, ids = make(HYBRID), words()
    labels = ids.clone()
    labels[0, 3] = -100
    out = model(ids, labels=labels)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets, ignore_index=-100)
    assert_close(out.loss.double(), expected, 1e-6)  # transformers takes the loss in float32
    assert out.past_key_values.get_seq_length() == 9
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, WORDS)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5


def test_loss_of_packed_sequences_is_theirs():
    model, ids, offsets = make(HYBRID), words(1), torch.tensor([0, 2, 5, 9])
    parts = [ids[:, a:b] for a, b in pairwise(offsets.tolist())]
    counts = [part.shape[1] - 1 for part in parts]
    apart = sum(n * model(part, labels=part).loss for n, part in zip(counts, parts, strict=True)) / sum(counts)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    for told in ({"cu_seqlens": offsets}, {"position_ids": positions}):
        assert_close(model(ids, labels=ids, **told).loss, apart, 1e-6)
    assert abs(model(ids, labels=ids).loss - apart) > 1e-2


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for save in (False, True):
        model = make(HYBRID).train()
        if save:
            model.gradient_checkpointing_enable()
        model(words(), labels=words(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, expected in gradients[0].items():
        assert expected is not None, name
        assert_close(gradients[1][name], expected, 1e-9, name)


def test_it_learns_a_sentence():
    torch.manual_seed(0)
    model = UnifyForCausalLM(config(["meta_gdn", "sliding_attention"], initializer_range=0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(model(words(), labels=words()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 5


def test_another_number_of_packed_documents_is_no_new_graph(tmp_path):
    """The second number makes a graph for all others. A count of sequences that is a plain int somewhere makes one for each."""
    code = """
import torch
from torch._dynamo.testing import CompileCounter
from unify.models import UnifyConfig, UnifyForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, intermediate_size=0)
model, ids = UnifyForCausalLM(UnifyConfig(**sizes, layers='palimpsa_key', layer={'num_heads': 2})), torch.randint(40, (2, 512))
compiled = torch.compile(model, backend=(graphs := CompileCounter()))
for cuts in ((40, 600), (30, 70, 550), (7, 512, 610, 930, 940), (3, 512)):
    positions = torch.cat([torch.arange(n) for n in torch.tensor([0, *cuts, 1024]).diff()]).view(2, 512)
    given = {'input_ids': ids, 'position_ids': positions, 'labels': ids}
    print(torch.equal(compiled(**given).loss, model(**given).loss), graphs.frame_count)
"""
    first, *others = (line.split() for line in apart(code, tmp_path))
    assert [equal for equal, _ in (first, *others)] == ["True"] * 4
    assert [int(count) for _, count in others] == [int(first[1]) + 1] * 3


# ---- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tmp_path, tied):
    own = get("palimpsa").triple
    own = Triple(own.architecture, own.posterior, Prior(precision="key"))
    torch.manual_seed(0)
    layers = [own, *HYBRID, {"memory": "palimpsa", "rank": 2}]
    model = UnifyForCausalLM(config(layers, tie_word_embeddings=tied, initializer_range=0.02)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is UnifyForCausalLM
    assert loaded.config.layers == model.config.layers
    weights = loaded.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.equal(loaded(words()).logits, model(words()).logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(words()).logits, model(words()).logits)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(words()).last_hidden_state, model.model(words()).last_hidden_state)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    spared = lambda m: {name for name, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)}  # noqa: E731
    assert spared(loaded) == spared(model) != set()
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.rpartition(".")[2] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "raw", "importance_scale"}
    out = narrow(words(), labels=words())
    assert out.logits.dtype == torch.bfloat16
    assert_close(out.logits.float(), model(words()).logits, 0.03)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in narrow.parameters())


def test_weights_that_are_there_are_not_started_again(tmp_path):
    model = UnifyForCausalLM(config(["palimpsa"]))
    layer = model.model.layers[0].mixer
    with torch.no_grad():
        layer.gates["g"].A_log.fill_(0.123)
    layer.gates["g"].A_log._is_hf_initialized = True
    model.init_weights()
    assert (layer.gates["g"].A_log == torch.tensor(0.123)).all()
    dt = F.softplus(layer.gates["g"].dt_bias)
    assert (dt >= 0.99e-3).all()
    assert (dt <= 0.101).all()
    state = model.state_dict()
    del state["model.layers.0.mixer.gates.g.dt_bias"]  # missing in the checkpoint: started as a layer says
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = UnifyForCausalLM.from_pretrained(tmp_path).model.layers[0].mixer.gates["g"]
    assert torch.equal(loaded.A_log, layer.gates["g"].A_log)
    dt = F.softplus(loaded.dt_bias)
    assert (dt >= 0.99e-3).all()
    assert (dt <= 0.101).all()


def test_nobodys_model_type_is_taken():
    assert type(AutoConfig.for_model("unify")) is UnifyConfig
    assert type(AutoConfig.for_model("mamba2")) is Mamba2Config


# ---- configurations ----------------------------------------------------------------------------------------------


def test_layers_are_a_pattern_in_json(tmp_path):
    cfg = config(["gated_deltanet", "sliding_attention", {"memory": get("kda").triple, "conv_size": 0}], depth=5)
    assert cfg.layer_types == ["unify_memory", "sliding_attention", "unify_memory", "unify_memory", "sliding_attention"]
    cfg.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    for n in range(5):
        assert again.memory(n) == cfg.memory(n)
    triple, options = again.memory(2)
    assert triple == get("kda").triple
    assert (options["conv_size"], options["num_heads"]) == (0, 2)
    assert "gate" not in options  # what is published goes with a name, not with a triple
    assert config("kda").memory(0)[1]["gate"] == "sigmoid"
    assert config("kda", layer={"gate": None}).memory(0)[1]["gate"] is None
    assert config("kda").sliding_window is None
    assert [m.mixer.conv_size for m in UnifyForCausalLM(cfg).model.layers if isinstance(m.mixer, Layer)] == [4, 0, 4]


def test_published_options_are_options_of_models():
    assert set(PUBLISHED) <= set(ZOO)
    assert PUBLISHED["meta_kda"] == PUBLISHED["kda"]
    for name in PUBLISHED:
        UnifyForCausalLM(config(name))


@given(triples(derivable=False))
def test_a_triple_is_json(triple):
    assert Triple.from_record(json.loads(json.dumps(triple.record()))) == triple


def test_a_triple_of_options_is_json():
    triple = Triple(
        get("preconditioned_gdn").triple.architecture, get("kda").triple.posterior, Prior(adaptive=Squash(3.0))
    )
    assert triple.record()["prior"] == {"adaptive": {"squash": {"base": 3.0, "centre": -0.2, "eps": 1e-6}}}
    assert Triple.from_record(json.loads(json.dumps(triple.record()))) == triple
    assert get("linear_attention").triple.record()["prior"] == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": ["palimsa"]}, "try palimpsa"),
        ({"layers": []}, "a model has layers"),
        ({"layers": "kda", "layer": {"num_heads": 0}}, "a layer has heads"),
        ({"layers": [3]}, "a layer is a memory or attention"),
        (
            {"layers": [{"memory": "kda", "width": 3}]},
            "layer option 'width': a layer has no such option; use num_heads",
        ),
        ({"layers": [{"architecture": {"forgets": "head"}}]}, "Architecture has no such part"),
        ({"layers": [{"memory": {"prior": {"adaptive": {"lasso": {}}}}}]}, "use ridge, squash"),
        ({"layers": [{"memory": {"architecture": {"forgetting": "soon"}}}]}, "use one of none, fixed"),
        ({"layers": ["sliding_attention"], "sliding_window": 0}, "use a number above 0"),
        ({"layers": ["full_attention"], "head_dim": 3}, "rotary positions turn pairs"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, says):
    with pytest.raises(UnifyError, match=says):
        config(**changes)


def test_calls_that_cannot_be_are_refused():
    model, ids = make(HYBRID), words()
    with pytest.raises(UnifyError, match="pass one"):
        model()
    with pytest.raises(UnifyError, match="pass cu_seqlens alone"):
        model(ids, cu_seqlens=torch.tensor([0, 18]))
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids, assistant_model=model, max_new_tokens=2)


# ---- sizes -------------------------------------------------------------------------------------------------------


def palimpsa_parameters(d, H, K, V, rank, mlp, depth):
    """Counted from the shapes of the authors' state dict; Ip_log [H], which they freeze, is left out."""
    attention = 2 * H * K * d + 3 * H * V * d  # q, k; v, g, o
    branch = rank * d + H * V * rank + H + H * d  # b_rank_proj, b_proj, b_scale, bs_proj
    decay = H * d + 2 * H + H  # dt_proj, A_log and dt_bias, D
    convolution, norms = (2 * H * K + H * V) * 4, V + 2 * d  # q, k, v; o_norm, attn_norm and mlp_norm
    return 32000 * d + depth * (attention + branch + decay + convolution + norms + 3 * d * mlp) + d


def metamamba2_parameters(d, H, N, P, rank, depth):
    """The same; one group of B and C for each of the 16 heads."""
    inner, conv = H * P, H * P + 2 * H * N
    projections = (2 * inner + 2 * H * N + H) * d + d * inner  # in_proj, out_proj
    branch = rank * d + inner * rank + H  # b_rank_proj, b_proj, b_scale
    return 32000 * d + depth * (projections + branch + 3 * H + conv * 4 + conv + inner + d) + d


AUTHORS = {
    "palimpsa-170m": palimpsa_parameters(768, 16, 48, 48, 48, 2048, 19),
    "palimpsa-760m": palimpsa_parameters(1536, 16, 96, 192, 96, 4096, 19),
    "metamamba2-170m": metamamba2_parameters(768, 16, 48, 96, 48, 30),
    "metamamba2-760m": metamamba2_parameters(1536, 16, 96, 192, 96, 38),
}
STATES = {
    "palimpsa-170m": 19 * 16 * 2 * 48 * 48,
    "palimpsa-760m": 19 * 16 * 2 * 96 * 192,
    "metamamba2-170m": 30 * 16 * 2 * 48 * 96,
    "metamamba2-760m": 38 * 16 * 2 * 96 * 192,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_authors_parameters(name):
    with torch.device("meta"):
        model = UnifyForCausalLM(preset(name))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == AUTHORS[name]
    found = budget(preset(name))
    assert (found["parameters"], found["state"], found["bytes"]) == (AUTHORS[name], STATES[name], 4 * STATES[name])
    assert found["flops"] > 2 * AUTHORS[name]
    assert found["flops"] < 2.6 * AUTHORS[name]


def test_shapes_of_the_authors_tiny_model():
    """Their dumped state dict: hidden 64, two heads of 16 x 32, rank 4, vocabulary 100, one layer, MLP 256."""
    layer = {"num_heads": 2, "head_dim": 16, "expand_v": 2, "rank": 4, "learn_prior": False}
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1}
    found = UnifyForCausalLM(UnifyConfig(layers="palimpsa", layer=layer, **sizes)).state_dict()
    shapes = sorted(list(x.shape) for x in found.values())
    theirs = [
        [100, 64],
        [64],
        [2],
        [2],
        [2],
        [2],
        [2],
        [32, 64],
        [32, 64],
        [64, 64],
        [4, 64],
        [64, 4],
        [2, 64],
        [2, 64],
    ]
    theirs += [[128, 4], [64, 64], [32], [64, 64], [64], [256, 64], [256, 64], [64, 256], [64], [100, 64]]
    assert shapes == sorted(theirs)


def test_budget_of_a_hybrid():
    cfg = config(["mamba2", "sliding_attention", "full_attention"], depth=6, max_position_embeddings=50)
    found = budget(cfg)
    kept = {row["layer"].split(",")[0]: row["state"] for row in found["rows"]}
    assert kept["mamba2"] == 2 * 4 * 4
    assert kept["attention to the last 3"] == 2 * 3 * 2 * 4
    assert kept["attention to all"] == 2 * 50 * 2 * 4
    assert [row["layers"] for row in found["rows"]] == [2, 2, 2, 1]
    assert found["parameters"] == UnifyForCausalLM(cfg).num_parameters()
    linear = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    attention = next(row for row in found["rows"] if row["layer"].startswith("attention to all"))
    assert attention["flops"] == linear + 4 * 50 * 16
    assert budget(cfg, 100)["flops"] - found["flops"] == 2 * 4 * 50 * 16


def test_show_config(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = unify("show", "--config", "palimpsa-170m")
    assert "palimpsa, 16 heads of 48 x 48, SwiGLU 2048" in page
    assert f"{AUTHORS['palimpsa-170m']:,}" in page
    assert f"{STATES['palimpsa-170m']:,}" in page
    config(HYBRID).save_pretrained(tmp_path)
    found = json.loads(unify("show", "--config", str(tmp_path), "--context", "5", "--json"))
    assert found == budget(read(str(tmp_path / "config.json")), 5)
    (tmp_path / "other.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken.json").write_text("{")
    assert "use one of palimpsa-170m" in complaint("show", "--config", "palimpsa")
    assert 'use model_type "unify"' in complaint("show", "--config", str(tmp_path / "other.json"))
    assert "it is not JSON" in complaint("show", "--config", str(tmp_path / "broken.json"))
    assert "it shows one thing" in complaint("show", "kda", "--config", "palimpsa-170m")
    assert "leave out --latex" in complaint("show", "--config", "palimpsa-170m", "--latex")
    assert "say which --config" in complaint("show", "kda", "--context", "3")


def test_logits_are_kept_where_transformers_keeps_them():
    from transformers.modeling_utils import slice_logits_to_keep

    from unify.models.modeling import _kept

    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    for which in (0, 1, 3, torch.tensor([4, 1]), torch.tensor([[0, 2], [3, 3]]), mask):
        assert torch.equal(_kept(hidden, which), slice_logits_to_keep(hidden, which))
    assert not torch.equal(_kept(hidden, 2), slice_logits_to_keep(hidden, 3))
