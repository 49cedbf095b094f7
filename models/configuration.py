"""UnifyConfig: a language model of any layers, as JSON. Needs transformers.

UnifyConfig(layers="palimpsa")                                             # a name of the zoo, in every layer
UnifyConfig(layers=["gated_deltanet", "sliding_attention"])                # a pattern, repeated: a hybrid
UnifyConfig(layers=["full_attention"])                                     # a Transformer
UnifyConfig(layers=[triple.record(), {"memory": "palimpsa", "rank": 8}])   # a triple of your own, options of one layer
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from unify.errors import UnifyError
from unify.models import zoo
from unify.models.choices import PUBLISHED
from unify.models.layer import Layer
from unify.triple import Triple

ATTENTION = ("full_attention", "sliding_attention")
MEMORY = "unify_memory"
"""The layer type under which transformers' caches know a memory (`modeling.Memory`)."""

OPTIONS = tuple(inspect.signature(Layer).parameters)[2:]
"""Options of a layer: everything but its triple and hidden_size."""


@no_type_check  # `strict` checks the fields, and a configuration takes what it does not declare
@strict
class UnifyConfig(PreTrainedConfig):
    """Configuration of `UnifyForCausalLM`.

    layers: a pattern, repeated over num_hidden_layers. An entry is a name of the zoo, "full_attention",
        "sliding_attention", a `Triple.record()`, or {"memory": name or record, **options of `unify.models.Layer`}.
    layer: options of every `unify.models.Layer`: num_heads, head_dim, expand_v, ...; the published layer's (`choices.PUBLISHED`)
        come before it and an entry's own after it.
    intermediate_size: of the SwiGLU after every layer; None is 8/3 hidden_size, up to a multiple of 256; 0 is none.
    num_attention_heads, num_key_value_heads, head_dim, sliding_window, rope_parameters: of the attention layers.
    Raises UnifyError for an entry or an option that there is not.
    """

    model_type = "unify"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers adds a list to it

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    layers: Any = "gated_deltanet"
    layer: dict | None = None
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = 2048
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if isinstance(self.layers, str | Mapping | Triple):
            self.layers = [self.layers]
        if not self.layers:
            raise UnifyError(f"layers={self.layers!r}", "a model has layers", "name a model of the zoo, or attention")
        self.layers = [_plain(entry) for entry in self.layers]
        heads = (self.layer or {}).get("num_heads", 4)
        if heads < 1:
            raise UnifyError(f"layer={self.layer!r}", "a layer has heads", "use num_heads of 1 or more")
        self.layer = {"num_heads": heads, "head_dim": self.hidden_size // heads, **(self.layer or {})}
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 256)) * 256
        self.num_attention_heads = self.num_attention_heads or max(self.hidden_size // 64, 1)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if "sliding_attention" not in self.layer_types:
            self.sliding_window = None
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        """Refuse entries, options and sizes that no layer takes."""
        for entry in self.layers:
            if entry in ATTENTION:
                continue
            unknown = {*self.layer, *memory_of(entry)[2]} - set(OPTIONS)
            if unknown:
                raise UnifyError(
                    f"layer option {min(unknown)!r}", "a layer has no such option", f"use {', '.join(OPTIONS)}"
                )
        if set(self.layer_types) == {MEMORY}:
            return
        if self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            given = f"{self.num_attention_heads} heads of {self.head_dim} with {self.num_key_value_heads} of keys and values"
            raise UnifyError(
                given, "rotary positions turn pairs of channels, and groups are equal", "choose other sizes"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            given = f"sliding_window={self.sliding_window!r}"
            raise UnifyError(given, "a layer of sliding_attention sees that many tokens", "use a number above 0")

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, for transformers' caches and masks."""
        kinds = [entry if entry in ATTENTION else MEMORY for entry in self.layers]
        return [kinds[n % len(kinds)] for n in range(self.num_hidden_layers)]

    def validate_layer_type(self):
        """transformers' check, which knows no layer types but its own; ours are made, not given."""

    def memory(self, index: int) -> tuple[Triple, dict[str, Any]] | None:
        """(triple, options of `unify.models.Layer`) of one layer, or None where it is attention."""
        entry = self.layers[index % len(self.layers)]
        if entry in ATTENTION:
            return None
        triple, published, own = memory_of(entry)
        return triple, {"norm_eps": self.rms_norm_eps, **published, **self.layer, **own}


def _plain(entry: Any) -> Any:
    """An entry as JSON holds it."""
    if isinstance(entry, Triple):
        return entry.record()
    if isinstance(entry, Mapping) and isinstance(entry.get("memory"), Triple):
        return {**entry, "memory": entry["memory"].record()}
    return entry


def memory_of(entry: Any) -> tuple[Triple, dict[str, Any], dict[str, Any]]:
    """(triple, options of the published layer, options of its own) of an entry of `layers`. Raises UnifyError."""
    own = dict(entry) if isinstance(entry, Mapping) and "architecture" not in entry else {"memory": entry}
    memory = own.pop("memory", None)
    if isinstance(memory, str):
        return zoo.get(memory).triple, PUBLISHED.get(memory, {}), own
    if isinstance(memory, Mapping):
        return Triple.from_record(memory), {}, own
    raise UnifyError(
        f"layers entry {entry!r}",
        "a layer is a memory or attention",
        f"use a name of the zoo, {', '.join(ATTENTION)}, or a Triple.record(), or {{'memory': a name or a record, ...}}",
    )


# --- presets ----------------------------------------------------------------------------------------------------------


def _authors(memory: str, hidden_size: int, depth: int, expand_v: int, **more: Any) -> dict[str, Any]:
    """16 heads and low-rank branches as wide as a head; the prior precision is 1 and not trained."""
    width = hidden_size // 16
    layer = {"num_heads": 16, "head_dim": width, "expand_v": expand_v, "rank": width, "learn_prior": False}
    sizes = {"vocab_size": 32000, "hidden_size": hidden_size, "num_hidden_layers": depth, "tie_word_embeddings": True}
    return {**sizes, "layers": [memory], "layer": layer, **more}


_BARE = {"intermediate_size": 0, "rms_norm_eps": 1e-5, "pad_token_id": 0}
PRESETS = {
    "palimpsa-170m": _authors("palimpsa", 768, 19, 1),
    "palimpsa-760m": _authors("palimpsa", 1536, 19, 2),
    "metamamba2-170m": _authors("metamamba2", 768, 30, 2, **_BARE),
    "metamamba2-760m": _authors("metamamba2", 1536, 38, 2, **_BARE),
}
"""The language models of Bonnet et al., Palimpsa, 2026, arXiv 2602.09075, at both of their sizes."""


def preset(name: str, **changes: Any) -> UnifyConfig:
    """The configuration of that name, with changes: preset("palimpsa-170m", vocab_size=8192). Raises UnifyError."""
    if name not in PRESETS:
        raise UnifyError(
            f"configuration {name!r}", "there is no such preset", f"use one of {', '.join(PRESETS)}, or a config.json"
        )
    return UnifyConfig(**{**PRESETS[name], **changes})


def read(source: str) -> UnifyConfig:
    """The preset of that name, or what a config.json (or the folder that holds it) says. Raises UnifyError."""
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if source in PRESETS or not path.exists():
        return preset(source)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnifyError(source, f"it is not JSON ({error})", "name a config.json of a UnifyConfig") from None
    if not isinstance(record, dict) or record.get("model_type", UnifyConfig.model_type) != UnifyConfig.model_type:
        raise UnifyError(source, "it is not the configuration of a UnifyForCausalLM", 'use model_type "unify"')
    return UnifyConfig.from_dict(record)


AutoConfig.register(UnifyConfig.model_type, UnifyConfig)
