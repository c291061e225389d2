"""Provide typed access to `data/gguf.json`, what llama.cpp does with each architecture.

The architectures are those of the key `general.architecture`, and the names of tensors and keys are
llama.cpp's. The facts come from its source code, as xllamacpp 2026.10.11549 contains it. `make
zoo-gguf` grows models of many architectures and compares them with their bases in llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypedDict

from mergekit_interleave.architectures.family import Family, IdentityConstant, OutputNorms

DATA = Path(__file__).parent / "data" / "gguf.json"


@dataclass(frozen=True)
class Period:
    """A rule by which llama.cpp derives the kind of a layer from its index (`periods`).

    Attributes:
        length: The number of layers after which the kinds repeat; 1 if all layers are of one kind.
        first: Whether the first layer of each period is of the other kind, instead of the last.
        key: The key that states the length, if a file has it. If it is an array, it states the kind
            of each layer, and there is no period.
        depth: The only number of layers with which the rule applies.
        needs: The key without which the rule does not apply, or whose zero turns it off.
        unless: The key with which the rule does not apply.
        of_tensors: Whether the kind of a layer decides which tensors it has. Otherwise an identity
            may be of either kind.
    """

    length: int = 1
    first: bool = False
    key: str | None = None
    depth: int | None = None
    needs: str | None = None
    unless: str | None = None
    of_tensors: bool = False

    def is_other(self, index: int) -> bool:
        """Whether the layer at an index is the one of the other kind in its period."""
        return index % self.length == (0 if self.first else self.length - 1)

    def of_length(self, length: int) -> Period:
        """Return the rule with a length that a file states."""
        return replace(self, length=length)


@dataclass(frozen=True)
class Architecture:
    """The facts about one architecture. An entry holds those that are not the default.

    Attributes:
        name: Its name; the name of the entry.
        residual_writers: Substrings that match the tensors of a layer which write to the residual
            stream, and no other tensor of a layer.
        identity_constants: Substrings of the names of tensors that must also be filled to make a
            layer an identity, each with its constant.
        output_norms: The norms between the residual writers and the residual stream.
        periods: The rules by which the kind of a layer depends on its index.
        leading_counts: Keys that count the layers of a kind at the start of the model.
        pinned_counts: Keys that count layers at the start of the model that must keep their places,
            because llama.cpp adds something to each of them.
        special_depths: Numbers of layers with which llama.cpp computes something else than with
            any other number.
        depth_threshold: The number of layers from which llama.cpp expects other tensors.
        fixed_depth: Whether all layers compute something else if their number changes.
        fixed_depth_unless: The key with which they do not.
        keeps_first_layer: Whether the first layer has a role of its own, so that it must keep its
            place and cannot be copied.
        nonzero_in_last_layer: The key whose entry for the last layer must not be zero.
        refused: The reason why the architecture is not grown, a key of `reasons`.
        refused_if: Keys that refuse a model if they are not zero, each with its reason.
    """

    name: str
    residual_writers: tuple[str, ...] = ("attn_output", "ffn_down")
    identity_constants: Mapping[str, IdentityConstant] = field(default_factory=dict)
    output_norms: OutputNorms | None = None
    periods: tuple[Period, ...] = ()
    leading_counts: tuple[str, ...] = ()
    pinned_counts: tuple[str, ...] = ()
    special_depths: tuple[int, ...] = ()
    depth_threshold: int | None = None
    fixed_depth: bool = False
    fixed_depth_unless: str | None = None
    keeps_first_layer: bool = False
    nonzero_in_last_layer: str | None = None
    refused: str | None = None
    refused_if: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def family(self) -> Family:
        """The facts that zeroing needs, as a model type of transformers has them."""
        return Family(
            self.name,
            layer_prefix="blk",
            residual_writers=self.residual_writers,
            closing_factors={},
            # Such a constant is a factor for the stream.
            adds_updates=not self.identity_constants,
            identity_constants=self.identity_constants,
            output_norms=self.output_norms,
            mergekit_defined=True,
        )

    def depth_class(self, depth: int) -> object:
        """Return a value that is equal for two numbers of layers with which a layer is the same."""
        special = depth if depth in self.special_depths else None
        above = self.depth_threshold is not None and depth >= self.depth_threshold
        return special, above, depth if self.fixed_depth else None


class GgufData(TypedDict):
    """The sections of `gguf.json`.

    Attributes:
        per_layer_arrays: Keys whose arrays have one entry per block; without the architecture.
        unprefixed_per_layer_arrays: Such keys that do not begin with the architecture.
        other_arrays: Keys whose arrays have no entry per block, whatever their length.
        after_layers: The beginnings of the names of tensors that are used after the layers.
        sizes_of_first_layer: Keys of which llama.cpp uses the entry of the first layer for others.
        file_types: The names of the quantizations, by the number under `general.file_type`.
        reasons: The reasons to refuse a model, by the names that architectures use.
        architectures: The architectures by name, with the keys below that differ from their
            defaults.
    """

    per_layer_arrays: list[str]
    unprefixed_per_layer_arrays: list[str]
    other_arrays: list[str]
    after_layers: list[str]
    sizes_of_first_layer: list[str]
    file_types: dict[str, str]
    reasons: dict[str, str]
    architectures: dict[str, dict[str, Any]]


@cache
def _data() -> GgufData:
    data: GgufData = json.loads(DATA.read_text(encoding="utf-8"))
    return data


def known_architectures() -> tuple[str, ...]:
    """Return the architectures in the data."""
    return tuple(_data()["architectures"])


@cache
def architecture_of(name: str) -> Architecture | None:
    """Return what is known of an architecture, or None if it is not in the data."""
    entry = _data()["architectures"].get(name)
    if entry is None:
        return None
    known = dict(entry)
    if "output_norms" in known:
        norms = known["output_norms"]
        optional = tuple(norms.get("optional_names", ()))
        known["output_norms"] = OutputNorms(tuple(norms["names"]), optional)
    if "periods" in known:
        known["periods"] = [Period(**rule) for rule in known["periods"]]
    lists = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return Architecture(name, **{**known, **lists})


def reason(name: str) -> str:
    """Return the text of a reason to refuse a model."""
    return _data()["reasons"][name]


def file_type(number: object) -> str | None:
    """Return the name of a quantization, or None if its number is unknown."""
    return _data()["file_types"].get(str(number))


def unknown_family(name: str) -> Family:
    """Return the facts that are assumed of the layers of an unknown architecture: no writers."""
    return Family(
        name, layer_prefix="blk", residual_writers=(), closing_factors={}, mergekit_defined=True,
        is_unknown=True,
    )  # fmt: skip


def per_layer_arrays() -> frozenset[str]:
    """Return the keys whose arrays have one entry per block; without the architecture."""
    data = _data()
    return frozenset((*data["per_layer_arrays"], *data["unprefixed_per_layer_arrays"]))


def other_arrays() -> frozenset[str]:
    """Return the keys whose arrays have no entry per block; without the architecture."""
    return frozenset(_data()["other_arrays"])


def after_layers() -> tuple[str, ...]:
    """Return the beginnings of the names of tensors that are used after the layers."""
    return tuple(_data()["after_layers"])


def sizes_of_first_layer() -> tuple[str, ...]:
    """Return the keys of which llama.cpp uses the entry of the first layer for others."""
    return tuple(_data()["sizes_of_first_layer"])


def entry_keys() -> frozenset[str]:
    """Return the keys that an entry of an architecture may have."""
    return frozenset(item.name for item in fields(Architecture)) - {"name"}
