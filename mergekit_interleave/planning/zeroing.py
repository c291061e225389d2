"""What is done to a new layer so that it passes its input on unchanged, and whether it does."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, names_zero, scale_of, zeroed_scales
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Constant, Edit, Layout, constant_of

log = logging.getLogger(__name__)


def projections_edit(family: Family, setting: Callable[[str], Any]) -> Edit:
    """Zero the residual writers, and fill what must be filled besides.

    Args:
        family: The model's family.
        setting: Gives what its config says under a key.
    """
    return Edit(zeroed_scales(family.residual_writers), _constants(family, setting))


def gains_edit(family: Family, setting: Callable[[str], Any]) -> Edit:
    """Close the norms that follow the projections; the projections stay as they are.

    Args:
        family: The model's family; it has such norms.
        setting: Gives what its config says under a key.
    """
    if family.output_norms is None:
        raise TypeError("the family has no such norms")
    names, value = family.output_norms.all_names, family.output_norms.closed_value
    constants = _constants(family, setting)
    if value == 0:
        return Edit(zeroed_scales(names), constants)
    return Edit((), (*constants, *(Constant(value, name) for name in names)))


def _constants(family: Family, setting: Callable[[str], Any]) -> tuple[Constant, ...]:
    return tuple(
        Constant(
            filter=name,
            value=rule["value"],
            after=int(setting(rule["after"])) if "after" in rule else None,
            square=int(setting(rule["square"])) if "square" in rule else None,
        )
        for name, rule in family.identity_constants.items()
    )


def unzeroed_writers(edit: Edit, tensors: Collection[str], family: Family) -> list[str]:
    """The tensors that keep a layer from being an identity; none where it is one.

    Args:
        edit: What is done to the layer.
        tensors: The names of its tensors.
        family: The model's family.
    """
    filled = {tensor: constant_of(tensor, edit.constants) for tensor in tensors}
    unfilled = [
        tensor
        for tensor in tensors
        for name, rule in family.identity_constants.items()
        if name in tensor and getattr(filled[tensor], "value", None) != rule["value"]
    ]

    def holds(tensor: str, value: float) -> bool:
        constant = filled[tensor]
        if constant is not None:
            return constant.value == value and constant.whole
        return value == 0 and scale_of(tensor, edit.scales) == 0

    if family.output_norms is not None and family.has_output_norms(tensors):
        gains = [t for t in tensors if any(name in t for name in family.output_norms.all_names)]
        if all(holds(tensor, family.output_norms.closed_value) for tensor in gains):
            return unfilled
    return [t for t in tensors if family.writes(t) and not holds(t, 0)] + unfilled


def check_plain(checkpoint: Checkpoint) -> None:
    """Check that all layers of a model of an unknown type are a Llama's by their tensors' names.

    Raises:
        LayoutError: They are not, so that it cannot be told what writes to the residual stream.
    """
    for index in range(checkpoint.depth):
        for name in checkpoint.layer_tensors(index):
            if not families.is_standard_tensor(_short([name])[0]):
                raise LayoutError(
                    f"zero: auto: nothing is known of model type {checkpoint.model_type!r}, and "
                    f"{name} is no tensor of a Llama's",
                    hint="name all that writes to the residual stream: `zero: [o_proj, ...]`",
                )


def closes_gains(edit: Edit, family: Family) -> bool:
    """Whether an edit closes the norms that follow the projections."""
    names = family.output_norms.names if family.output_norms else ()
    return any(
        constant_of(name, edit.constants) or scale_of(name, edit.scales) == 0 for name in names
    )


def warn_of_dead_tensors(edit: Edit, tensors: Collection[str], family: Family) -> None:
    """Two zeros in a row give each other no gradient: what is not a writer need not be zero."""
    kept = family.residual_writers + (family.output_norms.all_names if family.output_norms else ())
    dead = [
        tensor
        for tensor in tensors
        if scale_of(tensor, edit.scales) == 0 and not any(name in tensor for name in kept)
    ]
    if dead:
        log.warning(
            "zero: %s is zeroed too, though it writes nothing to the residual stream; the new "
            "layers may get no gradients (`zero: auto` is enough)",
            _short(dead)[0],
        )


def check_names(names: Iterable[str], tensors: Collection[str], family: Family | None) -> None:
    """Check that each name that is zeroed matches a tensor of the layer.

    Args:
        names: The names as the user wrote them.
        tensors: The names of all tensors of the source layers.
        family: The model's family, if it is known, for the hint.

    Raises:
        LayoutError: A name matches no tensor.
    """
    for name in names:
        if not any(name in tensor for tensor in tensors):
            raise LayoutError(
                f"zero: {name!r} matches no tensor of the new layers",
                hint=_right_list(family)
                if family
                else f"its tensors: {', '.join(_short(tensors))}",
            )


def check_identity(edit: Edit, tensors: Collection[str], family: Family) -> None:
    """Check that an edit which zeroes something makes its layer an identity.

    Args:
        edit: What is done to a new layer.
        tensors: The names of the tensors of its source layer; none where they are not at hand,
            and the names are compared with the family's instead.
        family: The model's family.

    Raises:
        LayoutError: A residual writer is left standing.
    """
    names = _zeroed_names(edit.scales)
    left = unzeroed_writers(edit, tensors, family) if tensors else _unzeroed_names(edit, family)
    if names and left:
        raise LayoutError(
            f"zero: [{', '.join(names)}] leaves {_short(left)[0]} standing, "
            "so that the new layers would not be identities",
            hint=f"{_right_list(family)}, or --allow-non-identity to insist",
        )


def _unzeroed_names(edit: Edit, family: Family) -> list[str]:
    """What keeps a layer from being an identity, as far as names alone tell."""
    gains = family.output_norms.names if family.output_norms else ()
    closed = [constant_of(name, edit.constants) or names_zero(edit.scales, name) for name in gains]
    left = [name for name in family.identity_constants if not constant_of(name, edit.constants)]
    if closed and all(closed):
        return left
    return [
        writer for writer in family.residual_writers if not names_zero(edit.scales, writer)
    ] + left


def identities(layout: Layout, family_of: Callable[[ModelRef], Family]) -> frozenset[int]:
    """The indices of the new layers that pass their input on, as far as names alone tell.

    Args:
        layout: The layers.
        family_of: The family of a model.
    """
    found: set[int] = set()
    start = 0
    for part in layout.slices:
        edit = Edit(part.scales, part.constants)
        if edit and not _unzeroed_names(edit, family_of(part.model)):
            found.update(range(start, start + len(part)))
        start += len(part)
    return frozenset(found)


def check_outside(scales: Scales, tensors: Collection[str]) -> None:
    """Check that scales for layers touch nothing outside them.

    mergekit gives the embeddings the scales of the first slice, and the final norm and the head
    those of the last.

    Args:
        scales: Those of the slice.
        tensors: The names of the tensors before the layers, or of those after them.

    Raises:
        LayoutError: A scale would change one of these.
    """
    for tensor in tensors:
        scale = next((scale for scale in scales if scale.matches(tensor)), None)
        if scale is not None and scale.value != 1:
            word = "zero" if scale.value == 0 else "scale"
            name = repr(scale.filter) if scale.filter else "a factor for all tensors"
            raise LayoutError(
                f"{word}: {name} also matches {tensor}, which belongs to no layer",
                hint="write a longer part of the name, such as self_attn.o_proj",
            )


def _zeroed_names(scales: Scales) -> list[str]:
    return [scale.filter for scale in scales if scale.value == 0 and scale.filter is not None]


def _right_list(family: Family) -> str:
    if family.identity_constants:
        return f"for {family.model_type} write `zero: auto`, which also fills {_filled(family)}"
    return f"for {family.model_type} write `zero: [{', '.join(family.residual_writers)}]`"


def _filled(family: Family) -> str:
    return ", ".join(name.strip(".") for name in family.identity_constants)


def _short(tensors: Collection[str]) -> list[str]:
    """Tensor names without what stands before and at the layer index."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in tensors})
