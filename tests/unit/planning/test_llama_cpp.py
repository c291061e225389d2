"""A layout that breaks what llama.cpp has built in is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_interleave.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.directive import Directive, parse
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import expand
from mergekit_interleave.planning import grown_config, llama_cpp
from mergekit_interleave.planning.grown_config import GrownConfig
from mergekit_interleave.planning.resolve import resolve

SLIDING, FULL = "sliding_attention", "full_attention"


def kinds(depth: int, period: int, shift: int = 0) -> list[str]:
    """Return layer types of which the last of each period is full attention."""
    return [SLIDING if (i + 1 + shift) % period else FULL for i in range(depth)]


def gemma3(types: list[str]) -> dict[str, Any]:
    """Return the config.json of a Gemma 3."""
    return {"model_type": "gemma3_text", "num_hidden_layers": len(types), "layer_types": types}


def base_of(path: Path, config: dict[str, Any]) -> Checkpoint:
    """Save a config.json and open it."""
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(ModelRef(ModelPath(str(path))))


def grown(base: Checkpoint, text: str) -> tuple[GrownConfig, Directive]:
    """Grow a model by a directive, from its config alone."""
    directive = parse(text, "x")
    assert directive.growth is not None
    layout = expand(directive.growth, base.ref, base.depth)
    return grown_config.grow({base.ref: base}, layout), directive


def test_a_model_that_keeps_the_period() -> None:
    """A list with the period of llama.cpp is read right, at any depth."""
    for depth in (6, 8, 26, 62):
        assert llama_cpp.misread(gemma3(kinds(depth, 6))) is None


@pytest.mark.parametrize(
    ("types", "layer"),
    [(kinds(8, 4), 3), (kinds(8, 6, shift=1), 4), ([FULL] * 8, 0), ([SLIDING] * 8, 5)],
)
def test_the_first_wrong_layer_is_named(types: list[str], layer: int) -> None:
    """The first layer whose kind is not the one by its index is named, with the list."""
    found = llama_cpp.misread(gemma3(types))
    assert found is not None
    assert (found.key, found.layer) == ("layer_types", layer)
    assert "6th" in str(found)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 0, 1, 1, 1]}, "no_rope_layers"),
        (
            {
                "model_type": "llama4_text",
                "interleave_moe_layer_step": 2,
                "moe_layers": [1, 3, 4, 7],
            },
            "moe_layers",
        ),
        ({"model_type": "exaone4", "layer_types": kinds(8, 4)}, "layer_types"),
        ({"model_type": "minicpm3", "scale_depth": 1.5}, "scale_depth"),
    ],
)
def test_other_rules(config: dict[str, Any], key: str) -> None:
    """A list of numbers, a list of indices, a built-in depth and a constant are checked alike."""
    found = llama_cpp.misread({"num_hidden_layers": 8, **config})
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "nonsense"},
        {"model_type": "gemma3_text", "layer_types": "nonsense"},
        {"model_type": "gemma3_text"},
        {"model_type": "llama4_text", "moe_layers": [1], "interleave_moe_layer_step": None},
        {"model_type": "exaone4", "layer_types": [FULL] * 8},
        {"model_type": "minicpm3"},
    ],
)
def test_nothing_is_claimed(config: dict[str, Any]) -> None:
    """Nothing is said about a type without a rule, or a config that does not state the list."""
    assert llama_cpp.misread({"num_hidden_layers": 8, **config}) is None


def test_a_composite_is_read_as_its_language_model() -> None:
    """The layers of a composite follow the rule of its language model."""
    config = {"model_type": "gemma3", "text_config": gemma3(kinds(8, 4))}
    assert llama_cpp.misread(config) is not None


@pytest.mark.parametrize(
    ("depth", "period", "wanted", "ranges"),
    [
        (8, 6, 2, [(0, 6), (0, 8)]),
        (8, 6, 8, [(0, 6), (0, 8)]),
        (36, 4, 9, [(0, 20), (16, 36), (32, 36)]),
        (24, 2, 6, [(0, 8), (6, 16), (14, 24), (22, 24)]),
        (8, 4, 8, [(0, 4), (0, 8), (4, 8)]),
    ],
)
def test_whole_periods_are_copied(
    depth: int, period: int, wanted: int, ranges: list[tuple[int, int]]
) -> None:
    """About as many layers are added as wanted, in whole periods, evenly spread."""
    stack = llama_cpp.copied_periods(depth, period, wanted)
    assert stack is not None
    layout = expand(stack, ModelRef(ModelPath("base")), depth)
    sources = [index for start, stop in ranges for index in range(start, stop)]
    assert [layer.source for layer in layout.layers] == sources


def test_the_nearest_layout_is_offered(tmp_path: Path) -> None:
    """The offered directive keeps the period, and zeroes like the given one."""
    base = base_of(tmp_path, gemma3(kinds(26, 6)))
    config, directive = grown(base, "interleave: every 4")
    offer = llama_cpp.alternative(config, directive)
    assert offer == "stack: [[0, 24], [18, 26]], zero: auto"
    assert llama_cpp.misread(grown(base, offer)[0].config()) is None
    assert offer in (llama_cpp.warning(config, directive) or "")


def test_a_plain_copy_is_offered_for_a_plain_copy(tmp_path: Path) -> None:
    """A directive that zeroes nothing is answered by one that zeroes nothing."""
    base = base_of(tmp_path, gemma3(kinds(12, 6)))
    offer = llama_cpp.alternative(*grown(base, "repeat: [3, 6]"))
    assert offer == "stack: [[0, 12], [6, 12]]"


GEMMA3 = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("text", "edits", "of_config"),
    [
        ("repeat: [3, 6], scale: {q_proj: 0.8}", ", scale: {q_proj: 0.8}", True),
        ("repeat: [3, 6], zero: auto, apply_to: all", ", zero: auto, apply_to: all", True),
        ("interleave: every 4, zero: norms", ", zero: norms", True),
        ("append: 1, zero: norms, scale: {q_proj: 2}", ", zero: norms, scale: {q_proj: 2}", False),
        ("interleave: every 4, zero: none", "", True),
    ],
)
@pytest.mark.parametrize("as_config", [False, True])
def test_the_offer_keeps_the_edits(
    tmp_path: Path, text: str, edits: str, *, of_config: bool, as_config: bool
) -> None:
    """The offer zeroes and scales as the directive, or as its mergekit config; or none is made."""
    base = base_of(tmp_path, {**gemma3(kinds(12, 6)), **GEMMA3})
    directive = parse(f"model: {tmp_path}, {text}", "x")
    layout = resolve(directive, Models(), strict=True, allow_non_identity=True).layout
    if as_config:
        directive = parse(mergekit_yaml.to_yaml(layout, {}), "x")
    config = grown_config.grow({base.ref: base}, layout)
    expected = f"stack: [[0, 12], [6, 12]]{edits}" if of_config or not as_config else None
    assert llama_cpp.alternative(config, directive) == expected


def test_the_edits_of_single_steps_have_no_offer(tmp_path: Path) -> None:
    """A layout whose steps are edited differently is answered by no offer."""
    base = base_of(tmp_path, {**gemma3(kinds(12, 6)), **GEMMA3})
    text = "layout: [0:4, {layers: 3:4, scale: {q_proj: 2}}, {layers: 3:4, zero: auto}, 4:12]"
    expansion = resolve(parse(f"model: {tmp_path}, {text}", "x"), Models(), strict=True)
    config = grown_config.grow({base.ref: base}, expansion.layout)
    assert "llama.cpp" in (llama_cpp.warning(config, expansion.directive) or "")
    assert llama_cpp.alternative(config, expansion.directive) is None


def test_a_base_that_breaks_the_period(tmp_path: Path) -> None:
    """No layout is offered if llama.cpp misreads the base, too; the warning says so."""
    base = base_of(tmp_path, gemma3(kinds(8, 4)))
    config, directive = grown(base, "interleave: every 4")
    assert llama_cpp.alternative(config, directive) is None
    assert "base" in (llama_cpp.warning(config, directive) or "")


def test_a_shorter_model_has_no_offer(tmp_path: Path) -> None:
    """Dropping layers has no alternative by copies."""
    base = base_of(tmp_path, gemma3(kinds(12, 6)))
    assert llama_cpp.alternative(*grown(base, "drop: [2, 3]")) is None
