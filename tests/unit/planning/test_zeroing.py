"""New layers are zeroed so that they pass their input on unchanged."""

from __future__ import annotations

import pytest

from mergekit_interleave.architectures import family as families
from mergekit_interleave.directive.growth import Append
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import zeroed_scales
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Constant, Edit, expand
from mergekit_interleave.planning import zeroing


def test_scales_of_tensors_outside_the_layers() -> None:
    """A scale in the first or last slice is refused if it matches a tensor outside the layers."""
    model = ModelRef(ModelPath("m"))
    layout = expand(Append(1), model, 4, lambda _: Edit(zeroed_scales(["o_proj", "norm"])))
    with pytest.raises(LayoutError, match=r"'norm' .*model\.norm\.weight"):
        zeroing.check_outside(layout.slices[-1].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[0].scales, ["model.norm.weight"])
    zeroing.check_outside(layout.slices[-1].scales, ["lm_head.weight"])


def test_optional_norms_are_not_required_without_tensors() -> None:
    """Without tensors, the check requires only the norms that every model of the type has."""
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
