"""Derive the per-layer keys of config.json for a new list of layers. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeAlias

from mergekit_interleave.architectures.family import ConfigFacts, Family, stated
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError, UnrepresentableError
from mergekit_interleave.layout.layout import Layer, Layout
from mergekit_interleave.planning.zeroing import is_identity

_ANY_CONFIG = ("layer_types",)
"""The list that transformers accepts in any config, and whose length it checks."""


@dataclass(frozen=True)
class Placement:
    """A layout as keys of config.json.

    Attributes:
        config: The keys that change, with their new values.
        kv_sharing_layers: The indices of the new layers that reuse a result of an earlier layer, so
            they lack the tensors to compute it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    kv_sharing_layers: frozenset[int] = frozenset()


_UNREAD = object()
"""Marks a value that has not been read yet."""


@dataclass(frozen=True)
class SourceConfig:
    """Typed access to the config of the source model.

    Attributes:
        config: The part of its config.json that holds the layer settings.
        family: Its family.
        depth: Its number of layers.
        computed: Returns the default of the config class for a key that the config lacks.
        where: The path of the config.json, for errors.
    """

    config: Mapping[str, Any]
    family: Family
    depth: int
    computed: Callable[[str], object]
    where: str = "config.json"

    @property
    def facts(self) -> ConfigFacts:
        """The keys of the config that depend on the layers."""
        return self.family.facts

    def value(self, key: str) -> Any:
        """Return the value of a key (`a.b` is key b of the mapping a), or its default."""
        outer, _, inner = key.partition(".")
        if outer not in self.config:
            return None if inner else self.computed(key)
        return stated(self.config, key)

    def integer(self, key: str, value: Any = _UNREAD) -> int | None:
        """Return the value of a key as an integer; None if there is no value.

        Args:
            key: The key.
            value: Its value, if it has already been read.

        Raises:
            CheckpointError: The value is not an integer.
        """
        number = self.value(key) if value is _UNREAD else value
        whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
        if number is not None and not whole:
            raise self._wrong(key, number, "a whole number")
        return None if number is None else int(number)

    def number(self, key: str) -> float | None:
        """Return the value of a key as a float; None if there is no value.

        Raises:
            CheckpointError: The value is not a number.
        """
        value = self.value(key)
        if value is None:
            return None
        try:
            return float(value)
        except (OverflowError, TypeError, ValueError):
            raise self._wrong(key, value, "a number") from None

    def listed(self, key: str) -> list[Any] | None:
        """Return the value of a key as a list; None if there is no value.

        Raises:
            CheckpointError: The value is not a list, or its parent is not a mapping.
        """
        value = self.value(key)
        outer, _, inner = key.partition(".")
        if inner and not isinstance(self.config.get(outer, {}), Mapping):
            raise self._wrong(outer, self.config[outer], "a mapping")
        if value is not None and not isinstance(value, list | tuple):
            raise self._wrong(key, value, "a list")
        return None if value is None else list(value)

    def _wrong(self, key: str, value: object, kind: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {value!r:.200}, not {kind}")

    def entries(self, key: str) -> list[Any]:
        """Return the entry of each layer in a per-layer list; empty if the config has no such list.

        Raises:
            RefusedError: The list has fewer entries than there are layers.
        """
        entries = self.config.get(key)
        if not entries and key in self.facts.per_layer_lists:
            entries = self.computed(key)
        if not isinstance(entries, list | str) or not entries:
            return []
        if self.facts.cyclic_lists:
            return [entries[i % len(entries)] for i in range(self.depth)]
        if len(entries) < self.depth:
            raise RefusedError(f"{key} has {len(entries)} entries for {self.depth} layers")
        return list(entries[: self.depth])


Sources: TypeAlias = "Mapping[ModelRef, SourceConfig]"


def place(sources: Sources, layout: Layout) -> Placement:
    """Express a layout in the keys of config.json.

    Args:
        sources: The configs of the source models.
        layout: The layers.

    Raises:
        RefusedError: No config.json can represent the layout.
    """
    layers = layout.layers
    first = sources[layers[0].model]
    facts = first.facts
    _check_irregular(sources, layers)
    placed = _lists(sources, layers)
    placed |= _indices(sources, layers)
    placed |= _original_indices(sources, layers)
    placed |= _counts(sources, layers)
    for kind, *keys in facts.periodic_rules:
        placed |= _solved(kind, keys, sources, layers)
    if facts.uses_scale_depth:
        placed |= _scale_depth(sources, len(layers))
    rule, sharers = first.family.indexer_sharing, _indexer_sharers(sources, layers)
    if rule is not None and sharers:
        entries = enumerate(placed[rule.types_key])
        placed[rule.types_key] = [rule.shared if i in sharers else entry for i, entry in entries]
    tail, kv_sharers = _shared_tail(sources, layers)
    return Placement(placed | tail, sharers | kv_sharers)


def _check_irregular(sources: Sources, layers: Sequence[Layer]) -> None:
    """Check that a first or last layer with different tensors keeps its place."""
    for layer in layers:
        source = sources[layer.model]
        for end, index, place in (("first", 0, 0), ("last", source.depth - 1, len(layers) - 1)):
            irregular = end in source.family.irregular_layers
            if irregular and (layer.source == index) != (layer.index == place):
                raise UnrepresentableError(
                    f"the {end} layer of model type {source.family.model_type} has different "
                    f"tensors from the rest, so layer {index} must stay {end} and cannot be copied"
                )


def _lists(sources: Sources, layers: Sequence[Layer]) -> dict[str, Any]:
    """Reorder the lists that have one entry per layer."""
    first = sources[layers[0].model]
    facts = first.facts
    placed: dict[str, Any] = {}
    for key in dict.fromkeys(
        (*facts.per_layer_lists, *facts.optional_per_layer_lists, *_ANY_CONFIG)
    ):
        entries = {model: source.entries(key) for model, source in sources.items()}
        if any(entries.values()):
            if not all(entries.values()):
                raise RefusedError(f"{key}: only some of the models have this key")
            chosen = [entries[layer.model][layer.source] for layer in layers]
            if key in facts.optional_per_layer_lists:
                chosen += first.config[key][first.depth :]  # later entries belong to extra heads
            placed[key] = "".join(chosen) if isinstance(first.config.get(key), str) else chosen
    for key, entries_key in facts.run_length_lists.items():
        if key in first.config and entries_key in placed:
            placed[key] = [[[kind], 1] for kind in placed[entries_key]]
    by_index = {model: source.config.get("per_layer_config") for model, source in sources.items()}
    if any(isinstance(found, Mapping) for found in by_index.values()):
        named = (
            (str(layer.index), found.get(str(layer.source)))
            for layer in layers
            if isinstance(found := by_index[layer.model], Mapping)
        )
        placed["per_layer_config"] = {i: entry for i, entry in named if entry is not None}
    return placed


def _indices(sources: Sources, layers: Sequence[Layer]) -> dict[str, Any]:
    """Update the lists that hold the indices of the layers of one kind."""
    first = sources[layers[0].model]
    facts = first.facts
    placed: dict[str, Any] = {}
    for base, keys in ((0, facts.layer_indices), (1, facts.layer_indices_from_1)):
        for key in keys:
            listed = {model: source.listed(key) for model, source in sources.items()}
            if listed[layers[0].model] is not None:
                places = [
                    layer.index + base
                    for layer in layers
                    if layer.source + base in (listed[layer.model] or ())
                ]
                _put(placed, first.config, key, places)
    if facts.uses_decoder_sparse_step:
        steps = {m: source.integer("decoder_sparse_step") or 1 for m, source in sources.items()}
        only = {m: source.listed("mlp_only_layers") or [] for m, source in sources.items()}
        dense = [
            layer.index
            for layer in layers
            if layer.source in only[layer.model] or (layer.source + 1) % steps[layer.model]
        ]
        placed |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return placed


def _original_indices(sources: Sources, layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Update the lists of indices that never name a new layer."""
    facts = sources[layers[0].model].facts
    placed = {}
    for base, keys in ((0, facts.original_indices), (1, facts.original_indices_from_1)):
        for key in keys:
            listed = {model: source.listed(key) or [] for model, source in sources.items()}
            if any(listed.values()):
                placed[key] = [
                    layer.index + base
                    for layer in layers
                    if not layer.is_copy and layer.source + base in listed[layer.model]
                ]
    return placed


def _put(placed: dict[str, Any], config: Mapping[str, Any], key: str, value: object) -> None:
    outer, _, inner = key.partition(".")
    placed[outer] = {**placed.get(outer, config[outer]), inner: value} if inner else value


def _counts(sources: Sources, layers: Sequence[Layer]) -> dict[str, int]:
    """Update the keys that count the layers of one kind at the start."""
    facts, counts = sources[layers[0].model].facts, {}
    for key in (*facts.leading_counts, *facts.fallback_leading_counts):
        leading = key in facts.leading_counts
        before = {
            model: source.integer(key) if leading else source.integer(key, source.config.get(key))
            for model, source in sources.items()
        }
        stated = [number for number in before.values() if number is not None]
        if not stated:
            continue
        counted = [layer.source < (before[layer.model] or 0) for layer in layers]
        count = sum(counted)
        if all(counted[:count]):
            # A count past the last layer stays past it.
            counts[key] = count if count < len(layers) else max(*stated, count)
        elif leading:
            raise UnrepresentableError(
                f"{key} counts layers at the start, but they would no longer all be at the start"
            )
    return counts


def _scale_depth(sources: Sources, depth: int) -> dict[str, float]:
    """Keep the factor scale_depth / sqrt(number of layers) of the residuals."""
    scales = [(source.number("scale_depth"), source.depth) for source in sources.values()]
    factors = [scale and scale / math.sqrt(number) for scale, number in scales]
    if any(not math.isclose(factor or 0, factors[0] or 0) for factor in factors):
        raise UnrepresentableError(
            "scale_depth scales the residuals of the models differently for their depths"
        )
    scale, number = scales[0]
    return {} if scale is None else {"scale_depth": scale * math.sqrt(depth / number)}


# Each function returns whether its rule holds for layer i, given the values of the rule's keys.
_RULES: Mapping[str, Callable[..., bool]] = {
    "offset": lambda i, period, offset: i % period == offset,
    "span": lambda i, interval, start, end: (i + 1) % interval == 0 and start <= i <= end,
    "block": lambda i, size: i % size == 0,
    "halving": lambda i, size: (i + 1) % size == 0,
    "every": lambda i, size: (i + 1) % size == 0,
}


def _solved(
    rule: str, keys: Sequence[str], sources: Sources, layers: Sequence[Layer]
) -> dict[str, int]:
    """Find new values for a periodic rule, so that it holds for the same layers as before."""
    holds = _RULES[rule]
    given = {model: _numbers(rule, keys, source) for model, source in sources.items()}
    stated = [numbers for numbers in given.values() if numbers is not None]
    if not stated:
        return {}
    wanted: set[int] | None = None
    if rule not in ("block", "halving"):
        wanted = {
            layer.index
            for layer in layers
            if (numbers := given[layer.model]) and holds(layer.source, *numbers)
        }
    elif len(sources) == 1:  # the boundaries of several models would mix
        depth = sources[layers[0].model].depth
        chosen = {index for index in range(depth) if holds(index, *stated[0])}
        wanted = _boundaries(rule, chosen, depth, layers)
    if wanted is not None:
        for candidate in (*stated, *_candidates(rule, wanted, len(layers))):
            if {i for i in range(len(layers)) if holds(i, *candidate)} == wanted:
                return dict(zip(keys, candidate, strict=True))
    require = "require" if len(keys) > 1 else "requires"
    raise UnrepresentableError(
        f"{', '.join(keys)} {require} regular distances between layers, which the new layers break"
    )


def _numbers(rule: str, keys: Sequence[str], source: SourceConfig) -> list[int] | None:
    """Return the values of a rule's keys, or None if the model does not use the rule."""
    numbers = [number for key in keys if (number := source.integer(key)) is not None]
    if len(numbers) < len(keys) or numbers == [0]:
        return None
    if numbers[0] < 1:
        raise CheckpointError(f"{source.where}: {keys[0]} is {numbers[0]}, not a positive number")
    if rule == "span" and numbers[2] < 0:
        numbers[2] = source.depth - 1
    return numbers


def _boundaries(rule: str, chosen: set[int], depth: int, layers: Sequence[Layer]) -> set[int]:
    # A boundary stays at its original layer, however many copies precede it.
    place = {layer.source: layer.index for layer in layers if not layer.is_copy}
    place[depth] = len(layers)
    if rule == "block":
        return {place[index] for index in chosen if index in place}
    return {place[index + 1] - 1 for index in chosen if index + 1 in place}


def _candidates(rule: str, wanted: set[int], depth: int) -> Iterable[Sequence[int]]:
    sizes = range(1, depth + 2)
    if rule in ("block", "halving", "every"):
        return ((size,) for size in sizes)
    if rule == "span":
        return ((size, min(wanted, default=depth), max(wanted, default=depth)) for size in sizes)
    return ((size, offset) for size, offset in product(sizes, repeat=2) if offset < size)


def _indexer_sharers(sources: Sources, layers: Sequence[Layer]) -> frozenset[int]:
    """Return the identities that must share an indexer result instead of computing one.

    An original that reuses the result of an earlier layer would otherwise get that of the identity.
    """
    rule = sources[layers[0].model].family.indexer_sharing
    if rule is None:
        return frozenset()
    entries = {model: source.entries(rule.types_key) for model, source in sources.items()}
    if not all(entries.values()):
        return frozenset()
    sharers = set()
    needed = False
    for layer in reversed(layers):
        identity = is_identity(layer, sources[layer.model].family)
        if entries[layer.model][layer.source] == rule.full:
            if needed and identity:
                sharers.add(layer.index)
            else:
                needed = False
        elif not identity:
            needed = True
    return frozenset(sharers)


@dataclass(frozen=True)
class _Tail:
    """The last layers of a model, which reuse the keys and values of earlier ones.

    Attributes:
        first: The index of the first of them.
        kinds: The type of each layer.
        lenders: The index of the layer whose results they reuse, by type.
    """

    first: int
    kinds: Sequence[str]
    lenders: Mapping[str, int]


def _tail(source: SourceConfig) -> _Tail | None:
    rule = source.family.kv_sharing
    count = (source.integer(rule.count_key) or 0) if rule else 0
    if rule is None or not count:
        return None
    first = source.depth - count
    kinds = source.entries(rule.types_key)
    has_kinds = bool(kinds) and all(isinstance(kind, str) for kind in kinds)
    if not 0 < first < source.depth or not has_kinds:
        raise CheckpointError(
            f"{source.where}: {rule.count_key} is {count} of {source.depth} layers, which does not "
            f"match {rule.types_key}, {kinds!r:.200}"
        )
    lenders = {
        kind: max((i for i in range(first) if kinds[i] == kind), default=-1)
        for kind in kinds[first:]
    }
    return _Tail(first, kinds, lenders)


def _shared_tail(
    sources: Sources, layers: Sequence[Layer]
) -> tuple[dict[str, int], frozenset[int]]:
    """Count the last layers that share keys and values, and find the new layers made to share."""
    tails = {model: _tail(source) for model, source in sources.items()}
    rule = sources[layers[0].model].family.kv_sharing
    known = {model: tail for model, tail in tails.items() if tail is not None}
    if rule is None or not known:
        return {}, frozenset()
    if len(known) < len(tails):
        raise UnrepresentableError(f"{rule.count_key} is set in only some of the models")

    def identity(layer: Layer) -> bool:
        return is_identity(layer, sources[layer.model].family)

    start = len(layers)
    kv_sharing_layers = set()
    for layer in reversed(layers):
        tail = known[layer.model]
        if layer.source < tail.first:
            if layer.source not in tail.lenders.values() or not identity(layer):
                break
            kv_sharing_layers.add(layer.index)
        start = layer.index
    wrong = [layer for layer in layers[:start] if layer.source >= known[layer.model].first]
    if any(map(identity, layers)):
        # Each sharing layer uses the last layer of its kind before it, which must be the original.
        lending = {known[layer.model].kinds[layer.source]: layer for layer in layers[:start]}
        wrong += [
            layer
            for kind, layer in lending.items()
            if kind in (lenders := known[layer.model].lenders)
            and (layer.source != lenders[kind] or layer.is_copy)
        ]
    for layer in wrong:
        lenders = known[layer.model].lenders
        raise UnrepresentableError(
            f"{rule.count_key} counts the last layers, which use the keys and values of layers "
            f"{' and '.join(map(str, sorted(lenders.values())))}, so layer {layer.index} of the "
            f"result cannot be a copy of layer {layer.source}"
        )
    return {rule.count_key: len(layers) - start}, frozenset(kv_sharing_layers)
