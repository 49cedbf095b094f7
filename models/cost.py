"""What a configuration costs: parameters, state and flops per token, so that models can be compared at equal ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from unify.models import zoo
from unify.models.configuration import UnifyConfig
from unify.models.layer import Layer
from unify.models.modeling import Block, UnifyForCausalLM
from unify.symbols import K, V


def budget(config: UnifyConfig, context: int | None = None) -> dict[str, Any]:
    """Parameters, state and flops of a configuration, by kind of layer. Nothing is allocated.

    context: tokens that an attention layer has seen; None is max_position_embeddings. A memory does not depend on it.
    state: numbers that a sequence carries from token to token, a memory's (convolution aside) or keys and values.
    flops: of one token forward, the last of the context: 2 a weight of every matrix, and what the recurrence or the
        attention itself takes; norms and other elementwise work are left out.
    Returns {"rows": [{"layer", "layers", "parameters", "state", "flops"}, each of one layer], "parameters",
    "state", "bytes" (of the state: memories in float32, keys and values in bfloat16), "flops", "context"}.
    """
    context = context or config.max_position_embeddings
    with torch.device("meta"):
        model = UnifyForCausalLM(config)
    blocks = [(describe(block, config), *_costs(block, config, context)) for block in model.model.layers]
    outside = model.num_parameters() - sum(x[1] for x in blocks)
    head = (f"embedding and head, {config.vocab_size} tokens", outside, 0, 0, 2 * model.lm_head.weight.numel())
    rows = [(*x, n) for x, n in Counter([*blocks, head]).items()]
    total = [sum(x[at] * x[-1] for x in rows) for at in range(1, 5)]
    names = ("layer", "parameters", "state", "bytes", "flops", "layers")
    return {
        "rows": [dict(zip(names, x, strict=True)) for x in rows],
        **dict(zip(names[1:5], total, strict=True)),
        "context": context,
    }


def describe(block: Block, config: UnifyConfig) -> str:
    """A block in words."""
    mixer = block.mixer
    if isinstance(mixer, Layer):
        heads = (
            f"{mixer.num_v_heads} heads"
            if mixer.num_v_heads == mixer.num_heads
            else f"{mixer.num_heads}/{mixer.num_v_heads} heads"
        )
        text = f"{zoo.name_of(mixer.triple) or 'a triple'}, {heads} of {mixer.head_dim} x {mixer.value_dim}"
    else:
        seen = "all" if block.window is None else f"the last {block.window}"
        text = f"attention to {seen}, {config.num_attention_heads} heads of {config.head_dim}"
    return text if block.mlp is None else f"{text}, SwiGLU {config.intermediate_size}"


def _costs(block: Block, config: UnifyConfig, context: int) -> tuple[int, int, int, int]:
    """Parameters, state, its bytes, flops."""
    mixer = block.mixer
    flops = sum(2 * x.weight.numel() for x in block.modules() if isinstance(x, nn.Linear))
    if isinstance(mixer, Layer):
        cost = mixer.op.recurrence.cost()
        state, own = (
            mixer.num_v_heads * int(cost[x].subs({K: mixer.head_dim, V: mixer.value_dim})) for x in ("state", "flops")
        )
        own += 0 if mixer.conv_weight is None else 2 * mixer.conv_weight.numel()
        size = 4 * state
    else:
        seen = context if block.window is None else min(context, block.window)
        state = 2 * seen * config.num_key_value_heads * config.head_dim
        own, size = 4 * seen * config.num_attention_heads * config.head_dim, 2 * state
    return sum(x.numel() for x in block.parameters()), state, size, flops + own
