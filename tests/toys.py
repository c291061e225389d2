"""Toy models of every causal-LM type that transformers has, with all that matters in them.

Windows and indexers are shorter than the text, layers differ where a type's layers can, attention
is far from flat, and gains, biases and buffers are away from where they start.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEPTH = 8
TOKENS = 40  # more than every window and pattern of the toy models
MOST_PARAMETERS = 30_000_000

# Sizes, by whatever name a config class knows them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_blocks",
        ],
        DEPTH,
    ),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim"], 32),
    **dict.fromkeys(
        [
            "intermediate_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "dff",
        ],
        48,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "mamba_n_heads",
            "mamba_num_heads",
            "mamba_d_conv",
            "linear_num_value_heads",
            "rotary_dim",
        ],
        4,
    ),
    **dict.fromkeys(
        [
            "num_key_value_heads",
            "num_experts_per_tok",
            "moe_k",
            "moe_topk",
            "mamba_expand",
            "linear_num_key_heads",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "head_dim",
            "d_kv",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "mamba_d_state",
            "ssm_state_size",
            "state_size",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ],
        8,
    ),
    **dict.fromkeys(
        [
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "q_lora_rank",
            "kv_lora_rank",
            "mamba_d_head",
            "mamba_head_dim",
            "sliding_window",
            "attention_window",
        ],
        16,
    ),
    **dict.fromkeys(
        ["n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups", "eos_token_id"],
        1,
    ),
    **dict.fromkeys(
        ["vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 128
    ),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What some types need besides, or what makes their rules matter; None leaves a size out.
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_DSA = {**_LATENT, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 16}
_SF = ["sliding_attention", "full_attention"]
_WIN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
_UNEVEN = ["sliding_attention", *_SF, *_SF, "sliding_attention", *_SF]
_LIN = ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2
_MLP = ["dense", "sparse", "sparse", "dense", "sparse", "sparse", "sparse", "sparse"]
_F, _S = "full", "shared"

_OWN: dict[str, dict[str, Any]] = {
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "falcon": {"head_dim": None},
    "minicpm3": _LATENT,
    "prophetnet": {"num_hidden_layers": None},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlnet": {"max_position_embeddings": None},
    "axk1": {**_LATENT, "mlp_layer_types": _MLP},
    "axk2": {**_DSA, "mlp_layer_types": _MLP, "gated_norm_rank": 4},
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "num_mtp_layers": 0,
        "layer_types": _LIN,
        "mlp_layer_types": _MLP,
    },
    "beam": {"layer_types": [*_WIN[:7], "full_attention"], "mlp_layer_types": _MLP},
    "codegen": {},
    "cohere_compass_text": {
        "layer_types": _WIN,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 3},
    "deepseek_v32": {**_DSA, "mlp_layer_types": _MLP},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 16,
        "index_topk": 8,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "sliding_window": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "shared_experts_intermediate_size": 16,
        "mlp_layer_types": _MLP,
        "layer_types": ["indexed_attention", "sliding_attention"] * 4,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm_moe_dsa": {
        **_DSA,
        "mlp_layer_types": _MLP,
        "indexer_types": [_F, _F, _S, _S, _F, _S, _S, _F],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3], [["local"], 2]], "window_size": 16},
    "gptj": {},
    "hrm_text": {
        "num_hidden_layers": DEPTH * 2 * 3,
        "num_layers_per_stack": DEPTH,
        "H_cycles": 2,
        "L_cycles": 2,
        "prefix_lm": False,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
        "num_dense_layers": 3,
    },
    "longcat_flash": {
        **_LATENT,
        "num_layers": DEPTH,
        "num_hidden_layers": None,
        "head_dim": 8,
        "qk_head_dim": None,
        "zero_expert_num": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {
        "layers_block_type": [
            "mamba",
            "moe",
            "mamba",
            "attention",
            "mlp",
            "mamba",
            "attention",
            "moe",
        ],
        "num_hidden_layers": None,
        "moe_shared_expert_intermediate_size": 16,
        "chunk_size": 16,
        "sliding_window": None,
    },
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "ple_layer_ids": [2, 6],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "layer_types": [
            "linear_attention",
            "linear_attention",
            "indexed_attention",
            "linear_attention",
        ]
        * 2,
    },
    "reformer": {
        "num_hidden_layers": None,
        "attn_layers": ["local", "lsh"] * 4,
        "attention_head_size": 8,
        "hidden_size": 32,
        "feed_forward_size": 48,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (8, 24),
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "xlstm": {
        "num_hidden_layers": DEPTH,
        "num_blocks": DEPTH,
        "hidden_size": 128,
        "embedding_dim": None,
        "chunk_size": 16,
    },
    "xmod": {"languages": ("en_XX", "de_DE"), "default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        "layers_block_type": [
            "mamba",
            "mamba",
            "hybrid",
            "mamba",
            "hybrid",
            "mamba",
            "mamba",
            "hybrid",
        ],
        "attention_hidden_size": None,
        "attention_head_dim": None,
        "head_dim": None,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": [
            "mamba",
            "hybrid",
            "mamba",
            "hybrid",
            "mamba",
            "hybrid",
            "mamba",
            "hybrid",
        ],
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "head_dim": None,
        "num_key_value_heads": None,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "use_mem_rope": True,
    },
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "afmoe": {"num_dense_layers": 2, "global_attn_every_n_layers": 3, "num_shared_experts": 1},
    "bamba": {"attn_layer_indices": [1, 4], "mamba_chunk_size": 16},
    "cohere2": {"layer_types": _WIN},
    "cohere2_moe": {
        "layer_types": _WIN,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 48,
    },
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 2},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ]
        * 2,
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "hc_mult": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "doge": {},
    "dots1": {"first_k_dense_replace": 2, "sliding_window": 16, "max_window_layers": 4},
    "ernie4_5_moe": {
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 6,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {"layer_types": _WIN},
    "exaone_moe": {"layer_types": _WIN, "mlp_layer_types": _MLP},
    "flint": {"decoder_sparse_step": 2, "mlp_only_layers": [0, 3]},
    "gemma2": {"layer_types": _SF * 4},
    "gemma3_text": {"layer_types": _WIN},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 128,
        "layer_types": _UNEVEN,
        "intermediate_size": [48] * DEPTH,
        "activation_sparsity_pattern": [0.9] * 3 + [0.0] * 5,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "use_double_wide_mlp": True,
        "layer_types": _UNEVEN,
    },
    "gemma4_unified_text": {
        "num_kv_shared_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": _UNEVEN,
    },
    "glm4_moe": {"first_k_dense_replace": 2},
    "glm4_moe_lite": {**_LATENT, "mlp_layer_types": _MLP},
    "gpt_oss": {"layer_types": _SF * 4},
    "granite_swa": {
        "layer_types": _WIN,
        "layer_rope_theta": [1e4, 1e4, 1e5, 1e4, 2e4, 1e4, 1e6, 1e4],
        "residual_multiplier": 0.5,
    },
    "granitemoe_swa": {
        "layer_types": _WIN,
        "layer_rope_theta": [1e4, 1e4, 1e5, 1e4, 2e4, 1e4, 1e6, 1e4],
        "residual_multiplier": 0.5,
        "shared_intermediate_size": 16,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention", "mamba"] * 2,
        "mamba_chunk_size": 16,
        "shared_intermediate_size": 16,
    },
    "hunyuan_v1_moe": {"moe_topk": [1, 1, 2, 2, 1, 1, 2, 2]},
    "hy_v3": {"mlp_layer_types": _MLP},
    "hy_v4": {
        "indexer_types": [_F, _F, _S, _S, _F, _S, _S, _F],
        "index_topk": 8,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "mlp_layer_types": _MLP,
    },
    "inkling2_text": {
        "n_layers_per_attn_res_block": 4,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"] * 2,
        "rel_extent": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 16,
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"] * 2,
        "mlp_layer_types": _MLP,
        "rel_extent": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 16,
    },
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_LATENT,
        "layer_types": _LIN,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {},
    "laguna": {
        "layer_types": _WIN,
        "mlp_layer_types": _MLP,
        "num_attention_heads_per_layer": [4, 4, 2, 4, 4, 8, 2, 4],
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"] * 2},
    "llama4_text": {
        "moe_layers": [1, 3, 4, 7],
        "no_rope_layers": [1, 1, 1, 0, 1, 0, 1, 0],
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "floor_scale": 8,
    },
    "mellum": {"layer_types": _WIN, "mlp_layer_types": _MLP},
    "mimo_v2_flash": {"layer_types": _WIN, "mlp_layer_types": _MLP},
    "minimax": {
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]
        * 2,
        "block_size": 16,
        "linear_attn_alpha_factor": 1.5,
        "mlp_beta_factor": 0.5,
    },
    "minimax_m3_vl_text": {
        "layer_types": [
            "full_attention",
            "minimax_m3_sparse",
            "minimax_m3_sparse",
            "full_attention",
        ]
        * 2,
        "mlp_layer_types": _MLP,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "rotary_dim": 4,
    },
    "ministral": {"layer_types": _WIN},
    "modernbert-decoder": {},
    "olmo3": {"layer_types": _WIN},
    "olmo_hybrid": {"layer_types": _LIN, "linear_num_value_heads": 4, "linear_num_key_heads": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
    "qwen2_moe": {
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "max_window_layers": 4,
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True},
    "qwen3_next": {"decoder_sparse_step": 2, "mlp_only_layers": [3], "layer_types": _LIN},
    "qwen3_5_text": {"layer_types": _LIN},
    "qwen3_5_moe_text": {"layer_types": _LIN},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 16,
    },
    "rwkv": {"rescale_every": 2},
    "smollm3": {
        "no_rope_layers": [1, 1, 1, 0, 1, 0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 16,
    },
    "vaultgemma": {"layer_types": _SF * 4},
}

# Second forms of a type, by names of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "ernie4_5_moe:interval2": {"moe_layer_interval": 2, "moe_layer_end_index": -1},
    "gemma4_text:moe": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "use_double_wide_mlp": False,
    },
    "gemma4_text:k_eq_v": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 0,
    },
    "gpt2:inverse": {"scale_attn_by_inverse_layer_idx": True},
    "zamba2:one": {"num_mem_blocks": 1},
    "glm_moe_dsa:freq": {"indexer_types": None, "index_topk_freq": 3},
    "hrm_text:once": {"num_hidden_layers": 16, "H_cycles": 1, "L_cycles": 1},
    "doge:moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "llama4_text:step2": {
        "moe_layers": None,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": None,
    },
    "reformer:whole": {"local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64},
}


def config(name: str) -> Any:
    """The config of a toy model.

    Args:
        name: Its type, or the name of a variant: `type:variant`.
    """
    model_type = name.partition(":")[0]
    config_class = CONFIG_MAPPING[model_type]
    settings = known(config_class, _SIZES) | _OWN.get(model_type, {}) | VARIANTS.get(name, {})
    made = config_class(**{key: value for key, value in settings.items() if value is not None})
    if hasattr(made, "is_decoder"):
        made.is_decoder = True
    return made


def known(config_class: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config class knows."""
    probe = config_class()
    aliases = getattr(probe, "attribute_map", {}) or {}
    found = {}
    for key, value in sizes.items():
        own = getattr(config_class, key, None)
        if isinstance(own, property) and own.fset is None:
            continue
        with contextlib.suppress(Exception):  # some attributes differ by layer and say so
            there = key in aliases or hasattr(probe, key)
            if there and not isinstance(getattr(probe, key, None), list | tuple):
                found[key] = value
    return found


