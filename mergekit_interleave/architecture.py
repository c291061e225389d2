"""What is known of a model family, read from `data/architectures.json`.

The facts are data; a test derives them again from the models that transformers builds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout import Layout, Scales, scale_of


@dataclass(frozen=True)
class Family:
    """What is known of one model type.

    Attributes:
        model_type: Its name in config.json.
        layers: What stands before the layer index in a tensor's name.
        zero: The parts of tensor names that match the residual writers of a layer and no other
            tensor of the model. Zeroing them all makes the layer an identity, and each still
            gets gradients.
        depth: The keys of config.json that state the number of layers.
        lists: Keys that hold one entry for each layer, computed by transformers where they are
            absent.
        cycled: Whether `lists` may be shorter, and are then repeated over the layers.
        indices: Keys that hold the indices of certain layers.
        first: Keys that state how many layers at the start are of a kind.
        dense_steps: Whether dense layers are placed by decoder_sparse_step and mlp_only_layers.
        scale_depth: Whether the residual is scaled by scale_depth over the root of the depth.
        mergekit: Whether `mergekit-yaml` alone writes the right config and tensors.
        refused: Why no layer of the type can be copied exactly, if none can.
        unless: Keys of config.json that make it so where they are true.
        when: Keys that make it so where they have not this value.
        before_layers: The tensors that come before the layers, the embeddings.
        after_layers: The tensors that come after them, the final norm and the head.
        never_loaded: Parts of the names of tensors that old checkpoints hold and no model loads.
        must_agree: What two models must agree in for their layers to be stacked: keys of
            config.json with the value that a missing key stands for; None where stacking several
            models of the type is not known to be exact.
    """

    model_type: str
    layers: str
    zero: tuple[str, ...]
    depth: tuple[str, ...]
    lists: tuple[str, ...] = ()
    cycled: bool = False
    indices: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    dense_steps: bool = False
    scale_depth: bool = False
    mergekit: bool = False
    refused: str | None = None
    unless: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    before_layers: tuple[str, ...] = ()
    after_layers: tuple[str, ...] = ()
    never_loaded: tuple[str, ...] = ()
    must_agree: Mapping[str, object] | None = None

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors start with."""
        return f"{self.layers}.{index}."

    def writes(self, tensor: str) -> bool:
        """Whether a tensor of a layer is a residual writer."""
        return any(name in tensor for name in self.zero)

    def is_loaded(self, tensor: str) -> bool:
        """Whether a model of this family loads the tensor at all."""
        return not any(part in tensor for part in self.never_loaded)

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


def known_types() -> tuple[str, ...]:
    """The model types that something is known of."""
    return tuple(_facts()["families"])


@cache
def family_of(model_type: str) -> Family | None:
    """What is known of a model type, if anything is."""
    own = _facts()["families"].get(model_type)
    if own is None:
        return None
    facts: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in {**_facts()["defaults"], **own}.items()
    }
    return Family(model_type=model_type, **facts)


def assumed_family() -> Family:
    """The family whose names are taken where the model's own is not known."""
    family = family_of(_facts()["assumed"])
    if family is None:
        raise TypeError("the assumed family is one of the known ones")
    return family


def depth_of(config: Mapping[str, Any]) -> object:
    """The layer count that a config.json states, None where it states none."""
    for part in (config, *(config.get(key) for key in _facts()["nested_configs"])):
        if isinstance(part, Mapping):
            for key in _facts()["depth_keys"]:
                if part.get(key) is not None:
                    return part[key]
    return None


def check_names(scales: Scales, tensors: Collection[str], family: Family | None) -> None:
    """Check that each name that is zeroed matches a tensor of the layer.

    Args:
        scales: The scales of a new layer.
        tensors: The names of all tensors of the source layers.
        family: The model's family, if it is known, for the hint.

    Raises:
        LayoutError: A name matches no tensor.
    """
    for name in _zeroed_names(scales):
        if not any(name in tensor for tensor in tensors):
            raise LayoutError(
                f"zero: {name!r} matches no tensor of the new layers",
                hint=_right_list(family)
                if family
                else f"its tensors: {', '.join(_short(tensors))}",
            )


def check_identity(scales: Scales, tensors: Iterable[str], family: Family) -> None:
    """Check that scales which zero something zero every residual writer.

    Args:
        scales: The scales of a new layer.
        tensors: The names of the tensors of its source layer; none where they are not at hand,
            and the names are compared with the family's instead.
        family: The model's family.

    Raises:
        LayoutError: A residual writer is left standing.
    """
    names = _zeroed_names(scales)
    tensors = list(tensors)
    standing = [t for t in tensors if family.writes(t) and scale_of(t, scales) != 0]
    if not tensors:
        standing = [w for w in family.zero if not any(n in w or w in n for n in names)]
    if names and standing:
        raise LayoutError(
            f"zero: [{', '.join(names)}] leaves {_short(standing)[0]} standing, "
            "so that the new layers would not be identities",
            hint=f"{_right_list(family)}, or --allow-non-identity to insist",
        )


def check_outside(layout: Layout, before: Collection[str], after: Collection[str]) -> None:
    """Check that scales for the new layers touch nothing outside the layers.

    mergekit gives the embeddings the scales of the first slice, and the final norm and the head
    those of the last.

    Args:
        layout: The layers.
        before: The names of the tensors before the layers.
        after: The names of the tensors after them.

    Raises:
        LayoutError: A scale would change one of these.
    """
    for part, tensors in ((layout.slices[0], before), (layout.slices[-1], after)):
        for tensor in tensors:
            if scale_of(tensor, part.scales) not in (None, 1):
                names = [s.filter for s in part.scales if s.filter and s.matches(tensor)]
                raise LayoutError(
                    f"zero: {names[0]!r} also matches {tensor}, which belongs to no layer",
                    hint="write a longer part of the name, such as self_attn.o_proj",
                )


def _zeroed_names(scales: Scales) -> list[str]:
    return [scale.filter for scale in scales if scale.value == 0 and scale.filter is not None]


def _right_list(family: Family) -> str:
    return f"for {family.model_type} write `zero: [{', '.join(family.zero)}]`"


def _short(tensors: Collection[str]) -> list[str]:
    """Tensor names without what stands before and at the layer index."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in tensors})
