"""The zoo: every model as a triple, with its citation. A declaration says what a model chooses; nothing else is typed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unify.errors import UnifyError
from unify.triple import Architecture, Observation, Posterior, Prior, Ridge, Squash, Triple

FIXED, DELTA, SOLVE, KALMAN, META = "fixed plasticity", "delta rules", "exact solves", "Kalman", "metaplastic"


@dataclass(frozen=True)
class Model:
    """A named triple.

    name: how the command line and `get` call it. label: how people write it. family: its column on the map.
    citation: where it was published, or what it was made from. note: what a reader should know about the declaration.
    """

    name: str
    label: str
    family: str
    triple: Triple
    citation: str
    note: str = ""


def _evidence(forgetting: str, **architecture) -> Triple:
    """Fixed plasticity: v is evidence r = beta v, the posterior keeps the prior's precision."""
    return Triple(Architecture(forgetting=forgetting, **architecture))


def _delta(forgetting: str, anchor: str | tuple[str, ...] = "predicted", **architecture) -> Triple:
    """A delta rule: the loss is expanded at what the memory already predicts, with no curvature."""
    return Triple(
        Architecture(forgetting=forgetting, **{"value": "observation", "precision": "head", **architecture}),
        Posterior(anchor=anchor),
    )


def _exact(forgetting: str, posterior: Posterior, prior: Prior, **architecture) -> Triple:
    """The exact curvature, observations with a precision per head."""
    return Triple(
        Architecture(forgetting=forgetting, value="observation", precision="head", **architecture), posterior, prior
    )


def _meta(source: Triple, importance: str | None = None) -> Triple:
    """The metaplastic counterpart, with a learned prior precision per head."""
    return replace(source.metaplastic(importance), prior=Prior(precision="head"))


_FIXED = (
    Model(
        "linear_attention",
        "Linear attention",
        FIXED,
        _evidence("none"),
        "Katharopoulos et al., Transformers are RNNs, 2020, arXiv 2006.16236",
    ),
    Model(
        "retnet",
        "RetNet",
        FIXED,
        _evidence("fixed", maps=("rotary",)),
        "Sun et al., Retentive Network, 2023, arXiv 2307.08621",
    ),
    Model(
        "lightning", "Lightning", FIXED, _evidence("fixed"), "Qin et al., Lightning Attention-2, 2024, arXiv 2401.04658"
    ),
    Model(
        "mamba2",
        "Mamba-2",
        FIXED,
        _evidence("head", scale=1.0),
        "Dao and Gu, Transformers are SSMs, 2024, arXiv 2405.21060",
        "v is dt * x and g is -A dt; the skip D x belongs to the layer",
    ),
    Model("gla", "GLA", FIXED, _evidence("key"), "Yang et al., Gated Linear Attention, 2023, arXiv 2312.06635"),
    Model(
        "hgrn2",
        "HGRN2",
        FIXED,
        _evidence("key", key="complement"),
        "Qin et al., HGRN2, 2024, arXiv 2404.07904",
        "k = 1 - alpha",
    ),
    Model(
        "lightnet",
        "LightNet",
        FIXED,
        _evidence("key", key="complement"),
        "Qin et al., You Only Scan Once (LightNet), 2024, arXiv 2405.21022",
        "k = exp(x - z) and g = z_prev - z with z a running logsumexp, hence k = 1 - alpha: HGRN2's recurrence",
    ),
    Model(
        "rodimus",
        "Rodimus",
        FIXED,
        _evidence("key", key="tempered", maps=("l2",)),
        "He et al., Rodimus*, 2024, arXiv 2410.06577",
        "the key is scaled by (-g / temperature) ** temperature",
    ),
    Model(
        "rwkv6",
        "RWKV-6",
        FIXED,
        _evidence("key", read="before", bonus=True, scale=1.0),
        "Peng et al., Eagle and Finch, 2024, arXiv 2404.05892",
    ),
)

