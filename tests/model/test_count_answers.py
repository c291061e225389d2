"""The example that counts exact answers counts those that greedy decoding writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import book, make_llama, tokenizer
from tokenizers import decoders
from transformers import AutoModelForCausalLM

from mergekit_interleave.scanning import sequences

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import count_answers


def greedy(model: Any, prompt: str, length: int) -> str:
    """Return the words that greedy decoding writes after a prompt."""
    words = tokenizer(64)
    given = torch.tensor([words.encode(prompt)])
    found = model.generate(given, do_sample=False, max_new_tokens=length, eos_token_id=None)
    return str(words.decode(found[0, given.shape[1] :]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a model of 4 layers."""
    return make_llama(tmp_path / "toy", layers=4)


@pytest.fixture
def items(model: Path, tmp_path: Path) -> Path:
    """Write items of which the model gives every second answer, all but the last word of others."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    lines = []
    for number in range(12):
        prompt = " ".join(book(40).split()[number : number + 3 + number % 4])
        *first, last = greedy(loaded, prompt, 1 + number % 3).split()
        if number % 2:
            last = "word58" if last == "word59" else "word59"
        lines.append(json.dumps({"prompt": f"{prompt} ", "answer": " ".join([*first, last])}))
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_exact(model: Path, items: Path) -> None:
    """Answers that greedy decoding writes count; others do not, nor does the start of a word."""
    loaded, words = AutoModelForCausalLM.from_pretrained(model), tokenizer(64)
    scored = sequences.of_items(words, items.read_text("utf-8"), "items")
    assert [*count_answers.exact(loaded, words, scored)] == [True, False] * 6
    words.backend_tokenizer.decoder = decoders.Fuse()  # what follows is the same word
    assert not count_answers.exact(loaded, words, scored).any()


def test_the_script(
    model: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of zeroed copies, the same answers are right as of the model, in every draw."""
    (tmp_path / "layouts").write_text("append: 1\ninterleave: every 2\n", encoding="utf-8")
    count_answers.main(model, items, tmp_path / "layouts", questions=12)
    first, *layouts, last = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["6", "of", "12:"]
    for line in layouts:
        assert line.split()[:5] == ["6,", "0", "gained,", "0", "lost:"]
    assert " 0% of " in last


def test_luck() -> None:
    """The best of many layouts that are no better often has twice as many of a few answers."""
    random = np.random.default_rng(1)
    base, *layouts = random.random((31, 1000)) < 3 / 17
    chances = [count_answers.luck(base, np.array(layouts), number) for number in (17, 500)]
    assert chances[0] > 0.5
    assert chances[1] == 0
    assert count_answers.luck(base, np.array([base]), 17) == 0
