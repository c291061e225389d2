"""Unusual models and plans compute what the base computes, in logits and greedy text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import zoo
from harness import Cli, load_tensors
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


def shallow(name: str, path: Path, depth: int, **settings: Any) -> Path:
    """Make a toy model of another depth."""
    config = toys.config(name)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = depth
    if kinds:
        config.layer_types = (kinds * depth)[:depth]
    for key, value in settings.items():
        setattr(config, key, value)
    toys.animated(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(path)
    return path


PLANS = [
    ("llama", 1, "interleave: every 1"),
    ("llama", 1, "append: 3"),
    ("gemma2", 1, "append: 1"),
    ("llama", 7, "interleave: every 4"),
    ("gemma2", 5, "interleave: every 2"),
    ("gemma2", 3, "repeat: {layers: [1, 2], times: 5}, zero: auto"),
    ("gemma3_text", 7, "interleave: every 3"),
    ("gemma3_text", 7, "append: 3"),
    ("deepseek_v2", 3, "interleave: 2 layers"),
    ("deepseek_v2", 4, "append: 2"),
    ("deepseek_v2", 4, "repeat: {layers: [0, 2], times: 3}, zero: auto"),
    ("deepseek_v2", 4, "repeat: {layers: [1, 3], as: block}, zero: auto"),
]


@pytest.mark.parametrize(("name", "depth", "plan"), PLANS)
def test_depths_and_plans(name: str, depth: int, plan: str, tmp_path: Path) -> None:
    """Unusual depths and plans are exact.

    A block that puts dense layers after layers with experts is refused, because the config has only
    the number of leading dense layers.
    """
    base = shallow(name, tmp_path / "base", depth)
    outcome = zoo.expand(base, plan, tmp_path / "out")
    if "block" in plan:
        assert outcome.result == "refused", outcome
        assert "first_k_dense_replace" in outcome.detail
    else:
        assert outcome.result == "exact", outcome


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_tied_or_not(model_type: str, tied: bool, tmp_path: Path) -> None:
    """The head is stored if and only if it is not tied to the embeddings."""
    base = shallow(model_type, tmp_path / "base", 4, tie_word_embeddings=tied)
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    assert ("lm_head.weight" in load_tensors(tmp_path / "out")) != tied


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_shards_in_and_out(name: str, mk: Cli, tmp_path: Path) -> None:
    """The number of shards of the base and of OUT does not change the tensors."""
    zoo.save(name, tmp_path / "one")
    model = zoo.load(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    found = {}
    for source in ("one", "many"):
        for size in ("60KB", "1GB"):
            out = tmp_path / f"{source}-{size}"
            words = ("--model", tmp_path / source, "--out-shard-size", size)
            assert mk("run", zoo.EVERY, out, *words).status == 0
            assert (len(list(out.glob("*.safetensors"))) > 1) == (size == "60KB")
            found[out] = load_tensors(out)
            assert not zoo.compare(tmp_path / "one", out)
    first, *others = found.values()
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_lists_that_are_absent_are_written_out(tmp_path: Path) -> None:
    """A list that transformers derives from the depth is written out for the new depth."""
    base = zoo.save("gemma3_text", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    kinds = config.pop("layer_types")
    config["sliding_window_pattern"] = 3
    (base / "config.json").write_text(json.dumps(config))
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    written = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert kinds != written[:8]
    assert len(written) == 12


def test_a_stated_middle_layer_of_a_long_model(tmp_path: Path) -> None:
    """One copy of a middle layer and two copies of it are exact."""
    base = shallow("llama", tmp_path / "base", 12)
    for i, plan in enumerate(("stack: [[0, 7], [6, 12]]", "stack: [[0, 7], [6, 7], [6, 12]]")):
        outcome = zoo.expand(base, f"{plan}, zero: auto", tmp_path / f"out{i}")
        assert outcome.result == "exact", outcome


def edited(base: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the config.json of a checkpoint."""
    config = json.loads((base / "config.json").read_text())
    change(config)
    (base / "config.json").write_text(json.dumps(config))
    return base


