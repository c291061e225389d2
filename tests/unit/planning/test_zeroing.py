"""What is done to a new layer so that it passes its input on unchanged."""

from __future__ import annotations

import pytest

from mergekit_interleave.architectures import family as families
from mergekit_interleave.directive.growth import Append
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import zeroed_scales
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Constant, Edit, expand
from mergekit_interleave.planning import zeroing


def test_scales_that_reach_outside_the_layers_are_refused() -> None:
    """Only where the first or last slice is scaled, and the tensor is there to be scaled."""
    model = ModelRef(ModelPath("m"))
    layout = expand(Append(1), model, 4, lambda _: Edit(zeroed_scales(["o_proj", "norm"])))
    with pytest.raises(LayoutError, match="'norm' also matches model"):
        zeroing.check_outside(layout.slices[-1].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[0].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[-1].scales, ["lm_head.weight"])


def test_by_name_alone_the_norms_that_every_model_has_are_enough() -> None:
    """Of a type whose other norms not every model of it has, where the tensors are not at hand."""
    family = families.family_of("gemma4_text")
    assert family is not None
    assert family.output_norms is not None
    assert family.output_norms.optional_names
    constants = tuple(
        Constant(rule["value"], name) for name, rule in family.identity_constants.items()
    )
    edit = Edit(zeroed_scales(family.output_norms.names), constants)
    zeroing.check_identity(edit, [], family)
    with pytest.raises(LayoutError, match="down_proj"):
        zeroing.check_identity(
            Edit(zeroed_scales(family.output_norms.names[:1]), constants), [], family
        )
