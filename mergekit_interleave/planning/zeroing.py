"""Make new layers identities, and detect identities. Pure.

An identity passes its input on unchanged, because it adds only zeros to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import (
    KEEP,
    Scale,
    Scales,
    names_zero,
    scale_of,
    zeroed_scales,
)
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Constant, Edit, Layer, Layout, constant_of


def projections_edit(family: Family, setting: Callable[[str], int]) -> Edit:
    """Return the edit that zeroes the residual writers and fills the required constants.

    Args:
        family: The model's family.
        setting: Returns the integer that the model's config has under a key.
    """
    return Edit(zeroed_scales(family.residual_writers), _constants(family, setting))


def gains_edit(family: Family, setting: Callable[[str], int]) -> Edit:
    """Return the edit that makes the norms after the projections output zero.

    The projections stay unchanged.

    Args:
        family: The model's family, which has such norms.
        setting: Returns the integer that the model's config has under a key.
    """
    if family.output_norms is None:
        raise TypeError("the family has no norms after its projections")
    names, value = family.output_norms.all_names, family.output_norms.closed_value
    constants = _constants(family, setting)
    if value == 0:
        return Edit(zeroed_scales(names), constants)
    return Edit((), (*constants, *(Constant(value, name) for name in names)))


def damped_edit(family: Family, times: int, *, by_norms: bool) -> Edit:
    """Return the edit that divides the update of a layer.

    Args:
        family: The model's family.
        times: The divisor.
        by_norms: Whether norms follow the projections. A norm undoes a factor of its input, so
            its own gain is divided instead.
    """
    factor, norms = 1 / times, family.output_norms
    if not by_norms or norms is None:
        return Edit((*(Scale(factor, name) for name in family.residual_writers), KEEP))
    scales = tuple(Scale(factor, name, norms.closed_value) for name in norms.all_names)
    return Edit(scales if norms.closed_value else (*scales, KEEP))


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
    """List the tensors that keep a layer from being an identity; empty if the layer is one.

    Args:
        edit: The edit of the layer.
        family: The model's family.
        tensors: The names of the layer's tensors. If there are none, the substrings in the family
            are used instead.
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

    def has_value(name: str, value: float) -> bool:
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
    if (
        norms is not None
        and closing
        and all(has_value(name, norms.closed_value) for name in closing)
    ):
        return unfilled
    unzeroed = [name for name in writers if not has_value(name, 0)]
    zero = frozenset(name for name in tensors if has_value(name, 0))
    return [
        name for name in unzeroed if not _has_zero_input(name, family, tensors, zero)
    ] + unfilled


def _has_zero_input(
    writer: str, family: Family, tensors: Collection[str], zero: frozenset[str]
) -> bool:
    """Whether a weight multiplies only zeros, because one of its closing factors is zero.

    Args:
        writer: The name of the weight.
        family: The model's family.
        tensors: The names of the tensors of its layer.
        zero: The names of those that are zero.
    """
    module, _, part = writer.rpartition(".")
    parent, _, last = module.rpartition(".")
    if part != "weight" or any(t.startswith(f"{module}.bias") and t not in zero for t in tensors):
        return False
    factors = (f"{parent}.{factor}." for factor in family.closing_factors.get(last, ()))
    parts = ([t for t in tensors if t.startswith(factor)] for factor in factors)
    return any(found and zero.issuperset(found) for found in map(set, parts))


def is_identity(layer: Layer, family: Family, tensors: Collection[str] = ()) -> bool:
    """Whether a layer is new and passes its input on unchanged.

    Args:
        layer: The layer.
        family: The family of its model.
        tensors: The names of its tensors, if they are known.
    """
    # The residual writers of an unknown type are unknown, so its result is measured instead.
    if tensors and family.is_unknown and layer.zeroed:
        return True
    return layer.new and bool(layer.edit) and not unzeroed_writers(layer.edit, family, tensors)


def identities(
    layout: Layout,
    family_of: Callable[[ModelRef], Family],
    tensors_of: Callable[[Layer], Collection[str]] = lambda _: (),
) -> frozenset[int]:
    """Return the indices of the new layers that pass their input on unchanged.

    Args:
        layout: The layers.
        family_of: Returns the family of a model.
        tensors_of: Returns the names of the tensors of a layer; empty if they are unknown.
    """
    return frozenset(
        layer.index
        for layer in layout.new_layers
        if is_identity(layer, family_of(layer.model), tensors_of(layer))
    )


