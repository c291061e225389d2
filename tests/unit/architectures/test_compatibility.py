"""Checks for layers of two models that cannot be stacked."""

from __future__ import annotations

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.compatibility import disagreement
from mergekit_interleave.architectures.family import Family


def family_of(name: str) -> Family:
    """Return a family from the data."""
    family = families.family_of(name)
    assert family is not None
    return family


def test_equal_settings_in_two_forms_agree() -> None:
    """Settings are equal in the forms of transformers 4 and 5, with or without defaults."""
    family = family_of("llama")
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}, "hidden_size": 8}
    new = {
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500000},
        "hidden_size": 8,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    assert disagreement(old, new, family) is None
    assert disagreement({}, {"rope_theta": 10000.0, "rope_scaling": None}, family) is None


def test_derived_settings_may_be_missing() -> None:
    """A key that follows from other keys may be missing, as in older configs."""
    family = family_of("llama")
    whole = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4}
    assert disagreement(whole, {"hidden_size": 32, "num_attention_heads": 4}, family) is None


def test_differences_that_prevent_stacking() -> None:
    """A disagreement has the key and both values."""
    llama, mistral = family_of("llama"), family_of("mistral")
    assert disagreement({}, {"hidden_act": "gelu"}, llama) == ("hidden_act", "silu", "gelu")
    assert disagreement({"sliding_window": 8}, {}, mistral) == ("sliding_window", 8, 4096)
    found = disagreement({"tie_word_embeddings": True}, {}, llama)
    assert found == ("tie_word_embeddings", True, False)
    rope = disagreement({"rope_theta": 1e6}, {}, llama)
    assert rope is not None
    assert rope[0] == "rope"
