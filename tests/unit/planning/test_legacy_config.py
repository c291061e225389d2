"""What transformers 4 misreads in files of transformers 5 is found, and written beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mergekit_interleave.planning import legacy_config

DEFAULT = {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (
            {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5, **DEFAULT}},
            {"rope_theta": 1e5},
        ),
        (
            {"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6, **YARN}},
            {"rope_theta": 1e6, "rope_scaling": YARN},
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, **DEFAULT},
            },
            {"rotary_emb_base": 5e5, "rotary_pct": 1.0},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 2e4, **DEFAULT},
                },
            },
            {
                "rope_theta": 2e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 2e4,
            },
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 8}, {"num_experts": 8}),
        (
            {"model_type": "gpt_oss", "rope_parameters": {"rope_theta": 150000.0, **DEFAULT}},
            {"rope_theta": 150000.0, "rope_scaling": None},
        ),
    ],
)
def test_the_old_keys_are_added(config: dict[str, Any], added: dict[str, Any]) -> None:
    """Each key has the value that transformers 5 reads; nothing else changes."""
    result = legacy_config.readable(config)
    assert result == {**config, **added}
    assert legacy_config.misread(config)
    assert legacy_config.misread(result) == {}
    assert legacy_config.readable(result) == result


def test_a_nested_config() -> None:
    """The keys are added to the part that describes the layers."""
    rope = {"rope_parameters": {"rope_theta": 1e6, **DEFAULT}}
    config = {"model_type": "llava", "text_config": {"model_type": "llama", **rope}}
    result = legacy_config.readable(config)
    assert result["text_config"]["rope_theta"] == 1e6
    assert "rope_theta" not in result


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_theta": 5e5},
        {"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0, **DEFAULT}},
        {"model_type": "gemma4_text", "rope_parameters": {"rope_theta": 5e5, **DEFAULT}},
        {"model_type": "llama", "rope_parameters": "nonsense"},
        {},
    ],
)
def test_no_warning_where_nothing_is_misread(config: dict[str, Any]) -> None:
    """A default, an old config and a type that transformers 4 lacks give no warning."""
    assert legacy_config.misread(config) == {}
    assert legacy_config.warning(config, {"tokenizer_class": "PreTrainedTokenizerFast"}) is None


def test_the_warning_names_both_values() -> None:
    """The warning names the key, the value that is used and the right one."""
    config = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5, **DEFAULT}}
    text = legacy_config.warning(config, None)
    assert text is not None
    assert "rope_theta 10000.0 instead of 100000.0" in text


def test_infinity_and_layer_kinds() -> None:
    """Numbers and layer kinds that transformers 4 cannot read are written in its way."""
    infinite = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    kinds = {
        "model_type": "granitemoehybrid",
        "layer_types": ["linear_attention", "full_attention"],
    }
    assert legacy_config.readable(infinite)["time_step_limit"] == [0.0, math.inf]
    assert legacy_config.readable(kinds)["layer_types"] == ["mamba", "attention"]
    for config in (infinite, kinds):
        assert legacy_config.warning(config, None) is not None


def test_the_tokenizer(tmp_path: Path) -> None:
    """The class and the list of tokens that transformers 4 cannot load are replaced once."""
    file = tmp_path / legacy_config.TOKENIZER
    file.write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    )
    assert legacy_config.rewrite_tokenizer(tmp_path)
    assert json.loads(file.read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
    assert not legacy_config.rewrite_tokenizer(tmp_path)
    assert not legacy_config.rewrite_tokenizer(tmp_path / "none")
