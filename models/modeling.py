"""UnifyForCausalLM: a causal language model of any layers, for transformers. Needs transformers.

    model = UnifyForCausalLM(UnifyConfig(layers=["gated_deltanet", "sliding_attention"], hidden_size=256))
    model.generate(input_ids, attention_mask=mask)     # batched, left-padded; greedy, sampling, beams
    model.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)

Attention, rotary positions, masks and caches are transformers' own; what is ours is the memory and how a cache holds it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionLayer,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from unify.errors import UnifyError
from unify.models.configuration import MEMORY, UnifyConfig
from unify.models.layer import Layer, LayerState, Packing, spare_from_decay


def padding(attention_mask: Any, inputs_embeds: Tensor, **_: Any) -> Packing | None:
    """Where the real tokens of this call are, one at a time or many; None where all are."""
    if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
        return None
    return Packing.of_mask(attention_mask[:, -inputs_embeds.shape[1] :])


MASKS = {
    MEMORY: padding,
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class Memory(LinearAttentionLayer, CacheLayerMixin):
    """A layer's state in a cache of transformers': convolution and op's states, each batch first, and how many tokens it saw.

    Beam search, offloading and resetting are inherited. A fresh or reset one starts as the op does, whatever that is.
    """

    _layer_type = MEMORY
    is_compileable = False
    is_croppable = False

    def __init__(self, number_of_states: int = 4, **kwargs: Any):
        super().__init__(number_of_states=number_of_states)
        self.seen, self.kind = 0, tuple

    def load(self) -> LayerState | None:
        """The state, or None before the first token."""
        if not self.has_previous_state[0]:
            return None
        memory = [x for x in self.recurrent_states.values() if x is not None]
        conv = self.conv_states[0].mT
        return LayerState(conv, self.kind(*memory), conv.new_full((len(conv),), self.seen, dtype=torch.int64))

    def store(self, state: LayerState, tokens: int) -> None:
        """Keep a state after so many more tokens."""
        self.kind, self.seen = type(state.memory), self.seen + tokens
        self.update_conv_state(state.conv.mT)
        for n, x in enumerate(state.memory):
            self.update_recurrent_state(x, n)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times, one after the other."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({n: change(x) for n, x in states.items() if x is not None})

    def reset(self) -> None:
        """Before the first token again."""
        super().reset()
        self.seen = 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over all tokens seen."""
        return self.seen + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A memory keeps no keys and values."""
        raise UnifyError("keys and values", "a memory keeps a state instead", "use store() and load()")


STATIC_LAYER_TYPE_MAPPING[MEMORY] = Memory  # its size is fixed: one class serves dynamic and static caches


class Block(GradientCheckpointingLayer):
    """x + mixer(norm x), then, where there is one, x + mlp(norm x); the mixer is a memory or attention."""

    def __init__(self, config: UnifyConfig, index: int):
        super().__init__()
        self.index, memory = index, config.memory(index)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if memory is None:
            self.mixer = LlamaAttention(config, index)
            self.window = config.sliding_window if config.layer_types[index] == "sliding_attention" else None
        else:
            triple, options = memory
            self.mixer = Layer(triple, config.hidden_size, **options)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.intermediate_size else None
        self.mlp = LlamaMLP(config) if config.intermediate_size else None

    def forward(
        self,
        hidden_states: Tensor,
        mask: Any = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The residual stream [B, T, hidden_size] after this block."""
        x = self.norm(hidden_states)
        if isinstance(self.mixer, Layer):
            y = self._remember(x, mask, position_ids, past_key_values)
        else:
            kwargs |= {"position_ids": position_ids, "sliding_window": self.window}  # asked for by flash attention
            y, _ = self.mixer(x, position_embeddings, mask, past_key_values, **kwargs)
        hidden_states = hidden_states + y
        return hidden_states if self.mlp is None else hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def _remember(self, x: Tensor, mask: Packing | None, position_ids: Tensor, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.mixer(x, attention_mask=mask, position_ids=position_ids)
        memory = cache.layers[self.index]
        kept = {"state": memory.load(), "output_state": True}
        y, state = self.mixer(x, attention_mask=mask, position_ids=position_ids, **kept)
        memory.store(state, x.shape[1])
        return y


class UnifyPreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes below."""

    config_class = UnifyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("A_log", "dt_bias", "raw", "importance_scale")
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # a state cannot be taken back, so there is no assisted generation
    _can_record_outputs = {"hidden_states": Block, "attentions": LlamaAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """As transformers', which makes new parameters: flags of theirs are set again."""
        loaded = super().from_pretrained(*args, **kwargs)
        spare_from_decay(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers starts projections and norms; a layer's other parameters start as the layer says, unless loaded."""
        super()._init_weights(module)
        if hasattr(module, "start"):
            for name, value in module.start().items():
                init.copy_(getattr(module, name), value)


class UnifyModel(UnifyPreTrainedModel):
    """Embeddings and blocks: tokens -> hidden states."""

    def __init__(self, config: UnifyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attends = set(config.layer_types) != {MEMORY}
        self.rotary_emb = LlamaRotaryEmbedding(config) if attends else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden_size], and the cache.

        attention_mask: [B, past + T], 1 where a token is real. cu_seqlens: offsets [N + 1] of packed sequences, with B = 1;
        or position_ids that start again. Packed sequences neither start from a cache nor fill one. cache: the name that
        transformers 5.24 has for past_key_values.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise UnifyError("input_ids and inputs_embeds", "a forward has one of them", "pass one")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packing = _packing(x, attention_mask, position_ids, past_key_values, cu_seqlens)
        if packing is None:
            past_key_values = (
                DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values
            )
        if position_ids is None or cu_seqlens is not None:
            position_ids = _positions(x, attention_mask, past_key_values, packing)
        position_ids = position_ids.expand(x.shape[:2])
        masks = self._masks(x, attention_mask, position_ids, past_key_values, packing)
        rotation = None if self.rotary_emb is None else self.rotary_emb(x, position_ids)
        shared = {"position_ids": position_ids, "position_embeddings": rotation, "past_key_values": past_key_values}
        for block, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = block(x, mask=masks[kind], **shared, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _masks(
        self, x: Tensor, attention_mask: Any, position_ids: Tensor, cache: Cache | None, packing: Packing | None
    ):
        """What each kind of layer is told about the batch; made once."""
        if isinstance(attention_mask, dict):  # made ahead, for a static cache
            made = dict(attention_mask)
        else:
            shown = {"config": self.config, "inputs_embeds": x, "attention_mask": attention_mask}
            shown["position_ids"] = position_ids
            kept = {MEMORY: cache}
            made = {
                kind: MASKS[kind](**shown, past_key_values=kept.get(kind, _attending(cache)))
                for kind in dict.fromkeys(self.config.layer_types)
            }
        return made if packing is None else {**made, MEMORY: packing}


def _attending(cache: Cache | None) -> Cache | None:
    """A cache as attention's masks should see it: their size is that of a layer that keeps keys, never a memory's."""
    if cache is None:
        return None
    seen = copy.copy(cache)
    seen.layers = [layer for layer in cache.layers if not isinstance(layer, Memory)]
    return seen


def _packing(
    x: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None
):
    """The sequences of a row that holds several, or None."""
    if cu_seqlens is not None:
        if x.shape[0] != 1 or cache is not None or attention_mask is not None:
            given = f"cu_seqlens with B={x.shape[0]}, a cache or a mask"
            raise UnifyError(
                given, "packed sequences lie in one row, whole and without padding", "pass cu_seqlens alone"
            )
        return Packing(tuple(x.shape[:2]), cu_seqlens)
    if position_ids is None or attention_mask is not None or cache is not None or position_ids.shape[-1] == 1:
        return None
    return Packing.of_positions(position_ids.expand(x.shape[:2]))


def _positions(x: Tensor, attention_mask: Any, cache: Cache | None, packing: Packing | None) -> Tensor:
    """Each token's place in its own sequence, padding left out."""
    if packing is not None:
        return packing.positions()
    if torch.is_tensor(attention_mask) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(x.shape[1], device=x.device) + seen)[None].expand(x.shape[:2])


def _targets(labels: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Labels without the first token of any packed sequence."""
    if cu_seqlens is not None:
        return labels.index_fill(1, cu_seqlens[1:-1].to(labels.device), -100)
    if position_ids is None:
        return labels
    first = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return labels.masked_fill(first, -100)


def _kept(hidden: Tensor, which: int | Tensor) -> Tensor:
    """Hidden states [B, T, D] where logits are wanted: the last so many, 0 for all; places [n] or [B, n]; or a mask [B, T].

    As transformers' own function, which there is since 5.23 only; without it a model trains on 5.17 too.
    """
    if isinstance(which, int):
        return hidden[:, -which:]
    if which.ndim == 2:
        return hidden[which] if which.dtype == torch.bool else hidden.take_along_dim(which[..., None], 1)
    return hidden[:, which]


class UnifyForCausalLM(UnifyPreTrainedModel, GenerationMixin):
    """A `UnifyModel` with a head on the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: UnifyConfig):
        super().__init__(config)
        self.model = UnifyModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], the loss against labels [B, T] and the cache. See `UnifyModel`.

        labels: the tokens themselves; -100 is left out, and the first of each packed sequence, which follows from no other.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        past_key_values = cache if past_key_values is None else past_key_values
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "cu_seqlens": cu_seqlens}
        out = self.model(**inputs, use_cache=use_cache, **kwargs)
        logits = self.lm_head(_kept(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            labels = _targets(labels, cu_seqlens, None if attention_mask is not None else position_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


AutoModel.register(UnifyConfig, UnifyModel)
AutoModelForCausalLM.register(UnifyConfig, UnifyForCausalLM)
