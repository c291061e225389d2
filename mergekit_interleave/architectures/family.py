"""Provide typed access to `data/architectures.json`, the facts about each model type.

The docstrings below document every key of that file. `data/README.md` is generated from them, and
tests check the file against the types here. The file is read lazily, because `gen` must start fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict

MergekitResult = Literal["exact", "config", "tensors"]

EXACT: MergekitResult = "exact"
BROKEN_CONFIG: MergekitResult = "config"
WRONG_TENSORS: MergekitResult = "tensors"
"""The result of plain `mergekit-yaml`: the right model, a wrong config.json, or wrong tensors."""


@dataclass(frozen=True)
class OutputNorms:
    """The norms between a layer's projections and the residual stream (`output_norms`).

    Attributes:
        names: Substrings of the names of their weights.
        optional_names: Substrings of the names of further norms, which some models or layers lack.
        closed_value: The weight with which the norm outputs zero: 0, or -1 if the model multiplies
            by 1 + weight.
        types_key: The per-layer list that shows which layers have these norms; without it, all do.
        types: The entries of that list for the layers that have these norms.
    """

    names: tuple[str, ...]
    optional_names: tuple[str, ...] = ()
    closed_value: float = 0.0
    types_key: str | None = None
    types: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """`names` and `optional_names`."""
        return self.names + self.optional_names


@dataclass(frozen=True)
class IndexerSharing:
    """Layers that reuse the indexer result of an earlier layer (`indexer_sharing`).

    Attributes:
        types_key: The per-layer list that shows which layers compute and which reuse a result.
        full: The entry for a layer that computes a result.
        shared: The entry for a layer that reuses the result of the last computing layer.
        absent_tensors: Substrings of the names of the tensors that a reusing layer lacks.
    """

    types_key: str
    full: str
    shared: str
    absent_tensors: tuple[str, ...]


@dataclass(frozen=True)
class KVSharing:
    """The last layers, if they reuse keys and values of earlier ones (`kv_sharing`).

    Each of them reuses those of an earlier layer of its type.

    Attributes:
        count_key: The key that states the number of these layers.
        types_key: The per-layer list of layer types.
        absent_tensors: Substrings of the names of the tensors that these layers lack.
        double_wide_key: The key that, if true, makes the MLP of these layers twice as wide.
        double_wide_tensors: Substrings of the names of the tensors that are then twice as wide,
            each with the axis that is doubled.
    """

    count_key: str
    types_key: str
    absent_tensors: tuple[str, ...]
    double_wide_key: str | None = None
    double_wide_tensors: Mapping[str, int] = field(default_factory=dict)

    def widened(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        """Return the tensors that are twice as wide in these layers, each with the doubled axis."""
        is_wide = self.double_wide_key and config.get(self.double_wide_key)
        return self.double_wide_tensors if is_wide else {}


@dataclass(frozen=True)
class ConfigFacts:
    """The keys of a type's config.json that depend on the number or the order of its layers.

    `a.b` means key b of the mapping a.

    Attributes:
        depth: The keys that state the number of layers.
        encoder_depth: Keys that must also state the number of layers, because the decoder is saved
            without its encoder and its cache is sized by the encoder's depth.
        depth_list: The list whose length is the number of layers, if no key states it.
        depth_multiples: Keys that state a multiple of the number of layers.
        per_layer_lists: Lists with one entry per layer. If config.json lacks one, the config class
            of transformers computes it.
        optional_per_layer_lists: Lists (or strings of one letter per layer) with one entry per
            layer that have no effect if config.json lacks them.
        cyclic_lists: Whether a list of `per_layer_lists` may have fewer entries than there are
            layers, and is then repeated.
        layer_indices: Lists of layer indices.
        layer_indices_from_1: Lists of layer indices that count from 1.
        original_indices: Lists of layer indices that never name a new layer.
        original_indices_from_1: Lists of layer indices that count from 1 and never name a new
            layer.
        run_length_lists: Keys that hold a list of `per_layer_lists` in the form
            [[[type], count], ...], each with the key of that list.
        leading_counts: Keys that count the layers of a type at the start of the model.
        fallback_leading_counts: Keys that count such layers only if there is no per-layer list;
            they stay unchanged if the grown model has no such count.
        uses_decoder_sparse_step: Whether decoder_sparse_step and mlp_only_layers determine which
            layers are dense.
        periodic_rules: Rules that place layers at regular distances, each as [rule, key, ...]. For
            layer i: `offset`, i % period == offset; `span`, every interval-th layer from start to
            end; `block`, a block starts at each multiple of size; `halving`, the stream is halved
            after every size layers; `every`, each size-th layer.
        uses_scale_depth: Whether residuals are scaled by scale_depth / sqrt(number of layers).
    """

    depth: tuple[str, ...] = ("num_hidden_layers",)
    encoder_depth: tuple[str, ...] = ()
    depth_list: str | None = None
    depth_multiples: tuple[str, ...] = ()
    per_layer_lists: tuple[str, ...] = ()
    optional_per_layer_lists: tuple[str, ...] = ()
    cyclic_lists: bool = False
    layer_indices: tuple[str, ...] = ()
    layer_indices_from_1: tuple[str, ...] = ()
    original_indices: tuple[str, ...] = ()
    original_indices_from_1: tuple[str, ...] = ()
    run_length_lists: Mapping[str, str] = field(default_factory=dict)
    leading_counts: tuple[str, ...] = ()
    fallback_leading_counts: tuple[str, ...] = ()
    uses_decoder_sparse_step: bool = False
    periodic_rules: tuple[tuple[str, ...], ...] = ()
    uses_scale_depth: bool = False

    def layer_keys(self) -> tuple[str, ...]:
        """Return all these keys, which a new list of layers changes."""
        return (
            *self.depth,
            *self.encoder_depth,
            *self._list_keys,
            *self.depth_multiples,
            *self.leading_counts,
            *self.fallback_leading_counts,
            *(("decoder_sparse_step",) if self.uses_decoder_sparse_step else ()),
            *(key for _, *keys in self.periodic_rules for key in keys),
            *(("scale_depth",) if self.uses_scale_depth else ()),
            "layer_types",
            "per_layer_config",
        )

    @property
    def changes_weights(self) -> bool:
        """Whether the class divides weights in place when it runs, which halves its stream."""
        return any(rule == "halving" for rule, *_ in self.periodic_rules)

    @property
    def lists(self) -> frozenset[str]:
        """The keys that hold a list about single layers, without the keys that lead to them."""
        return frozenset(key.rpartition(".")[2] for key in self._list_keys)

    @property
    def _list_keys(self) -> tuple[str, ...]:
        return (
            *((self.depth_list,) if self.depth_list else ()),
            *self.per_layer_lists,
            *self.optional_per_layer_lists,
            *self.layer_indices,
            *self.layer_indices_from_1,
            *self.original_indices,
            *self.original_indices_from_1,
            *self.run_length_lists,
            *(("mlp_only_layers",) if self.uses_decoder_sparse_step else ()),
        )


class _ConstantValue(TypedDict):
    value: float


class IdentityConstant(_ConstantValue, total=False):
    """The constant that a tensor of an identity layer is filled with (`identity_constants`).

    Attributes:
        value: The constant.
        after: The key of config.json that states how many leading rows keep their values.
        square: The key of config.json that states n; the last n * n rows are filled as a flattened
            n x n matrix with `value` on its diagonal and 0 elsewhere.
    """

    after: str
    square: str


@dataclass(frozen=True)
class Family:
    """The facts about one model type. An entry of `families` holds those that are not the default.

    Attributes:
        model_type: The `model_type` of config.json; the name of the entry.
        facts: The keys of config.json that depend on the layers; an entry holds them next to its
            other keys.
        layer_prefix: The part before the layer index in tensor names.
        parallel_prefixes: Further prefixes of tensors that are indexed by layer, each with the
            offset to add to its index to get the layer index.
        never_copied: Substrings of the names of tensors that copies of a layer do not get.
        per_layer_blocks: Substrings of the names of tensors outside the layers that hold one block
            per layer, each with the axis along which the blocks are stored.
        required_buffer: A substring of the name of a buffer that is derived from the layer index. A
            checkpoint without it cannot be grown, because transformers would recompute the buffer.
        has_mtp_layers: Whether tensors with an index past the last layer belong to a multi-token
            prediction head, whose index increases with the depth.
        residual_writers: Substrings that match the weights which write to the residual stream, and
            no other tensor. If all these weights are zero, the layer is an identity, and each
            weight still gets gradients. The substrings must match the names in checkpoints and in
            memory, which may differ.
        closing_factors: The modules whose zero makes the input of a residual writer zero, by the
            last component of the writer's name. They are its neighbours: the factors of a gated
            MLP, and the values of an attention. A layer whose writers have zero input is an
            identity too, if the writers have no bias.
        adds_updates: Whether all that a layer does to the residual stream is to add the outputs of
            its residual writers or output norms, so that `damped` can divide them. It is false if a
            layer has a factor for the stream, several streams, or norms after some writers only.
        identity_constants: Substrings of the names of tensors that must also be filled to make a
            layer an identity, each with its constant.
        output_norms: The norms between projections and residual stream. `zero: norms` makes them
            output zero, because zeroed projections would take large first steps in training.
        indexer_sharing: Layers that reuse the indexer result of an earlier layer.
        kv_sharing: The last layers, if they reuse keys and values of earlier layers.
        irregular_layers: `first` or `last`, if the tensors of that layer differ from the rest, so
            that it must keep its place and cannot be copied.
        mergekit_yaml_result: The result of plain `mergekit-yaml` for the recipe of `gen`: `exact`,
            a wrong `config`, or wrong `tensors`. `make zoo` measures and writes it.
        mergekit_drops: Keys of config.json that, if true, add tensors that mergekit drops.
        own_code: Whether the class is not part of transformers but of the checkpoint.
        is_unknown: Whether the type is unknown, so that its result must be measured.
        refused: The reason why the type is not expanded, a key of `reasons`.
        refused_if: Keys of config.json that, if true, refuse the model, each with its reason.
        refused_unless: Keys of config.json that must have a value, each with [value, reason]; a
            missing key counts as the value.
        mergekit_defined: Whether mergekit has a definition of the type that lists the tensors after
            the layers. Otherwise it takes them from the first slice, like those before the layers.
        before_layers: The tensors that are used before the layers: the embeddings first. `make zoo`
            measures and writes them.
        after_layers: The tensors that are used after the layers: the final norm and the head.
            `make zoo` measures and writes them.
        never_loaded: Substrings of the names of tensors in old checkpoints that no model loads.
        composite: Whether the language model is part of a larger model, for images or sound.
        mergekit_modules: For a composite: see `composites`.
        llama_cpp_periods: The lists of layer kinds that llama.cpp does not read, each as [period,
            entry]: llama.cpp takes layer i to be of the kind `entry` if (i + 1) is a multiple of
            the period, and only then. The period is a number, or the key of config.json that
            states it. In a list of layer indices, the entry of a listed layer is true. `make
            clients` measures them.
        llama_cpp_depth: The only number of layers with which llama.cpp distinguishes layer kinds.
        llama_cpp_constants: The keys of config.json that llama.cpp does not read, each with the
            value that it uses.
        deepstack: For a composite: see `composites`.
    """

    model_type: str
    facts: ConfigFacts = ConfigFacts()
    layer_prefix: str = "model.layers"
    parallel_prefixes: Mapping[str, int] = field(default_factory=dict)
    never_copied: tuple[str, ...] = ()
    per_layer_blocks: Mapping[str, int] = field(default_factory=dict)
    required_buffer: str | None = None
    has_mtp_layers: bool = False
    residual_writers: tuple[str, ...] = ("o_proj", "down_proj")
    closing_factors: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "down_proj": ("gate_proj", "up_proj"),
            "o_proj": ("v_proj",),
            "w2": ("w1", "w3"),
        }
    )
    adds_updates: bool = True
    identity_constants: Mapping[str, IdentityConstant] = field(default_factory=dict)
    output_norms: OutputNorms | None = None
    indexer_sharing: IndexerSharing | None = None
    kv_sharing: KVSharing | None = None
    irregular_layers: tuple[Literal["first", "last"], ...] = ()
    mergekit_yaml_result: MergekitResult = WRONG_TENSORS
    mergekit_drops: tuple[str, ...] = ()
    own_code: bool = False
    is_unknown: bool = False
    refused: str | None = None
    refused_if: Mapping[str, str] = field(default_factory=dict)
    refused_unless: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    mergekit_defined: bool = False
    before_layers: tuple[str, ...] = ()
    after_layers: tuple[str, ...] = ()
    never_loaded: tuple[str, ...] = ()
    composite: bool = False
    mergekit_modules: Mapping[str, int | str | None] = field(default_factory=dict)
    deepstack: str | None = None
    llama_cpp_periods: Mapping[str, tuple[int | str, object]] = field(default_factory=dict)
    llama_cpp_depth: int | None = None
    llama_cpp_constants: Mapping[str, float] = field(default_factory=dict)

    def writes(self, tensor: str) -> bool:
        """Whether a layer's tensor writes to the residual stream."""
        return any(name in tensor for name in self.residual_writers)

    def is_loaded(self, tensor: str) -> bool:
        """Whether models of this family load the tensor."""
        return not any(part in tensor for part in self.never_loaded)

    def has_output_norms(self, tensors: Iterable[str]) -> bool:
        """Whether these tensors of a layer include all norms of `output_norms.names`."""
        tensors = list(tensors)
        return self.output_norms is not None and all(
            any(name in tensor for tensor in tensors) for name in self.output_norms.names
        )

    def mergekit_result(self, config: Mapping[str, Any]) -> MergekitResult:
        """Return the result of plain `mergekit-yaml` for a model with this config.json."""
        drops = any(config.get(key) for key in self.mergekit_drops)
        return WRONG_TENSORS if drops else self.mergekit_yaml_result

    def reason_to_refuse(self, config: Mapping[str, Any]) -> str | None:
        """Return why a model with this config.json cannot be expanded exactly; None if it can."""
        reasons = [self.refused]
        reasons += [why for key, why in self.refused_if.items() if config.get(key)]
        reasons += [why for key, (v, why) in self.refused_unless.items() if config.get(key, v) != v]
        return next((_data()["reasons"][why] for why in reasons if why is not None), None)


