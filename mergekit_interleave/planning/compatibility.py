"""Check that the layers of several models can be stacked: that their class computes the same.

What must agree is not listed by hand. The class runs both configs without weights, and records its
tensors and every operation with its numbers (`checkpoint/computation.py`). A setting that changes
neither, such as a token id, may differ. The settings of single layers may differ too, because they
move with their layers.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import computation, quantization
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.computation import Computation
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning import grown_config


class Mismatch(NamedTuple):
    """A setting that prevents the layers of a model from being stacked on those of the base.

    Attributes:
        key: The key of config.json.
        of_model: Its value in the model.
        of_base: Its value in the base.
        same_shapes: Whether the layers have the same tensors nevertheless.
        only_ends: Whether it concerns only the tensors before and after the layers.
        only_rows: Whether it concerns only the number of tokens in the vocabulary.
    """

    key: str
    of_model: object
    of_base: object
    same_shapes: bool = False
    only_ends: bool = False
    only_rows: bool = False


_NAMES = frozenset(("architectures", "transformers_version", "dtype", "torch_dtype"))
"""Keys of config.json that are not read as settings; dtypes are compared with the tensors."""

_MOST_TOKENS = 2**13
"""The maximum number of tokens to run a class on: more than most windows, and still fast."""


def mismatch(
    model: Checkpoint, base: Checkpoint, *, is_end: bool, new_vocabulary: bool = False
) -> Mismatch | None:
    """Find a setting whose difference prevents stacking the layers of two models.

    Args:
        model: See `mismatches`.
        base: See `mismatches`.
        is_end: See `mismatches`.
        new_vocabulary: See `mismatches`.

    Returns:
        The setting, or None if the layers can be stacked.
    """
    found = mismatches(model, base, is_end=is_end, new_vocabulary=new_vocabulary)
    return next(found, None)


def mismatches(
    model: Checkpoint, base: Checkpoint, *, is_end: bool, new_vocabulary: bool = False
) -> Iterator[Mismatch]:
    """Find the settings whose difference prevents stacking the layers of two models.

    Args:
        model: A model that layers are taken from.
        base: The model that config.json is taken from.
        is_end: Whether the tensors before or after the layers are taken from the model, too.
        new_vocabulary: Whether embeddings and head are made for another tokenizer.

    Yields:
        Each setting; none if the layers can be stacked.
    """
    for part, part_of_base in (
        (model.config, base.config),
        (model.layer_config, base.layer_config),
    ):
        quantized, of_base = part.get(quantization.KEY), part_of_base.get(quantization.KEY)
        if quantized != of_base:
            yield Mismatch(quantization.KEY, quantized, of_base)
            return
    if not [*_differences(model.config, _with_layers_of(model, base, base.config))]:
        return  # without importing transformers
    try:
        comparison = _Comparison(model, base)
        yield from comparison.mismatches(is_end=is_end, new_vocabulary=new_vocabulary)
    except RefusedError:  # no class can be run, so every setting must agree
        yield from by_name(model, base)


class _Comparison:
    """Compares what the class of a model computes with its own settings, and with the base's."""

    def __init__(self, model: Checkpoint, base: Checkpoint) -> None:
        self._model, self._base = model, base
        self._config = grown_config.loaded(model.path, trusted=model.trusted)
        self._config_of_base = grown_config.loaded(base.path, trusted=base.trusted)
        self._own = self._config.to_dict()
        self._of_base = _with_layers_of(model, base, self._config_of_base.to_dict(), self._own)
        self._differing = dict(_differences(self._own, self._of_base))
        lengths = [
            number
            for pair in self._differing.values()
            for number in pair
            if isinstance(number, int) and number < _MOST_TOKENS
        ]
        self._tokens = max([computation.TOKENS, *(length + 1 for length in lengths)])

    def mismatches(self, *, is_end: bool, new_vocabulary: bool) -> Iterator[Mismatch]:
        """See the function of the same name."""
        own = self._record(type(self._config), self._own, self._model)
        other = self._record(type(self._config_of_base), self._of_base, self._base)
        same_shapes = own.layer_shapes == other.layer_shapes
        if not same_shapes or own.layers != other.layers:
            for key in self._causes(other, lambda one, two: _layers(one) == _layers(two)):
                yield Mismatch(*key, same_shapes=same_shapes)
            return
        rows = {
            shape[0]
            for one, two in ((own, other), (other, own))
            for name, shape in one.outer_shapes.items()
            if shape and shape != two.outer_shapes.get(name)
        }
        only_rows = _without_rows(own, rows) == _without_rows(other, rows)
        if not is_end or _ends(own) == _ends(other) or (new_vocabulary and only_rows):
            return
        for key in self._causes(other, lambda one, two: _ends(one) == _ends(two)):
            yield Mismatch(*key, same_shapes=True, only_ends=True, only_rows=only_rows)

    def _causes(self, other: Computation, same: Any) -> Iterator[tuple[str, object, object]]:
        """Yield each setting that alone changes what is computed from the base's settings."""
        found = False
        if type(self._config) is type(self._config_of_base):
            for key, (value, of_base) in self._differing.items():
                changed = copy.deepcopy(self._of_base)
                _set(changed, key, value)
                try:
                    alone = self._record(type(self._config_of_base), changed, self._base)
                    changes = not same(alone, other)
                except RefusedError:
                    changes = True
                if changes:
                    found = True
                    yield key, value, of_base
            if not found:
                for key, values in self._differing.items():
                    found = True
                    yield key, *values
        if not found:
            yield "type", self._model.model_type, self._base.model_type

    def _record(self, config_class: Any, values: dict[str, Any], source: Checkpoint) -> Computation:
        try:
            config = config_class.from_dict(copy.deepcopy(values))
        except Exception as error:
            raise RefusedError(f"{source.ref}: {error}") from error
        return computation.record(
            config, self._model.depth, tokens=self._tokens, trusted=source.trusted
        )


