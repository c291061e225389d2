"""What is known of a model family, read from `data/architectures.json`.

The facts are data; a test derives them again from the models that transformers builds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
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
        residual_writers: The tensors of a layer whose output is added to the residual stream,
            by the name that `zero` uses for each. Zeroing them all makes the layer an identity,
            and each still gets gradients.
        before_layers: The tensors that come before the layers, the embeddings.
        after_layers: The tensors that come after them, the final norm and the head.
        must_agree: What two models must agree in for their layers to be stacked: keys of
            config.json with the value that a missing key stands for.
        never_loaded: Parts of the names of tensors that old checkpoints hold and no model loads.
    """

    model_type: str
    layers: str
    before_layers: tuple[str, ...]
    after_layers: tuple[str, ...]
    residual_writers: Mapping[str, str]
    never_loaded: tuple[str, ...]
    must_agree: Mapping[str, object]

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors start with."""
        return f"{self.layers}.{index}."

    def writers_of(self, index: int) -> list[str]:
        """The full names of a layer's residual writers."""
        return [self.layer_prefix(index) + tensor for tensor in self.residual_writers.values()]

    def is_loaded(self, tensor: str) -> bool:
        """Whether a model of this family loads the tensor at all."""
        return not any(part in tensor for part in self.never_loaded)


@cache
def _facts() -> dict[str, Any]:
    # importlib.resources would be a tenth of the start-up time.
    file = Path(__file__).parent / "data" / "architectures.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


@cache
def families() -> Mapping[str, Family]:
    """All known families by model type."""
    return {
        name: Family(
            model_type=name,
            layers=facts["layers"],
            before_layers=tuple(facts["before_layers"]),
            after_layers=tuple(facts["after_layers"]),
            residual_writers=facts["residual_writers"],
            never_loaded=tuple(facts["never_loaded"]),
            must_agree=facts["must_agree"],
        )
        for name, facts in _facts()["families"].items()
    }


def assumed_family() -> Family:
    """The family whose names are taken where the model's own is not known."""
    return families()[_facts()["assumed"]]


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
        tensors: The names of all tensors of its source layer.
        family: The model's family, if it is known, for the hint.

    Raises:
        LayoutError: A name matches no tensor.
    """
    for name in _zeroed_names(scales):
        if not any(name in tensor for tensor in tensors):
            raise LayoutError(
                f"zero: {name!r} matches no tensor of the layer",
                hint=_right_list(family)
                if family
                else f"its tensors: {', '.join(_short(tensors))}",
            )


def check_identity(scales: Scales, tensors: Iterable[str], family: Family) -> None:
    """Check that scales which zero something zero every residual writer.

    Args:
        scales: The scales of a new layer.
        tensors: The names of the tensors of its source layer; its residual writers will do.
        family: The model's family.

    Raises:
        LayoutError: A residual writer is left standing.
    """
    names = _zeroed_names(scales)
    for tensor in tensors:
        writes = any(writer in tensor for writer in family.residual_writers)
        if names and writes and scale_of(tensor, scales) != 0:
            raise LayoutError(
                f"zero: [{', '.join(names)}] leaves {_short([tensor])[0]} standing, "
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
    return f"for {family.model_type} write `zero: [{', '.join(family.residual_writers)}]`"


def _short(tensors: Collection[str]) -> list[str]:
    """Tensor names without what stands before and at the layer index."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in tensors})
