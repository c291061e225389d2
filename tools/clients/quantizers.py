"""Compare quantized models in memory with the models that `run` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients import models
from clients.environment import Environment
from clients.row import Row

QUANTIZERS = Environment("quantizers")
TORCHAO, GPTQ = "torchao", "GPTQModel"
_SCRIPT = "run_quantized.py"
_DIRECTIVES = ("interleave: every 4", "repeat: [2, 5]", "stack: [[0, 3], [2, 4], [2, 4], [2, 8]]")


def torchao() -> Iterator[Row]:
    """Quantize a toy and its grown models on loading."""
    yield from _rows(TORCHAO, "torchao", "8-bit weights", _toy())


def gptq() -> Iterator[Row]:
    """Quantize a toy to 4 bits, and grow the result."""
    out = models.FOLDER / "llama-gptq"
    QUANTIZERS.run(_SCRIPT, "quantize", _toy(), out, package=True)
    yield from _rows(GPTQ, "gptqmodel", "4 bits", out)


def _toy() -> Path:
    return models.toy("llama", label="-64", change=_widen)


def _widen(config: Any) -> None:
    """Make a config as wide as kernels for packed weights need."""
    config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 128


def _rows(client: str, package: str, form: str, base: Path) -> Iterator[Row]:
    version = QUANTIZERS.version(package)
    for directive in _DIRECTIVES:
        written = models.grow(base, directive)
        found = QUANTIZERS.run(_SCRIPT, package, base, directive, written, package=True)
        different = [name for name in ("logits", "words", "base") if not found[name]]
        right = not different and found["class"] not in ("Linear", "Parameter")
        text = f"equal, as {found['class']}" if right else f"different: {', '.join(different)}"
        ran = f"`load` of a llama toy in {form}, `{directive}`"
        compared = "logits and words with the written model's, logits of the base before and after"
        yield Row(client, version, ran, compared, text, wrong=not right)
