"""What trainers make of names: PEFT's rules against PEFT itself, the others as described."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners import tuners_utils
from peft.utils import constants, transformers_weight_conversion

from mergekit_interleave.training import selectors

LAYERS = [f"model.layers.{index}.self_attn.q_proj" for index in range(50)]
TOWER = [f"model.vision_tower.encoder.layers.{index}.self_attn.q_proj" for index in range(50)]
WEIGHTS = [f"{name}.weight" for name in LAYERS]


def indices(names: set[str]) -> list[int]:
    """The layers of some names."""
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})


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
def test_pefts_lists(
    names: list[str], targets: list[str], layers: list[int] | None, pattern: str | None
) -> None:
    """Endings, with layers or without, are what the installed PEFT takes them for."""
    pattern = pattern if layers else None
    config: Any = SimpleNamespace(
        target_modules=set(targets), layers_to_transform=layers, layers_pattern=pattern
    )
    theirs = {name for name in names if tuners_utils.check_target_module_exists(config, name)}
    assert selectors.peft_modules(names, targets, layers, pattern) == theirs


def test_pefts_regular_expressions() -> None:
    """One for whole names."""
    regex = r".*\.layers\.(?:4|14)\.self_attn\.q_proj"
    config: Any = SimpleNamespace(target_modules=regex)
    theirs = {name for name in LAYERS if tuners_utils.check_target_module_exists(config, name)}
    assert selectors.peft_modules(LAYERS, regex) == theirs
    assert indices(theirs) == [4, 14]


def test_what_peft_takes_for_experts() -> None:
    """The words that it renames, and from how many targets on it writes them shorter."""
    table = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING  # noqa: SLF001
    assert {word for words in table.values() for word in words} == selectors.PEFT_RENAMED
    assert constants.MIN_TARGET_MODULES_FOR_OPTIMIZATION == selectors.PEFT_CONDENSED


def test_what_peft_refuses_in_mamba() -> None:
    """The types and names that it knows; the test fails when PEFT no longer refuses them."""
    for model_type in (*selectors.PEFT_MAMBA, "llama", "bamba"):
        model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        for name in (*selectors.PEFT_NO_MAMBA, "in_proj"):
            config: Any = SimpleNamespace(peft_type="LORA")
            try:
                tuners_utils._check_lora_target_modules_mamba(config, model, name)  # noqa: SLF001
                refused = False
            except ValueError:
                refused = True
            known = model_type in selectors.PEFT_MAMBA and name in selectors.PEFT_NO_MAMBA
            assert refused == known, (model_type, name)


def test_pefts_saved_modules_end_in_part_of_a_word() -> None:
    """`layers.4` is not 14, but `s.4` is of any stack whose name ends in s."""
    names = ["model.layers.4", "model.layers.14", "model.experts.4"]
    assert selectors.peft_saved(names, ["layers.4"]) == {"model.layers.4"}
    assert selectors.peft_saved(names, ["s.4"]) == {"model.layers.4", "model.experts.4"}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("model.layers.4.", [4]),
        ("model.layers.(4|14).", [4, 14]),
        (".+layers.(4|14).", [4, 14]),
        ("model.layers.4", [4, *range(40, 50)]),
        ("layers.4.", []),
    ],
)
def test_axolotl(pattern: str, layers: list[int]) -> None:
    """From the start of a name, and dots are dots."""
    assert indices(selectors.axolotl(WEIGHTS, [pattern])) == layers


def test_axolotl_takes_towers_too() -> None:
    """`.+` is anything before."""
    tower = [f"{name}.weight" for name in TOWER]
    assert selectors.axolotl(tower, [".+layers.(4|14)."])
    assert not selectors.axolotl(tower, ["model.layers.(4|14)."])


def test_llamafactory_counts_as_its_expander_places() -> None:
    """L layers in n groups, a new one after each: what its script makes is what its mode trains."""
    for depth in range(1, 97):
        for count in (n for n in range(1, depth + 1) if depth % n == 0):
            stride = depth // count
            made = [group * (stride + 1) + stride for group in range(count)]
            found = selectors.llamafactory_layers(depth + count, count, llama_pro=True)
            assert list(found) == made


@pytest.mark.parametrize(
    ("depth", "count", "llama_pro", "layers"),
    [
        (49, 2, True, ()),
        (40, 8, True, (4, 9, 14, 19, 24, 29, 34, 39)),
        (8, 2, False, (6, 7)),
        (8, -2, False, (0, 1)),
        (8, -2, True, ()),
        (2, 9, False, (0, 1)),
    ],
)
def test_llamafactory_without_its_script(
    depth: int, count: int, *, llama_pro: bool, layers: tuple[int, ...]
) -> None:
    """The last, the first, or none where the count does not divide."""
    assert selectors.llamafactory_layers(depth, count, llama_pro=llama_pro) == layers


def test_llamafactory_looks_anywhere_in_a_name() -> None:
    """Layer 4 of a tower, and expert 4, too."""
    odd = ["model.layers.7.mlp.experts.4.w1.weight", f"{TOWER[4]}.weight"]
    found = selectors.llamafactory([*WEIGHTS, *odd], [4])
    assert found == {WEIGHTS[4], *odd}
    assert selectors.llamafactory_lora(LAYERS, ["4.self_attn.q_proj"]) == {
        LAYERS[index] for index in (4, 14, 24, 34, 44)
    }


def test_swift_keeps_the_last_dot() -> None:
    """Beginnings: without it 40 to 49 are taken, too."""
    assert indices(selectors.swift(WEIGHTS, ["model.layers.4."])) == [4]
    assert indices(selectors.swift(WEIGHTS, ["model.layers.4"])) == [4, *range(40, 50)]


def test_how_many_layers_llamafactory_counts() -> None:
    """By whichever key the config has, and those of the text."""
    assert selectors.llamafactory_depth(SimpleNamespace(n_layer=12)) == 12
    text = SimpleNamespace(num_hidden_layers=None, num_layers=8)
    assert selectors.llamafactory_depth(SimpleNamespace(text_config=text, n_layer=3)) == 8
    assert selectors.llamafactory_depth(SimpleNamespace()) is None


def test_the_modules_that_llamafactory_knows() -> None:
    """Those of the first layer or the second, which some types begin with."""
    names = ["model.layers.0.mlp.up.weight", "h.1.attn.q", "h.2.moe.w", "model.norm.weight"]
    assert selectors.llamafactory_modules(names) == {"mlp", "attn"}
