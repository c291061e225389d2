"""Models that bring their own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, load_tensors, make_llama

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
    """A checkpoint of a type that nobody knows; its code leaves a mark when it is run."""
    base = make_llama(tmp_path / "odd", layers=4)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_odd.OddConfig",
            "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
        },
        "odd_key": {"kept": [1, 2]},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_odd.py").write_text(_CODE)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return base


def change(base: Path, **changes: Any) -> None:
    """Rewrite keys of a config.json."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def test_code_is_not_run_without_leave(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """The model is refused, and the hint names the flag."""
    result = mk("run", "interleave: every 2", tmp_path / "out", "--model", odd)
    assert result.status == 1
    assert "transformers cannot build the model" in result.err
    assert "--trust-remote-code" in result.err
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_a_known_type_needs_no_code_of_its_own(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """What it brings is carried along and not run."""
    change(odd, model_type="llama")
    result = mk("run", "interleave: every 2", tmp_path / "out", "--model", odd)
    assert result.status == 0, result.err
    assert not (tmp_path / "mark").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_odd.OddConfig"
    assert config["odd_key"] == {"kept": [1, 2]}
    assert (tmp_path / "out" / "modeling_odd.py").read_text() == _CODE


def test_an_unknown_type_is_measured(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """With leave to run its code, it is taken for a Llama, and its logits are compared."""
    out = tmp_path / "out"
    result = mk("run", "interleave: every 2", out, "--model", odd, "--trust-remote-code")
    assert result.status == 0, result.err
    assert "model type 'odd' is not known, so Llama's names are assumed" in result.err
    assert (tmp_path / "mark").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["odd_key"]) == (6, {"kept": [1, 2]})
    assert not load_tensors(out)["model.layers.2.self_attn.o_proj.weight"].any()


def test_what_is_measured_to_differ_is_refused(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """Names that leave a writer standing make no identity, and nothing is at OUT."""
    command = ["run", "interleave: every 2, zero: [o_proj]", tmp_path / "out", "--model", odd]
    result = mk(*command, "--trust-remote-code")
    assert result.status == 1
    assert "the result does not compute what its base" in result.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_type_is_grown_by_identities_alone(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """What changes the outputs cannot be measured."""
    command = ["run", "repeat: [1, 3]", tmp_path / "out", "--model", odd]
    result = mk(*command, "--trust-remote-code")
    assert result.status == 1
    assert "only an expansion that computes what its base computes" in result.err


def test_strange_layers_are_not_taken_for_llamas(mk: Cli, odd: Path, tmp_path: Path) -> None:
    """A tensor that no Llama has might write to the residual stream."""
    from safetensors.torch import save_file

    tensors = load_tensors(odd)
    tensors["model.layers.1.mlp.extra_proj.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    for command in (["gen"], ["run", tmp_path / "out", "--trust-remote-code"]):
        result = mk(*command[:1], "interleave: every 2", *command[1:], "--model", odd)
        assert result.status == 1
        assert "model.layers.1.mlp.extra_proj.weight" in result.err