_DELTA = (
    Model(
        "deltanet",
        "DeltaNet",
        DELTA,
        _delta("none", maps=("l2",)),
        "Schlag et al., 2021, arXiv 2102.11174; Yang et al., 2024, arXiv 2406.06484",
    ),
    Model(
        "gated_deltanet",
        "Gated DeltaNet",
        DELTA,
        _delta("head", maps=("l2",)),
        "Yang et al., Gated Delta Networks, 2024, arXiv 2412.06464",
    ),
    Model("kda", "KDA", DELTA, _delta("key", maps=("l2",)), "Kimi Team, Kimi Linear, 2025, arXiv 2510.26692"),
    Model(
        "gated_deltanet2",
        "Gated DeltaNet-2",
        DELTA,
        Triple(
            Architecture(forgetting="key", value="observation", write_gate=True, maps=("l2",)),
            Posterior(anchor="predicted", anchor_weight="key"),
        ),
        "Gated DeltaNet-2, 2026, arXiv 2605.22791",
        "erase weighs the anchor per key channel, write the value per value channel",
    ),
    Model(
        "comba",
        "Comba",
        DELTA,
        _delta("head", "previous", observations=(Observation(read="p"),), maps=("l2",)),
        "Hu et al., Comba, 2025, arXiv 2506.02475",
        "reads the memory before forgetting, as its kernels do",
    ),
    Model(
        "comba_decayed",
        "Comba (decayed read)",
        DELTA,
        _delta("head", observations=(Observation(read="p"),), maps=("l2",)),
        "Hu et al., Comba, 2025, arXiv 2506.02475",
        "reads the memory after forgetting, as its recurrent reference does",
    ),
    Model(
        "gated_deltaproduct",
        "Gated DeltaProduct",
        DELTA,
        _delta("head", repeats=2, scale=1.0, maps=("l2",)),
        "Siems et al., DeltaProduct, 2025, arXiv 2502.10297",
        "two observations per token; replace(architecture, repeats=n) for n",
    ),
    Model(
        "rwkv7",
        "RWKV-7 / DPLR",
        DELTA,
        _delta(
            "key",
            ("previous", "prior"),
            precision="one",
            observations=(Observation("-b", "a", target=False), Observation()),
            scale=1.0,
        ),
        "Peng et al., RWKV-7 Goose, 2025, arXiv 2503.14456",
        "an erasure read by a and written along -b, then an additive write",
    ),
    Model(
        "preconditioned_gdn",
        "Preconditioned GDN",
        DELTA,
        Triple(
            Architecture(forgetting="head", value="observation", precision="head", importance="head", maps=("l2",)),
            Posterior(anchor="predicted"),
            Prior(adaptive=Squash()),
        ),
        "Preconditioned DeltaNet, 2026, arXiv 2604.21100",
        "the squash is not Bayesian: it is a prior precision set from the keys' second moment",
    ),
    Model(
        "preconditioned_kda",
        "Preconditioned KDA",
        DELTA,
        Triple(
            Architecture(forgetting="key", value="observation", precision="head", importance="head", maps=("l2",)),
            Posterior(anchor="predicted"),
            Prior(adaptive=Squash()),
        ),
        "Preconditioned DeltaNet, 2026, arXiv 2604.21100",
        "as Preconditioned GDN",
    ),
)

_SOLVE = (
    Model(
        "longhorn",
        "Longhorn",
        SOLVE,
        _exact("none", Posterior(curvature="full", projection="reset"), Prior()),
        "Liu et al., Longhorn, 2024, arXiv 2407.14207",
        "the closed form of its objective with beta per head; its kernel takes beta per value channel and the diagonal of k k^T",
    ),
    Model(
        "mesanet",
        "MesaNet",
        SOLVE,
        _exact("head", Posterior(curvature="full"), Prior(precision="key"), scale=1.0, maps=("l2",)),
        "von Oswald et al., MesaNet, 2025, arXiv 2506.05233",
    ),
    Model(
        "gated_kalmanet",
        "Gated KalmaNet",
        SOLVE,
        _exact("head", Posterior(curvature="full"), Prior(adaptive=Ridge()), mix=True, maps=("l2",)),
        "Gated KalmaNet, 2025, arXiv 2511.21016",
        "its code scales k and v by the gate: beta here is that gate squared",
    ),
)

