"""unify.verify: the whole zoo passes, and each check fails on an error planted where it looks."""

import json
from dataclasses import replace

import pytest

import unify.verify
from unify.confirm import confirm
from unify.derive import derive
from unify.errors import UnifyError
from unify.lower import chunked
from unify.models.published import PUBLISHED
from unify.models.zoo import ZOO, get
from unify.triple import Architecture, Posterior, Triple
from unify.verify import Check, Verification, verify, verify_all

CHECKS = ["derivation", "published", "chunked", "split", "gradients"]


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_passes(name):
    found = verify(name)
    assert [row.name for row in found.rows] == CHECKS
    assert found.passed, str(found)
    errors = {row.name: row.worst_error for row in found.rows}
    assert errors["derivation"] == 0
    assert errors["published"] < 1e-12
    assert errors["split"] < 1e-12
    assert errors["gradients"] < 1e-6
    assert errors["chunked"] is None or errors["chunked"] < 1e-12


def failed(model):
    return {row.name: row.note for row in verify(model).rows if not row.passed}


def planted(monkeypatch, change):
    """chunked.linear with its result changed: f(result, arguments) -> result."""
    right = chunked.linear
    monkeypatch.setattr(chunked, "linear", lambda *args, **rest: change(right, args, rest))


def test_a_wrong_derivation(monkeypatch):
    right = derive(get("gla").triple)
    steps = tuple(replace(s, expr=2 * s.expr) if s.name == "S_new" else s for s in right.steps)
    wrong = replace(right, steps=steps)
    monkeypatch.setattr(unify.verify, "confirm", lambda t, seed: confirm(t, seed=seed, recurrence=wrong))
    assert list(failed("gla")) == ["derivation"]


def test_another_published_recurrence(monkeypatch):
    right = PUBLISHED["gla"]
    monkeypatch.setitem(PUBLISHED, "gla", lambda **x: {"o": 1.01 * right(**x)["o"]})
    assert failed("gla")["published"].startswith("o is off by 9.90e-03")


def test_a_wrong_chunked_form(monkeypatch):
    planted(monkeypatch, lambda right, args, rest: (1.000001 * (out := right(*args, **rest))[0], out[1]))
    assert "o (mixed gates) is off by 1" in failed("gla")["chunked"]


def test_a_state_that_is_not_taken_over(monkeypatch):
    def forgetful(right, args, rest):
        *others, start = args
        return right(*others, start * 0, **rest)

    planted(monkeypatch, forgetful)
    assert "o in parts is off" in failed("gla")["split"]


def test_a_wrong_gradient(monkeypatch):
    def detached(right, args, rest):
        q, k, *others = args
        return right(q, k.detach(), *others, **rest)

    planted(monkeypatch, detached)
    assert {"gradients"} == set(failed("gla"))
    assert "the gradient by k" in failed("gla")["gradients"]


def test_a_triple_of_ones_own():
    mine = Triple(Architecture("key", value="observation", precision="value"), Posterior("diagonal", "predicted"))
    found = verify(mine)
    rows = {row.name: row for row in found.rows}
    assert found.model == "a triple"
    assert found.passed, str(found)
    assert rows["published"].worst_error is None
    assert rows["chunked"].note.startswith("no chunked form: every value channel")


def test_a_triple_of_the_zoo_is_recognised():
    assert verify(get("linear_attention").triple).model == "linear_attention"


def test_an_unknown_model():
    with pytest.raises(UnifyError, match="palimpsa"):
        verify("palimsa")


def test_several_models_and_their_progress():
    said = []
    found = verify_all(["gla", "retnet"], progress=said.append)
    assert [v.model for v in found] == ["gla", "retnet"]
    assert said == [f"{model}: {check}" for model in ("gla", "retnet") for check in CHECKS]


def test_results_print_and_dump():
    rows = (Check("published", 1e-16, True, 0.5, "o, S"), Check("chunked", None, False, 0.25, "o is off"))
    found = Verification("gla", rows)
    assert not found.passed
    assert "ok      published   1.0e-16" in str(found)
    assert "FAILED  chunked" in str(found)
    data = json.loads(found.to_json())
    assert data["model"] == "gla"
    assert data["passed"] is False
    assert data["rows"][1]["worst_error"] is None
