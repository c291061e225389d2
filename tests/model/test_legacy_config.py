"""`--legacy-config` writes what transformers 4 reads beside what transformers 5 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import zoo
from harness import Cli, logits, make_llama, save_tokenizer, set_keys
from transformers import AutoModelForCausalLM, AutoTokenizer

THETA = 500000.0


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Save a Llama that transformers 4 misreads: its rope_theta, and the class of its tokenizer."""
    rope = {"rope_theta": THETA, "rope_type": "default"}
    path = make_llama(tmp_path / "base", rope_parameters=rope)
    set_keys(path / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    return path


@pytest.mark.parametrize("engine", ["mergekit", "stream"])
def test_a_model_for_both(mk: Cli, base: Path, tmp_path: Path, engine: str) -> None:
    """The result states the old keys, computes what its base computes, and passes every check."""
    out = tmp_path / "out"
    words = ("run", "interleave: every 4", out, "--model", base, "--engine", engine)
    made = mk(*words, "--legacy-config")
    assert (made.status, "transformers 4" in made.err) == (0, False), made.err
    config = read(out / "config.json")
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (THETA, THETA)
    assert read(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read(out / "interleave.json")["legacy_config"] is True
    assert torch.equal(logits(out), logits(base))
    assert AutoTokenizer.from_pretrained(out)("word1 word2").input_ids == [4, 5]
    for against in ((), ("--against", base)):
        assert mk("verify", out, *against).status == 0
    assert "transformers 4" in (out / "README.md").read_text(encoding="utf-8")


def test_verify_notices_a_lost_key(mk: Cli, base: Path, tmp_path: Path) -> None:
    """interleave.json records the option, so a key that is gone or wrong is a difference."""
    out = tmp_path / "out"
    assert mk("run", "append: 1", out, "--model", base, "--legacy-config").status == 0
    set_keys(out / "config.json", rope_theta=10000.0)
    wrong = mk("verify", out, "--against", base)
    assert (wrong.status, "rope_theta" in wrong.err + wrong.out) == (1, True)


def test_it_is_said_where_it_matters(mk: Cli, base: Path, tmp_path: Path) -> None:
    """`plan`, `run` and the card name the value that transformers 4 uses; other bases have none."""
    out = tmp_path / "out"
    planned = mk("plan", "append: 1", "--model", base)
    made = mk("run", "append: 1", out, "--model", base)
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (planned.out, made.err, card):
        assert "rope_theta 10000.0 instead of 500000.0" in text
        assert "tokenizer" in text
    other = make_llama(tmp_path / "other")
    assert "transformers 4" not in mk("plan", "append: 1", "--model", other).out


def test_fix_config(mk: Cli, base: Path, tmp_path: Path) -> None:
    """`fix-config --legacy-config` writes the same files as `run --legacy-config`."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert mk("run", "append: 1", one, "--model", base, "--legacy-config").status == 0
    assert mk("run", "append: 1", other, "--model", base).status == 0
    fixed = mk("fix-config", other, "--model", base, "--legacy-config")
    assert fixed.status == 0, fixed.err
    for name in ("config.json", "tokenizer_config.json"):
        assert read(one / name) == read(other / name)
        assert name in fixed.out
    assert mk("verify", other, "--against", base).status == 0
    (other / "interleave.json").unlink()
    assert mk("verify", other, "--against", base).status == 0


def test_llama_cpp(mk: Cli, tmp_path: Path) -> None:
    """`plan`, `run` and the card offer a layout that keeps the period, and it has no warning."""
    base, offer = tmp_path / "base", "stack: [[0, 6], [0, 8]], zero: auto"
    config = toys.config("gemma3_text")
    config.layer_types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    toys.animated(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(base)
    save_tokenizer(base)
    planned = mk("plan", "interleave: every 4", "--model", base)
    made = mk("run", "interleave: every 4", tmp_path / "out", "--model", base)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for text in (planned.out, made.err, card):
        assert offer in text
    assert read(tmp_path / "out" / "interleave.json")["llama_cpp_layout"] == offer
    better = mk("run", offer, tmp_path / "better", "--model", base)
    assert (better.status, "llama.cpp" in better.err) == (0, False), better.err
    assert zoo.compare(base, tmp_path / "better") == ""
