"""The engine's derivation = the published recurrence typed by hand = golden numbers, states and variance included."""

import pytest
import torch
from golden_cases import CASES, TOLERANCE, assert_agree
from test_published import inputs_of

from unify.errors import UnifyError
from unify.models.published import PUBLISHED
from unify.models.zoo import OUTSIDE, ZOO, get, name_of
from unify.op import compile
from unify.triple import Architecture, Posterior, Triple


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(op, inputs):
    """The op's outputs under the names that golden files and published functions use."""
    variance = "variance" in inputs.pop("_wanted")
    out = op(**inputs, output_final_state=True, return_variance=variance)
    return {"o": out[0], **out[-1]._asdict(), **({"variance": out[1]} if variance else {})}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("file", CASES)
def test_derived_equals_the_golden_numbers(file, backend):
    model, inputs, expected = CASES[file]()
    assert_agree(run(compile(get(model).triple, backend), {**inputs, "_wanted": expected}), expected, TOLERANCE)


@pytest.mark.parametrize("model", ZOO)
def test_derived_equals_published(model):
    takes = {x.name for x in compile(get(model).triple).recurrence.inputs}
    inputs = {name: x for name, x in inputs_of(model).items() if name in takes}
    inputs["scale"] = 0.7
    expected = PUBLISHED[model](**inputs)
    actual = run(compile(get(model).triple, "reference"), {**inputs, "_wanted": expected})
    assert_agree(actual, {name: value.expand_as(actual[name]) for name, value in expected.items()}, 1e-11)


def test_every_zoo_model_is_published_and_every_published_one_is_in_the_zoo():
    assert set(ZOO) == set(PUBLISHED)


def test_metaplastic_models_are_made_from_their_sources():
    assert get("metamamba2").triple == get("mamba2").triple.metaplastic()
    for model in ZOO.values():
        fixed = (
            model.triple.curvature == "none"
            and model.triple.prior.adaptive is None
            and model.triple.prior.dynamics == "power"
        )
        if fixed:
            assert model.triple.metaplastic().curvature in ("diagonal", "key")
        else:
            with pytest.raises(UnifyError, match="already moves"):
                model.triple.metaplastic()


def test_get_names_near_models():
    assert get("palimpsa").label == "Palimpsa"
    with pytest.raises(UnifyError, match="palimpsa"):
        get("palimsa")


def test_name_of_finds_a_triple():
    assert name_of(Triple(Architecture("key"))) == "gla"
    assert name_of(Triple(Architecture("fixed", value="observation"), Posterior(anchor="predicted"))) is None


def test_what_is_outside_says_why():
    assert all(len(reason) > 30 for reason in OUTSIDE.values())
    assert all(model.citation for model in ZOO.values())