class Composite(TypedDict, total=False):
    """A model that contains a language model and other models, for images or sound.

    Attributes:
        family: The family of its language model, if the nested config has no `model_type`.
        mergekit_yaml_result: As in a family, for the whole model.
        mergekit_modules: The modules into which mergekit divides the model, each with its number of
            layers or the key of config.json that states it; null for the language model. Omitted
            if mergekit has no modules for the type.
        deepstack: The list in config.json whose length is the number of first layers after which
            image features are added. These layers must keep their indices.
    """

    family: str
    mergekit_yaml_result: MergekitResult
    mergekit_modules: dict[str, int | str | None]
    deepstack: str


class QuantizationRule(TypedDict, total=False):
    """The rule by which a quantization method stores a projection that is zero.

    A tensor that no pattern matches is zeroed if it has plain floats, and refused otherwise.

    Attributes:
        zero: A regular expression for the names of the tensors to fill with the byte for zero.
        scale: A regular expression for the names of scales that are zeroed only if the weight's
            codes are integers, whose zero byte may mean another number.
        keep: A regular expression for the names of their companion tensors that stay unchanged.
        codes: The bytes for zero if not 0, by suffix. Each applies if a tensor exists whose name is
            that of the zeroed tensor plus the suffix.
    """

    zero: str
    scale: str
    keep: str
    codes: dict[str, int]


