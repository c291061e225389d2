"""config.json: what it must say for the new depth, and whether two of them fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_interleave.architecture import Family
from mergekit_interleave.smallfiles import without_local_names

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before it


def deepened(
    config: Mapping[str, Any],
    *,
    depth: int,
    dtype: str | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """The config of the deeper model; keys that are not known stay as they are.

    Args:
        config: The base's config.json.
        depth: The new number of layers.
        dtype: The dtype of the weights, where it is not the one that the base states.
        vocab_size: The rows of the embeddings, where the tokenizer was changed.
    """
    result = without_local_names(dict(config))
    result["num_hidden_layers"] = depth
    if dtype is not None:
        for key in [key for key in _DTYPE_KEYS if key in result] or [_DTYPE_KEYS[-1]]:
            result[key] = dtype
    if vocab_size is not None:
        result["vocab_size"] = vocab_size
    return result


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config states for its weights."""
    for key in _DTYPE_KEYS:
        if config.get(key) is not None:
            return str(config[key]).removeprefix("torch.")
    return None


def disagreement(
    one: Mapping[str, Any], other: Mapping[str, Any], family: Family
) -> tuple[str, object, object] | None:
    """The first thing in which two configs differ so that their layers cannot be stacked.

    Returns:
        Its name and the two values, or None where the layers fit.
    """
    for key, default in family.must_agree.items():
        ours, theirs = _setting(one, key, default), _setting(other, key, default)
        if ours != theirs:
            return key, ours, theirs
    ours, theirs = _rope(one), _rope(other)
    return None if ours == theirs else ("rope", ours, theirs)


def _setting(config: Mapping[str, Any], key: str, default: object) -> object:
    """A setting, or what stands for it where it is missing or null."""
    if config.get(key) is not None or key == "sliding_window":
        return config.get(key, default)
    heads = config.get("num_attention_heads")
    if key == "head_dim" and heads:
        return config.get("hidden_size", 0) // heads
    return heads if key == "num_key_value_heads" and default is None else default


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings in one spelling: transformers 5 has them together, 4 apart."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    return rope