def _layers(found: Computation) -> tuple[object, ...]:
    return found.layer_shapes, found.layers


def _ends(found: Computation) -> tuple[object, ...]:
    return found.outer_shapes, _outer_ties(found), found.after


def _outer_ties(found: Computation) -> dict[str, frozenset[str]]:
    return {name: found.ties[name] for name in found.outer_shapes}


def _without_rows(found: Computation, rows: Collection[int]) -> tuple[object, ...]:
    """Return what the ends are made of, with these sizes of the vocabulary left out."""

    def without(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(without, value))
        return "rows" if isinstance(value, int) and value in rows else value

    shapes = {name: shape[1:] for name, shape in found.outer_shapes.items()}
    return shapes, _outer_ties(found), without(found.after)


def _with_layers_of(
    model: Checkpoint,
    base: Checkpoint,
    settings: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the base's settings with the model's depth and settings of single layers.

    Args:
        model: The model.
        base: The base.
        settings: The base's settings.
        own: The model's settings, if they are not those of its config.json.
    """
    own = model.config if own is None else own
    result = copy.deepcopy(dict(settings))
    family, nested = base.require_family(), families.nested_config(own)
    if (nested is None) != (families.nested_config(result) is None):
        return result
    part, part_of_model = (result[nested], own[nested]) if nested else (result, own)
    for key in (*family.facts.layer_keys(), *families.depth_keys(), *_rule_keys(family)):
        outer, _, inner = key.partition(".")
        source, target = part_of_model, part
        if inner:
            source, target = source.get(outer) or {}, target.get(outer) or {}
        name = inner or outer
        if name in source:
            target[name] = copy.deepcopy(source[name])
        else:
            target.pop(name, None)
    return result


def _rule_keys(family: families.Family) -> Iterator[str]:
    """Yield the keys that place layers by the rules of `indexer_sharing` and `kv_sharing`."""
    if family.indexer_sharing is not None:
        yield family.indexer_sharing.types_key
    if family.kv_sharing is not None:
        yield from (family.kv_sharing.count_key, family.kv_sharing.types_key)


def _differences(
    own: Mapping[str, Any], of_base: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[object, object]]]:
    for key, values in grown_config.differences(own, of_base):
        if key.rpartition(".")[2] not in _NAMES and not key.endswith("name_or_path"):
            yield key, values


def _set(settings: dict[str, Any], key: str, value: object) -> None:
    *outer, last = key.split(".")
    for name in outer:
        settings = settings.setdefault(name, {})
    settings[last] = value


def by_name(model: Checkpoint, base: Checkpoint) -> list[Mismatch]:
    """List the settings that differ between two files, apart from the ids of tokens.

    Without the class it is not known which of them matter.
    """
    of_base = _with_layers_of(model, base, base.config)
    return [
        Mismatch(key, *values)
        for key, values in _differences(model.config, of_base)
        if not key.endswith(("_token_id", "use_cache"))
    ]
