"""`gen --as peft`: PEFT's `layer_replication` builds the same layers as the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from harness import Cli
from transformers import AutoModelForCausalLM

TEXT = torch.arange(1, 21)[None] % 60


def logits(model: Any) -> Any:
    """Return the logits of a short text."""
    with torch.no_grad():
        return model.eval()(TEXT).logits


def replicated(base: Path, text: str) -> Any:
    """Load a model and let PEFT copy its layers."""
    config = peft.LoraConfig(**json.loads(text))
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.mark.parametrize(
    "directive",
    [
        "stack: [[0, 6], [2, 8]]",
        "repeat: [2, 6]",
        "interleave: every 4, zero: none",
        "drop: [3, 5]",
        "layer_replication: [[0, 4], [2, 5], [5, 8]]",
    ],
)
def test_the_same_layers(directive: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A model with layers copied by PEFT computes what the model that `run` writes computes."""
    out = tmp_path / "out"
    assert mk("run", directive, out, "--model", tiny, "--engine", "stream").status == 0
    written = mk("gen", directive, "--model", tiny, "--as", "peft")
    assert (written.status, written.err) == (0, "")
    expected = logits(AutoModelForCausalLM.from_pretrained(out))
    assert torch.equal(logits(replicated(tiny, written.out)), expected)


def test_peft_form_is_stack(mk: Cli) -> None:
    """`layer_replication` as a directive expands to the slices of `stack`."""
    words = ("--model", "org/name", "--layers", "8")
    peft_form = mk("gen", "layer_replication: [[0, 4], [2, 5]]", *words)
    assert (peft_form.status, peft_form.out) == (0, mk("gen", "--stack", "0:4,2:5", *words).out)
    assert "PEFT" in mk("gen", "layer_replication: [[4, 0]]", *words).err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--every", "4"], "layer 4"),
        (["--stack", "0:6,2:8", "--scale", "q_proj=0.5"], "layer 6"),
        (["models: {a: org/one, b: org/two}, layout: [a 0:4, b 2:8]"], "2 models"),
        (["--repeat", "2:4", "--model", "org/one+org/lora", "--layers", "8"], "LoRA"),
        (["repeat: [2, 4], tokenizer_source: base"], "tokenizer"),
    ],
)
def test_what_peft_cannot_do(words: list[str], named: str, mk: Cli) -> None:
    """A layout that `layer_replication` cannot state is refused with the reason."""
    if not any("model" in word for word in words):
        words = [*words, "--model", "org/one", "--layers", "8"]
    result = mk("gen", *words, "--as", "peft")
    assert (result.status, result.out) == (1, "")
    assert named in result.err


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_types_that_peft_gets_wrong(name: str, mk: Cli, tmp_path: Path) -> None:
    """A type is refused if PEFT fails to find its layers, or leaves a list of layers too short."""
    base = zoo.save(name, tmp_path / name)
    words = ("--repeat", "2:6", "--model", base)
    result = mk("gen", *words, "--as", "peft")
    assert result.status == 1
    assert "layer_types" in result.err or name in result.err
    ranges = [[0, 3], [2, 4], [3, 5], [4, 6], [5, 8]]
    config = {"layer_replication": ranges, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with pytest.raises((ValueError, IndexError, KeyError)):
        logits(replicated(base, json.dumps(config)))
