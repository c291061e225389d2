"""Toy models of images and words, saved by their own classes: a text stack of 8 layers in each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from toys import DEPTH, animated, known
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

_IMAGE = 121

_TEXT: dict[str, Any] = {
    "num_hidden_layers": DEPTH,
    **dict.fromkeys(["hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "intermediate_size_mlp"], 48),
    **dict.fromkeys(
        ["num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"], 4
    ),
    **dict.fromkeys(
        ["num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "top_k_experts"], 2
    ),
    **dict.fromkeys(["head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"], 16
    ),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts"], 1),
    **dict.fromkeys(["vocab_size", "max_position_embeddings"], 128),
    "linear_num_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER: dict[str, Any] = {
    **dict.fromkeys(["num_hidden_layers", "depth", "num_layers"], 2),
    **dict.fromkeys(["hidden_size", "embed_dim", "out_hidden_size", "output_dim"], 32),
    "intermediate_size": 48,
    **dict.fromkeys(["num_attention_heads", "num_heads", "num_key_value_heads"], 4),
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "vocab_size": 128,
}
_TOP: dict[str, Any] = {
    **dict.fromkeys(["image_token_id", "image_token_index"], _IMAGE),
    **dict.fromkeys(["video_token_id", "video_token_index"], 122),
    **dict.fromkeys(["audio_token_id", "audio_token_index"], 123),
    **dict.fromkeys(["boi_token_id", "boi_token_index", "vision_start_token_id"], 124),
    **dict.fromkeys(["eoi_token_id", "eoi_token_index", "vision_end_token_id"], 125),
    "boa_token_id": 126,
    "eoa_token_id": 127,
    "hidden_size": 32,
    "vocab_size": 128,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_M = {"rope_parameters": _ROPE}
_PATCHES = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
_GEMMA4: dict[str, dict[str, Any]] = {
    "text_config": {
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 0,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    "vision_config": {"position_embedding_size": 64, "pooling_kernel_size": 2},
    "audio_config": {"subsampling_conv_channels": [8, 8], "output_proj_dims": 32},
}
_LLAMA4: dict[str, dict[str, Any]] = {
    "text_config": {"attention_chunk_size": 16, "floor_scale": 8},
    "vision_config": {
        "intermediate_size": 128,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
}
_DEEP = {
    "vision_config": {
        "depth": 3,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 16,
    }
}
_QWEN3_5 = {"text_config": {"head_dim": 16}, "vision_config": {"num_position_embeddings": 16}}

# By type, or `type:variant`, and part; the top level is "". None leaves a size out.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "aya_vision": {},
    "cohere2_vision": {},
    "gemma3": {"": {"mm_tokens_per_image": 4}, "vision_config": {"vision_use_head": False}},
    "gemma4": _GEMMA4,
    "gemma4:e2b": {
        **_GEMMA4,
        "text_config": {
            **_GEMMA4["text_config"],
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "layer_types": _WINDOWS,
        },
    },
    "gemma4_unified": {
        "text_config": {"global_head_dim": 16},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 32},
    },
    "glm4v": {"text_config": dict(_M), "vision_config": dict(_PATCHES)},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}},
        "vision_config": dict(_PATCHES),
    },
    "idefics3": {},
    "internvl": {},
    "lfm2_vl": {},
    "llama4": _LLAMA4,
    "llama4:experts": {
        **_LLAMA4,
        "text_config": {**_LLAMA4["text_config"], "interleave_moe_layer_step": 2},
    },
    "llava": {},
    "mistral3": {},
    "mllama": {
        "text_config": {"cross_attention_layers": [1, 5]},
        "vision_config": {
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
            "num_global_layers": 1,
        },
    },
    "paligemma": {"": {"projection_dim": 32}, "vision_config": {"vision_use_head": False}},
    "qwen2_5_vl": {"text_config": dict(_M), "vision_config": dict(_PATCHES)},
    "qwen2_vl": {
        "text_config": dict(_M),
        "vision_config": {**_PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_vl": _DEEP,
    "qwen3_vl_moe": _DEEP,
    "smolvlm": {},
}


PUBLISHED = {"gemma3": ("vision_tower.", "vision_tower.vision_model.")}
"""Parts of names under which a new model is not saved as the published ones are."""


def config(name: str) -> Any:
    """The config of a toy model; see `OWN` for its name."""
    config_class = CONFIG_MAPPING[name.partition(":")[0]]
    probe = config_class()
    parts = {}
    for key in config_class.sub_configs:
        part = getattr(probe, key)
        part_class = config_class.sub_configs[key] if part is None else type(part)
        sizes = known(part_class, _TEXT if key == "text_config" else _TOWER)
        sizes |= OWN[name].get(key, {})
        parts[key] = part_class(**{k: v for k, v in sizes.items() if v is not None})
    top = known(config_class, _TOP) | OWN[name].get("", {})
    return config_class(**parts, **{key: v for key, v in top.items() if key not in parts})


def build(name: str) -> Any:
    """A toy model, of its own class."""
    kind = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[name.partition(":")[0]]
    model_class = getattr(transformers, kind)
    return animated(lambda: model_class(config(name)))


def with_an_image(model: Any) -> dict[str, torch.Tensor] | None:
    """The arguments of a forward with an image, for the types of which it is known."""
    model_type = model.config.model_type
    random = torch.Generator().manual_seed(3)
    count = 16 if model_type in ("llava", "paligemma", "gemma4_unified") else 4
    ids = torch.tensor([[5, 6, 124, *[_IMAGE] * count, 125, 7, 8, 9]])
    kinds = (ids == _IMAGE).long()
    picture = torch.rand(1, 3, 32, 32, generator=random)
    if model_type == "gemma3":
        return {"input_ids": ids, "pixel_values": picture, "token_type_ids": kinds}
    if model_type in ("llama4", "llava", "paligemma"):
        return {"input_ids": ids, "pixel_values": picture}
    if model_type == "mistral3":
        size = torch.tensor([[32, 32]])
        return {"input_ids": ids, "pixel_values": picture, "image_sizes": size}
    vision = model.config.vision_config
    if model_type == "mllama":
        tiles, side = vision.max_num_tiles, vision.image_size
        return {
            "input_ids": ids,
            "pixel_values": torch.rand(1, 1, tiles, 3, side, side, generator=random),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, ids.shape[1], 1, tiles, dtype=torch.long),
        }
    if model_type.startswith("gemma4"):
        side = 8 if model_type == "gemma4" else vision.patch_size * vision.pooling_kernel_size
        grid = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
        return {
            "input_ids": ids,
            "pixel_values": torch.rand(1, 16, 3 * side**2, generator=random),
            "image_position_ids": grid,
            "mm_token_type_ids": kinds,
        }
    if model_type.startswith(("qwen", "glm4v")):
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {
            "input_ids": ids,
            "pixel_values": torch.rand(16, width, generator=random),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
    return None
