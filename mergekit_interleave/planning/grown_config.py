"""config.json for the new depth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import extra_files, quantization
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint, config_errors
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError, UnsayableError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning.per_layer_config import Placement, SourceConfig, place

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before it


@dataclass(frozen=True)
class GrownConfig:
    """The config.json of a layout.

    Attributes:
        first: The model of the first layer.
        layout: The layers.
        placement: What config.json must say of single layers.
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
        """The whole config.json.

        Args:
            onto: A config to change instead of the first model's own.
            dtype: The dtype of the weights, where it is not the one that the config states.
            vocab_size: The rows of the embeddings, where the tokenizer was changed.
        """
        config = deepened(self.first, self.layout, self.placement, onto)
        return restated(config, dtype=dtype, vocab_size=vocab_size)


def grow(
    sources: Mapping[ModelRef, Checkpoint], layout: Layout, *, only_stated: bool = False
) -> GrownConfig:
    """Derive the config.json of a layout.

    Args:
        sources: The models whose layers they are.
        layout: The layers.
        only_stated: Do not ask the class of the type for what the file leaves out.

    Raises:
        RefusedError: No config.json can represent the layout.
    """
    first = sources[layout.models[0]]
    placement = stated_placement(first, layout) if only_stated else placement_of(sources, layout)
    return GrownConfig(first, layout, placement)


def placement_of(checkpoints: Mapping[ModelRef, Checkpoint], layout: Layout) -> Placement:
    """Say a layout in the words of config.json.

    Args:
        checkpoints: The models whose layers they are. Layers of several are alike, and only one
            list may speak of them.
        layout: The layers.

    Raises:
        RefusedError: No config.json can say it.
    """
    if len(layout.models) == 1:
        base = checkpoints[layout.models[0]]
        _check_deepstack(base, layout)
        return place(source_of(base), layout)
    key = "layer_types"
    entries = {model: source_of(checkpoints[model]).entries(key) for model in layout.models}
    if not any(entries.values()):
        return Placement()
    if not all(entries.values()):
        raise RefusedError(f"{key}: some of the models state it, and others do not")
    return Placement({key: [entries[layer.model][layer.source] for layer in layout.layers]})


def stated_placement(base: Checkpoint, layout: Layout) -> Placement:
    """The same as far as the file goes: the type's class is not asked for what it leaves out.

    Args:
        base: The model whose layers they are.
        layout: The layers.

    Raises:
        UnsayableError: No config.json can say it.
    """
    key = base.require_family().deepstack
    if key is not None and families.stated(base.config, key) is not None:
        _check_deepstack(base, layout)
    return place(dataclasses.replace(source_of(base), computed=lambda _: None), layout)


def _check_deepstack(base: Checkpoint, layout: Layout) -> None:
    """Features of images are added after the first layers, by their indices."""
    key = base.require_family().deepstack
    if key is None:
        return
    entries = _value(base, key) or []
    if not isinstance(entries, list | tuple):
        raise CheckpointError(f"{base.path / CONFIG}: {key} is {entries!r:.200}, not a list")
    count = len(entries)
    if any(layer.index != layer.source for layer in layout.layers[:count]):
        raise UnsayableError(
            f"{key} has {count} entries, and features of images are added after as many layers at "
            "the start, which must stay there"
        )


def source_of(base: Checkpoint) -> SourceConfig:
    """What a config says of its own layers."""

    def computed(key: str) -> object:
        config, composite = _with_defaults(base), base.require_family().composite
        with config_errors(base.path):  # a class computes some values only now
            return getattr(config.get_text_config() if composite else config, key, None)

    where = str(base.path / CONFIG)
    return SourceConfig(base.layer_config, base.require_family(), base.depth, computed, where)


def setting_of(base: Checkpoint, key: str) -> int:
    """The whole number that a config has for its layers under a key, or that its class has.

    Raises:
        CheckpointError: There is none.
    """
    source = source_of(base)
    number = source.integer(key)
    if number is None:
        raise CheckpointError(f"{source.where}: states no {key}")
    return number


def layers_with_gains(base: Checkpoint) -> frozenset[int]:
    """The layers whose projections are followed by norms; see `OutputNorms`."""
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
    """The config of the deeper model; keys that are not known stay as they are.

    Args:
        base: The model whose layers they are.
        layout: The layers.
        placement: What config.json must say of them.
        onto: A config to change in place of the base's own.
    """
    result = extra_files.without_local_names(dict(onto or base.config))
    parts, parts_of_base = _parts(result), _parts(dict(base.config))
    if len(parts) != len(parts_of_base):
        raise CheckpointError(
            f"{base.path / CONFIG}: holds the layers in another part than the base"
        )
    for part, of_base in zip(parts, parts_of_base, strict=True):
        if quantization.KEY in of_base:
            # The base's own: what stands in `onto` may have been re-indexed before.
            part[quantization.KEY] = _reindexed(of_base[quantization.KEY], base, layout)
    _speaking(result).update(_depths(base, len(layout)))
    _speaking(result).update(placement.config)
    return result


