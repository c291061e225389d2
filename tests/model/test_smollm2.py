"""A trained model generates the same text after it grew by a fifth."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, load_tensors

pytestmark = pytest.mark.smollm2
PROMPT = "The three largest cities of France are"


@pytest.fixture(scope="module")
def base() -> Path:
    """Return the checkpoint that `make` builds."""
    path = os.environ.get("MK_INTERLEAVE_SMOLLM2")
    if path is None:
        pytest.skip("MK_INTERLEAVE_SMOLLM2 names no checkpoint; `make test` builds one")
    return Path(path)


def load(path: Path) -> Any:
    """Load the model in float32, and check that no key is missing or unexpected."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def test_30_to_36_layers_generate_the_same_text(mk: Cli, base: Path, tmp_path: Path) -> None:
    """Logits are equal to the last bit, greedy text is equal, and embeddings stay tied."""
    import torch
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    result = mk("run", "interleave: every 5, zero: [o_proj, down_proj]", out, "--model", base)
    assert result.status == 0, result.err
    assert re.search(r"\b36\b.*\b6\b", result.out), result.out
    tokens = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")
    models = [load(base), load(out)]
    assert [model.config.num_hidden_layers for model in models] == [30, 36]
    with torch.no_grad():
        logits = [model(**tokens).logits for model in models]
        texts = [model.generate(**tokens, max_new_tokens=24, do_sample=False) for model in models]
    assert torch.equal(*logits)
    assert torch.equal(*texts)
    assert len(texts[0][0]) > len(tokens["input_ids"][0])

    deeper = models[1]
    assert deeper.get_input_embeddings().weight is deeper.get_output_embeddings().weight
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_tensors(out)
