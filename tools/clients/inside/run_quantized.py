"""Compare quantized models in memory with written ones.

Usage: `quantize BASE OUT`, or `METHOD BASE DIRECTIVE WRITTEN`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import mergekit_interleave

TOKENS = torch.randint(3, 120, (4, 40), generator=torch.Generator().manual_seed(1))


def main(method: str, base: str, directive: str, written: str) -> None:
    """Print whether the model in memory and the written one compute the same."""
    source, other = loaded(method, base), loaded(method, written)
    before = source(TOKENS).logits
    grown = mergekit_interleave.load(directive, base=source)
    found = {
        "logits": torch.equal(grown(TOKENS).logits, other(TOKENS).logits),
        "words": all(
            torch.equal(words(grown, cache=cache), words(other, cache=cache))
            for cache in (True, False)
        ),
        "base": torch.equal(before, source(TOKENS).logits),
        "class": quantized_class(grown),
    }
    print(json.dumps(found))


def loaded(method: str, path: str) -> Any:
    """Load a model; torchao quantizes it on loading."""
    if method != "torchao":
        return AutoModelForCausalLM.from_pretrained(path)
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415

    settings = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=settings)


def words(model: Any, *, cache: bool) -> torch.Tensor:
    """Return the greedy continuation of one sequence."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(TOKENS[:1], use_cache=cache, **options)


def quantized_class(model: Any) -> str:
    """Return the class of a quantized projection, or of its weight."""
    projection = model.model.layers[0].self_attn.q_proj
    plain = type(projection) is torch.nn.Linear
    return type(projection.weight if plain else projection).__name__


def quantize(base: str, out: str) -> None:
    """Quantize a model with GPTQModel."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # its default on two cores is an error
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415

    rows: Sequence[dict[str, list[int]]] = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
        for row in torch.randint(3, 120, (64, 64), generator=torch.Generator().manual_seed(2))
    ]
    model = GPTQModel.load(base, QuantizeConfig(bits=4, group_size=32))
    model.quantize(rows, batch_size=8)
    model.save(out)
    print(json.dumps({"files": sorted(path.name for path in Path(out).iterdir())}))


os.chdir(Path(sys.argv[2]).parent)  # GPTQModel writes logs/ into the current directory
if sys.argv[1] == "quantize":
    quantize(*sys.argv[2:])
else:
    with torch.no_grad():
        main(*sys.argv[1:])
