"""config.json for the new depth: the base's own, with only what must change changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_interleave.hub import is_hub_id

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before it
_NAME_KEY = "_name_or_path"  # written by transformers before 5, often with a local path


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
        dtype: The dtype of the weights, where it was converted.
        vocab_size: The rows of the embeddings, where the tokenizer was changed.
    """
    result = dict(config)
    result["num_hidden_layers"] = depth
    if dtype is not None:
        for key in [key for key in _DTYPE_KEYS if key in result] or [_DTYPE_KEYS[-1]]:
            result[key] = dtype.removeprefix("torch.")
    if vocab_size is not None:
        result["vocab_size"] = vocab_size
    if not is_hub_id(str(result.get(_NAME_KEY, "org/name"))):
        del result[_NAME_KEY]
    return result
