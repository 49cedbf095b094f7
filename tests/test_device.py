"""verify(device=...): tiny in the interpreter, where every check is also shown an error; for real on a GPU."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import unify.device
from unify.device import CONDITION, REAL, TINY, Case, checks, compare, draw, errors, run, shake, usable
from unify.errors import UnifyError
from unify.lower import launch
from unify.lower import triton as printer
from unify.models.zoo import ZOO, get
from unify.op import compile
from unify.verify import verify

ROWS = ["fp32", "bf16", "parts", "repeat"]
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Only what a check needs to fail: a family, a short sequence and one that ends a chunk."""
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(unify.device, "TINY", (Case((1, 7), 1, 3, 2, "mixed"),))


def results(name):
    """What each check returns, or the sentence of its failure."""
    triple, out = get(name).triple, {}
    for row, check in checks(compile(triple, "reference"), compile(triple, "triton"), "cpu", 0).items():
        try:
            out[row] = check()[0]
        except AssertionError as failure:
            out[row] = str(failure)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["palimpsa_key", "gated_deltanet"])
def test_models_pass_in_the_interpreter(name):
    found = verify(name, device="cpu")
    assert [row.name for row in found.rows][-4:] == ROWS
    assert found.passed, str(found)
    rows = {row.name: row.worst_error for row in found.rows}
    assert 0 < rows["fp32"] < 1e-6 < 1e-3 < rows["bf16"]
    assert rows["repeat"] == 0
    assert json.loads(found.to_json())["passed"]


CANCELLING = [
    *((name, "strong") for name in "mamba2 retnet gla rwkv6 kda gated_deltaproduct metamamba2 hgrn2".split()),
    ("hgrn2", "weak"),
]


@pytest.mark.parametrize("name, gates", CANCELLING)
def test_what_little_is_left_is_right(name, gates, monkeypatch):
    """float32 to 1e-5. As differences of sums that nearly cancel, each of these was 1.3e-5 to 1.6e-4 off here."""
    monkeypatch.setattr(unify.device, "TINY", (Case((1, 40, 70), 1, 12, 20, gates),))
    loop, kernels = (compile(get(name).triple, backend) for backend in ("reference", "triton"))
    assert checks(loop, kernels, "cpu", 1)["fp32"]()[0] < 1e-5


def planted(monkeypatch, old, new):
    """The printed source with something changed."""
    right = printer.module

    def wrong(recurrence):
        printed = right(recurrence)
        assert old in printed.source
        return replace(printed, source=printed.source.replace(old, new), key=f"{printed.key}_{abs(hash(new))}")

    monkeypatch.setattr(launch, "module", wrong)


def test_a_wrong_output_fails_where_it_is_seen(tiny, monkeypatch):
    planted(monkeypatch, "    o = ", "    o = 1.001 * ")
    found = results("mamba2")
    assert found["fp32"].startswith("o is off by 1.0e-03, allowed 1e-05 (lengths 1 7, H 1, K 3, V 2, mixed gates)")
    assert found["repeat"] == 0


def test_a_wrong_gradient_fails(tiny, monkeypatch):
    planted(monkeypatch, "    d_v = ", "    d_v = 1.1 * ")
    found = results("mamba2")
    assert found["fp32"].startswith("d v is off by 1.0e-01")
    assert found["bf16"].startswith("d v is off by")
    assert found["parts"] < 1e-6


def altered(monkeypatch, change):
    """What the printed kernels return, changed: change(o, end) -> (o, end)."""
    right = launch.recurrent

    def wrong(*args):
        o, variance, end = right(*args)
        o, end = change(o, end)
        return o, variance, end

    monkeypatch.setattr(launch, "recurrent", wrong)


def test_a_state_that_is_handed_on_wrongly_fails(tiny, monkeypatch):
    altered(monkeypatch, lambda o, end: (o, tuple(1.001 * y for y in end)))
    assert "is off by" in results("mamba2")["parts"]


def test_chance_fails_the_repetition(tiny, monkeypatch):
    altered(monkeypatch, lambda o, end: (o * (1 + torch.rand(())), end))
    assert results("mamba2")["repeat"].startswith("o, ")


