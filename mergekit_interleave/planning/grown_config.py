"""Derive the config.json of the grown model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import extra_files
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint, config_errors
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError, UnrepresentableError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import json_layers
from mergekit_interleave.planning.json_layers import Move
from mergekit_interleave.planning.per_layer_config import Placement, SourceConfig, place

_DTYPE_KEYS = ("dtype", "torch_dtype")  # the key of transformers 5, and the older one


@dataclass(frozen=True)
class GrownConfig:
    """The config.json of a layout.

    Attributes:
        first: The model of the first layer.
        layout: The layers.
        placement: The per-layer keys of config.json.
    """

    first: Checkpoint
    layout: Layout
    placement: Placement

    def config(
        self,
        onto: Mapping[str, Any] | None = None,
        *,
        dtype: str | None = None,
        vocab_size: int | None = None,
    ) -> dict[str, Any]:
        """Return the complete config.json.

        Args:
            onto: A config to change instead of the config of the first model.
            dtype: The dtype of the weights, if it differs from the one in the config.
            vocab_size: The number of rows of the embeddings, if the tokenizer was changed.
        """
        config = deepened(self.first, self.layout, self.placement, onto)
        return restated(config, dtype=dtype, vocab_size=vocab_size)


def grow(
    sources: Mapping[ModelRef, Checkpoint], layout: Layout, *, only_stated: bool = False
) -> GrownConfig:
    """Derive the config.json of a layout.

    Args:
        sources: The models that the layers are taken from.
        layout: The layers.
        only_stated: Do not fill keys missing from the file with the defaults of the config class.

    Raises:
        RefusedError: No config.json can represent the layout.
    """
    configs = {model: source_of(sources[model]) for model in layout.models}
    for model in layout.models:
        _check_deepstack(sources[model], layout, only_stated=only_stated)
    if only_stated:
        configs = {
            model: dataclasses.replace(config, computed=lambda _: None)
            for model, config in configs.items()
        }
    return GrownConfig(sources[layout.models[0]], layout, place(configs, layout))


def _check_deepstack(base: Checkpoint, layout: Layout, *, only_stated: bool) -> None:
    """Check that the first layers keep their indices if image features are added after them."""
    key = base.require_family().deepstack
    if key is None or (only_stated and families.stated(base.config, key) is None):
        return
    entries = _value(base, key) or []
    if not isinstance(entries, list | tuple):
        raise CheckpointError(f"{base.path / CONFIG}: {key} is {entries!r:.200}, not a list")
    count = len(entries)
    if any(layer.index != layer.source for layer in layout.layers[:count]):
        raise UnrepresentableError(
            f"{key} has {count} entries: image features are added after the first {count} layers, "
            "so these must stay first"
        )


def source_of(base: Checkpoint) -> SourceConfig:
    """Return typed access to the config of a model."""

    def computed(key: str) -> object:
        config, composite = _with_defaults(base), base.require_family().composite
        with config_errors(base.path):  # the class computes some values on access
            return getattr(config.get_text_config() if composite else config, key, None)

    where = str(base.path / CONFIG)
    return SourceConfig(base.layer_config, base.require_family(), base.depth, computed, where)


def setting_of(base: Checkpoint, key: str) -> int:
    """Return an integer setting from a config, or its default from the config class.

    Raises:
        CheckpointError: Neither has a value for the key.
    """
    source = source_of(base)
    number = source.integer(key)
    if number is None:
        raise CheckpointError(f"{source.where}: {key} is missing")
    return number


def layers_with_gains(base: Checkpoint) -> frozenset[int]:
    """Return the indices of the layers whose projections are followed by norms (`OutputNorms`)."""
    gains = base.require_family().output_norms
    if gains is None:
        return frozenset()
    if gains.types_key is None:
        return frozenset(range(base.depth))
    kinds = source_of(base).entries(gains.types_key)
    return frozenset(i for i, kind in enumerate(kinds) if kind in gains.types)


def deepened(
    base: Checkpoint,
    layout: Layout,
    placement: Placement,
    onto: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config of the deeper model; unknown keys are kept unchanged.

    Args:
        base: The model that the layers are taken from.
        layout: The layers.
        placement: The per-layer keys of config.json.
        onto: A config to change instead of the base's config.
    """
    result = extra_files.without_local_names(dict(onto or base.config))
    parts, parts_of_base = _parts(result), _parts(dict(base.config))
    if len(parts) != len(parts_of_base):
        raise CheckpointError(
            f"{base.path / CONFIG}: its layer settings are nested differently from those of the "
            "config.json to change"
        )
    nested, move = families.nested_config(base.config), _move(base, layout)
    for part, of_base in zip(parts, parts_of_base, strict=True):
        own = {key: value for key, value in of_base.items() if key != nested}
        for key, value in _reindexed(CONFIG, own, move, base, placement.config).items():
            if own.get(key) != value:
                # From the base, because the value in `onto` may already have been re-indexed.
                part[key] = value
    _layer_part(result).update(_depths(base, len(layout)))
    _layer_part(result).update(placement.config)
    return result


