"""Make a new layer an identity, and tell whether a layer is one. Pure.

An identity passes its input on unchanged: nothing that it adds to the residual stream is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, names_zero, scale_of, zeroed_scales
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Constant, Edit, Layer, Layout, constant_of


def projections_edit(family: Family, setting: Callable[[str], int]) -> Edit:
    """Zero the residual writers, and fill what must be filled besides.

    Args:
        family: The model's family.
        setting: Gives the whole number that its config states under a key.
    """
    return Edit(zeroed_scales(family.residual_writers), _constants(family, setting))


def gains_edit(family: Family, setting: Callable[[str], int]) -> Edit:
    """Close the norms that follow the projections; the projections stay as they are.

    Args:
        family: The model's family; it has such norms.
        setting: Gives the whole number that its config states under a key.
    """
    if family.output_norms is None:
        raise TypeError("the family has no such norms")
    names, value = family.output_norms.all_names, family.output_norms.closed_value
    constants = _constants(family, setting)
    if value == 0:
        return Edit(zeroed_scales(names), constants)
    return Edit((), (*constants, *(Constant(value, name) for name in names)))


def _constants(family: Family, setting: Callable[[str], int]) -> tuple[Constant, ...]:
    return tuple(
        Constant(
            filter=name,
            value=rule["value"],
            after=setting(rule["after"]) if "after" in rule else None,
            square=setting(rule["square"]) if "square" in rule else None,
        )
        for name, rule in family.identity_constants.items()
    )


def unzeroed_writers(edit: Edit, family: Family, tensors: Collection[str] = ()) -> list[str]:
    """List what keeps a layer from being an identity; nothing where it is one.

    Args:
        edit: What is done to the layer.
        family: The model's family.
        tensors: The names of the layer's tensors. Where they are not known, the parts of names that
            the family has stand for them.
    """
    norms, by_name = family.output_norms, not tensors
    if by_name:
        writers: Collection[str] = family.residual_writers
        closing: Collection[str] = norms.names if norms else ()
        filled = [(name, rule["value"]) for name, rule in family.identity_constants.items()]
    else:
        writers = [tensor for tensor in tensors if family.writes(tensor)]
        has_norms = norms is not None and family.has_output_norms(tensors)
        closing = [
            t for t in tensors if has_norms and norms and any(n in t for n in norms.all_names)
        ]
        filled = [
            (tensor, rule["value"])
            for tensor in tensors
            for name, rule in family.identity_constants.items()
            if name in tensor
        ]

    def holds(name: str, value: float) -> bool:
        constant = constant_of(name, edit.constants)
        if constant is not None:
            return constant.value == value and constant.whole
        if by_name:
            return value == 0 and names_zero(edit.scales, name)
        return value == 0 and scale_of(name, edit.scales) == 0

    unfilled = [
        name
        for name, value in filled
        if getattr(constant_of(name, edit.constants), "value", None) != value
    ]
    if norms is not None and closing and all(holds(name, norms.closed_value) for name in closing):
        return unfilled
    return [name for name in writers if not holds(name, 0)] + unfilled


def is_identity(layer: Layer, family: Family, tensors: Collection[str] = ()) -> bool:
    """Whether a layer is a new one that passes its input on unchanged.

    Args:
        layer: The layer.
        family: The family of its model.
        tensors: The names of its tensors, where they are known.
    """
    # Of an unknown type the writers are not known: what the user zeroed is believed, and measured.
    if tensors and family.is_unknown and layer.zeroed:
        return True
    return layer.new and bool(layer.edit) and not unzeroed_writers(layer.edit, family, tensors)


def identities(
    layout: Layout,
    family_of: Callable[[ModelRef], Family],
    tensors_of: Callable[[Layer], Collection[str]] = lambda _: (),
) -> frozenset[int]:
    """The indices of the new layers that pass their input on unchanged.

    Args:
        layout: The layers.
        family_of: Gives the family of a model.
        tensors_of: Gives the names of the tensors of a layer, where they are known.
    """
    return frozenset(
        layer.index
        for layer in layout.new_layers
        if is_identity(layer, family_of(layer.model), tensors_of(layer))
    )


def closes_gains(edit: Edit, family: Family) -> bool:
    """Whether an edit closes the norms that follow the projections."""
    names = family.output_norms.names if family.output_norms else ()
    return any(
        constant_of(name, edit.constants) or scale_of(name, edit.scales) == 0 for name in names
    )


def dead_tensors(edit: Edit, tensors: Collection[str], family: Family) -> list[str]:
    """The tensors that an edit zeroes although they are no residual writers.

    Two zeros in a row give each other no gradient.
    """
    kept = family.residual_writers + (family.output_norms.all_names if family.output_norms else ())
    return [
        tensor
        for tensor in tensors
        if scale_of(tensor, edit.scales) == 0 and not any(name in tensor for name in kept)
    ]


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
                else f"its tensors: {', '.join(_within_layer(tensors))}",
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
    left = unzeroed_writers(edit, family, tensors)
    if names and left:
        raise LayoutError(
            f"zero: [{', '.join(names)}] does not zero {_within_layer(left)[0]}, "
            "so the new layers would not be identities",
            hint=f"{_right_list(family)}, or --allow-non-identity to insist",
        )


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


def _within_layer(tensors: Collection[str]) -> list[str]:
    return sorted({layer_names.inside(name) for name in tensors})
