"""Each growth line gives a layout."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.growth import (
    After,
    Append,
    Drop,
    Every,
    Growth,
    Part,
    Repeat,
    Spread,
    Stack,
    Step,
    Windows,
    stack_of,
)
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import Scale, scale_of, zeroed_scales
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Edit, Layer, Layout, Slice, distances, expand

MODEL = ModelRef(ModelPath("org/model"))
OTHER = ModelRef(ModelPath("org/other"))
ZEROED = zeroed_scales(["o_proj", "down_proj"])


def zeroed(_: Layer) -> Edit:
    """Return the edit that zeroes a new layer."""
    return Edit(ZEROED)


def ranges(layout: Layout) -> list[tuple[int, int]]:
    """Return the slices as ranges."""
    return [(part.start, part.stop) for part in layout.slices]


@st.composite
def identities(draw: Any) -> tuple[Growth, int]:
    """Draw a growth line whose new layers are identities if zeroed, and a depth that it fits."""
    depth = draw(st.integers(1, 60))
    start = draw(st.integers(0, depth - 1))
    growth = draw(
        st.one_of(
            st.builds(Every, st.integers(1, depth)),
            st.builds(Spread, st.integers(1, depth)),
            st.builds(
                After,
                st.sets(st.integers(0, depth - 1), min_size=1).map(lambda s: tuple(sorted(s))),
            ),
            st.builds(Append, st.integers(1, 9)),
            st.builds(
                Repeat,
                st.tuples(st.just(start), st.integers(start + 1, depth)),
                st.integers(2, 5),
                st.booleans(),
            ),
        )
    )
    return growth, depth


class TestExpand:
    """Tests of the layouts of growth lines."""

    def test_every_copies_each_nth_layer_right_after_it(self) -> None:
        """The layout is the published block expansion: [0,4], [3,4] zeroed, [4,8], [7,8] zeroed."""
        layout = expand(Every(4), MODEL, 8, zeroed)
        assert ranges(layout) == [(0, 4), (3, 4), (4, 8), (7, 8)]
        assert [bool(part.scales) for part in layout.slices] == [False, True, False, True]

    def test_every_leaves_a_partial_group_alone(self) -> None:
        """`every 4` adds 7 layers to 30 layers, and none after the last two."""
        layout = expand(Every(4), MODEL, 30, zeroed)
        assert [layer.source for layer in layout.new_layers] == [3, 7, 11, 15, 19, 23, 27]
        assert ranges(layout)[-1] == (28, 30)

    def test_k_layers_are_spread_by_the_floor_rule(self) -> None:
        """New layer j of k follows layer floor(j*L/k) - 1."""
        layout = expand(Spread(4), MODEL, 10, zeroed)
        assert [layer.source for layer in layout.new_layers] == [1, 4, 6, 9]

    def test_after_copies_each_listed_layer_right_after_it(self) -> None:
        """Neighbours, the first layer and the last layer may be listed."""
        layout = expand(After((0, 3, 4, 7)), MODEL, 8, zeroed)
        assert ranges(layout) == [*[(0, 1), (0, 1), (1, 4), (3, 4), (4, 5), (4, 5), (5, 8), (7, 8)]]
        assert [layer.index for layer in layout.new_layers] == [1, 5, 7, 11]
        assert all(layer.zeroed for layer in layout.new_layers)
        assert expand(After((3, 7)), MODEL, 8, zeroed) == expand(Every(4), MODEL, 8, zeroed)

    def test_append_copies_the_last_layer_at_the_end(self) -> None:
        """The layout is that of published appended expansions."""
        assert ranges(expand(Append(2), MODEL, 32)) == [(0, 32), (31, 32), (31, 32)]

    def test_windows_reach_the_end(self) -> None:
        """The layout is that of published self-merges, and the last window may be shorter."""
        layout = expand(Windows(20, 10), MODEL, 80)
        assert ranges(layout) == [(i, i + 20) for i in range(0, 61, 10)]
        assert ranges(expand(Windows(12, 8), MODEL, 32)) == [(0, 12), (8, 20), (16, 28), (24, 32)]
        assert ranges(expand(Windows(4, 2, (-6, -1)), MODEL, 8)) == [(2, 6), (4, 7)]

    def test_drop_leaves_layers_out(self) -> None:
        """Dropped ranges may overlap and be in any order, but some layer must be left."""
        assert ranges(expand(Drop(((23, 28),)), MODEL, 32)) == [(0, 23), (28, 32)]
        several = Drop(((-2, "end"), (4, 8), (0, 1), (6, 9)))
        assert ranges(expand(several, MODEL, 12)) == [(1, 4), (9, 10)]
        with pytest.raises(LayoutError, match=r"^drop: "):
            expand(Drop(((0, "100%"),)), MODEL, 8)

    def test_steps_take_layers_of_several_models(self) -> None:
        """Each step uses the depth of its own model."""
        steps = (
            Step((Part((0, 2), MODEL),)),
            Step((Part((-2, "end"), OTHER, times=2), Part((0, 2), OTHER, 2, as_block=True))),
            Step((Part(Windows(2, 1, (0, 3)), MODEL),)),
        )
        layout = expand(Stack(steps), None, {MODEL: 4, OTHER: 8}.__getitem__)
        assert [(part.model, part.start, part.stop) for part in layout.slices] == [
            (MODEL, 0, 2),
            *[(OTHER, i, i + 1) for i in (6, 6, 7, 7)],
            *[(OTHER, 0, 2)] * 2,
            *[(MODEL, 0, 2), (MODEL, 1, 3)],
        ]

    @pytest.mark.parametrize(
        ("apply_to", "edited"),
        [
            ("copies", [3, 4, 6, 7]),
            ("first", [3, 6]),
            ("last", [4, 7]),
            ("all", [2, 3, 4, 5, 6, 7]),
        ],
    )
    def test_to_which_of_equal_layers_an_edit_applies(
        self, apply_to: str, edited: list[int]
    ) -> None:
        """`apply_to` selects layers among equal ones, here 2, 3, 4 and 5, 6, 7."""
        layout = expand(Repeat((2, 4), 3), MODEL, 6, zeroed, apply_to=apply_to)
        assert [layer.index for layer in layout.layers if layer.edit] == edited

    def test_a_step_is_edited_as_a_whole(self) -> None:
        """A step's edit includes its originals, and other steps have only new layers edited."""
        scaled = Step((Part((2, 6)),), scale=(Scale(0.5),))
        plain = [Step((Part(bounds),)) for bounds in ((0, 4), (3, 8))]
        layout = expand(
            Stack((plain[0], scaled, plain[1])),
            MODEL,
            8,
            zeroed,
            step_edit=lambda step, _: Edit(step.scale),
        )
        assert [(part.start, part.stop, part.scales) for part in layout.slices] == [
            (0, 4, ()),
            (2, 6, (Scale(0.5),)),
            (3, 4, ZEROED),
            (4, 8, ()),
        ]

    def test_repeat_puts_copies_side_by_side(self) -> None:
        """The layout is the published interwoven up-scaling, with one slice per copy."""
        layout = expand(Repeat((2, 4)), MODEL, 6)
        assert ranges(layout) == [(0, 2), (2, 3), (2, 3), (3, 4), (3, 4), (4, 6)]
        assert [layer.new for layer in layout.layers] == [0, 0, 0, 1, 0, 1, 0, 0]

    def test_repeat_as_block_repeats_the_range_as_a_whole(self) -> None:
        """The block occurs `times` times in total."""
        assert ranges(expand(Repeat((2, 4), 3, as_block=True), MODEL, 6)) == [
            (0, 4),
            (2, 4),
            (2, 4),
            (4, 6),
        ]

    def test_stack_needs_no_depth(self) -> None:
        """Absolute ranges need no config.json."""
        layout = expand(stack_of([(0, 24), (8, 32)]), MODEL, None)
        assert ranges(layout) == [(0, 24), (8, 32)]
        assert len(layout.new_layers) == 16

    def test_zeroing_a_stack_splits_its_slices(self) -> None:
        """Only repeated layers of a stack are zeroed."""
        layout = expand(stack_of([(0, 24), (8, 32)]), MODEL, 32, zeroed)
        assert ranges(layout) == [(0, 24), (8, 24), (24, 32)]
        assert [bool(part.scales) for part in layout.slices] == [False, True, False]

    @pytest.mark.parametrize(
        ("growth", "depth", "reason"),
        [
            (Every(9), 8, r"interleave: every 9: .*\b8 layers"),
            (Spread(9), 8, r"interleave: 9 layers: .*\b8\b"),
            (After((3, 8)), 8, r"interleave: after 8: org/model .*\b8 layers"),
            (After((3,)), None, "org/model"),
            (Repeat((4, 9)), 8, r"\[4, 9\] .*\b8 layers"),
            (stack_of([(0, 4), (2, 9)]), 8, r"\[2, 9\] .*\b8 layers"),
            (stack_of([(0, 8)]), 8, "nothing"),
            (Every(4), None, "org/model"),
            (Append(10**9), 8, str(MAX_LAYERS)),
            (Every(1), 10**12, str(MAX_LAYERS)),
        ],
    )
    def test_growth_that_does_not_fit_the_model(
        self, growth: Growth, depth: int | None, reason: str
    ) -> None:
        """The error names the growth line, the range or the limit."""
        with pytest.raises(LayoutError, match=reason):
            expand(growth, MODEL, depth)

    @given(identities())
    def test_without_its_new_layers_an_identity_is_the_base(self, case: tuple[Growth, int]) -> None:
        """Without its new layers, the layout is the base, layer for layer."""
        growth, depth = case
        layout = expand(growth, MODEL, depth, zeroed)
        kept = [layer.source for layer in layout.layers if not layer.new]
        assert kept == list(range(depth))
        assert all(layer.zeroed == ("o_proj", "down_proj") for layer in layout.new_layers)

    @given(identities())
    def test_the_number_of_new_layers(self, case: tuple[Growth, int]) -> None:
        """There are N // n, k, k, one per listed layer, or times - 1 per layer of the range."""
        growth, depth = case
        layout = expand(growth, MODEL, depth)
        match growth:
            case Every(n):
                expected = depth // n
            case Spread(count) | Append(count):
                expected = count
            case After(layers):
                expected = len(layers)
                assert tuple(layer.source for layer in layout.new_layers) == layers
            case Repeat((int(start), int(stop)), times):
                expected = (stop - start) * (times - 1)
        assert len(layout.new_layers) == expected
        assert len(layout) == len(layout.layers) == depth + expected

    @given(identities())
    def test_new_layers_come_after_their_originals(self, case: tuple[Growth, int]) -> None:
        """A copy never precedes its original, and `interleave` puts it directly after that."""
        growth, depth = case
        layers = expand(growth, MODEL, depth).layers
        seen: set[int] = set()
        for layer in layers:
            assert layer.new == (layer.source in seen)
            seen.add(layer.source)
        if isinstance(growth, Every | Spread | After):
            assert all(a.source == b.source for a, b in pairwise(layers) if b.new)

    @given(identities())
    def test_scaling_does_not_change_the_layers(self, case: tuple[Growth, int]) -> None:
        """The layers, and which of them are new, are the same with and without scales."""
        plain = expand(case[0], MODEL, case[1])
        scaled = expand(case[0], MODEL, case[1], zeroed)
        assert [(x.source, x.new) for x in plain.layers] == [
            (x.source, x.new) for x in scaled.layers
        ]