def restated(
    config: Mapping[str, Any], *, dtype: str | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """Return a config with another dtype or vocabulary size.

    Args:
        config: The config.
        dtype: The dtype of the weights, if it differs from the one in the config.
        vocab_size: The number of rows of the embeddings, if the tokenizer was changed.
    """
    result = dict(config)
    if dtype is not None:
        for part in _parts(result):
            for key in [key for key in _DTYPE_KEYS if key in part] or _DTYPE_KEYS[-1:]:
                part[key] = dtype
    if vocab_size is not None:
        _layer_part(result)["vocab_size"] = vocab_size
    return result


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the config and, if the layer settings are nested, the part that holds them."""
    layer_part = _layer_part(config)
    return [config] if layer_part is config else [config, layer_part]


def _layer_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that holds the layer settings; a nested part is copied first."""
    nested = families.nested_config(config)
    if nested is None:
        return config
    config[nested] = dict(config[nested])
    part: dict[str, Any] = config[nested]
    return part


def _depths(base: Checkpoint, depth: int) -> dict[str, int]:
    """Return the keys that hold the depth, with their new values."""
    facts, config = base.require_family().facts, base.layer_config
    keys = facts.depth
    if not config.get("is_encoder_decoder"):
        # Files may also state the depth under other keys. In a model with an encoder, these keys
        # may hold the encoder's depth.
        others = (key for key in families.depth_keys() if config.get(key) == base.depth)
        keys += (*facts.encoder_depth, *others)
    if not any(config.get(key) is not None for key in facts.depth):
        # An old file states the depth under another key, or only by the length of a list.
        known = [key for key in families.depth_keys() if config.get(key) is not None]
        return dict.fromkeys(known or ([] if facts.depth_list else keys), depth)
    source = source_of(base)
    stated = {key: source.integer(key, config.get(key)) for key in facts.depth_multiples}
    multiples = {key: value * depth // base.depth for key, value in stated.items() if value}
    return dict.fromkeys(keys, depth) | multiples


def _value(base: Checkpoint, key: str) -> Any:
    """Return the value of a key of the whole config, or its default from the config class."""
    value = families.stated(base.config, key)
    if value is None:
        value = _with_defaults(base)
        with config_errors(base.path):
            for name in key.split("."):
                value = getattr(value, name, None)
    return value


def _with_defaults(base: Checkpoint) -> Any:
    return loaded(base.path, trusted=base.trusted)


def loaded(path: Path, *, trusted: bool, read: Callable[[Any], Any] = lambda config: config) -> Any:
    """Load a config with its class, which fills in the defaults.

    Args:
        path: The directory of the config.
        trusted: Whether the model's own code may be run.
        read: Returns what the caller needs from the config object.

    Raises:
        RefusedError: transformers cannot read the config.
    """
    from transformers import AutoConfig, logging  # noqa: PLC0415 - takes seconds, and is rarely needed

    logging.set_verbosity_error()
    try:
        return read(AutoConfig.from_pretrained(str(path), trust_remote_code=trusted))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RefusedError(f"{path / CONFIG}: transformers cannot read it: {reason}") from error


def as_read(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Return the config of a directory as its class reads it, with all defaults filled in.

    Raises:
        RefusedError: transformers cannot read the config.
    """

    def values(config: Any) -> dict[str, Any]:
        # The round trip through JSON leaves only values that a file can contain.
        return dict(json.loads(config.to_json_string(use_diff=False)))

    return dict(loaded(path, trusted=trusted, read=values))


def moved_file(name: str, content: bytes, base: Checkpoint, layout: Layout) -> bytes:
    """Return the content of a small file with its layer indices and counts updated.

    Files of the tokenizer are left alone: their text is data, and their lists are vocabularies.

    Args:
        name: The name of the file.
        content: The content of the file.
        base: The model that the layers are taken from.
        layout: The layers.

    Raises:
        RefusedError: It is a JSON file with settings of single layers that are not understood.
    """
    path = PurePosixPath(name)
    if path.suffix != ".json" or path.name in extra_files.TOKENIZER_FILES:
        return content
    before = extra_files.parsed(content)
    if before is None:
        return content
    after = _reindexed(name, before, _move(base, layout), base)
    if name == "generation_config.json":
        after = generation(after, layout) if isinstance(after, dict) else after
    changed = to_json(after).encode()
    return content if after == before else changed


def _move(base: Checkpoint, layout: Layout) -> Move:
    return Move([layer.source for layer in layout.layers], base.depth, base.stack_names)


def _reindexed(
    file: str, content: Any, move: Move, base: Checkpoint, placed: Collection[str] = ()
) -> Any:
    """Return the content of a JSON file with the layer indices in all names updated.

    Args:
        file: The name of the file.
        content: Its content.
        move: How the layers move.
        base: The model that the file belongs to.
        placed: The keys that are updated elsewhere.

    Raises:
        RefusedError: The file has settings of single layers that are not understood.
    """
    known = base.require_family().facts.lists.union(families.not_per_layer(), placed)
    try:
        json_layers.check_understood(content, base.depth, known)
        return json_layers.reindexed(content, move)
    except RefusedError as error:
        raise RefusedError(f"{base.path / file}: {error}", hint=error.hint) from error


def generation(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return generation_config.json with its layer counts updated.

    Args:
        config: The generation config of the base.
        layout: The layers.
    """

    def moved(count: int) -> int:
        return sum(layer.source < count for layer in layout.layers)

    result = dict(config)
    early, hidden = config.get("assistant_early_exit"), config.get("dola_layers")
    if isinstance(early, int):
        result["assistant_early_exit"] = moved(early)
    if isinstance(hidden, list):
        if not all(isinstance(index, int | float) for index in hidden):
            raise CheckpointError(
                f"generation_config.json: dola_layers is {hidden!r:.200}, not a list of numbers"
            )
        result["dola_layers"] = [moved(index) for index in hidden]
    return result


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], place: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Yield the keys in which two configs differ, with both values; None for a missing key."""
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{place}{key}.")
        elif (key in before) != (key in after) or not _is_same(old, new):
            yield f"{place}{key}", (old, new)


def _is_same(one: object, other: object) -> bool:
    """Whether two values are the same in JSON; 1, 1.0 and true compare equal only in Python."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config gives for the weights."""
    for key in _DTYPE_KEYS:
        if config.get(key) is not None:
            return str(config[key]).removeprefix("torch.")
    return None
