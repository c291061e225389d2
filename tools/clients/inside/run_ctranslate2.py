"""Score a text with CTranslate2. Usage: float32|int8 MODEL..."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer

TEXT = "The river froze early that year, and the children skated to school before the sun came up."


def score(model: str, precision: str) -> dict[str, object]:
    """Return the log-probability of each token, and a greedy continuation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(TEXT).input_ids)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "converted")
        TransformersConverter(model).convert(str(out), quantization=precision)
        generator = ctranslate2.Generator(str(out), device="cpu", compute_type=precision)
        scores = generator.score_batch([tokens])[0].log_probs
        text = generator.generate_batch([tokens[:8]], max_length=12, sampling_topk=1)
    return {"scores": scores, "text": text[0].sequences_ids[0]}


print(json.dumps({model: score(model, sys.argv[1]) for model in sys.argv[2:]}))
