"""`Models` is immutable, and derived values share the opened checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError


def test_options_cannot_be_assigned() -> None:
    """Options cannot be assigned; a derived value has other options."""
    models = Models()
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.cached_only = True  # type: ignore[misc]
    assert models.offline().cached_only
    assert not models.cached_only


def test_a_derived_value_shares_what_is_opened(tiny: Path) -> None:
    """A derived value returns the checkpoint that is already open."""
    models, ref = Models(), ModelRef(ModelPath(str(tiny)))
    assert models.offline().open(ref) is models.open(ref)


def test_allowing_pickles_does_not_change_the_original(tmp_path: Path, tiny: Path) -> None:
    """A derived value may read pickles without a change to the original."""
    models, ref = Models(), ModelRef(ModelPath(str(tiny)))
    derived = models.unpickling_into(tmp_path)
    assert (models.unpickle_into, derived.unpickle_into) == (None, tmp_path)
    assert derived.with_weights(ref).path == models.open(ref).path


def test_models_that_cannot_be_opened(tmp_path: Path) -> None:
    """`open` raises, and the methods for optional models return None."""
    models, ref = Models(), ModelRef(ModelPath(str(tmp_path / "none")))
    found: list[CheckpointError] = []
    assert models.open_if_possible(ref) is None
    assert models.open_source_if_possible(ref, found.append) is None
    assert models.depth_if_known(ref) is None
    with pytest.raises(CheckpointError) as raised:
        models.open(ref)
    assert found == [raised.value]