def adds_only(identities: Collection[int], layout: Layout, depth: int) -> bool:
    """Whether a layout is all layers of one model in order, and identities between them.

    Args:
        identities: The indices of the identities.
        layout: The layers.
        depth: The number of layers of the model.
    """
    layers = layout.layers
    kept = [layer.source for layer in layers if layer.is_plain and not layer.is_copy]
    return (
        len(layout.models) == 1
        and kept == list(range(depth))
        and len(kept) + len(identities) == len(layers)
    )


def zeroes_output_norms(edit: Edit, family: Family) -> bool:
    """Whether an edit makes the norms after the projections output zero."""
    names = family.output_norms.names if family.output_norms else ()
    return any(
        constant_of(name, edit.constants) or scale_of(name, edit.scales) == 0 for name in names
    )


def dead_tensors(edit: Edit, tensors: Collection[str], family: Family) -> list[str]:
    """Return the tensors that an edit zeroes although that is not what makes the identity.

    Two consecutive zeroed weights get no gradients.
    """
    kept = family.residual_writers + (family.output_norms.all_names if family.output_norms else ())
    zero = frozenset(tensor for tensor in tensors if scale_of(tensor, edit.scales) == 0)
    open_modules = [t.rpartition(".")[0] for t in tensors if family.writes(t) and t not in zero]
    closing = tuple(
        f"{module.rpartition('.')[0]}.{factor}."
        for module in open_modules
        for factor in family.closing_factors.get(module.rpartition(".")[2], ())
    )
    return [
        tensor
        for tensor in tensors
        if tensor in zero
        and not any(name in tensor for name in kept)
        and not tensor.startswith(closing)
    ]


def check_names(names: Iterable[str], tensors: Collection[str], family: Family | None) -> None:
    """Check that each zeroed name matches a tensor of the source layers.

    Args:
        names: The names as the user wrote them.
        tensors: The names of all tensors of the source layers.
        family: The model's family for the hint, or None if it is unknown.

    Raises:
        LayoutError: A name matches no tensor.
    """
    for name in names:
        if not any(name in tensor for tensor in tensors):
            raise LayoutError(
                f"zero: {name!r} matches no tensor of the new layers",
                hint=_right_list(family)
                if family
                else f"the tensors of its layers are {', '.join(_within_layer(tensors))}",
            )


def check_identity(edit: Edit, tensors: Collection[str], family: Family) -> None:
    """Check that an edit that zeroes tensors makes its layer an identity.

    Args:
        edit: The edit of a new layer.
        tensors: The names of the tensors of its source layer. If there are none, the substrings in
            the family are used instead.
        family: The model's family.

    Raises:
        LayoutError: A residual writer is not zeroed.
    """
    names = _zeroed_names(edit.scales)
    remaining = unzeroed_writers(edit, family, tensors)
    if names and remaining:
        raise LayoutError(
            f"zero: [{', '.join(names)}] does not zero {_within_layer(remaining)[0]}, "
            "so the new layers would not be identities",
            hint=f"{_right_list(family)}, or pass --allow-non-identity",
        )


def check_outside(scales: Scales, tensors: Collection[str], inside: Collection[str] = ()) -> None:
    """Check that scales for layers change no tensor outside the layers.

    mergekit applies the scales of the first slice to the embeddings, and the scales of the last
    slice to the final norm and the head.

    Args:
        scales: The scales of the slice.
        tensors: The names of the tensors before or after the layers.
        inside: The names of the tensors of a layer, for the hint.

    Raises:
        LayoutError: A scale would change one of the tensors.
    """
    for tensor in tensors:
        scale = next((scale for scale in scales if scale.matches(tensor)), None)
        if scale is not None and scale.value != 1:
            word = "zero" if scale.value == 0 else "scale"
            name = repr(scale.filter) if scale.filter else "a factor for all tensors"
            raise LayoutError(
                f"{word}: {name} also matches {tensor}, which is outside the layers",
                hint=_longer(scale.filter or "", tensors, inside),
            )


def _longer(part: str, outside: Collection[str], inside: Collection[str]) -> str | None:
    """Return the hint for a part of names that also matches outside the layers."""
    names = [name.removesuffix(".weight") for name in _within_layer(inside) if part in name]
    longer = [name for name in names if not any(name in tensor for tensor in outside)]
    if not longer:
        return None
    return f"write {', '.join(longer)} in place of {part or 'the factor for all tensors'}"


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
