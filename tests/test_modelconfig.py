"""config.json for the new depth."""

from __future__ import annotations

from mergekit_interleave.modelconfig import deepened

BASE = {"model_type": "llama", "num_hidden_layers": 8, "strange": [1], "torch_dtype": "float32"}


def test_only_the_depth_changes() -> None:
    """Unknown keys stay, in their order."""
    result = deepened(BASE, depth=10)
    assert result == {**BASE, "num_hidden_layers": 10}
    assert list(result) == list(BASE)


def test_the_dtype_is_said_under_the_key_that_is_there() -> None:
    """Transformers 5 calls it dtype, before it was torch_dtype."""
    assert deepened(BASE, depth=8, dtype="bfloat16")["torch_dtype"] == "bfloat16"
    assert deepened({"dtype": "float32"}, depth=8, dtype="torch.float16") == {
        "dtype": "float16",
        "num_hidden_layers": 8,
    }
    assert deepened({}, depth=8, dtype="float16")["torch_dtype"] == "float16"


def test_a_local_path_is_not_carried_on() -> None:
    """Older transformers wrote the directory that a model was loaded from."""
    assert "_name_or_path" not in deepened({"_name_or_path": "/home/me/llama"}, depth=1)
    assert deepened({"_name_or_path": "org/name"}, depth=1)["_name_or_path"] == "org/name"
