"""The declaration: an architecture choice, a posterior approximation and a prior.

Each leg is a small frozen dataclass that checks itself; a `Triple` checks the legs against each other. A combination
that has no meaning is refused here, naming the leg at fault and what would work. No model's name appears in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .errors import UnifyError

CHOICES = {
    "forgetting": ("none", "fixed", "head", "key", "entry"),
    "precision": ("one", "head", "value"),
    "importance": ("tied", "head", "value"),
    "value": ("evidence", "observation"),
    "read": ("after", "before"),
    "key": ("free", "complement", "tempered"),
    "observed": ("k", "p", "a", "b", "-k", "-p", "-a", "-b"),
    "curvature": ("none", "isotropic", "key", "diagonal", "full"),
    "anchor": ("prior", "predicted", "previous"),
    "anchor_weight": ("one", "head", "key"),
    "projection": ("keep", "diagonal", "reset"),
    "prior.precision": ("one", "head", "key"),
    "mean": ("zero", "entry"),
    "dynamics": ("power", "diffusion"),
    "noise": ("none", "fixed", "head", "key", "entry"),
}


def _choice(leg: str, name: str, value: Any, key: str | None = None) -> None:
    allowed = CHOICES[key or name]
    if value not in allowed:
        raise UnifyError(
            f"{leg}({name}={value!r})", f"the {leg.lower()} has no such {name}", f"use one of {', '.join(allowed)}"
        )


@dataclass(frozen=True)
class Observation:
    """One thing observed at a token: v ~ Normal(read . s* + key . (s - s*), 1 / beta), linearised at the anchor s*.

    key: name of the input along which the evidence is written ("-b" is minus b).
    read: name of the input that reads the anchor; empty means the key itself, the ordinary linear observation.
    target: False observes the value 0 with precision 1 (an erasure).
    """

    key: str = "k"
    read: str = ""
    target: bool = True

    def __post_init__(self):
        for name in ("key", "read"):
            if name == "key" or self.read != "":
                _choice("Observation", name, getattr(self, name), "observed")

    @property
    def plain(self) -> bool:
        """Whether the anchor is read by the very key that writes."""
        return self.read in ("", self.key)


@dataclass(frozen=True)
class Architecture:
    """Which gates a token emits, with which shapes, and how the memory is read.

    forgetting: shape of alpha = exp(g): none; fixed (one constant a head); head (scalar a token and head);
        key (per key channel); entry (a constant per memory entry).
    precision: shape of beta, the precision of an observation: one, head (a scalar) or value (per value channel).
    importance: shape of the precision that enters the curvature; "tied" takes it from beta (one Bayesian filter),
        "head" and "value" give it a gate of its own, so that writing and importance are set apart.
    value: whether v is the "observation" itself or the "evidence" r = beta v.
    write_gate: a gate w on the value, per value channel.
    read: "after" the token is written or "before" (then with a bonus for the current token, if `bonus`).
    mix: the read-out mixes the query and the solved query with a gate (needs a full, kept precision).
    observations: what is observed at a token, in order; repeats: how often, each with inputs of its own.
    key: "free"; "complement" (k = 1 - alpha); "tempered" (k scaled by (-g / tau)^tau).
    scale: factor on the query; None is K^-1/2.
    maps: what a layer does to q and k before the recurrence ("l2", "rotary", ...): recorded, not applied here.
    """

    forgetting: str = "head"
    precision: str = "one"
    importance: str = "tied"
    value: str = "evidence"
    write_gate: bool = False
    read: str = "after"
    bonus: bool = False
    mix: bool = False
    observations: tuple[Observation, ...] = (Observation(),)
    repeats: int = 1
    key: str = "free"
    scale: float | None = None
    maps: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("forgetting", "precision", "importance", "value", "read", "key"):
            _choice("Architecture", name, getattr(self, name))
        if not self.observations or not all(isinstance(o, Observation) for o in self.observations):
            raise UnifyError(
                f"observations={self.observations!r}", "a token must observe something", "pass a tuple of Observation"
            )
        if not any(o.target for o in self.observations):
            raise UnifyError(
                "observations without a target",
                "architecture: a memory that is only erased holds nothing, and there is no v",
                "give an observation a target",
            )
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise UnifyError(
                f"repeats={self.repeats!r}", "a token is observed a whole number of times", "use 1 or more"
            )
        if self.scale is not None and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise UnifyError(
                f"scale={self.scale!r}",
                "the query's scale must be positive",
                "use a number above 0, or None for K^-1/2",
            )
        if self.value == "evidence" and self.precision != "one":
            raise UnifyError(
                f"value='evidence' with precision={self.precision!r}",
                "architecture: evidence carries its own strength, so beta would not be used",
                "give importance= a shape, or declare value='observation'",
            )
        if self.bonus and self.read != "before":
            raise UnifyError(
                "bonus with read='after'",
                "architecture: after the update the token is already in the memory",
                "use read='before'",
            )
        if self.key != "free" and self.repeats > 1:
            raise UnifyError(
                f"key={self.key!r} with repeats={self.repeats}",
                "architecture: one decay makes one key a token",
                "use repeats=1, or key='free'",
            )
        if self.key != "free" and self.forgetting != "key":
            raise UnifyError(
                f"key={self.key!r} with forgetting={self.forgetting!r}",
                "architecture: this key is made from a decay per key channel",
                "use forgetting='key', or key='free'",
            )

    @property
    def stages(self) -> tuple[Observation, ...]:
        """All observations of one token, in order."""
        return self.observations * self.repeats


@dataclass(frozen=True)
class Posterior:
    """Which approximation of the posterior is carried from token to token.

    curvature: projection C of the loss's Hessian: none, isotropic (trace / K), key (diagonal, shared by the value
        channels), diagonal (per value channel), full. A tuple gives one per observation.
    anchor: where the loss is expanded: prior (mu_0), predicted (after forgetting), previous (before forgetting).
        A tuple gives one per observation. With a full curvature the anchor drops out.
    anchor_weight: a gate on the anchor ("erase"): one, head (a scalar) or key (per key channel).
    projection: what becomes of the precision after the step: keep, diagonal, reset (to the prior's).
    gain: a factor per head on the information that the projection keeps.
    """

    curvature: str | tuple[str, ...] = "none"
    anchor: str | tuple[str, ...] = "prior"
    anchor_weight: str = "one"
    projection: str = "keep"
    gain: bool = False

    def __post_init__(self):
        for name in ("curvature", "anchor"):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                _choice("Posterior", name, one)
        for name in ("anchor_weight", "projection"):
            _choice("Posterior", name, getattr(self, name))
        if self.gain and self.projection != "diagonal":
            raise UnifyError(
                f"gain with projection={self.projection!r}",
                "posterior: the gain weighs what a projection keeps",
                "use projection='diagonal'",
            )


@dataclass(frozen=True)
class Ridge:
    """A prior precision set from the data: lambda_t = ridge * |excess precision|_F (a factor per head)."""


@dataclass(frozen=True)
class Squash:
    """A prior precision set from the keys' second moment A: 1 / Lambda_0 = base ** (-r / (1 + |r|)), r = log(A + eps) - centre.

    A is the excess importance of an auxiliary key-diagonal filter with a forgetting gate of its own.
    """

    base: float = 1.5
    centre: float = -0.2
    eps: float = 1e-6

    def __post_init__(self):
        if not (self.base > 0 and self.eps > 0):
            raise UnifyError(f"{self!r}", "prior: base and eps must be positive", "use base > 0 and eps > 0")


@dataclass(frozen=True)
class Prior:
    """What the memory is before the first token, and what forgetting returns it to.

    precision: shape of Lambda_0: one (1), head, key (per key channel); an argument of the op unless it is one.
    mean: zero, or an entry each (argument prior_mean).
    dynamics: power (what is forgotten is handed back to the prior) or diffusion (s_t = a s_{t-1} + noise).
    noise: shape of the diffusion's variance per token.
    adaptive: None, `Ridge()` or `Squash()`: Lambda_0 set from the data.
    """

    precision: str = "one"
    mean: str = "zero"
    dynamics: str = "power"
    noise: str = "none"
    adaptive: Ridge | Squash | None = None

    def __post_init__(self):
        _choice("Prior", "precision", self.precision, "prior.precision")
        for name in ("mean", "dynamics", "noise"):
            _choice("Prior", name, getattr(self, name))
        if not isinstance(self.adaptive, Ridge | Squash | None):
            raise UnifyError(
                f"adaptive={self.adaptive!r}", "the prior has no such adaptive", "use Ridge(), Squash() or None"
            )
        if (self.dynamics == "diffusion") != (self.noise != "none"):
            raise UnifyError(
                f"dynamics={self.dynamics!r} with noise={self.noise!r}",
                "prior: a diffusion needs a noise and a power prior has none",
                "use dynamics='diffusion' with noise='fixed', 'head', 'key' or 'entry', or dynamics='power' with noise='none'",
            )
        if self.adaptive is not None and (self.precision != "one" or self.dynamics != "power"):
            raise UnifyError(
                f"adaptive={self.adaptive!r} with precision={self.precision!r}, dynamics={self.dynamics!r}",
                "prior: a precision set from the data is not also an argument, and forgets by power",
                "use precision='one' and dynamics='power'",
            )


@dataclass(frozen=True)
class Triple:
    """One model: (architecture choice, posterior approximation, prior). Raises `UnifyError` where the legs do not fit."""

    architecture: Architecture = field(default_factory=Architecture)
    posterior: Posterior = field(default_factory=Posterior)
    prior: Prior = field(default_factory=Prior)

    def __post_init__(self):
        for name, leg in (("architecture", Architecture), ("posterior", Posterior), ("prior", Prior)):
            if not isinstance(getattr(self, name), leg):
                given = f"{name}={getattr(self, name)!r}"
                raise UnifyError(given, f"a triple's {name} is one of its legs", f"pass {leg.__name__}(...)")
        for check in (
            _check_counts,
            _check_curvature,
            _check_anchor,
            _check_projection,
            _check_unused,
            _check_adaptive,
        ):
            check(self.architecture, self.posterior, self.prior)

    @property
    def curvatures(self) -> tuple[str, ...]:
        """The curvature of each observation of a token."""
        return _per_stage(self.posterior.curvature, self.architecture)

    @property
    def anchors(self) -> tuple[str, ...]:
        """The anchor of each observation of a token."""
        return _per_stage(self.posterior.anchor, self.architecture)

    @property
    def curvature(self) -> str:
        """The one curvature other than none that this triple uses, or none."""
        return next((c for c in self.curvatures if c != "none"), "none")

    @property
    def importance(self) -> str:
        """Shape of the precision that enters the curvature: one, head or value."""
        a = self.architecture
        return a.precision if a.importance == "tied" else a.importance

    def metaplastic(self, importance: str | None = None) -> Triple:
        """The metaplastic counterpart: curvature none becomes diagonal (or key), with an importance gate of its own.

        importance: "value" (curvature diagonal, every memory entry has its importance) or "head" (curvature key, the
        value channels share it). Default: "value" where the anchor is the prior, "head" where it is not, because a
        per-entry importance would couple a delta rule's rows to transitions of their own.
        Only the posterior's curvature and the gate that feeds it change; at importance 0 it is the source, exactly.
        Raises UnifyError where the precision already moves.
        """
        if self.curvature != "none" or self.prior.adaptive is not None or self.prior.dynamics != "power":
            raise UnifyError(
                f"metaplastic() of {self}",
                "posterior: its precision already moves, so there is no fixed plasticity to replace",
                "take a triple with curvature 'none', a power prior and no adaptive prior",
            )
        if importance is None:
            importance = "value" if set(self.anchors) == {"prior"} else "head"
        kind = {"value": "diagonal", "head": "key"}.get(importance)
        if kind is None:
            raise UnifyError(
                f"importance={importance!r}",
                "a metaplastic triple has one importance per value channel or per head",
                "use 'value' or 'head'",
            )
        stages = self.architecture.observations
        curvature = tuple(kind if o.target else "none" for o in stages)
        return replace(
            self,
            architecture=replace(self.architecture, importance=importance),
            posterior=replace(self.posterior, curvature=curvature if len(set(curvature)) > 1 else kind),
        )

    def record(self) -> dict[str, dict[str, Any]]:
        """What JSON can hold of the triple: each leg's fields that are not at their default. `from_record` reads it."""
        return {f.name: _written(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Triple:
        """The triple of a `record`. Raises UnifyError for a leg, a field or a value that there is not."""
        legs = {"architecture": Architecture, "posterior": Posterior, "prior": Prior}
        _only("a triple", record, legs)
        return cls(**{name: _read(legs[name], leg) for name, leg in record.items()})

    def __str__(self):
        return "\n".join(
            f"{name:<13}{_differences(getattr(self, name))}" for name in ("architecture", "posterior", "prior")
        )

    def latex(self) -> str:
        """The triple as a LaTeX table row: A, P and Pr."""
        legs = (
            _differences(getattr(self, name)).replace("_", r"\_") for name in ("architecture", "posterior", "prior")
        )
        return r"\left(" + r",\; ".join(rf"\text{{{leg}}}" for leg in legs) + r"\right)"


def _differences(leg: Any) -> str:
    """The leg's fields in words, leaving out switches that are off."""
    parts = []
    for f in fields(leg):
        value = getattr(leg, f.name)
        if value is False or value is None or value == () or (f.name == "repeats" and value == 1):
            continue
        if f.name == "observations":
            if value == (Observation(),):
                continue
            value = "; ".join(
                f"{o.key}{'' if o.plain else ' read by ' + o.read}{'' if o.target else ' (erase)'}" for o in value
            )
        if isinstance(value, tuple):
            value = "/".join(value)
        parts.append(f.name.replace("_", " ") if value is True else f"{f.name.replace('_', ' ')} {value}")
    return ", ".join(parts)


_ADAPTIVE = {"ridge": Ridge, "squash": Squash}


def _only(what: str, record: Any, allowed: Mapping) -> None:
    """Refuse a record that is no mapping or has a key that nothing would read."""
    if not isinstance(record, Mapping) or not record.keys() <= allowed.keys():
        given = sorted(record.keys() - allowed.keys()) if isinstance(record, Mapping) else record
        raise UnifyError(f"{given!r} in JSON", f"{what} has no such part", f"use {', '.join(allowed)}")


def _written(leg: Any) -> dict[str, Any]:
    """A dataclass as plain values, without what is at its default."""
    out = {}
    for f in fields(leg):
        value = getattr(leg, f.name)
        if value == (f.default_factory() if callable(f.default_factory) else f.default):
            continue
        if f.name == "observations":
            value = [_written(o) for o in value]
        elif f.name == "adaptive":
            value = {next(name for name, kind in _ADAPTIVE.items() if isinstance(value, kind)): asdict(value)}
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def _read(leg: type, record: Any) -> Any:
    """The inverse of `_written`: lists are tuples again."""
    _only(leg.__name__, record, {f.name: f for f in fields(leg)})
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
    if "observations" in values:
        values["observations"] = tuple(_read(Observation, o) for o in values["observations"])
    if values.get("adaptive") is not None:
        _only("Prior(adaptive=...)", values["adaptive"], _ADAPTIVE)
        values["adaptive"] = next((_read(_ADAPTIVE[name], x) for name, x in values["adaptive"].items()), None)
    return leg(**values)


def _per_stage(value: str | tuple[str, ...], a: Architecture) -> tuple[str, ...]:
    each = value if isinstance(value, tuple) else (value,) * len(a.observations)
    return each * a.repeats


def _check_counts(a: Architecture, p: Posterior, prior: Prior) -> None:
    for name in ("curvature", "anchor"):
        value = getattr(p, name)
        if isinstance(value, tuple) and len(value) != len(a.observations):
            raise UnifyError(
                f"{name}={value!r} for {len(a.observations)} observations",
                f"posterior: one {name} per observation",
                f"pass {len(a.observations)} of them, or one for all",
            )
    kinds = {c for c in _per_stage(p.curvature, a) if c != "none"}
    if len(kinds) > 1:
        raise UnifyError(
            f"curvature={p.curvature!r}",
            "posterior: one family of posteriors per memory",
            "use one curvature, or that one and 'none'",
        )


def _check_curvature(a: Architecture, p: Posterior, prior: Prior) -> None:
    curvatures, gate = _per_stage(p.curvature, a), a.precision if a.importance == "tied" else a.importance
    if "key" in curvatures and gate == "value":
        raise UnifyError(
            f"curvature='key' with importance per value channel ({'importance' if a.importance == 'value' else 'precision'}='value')",
            "posterior: one importance vector cannot serve value channels with different precisions",
            "use curvature='diagonal', or an importance per head",
        )
    if "full" in curvatures and p.projection == "keep" and a.forgetting in ("key", "entry"):
        raise UnifyError(
            f"curvature='full' kept, with forgetting={a.forgetting!r}",
            "architecture: a full precision has no forgetting per channel (it would not stay a precision)",
            "use forgetting='head', or projection='diagonal'",
        )
    if "full" in curvatures and p.projection == "keep" and prior.dynamics == "diffusion":
        raise UnifyError(
            "curvature='full' kept, with dynamics='diffusion'",
            "prior: (a^2 Lambda^-1 + w)^-1 has no closed form in the entries of a full precision",
            "use dynamics='power', or projection='diagonal'",
        )


def _check_anchor(a: Architecture, p: Posterior, prior: Prior) -> None:
    anchors, curvatures = _per_stage(p.anchor, a), _per_stage(p.curvature, a)
    if a.value == "evidence" and set(anchors) != {"prior"}:
        raise UnifyError(
            f"value='evidence' with anchor={p.anchor!r}",
            "architecture: away from the prior the pair (v, beta) matters, not their product alone",
            "use value='observation', or anchor='prior'",
        )
    if "full" in curvatures and set(anchors) != {"prior"}:
        raise UnifyError(
            f"curvature='full' with anchor={p.anchor!r}",
            "posterior: with the full curvature the anchor drops out",
            "leave the anchor at its default, 'prior'",
        )
    if "previous" in anchors[1:]:
        raise UnifyError(
            "anchor 'previous' on a later observation",
            "posterior: only the first observation of a token stands next to the previous mean",
            "use 'predicted' there",
        )
    if set(anchors) == {"prior"} and p.anchor_weight != "one":
        raise UnifyError(
            f"anchor_weight={p.anchor_weight!r} with anchor='prior'",
            "posterior: there is no anchor to weigh",
            "use anchor='predicted' or 'previous'",
        )
    for o, anchor in zip(a.stages, anchors, strict=True):
        if anchor == "prior" and not o.plain:
            raise UnifyError(
                f"Observation(read={o.read!r}) with anchor='prior'",
                "posterior: the prior is not read, so the read key would not be used",
                "use anchor='predicted' or 'previous'",
            )
        if anchor == "prior" and not o.target:
            raise UnifyError(
                "an observation without a target at anchor='prior'",
                "architecture: it would erase nothing",
                "use anchor='predicted' or 'previous', or a target",
            )


def _check_projection(a: Architecture, p: Posterior, prior: Prior) -> None:
    curvatures = set(_per_stage(p.curvature, a))
    if p.projection == "diagonal" and curvatures != {"full"}:
        raise UnifyError(
            f"projection='diagonal' with curvature={p.curvature!r}",
            "posterior: the precision is diagonal already",
            "use projection='keep', or curvature='full'",
        )
    if p.projection == "reset" and curvatures == {"none"}:
        raise UnifyError(
            "projection='reset' with curvature='none'",
            "posterior: the precision never leaves the prior's",
            "use projection='keep'",
        )
    if "full" in curvatures and p.projection == "keep" and a.importance != "tied" and a.value == "observation":
        raise UnifyError(
            f"curvature='full' kept, with importance={a.importance!r} apart from beta",
            "architecture: then the anchor no longer drops out and every token needs a solve",
            "use importance='tied', or value='evidence'",
        )


def _check_unused(a: Architecture, p: Posterior, prior: Prior) -> None:
    curved = any(o.target and c != "none" for o, c in zip(a.stages, _per_stage(p.curvature, a), strict=True))
    if a.importance != "tied" and not curved and not isinstance(prior.adaptive, Squash):
        raise UnifyError(
            f"importance={a.importance!r} with curvature={p.curvature!r}",
            "architecture: the importance would not be used",
            "use importance='tied', or a curvature where there is a target",
        )
    if a.mix and not ("full" in _per_stage(p.curvature, a) and p.projection == "keep"):
        raise UnifyError(
            "mix without a full, kept precision",
            "architecture: the read-out solves nothing to mix with",
            "use curvature='full' with projection='keep'",
        )
    if a.key != "free" and not any("k" in (o.key.strip("-"), o.read.strip("-")) for o in a.stages):
        raise UnifyError(
            f"key={a.key!r} where nothing is observed along k",
            "architecture: the key would not be used",
            "use key='free', or observe along k",
        )


def _check_adaptive(a: Architecture, p: Posterior, prior: Prior) -> None:
    curvatures = set(_per_stage(p.curvature, a))
    if isinstance(prior.adaptive, Ridge) and not (curvatures == {"full"} and p.projection == "keep"):
        raise UnifyError(
            "adaptive=Ridge()",
            "prior: a ridge is measured on a full, kept precision",
            "use curvature='full' with projection='keep'",
        )
    if isinstance(prior.adaptive, Ridge) and (a.precision if a.importance == "tied" else a.importance) == "value":
        raise UnifyError(
            "adaptive=Ridge() with importance per value channel",
            "prior: one ridge per head cannot serve value channels with precisions of their own",
            "use an importance (or precision) per head",
        )
    if isinstance(prior.adaptive, Ridge) and a.read == "before":
        raise UnifyError(
            "adaptive=Ridge() with read='before'",
            "prior: before the first token there is nothing to measure a ridge on",
            "use read='after'",
        )
    if isinstance(prior.adaptive, Ridge) and prior.mean != "zero":
        raise UnifyError(
            "adaptive=Ridge() with a prior mean",
            "prior: the ridge moves, so a mean held by it would move too",
            "use mean='zero'",
        )
    if isinstance(prior.adaptive, Squash) and not (curvatures == {"none"} and a.importance == "head"):
        raise UnifyError(
            "adaptive=Squash()",
            "prior: the squash makes the plasticity, from a key-diagonal second moment",
            "use curvature='none' and importance='head'",
        )
