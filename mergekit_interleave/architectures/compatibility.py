"""Check from their configs whether the layers of two models can be stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_interleave.architectures.family import Family


def disagreement(
    one: Mapping[str, Any], other: Mapping[str, Any], family: Family
) -> tuple[str, object, object] | None:
    """Find the first setting whose difference prevents stacking the layers of two models.

    Returns:
        The setting and its two values, or None if the layers can be stacked.
    """
    for key, default in (family.must_agree or {}).items():
        first, second = _setting(one, key, default), _setting(other, key, default)
        if first != second:
            return key, first, second
    first, second = _rope(one), _rope(other)
    return None if first == second else ("rope", first, second)


def _setting(config: Mapping[str, Any], key: str, default: object) -> object:
    """Return the value of a setting, or its default if it is missing or null."""
    if config.get(key) is not None or key == "sliding_window":
        return config.get(key, default)
    heads = config.get("num_attention_heads")
    if key == "head_dim" and heads:
        return config.get("hidden_size", 0) // heads
    return heads if key == "num_key_value_heads" and default is None else default


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings in one form.

    transformers 5 stores them in one mapping, transformers 4 under two keys.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    return rope
