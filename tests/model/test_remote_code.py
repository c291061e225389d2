"""Models that bring their own code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import Cli, load_tensors, make_llama, set_keys

_CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

if "MARK" in os.environ:
    open(os.environ["MARK"], "a").close()


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkpoint of an unknown type whose code creates a file when it runs."""
    base = make_llama(tmp_path / "odd", layers=4)
    set_keys(
        base / "config.json",
        model_type="odd",
        architectures=["OddForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_odd.OddConfig",
            "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
        },
        odd_key={"kept": [1, 2]},
    )
    (base / "modeling_odd.py").write_text(_CODE)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return base


def test_code_is_not_run_without_the_flag(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """An unknown type is refused without --trust-remote-code, and its code does not run."""
    result = mk("run", "interleave: every 2", tmp_path / "out", "--model", odd)
    assert result.status == 1
    assert str(odd) in result.err
    assert re.match("hint: .*--trust-remote-code ", result.err.splitlines()[-1])
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_a_known_type_needs_no_code_of_its_own(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """The code of a model of a known type is copied but does not run."""
    set_keys(odd / "config.json", model_type="llama")
    result = mk("run", "interleave: every 2", tmp_path / "out", "--model", odd)
    assert result.status == 0, result.err
    assert not (tmp_path / "mark").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_odd.OddConfig"
    assert config["odd_key"] == {"kept": [1, 2]}
    assert (tmp_path / "out" / "modeling_odd.py").read_text() == _CODE


def test_an_unknown_type_is_measured(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """With --trust-remote-code, Llama's names are assumed and the logits are compared."""
    out = tmp_path / "out"
    result = mk("run", "interleave: every 2", out, "--model", odd, "--trust-remote-code")
    assert result.status == 0, result.err
    assert re.search(
        r"^warning: .*'odd'.*\bLlama\b.*: o_proj, down_proj$", result.err, re.MULTILINE
    )
    assert (tmp_path / "mark").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["odd_key"]) == (6, {"kept": [1, 2]})
    assert not load_tensors(out)["model.layers.2.self_attn.o_proj.weight"].any()


def test_logits_that_differ_are_refused(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """If the logits differ because a residual writer is not zeroed, OUT is absent."""
    command = ["run", "interleave: every 2, zero: [o_proj]", tmp_path / "out", "--model", odd]
    result = mk(*command, "--trust-remote-code")
    assert result.status == 1
    assert re.search(r"^error: .*\blogits\b.*\d+e-\d+", result.err), result.err
    assert not (tmp_path / "out").exists()


def test_zeroed_layers_of_an_unknown_type_are_measured(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """Zeroed layers beside a dropped layer are refused, because they cannot be measured."""
    text = "layout: [0:2, {layers: 1:2, zero: [o_proj, down_proj]}, 3:4]"
    command = ["run", text, tmp_path / "out", "--model", odd, "--trust-remote-code"]
    result = mk(*command)
    assert result.status == 1
    assert re.search(r"^error: .*'odd'.*\bmeasured\b", result.err, re.MULTILINE), result.err
    assert not (tmp_path / "out").exists()


def test_strange_layers_are_not_taken_for_llamas(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """A tensor that no Llama has is refused: it might write to the residual stream."""
    from safetensors.torch import save_file

    tensors = load_tensors(odd)
    tensors["model.layers.1.mlp.extra_proj.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    for command in (["gen"], ["run", tmp_path / "out", "--trust-remote-code"]):
        result = mk(*command[:1], "interleave: every 2", *command[1:], "--model", odd)
        assert result.status == 1
        assert "model.layers.1.mlp.extra_proj.weight" in result.err
