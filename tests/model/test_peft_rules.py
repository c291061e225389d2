"""Rules of PEFT, compared with the installed PEFT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from peft.tuners import tuners_utils
from peft.utils import constants, transformers_weight_conversion

from mergekit_interleave.training import peft_rules

LAYERS = [f"model.layers.{index}.self_attn.q_proj" for index in range(50)]

_WORD = st.sampled_from(
    ["model", "layers", "h", "4", "14", "40", "mlp", "down_proj", "q_proj", "x"]
)
_NAME = st.lists(_WORD, min_size=1, max_size=6).map(".".join)


@given(
    names=st.lists(_NAME, min_size=1, max_size=8),
    targets=st.lists(_NAME, min_size=1, max_size=3),
    layers=st.none() | st.lists(st.sampled_from([4, 14, 40]), min_size=1, max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "h", "model.layers"]),
)
def test_lists_of_endings(
    names: list[str], targets: list[str], layers: list[int] | None, pattern: str | None
) -> None:
    """A list selects the same modules as in PEFT, with and without `layers_to_transform`."""
    pattern = pattern if layers else None
    config: Any = SimpleNamespace(
        target_modules=set(targets), layers_to_transform=layers, layers_pattern=pattern
    )
    selected = {name for name in names if tuners_utils.check_target_module_exists(config, name)}
    assert peft_rules.adapted_modules(names, targets, layers, pattern) == selected


def test_regular_expressions() -> None:
    """A regular expression must match the whole name."""
    regex = r".*\.layers\.(?:4|14)\.self_attn\.q_proj"
    config: Any = SimpleNamespace(target_modules=regex)
    selected = {name for name in LAYERS if tuners_utils.check_target_module_exists(config, name)}
    assert peft_rules.adapted_modules(LAYERS, regex) == selected
    assert selected == {LAYERS[4], LAYERS[14]}


def test_names_of_experts() -> None:
    """The names of experts and the length of a shortened list equal PEFT's constants."""
    table = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING  # noqa: SLF001
    assert {word for words in table.values() for word in words} == peft_rules.EXPERT_NAMES
    assert constants.MIN_TARGET_MODULES_FOR_OPTIMIZATION == peft_rules.SHORTENED_FROM


def test_modules_refused_in_mamba() -> None:
    """PEFT refuses exactly these modules of these types; a newer PEFT may accept them."""
    for model_type in (*peft_rules.MAMBA_TYPES, "llama", "bamba"):
        model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        for name in (*peft_rules.MAMBA_REFUSED, "in_proj"):
            config: Any = SimpleNamespace(peft_type="LORA")
            try:
                tuners_utils._check_lora_target_modules_mamba(config, model, name)  # noqa: SLF001
                refused = False
            except ValueError:
                refused = True
            known = model_type in peft_rules.MAMBA_TYPES and name in peft_rules.MAMBA_REFUSED
            assert refused == known, (model_type, name)


def test_saved_modules_match_within_a_word() -> None:
    """`layers.4` does not select layer 14, but `s.4` selects any stack whose name ends in s."""
    names = ["model.layers.4", "model.layers.14", "model.experts.4"]
    assert peft_rules.saved_modules(names, ["layers.4"]) == {"model.layers.4"}
    assert peft_rules.saved_modules(names, ["s.4"]) == {"model.layers.4", "model.experts.4"}
