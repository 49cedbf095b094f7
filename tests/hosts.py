"""Small random models of other libraries, for the tests of conversion."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip

# name -> model type, what its config needs beside SMALL
HOSTS = {
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "mamba2, one group, limits": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "use_bias": True, "tie_word_embeddings": True},
    ),
    "bamba": ("bamba", ATTENTION | MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", ATTENTION | MAMBA | {"mamba_d_ssm": 64, "head_dim": 8, "ssm_in_multiplier": 0.7}),
    "falcon_h1, normed": ("falcon_h1", ATTENTION | MAMBA | {"mamba_d_ssm": 64, "head_dim": 8, "mamba_rms_norm": True}),
    "granitemoehybrid": (
        "granitemoehybrid",
        ATTENTION | MOE | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "nemotron_h": (
        "nemotron_h",
        ATTENTION | MOE | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
                           "hybrid_override_pattern": "M*", "head_dim": 8},
    ),
    "zamba2": (
        "zamba2",
        ATTENTION | {"mamba_ngroups": 2, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_d_state": 8, "mamba_expand": 2,
                     "chunk_size": 8, "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1,
                     "adapter_rank": 4, "num_key_value_heads": 4},
    ),
    "qwen3_next": ("qwen3_next", ATTENTION | MOE | LINEAR | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", ATTENTION | LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", ATTENTION | MOE | LINEAR | {"shared_expert_intermediate_size": 16}),
    "olmo_hybrid": ("olmo_hybrid", ATTENTION | LINEAR | {"linear_num_key_heads": 4}),
    "kimi_linear": (
        "kimi_linear",
        ATTENTION | MOE | {"linear_num_heads": 4, "linear_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                           "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                           "num_key_value_heads": 4},
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        ATTENTION | MOE | {"linear_num_heads": 4, "linear_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                           "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                           "num_key_value_heads": 4},
    ),
    "minimax": (
        "minimax",
        ATTENTION | MOE | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "block_size": 8},
    ),
}  # fmt: skip


def host(name, seed=0, **changes):
    """A small random host in float32, its parameters far enough from their initial values to tell every one apart."""
    kind, needs = HOSTS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | needs | changes))).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model
