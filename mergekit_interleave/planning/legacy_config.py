"""Find what transformers 4 misreads in the files of transformers 5, and write what both read.

`--legacy-config` adds the keys of transformers 4 beside those of transformers 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import transformers4
from mergekit_interleave.checkpoint import extra_files
from mergekit_interleave.checkpoint.safetensors_header import to_json

FLAG = "--legacy-config"
TOKENIZER = "tokenizer_config.json"
_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_NEW_TOKENS, _OLD_TOKENS = "extra_special_tokens", "additional_special_tokens"

_Rope = Mapping[str, Any]


def _stated(*paths: str) -> Callable[[_Rope], Any]:
    """Return a function that reads the first of these keys of `rope_parameters` that exists."""

    def value(rope: _Rope) -> Any:
        found = (families.stated(rope, path) for path in paths)
        return next((item for item in found if item is not None), None)

    return value


def _scaling(rope: _Rope) -> Any:
    """Return `rope_scaling`: how positions are scaled; None if they are not."""
    inner = rope.get("full_attention", rope)
    inner = inner if isinstance(inner, Mapping) else {}
    apart = ("rope_theta", "partial_rotary_factor")
    kept = {key: value for key, value in inner.items() if key not in apart}
    return None if kept in ({}, {"rope_type": "default"}) else kept


ROTARY: Mapping[str, Callable[[_Rope], Any]] = {
    "rope_theta": _stated("rope_theta", "full_attention.rope_theta"),
    "rotary_emb_base": _stated("rope_theta"),
    "global_rope_theta": _stated("full_attention.rope_theta"),
    "local_rope_theta": _stated("sliding_attention.rope_theta"),
    "rope_local_base_freq": _stated("sliding_attention.rope_theta"),
    "partial_rotary_factor": _stated(
        "partial_rotary_factor", "full_attention.partial_rotary_factor"
    ),
    "rotary_pct": _stated("partial_rotary_factor"),
    "rope_scaling": _scaling,
}
"""The keys of transformers 4, each with its value by `rope_parameters` of transformers 5."""


def misread(config: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    """Return the keys that transformers 4 reads otherwise, each with its right and its read value.

    Args:
        config: The whole config.json.
    """
    part = families.layer_config(config)
    defaults = transformers4.defaults(_type(config))
    wanted = _wanted(config)
    read = {key: part.get(key, defaults.get(key)) for key in wanted}
    return {key: (wanted[key], read[key]) for key in wanted if not _same(wanted[key], read[key])}


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike; no key is removed.

    Args:
        config: The whole config.json.
    """
    added = {key: value for key, value in _wanted(config).items() if value is not None}
    added |= {key: right for key, (right, _) in misread(config).items()}
    added |= _old_kinds(config)
    nested = families.nested_config(config)
    if nested is None:
        return _with_infinity({**config, **added})
    return _with_infinity({**config, nested: {**config[nested], **added}})


def tokenizer_is_misread(tokenizer: Mapping[str, Any]) -> bool:
    """Whether transformers 4 cannot load a tokenizer with this tokenizer_config.json."""
    return tokenizer.get("tokenizer_class") == _NEW_CLASS or isinstance(
        tokenizer.get(_NEW_TOKENS), list
    )


def readable_tokenizer(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json that transformers 4 and 5 read alike."""
    result = dict(tokenizer)
    if result.get("tokenizer_class") == _NEW_CLASS:
        result["tokenizer_class"] = _OLD_CLASS
    if isinstance(result.get(_NEW_TOKENS), list):  # transformers 4 expects a mapping there
        result[_OLD_TOKENS] = result.pop(_NEW_TOKENS)
    return result


def readable_file(name: str, content: bytes) -> bytes:
    """Return the content of a small file that transformers 4 and 5 read alike.

    Args:
        name: The name of the file.
        content: The content of the file.
    """
    tokenizer = extra_files.parsed(content) if name == TOKENIZER else None
    if tokenizer is None or not tokenizer_is_misread(tokenizer):
        return content
    return to_json(readable_tokenizer(tokenizer)).encode()


def rewrite_tokenizer(directory: Path) -> bool:
    """Rewrite the tokenizer_config.json of a directory so that transformers 4 and 5 read it alike.

    Returns:
        Whether it had to be rewritten.

    Raises:
        OSError: It cannot be written.
    """
    file = directory / TOKENIZER
    before = file.read_bytes() if file.is_file() else b""
    after = readable_file(TOKENIZER, before)
    if after != before:
        replace_file(file, after.decode())
    return after != before


def tokenizer_of(directory: Path) -> dict[str, Any] | None:
    """Return the content of a model's tokenizer_config.json, or None if it has none."""
    file = directory / TOKENIZER
    return extra_files.parsed(file.read_bytes()) if file.is_file() else None


def warning(config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> str | None:
    """Warn of files that transformers 4 misreads.

    Args:
        config: The whole config.json.
        tokenizer: The tokenizer_config.json, if there is one.
    """
    wrong = [
        f"{key} {json.dumps(read)} instead of {json.dumps(right)}"
        for key, (right, read) in misread(config).items()
    ]
    parts = [f"uses {', '.join(wrong)}"] if wrong else []
    if _old_kinds(config) or _with_infinity(config) != config:
        parts.append("cannot load this config.json")
    if tokenizer is not None and tokenizer_is_misread(tokenizer):
        parts.append("cannot load the tokenizer")
    return f"transformers 4 {' and '.join(parts)}" if parts else None


def _type(config: Mapping[str, Any]) -> str:
    """Return the model type of the part that describes the layers."""
    return str(families.layer_config(config).get("model_type") or config.get("model_type") or "")


def _wanted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of transformers 4 with the values that transformers 5 reads."""
    part, name = families.layer_config(config), _type(config)
    rope, defaults = part.get("rope_parameters"), transformers4.defaults(name)
    wanted = {old: part[new] for old, new in transformers4.renamed(name).items() if new in part}
    if isinstance(rope, Mapping):
        wanted |= {key: ROTARY[key](rope) for key in defaults if key in ROTARY}
        for key in ("partial_rotary_factor", "rotary_pct"):
            if wanted.get(key, 0) is None:  # not stated, so the default of the class applies
                del wanted[key]
    return wanted


def _same(right: object, read: object) -> bool:
    return right == read or (not right and not read and not isinstance(right, int | float))


def _old_kinds(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `layer_types` in the names of transformers 4; empty if these are the names in use."""
    names, kinds = transformers4.layer_kinds(_type(config)), _listed(config)
    old = [names.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    return {} if old == kinds else {"layer_types": old}


def _listed(config: Mapping[str, Any]) -> list[Any]:
    kinds = families.layer_config(config).get("layer_types")
    return kinds if isinstance(kinds, list) else []


_INFINITY = {"__float__": "Infinity"}
"""The number infinity in the config.json of transformers 5; transformers 4 writes `Infinity`."""


def _with_infinity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the infinite numbers that transformers 5 writes as mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if value == _INFINITY:
            return math.inf
        return _with_infinity(value) if isinstance(value, dict) else value

    return {key: plain(value) for key, value in config.items()}
