"""config.json for the new depth."""

from __future__ import annotations

from mergekit_interleave.architecture import families
from mergekit_interleave.modelconfig import deepened, disagreement

BASE = {"model_type": "llama", "num_hidden_layers": 8, "strange": [1], "torch_dtype": "float32"}


def test_only_the_depth_changes() -> None:
    """Unknown keys stay, in their order."""
    result = deepened(BASE, depth=10)
    assert result == {**BASE, "num_hidden_layers": 10}
    assert list(result) == list(BASE)


def test_the_dtype_is_said_under_the_key_that_is_there() -> None:
    """Transformers 5 calls it dtype, before it was torch_dtype."""
    assert deepened(BASE, depth=8, dtype="bfloat16")["torch_dtype"] == "bfloat16"
    assert deepened({"dtype": "float32"}, depth=8, dtype="float16") == {
        "dtype": "float16",
        "num_hidden_layers": 8,
    }
    assert deepened({}, depth=8, dtype="float16")["torch_dtype"] == "float16"


def test_a_local_path_is_not_carried_on() -> None:
    """Older transformers wrote the directory that a model was loaded from."""
    assert "_name_or_path" not in deepened({"_name_or_path": "/home/me/llama"}, depth=1)
    assert deepened({"_name_or_path": "org/name"}, depth=1)["_name_or_path"] == "org/name"


def test_two_spellings_of_one_thing_agree() -> None:
    """Transformers 4 and 5, and a key that is left at its default."""
    family = families()["llama"]
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}, "hidden_size": 8}
    new = {
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500000},
        "hidden_size": 8,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    assert disagreement(old, new, family) is None
    assert disagreement({}, {"rope_theta": 10000.0, "rope_scaling": None}, family) is None


def test_what_is_derived_need_not_be_written() -> None:
    """Older configs leave out what follows from other keys."""
    family = families()["llama"]
    whole = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4}
    assert disagreement(whole, {"hidden_size": 32, "num_attention_heads": 4}, family) is None


def test_what_layers_cannot_be_stacked_over() -> None:
    """Each is named with its two values."""
    llama, mistral = families()["llama"], families()["mistral"]
    assert disagreement({}, {"hidden_act": "gelu"}, llama) == ("hidden_act", "silu", "gelu")
    assert disagreement({"sliding_window": 8}, {}, mistral) == ("sliding_window", 8, 4096)
    found = disagreement({"tie_word_embeddings": True}, {}, llama)
    assert found == ("tie_word_embeddings", True, False)
    rope = disagreement({"rope_theta": 1e6}, {}, llama)
    assert rope is not None
    assert rope[0] == "rope"