class TestLayers:
    """Tests of which layer is the original."""

    def test_a_scaled_layer_without_another_occurrence_is_no_copy(self) -> None:
        """The first of several scaled occurrences is the original, and the others are copies."""
        half = (Scale(0.5),)
        layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 2, 4, half), Slice(MODEL, 3, 4, half)))
        assert [layer.new for layer in layout.layers] == [0, 0, 0, 0, 1]
        assert not any(layer.is_plain for layer in layout.layers[2:])

    def test_a_layer_with_zeros_is_new_without_being_a_copy(self) -> None:
        """A layer whose weights were zeroed is to be trained, although it occurs once."""
        layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 2, 3, ZEROED)))
        assert [(layer.new, layer.is_copy) for layer in layout.layers[1:]] == [(0, 0), (1, 0)]

    def test_the_first_unscaled_occurrence_is_the_original(self) -> None:
        """A zeroed layer is new even if it comes first."""
        layout = Layout((Slice(MODEL, 0, 1, ZEROED), Slice(MODEL, 0, 2), Slice(MODEL, 0, 1)))
        assert [layer.new for layer in layout.layers] == [True, False, False, True]

    def test_a_scale_of_one_is_no_scale(self) -> None:
        """A layer with a scale of 1 is an original."""
        layout = Layout((Slice(MODEL, 0, 1, (Scale(1.0),)),))
        assert not layout.layers[0].new

    def test_two_revisions_are_two_models(self) -> None:
        """The same layer of another revision is another original."""
        other = ModelRef(ModelPath("org/model", "v2"))
        layout = Layout((Slice(MODEL, 0, 1), Slice(other, 0, 1)))
        assert layout.models == (MODEL, other)
        assert not layout.new_layers


class TestScaleOf:
    """Tests of the scale of a tensor."""

    def test_order_decides(self) -> None:
        """The first match applies, as in mergekit, and no match means no scale."""
        scales = (Scale(0.0, "o_proj"), Scale(2.0, "proj"))
        assert scale_of("model.layers.0.self_attn.o_proj.weight", scales) == 0
        assert scale_of("model.layers.0.self_attn.q_proj.weight", scales) == 2
        assert scale_of("model.layers.0.input_layernorm.weight", scales) is None


def test_distances_from_the_originals() -> None:
    """Only copies of an original have a distance."""
    assert distances(expand(Repeat((2, 4), 3), MODEL, 6)) == [1, 2, 1, 2]
    assert distances(expand(stack_of([(0, 4), (2, 6)]), MODEL, 6)) == [2, 2]
    scaled = Slice(MODEL, 0, 2, (Scale(0.5),))
    assert distances(Layout((scaled,))) == []
    assert distances(Layout((scaled, Slice(MODEL, 0, 2)))) == [2, 2]
