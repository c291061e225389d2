"""The names of tensors in a checkpoint of a wrapped module."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_interleave.checkpoint import wrapped_names
from mergekit_interleave.errors import RefusedError


@pytest.mark.parametrize(
    ("wrapped", "own"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_fsdp_wrapped_module.lm_head.weight", "lm_head.weight"),
        ("model.layers.1._checkpoint_wrapped_module.norm.weight", "model.layers.1.norm.weight"),
    ],
)
def test_names(wrapped: str, own: str) -> None:
    """The words of wrappers are recognized and removed wherever they stand."""
    assert wrapped_names.without_wrappers(wrapped) == own
    with pytest.raises(RefusedError, match=r"wrapped"):
        wrapped_names.check(Path("x"), [own, wrapped])
    wrapped_names.check(Path("x"), [own, "model.module.weight"])
    assert wrapped_names.without_wrappers("model.module.weight") == "model.module.weight"