class ArchitectureData(TypedDict):
    """The sections of `architectures.json`.

    Attributes:
        assumed_family: The family whose tensor names are assumed for an unknown model type.
        depth_keys: The keys that may state the number of layers in any config.json.
        nested_configs: The keys under which the config.json of a composite holds the config of its
            language model.
        composite_layer_prefixes: The possible parts before the layer index in tensor names of a
            composite.
        standard_layer_tensors: The tensors of a Llama layer, without `.weight` or `.bias`. `zero:
            auto` refuses an unknown type with other tensors, because they may write to the
            residual stream.
        composites: The composites, by model type.
        nonzero_at_zero: The activation functions of transformers that are not zero at zero.
        not_per_layer: Keys of JSON files whose lists do not have one entry per layer, whatever
            their length.
        quantized: The quantization methods, by the `quant_method` of config.json.
        reasons: The reasons to refuse a model, by the names that families use.
        families: The model types by name, with the keys below that differ from their defaults.
    """

    assumed_family: str
    depth_keys: list[str]
    nested_configs: list[str]
    composite_layer_prefixes: list[str]
    standard_layer_tensors: list[str]
    composites: dict[str, Composite]
    nonzero_at_zero: list[str]
    not_per_layer: list[str]
    quantized: dict[str, QuantizationRule]
    reasons: dict[str, str]
    families: dict[str, dict[str, Any]]


