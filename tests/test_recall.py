"""unify.recall: nothing leaks from the future, known texts have known answers, the figures measure what they say."""

import io
import json
import math
import random

import pytest
import torch
from rich.console import Console

import unify.recall
from unify.errors import UnifyError
from unify.models import zoo
from unify.recall import (
    MODELS,
    Setting,
    by_certainty,
    calibration,
    context_keys,
    default_files,
    fit_scales,
    follow,
    inputs,
    ranking,
    read_text,
    recall,
    table_hits,
)
from unify.triple import Architecture, Triple

SETTING = [Setting(256, 1.0)]


def letters(count, alphabet=16, seed=0):
    """Random bytes of a small alphabet: nothing to recall."""
    return bytes(random.Random(seed).choices(range(97, 97 + alphabet), k=count))


def familiar_and_strange(seed=0):
    """A sentence that comes back, and after each one a few bytes that nothing foretells."""
    strange = random.Random(seed)
    parts = (b"the cat sat on the mat, and that was that. " + strange.randbytes(12) for _ in range(24))
    return b"".join(parts)


def said(name, text, keys=None, **options):
    keys = context_keys(text, 32, 2, 4) if keys is None else keys
    return follow(zoo.get(name).triple, text, keys, SETTING, **options)


def accuracy(trace, text):
    return (trace.named[0] == torch.tensor(list(text[1:]))).double().mean().item()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_bytes(familiar_and_strange())
    return recall([path], key_dim=32)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_a_unit_vector_of_the_last_bytes_alone():
    text, other = letters(200), letters(200, seed=1)
    keys, changed = context_keys(text, context=3), context_keys(other[:50] + text[50:], context=3)
    assert keys.shape == (201, 64)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(201))
    torch.testing.assert_close(keys[53:], changed[53:], rtol=0, atol=0)
    assert (keys[:50] != changed[:50]).any(1).float().mean() > 0.9


def test_contexts_that_end_alike_have_similar_keys():
    keys = context_keys(b"xabyabzb", key_dim=256, context=2, spread=16)
    similar = keys @ keys.T
    assert similar[3, 6] == pytest.approx(1)  # "ab" and "ab"
    assert 0.3 < similar[3, 8] < 0.7  # "ab" and "zb" share the last byte
    assert abs(similar[2, 3]) < 0.3  # "xa" and "ab" share nothing


def test_keys_depend_on_the_seed_and_on_nothing_else():
    text = letters(100)
    assert torch.equal(context_keys(text, seed=3), context_keys(text, seed=3))
    assert not torch.equal(context_keys(text, seed=3), context_keys(text, seed=4))


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_future_does_not_change_what_was_said(name):
    past, future, other = letters(150), letters(90), letters(90, seed=1)
    one, two = said(name, past + future), said(name, past + other)
    # Prediction i is of byte i + 1, so the one of the first byte that differs is among the equal ones.
    torch.testing.assert_close(one.mean[:, :150], two.mean[:, :150], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.variance[:, :150], two.variance[:, :150], rtol=1e-5, atol=1e-6)
    assert torch.equal(one.named[:, :150], two.named[:, :150])
    assert (one.mean[:, 150:] - two.mean[:, 150:]).abs().max() > 1e-2


def test_random_bytes_are_not_recalled_and_a_leak_would_be_seen():
    text = letters(1500)
    chance, error = 1 / 16, math.sqrt(1 / 16 / 1500)
    assert accuracy(said("gated_deltanet", text), text) < chance + 5 * error
    keys = context_keys(text, 32, 2, 4)
    leaky = torch.cat([keys[1:], keys[-1:]])  # the query now contains the byte that it is to predict
    assert accuracy(said("gated_deltanet", text, leaky), text) > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_blocks_do_not_change_the_result(name):
    text = letters(200, alphabet=4)
    whole, cut = said(name, text), said(name, text, block=37)
    torch.testing.assert_close(whole.mean, cut.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.variance, cut.variance, rtol=1e-4, atol=1e-5)


def test_settings_run_side_by_side_as_they_run_alone():
    text, settings = letters(120, alphabet=4), [Setting(64, 4.0), Setting(256, 1.0)]
    keys, triple = context_keys(text, 32), zoo.get("palimpsa").triple
    both = follow(triple, text, keys, settings)
    for head, setting in enumerate(settings):
        alone = follow(triple, text, keys, [setting])
        torch.testing.assert_close(both.mean[head], alone.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.variance[head], alone.variance[0], rtol=1e-4, atol=1e-5)


# ---- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_periodic_text_is_recalled_after_its_first_period(name):
    text = b"abcad" * 40  # what follows "a" depends on the byte before it
    assert accuracy(said(name, text), text) > 1 - 10 / len(text)


