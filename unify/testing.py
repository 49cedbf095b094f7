"""Check your own work: comparisons that can fail, random inputs, equivalences, gradients, hypothesis strategies.

    from unify.testing import assert_equivalent
    print(assert_equivalent("gla", "mamba2", {}))                      # alpha shared by the channels: exact
    print(assert_equivalent("palimpsa", "mamba2", {"importance": lambda x, eps: eps, "prior_precision": 1}, order=1))

Everything here runs on the "reference" backend, the float64 token loop printed from the recurrence, unless it is given
an op. The strategies at the end need hypothesis (`pip install unify-attention[testing]`); the rest does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy as sp
import torch
from jaxtyping import Float
from torch import Tensor

from .derive import derive
from .errors import UnifyError
from .lower.printer import code, indices
from .lower.torch import per_token
from .op import Op, compile
from .recurrence import Input
from .symbols import SIZE, array, i
from .triple import Architecture, Observation, Posterior, Prior, Ridge, Squash, Triple

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Value = Callable[[dict, float], Any] | Tensor | float | int | sp.Expr
"""A substituted value: f(child's arguments, eps), a tensor, a number, or index notation over the child's arguments."""

ROUNDING = 1e-12
"""Below this relative error float64 no longer says anything about a limit."""

GATES = {"mixed": (1e-6, 30.0), "weak": (1e-6, 1e-2), "moderate": (1e-2, 3.0), "strong": (3.0, 30.0)}
"""Range of -g by regime; "mixed" also holds g = 0 and, again and again, both ends of its range."""


# -- comparing ---------------------------------------------------------------------------------------------------------


def relative_error(actual: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """max |actual - expected| / max |expected|: the error as a share of the largest entry. NaN if either holds NaN."""
    if expected.numel() == 0:
        return 0.0
    gap, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    return gap / size if size else gap


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, what: str = "the result") -> float:
    """Fail unless the shapes agree, both tensors are finite and `relative_error` is at most rtol.

    what: how the message names the tensor. Returns the error. Raises AssertionError that names the worst index.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(actual.shape)}, expected {list(expected.shape)}")
    for name, x in (("", actual), ("the expected value of ", expected)):
        if not torch.isfinite(x).all():
            at = torch.nonzero(~torch.isfinite(x))[0].tolist()
            raise AssertionError(f"{name}{what} is {x[tuple(at)].item()} at {at}")
    error = relative_error(actual, expected)
    if not error <= rtol:
        at = np.unravel_index(int((actual - expected).abs().argmax()), tuple(actual.shape))
        pair = f"{actual[at].item():.9g} against {expected[at].item():.9g}"
        where = f"worst at {[int(x) for x in at]}: {pair}"
        raise AssertionError(f"{what} is off by {error:.2e} of its largest entry, allowed {rtol:.0e}; {where}")
    return error


# -- random inputs -----------------------------------------------------------------------------------------------------