DATA = Path(__file__).parent / "data" / "architectures.json"


@cache
def _data() -> ArchitectureData:
    # importlib.resources would add a tenth to the start-up time.
    data: ArchitectureData = json.loads(DATA.read_text(encoding="utf-8"))
    return data


def quantized(method: str) -> QuantizationRule | None:
    """Return how a quantization method stores zeros, or None if the method is unknown."""
    return _data()["quantized"].get(method)


def not_per_layer() -> tuple[str, ...]:
    """Return the keys of JSON files whose lists do not have one entry per layer."""
    return tuple(_data()["not_per_layer"])


def known_types() -> tuple[str, ...]:
    """Return the model types in the data."""
    return tuple(_data()["families"])


@cache
def family_of(model_type: str) -> Family | None:
    """Return the family of a model type, or None if the type is not in the data."""
    entry = _data()["families"].get(model_type)
    if entry is None:
        return None
    known = {key: _frozen(key, value) for key, value in entry.items()}
    keys = {item.name for item in fields(ConfigFacts)}
    facts = ConfigFacts(**{key: known.pop(key) for key in keys & known.keys()})
    return Family(model_type=model_type, facts=facts, **known)


_OBJECTS = {
    "output_norms": OutputNorms,
    "indexer_sharing": IndexerSharing,
    "kv_sharing": KVSharing,
}


