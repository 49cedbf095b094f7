"""What the published layers of models choose that their triples do not say: options of `unify.models.Layer`.

Layer(get("palimpsa").triple, 256, num_heads=4, head_dim=64, **PUBLISHED["palimpsa"])
"""

from __future__ import annotations

from typing import Any

from unify.models.zoo import ZOO

_MAMBA = {"strength": "dt", "norm": "inner", "norm_eps": 1e-5, "skip": True, "conv_bias": True}
_PALIMPSA = {"qk_norm": "l2", "strength": "gate", "skip": True}

PUBLISHED: dict[str, dict[str, Any]] = {
    "mamba2": _MAMBA,
    "metamamba2": _MAMBA,
    "palimpsa": _PALIMPSA,
    "palimpsa_key": _PALIMPSA,
    "gla": {"conv_size": 0},
    "retnet": {"conv_size": 0},
    "hgrn2": {"conv_size": 0, "gate": None},
    "kda": {"gate": "sigmoid"},
    "preconditioned_kda": {"gate": "sigmoid"},
    "comba": {"gate": "sigmoid"},
}
PUBLISHED |= {
    f"meta_{name}": x for name, x in PUBLISHED.items() if f"meta_{name}" in ZOO
}  # a metaplastic one's: its source's