def random_inputs(
    op: Op,
    seed: int = 0,
    B: int = 2,
    T: int = 12,
    H: int = 2,
    K: int = 3,
    V: int = 2,
    gates: str = "mixed",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Arguments for an op, drawn from a seed: op(**random_inputs(op)).

    gates: a regime of `GATES`: "weak" (-1e-2 <= g <= -1e-6), "strong" (-30 <= g <= -3), "mixed", every strength next to
        every other, with g = 0, -1e-6 and -30 among them, or "moderate", where nothing is extreme. Keys have length at
        most 1 and 0 <= beta <= 1, so that a delta rule is stable; beta and importance are sometimes exactly 0.
    Returns a dict of tensors of that dtype, with the shapes that `op.recurrence.inputs` states.
    Raises UnifyError for an unknown regime.
    """
    if gates not in GATES:
        raise UnifyError(f"gates={gates!r}", "there is no such regime of gates", f"use one of {', '.join(GATES)}")
    rng = torch.Generator().manual_seed(seed)
    sizes = {"B": B, "T": T, "H": H, "K": K, "V": V}
    zeros = gates != "moderate" and not isinstance(op.triple.prior.adaptive, Ridge)  # a ridge of nothing holds nothing
    return {x.name: _draw(x.name, _shape(x, sizes, op), rng, gates, zeros).to(dtype) for x in op.recurrence.inputs}


def random_state(op: Op, inputs: Mapping[str, Tensor], seed: int = 0, count: int | None = None) -> tuple[Tensor, ...]:
    """A state that the op can reach with the static arguments of `inputs`: what three random tokens leave behind.

    count: how many sequences, if not `inputs`' B. Returns one tensor [count, H, ...] per state, as `initial_state`.
    """
    B, _, H, K = inputs["q"].shape
    V = inputs["v"].shape[-1]
    before = random_inputs(op, seed + 7919, count or B, 3, H, K, V, gates="moderate", dtype=inputs["q"].dtype)
    static = {x.name: inputs[x.name] for x in op.recurrence.inputs if x.per == "static"}
    return op(**{**before, **static}, output_final_state=True)[-1]


def _shape(x: Input, sizes: Mapping[str, int], op: Op) -> tuple[int, ...]:
    B, T, H, n = sizes["B"], sizes["T"], sizes["H"], op.triple.architecture.repeats
    lead = {"token": (B, T, H), "observation": (B, n * T, H), "static": (H,)}[x.per]
    return (*lead, *(sizes[str(SIZE[d])] for d in x.dims))


def _draw(name: str, shape: tuple[int, ...], rng: torch.Generator, gates: str, zeros: bool) -> Tensor:
    uniform = lambda low, high: low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    if name in ("g", "g_importance"):
        return _log_decay(shape, rng, gates)
    least = 0.1 if gates == "moderate" else 1e-3
    if name in ("beta", "importance"):
        strength = uniform(least, 1.0) if name == "beta" else least * (10 / least) ** uniform(0.0, 1.0)
        return strength * (uniform(0.0, 1.0) > 0.15) if zeros else strength
    if name == "noise":
        return least ** uniform(0.0, 1.0)
    ranges = {"prior_precision": (0.5, 2.0), "temperature": (0.2, 1.5), "gain": (0.5, 2.0), "ridge": (0.02, 0.5)}
    if name in (*ranges, "erase", "mix"):
        return uniform(*ranges.get(name, (0.0, 1.0)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    if name in ("q", "v", "write", "bonus", "prior_mean"):
        return x
    return x / x.norm(dim=-1, keepdim=True) * uniform(0.2, 1.0)[..., :1]  # k, and the keys of other names


def _log_decay(shape: tuple[int, ...], rng: torch.Generator, gates: str) -> Tensor:
    low, high = GATES[gates]
    share, at = (torch.rand(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    g = -low * (high / low) ** at
    if gates == "mixed":
        for n, extreme in enumerate((0.0, -low, -high)):
            g[(share > 0.15 * n) & (share < 0.15 * (n + 1))] = extreme
    return g


# -- equivalences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equivalence:
    """What `assert_equivalent` measured.

    worst: the largest relative error (of an exact claim, or at the smallest eps). order: the claimed order, None for an
    exact claim. slope: the measured one. eps, errors: the points it was measured at.
    """

    parent: str
    child: str
    order: int | None
    worst: float
    slope: float | None = None
    eps: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()

    def __str__(self):
        if self.order is None:
            return f"{self.parent} -> {self.child}: exact, worst relative error {self.worst:.1e}"
        points = ", ".join(f"{error:.1e} at {eps:.0e}" for eps, error in zip(self.eps, self.errors, strict=True))
        return f"{self.parent} -> {self.child}: order {self.order}, measured {self.slope:.3f} ({points})"


def assert_equivalent(
    parent: str | Triple,
    child: str | Triple,
    substitution: Mapping[str, Value] | None = None,
    *,
    output: Value | None = None,
    order: int | None = None,
    constraint: Callable[[dict], dict] | Mapping[str, Value] | None = None,
    initial: Mapping[str, Value] | None = None,
    eps: Sequence[float] = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
    fit: int | None = None,
    tolerance: float = 1e-12,
    seeds: Sequence[int] = (0, 1, 2),
    gates: str = "mixed",
    B: int = 2,
    T: int = 12,
    H: int = 2,
    K: int = 3,
    V: int = 2,
) -> Equivalence:
    """Check on random inputs that the parent, its arguments substituted, computes what the child computes.

    parent, child: names in the zoo, or triples. Both run with the same scale, on the reference backend.
    substitution: the parent's argument -> its value, one of
        f(x, eps) with x the child's arguments by name (and x["alpha"] = exp(g)), eps 0 for an exact claim;
        a tensor or a number; or index notation over the child's arguments, `alpha` and `eps`: array("k", (j,)) * eps.
        Values broadcast to the argument's shape. A name both have defaults to the child's. A later one of n repeated
        observations is a name of its own: {"beta_2": 0, "k_2": ..., "v_2": ...}.
    output: factor on the parent's output [B, T, H, V], in the same forms.
    order: None claims an identity, to `tolerance` relative to the largest entry. A number p claims that the error falls
        as eps ** p: the slope of log(error) by log(eps), where the error stands above rounding, must be p within 0.1.
    eps, fit: where a limit is measured, and to how many of its smallest eps the slope is fitted, if not to all.
    constraint: what the claim asks of the child's arguments: f(x) -> x, such as `unit_keys`, or a substitution of them,
        which may depend on eps.
    initial: None starts both where they start by themselves. A substitution of the parent's states starts the child in
        a random state; its values are over the child's states and static arguments, such as prior_precision.
    gates: regime of `random_inputs`; seeds: one run each; B, T, H, K, V: the sizes.
    Returns the measurement. Raises AssertionError where the claim fails, UnifyError where it is not well formed.
    """
    names = [_label(parent), _label(child)]
    edge_name = " -> ".join(names)
    ops = [compile(_triple(x), "reference") for x in (parent, child)]
    edge = _Edge(*ops, dict(substitution or {}), output, constraint, initial)
    size = {"B": B, "T": T, "H": H, "K": K, "V": V}

    def error(at: float) -> float:
        return float(np.max([edge.error(seed, size, gates, at) for seed in seeds]))  # np.max: a NaN is the worst error

    if order is None:
        worst = error(0.0)
        if not worst <= tolerance:
            raise AssertionError(f"{edge_name} is not exact: relative error {worst:.2e}, allowed {tolerance:.0e}")
        return Equivalence(*names, None, worst)
    errors = tuple(error(x) for x in eps)
    smallest = sorted(zip(eps, errors, strict=True))[:fit]
    slope = _slope(edge_name, *zip(*smallest, strict=True))
    found = Equivalence(*names, order, errors[int(np.argmin(eps))], slope, tuple(eps), errors)
    if not abs(slope - order) <= 0.1:
        raise AssertionError(f"{found}: the error does not fall as eps^{order}")
    return found


def unit_keys(x: dict) -> dict:
    """The constraint |k| = 1."""
    return {**x, "k": x["k"] / x["k"].norm(dim=-1, keepdim=True)}


def one_hot_keys(x: dict) -> dict:
    """The constraint that every key is an axis: the largest entry of each becomes 1, the others 0."""
    return {**x, "k": torch.zeros_like(x["k"]).scatter(-1, x["k"].argmax(-1, keepdim=True), 1.0)}


def _slope(edge: str, eps: Sequence[float], errors: Sequence[float]) -> float:
    """Least-squares slope of log(error) by log(eps) where the error stands above rounding."""
    if not all(np.isfinite(errors)):
        raise AssertionError(f"{edge} is not finite on the way to the limit: errors {errors}")
    points = [(np.log(e), np.log(error)) for e, error in zip(eps, errors, strict=True) if error > ROUNDING]
    if len(points) < 3:
        raise AssertionError(f"{edge} leaves errors {errors}: rounding only; claim it exact, with order=None")
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def _triple(x: str | Triple) -> Triple:
    if isinstance(x, Triple):
        return x
    from .models.zoo import get

    return get(x).triple


def _label(x: str | Triple) -> str:
    if isinstance(x, str):
        return x
    from .models.zoo import name_of

    return name_of(x) or "(" + "; ".join(str(x).split("\n")) + ")"


@dataclass(frozen=True)
class _Edge:
    """A claim: a parent op, a child op, and how the one's arguments are made from the other's."""

    parent: Op
    child: Op
    substitution: Mapping[str, Value]
    output: Value | None
    constraint: Callable[[dict], dict] | Mapping[str, Value] | None
    initial: Mapping[str, Value] | None

    def error(self, seed: int, sizes: dict[str, int], gates: str, eps: float) -> float:
        """Relative error of the parent's output on one draw of the child's arguments."""
        x = random_inputs(self.child, seed, **sizes, gates=gates)
        if callable(self.constraint):
            x = dict(self.constraint(x))
        elif self.constraint:
            x = _Scope(self.child, x, eps, sizes).arguments(self.child, self.constraint)
        scope = _Scope(self.child, x, eps, sizes)
        start = begin = None
        if self.initial is not None:
            start = random_state(self.child, x, seed)
            begin = scope.states(self.parent, self.initial, start)
        o = self.parent(**scope.arguments(self.parent, self.substitution), scale=1.0, initial_state=begin)
        if self.output is not None:
            o = o * scope.evaluate(self.output, (i,), scope.tokens)
        return relative_error(o, self.child(**x, scale=1.0, initial_state=start))


@dataclass(frozen=True)
class _Scope:
    """The child's arguments on one draw, in which values are evaluated."""

    child: Op
    x: dict[str, Tensor]
    eps: float
    sizes: dict[str, int]

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The child's arguments by the program's names, and alpha."""
        names = per_token(self.child.recurrence, self.x)
        return {"alpha": names["g"].exp(), **names} if "g" in names else names

    def evaluate(self, value: Value, dims: tuple, names: dict[str, Tensor]) -> Tensor:
        """A value over these names as a tensor whose last dimensions are `dims`, before broadcasting."""
        if isinstance(value, sp.Basic):
            if extra := set(indices(value)) - set(dims):
                axes = ", ".join(sorted(map(str, extra)))
                raise UnifyError(
                    f"{value}", f"what it stands for has no index {axes}", f"use {dims}, or sum over {axes}"
                )
            text = code(value.xreplace({x: sp.Rational(str(x)) for x in value.atoms(sp.Float)}), dims)
            eps, eye = torch.tensor(self.eps, dtype=torch.float64), torch.eye(self.sizes["K"], dtype=torch.float64)
            value = eval(
                text, {"torch": torch, "eye": eye, "K": self.sizes["K"], "V": self.sizes["V"], **names, "eps": eps}
            )
        elif callable(value):
            value = value(dict(names), self.eps)
        return torch.as_tensor(value, dtype=torch.float64)

    def arguments(self, op: Op, values: Mapping[str, Value]) -> dict[str, Tensor]:
        """The arguments of another op: substituted values, falling back on the child's of the same name."""
        shares = {x.name: _share_names(x, op) for x in op.recurrence.inputs}
        known = [name for share in shares.values() for name in share]
        for name in values:
            if name not in known:
                raise UnifyError(f"substitution[{name!r}]", "there is no such argument", f"use {', '.join(known)}")
        mine = {name: x.dims for x in self.child.recurrence.inputs for name in _share_names(x, self.child)}
        out, names = {}, self.tokens
        for x in op.recurrence.inputs:
            want = _shape(replace(x, per="token") if x.per == "observation" else x, self.sizes, op)
            parts = [self._one(name, values, mine, x.dims, want, names) for name in shares[x.name]]
            out[x.name] = parts[0] if len(parts) == 1 else torch.stack(parts, 2).flatten(1, 2)
        return out

    def states(self, op: Op, values: Mapping[str, Value], start: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states of another op [B, H, ...], made from the child's and from arguments that time does not change."""
        mine = {s.name: s.dims for s in self.child.recurrence.states}
        names = {x.name: self.x[x.name] for x in self.child.recurrence.inputs if x.per == "static"}
        names |= dict(zip(mine, start, strict=True))
        lead = (self.sizes["B"], self.sizes["H"])
        want = {s.name: (*lead, *(self.sizes[str(SIZE[d])] for d in s.dims)) for s in op.recurrence.states}
        return tuple(self._one(s.name, values, mine, s.dims, want[s.name], names) for s in op.recurrence.states)

    def _one(self, name: str, values: Mapping, mine: Mapping, dims: tuple, want: tuple, names: dict) -> Tensor:
        """The value of one name, given or the child's own, broadcast to its shape."""
        if name not in values and name not in mine:
            raise UnifyError(
                f"values for {sorted(values)}", f"the parent's {name} has none, and the child no {name}", "add it"
            )
        value = values[name] if name in values else array(name, mine[name])
        found = self.evaluate(value, dims, names)
        try:
            return found.expand(want)
        except RuntimeError:
            shape = f"it does not broadcast to {list(want)}"
            raise UnifyError(
                f"{name} {list(found.shape)}", shape, "give its last axes in that order, or a number"
            ) from None


def _share_names(x: Input, op: Op) -> list[str]:
    """An argument's names in the program: one for each repeated observation."""
    repeats = op.triple.architecture.repeats if x.per == "observation" else 1
    return [x.name, *(f"{x.name}_{n}" for n in range(2, repeats + 1))]


# -- gradients ---------------------------------------------------------------------------------------------------------


def check_gradients(
    op: Op,
    inputs: Mapping[str, Tensor],
    *,
    initial_state: Sequence[Tensor] | None = None,
    directions: int = 2,
    step: float = 1e-5,
    rtol: float = 1e-6,
    seed: int = 0,
) -> float:
    """Compare autograd with central differences of fourth order, in float64, one argument and one direction at a time.

    The loss is a random weighting of everything the op returns: o, the variance and the final state. Checked are all
    floating arguments in `inputs` (cu_seqlens may be among them) and each state's initial value: `initial_state`, or
    `random_state`'s.
    inputs: best of `random_inputs(gates="moderate")`, where nothing has a kink or a steep place within a few steps.
    directions: how many an argument. step: how far; g of a "tempered" key moves in proportion to itself, because a real
    power has no derivative at 0.
    Returns the worst error, relative to the derivative (or to 1% of the loss, where the derivative is smaller).
    Raises AssertionError, naming the argument, where it exceeds rtol.
    """
    loss, point = _loss(replace(op, checked=False), inputs, initial_state, seed)
    leaves = {name: x.clone().requires_grad_() for name, x in point.items()}
    total = loss(leaves)
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    floor, errors = 1e-2 * max(1.0, abs(total.item())), [0.0]
    rng = torch.Generator().manual_seed(seed)
    for (name, x), slope in zip(point.items(), slopes, strict=True):
        for _ in range(directions):
            d = torch.randn(x.shape, generator=rng, dtype=torch.float64)
            d = d * x if name == "g" and op.triple.architecture.key == "tempered" else d
            with torch.no_grad():
                near, far = (
                    loss({**point, name: x + n * step * d}) - loss({**point, name: x - n * step * d}) for n in (1, 2)
                )
            measured = (8 * near - far).item() / (12 * step)
            found = 0.0 if slope is None else (slope * d).sum().item()
            errors.append(abs(found - measured) / max(abs(found), abs(measured), floor))
            if not errors[-1] <= rtol:
                message = f"{found:.9g}, finite differences give {measured:.9g}"
                raise AssertionError(f"the gradient by {name} is off by {errors[-1]:.1e}: {message}")
    return max(errors)


def _loss(op: Op, inputs: Mapping[str, Tensor], start: Sequence[Tensor] | None, seed: int) -> tuple[Callable, dict]:
    """A random weighting of all that the op returns, as a function of named tensors, and the point it is taken at."""
    rng = torch.Generator().manual_seed(seed + 1)
    offsets, states = inputs.get("cu_seqlens"), [s.name for s in op.recurrence.states]
    point = {name: x.detach().double() for name, x in inputs.items() if x.is_floating_point()}
    if start is None:
        count = len(point["q"]) if offsets is None else len(offsets) - 1
        start = random_state(op, point, seed, count)
    point |= {f"initial_state.{name}": x.detach().double() for name, x in zip(states, start, strict=True)}
    weights: list[Tensor] = []

    def loss(values: Mapping[str, Tensor]) -> Tensor:
        given = {name: x for name, x in values.items() if "." not in name}
        begin = tuple(values[f"initial_state.{name}"] for name in states)
        extra = {"cu_seqlens": offsets, "return_variance": True, "output_final_state": True}
        o, var, final = op(**given, initial_state=begin, **extra)
        if not weights:
            weights.extend(torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (o, var, *final))
        return sum((w * x).sum() for w, x in zip(weights, (o, var, *final), strict=True))

    return loss, point


# -- hypothesis strategies ---------------------------------------------------------------------------------------------


def _strategies():
    try:
        from hypothesis import strategies
    except ImportError:
        raise UnifyError(
            "unify.testing without hypothesis",
            "its strategies are made of hypothesis's",
            "pip install unify-attention[testing]",
        ) from None
    return strategies


def triples(*, derivable: bool = True, **only: Sequence) -> SearchStrategy[Triple]:
    """Random legal triples from the whole space, every leg and option, the simplest first.

    derivable: leave out the few triples whose stationarity has no closed form (`derive` refuses them).
    only: restricts a choice, by its field's name (`prior_precision` for the prior's), to the values listed:
        triples(curvature=("key", "diagonal"), dynamics=("power",)).
    Raises UnifyError for a name that is no choice.
    """
    st = _strategies()
    names = {f.name for leg in (Architecture, Posterior, Prior) for f in fields(leg)} | {"prior_precision"}
    for name in only:
        if name not in names:
            raise UnifyError(f"triples({name}=...)", "a triple has no such choice", f"use {', '.join(sorted(names))}")

    def make(draw) -> Triple:
        def one(name: str, *options):
            allowed = [x for x in options if x in only.get(name, options)]
            return draw(st.sampled_from(allowed)) if allowed else reject()

        try:
            found = _legs(one)
            if derivable:
                derive(found)
        except UnifyError:
            reject()
        return found

    from hypothesis import reject

    return _composite(make)


def _composite(make: Callable) -> SearchStrategy:
    """The strategy of make(draw). Puts back the global random state, which sympy and type checkers use."""

    def drawn(draw):
        state = random.getstate()
        try:
            return make(draw)
        finally:
            random.setstate(state)

    return _strategies().composite(drawn)()


def _legs(one: Callable) -> Triple:
    """A triple from `one(name, *options)`, which chooses; options listed twice are likelier.

    Each choice knows what the earlier ones allow, so that little is left to be rejected.
    """
    flag = lambda name: one(name, False, True)  # noqa: E731
    value = one("value", "evidence", "observation")
    curvature = one("curvature", "none", "key", "diagonal", "isotropic", "full")
    full, seen = curvature == "full", value == "observation"
    first = one("anchor", "prior", *(("predicted", "previous") if seen and not full else ()))
    observations, anchor = _draw_observations(one, first)
    projection = one(
        "projection", "keep", *(("diagonal", "reset") if full else ("reset",) if curvature != "none" else ())
    )
    kept = full and projection == "keep"
    adaptive = one("adaptive", None, None, *((Ridge(),) if kept else (None, Squash()) if curvature == "none" else ()))
    squash = isinstance(adaptive, Squash)
    dynamics = one("dynamics", "power", "power", *(() if kept or adaptive else ("diffusion",)))
    forgetting = one("forgetting", "head", "none", "fixed", *(() if kept else ("key", "entry")))
    apart = ("head", *(() if squash or curvature == "key" else ("value",))) if squash or curvature != "none" else ()
    importance = one("importance", *(() if squash else ("tied",)), *(() if kept and seen else apart))
    wide = ("value",) if curvature != "key" or importance != "tied" else ()
    target = seen and any(o.target for o in observations)
    read = one("read", "after", "before")
    key = one("key", "free", *(("complement", "tempered") if forgetting == "key" else ()))
    return Triple(
        Architecture(
            forgetting=forgetting,
            precision=one("precision", "one", *(("head", *wide) if target else ())),
            importance=importance,
            value=value,
            write_gate=flag("write_gate"),
            read=read,
            bonus=read == "before" and flag("bonus"),
            mix=kept and flag("mix"),
            observations=observations,
            repeats=1 if first == "previous" or key != "free" else one("repeats", 1, 1, 2),
            key=key,
            scale=one("scale", None, 1.0),
        ),
        Posterior(
            curvature=_draw_curvatures(one, curvature, observations),
            anchor=anchor,
            anchor_weight="one" if first == "prior" else one("anchor_weight", "one", "head", "key"),
            projection=projection,
            gain=projection == "diagonal" and flag("gain"),
        ),
        Prior(
            precision="one" if adaptive else one("prior_precision", "one", "head", "key"),
            mean="zero" if isinstance(adaptive, Ridge) else one("mean", "zero", "entry"),
            dynamics=dynamics,
            noise="none" if dynamics == "power" else one("noise", "fixed", "head", "key", "entry"),
            adaptive=adaptive,
        ),
    )


def _draw_observations(one: Callable, first: str) -> tuple[tuple[Observation, ...], str | tuple[str, ...]]:
    """What a token observes, and where each observation is expanded; `first` is the first one's anchor."""
    plain, own, second = Observation(), Observation(read="p"), Observation("p")
    erase, clear = Observation("-b", "a", target=False), Observation("k", target=False)
    if first == "prior":
        return one("observations", (plain,), (plain,), (plain, second)), first
    several = ((erase, plain), (plain, erase), (plain, second), (clear, plain))
    observations = one("observations", (plain,), (own,), *several)
    if len(observations) == 1:
        return observations, first
    return observations, (first, "predicted" if observations[-1] == erase else one("anchor", "predicted", "prior"))


def _draw_curvatures(one: Callable, kind: str, observations: tuple[Observation, ...]) -> str | tuple[str, ...]:
    """One curvature for all observations, or for some of them only."""
    if len(observations) == 1 or kind == "none":
        return kind
    return one("curvatures", kind, ("none", kind), (kind, "none"))


def sizes(largest: int = 5, longest: int = 20) -> SearchStrategy[dict[str, int]]:
    """Random sizes {"B", "T", "H", "K", "V"}, odd ones and 1 included; T up to `longest`, K and V up to `largest`."""
    st = _strategies()
    small, channels = st.integers(1, 2), st.integers(1, largest)
    return st.fixed_dictionaries({"B": small, "T": st.integers(1, longest), "H": small, "K": channels, "V": channels})


def gates(strength: str | None = None) -> SearchStrategy[float]:
    """Random log decays g <= 0 of one regime of `GATES`, or of any; the mixed ones hold exactly 0, -1e-6 and -30."""
    st = _strategies()
    if strength is None:
        return st.sampled_from(tuple(GATES)).flatmap(gates)
    low, high = GATES[strength]
    spread = st.floats(float(np.log10(low)), float(np.log10(high))).map(lambda x: -(10.0**x))
    return st.sampled_from((0.0, -low, -high)) | spread if strength == "mixed" else spread


def cu_seqlens(T: int) -> SearchStrategy[Tensor]:
    """Random offsets [0, ..., T] of packed sequences, length 1 included: int64 [N + 1]."""
    st = _strategies()
    cuts = st.sets(st.integers(1, T - 1), max_size=4) if T > 1 else st.just(set())
    return cuts.map(lambda x: torch.tensor([0, *sorted(x), T], dtype=torch.int64))


def inputs(op: Op, *, packed: bool = False, strength: str | None = None, **limits: int) -> SearchStrategy[dict]:
    """Random arguments for an op, to be called as op(**drawn): sizes, a regime of gates and a seed.

    packed: B is 1 and `cu_seqlens` is among them. strength: one regime of `GATES`. limits: those of `sizes`.
    Only the seed, the sizes and the offsets are drawn, so that a failure shrinks to a small one.
    """
    st = _strategies()
    regimes = st.sampled_from(tuple(GATES)) if strength is None else st.just(strength)

    def make(draw) -> dict:
        size = draw(sizes(**limits)) | ({"B": 1} if packed else {})
        drawn: dict[str, Any] = random_inputs(op, draw(st.integers(0, 999)), **size, gates=draw(regimes))
        return {**drawn, "cu_seqlens": draw(cu_seqlens(size["T"]))} if packed else drawn

    return _composite(make)