@cache
def may_be_outside(part: str | None) -> bool:
    """Whether a substring occurs in the name of a tensor outside the layers of any known type.

    Args:
        part: The substring; None matches every name.
    """
    families = filter(None, map(family_of, known_types()))
    names = {name for f in families for name in (*f.before_layers, *f.after_layers)}
    return part is None or any(part in name for name in names)


def _frozen(key: str, value: Any) -> Any:
    """Convert a value of the data file to the types of the classes above."""
    if isinstance(value, list):
        return tuple(_frozen("", entry) for entry in value)
    if isinstance(value, dict):
        entries = {name: _frozen("", entry) for name, entry in value.items()}
        return _OBJECTS[key](**entries) if key in _OBJECTS else entries
    return value


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """Return the family of the model type in a config.json, or None if it is not in the data.

    A composite belongs to the family of its language model.
    """
    family = _family_of_config(config)
    activations = {
        value
        for key, value in layer_config(config).items()
        if "act" in key and isinstance(value, str)
    }
    if family is not None and not activations.isdisjoint(_data()["nonzero_at_zero"]):
        return replace(family, closing_factors={})
    return family


def _family_of_config(config: Mapping[str, Any]) -> Family | None:
    model_type = str(config.get("model_type") or "")
    composite = _data()["composites"].get(model_type)
    if composite is None:
        return family_of(model_type)
    nested = nested_config(config)
    text_type = config[nested].get("model_type") if nested else None
    family = family_of(str(text_type or composite["family"]))
    return family and replace(
        family,
        model_type=model_type,
        mergekit_yaml_result=composite.get("mergekit_yaml_result", WRONG_TENSORS),
        mergekit_modules=composite.get("mergekit_modules", {}),
        mergekit_defined="mergekit_modules" in composite,
        deepstack=composite.get("deepstack"),
        composite=True,
    )


def nested_config(config: Mapping[str, Any]) -> str | None:
    """Return the key under which a config.json describes the layers; None means the top level."""
    nested = _data()["nested_configs"]
    return next((key for key in nested if isinstance(config.get(key), Mapping)), None)


def layer_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the layers."""
    nested = nested_config(config)
    part: Mapping[str, Any] = config[nested] if nested else config
    return part


def stated(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key of a config.json; `a.b` is key b of the mapping a."""
    outer, _, inner = key.partition(".")
    value = config.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else value


def depth_keys() -> tuple[str, ...]:
    """Return the keys that may state the number of layers in any config.json."""
    return tuple(_data()["depth_keys"])


def composite_layer_prefixes() -> tuple[str, ...]:
    """Return the possible parts before the layer index in tensor names of a composite."""
    return tuple(_data()["composite_layer_prefixes"])


def unknown_family(model_type: str, config: Mapping[str, Any], layers: str) -> Family:
    """Return the family that is assumed for a model type that is not in the data.

    Args:
        model_type: The type.
        config: The part of its config.json that describes the layers.
        layers: The part before the layer index in its tensor names.
    """
    depth = next((key for key in depth_keys() if config.get(key) is not None), "")
    writers = assumed_family().residual_writers
    facts = ConfigFacts(depth=(depth,))
    return Family(model_type, facts, layers, residual_writers=writers, is_unknown=True)


def is_standard_tensor(tensor: str) -> bool:
    """Whether a Llama layer has a tensor of this name, given without its layer prefix."""
    return tensor.rpartition(".")[0] in _data()["standard_layer_tensors"]


def assumed_family() -> Family:
    """Return the family whose tensor names are assumed for an unknown model type."""
    family = family_of(_data()["assumed_family"])
    if family is None:
        raise TypeError("the assumed family is missing from the data")
    return family


def depth_of(config: Mapping[str, Any], family: Family | None = None) -> object:
    """Return the number of layers that a config.json states, or None if it states none.

    Args:
        config: The part of the config.json that describes the layers.
        family: The model's family, if it is known.
    """
    if family is not None and family.facts.depth_list:
        entries = config.get(family.facts.depth_list)
        if entries:
            return len(entries)
    keys = (*(family.facts.depth if family else ()), *depth_keys())
    return next((config[key] for key in keys if config.get(key) is not None), None)