def build(name: str) -> Any:
    """A toy model.

    Raises:
        Exception: transformers cannot build the type at this size.
    """
    return animated(lambda: AutoModelForCausalLM.from_config(config(name)))


def animated(make: Any) -> Any:
    """A seeded model in which nothing stands where it starts.

    Args:
        make: Makes the model.

    Raises:
        ValueError: It is too large.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make().parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters at the smallest")
    torch.manual_seed(0)
    model = make().eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                _move(name, parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(buffer.shape))
            elif name.endswith(_CORRECTIONS) and buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape) * 0.05)
    return model


_SHARP = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn", "Wqkv")
_GAINS = ("input_residual", "post_attention_residual", "residual_scale", "router_states_scale")
_CORRECTIONS = ("score_correction_bias", "expert_bias")


def _move(name: str, parameter: torch.Tensor) -> None:
    if name.endswith(_GAINS):
        parameter.copy_(0.5 + torch.rand(parameter.shape))
    elif parameter.dim() <= 1:
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    elif not parameter.any():  # what starts at zero hides what is behind it
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    elif any(part in name for part in _SHARP):
        parameter.mul_(8)


def tokens() -> torch.Tensor:
    """A text of two lines."""
    return torch.randint(3, 120, (2, TOKENS), generator=torch.Generator().manual_seed(1))