ABSENT = [
    ("minicpm3", "scale_depth", zoo.EVERY),
    ("inkling2_text", "n_layers_per_attn_res_block", "stack: [[0, 5], [4, 8]], zero: auto"),
]


@pytest.mark.parametrize(("name", "key", "plan"), ABSENT)
def test_a_missing_key_has_the_default_of_its_class(
    name: str, key: str, plan: str, tmp_path: Path
) -> None:
    """A key that config.json does not have gets its default from the config class."""
    default = getattr(type(toys.config(name))(), key)
    base = shallow(name, tmp_path / "base", 8, **{key: default})
    edited(base, lambda config: config.pop(key))
    assert zoo.expand(base, plan, tmp_path / "out").result == "exact"


def test_a_depth_that_two_keys_state(tmp_path: Path) -> None:
    """If two keys state the depth, both are changed, because the alias takes precedence."""
    base = zoo.save("gpt2", tmp_path / "base")
    edited(base, lambda config: config.update(num_hidden_layers=8))
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"


def test_a_text_config_that_states_no_type(tmp_path: Path) -> None:
    """A text config without `model_type` gets the type from its class."""
    base = zoo.save("gemma3", tmp_path / "base")
    edited(base, lambda config: config["text_config"].pop("model_type"))
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"


def test_lists_of_several_models(mk: Cli, tmp_path: Path) -> None:
    """Each layer has the entry of its own model; if one model has no list, that is an error."""
    for name in ("a", "b"):
        base = shallow("llama", tmp_path / name, 4)
        edited(base, lambda config: config.update(layer_types=["full_attention"] * 4))
    ranges = "\n".join(
        f"- sources: [{{model: {tmp_path / name}, layer_range: [0, 3]}}]" for name in ("a", "b")
    )
    recipe = tmp_path / "stack.yml"
    recipe.write_text(f"slices:\n{ranges}\nmerge_method: passthrough\n")
    assert mk("run", recipe, tmp_path / "out").status == 0
    assert len(zoo.load(tmp_path / "out").config.layer_types) == 6
    edited(tmp_path / "b", lambda config: config.pop("layer_types"))
    result = mk("run", recipe, tmp_path / "other")
    assert (result.status, "layer_types" in result.err) == (1, True)


def test_scales_of_the_last_slice_of_another_type(mk: Cli, tmp_path: Path) -> None:
    """A scale of the last slice is refused if mergekit does not know which tensors follow it."""
    base = shallow("smollm3", tmp_path / "base", 4)
    (tmp_path / "cfg.yml").write_text(
        f"slices:\n- sources: [{{model: {base}, layer_range: [0, 4]}}]\n"
        f"- sources: [{{model: {base}, layer_range: [2, 4], parameters: {{scale: 0}}}}]\n"
        "merge_method: passthrough\n"
    )
    result = mk("run", tmp_path / "cfg.yml", tmp_path / "out")
    assert result.status == 1
    assert re.search(r"^error: .*\bscale\b.*\bmodel\.norm\.weight\b", result.err), result.err
    assert "`filter`" in result.err


@pytest.mark.parametrize("name", ["doge", "gemma2"])
def test_the_recipe_in_out_makes_the_same_again(name: str, mk: Cli, tmp_path: Path) -> None:
    """The recipe in OUT records fills, and the card states that mergekit cannot apply them."""
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    zero = "norms" if name == "gemma2" else "auto"
    assert zoo.expand(base, f"{zoo.EVERY}, zero: {zero}", out).result == "exact"
    recipe = out / "mergekit_config.yml"
    assert mk("run", recipe, tmp_path / "again", "--model", base).status == 0
    assert not zoo.compare(base, tmp_path / "again")
    assert mk("gen", recipe, "--model", base).status == 1
    card = (out / "README.md").read_text()
    tensor = "input_residual" if name == "doge" else "post_attention_layernorm.weight"
    assert re.search(rf"\bmergekit\b.*\bfill model\.layers\.2\.{tensor}\b", card)
