"""What is known of a model family, read from `data/architectures.json`.

The facts are data; a test derives them again from the models that transformers builds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class OutputNorms:
    """The norms between a layer's projections and the residual stream.

    Attributes:
        names: Parts of the names of their weights.
        also: Parts of the names of those that not every model of the type has.
        value: The weight with which such a norm lets nothing pass.
        key: The list that tells which layers have them, where not all have.
        kinds: Its entries for those that do.
    """

    names: tuple[str, ...]
    also: tuple[str, ...] = ()
    value: float = 0.0
    key: str | None = None
    kinds: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """`names` and `also`."""
        return self.names + self.also


@dataclass(frozen=True)
class Lending:
    """Layers that use what an earlier layer computed, by a list that says which.

    Attributes:
        list: The key of the list.
        lend: Its entry for a layer that computes.
        borrow: Its entry for a layer that uses what the last one computed.
        without: Parts of the names of the tensors that a borrowing layer does not have.
    """

    list: str
    lend: str
    borrow: str
    without: tuple[str, ...]


@dataclass(frozen=True)
class SharedTail:
    """The last layers use keys and values of the last layer of their kind before them.

    Attributes:
        count: The key that says how many layers do.
        kinds: The key of the list of kinds.
        without: Parts of the names of the tensors that these layers do not have.
        wide_when: The key that says that these layers are twice as wide inside.
        wide: Parts of the names of the tensors that are, and along which axis.
    """

    count: str
    kinds: str
    without: tuple[str, ...]
    wide_when: str | None = None
    wide: Mapping[str, int] = field(default_factory=dict)

    def widened(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        """The tensors that are twice as wide in these layers, and along which axis."""
        return self.wide if self.wide_when and config.get(self.wide_when) else {}


@dataclass(frozen=True)
class ConfigFacts:
    """Where the config.json of a model type speaks of single layers, and of how many there are.

    `a.b` is key b of the mapping a.

    Attributes:
        depth: The keys that state the number of layers.
        depth_alone: Keys that must state it too where a decoder stands without its encoder.
        depth_list: The list whose length is the number of layers, where no key counts.
        multiples: Keys that state a multiple of it.
        per_layer_lists: Keys that hold one entry for each layer, computed by transformers where
            they are absent.
        lists_if_given: Keys that do, and are nothing where they are absent. A string has a letter
            for each layer.
        cycled: Whether `per_layer_lists` may be shorter, and are then repeated over the layers.
        indices: Keys that hold the indices of certain layers.
        indices_from_1: Keys that do, and count from 1.
        originals_from_1: Keys that do, and of which new layers are none.
        spelled_runs: Keys that hold a list of `per_layer_lists` as runs: [[[kind], count], ...].
        leading_counts: Keys that state how many layers at the start are of a kind.
        first_default: Keys that do where no list says it.
        dense_steps: Whether dense layers are placed by decoder_sparse_step and mlp_only_layers.
        periods: Rules that place layers at regular distances: the name by which `placement` knows
            the rule, and the keys of its numbers.
        scale_depth: Whether the residual is scaled by scale_depth over the root of the depth.
    """

    depth: tuple[str, ...] = ("num_hidden_layers",)
    depth_alone: tuple[str, ...] = ()
    depth_list: str | None = None
    multiples: tuple[str, ...] = ()
    per_layer_lists: tuple[str, ...] = ()
    lists_if_given: tuple[str, ...] = ()
    cycled: bool = False
    indices: tuple[str, ...] = ()
    indices_from_1: tuple[str, ...] = ()
    originals_from_1: tuple[str, ...] = ()
    spelled_runs: Mapping[str, str] = field(default_factory=dict)
    leading_counts: tuple[str, ...] = ()
    first_default: tuple[str, ...] = ()
    dense_steps: bool = False
    periods: tuple[Sequence[str], ...] = ()
    scale_depth: bool = False


EXACT, BROKEN_CONFIG, WRONG_TENSORS = "exact", "config", "tensors"
"""What plain `mergekit-yaml` makes of a recipe."""


@dataclass(frozen=True)
class Family:
    """What is known of one model type.

    Attributes:
        model_type: Its name in config.json.
        facts: Where its config.json speaks of layers.
        layers: What stands before the layer index in a tensor's name.
        beside: What stands before an index that goes with the layers, elsewhere in the model, and
            by how much the layer's own index is higher.
        first_only: Parts of the names of tensors that no copy of a layer has.
        packed: Parts of the names of tensors outside the layers that hold a block for each, and
            along which axis.
        needed: A part of a tensor's name without which a checkpoint would be computed anew from
            the indices of its layers.
        has_mtp_layers: Whether tensors of layers past the last are those of a head that predicts
            several tokens, which moves on with the depth.
        residual_writers: The parts of tensor names that match the residual writers of a layer and
            no other tensor of the model. Zeroing them all makes the layer an identity, and each
            still gets gradients.
        constants: What must be filled besides, so that it does: for each part of a name, the
            `value`, and, where only a part of the tensor is filled, the key of config.json that
            states `after` or `square`; see `layout.Constant`.
        output_norms: The norms that can be closed instead of zeroing what they follow, where there
            are such norms: they make zeroed projections take large first steps.
        lending: Layers that use what earlier ones computed.
        shared_tail: Last layers that use keys and values of earlier ones.
        irregular_layers: `first` or `last`, where that layer has tensors unlike all others, so that
            there can be no copy of it.
        mergekit_yaml_result: What `mergekit-yaml` alone makes of the recipe; where it was not
            measured, it is not trusted.
        mergekit_loses: Keys of config.json that give the model tensors which mergekit loses.
        measured: Whether nothing is known of the type, so that its result must be measured.
        refused: Why no layer of the type can be copied exactly, if none can.
        unless: Keys of config.json that make it so where they are true.
        when: Keys that make it so where they have not this value.
        before_layers: The tensors that come before the layers, the embeddings.
        after_layers: The tensors that come after them, the final norm and the head.
        never_loaded: Parts of the names of tensors that old checkpoints hold and no model loads.
        must_agree: What two models must agree in for their layers to be stacked: keys of
            config.json with the value that a missing key stands for; None where stacking several
            models of the type is not known to be exact.
        composite: Whether it is one model among others, of images or sounds.
        modules: What mergekit calls these, and how many layers each has, or the key that says so;
            None for the one that is grown.
        deepstack: The list as many as whose entries layers at the start take features of images.
    """

    model_type: str
    facts: ConfigFacts = ConfigFacts()
    layers: str = "model.layers"
    beside: Mapping[str, int] = field(default_factory=dict)
    first_only: tuple[str, ...] = ()
    packed: Mapping[str, int] = field(default_factory=dict)
    needed: str | None = None
    has_mtp_layers: bool = False
    residual_writers: tuple[str, ...] = ("o_proj", "down_proj")
    constants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    output_norms: OutputNorms | None = None
    lending: Lending | None = None
    shared_tail: SharedTail | None = None
    irregular_layers: tuple[str, ...] = ()
    mergekit_yaml_result: str = WRONG_TENSORS
    mergekit_loses: tuple[str, ...] = ()
    measured: bool = False
    refused: str | None = None
    unless: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    before_layers: tuple[str, ...] = ()
    after_layers: tuple[str, ...] = ()
    never_loaded: tuple[str, ...] = ()
    must_agree: Mapping[str, object] | None = None
    composite: bool = False
    modules: Mapping[str, int | str | None] = field(default_factory=dict)
    deepstack: str | None = None

    def writes(self, tensor: str) -> bool:
        """Whether a tensor of a layer is a residual writer."""
        return any(name in tensor for name in self.residual_writers)

    def is_loaded(self, tensor: str) -> bool:
        """Whether a model of this family loads the tensor at all."""
        return not any(part in tensor for part in self.never_loaded)

    def has_output_norms(self, tensors: Iterable[str]) -> bool:
        """Whether a layer of these tensors has the norms that `gains` tells of, all of them."""
        tensors = list(tensors)
        return self.output_norms is not None and all(
            any(name in tensor for tensor in tensors) for name in self.output_norms.names
        )

    def verdict(self, config: Mapping[str, Any]) -> str:
        """What `mergekit-yaml` alone makes of a model with this config.json."""
        lost = any(config.get(key) for key in self.mergekit_loses)
        return WRONG_TENSORS if lost else self.mergekit_yaml_result

    def reason_to_refuse(self, config: Mapping[str, Any]) -> str | None:
        """Why a model with this config.json cannot be expanded exactly, if it cannot."""
        reasons = [self.refused]
        reasons += [why for key, why in self.unless.items() if config.get(key)]
        reasons += [why for key, (v, why) in self.when.items() if config.get(key, v) != v]
        return next((_facts()["reasons"][why] for why in reasons if why is not None), None)


@cache
def _facts() -> dict[str, Any]:
    # importlib.resources would be a tenth of the start-up time.
    file = Path(__file__).parent / "data" / "architectures.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def quantized(method: str) -> dict[str, Any] | None:
    """How a quantizer stores a zero, if it is known; see `quantization`."""
    rules: dict[str, Any] | None = _facts()["quantized"].get(method)
    return rules


def known_types() -> tuple[str, ...]:
    """The model types that something is known of."""
    return tuple(_facts()["families"])


@cache
def family_of(model_type: str) -> Family | None:
    """What is known of a model type, if anything is."""
    own = _facts()["families"].get(model_type)
    if own is None:
        return None
    known = {key: _frozen(key, value) for key, value in own.items()}
    keys = {item.name for item in fields(ConfigFacts)}
    facts = ConfigFacts(**{key: known.pop(key) for key in keys & known.keys()})
    return Family(model_type=model_type, facts=facts, **known)


_OBJECTS = {"output_norms": OutputNorms, "lending": Lending, "shared_tail": SharedTail}


@cache
def may_be_outside(part: str | None) -> bool:
    """Whether a part of a tensor's name may speak of a tensor outside the layers, of any type.

    Args:
        part: The part; None is all of any name.
    """
    families = filter(None, map(family_of, known_types()))
    names = {name for f in families for name in (*f.before_layers, *f.after_layers)}
    return part is None or any(part in name for name in names)


def _frozen(key: str, value: Any) -> Any:
    """A value of the data file as the classes above hold it."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        entries = {name: _frozen("", entry) for name, entry in value.items()}
        return _OBJECTS[key](**entries) if key in _OBJECTS else entries
    return value


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """What is known of the model type that a config.json states, if anything is.

    A model that holds a language model among others is of the language model's family.
    """
    model_type = str(config.get("model_type") or "")
    composite = _facts()["composites"].get(model_type)
    if composite is None:
        return family_of(model_type)
    nested = nested_config(config)
    text_type = config[nested].get("model_type") if nested else None
    family = family_of(str(text_type or composite["family"]))
    return family and replace(
        family,
        model_type=model_type,
        mergekit_yaml_result=composite.get("mergekit_yaml_result", WRONG_TENSORS),
        modules=composite.get("modules", {}),
        deepstack=composite.get("deepstack"),
        must_agree=None,
        composite=True,
    )


