"""config.json: what it must say for the new depth, and whether two of them fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_interleave.architecture import Family
from mergekit_interleave.checkpoint import Checkpoint
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout import Layout
from mergekit_interleave.smallfiles import without_local_names

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before it


def deepened(
    base: Checkpoint,
    layout: Layout,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """The config of the deeper model; keys that are not known stay as they are.

    Args:
        base: The model that gives its config.json.
        layout: The layers.
        dtype: The dtype of the weights, where it is not the one that the base states.
        vocab_size: The rows of the embeddings, where the tokenizer was changed.

    Raises:
        RefusedError: No config.json can say the new layout.
    """
    result = without_local_names(dict(base.config))
    family = base.require_family()
    for key in family.depth:
        result[key] = len(layout)
    if len(layout.models) == 1:
        sources = [layer.source for layer in layout.layers]
        result |= _placed(base, family, sources)
        if family.scale_depth and result.get("scale_depth") is not None:
            result["scale_depth"] *= math.sqrt(len(sources) / base.depth)
    if dtype is not None:
        for key in [key for key in _DTYPE_KEYS if key in result] or [_DTYPE_KEYS[-1]]:
            result[key] = dtype
    if vocab_size is not None:
        result["vocab_size"] = vocab_size
    return result


def _placed(base: Checkpoint, family: Family, sources: Sequence[int]) -> dict[str, Any]:
    """What config.json says of single layers, for layers taken from `sources`."""
    config = base.config
    placed: dict[str, Any] = {}
    # transformers accepts this one in any config, and checks its length.
    also = ("layer_types",) if config.get("layer_types") else ()
    for key in dict.fromkeys((*family.lists, *also)):
        entries = _entries(base, family, key)
        if entries:
            placed[key] = [entries[source] for source in sources]
    for key in family.indices:
        chosen = config.get(key)
        if isinstance(chosen, list):
            placed[key] = [i for i, source in enumerate(sources) if source in chosen]
    for key in family.first:
        if config.get(key) is not None:
            placed[key] = _first(base, key, sources)
    if family.dense_steps:
        step, listed = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
        dense = [i for i, s in enumerate(sources) if s in listed or (s + 1) % step]
        placed |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return placed


def _entries(base: Checkpoint, family: Family, key: str) -> list[Any]:
    """The entry of each of the base's layers, none where the type has no such list after all."""
    entries, depth = base.config.get(key) or _computed(base, key), base.depth
    if not isinstance(entries, list) or not entries:
        return []
    if family.cycled:
        return [entries[i % len(entries)] for i in range(depth)]
    if len(entries) < depth:
        raise RefusedError(f"{base.ref}: {key} has {len(entries)} entries for {depth} layers")
    return entries[:depth]


def _first(base: Checkpoint, key: str, sources: Sequence[int]) -> int:
    """How many layers at the start are of the kind that the base counts."""
    of_a_kind = [source < int(base.config[key]) for source in sources]
    count = sum(of_a_kind)
    if not all(of_a_kind[:count]):
        raise RefusedError(f"{base.ref}: {key} cannot say where its layers go in this layout")
    return count


def _computed(base: Checkpoint, key: str) -> object:
    """A list that transformers computes where the file has none, as it would for the new depth."""
    from transformers import AutoConfig  # noqa: PLC0415 - seconds, and few files need it

    return getattr(AutoConfig.from_pretrained(str(base.path)), key, None)


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
    for key, default in (family.must_agree or {}).items():
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