def test_nan_and_small_gradients():
    exact = {"o": torch.ones(4), "d g": torch.full((4,), 1e-9)}
    assert errors({"o": torch.tensor([1.0, torch.nan, 1, 1]), "d g": exact["d g"]}, exact)["o"] == torch.inf
    assert errors({"o": exact["o"], "d g": 2 * exact["d g"]}, exact)["d g"] == pytest.approx(1e-3)
    nothing = {"o": exact["o"], "d g": torch.zeros(4)}  # a gradient that cancels: what is left is measured against o
    assert errors({"o": exact["o"], "d g": torch.full((4,), 1e-7)}, nothing)["d g"] == pytest.approx(1e-7)
    with pytest.raises(AssertionError, match="o is off by inf"):
        compare({"o": exact["o"] * torch.nan, "d g": exact["d g"]}, exact, 1e-2, "a case")


def shaken(name, case, dtype=torch.bfloat16):
    op = compile(get(name).triple, "reference")
    x, state, offsets = draw(op, case, CPU, dtype, 1)
    exact = run(op, {n: y.double() for n, y in x.items()}, tuple(y.double() for y in state), offsets, 1)
    return shake(op, x, state, offsets, 1, exact)


def test_only_what_is_ill_conditioned_may_be_further_off():
    """A gradient summed over all tokens of weak gates cancels; a gate a token, and everything else, is measured as it is."""
    found = shaken("retnet", REAL[1])
    assert 5e-3 < found.pop("d g") < 2e-2
    assert CONDITION * max(found.values()) < 1e-2
    assert CONDITION * max(shaken("mamba2", TINY[1]).values()) < 1.5e-2
    assert max(shaken("retnet", TINY[1], torch.float32).values()) == 0
    exact = {"o": torch.ones(4), "d g": torch.ones(4)}
    off = {"o": exact["o"], "d g": 1.03 * exact["d g"]}
    assert compare(off, exact, 1e-2, "a case", lambda: {"d g": 1e-2}) == pytest.approx(7.5e-3)
    for other in ({"d g": 7e-3}, {"o": 1.0}, {}):
        with pytest.raises(AssertionError, match="d g is off by"):
            compare(off, exact, 1e-2, "a case", lambda other=other: other)
    assert compare(exact, exact, 1e-2, "a case", None) == 0  # nothing is shaken where nothing is off


def test_cases_cover_odd_sizes_strong_and_weak_gates_and_sequences_of_one_token():
    for cases in (REAL, TINY):
        assert {"mixed", "weak", "strong"} <= {case.gates for case in cases}
        assert all(case.K % 2 or case.K % 16 for case in cases if case.gates != "moderate")
        assert any(1 in case.lengths for case in cases)


def test_gates_stay_wide():
    op = compile(get("palimpsa").triple, "reference")
    x, state, _ = draw(op, TINY[0], CPU, torch.bfloat16, 0)
    narrow = {name for name, y in x.items() if y.dtype == torch.bfloat16}
    assert narrow == {"q", "k", "v"}
    assert {y.dtype for y in state} == {torch.float32}


@pytest.mark.parametrize(
    "device, sentence", [("tpu", "use cuda or cpu"), ("mps:0", "use cuda or cpu"), ("cuda", "finds no GPU")]
)
def test_a_device_that_is_not_there(device, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnifyError, match=sentence):
        verify("gla", device=device)


def test_triton_loaded_for_the_other_kind_of_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    other = "cuda" if unify.device.interpreted() else "cpu"
    with pytest.raises(UnifyError, match="TRITON_INTERPRET"):
        usable(other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ZOO)
def test_every_model_on_the_gpu(name):
    triple = get(name).triple
    loop, kernels = compile(triple, "reference"), compile(triple, "triton")
    for row, check in checks(loop, kernels, "cuda", 1).items():
        error, _ = check()
        assert error <= {"bf16": 1e-2, "repeat": 0.0}.get(row, 1e-5), row