def nested_config(config: Mapping[str, Any]) -> str | None:
    """The key of the part of a config.json that speaks of the layers, None where all of it does."""
    nested = _facts()["nested_configs"]
    return next((key for key in nested if isinstance(config.get(key), Mapping)), None)


def layer_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that speaks of the layers."""
    nested = nested_config(config)
    part: Mapping[str, Any] = config[nested] if nested else config
    return part


def stated(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key of a config.json, or of a key of a mapping in it: `a.b`."""
    outer, _, inner = key.partition(".")
    value = config.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else value


def depth_keys() -> tuple[str, ...]:
    """The keys by which any config.json may state its number of layers."""
    return tuple(_facts()["depth_keys"])


def other_stacks() -> tuple[str, ...]:
    """What may stand before a layer's index where a language model is one of several."""
    return tuple(_facts()["stacks"])


def unknown_family(model_type: str, config: Mapping[str, Any], layers: str) -> Family:
    """What is assumed of a model type of which nothing is known.

    Args:
        model_type: Its name.
        config: The part of its config.json that speaks of the layers.
        layers: What stands before the layer index in the names of its tensors.
    """
    depth = next((key for key in depth_keys() if config.get(key) is not None), "")
    facts = ConfigFacts(depth=(depth,))
    return Family(
        model_type, facts, layers, residual_writers=assumed_family().residual_writers, measured=True
    )


def is_plain(tensor: str) -> bool:
    """Whether a Llama's layer has a tensor of this name, without what stands before the layer."""
    return tensor.rpartition(".")[0] in _facts()["plain"]


def assumed_family() -> Family:
    """The family whose names are taken where the model's own is not known."""
    family = family_of(_facts()["assumed"])
    if family is None:
        raise TypeError("the assumed family is one of the known ones")
    return family


def depth_of(config: Mapping[str, Any], family: Family | None = None) -> object:
    """The layer count that a config.json states, None where it states none.

    Args:
        config: The config, or the part of it that speaks of the layers.
        family: The model's family, if it is known.
    """
    if family is not None and family.facts.depth_list:
        entries = config.get(family.facts.depth_list)
        if entries:
            return len(entries)
    keys = (*(family.facts.depth if family else ()), *depth_keys())
    return next((config[key] for key in keys if config.get(key) is not None), None)
