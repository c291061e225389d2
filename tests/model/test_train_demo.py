"""Training the new layers, in full or by a LoRA, leaves every original layer unchanged."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, load_tensors, make_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a model of 5 layers and a text that it can learn; commands run in this process."""
    words = [f"word{i * i % 61}" for i in range(4000)]
    chapters = [" ".join(words[:3600]), " ".join(words[3600:])]
    (tmp_path / "text").write_text(train.HELD_OUT.join(chapters), encoding="utf-8")
    monkeypatch.setattr(train, "command", lambda *words: mk(*words).status)
    monkeypatch.setattr(train, "TEXT", tmp_path / "text")
    monkeypatch.setattr(train, "LENGTH", 32)
    monkeypatch.setattr(train, "RATE", 3e-3)
    return make_llama(tmp_path / "toy", layers=5)


def test_the_script(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Original tensors are equal to the bit, every new one has changed, and the loss is lower."""
    assert train.main(base, tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert re.search(r"^original tensors\b.*: yes$", output, re.MULTILINE)
    assert re.search(r"^new tensors\b.*\b9 of 9\b", output, re.MULTILINE)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    old, new = load_tensors(base), load_tensors(tmp_path / "out" / "trained")
    assert len(new) == len(old) + 9
    for name, tensor in old.items():  # the new layer is the last
        assert tensor.equal(new[name]), name


def test_layers_that_were_not_frozen(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If original tensors changed, the script reports it, and its exit code is 1."""

    def no_freeze(model: Any) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    monkeypatch.setattr(train, "freeze_original_layers", no_freeze)
    assert train.main(base, tmp_path / "out") == 1
    assert re.search(r"^original tensors\b.*: NO$", capsys.readouterr().out, re.MULTILINE)


def test_layers_that_were_not_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no new tensor changed, the script reports it, and its exit code is 1."""
    monkeypatch.setattr(train, "RATE", 0.0)
    assert train.main(base, tmp_path / "out") == 1
    assert re.search(r"^new tensors\b.*\b0 of 9\b", capsys.readouterr().out, re.MULTILINE)


def test_a_lora_of_the_new_layers(mk: Cli, base: Path, tmp_path: Path) -> None:
    """A merged LoRA passes `verify --trained`, and only the new projections have changed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    deeper, trained = tmp_path / "deeper", tmp_path / "trained"
    assert mk("run", "append: 2", deeper, "--model", base).status == 0
    new = {"layers_to_transform": [5, 6], "layers_pattern": "layers"}
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=PROJECTIONS, **new)
    model = get_peft_model(train.load(deeper), lora)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_on, held_out = (train.windows(tokenizer, part) for part in train.split(train.TEXT))
    before = train.loss_of(model, held_out)
    train.train(model, train_on)
    assert train.loss_of(model, held_out) < before
    model.merge_and_unload().save_pretrained(trained)

    words = ["--against", base, "--trained", "--recipe", deeper / "interleave.json"]
    result = mk("verify", trained, *words)
    assert (result.status, result.err) == (0, ""), result.out
    old, now = load_tensors(deeper), load_tensors(trained)
    assert old.keys() == now.keys()
    changed = {name for name, tensor in old.items() if not tensor.equal(now[name])}
    assert len(changed) == 2 * len(PROJECTIONS)
    assert all(name.startswith(("model.layers.5.", "model.layers.6.")) for name in changed)
