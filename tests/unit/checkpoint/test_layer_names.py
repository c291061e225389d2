"""The parser of tensor names in layers."""

from __future__ import annotations

import pytest

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.layer_names import LayerName, parse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", LayerName("model.layers", 3, ".mlp.up_proj.weight")),
        ("h.0.attn", LayerName("h", 0, ".attn")),
        ("model.layers.12", LayerName("model.layers", 12, "")),
        ("model.layers.3.experts.7.w1", LayerName("model.layers", 3, ".experts.7.w1")),
        ("mm-tower.blocks.1.x", LayerName("mm-tower.blocks", 1, ".x")),
        ("model.norm.weight", None),
        ("model.layers.3x.weight", None),
        ("3.weight", None),
        (f"layers.{'9' * 5000}.weight", None),
    ],
)
def test_the_first_number_is_the_index(name: str, expected: LayerName | None) -> None:
    """A name is split at its first numeric part."""
    assert parse(name) == expected


def test_known_stacks_decide_which_number_is_the_index() -> None:
    """Known stacks determine the index, and tensors of other stacks are not in a layer."""
    assert parse("mtp.0.layers.2.w", ["mtp.0.layers"]) == LayerName("mtp.0.layers", 2, ".w")
    assert parse("vision.layers.2.w", ["layers"]) is None


def test_a_name_in_another_layer() -> None:
    """Only the index changes when a name is moved to another layer."""
    name = parse("model.layers.3.experts.3.w1")
    assert name is not None
    assert (name.at(10), name.rest) == ("model.layers.10.experts.3.w1", "experts.3.w1")


def test_texts_that_mention_layers() -> None:
    """A text mentions a layer only if it contains the whole layer name."""
    stacks = ["model.layers"]
    assert layer_names.mentions_layer("scale of model.layers.3.mlp", stacks)
    assert not layer_names.mentions_layer("submodel.layers.3.mlp", stacks)
    assert not layer_names.mentions_layer("model.layers", stacks)


def test_values_by_stack() -> None:
    """Values are grouped by stack and layer, and tensors outside of layers are omitted."""
    found = layer_names.by_stack({"a.0.x": 1, "a.0.y": 2, "a.1.x": 3, "b.0.x": 4, "norm": 5})
    assert found == {"a": {0: {"x": 1, "y": 2}, 1: {"x": 3}}, "b": {0: {"x": 4}}}
