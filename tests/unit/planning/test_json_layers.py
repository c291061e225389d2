"""The layers that JSON files name."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning.json_layers import Move, check_understood, reindexed

MOVE = Move([0, 1, 1, 2, 3, 3], 4, ("model.layers", "transformer.h"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["lm_head", "layers.1.mlp"], ["lm_head", "layers.1.mlp", "layers.2.mlp"]),
        (["layers.2"], ["layers.3"]),
        (["visual.blocks.2", "mtp.layers.0.mlp"], ["visual.blocks.2", "mtp.layers.0.mlp"]),
        (["model.layers.0.mlp.experts.3.up"], ["model.layers.0.mlp.experts.3.up"]),
        (["model.layers.4.eh_proj"], ["model.layers.6.eh_proj"]),
        ({"transformer.h.3.attn": 4}, {"transformer.h.4.attn": 4, "transformer.h.5.attn": 4}),
        ({"group_0": {"targets": ["Linear"]}}, {"group_0": {"targets": ["Linear"]}}),
        ({"model.layers.1.mlp": {"bits": 8}, "bits": 4},
         {"model.layers.1.mlp": {"bits": 8}, "model.layers.2.mlp": {"bits": 8}, "bits": 4}),
        ({"target": "model.layers.2.mlp"}, {"target": "model.layers.3.mlp"}),
        ({"version": "2.1.0+cu128", "token": "<|image_1|>"},
         {"version": "2.1.0+cu128", "token": "<|image_1|>"}),
        ({"prompt": "Answer (in 2 words): "}, {"prompt": "Answer (in 2 words): "}),
        (["re:.*mlp.gate$", "layers.*.self_attn"], ["re:.*mlp.gate$", "layers.*.self_attn"]),
    ],
)  # fmt: skip
def test_names_of_modules_follow_their_layers(before: Any, after: Any) -> None:
    """Copies get the entries of their source, names behind the layers get the next index."""
    assert reindexed(before, MOVE) == after


@pytest.mark.parametrize(
    "value",
    [
        ["re:.*layers.[0-3].mlp"],
        {"re:model.layers.(1|2)": 4},
        "layers.1.mlp,layers.3.mlp",
        {"target": "model.layers.1.mlp"},
    ],
)
def test_names_that_cannot_be_moved_are_refused(value: Any) -> None:
    """A pattern, a text with a name in it, and one name for two copies are refused by their key."""
    with pytest.raises(RefusedError, match=r"^modules"):
        reindexed({"modules": value}, MOVE)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"kv_scales": [1, 2, 3, 4]}, "kv_scales"),
        ({"a": {"b": [[0], [1], [2], [3]]}}, "a.b"),
        ({"bits": {"0": 4, "1": 4, "2": 8, "3": 4}}, "bits"),
        ({"bits": {"layer_0": 4, "layer_1": 4, "layer_2": 8, "layer_3": 4}}, "bits"),
        ([1, 2, 3, 4], "the list"),
        ({"layer_types": [1, 2, 3, 4], "eos_token_id": [1, 2, 3, 4]}, None),
        ({"ignore": ["a", "b", "c", "d"]}, None),
        ({"names": ["a.b", "c", "d", "lm_head"]}, None),
        ({"vision_config": {"model_type": "x", "depths": [1, 2, 3, 4]}}, None),
        ({"short": [1, 2, 3], "map": {"a": 1, "b": 2, "c": 3, "d": 4}}, None),
    ],
)
def test_what_may_be_per_layer_is_refused(value: Any, place: str | None) -> None:
    """A list or numbered map as long as the old depth is refused by its key unless it is known."""
    known = {"layer_types", "eos_token_id", "ignore"}
    if place is None:
        check_understood(value, 4, known)
        return
    with pytest.raises(RefusedError, match=f"^{place} "):
        check_understood(value, 4, known)
