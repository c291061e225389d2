"""What is done to a new layer so that it passes its input on unchanged."""

from __future__ import annotations

import pytest

from mergekit_interleave import zeroing
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.growth import Append
from mergekit_interleave.layout import Edit, expand
from mergekit_interleave.reference import ModelPath, ModelRef
from mergekit_interleave.scaling import zeroed_scales


def test_scales_that_reach_outside_the_layers_are_refused() -> None:
    """Only where the first or last slice is scaled, and the tensor is there to be scaled."""
    model = ModelRef(ModelPath("m"))
    layout = expand(Append(1), model, 4, lambda _: Edit(zeroed_scales(["o_proj", "norm"])))
    with pytest.raises(LayoutError, match="'norm' also matches model"):
        zeroing.check_outside(layout.slices[-1].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[0].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[-1].scales, ["lm_head.weight"])
