"""Derive the per-layer keys of config.json for a new list of layers. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mergekit_interleave.architectures.family import ConfigFacts, Family, stated
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


def place(source: SourceConfig, layout: Layout) -> Placement:
    """Express a layout in the keys of config.json.

    Args:
        source: The config of the only source model.
        layout: The layers.

    Raises:
        RefusedError: No config.json can represent the layout.
    """
    facts, layers = source.facts, layout.layers
    _check_irregular(source, layers)
    sources = [layer.source for layer in layers]
    placed = _lists(source, sources)
    placed |= _indices(source, sources)
    for key in facts.original_indices_from_1:
        listed = source.listed(key) or []
        placed[key] = [
            layer.index + 1 for layer in layers if not layer.is_copy and layer.source + 1 in listed
        ]
    placed |= _counts(source, sources)
    for kind, *keys in facts.periodic_rules:
        placed |= _solved(kind, keys, source, layers)
    scale = source.number("scale_depth") if facts.uses_scale_depth else None
    if scale is not None:
        placed["scale_depth"] = scale * math.sqrt(len(sources) / source.depth)
    rule, sharers = source.family.indexer_sharing, _indexer_sharers(source, layers)
    if rule is not None and sharers:
        entries = enumerate(placed[rule.types_key])
        placed[rule.types_key] = [rule.shared if i in sharers else entry for i, entry in entries]
    tail, kv_sharers = _shared_tail(source, layers)
    return Placement(placed | tail, sharers | kv_sharers)


def _check_irregular(source: SourceConfig, layers: Sequence[Layer]) -> None:
    """Check that a first or last layer with different tensors keeps its place."""
    for end, index, place in (("first", 0, 0), ("last", source.depth - 1, len(layers) - 1)):
        if end in source.family.irregular_layers:
            for layer in layers:
                if (layer.source == index) != (layer.index == place):
                    raise UnrepresentableError(
                        f"the {end} layer of model type {source.family.model_type} has different "
                        f"tensors from the rest, so layer {index} must stay {end} and cannot be "
                        "copied"
                    )


def _lists(source: SourceConfig, sources: Sequence[int]) -> dict[str, Any]:
    """Reorder the lists that have one entry per layer."""
    facts = source.facts
    placed: dict[str, Any] = {}
    for key in dict.fromkeys(
        (*facts.per_layer_lists, *facts.optional_per_layer_lists, *_ANY_CONFIG)
    ):
        entries = source.entries(key)
        if entries:
            chosen = [entries[index] for index in sources]
            if key in facts.optional_per_layer_lists:
                chosen += source.config[key][source.depth :]  # later entries belong to extra heads
            placed[key] = "".join(chosen) if isinstance(source.config.get(key), str) else chosen
    for key, entries_key in facts.run_length_lists.items():
        if key in source.config and entries_key in placed:
            placed[key] = [[[kind], 1] for kind in placed[entries_key]]
    by_index = source.config.get("per_layer_config")
    if isinstance(by_index, Mapping):
        named = ((str(i), by_index.get(str(index))) for i, index in enumerate(sources))
        placed["per_layer_config"] = {i: entry for i, entry in named if entry is not None}
    return placed


def _indices(source: SourceConfig, sources: Sequence[int]) -> dict[str, Any]:
    """Update the lists that hold the indices of the layers of one kind."""
    facts = source.facts
    placed: dict[str, Any] = {}
    for base, keys in ((0, facts.layer_indices), (1, facts.layer_indices_from_1)):
        for key in keys:
            listed = source.listed(key)
            if listed is not None:
                places = [i + base for i, s in enumerate(sources) if s + base in listed]
                _put(placed, source.config, key, places)
    if facts.uses_decoder_sparse_step:
        step = source.integer("decoder_sparse_step") or 1
        listed = source.listed("mlp_only_layers") or []
        dense = [i for i, s in enumerate(sources) if s in listed or (s + 1) % step]
        placed |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return placed


def _put(placed: dict[str, Any], config: Mapping[str, Any], key: str, value: object) -> None:
    outer, _, inner = key.partition(".")
    placed[outer] = {**placed.get(outer, config[outer]), inner: value} if inner else value


def _counts(source: SourceConfig, sources: Sequence[int]) -> dict[str, int]:
    """Update the keys that count the layers of one kind at the start."""
    facts, counts = source.facts, {}
    for key in (*facts.leading_counts, *facts.fallback_leading_counts):
        leading = key in facts.leading_counts
        before = source.integer(key) if leading else source.integer(key, source.config.get(key))
        if before is None:
            continue
        counted = [index < before for index in sources]
        count = sum(counted)
        if all(counted[:count]):
            # A count past the last layer stays past it.
            counts[key] = count if count < len(sources) else max(before, count)
        elif leading:
            raise UnrepresentableError(
                f"{key} counts layers at the start, but they would no longer all be at the start"
            )
    return counts


# Each function returns whether its rule holds for layer i, given the values of the rule's keys.
_RULES: Mapping[str, Callable[..., bool]] = {
    "offset": lambda i, period, offset: i % period == offset,
    "span": lambda i, interval, start, end: (i + 1) % interval == 0 and start <= i <= end,
    "block": lambda i, size: i % size == 0,
    "halving": lambda i, size: (i + 1) % size == 0,
}


def _solved(
    rule: str, keys: Sequence[str], source: SourceConfig, layers: Sequence[Layer]
) -> dict[str, int]:
    """Find new values for a periodic rule, so that it holds for the same layers as before."""
    holds, given = _RULES[rule], [source.integer(key) for key in keys]
    numbers = [number for number in given if number is not None]
    if len(numbers) < len(keys) or numbers == [0]:
        return {}
    if numbers[0] < 1:
        raise CheckpointError(f"{source.where}: {keys[0]} is {numbers[0]}, not a positive number")
    if rule == "span" and numbers[2] < 0:
        numbers[2] = source.depth - 1
    chosen = {index for index in range(source.depth) if holds(index, *numbers)}
    wanted = _wanted(rule, chosen, source.depth, layers)
    for candidate in (numbers, *_candidates(rule, wanted, len(layers))):
        if {i for i in range(len(layers)) if holds(i, *candidate)} == wanted:
            return dict(zip(keys, candidate, strict=True))
    require = "require" if len(keys) > 1 else "requires"
    raise UnrepresentableError(
        f"{', '.join(keys)} {require} regular distances between layers, which the new layers break"
    )


def _wanted(rule: str, chosen: set[int], depth: int, layers: Sequence[Layer]) -> set[int]:
    if rule in ("block", "halving"):
        # A boundary stays at its original layer, however many copies precede it.
        place = {layer.source: layer.index for layer in layers if not layer.is_copy}
        place[depth] = len(layers)
        if rule == "block":
            return {place[index] for index in chosen if index in place}
        return {place[index + 1] - 1 for index in chosen if index + 1 in place}
    return {layer.index for layer in layers if layer.source in chosen}


def _candidates(rule: str, wanted: set[int], depth: int) -> Iterable[Sequence[int]]:
    sizes = range(1, depth + 2)
    if rule in ("block", "halving"):
        return ((size,) for size in sizes)
    if rule == "span":
        return ((size, min(wanted, default=depth), max(wanted, default=depth)) for size in sizes)
    return ((size, offset) for size, offset in product(sizes, repeat=2) if offset < size)


def _indexer_sharers(source: SourceConfig, layers: Sequence[Layer]) -> frozenset[int]:
    """Return the identities that must share an indexer result instead of computing one.

    An original that reuses the result of an earlier layer would otherwise get that of the identity.
    """
    rule = source.family.indexer_sharing
    entries = source.entries(rule.types_key) if rule else []
    if rule is None or not entries:
        return frozenset()
    sharers = set()
    needed = False
    for layer in reversed(layers):
        identity = is_identity(layer, source.family)
        if entries[layer.source] == rule.full:
            if needed and identity:
                sharers.add(layer.index)
            else:
                needed = False
        elif not identity:
            needed = True
    return frozenset(sharers)


def _shared_tail(
    source: SourceConfig, layers: Sequence[Layer]
) -> tuple[dict[str, int], frozenset[int]]:
    """Count the last layers that share keys and values, and find the new layers made to share."""
    rule, family = source.family.kv_sharing, source.family
    count = (source.integer(rule.count_key) or 0) if rule else 0
    if rule is None or not count:
        return {}, frozenset()
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
    tail = len(layers)
    kv_sharing_layers = set()
    for layer in reversed(layers):
        if layer.source < first:
            if layer.source not in lenders.values() or not is_identity(layer, family):
                break
            kv_sharing_layers.add(layer.index)
        tail = layer.index
    lending = {kinds[layer.source]: layer for layer in layers[:tail]}
    wrong = [layer for layer in layers[:tail] if layer.source >= first]
    if any(is_identity(layer, family) for layer in layers):
        # Each sharing layer uses the last layer of its kind before it, which must be the original.
        wrong += [
            lending[kind]
            for kind, lender in lenders.items()
            if kind in lending and (lending[kind].source != lender or lending[kind].is_copy)
        ]
    for layer in wrong:
        raise UnrepresentableError(
            f"{rule.count_key} counts the last layers, which use the keys and values of layers "
            f"{' and '.join(map(str, sorted(lenders.values())))}, so layer {layer.index} of the "
            f"result cannot be a copy of layer {layer.source}"
        )
    return {rule.count_key: len(layers) - tail}, frozenset(kv_sharing_layers)
