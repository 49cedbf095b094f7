"""Mathematics as it is written: the same values in another order, LaTeX that parses, formulas that fold."""

import random

import numpy as np
import pytest
import sympy as sp
from matplotlib.mathtext import MathTextParser

from unify.confirm import random_values
from unify.derive import derive
from unify.energy import free_energy, precision_dims
from unify.models.zoo import ZOO, get
from unify.notation import MEANING, Latex, energy_parts, fold, glossary, grouped, latex, plain, polynomial, pretty, tidy
from unify.symbols import SIZE, K, V, array, concrete, contract, i, j, symbol
from unify.triple import Architecture, Posterior, Prior, Triple

HOMING = Triple(
    Architecture(forgetting="key", value="observation", precision="head", importance="head"),
    Posterior(curvature="key", anchor="predicted"),
    Prior(precision="key", mean="entry"),
)
COOLING = Triple(
    Architecture(value="observation", precision="head", importance="head"),
    Posterior(curvature="isotropic", anchor="predicted"),
)
TRIPLES = {**{name: model.triple for name, model in ZOO.items()}, "prior mean": HOMING, "isotropic": COOLING}
SIZES = (2, 2)


def evaluate(text: str, env: dict):
    """The value of program text: sum_j(...) is a sum over an index, names are numbers or object arrays."""
    total = {
        "sum_j": lambda f: sum(f(a) for a in range(SIZES[0])),
        "sum_l": lambda f: sum(f(a) for a in range(SIZES[0])),
        "sum_c": lambda f: sum(f(a) for a in range(SIZES[0])),
        "sum_jl": lambda f: sum(f(a, b) for a in range(SIZES[0]) for b in range(SIZES[0])),
    }
    for name, letters in (("sum_jl(", "j, l"), ("sum_j(", "j"), ("sum_l(", "l"), ("sum_c(", "c")):
        text = text.replace(name, f"{name}lambda {letters}: ")
    text = text.replace("1/2*", "half*")
    delta = np.array([[sp.Integer(a == b) for b in range(SIZES[0])] for a in range(SIZES[0])], dtype=object)
    return eval(
        text, {**env, **total, "delta": delta, "K": SIZES[0], "half": sp.Rational(1, 2), "exp": sp.exp, "sqrt": sp.sqrt}
    )


@pytest.mark.parametrize("name", TRIPLES)
def test_program_text_says_what_the_recurrence_does(name):
    recurrence = derive(TRIPLES[name])
    values = random_values(recurrence, SIZES, random.Random(1))
    env = recurrence.run(values, SIZES)
    checked = 0
    for step in recurrence.steps:
        if step.solve is not None or step.name in values:
            continue
        for at in np.ndindex(tuple({K: SIZES[0], V: SIZES[1]}[SIZE[d]] for d in step.dims)):
            place = dict(zip(map(str, step.dims), at, strict=True))
            value = env[step.name][at] if step.dims else env[step.name]
            for text in (plain(step.expr), plain(grouped(step.expr))):
                assert abs(sp.N(evaluate(text, {**env, **place}) - value, 30)) < 1e-25, text
            checked += 1
    assert checked > 2


def test_evaluate_sees_a_wrong_text():
    env = {"k": np.array([2, 3], dtype=object), "x": np.array([1, 5], dtype=object)}
    assert evaluate("sum_j(k[j]*x[j]) - 1", env) == 16
    assert evaluate("sum_j(k[j]*(x[j] - 1))", env) == 12


@pytest.mark.parametrize("name", TRIPLES)
def test_the_terms_of_the_free_energy_add_up(name):
    energy = free_energy(TRIPLES[name])
    rng, sizes = random.Random(2), {K: SIZES[0], V: SIZES[1]}
    number = lambda: sp.Rational(rng.randint(1, 9), 7)  # noqa: E731
    entry = lambda *shape: np.array([number() for _ in range(int(np.prod(shape)))], dtype=object).reshape(shape)  # noqa: E731
    dims = precision_dims(energy.triple, energy.full)
    for n in range(len(energy.losses)):
        written = energy_parts(energy, n)
        names = {str(x.base.label): x.indices for _, part in written for x in part.atoms(sp.Indexed)}
        names |= {str(x.base.label): x.indices for x in energy.total(n).atoms(sp.Indexed)}
        env = {x: entry(*(sizes[SIZE[d]] for d in at)) for x, at in names.items()}
        env |= {str(x): number() for _, part in written for x in part.free_symbols if str(x) not in env}
        env |= {str(x): number() for x in energy.total(n).free_symbols if str(x) not in env}
        square = entry(*(sizes[SIZE[d]] for d in dims))
        env["Sigma"] = square + np.swapaxes(square, 0, 1) + 9 * np.eye(SIZES[0], dtype=int) if energy.full else square
        env["anchor"] = _anchor(energy, n, env)
        total = concrete(energy.total(n), env, sizes, {i: 1})
        parts = sum(concrete(part, env, sizes, {i: 1}) for _, part in written)
        assert abs(sp.N(total - parts, 30)) < 1e-25


def _anchor(energy, n: int, env: dict) -> np.ndarray:
    stage, out = energy.stages[n], np.full(SIZES, sp.S.Zero)
    if stage.curvature == "full":
        return out
    if stage.anchor == "prior":
        return out if energy.triple.prior.mean == "zero" else env["prior_mean"]
    held = env["m_p" if stage.anchor == "predicted" else "mu"]
    return held * env["erase"][:, None] if energy.triple.posterior.anchor_weight == "key" else held