_KALMAN = (
    Model(
        "kla",
        "KLA",
        KALMAN,
        Triple(
            Architecture(forgetting="entry", value="observation", precision="value", scale=1.0, maps=("l2",)),
            Posterior(curvature="diagonal"),
            Prior(dynamics="diffusion", noise="entry"),
        ),
        "Kalman Linear Attention, 2026, arXiv 2602.10743",
        "a and the noise are constants per (key, value) entry",
    ),
    Model(
        "kdn",
        "KDN",
        KALMAN,
        _exact(
            "key",
            Posterior(curvature="full", projection="diagonal", gain=True),
            Prior(precision="head", dynamics="diffusion", noise="key"),
            maps=("l2",),
        ),
        "Kalman Delta Networks, 2026, arXiv 2609.07816",
        "beta = 1 / r; the gain on the information is K in the released code, 1 is the exact projection",
    ),
    Model(
        "mean_field_delta",
        "mean-field delta",
        KALMAN,
        _exact("head", Posterior(curvature="full", projection="diagonal"), Prior(precision="head"), maps=("l2",)),
        "this project: true mean-field variational Bayes of the delta rule's loss",
    ),
)

_PALIMPSA = "Bonnet et al., Palimpsa, 2026, arXiv 2602.09075"
_SOURCES = {m.name: m.triple for m in (*_FIXED, *_DELTA)}
_META = (
    Model("palimpsa", "Palimpsa", META, _meta(_evidence("head")), _PALIMPSA, "v is the evidence r, importance is b"),
    Model(
        "metamamba2",
        "MetaMamba2",
        META,
        _SOURCES["mamba2"].metaplastic(),
        _PALIMPSA,
        "Mamba-2's architecture with an importance; prior precision 1",
    ),
    Model(
        "palimpsa_key",
        "Palimpsa-key",
        META,
        _meta(_evidence("head"), "head"),
        f"this project; after {_PALIMPSA}",
        "the importance is shared by the value channels: matmul speed",
    ),
    Model(
        "meta_linear_attention",
        "meta-linear attention",
        META,
        _meta(_SOURCES["linear_attention"]),
        f"this project; after {_PALIMPSA}",
    ),
    Model("meta_retnet", "meta-RetNet", META, _meta(_SOURCES["retnet"]), f"this project; after {_PALIMPSA}"),
    Model("meta_gla", "meta-GLA", META, _meta(_SOURCES["gla"]), f"this project; after {_PALIMPSA}"),
    Model("meta_hgrn2", "meta-HGRN2", META, _meta(_SOURCES["hgrn2"]), f"this project; after {_PALIMPSA}"),
    Model("meta_deltanet", "meta-DeltaNet", META, _meta(_SOURCES["deltanet"]), f"this project; after {_PALIMPSA}"),
    Model(
        "meta_gdn",
        "meta-GDN",
        META,
        _meta(_SOURCES["gated_deltanet"]),
        f"this project; after {_PALIMPSA}",
        "write strength beta and importance are two gates",
    ),
    Model("meta_kda", "meta-KDA", META, _meta(_SOURCES["kda"]), f"this project; after {_PALIMPSA}"),
)

ZOO: dict[str, Model] = {m.name: m for m in (*_FIXED, *_DELTA, *_SOLVE, *_KALMAN, *_META)}

OUTSIDE: dict[str, str] = {
    "softmax attention": "keeps every key and value: its memory is not a state of fixed size",
    "log-linear attention": "a hierarchy of memories, one for each power of two, weighed by the query",
    "GSA, ABC": "two memories read one after the other with a softmax between: two passes, not one linear filter",
    "TTT, Titans": "a momentum or a non-linear memory: the loss is not quadratic in the state",
    "mixture of memories": "a router chooses among several memories: one filter each, but the choice is outside",
    "Mamba-3": "writes a trapezoid of the present and the previous token: a filter on pairs of tokens, with rotated keys",
    "HGRN": "its state is a vector, with no key to bind a value to",
}


def get(name: str) -> Model:
    """The model of that name. Raises UnifyError that lists near names."""
    if name in ZOO:
        return ZOO[name]
    from difflib import get_close_matches

    near = get_close_matches(name.lower().replace("-", "_"), ZOO, n=3, cutoff=0.4)
    raise UnifyError(
        f"model {name!r}",
        "the zoo has no such model",
        f"try {', '.join(near) or 'one of'}{'' if near else ' ' + ', '.join(ZOO)}",
    )


def name_of(triple: Triple) -> str | None:
    """The first model in the zoo that is this triple, or None."""
    return next((m.name for m in ZOO.values() if m.triple == triple), None)