def test_a_rule_that_never_forgets_is_followed_too(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abc" * 100)
    (model,) = recall([path], ["linear_attention"], key_dim=32).models
    assert model.accuracy > 0.97
    assert model.horizon == 0


def test_the_table_names_the_most_frequent_byte_so_far():
    hits = table_hits(b"aabab", 1)
    # "a" is all that is known; after "a" came "a"; after "b" nothing, so the most frequent; after "a" the first of two.
    assert hits.tolist() == [1, 0, 1, 0]
    assert table_hits(b"ab" * 20, 1)[2:].mean() == 1
    assert table_hits(b"ab" * 20, 0).mean() <= 0.5


def test_every_model_has_the_same_memory(report):
    print(*(f"{m.name}: {m.memory_floats} of {m.state_floats} floats" for m in report.models), sep="\n")
    assert {m.memory_floats for m in report.models} == {32 * 256}
    extra = {m.name: m.state_floats - m.memory_floats for m in report.models}
    assert extra == {
        "mamba2": 0,
        "palimpsa_key": 32,
        "palimpsa": 32 * 256,
        "gated_deltanet": 0,
        "meta_gdn": 32,
        "mesanet": 32 * 32,
    }


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_gates_have_their_a_priori_values():
    seen = torch.eye(256)[[7, 9]]
    found = inputs(zoo.get("palimpsa").triple, seen, [Setting(4, 2.0)], 8)
    assert found["g"].exp().tolist() == [[[0.75], [0.75]]]
    assert found["importance"][0, 0, 0, [7, 9]].tolist() == [2 * 17 / 16, 2 / 16]
    assert found["v"][0, 1, 0, [7, 9]].tolist() == [0, 2 * 17 / 16]  # evidence: importance times observation
    found = inputs(zoo.get("gated_deltanet").triple, seen, [Setting(4, 3.0)], 8)
    assert found["beta"].unique().tolist() == [0.75]
    assert torch.equal(found["v"][0, :, 0], seen)


def test_inputs_are_what_the_op_takes():
    from unify.op import compile

    for name in ("linear_attention", "retnet", "gla", "kda", "longhorn", "mean_field_delta", "meta_gla", *MODELS):
        triple = zoo.get(name).triple
        wanted = {x.name for x in compile(triple).recurrence.inputs} - {"q", "k"}
        assert set(inputs(triple, torch.eye(256)[:3], SETTING, 8)) == wanted


def test_with_equal_importances_palimpsa_is_palimpsa_key(monkeypatch):
    monkeypatch.setattr(unify.recall, "SILENCE", 1e6)  # so that occurring or not makes no difference
    text = letters(150, alphabet=4)
    keys = context_keys(text, 32)
    entries = follow(zoo.get("palimpsa").triple, text, keys, [Setting(256, 1e-6)])
    shared = follow(zoo.get("palimpsa_key").triple, text, keys, [Setting(256, 1.0)])
    torch.testing.assert_close(entries.mean, shared.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entries.variance, shared.variance, rtol=1e-4, atol=1e-5)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_true_variances_are_calibrated_and_wrong_ones_are_not():
    noise = torch.Generator().manual_seed(0)
    variance = torch.rand(20000, generator=noise, dtype=torch.float64) + 0.1
    error = variance.sqrt() * torch.randn(20000, generator=noise, dtype=torch.float64)
    hit = (error.abs() < 0.5).double()
    right, sure, vague = (calibration(error, factor * variance, hit) for factor in (1, 0.5, 2))
    assert right.z2 == pytest.approx(1, abs=5 * math.sqrt(2 / 20000))
    assert right.within1 == pytest.approx(0.6827, abs=0.015)
    assert right.within2 == pytest.approx(0.9545, abs=0.01)
    assert sure.z2 == pytest.approx(2 * right.z2)
    assert vague.z2 == pytest.approx(right.z2 / 2)
    assert right.nll < min(sure.nll, vague.nll)
    assert right.nll < calibration(error, variance.mean().expand(20000), hit).nll
    assert right.ranking > 0.6


def test_scales_are_recovered():
    noise = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(2, 50000, generator=noise, dtype=torch.float64) + 0.1
    hit = 0.3 * mean + (4 * variance).sqrt() * torch.randn(50000, generator=noise, dtype=torch.float64)
    gain, size = fit_scales(hit, mean, variance)
    assert gain == pytest.approx(0.3, abs=0.06)
    assert size == pytest.approx(4, rel=0.03)


def test_ranking_counts_pairs():
    score, hit = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    pairs = [(a, b) for a, x in zip(score, hit, strict=True) for b, y in zip(score, hit, strict=True) if x > y]
    wins = sum(float(a > b) + 0.5 * float(a == b) for a, b in pairs) / len(pairs)
    assert ranking(score, hit) == pytest.approx(wins)
    assert ranking(torch.ones(5) + 1e-7 * torch.randn(5), hit) == 0.5  # constant to rounding
    assert ranking(score, torch.ones(5)) == 0.5


def test_certainty_orders_and_ties_share_their_mean():
    hit = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert by_certainty(hit, torch.tensor([4.0, 1.0, 2.0, 3.0]), parts=2) == (1.0, 0.0)
    assert by_certainty(hit, torch.ones(4), parts=4) == (0.5,) * 4


def test_only_a_model_that_tracks_its_precision_can_rank(report):
    ranks = {m.name: m.calibration.ranking for m in report.models}
    flat = {m.name: max(m.accuracy_by_certainty) - min(m.accuracy_by_certainty) < 1e-9 for m in report.models}
    assert {name for name, constant in flat.items() if constant} == {"mamba2", "gated_deltanet"}
    assert all(ranks[name] == 0.5 for name in ("mamba2", "gated_deltanet"))
    assert ranks["mesanet"] > 0.55


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_the_same_twice(report, tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes(familiar_and_strange())
    plain = [{**m, "seconds": 0} for m in json.loads(report.to_json())["models"]]
    again = [{**m, "seconds": 0} for m in json.loads(recall([path], key_dim=32).to_json())["models"]]
    assert plain == again


def test_windows_cover_the_scored_text(report):
    assert report.bytes_fitted + 1 + report.bytes_scored == len(familiar_and_strange())
    assert report.windows[-1] == report.bytes_scored
    sizes = [b - a for a, b in zip((0, *report.windows), report.windows, strict=False)]
    for m in (*report.models, *report.references):
        mean = sum(n * a for n, a in zip(sizes, m.accuracy_by_window, strict=True)) / sum(sizes)
        assert mean == pytest.approx(m.accuracy)


def test_the_report_prints_and_plots(report, tmp_path):
    out = io.StringIO()
    Console(file=out, width=160).print(report.table())
    for m in report.models:
        assert m.name in out.getvalue()
        assert f"{100 * m.accuracy:.1f}" in out.getvalue()
        assert f"{m.state_floats:,}" in out.getvalue()
    assert report.plot(tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    drawn = report.plot(str(tmp_path / "recall.svg")).read_text()
    assert "<svg" in drawn


def test_progress_reaches_the_end_for_every_model(tmp_path):
    path, seen = tmp_path / "text", []
    path.write_bytes(letters(300))
    recall([path], ["mamba2", "palimpsa_key"], block=64, progress=lambda *step: seen.append(step))
    for name in ("mamba2", "palimpsa_key"):
        done = [d for n, d, total in seen if n == name]
        assert done == sorted(done)
        assert done[-1] == 300
    assert {total for _, _, total in seen} == {300}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_default_text_is_the_standard_library():
    files = default_files()
    assert [f.name for f in files] == sorted(f.name for f in files)
    assert "ast.py" in {f.name for f in files}
    text, names = read_text(files, 5000)
    assert len(text) == 5000
    assert names[0] == files[0].name


def test_files_are_read_in_order_up_to_the_limit(tmp_path):
    for name, count in (("a", 70), ("b", 70), ("c", 70)):
        (tmp_path / name).write_bytes(name.encode() * count)
    text, names = read_text([tmp_path / "b", tmp_path / "a", tmp_path / "c"], 100)
    assert text == b"b" * 70 + b"a" * 30
    assert names == ("b", "a")


def test_any_bytes_will_do(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(256)) * 2)
    assert recall([path], ["mamba2"]).models[0].accuracy < 1


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.touch(), "too little text"),
        (lambda path: path.write_bytes(b"short"), "too little text"),
    ],
)
def test_files_that_will_not_do_are_refused_in_one_sentence(tmp_path, make, fault):
    path = tmp_path / "notes.txt"
    make(path)
    with pytest.raises(UnifyError, match=fault) as error:
        recall([path])
    assert "notes.txt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"models": ["rwkv6"]}, "no untrained value"),
        ({"models": {"odd": Triple(Architecture(read="before"))}}, "no untrained value"),
        ({"models": ["palimsa"]}, "palimpsa"),
        ({"models": []}, "no model"),
        ({"spread": 3}, "spread must divide"),
        ({"context": 0}, "positive"),
        ({"horizon": 1}, "horizon >= 2"),
        ({"limit_bytes": 10}, "too little text"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, fault):
    with pytest.raises(UnifyError, match=fault):
        recall(**options)