@pytest.mark.parametrize("name", TRIPLES)
def test_every_row_of_latex_parses(name):
    parser = MathTextParser("path")
    for stage in (free_energy(TRIPLES[name]), derive(TRIPLES[name])):
        tex = stage.latex()
        assert tex.count("{") == tex.count("}")
        assert tex.count(r"\left") == tex.count(r"\right")
        rows = tex.removeprefix("\\begin{aligned}\n").removesuffix("\n\\end{aligned}").split(" \\\\\n")
        assert len(rows) > 1
        for row in rows:
            parser.parse(f"${row.replace('&', '').replace('quad', 'quad ')}$")


def test_states_carry_time_and_marks():
    S, new, before = (array(name, (j, i)) for name in ("S", "S_new", "S_p"))
    assert [latex(x) for x in (S, before, new)] == ["S_{t-1,ji}", r"\tilde{S}_{t,ji}", "S_{t,ji}"]
    assert [pretty(x) for x in (S, before, new)] == ["Sⱼᵢ", "S̃ⱼᵢ", "S′ⱼᵢ"]
    assert [pretty(array(x, (j,))) for x in ("Ibar", "Ibar_p", "Ibar_new")] == ["Īⱼ", "Ĩⱼ", "Ī′ⱼ"]
    assert latex(array("prior_precision", (j,))) == r"\Lambda_{0,j}"
    assert Latex(frozenset({"alpha"}))(symbol("alpha")) == r"\alpha"
    assert (pretty(array("k_2", (j,))), latex(array("k_2", (j,)))) == ("k⁽²⁾ⱼ", "k^{(2)}_{t,j}")


def test_reading_order():
    k, v, e, Ibar = array("k", (j,)), array("v", (i,)), array("e", (i,)), array("Ibar_new", (j,))
    alpha, beta, prior = symbol("alpha"), symbol("beta"), symbol("prior_precision")
    assert pretty(e * k * beta / (Ibar + prior) + array("S_p", (j, i))) == "S̃ⱼᵢ + β kⱼ eᵢ / (Λ₀ + Ī′ⱼ)"
    assert pretty((1 - alpha) * k * sp.Rational(1, 2)) == "½ (1 − α) kⱼ"
    assert pretty(v - contract(k, j) * 2) == "vᵢ − 2 ∑ⱼ kⱼ"
    assert pretty(contract(k**2, j) / alpha) == "(∑ⱼ kⱼ²) / α"
    assert pretty(sp.Rational(1, 1000000)) == "10⁻⁶"
    assert tidy(contract(alpha * k / 2 - alpha / 2, j)) == alpha / 2 * contract(k - 1, j)


def test_names_that_only_a_proof_has():
    assert pretty(sp.Symbol("eps", positive=True) * array("E_S", (j, i))) == "ε Eˢⱼᵢ"


def test_polynomials():
    assert polynomial(2 * K * V + K) == "2KV + K"
    assert polynomial(sp.Rational(2, 3) * K**3 + V) == "⅔K³ + V"
    assert polynomial(K * V * 0 + 1) == "1"


def test_folding_breaks_outside_parentheses_first():
    text = "aaaa + (bbbb − cccc) + dddd"
    assert fold(text, 40) == [text]
    assert fold(text, 22) == ["aaaa + (bbbb − cccc)", "  + dddd"]
    assert all(len(line) <= 16 for line in fold(text, 16))
    assert "".join(x.replace("  ", " ") for x in fold(text, 16)) == text
    assert fold("x" * 30, 10) == ["x" * 30]


def test_text_of_a_free_energy_has_its_anchor_put_in():
    assert "anchor" not in str(free_energy(get("gated_deltanet").triple))
    assert "m_p[l, i]" in str(free_energy(get("gated_deltanet").triple))


@pytest.mark.parametrize(
    ("prior", "unicode", "tex"),
    [
        ("one", "(Id + P′)⁻¹ q", r"\left(\mathrm{Id} + P_{t}\right)^{-1} q_{t}"),
        ("head", "(Λ₀ Id + P′)⁻¹ q", r"\left(\Lambda_{0} \, \mathrm{Id} + P_{t}\right)^{-1} q_{t}"),
        ("key", "(diag(Λ₀) + P′)⁻¹ q", r"\left(\mathrm{diag}(\Lambda_{0}) + P_{t}\right)^{-1} q_{t}"),
    ],
)
def test_a_solve_names_its_matrix(prior, unicode, tex):
    exact = Triple(
        Architecture(value="observation", precision="head"), Posterior(curvature="full"), Prior(precision=prior)
    )
    (step,) = (s for s in derive(exact).steps if s.solve is not None)
    assert step.pretty()[1] == unicode
    assert step.latex().endswith(tex)


def test_the_glossary_has_every_argument_and_state_of_the_zoo():
    used = {x.name for triple in TRIPLES.values() for x in (*derive(triple).inputs, *derive(triple).states)}
    assert used <= MEANING.keys()
    rows = glossary()
    assert [len({row[n] for row in rows}) for n in (0, 1)] == [len(MEANING)] * 2  # no symbol has two uses
    assert glossary(["S", "alpha", "prior_precision", "Ibar"]) == [
        (r"\Lambda_{0}", "Λ₀", MEANING["prior_precision"]),
        ("S", "S", MEANING["S"]),
        (r"\bar{I}", "Ī", MEANING["Ibar"]),
    ]
