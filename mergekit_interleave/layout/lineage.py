"""Compose the layouts of a model that was grown several times. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.layout.layout import Layer, Layout, Slice


def through(layout: Layout, grown: Mapping[ModelRef, Layout]) -> Layout:
    """Express a layout in the sources of its source models.

    A layer is an original of the result only if it was an original in both growths, and if at most
    one of them edited it: two edits round twice, so they are no single edit. It has the edit of the
    later growth or, if that one did not edit it, of the earlier growth.

    Args:
        layout: The layout.
        grown: The layouts of those of its source models that were grown themselves.

    Raises:
        IndexError: A layout takes a layer that its source model does not have.
    """
    return Layout(tuple(_traced(layout, grown)))


def _traced(layout: Layout, grown: Mapping[ModelRef, Layout]) -> Iterator[Slice]:
    for layer in layout.layers:
        earlier = grown.get(layer.model)
        if earlier is None:
            edit, stop = (layer.scales, layer.constants), layer.source + 1
            new, mean_with = layer.was_new, layer.mean_with
            yield Slice(layer.model, layer.source, stop, *edit, new, mean_with)
        else:
            yield _slice(layer, earlier.layers[layer.source])


def _slice(layer: Layer, origin: Layer) -> Slice:
    """Return a layer as a slice of the model that its origin is taken from."""
    edit = origin.edit if layer.is_plain else layer.edit
    edited_twice = not (layer.is_plain or origin.is_plain)
    new = layer.new or origin.new or edited_twice
    start, stop = origin.source, origin.source + 1
    # A mean is a new layer, whose tensors are not derived from the models of both growths.
    return Slice(origin.model, start, stop, edit.scales, edit.constants, new)
