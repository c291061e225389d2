"""The layouts of a model that was grown several times compose."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import Scale, zeroed_scales
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Constant, Edit, Layout, Slice
from mergekit_interleave.layout.lineage import through

BASE, ONCE, TWICE, OTHER = (ModelRef(ModelPath(name)) for name in ("base", "m1", "m2", "other"))
EDITS = [
    Edit(),
    Edit(zeroed_scales(["o_proj"])),
    Edit((Scale(0.5),)),
    Edit((), (Constant(1, "x"),)),
]


@st.composite
def layouts(draw: Any, depths: dict[ModelRef, int]) -> Layout:
    """Draw a layout of models with these depths."""
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        model = draw(st.sampled_from([*depths]))
        start = draw(st.integers(0, depths[model] - 1))
        stop = draw(st.integers(start + 1, depths[model]))
        edit = draw(st.sampled_from(EDITS))
        parts.append(Slice(model, start, stop, edit.scales, edit.constants))
    return Layout(tuple(parts))


@st.composite
def chains(draw: Any) -> tuple[Layout, Layout, Layout]:
    """Draw three growths, each of the result of the one before and, perhaps, of another model."""
    first = draw(layouts({BASE: draw(st.integers(1, 8)), OTHER: 5}))
    second = draw(layouts({ONCE: len(first), OTHER: 5}))
    third = draw(layouts({TWICE: len(second), ONCE: len(first)}))
    return first, second, third


def origins(layout: Layout) -> list[tuple[ModelRef, int]]:
    """Return the model and the index that each layer is taken from."""
    return [(layer.model, layer.source) for layer in layout.layers]


@given(chains())
def test_each_layer_comes_from_where_its_source_came_from(
    chain: tuple[Layout, Layout, Layout],
) -> None:
    """The origin of a layer is the origin of its source layer."""
    first, second, _ = chain
    expected = [
        origins(first)[layer.source] if layer.model == ONCE else (layer.model, layer.source)
        for layer in second.layers
    ]
    assert origins(through(second, {ONCE: first})) == expected


@given(chains())
def test_an_original_was_an_original_in_each_growth(chain: tuple[Layout, Layout, Layout]) -> None:
    """A layer is new if it was new in any growth; else it is the only original of its source."""
    first, second, _ = chain
    layers = through(second, {ONCE: first}).layers
    originals = Counter((layer.model, layer.source) for layer in layers if not layer.new)
    assert set(originals.values()) <= {1}
    for layer, composed in zip(second.layers, layers, strict=True):
        was_new = layer.new or (layer.model == ONCE and first.layers[layer.source].new)
        if was_new:
            assert composed.new
        elif composed.new:  # both growths took or scaled the same layer
            again = layer.model == ONCE and not first.layers[layer.source].is_plain
            assert composed.model == OTHER or (again and not layer.is_plain)
        else:
            assert not composed.edit.zeroes


@given(chains())
def test_the_order_of_composition_does_not_matter(chain: tuple[Layout, Layout, Layout]) -> None:
    """Three growths compose to the same layers from either end."""
    first, second, third = chain
    from_the_end = through(through(third, {TWICE: second}), {ONCE: first})
    from_the_start = through(third, {TWICE: through(second, {ONCE: first}), ONCE: first})
    assert from_the_end.layers == from_the_start.layers


@given(chains())
def test_a_base_of_its_own_stays(chain: tuple[Layout, Layout, Layout]) -> None:
    """A layout whose models were not grown is unchanged."""
    first, _, _ = chain
    assert through(first, {}).layers == first.layers
    assert fingerprint(through(first, {})) == fingerprint(first)


def test_a_layer_that_was_scaled_twice_is_new() -> None:
    """Two scales round twice, so the layer cannot be compared with the first base."""
    half = Layout((Slice(BASE, 0, 1, (Scale(0.5),)), Slice(BASE, 1, 2)))
    once_more = Layout((Slice(ONCE, 0, 1, (Scale(0.5),)), Slice(ONCE, 1, 2)))
    composed = through(once_more, {ONCE: half})
    assert [layer.new for layer in composed.layers] == [True, False]


def test_a_factor_of_one_is_no_edit() -> None:
    """A recipe may state factors of 1, which leave a layer an original."""
    plain = Layout((Slice(BASE, 0, 2, (Scale(1.0),)),))
    again = Layout((Slice(ONCE, 0, 2, (Scale(1.0),)),))
    assert not through(again, {ONCE: plain}).new_layers
