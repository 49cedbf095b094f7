"""The stages between Triple and Plan: what is derived, what is read off it, and that both can be wrong."""

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import sympy as sp

from unify.confirm import confirm
from unify.derive import derive
from unify.energy import free_energy
from unify.errors import UnifyError
from unify.models.zoo import ZOO, get
from unify.plan import plan
from unify.structure import channels, structure
from unify.symbols import K, V, array, i, j
from unify.triple import Architecture, Observation, Posterior, Prior, Triple

PLANS = {
    "linear": "linear_attention retnet lightning mamba2 gla hgrn2 lightnet rodimus rwkv6 palimpsa_key",
    "rank one": "deltanet gated_deltanet kda gated_deltanet2 comba comba_decayed gated_deltaproduct rwkv7 "
    "preconditioned_gdn preconditioned_kda longhorn kdn mean_field_delta meta_deltanet meta_gdn meta_kda",
    "elementwise": "palimpsa metamamba2 meta_linear_attention meta_retnet meta_gla meta_hgrn2",
    "solve": "mesanet gated_kalmanet",
    "recurrent": "kla",
}


def equations(name, phase):
    return [str(s) for s in derive(get(name).triple).phase(phase)]


def test_palimpsa_is_what_the_paper_says():
    assert equations("palimpsa", "predict") == ["Ibar_p[j, i] = alpha*Ibar[j, i]", "M_p[j, i] = alpha*M[j, i]"]
    assert equations("palimpsa", "observe") == [
        "Ibar_new[j, i] = Ibar_p[j, i] + importance[i]*k[j]**2",
        "M_new[j, i] = M_p[j, i] + k[j]*v[i]",
    ]
    assert equations("palimpsa", "read")[0] == "o[i] = scale*sum_j(q[j]*M_new[j, i]/(prior_precision + Ibar_new[j, i]))"


def test_longhorn_closed_form_comes_out_of_the_contraction():
    assert equations("longhorn", "observe") == [
        "e[i] = v[i] - sum_l(k[l]*S[l, i])",
        "c1 = sum_l(k[l]**2)",
        "S_new[j, i] = S[j, i] + beta*k[j]*e[i]/(1 + beta*c1)",
    ]


def test_mean_field_and_palimpsa_stay_two_posteriors():
    vb, palimpsa = get("mean_field_delta").triple, get("palimpsa").triple
    assert vb.posterior != palimpsa.posterior
    assert (derive(vb).carries, derive(palimpsa).carries) == ("mean", "natural")


@pytest.mark.parametrize("name", ZOO)
def test_every_derivation_is_stationary_where_it_was_not_derived(name):
    done = confirm(get(name).triple, sizes=((1, 2), (3, 2)), seed=7)
    assert min(done.gradients, done.smallest_minor) > 0


@pytest.mark.parametrize("name", ["palimpsa", "gated_deltanet", "mesanet", "kdn", "longhorn"])
def test_confirm_sees_a_wrong_update(name):
    right = derive(get(name).triple)
    state = {"M": "M_new", "S": "S_new"}[structure(right).mean]
    steps = tuple(
        replace(s, expr=s.expr + array("k", (j,)) * array("v", (i,)) / 100) if s.name == state else s
        for s in right.steps
    )
    with pytest.raises(UnifyError, match="not stationary"):
        confirm(get(name).triple, recurrence=replace(right, steps=steps))


@pytest.mark.parametrize(
    "name, state", [("palimpsa", "Ibar_new"), ("meta_gdn", "Ibar_new"), ("kdn", "Lambda_new"), ("mesanet", "P_new")]
)
def test_confirm_sees_a_wrong_precision(name, state):
    right = derive(get(name).triple)
    steps = tuple(replace(s, expr=s.expr * sp.Rational(101, 100)) if s.name == state else s for s in right.steps)
    with pytest.raises(UnifyError, match=r"stationary|not the"):
        confirm(get(name).triple, recurrence=replace(right, steps=steps))


