"""Toy checkpoints whose tensors are stored as published ones are, not as models hold them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_DEPTH, _HIDDEN, _VOCAB, _GROUP = 6, 64, 128, 32
_LEFT_ALONE = "model.layers.3.mlp.down_proj"

Tensors = dict[str, torch.Tensor]


def gpt_oss(out: Path) -> Path:
    """Experts in MXFP4: blocks of 32 four-bit numbers with a scale each."""
    config, dense = _dense("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    tensors = {}
    for name, tensor in dense.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _mxfp4(tensor)
        else:
            tensors[name] = tensor
    left = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    return _write(out, config, tensors, quant_method="mxfp4", modules_to_not_convert=left)


def _mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, in, out] as blocks [experts, out, in / 32, 16], and a scale for each block."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    w = weight.float().transpose(1, 2)
    w = w.reshape(*w.shape[:-1], w.shape[-1] // 32, 32)
    exponent = torch.floor(torch.log2(w.abs().amax(-1).clamp_min(2.0**-100))) - 2
    codes = (w / exponent.exp2()[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).byte(), (exponent + 127).byte()


def fp8(out: Path) -> Path:
    """Weights in 8 bits with a scale for each block of 32 by 32; one projection is left alone."""
    config, dense = _dense("qwen3")
    tensors: Tensors = {}
    for name, tensor in dense.items():
        tensors[name] = tensor
        if _is_linear(name):
            w = tensor.float().reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 32, 32)
            scale = w.abs().amax((1, 3)).clamp_min(1e-12) / 448
            codes = (w / scale[:, None, :, None]).reshape(tensor.shape)
            tensors[name] = codes.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    how = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    left = ["lm_head", _LEFT_ALONE]
    return _write(out, config, tensors, quant_method="fp8", modules_to_not_convert=left, **how)


def gptq(out: Path) -> Path:
    """Weights in 4 bits, eight to an integer, with a scale and a zero for each group of 32."""
    config, dense = _dense("llama")
    tensors = {}
    for name, tensor in dense.items():
        if not _is_linear(name):
            tensors[name] = tensor.half()
            continue
        w = tensor.float().t().reshape(-1, _GROUP, tensor.shape[0])
        low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
        scales = ((high - low) / 15).clamp_min(1e-8)
        zeros = torch.round(-low / scales).clamp(1, 15)
        codes = torch.round(w / scales[:, None] + zeros[:, None]).clamp(0, 15).flatten(0, 1)
        stem = name.removesuffix("weight")
        tensors[f"{stem}qweight"] = _packed(codes.t()).t()
        tensors[f"{stem}qzeros"] = _packed(zeros - 1)
        tensors[f"{stem}scales"] = scales.half()
        tensors[f"{stem}g_idx"] = torch.arange(codes.shape[0], dtype=torch.int32) // _GROUP
    config["dtype"] = "float16"
    return _write(out, config, tensors, quant_method="gptq", bits=4, group_size=_GROUP)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Four-bit codes, eight neighbours of a row to an integer."""
    groups = codes.to(torch.int64).reshape(codes.shape[0], -1, 8)
    packed = sum(groups[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    whole = packed.to(torch.int64) & 0xFFFFFFFF
    return torch.stack([whole >> (4 * i) & 15 for i in range(8)], dim=-1).flatten(-2)


def gptq_weight(tensors: Tensors, projection: str) -> torch.Tensor:
    """What a projection of `gptq` stands for, by the format's formula."""
    codes = _unpacked(tensors[f"{projection}.qweight"].t()).t()
    zeros = (_unpacked(tensors[f"{projection}.qzeros"]) + 1) & 15
    group = tensors[f"{projection}.g_idx"].long()
    return tensors[f"{projection}.scales"][group] * (codes - zeros[group]).half()


def glm4_moe(out: Path) -> Path:
    """Behind the last layer there is another, of a head that predicts several tokens."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    groups = {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
    config, tensors = _dense("glm4_moe", first_k_dense_replace=1, **experts, **groups)
    last, beyond = f"model.layers.{_DEPTH - 1}.", f"model.layers.{_DEPTH}."
    tensors |= {n.replace(last, beyond): t + 1 for n, t in tensors.items() if n.startswith(last)}
    tensors[f"{beyond}eh_proj.weight"] = torch.randn(_HIDDEN, 2 * _HIDDEN, dtype=torch.bfloat16)
    config["num_nextn_predict_layers"] = 1
    return _write(out, config, tensors)


def _is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight") and _LEFT_ALONE not in name


def _dense(model_type: str, **settings: Any) -> tuple[dict[str, Any], Tensors]:
    """config.json and the tensors of a toy model as transformers saves them."""
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": _DEPTH,
        "hidden_size": _HIDDEN,
        "intermediate_size": _HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = CONFIG_MAPPING[model_type](**sizes, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config_file = Path(folder, "config.json")
        return json.loads(config_file.read_text()), load_file(Path(folder, "model.safetensors"))


def _write(out: Path, config: dict[str, Any], tensors: Tensors, **quantization: Any) -> Path:
    out.mkdir()
    if quantization:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    return out