def restated(
    config: Mapping[str, Any], *, dtype: str | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """A config for other weights.

    Args:
        config: The config.
        dtype: Their dtype, where it is not the one that the config states.
        vocab_size: The rows of the embeddings, where the tokenizer was changed.
    """
    result = dict(config)
    if dtype is not None:
        for part in _parts(result):
            for key in [key for key in _DTYPE_KEYS if key in part] or _DTYPE_KEYS[-1:]:
                part[key] = dtype
    if vocab_size is not None:
        _speaking(result)["vocab_size"] = vocab_size
    return result


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and the part of it that speaks of the layers where that is another one."""
    speaking = _speaking(config)
    return [config] if speaking is config else [config, speaking]


def _speaking(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that speaks of the layers, apart from where it was copied from."""
    nested = families.nested_config(config)
    if nested is None:
        return config
    config[nested] = dict(config[nested])
    part: dict[str, Any] = config[nested]
    return part


def _depths(base: Checkpoint, depth: int) -> dict[str, int]:
    """The keys that state the depth."""
    facts, config = base.require_family().facts, base.layer_config
    keys = facts.depth
    if not config.get("is_encoder_decoder"):
        # Files state it by other names, too; in an encoder's company these may be the encoder's.
        others = (key for key in families.depth_keys() if config.get(key) == base.depth)
        keys += (*facts.encoder_depth, *others)
    if not any(config.get(key) is not None for key in facts.depth):
        # An old file states it by another key, or, as a list, by none.
        known = [key for key in families.depth_keys() if config.get(key) is not None]
        return dict.fromkeys(known or ([] if facts.depth_list else keys), depth)
    source = source_of(base)
    stated = {key: source.integer(key, config.get(key)) for key in facts.depth_multiples}
    multiples = {key: value * depth // base.depth for key, value in stated.items() if value}
    return dict.fromkeys(keys, depth) | multiples


def _value(base: Checkpoint, key: str) -> Any:
    """The value of a key of the whole config; where it is absent, what its class has for it."""
    value = families.stated(base.config, key)
    if value is None:
        value = _with_defaults(base)
        with config_errors(base.path):
            for name in key.split("."):
                value = getattr(value, name, None)
    return value


def _with_defaults(base: Checkpoint) -> Any:
    return _loaded(base.path, trusted=base.trusted)


def _loaded(path: Path, *, trusted: bool) -> Any:
    """The config as its class reads it, with what the file leaves out."""
    from transformers import AutoConfig, logging  # noqa: PLC0415 - seconds, and few files need it

    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trusted)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RefusedError(f"{path / CONFIG}: transformers cannot read it: {reason}") from error


def as_read(path: Path, *, trusted: bool) -> dict[str, Any]:
    """The config of a directory as its class reads it, with what the file leaves out.

    Raises:
        RefusedError: transformers cannot read it.
    """
    # Through JSON, so that both sides are what a file can say.
    return dict(json.loads(_loaded(path, trusted=trusted).to_json_string(use_diff=False)))


def moved_file(name: str, content: bytes, base: Checkpoint, layout: Layout) -> bytes:
    """A small file with the layers that it speaks of in their new places.

    Args:
        name: The file's.
        content: What it holds.
        base: The model whose layers they are.
        layout: The layers.
    """
    if name != "generation_config.json" and name not in quantization.INDEXED_FILES:
        return content
    before = extra_files.parsed(content)
    if before is None:
        return content
    if name == "generation_config.json":
        after = generation(before, layout)
    else:
        after = _reindexed(before, base, layout)
    changed = to_json(after).encode()
    return content if after == before else changed


def _reindexed(stated: Any, base: Checkpoint, layout: Layout) -> Any:
    """A quantizer's config, the base's own, with its names of modules in their new places."""
    sources = [layer.source for layer in layout.layers]
    return quantization.reindexed(stated, sources, base.depth, base.stack_names)


def generation(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """generation_config.json, whose settings may count layers from the start.

    Args:
        config: The base's.
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
    """The keys in which two configs differ, with both values; None also where there is none."""
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{place}{key}.")
        elif (key in before) != (key in after) or not _is_same(old, new):
            yield f"{place}{key}", (old, new)


def _is_same(one: object, other: object) -> bool:
    """Whether two values are written alike in JSON, where 1, 1.0 and true are three."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config states for its weights."""
    for key in _DTYPE_KEYS:
        if config.get(key) is not None:
            return str(config[key]).removeprefix("torch.")
    return None