@pytest.mark.parametrize("name", ZOO)
def test_structure_decides_the_schedule(name):
    family = next(f for f, names in PLANS.items() if name in names.split())
    found = plan(structure(derive(get(name).triple)))
    assert found.family == family
    assert len(found.why) > 20
    assert found.micro == (2 if name == "gated_deltaproduct" else 1)


def test_structure_is_read_off_the_equations_not_the_triple():
    """A program whose equations are altered gets another structure although its triple is the same."""
    mamba = derive(get("mamba2").triple)
    coupled = tuple(replace(s, expr=s.expr * array("v", (i,))) if s.name == "S_p" else s for s in mamba.steps)
    assert structure(mamba).transition == "scalar"
    assert structure(replace(mamba, steps=coupled)).transition == "entry"
    bent = tuple(replace(s, expr=s.expr**2) if s.name == "S_p" else s for s in mamba.steps)
    assert structure(replace(mamba, steps=bent)).transition == "dense"


def test_row_coupled_and_entry_structures_are_recurrent():
    per_row = get("gated_deltanet").triple.metaplastic("value")
    assert structure(derive(per_row)).transition == "row-coupled"
    assert not plan(structure(derive(per_row))).chunked
    reset = Triple(Architecture("head", importance="head"), Posterior("key", projection="reset"))
    assert structure(derive(reset)).transition == "diagonal"


def test_costs():
    cost = derive(get("palimpsa").triple).cost()
    assert cost["state"] == 2 * K * V
    assert sp.degree(cost["flops"], K) == sp.degree(cost["flops"], V) == 1
    assert derive(get("mesanet").triple).cost()["state"] == K * V + K**2
    assert derive(get("meta_gdn").triple).cost()["state"] == K * V + K


@pytest.mark.parametrize("name", ["palimpsa", "mesanet", "rwkv7", "kla"])
def test_every_stage_prints_as_text_and_latex(name):
    triple = get(name).triple
    for stage in (triple, free_energy(triple), derive(triple)):
        assert len(str(stage)) > 40
        tex = stage.latex()
        assert tex.count("{") == tex.count("}") > 0
    assert "read" in str(structure(derive(triple)))


def test_stages_are_frozen_and_equal_by_value():
    triple = get("palimpsa").triple
    recurrence = derive(triple)
    for value in (triple, triple.architecture, recurrence, structure(recurrence), plan(structure(recurrence))):
        with pytest.raises(FrozenInstanceError):
            value.anything = 1
        hash(value)
    assert replace(triple, architecture=replace(triple.architecture)) == triple


def test_prior_mean_is_what_forgetting_returns_to():
    triple = Triple(Architecture("head"), Posterior("diagonal"), Prior(mean="entry"))
    values = {
        name: np.array(x, dtype=object)
        for name, x in {"q": [1], "k": [0], "v": [0], "prior_mean": [[5]], "M": [[8]], "Ibar": [[0]]}.items()
    }
    values |= {"alpha": sp.Rational(1, 2), "scale": 1}
    assert derive(triple).run(values, (1, 1))["o"][0] == 9  # mu_0 + alpha (mu - mu_0) = 5 + (13 - 5) / 2


def test_two_erasures_in_one_token():
    triple = Triple(
        Architecture("key", value="observation", observations=(Observation("-b", "a", False), Observation("k", "p"))),
        Posterior(anchor=("previous", "predicted")),
    )
    assert len(structure(derive(triple)).steps) == 2
    confirm(triple)


def test_a_hash_is_remembered_but_never_sent_to_another_process():
    first = derive(get("mamba2").triple)
    again = pickle.loads(pickle.dumps(first))
    assert hash(first) == hash(again)
    assert first == again
    assert "_hash" in vars(first)
    assert b"_hash" not in pickle.dumps(first)


def test_a_full_contraction_hides_no_channel_of_its_factor():
    assert channels(array("v", (i,)) * sp.Sum(array("k", (j,)) ** 2, (j, 1, K))) == (i,)
