"""Run grown models with CTranslate2, ONNX Runtime and lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from clients import models
from clients.environment import Environment
from clients.row import Row

RUNTIMES, EVALUATION = Environment("runtimes"), Environment("lm-eval")
CTRANSLATE2, ONNX, LM_EVAL = "CTranslate2", "ONNX Runtime", "lm-eval"
_CLOSE = 1e-3
"""The largest difference of two log-probabilities that counts as equal."""


def ctranslate2() -> Iterator[Row]:
    """Compare the log-probabilities and the greedy text of SmolLM2."""
    version, grown = (
        RUNTIMES.version("ctranslate2"),
        models.grow(models.SMOLLM2, "interleave: every 5"),
    )
    for precision in ("float32", "int8"):
        found = RUNTIMES.run("run_ctranslate2.py", precision, models.SMOLLM2, grown)
        base, deeper = found[str(models.SMOLLM2)], found[str(grown)]
        apart = _apart(base["scores"], deeper["scores"])
        right = apart <= _CLOSE and base["text"] == deeper["text"]
        text = _verdict(apart, right=right)
        ran = f"SmolLM2 as {precision}, every 5"
        yield Row(CTRANSLATE2, version, ran, "log-probabilities, text", text, wrong=not right)


def onnx() -> Iterator[Row]:
    """Compare the logits of toys that are exported to ONNX."""
    version = f"{RUNTIMES.version('onnxruntime')}, optimum-onnx {RUNTIMES.version('optimum-onnx')}"
    for name in ("llama", "qwen3", "gemma3_text"):
        base = models.toy(name)
        grown = models.grow(base, models.EVERY, "--legacy-config")
        found = RUNTIMES.run("run_onnx.py", models.FOLDER / "onnx", base, grown)
        one, other = (torch.from_numpy(np.load(found[str(path)])) for path in (base, grown))
        apart = float((one - other).abs().max() / one.abs().max())
        right = apart <= models.CLOSE
        text = _verdict(apart, right=right)
        yield Row(ONNX, version, f"{name} toy, every 4", "logits", text, wrong=not right)


def lm_eval() -> Iterator[Row]:
    """Compare the results of a local multiple-choice task."""
    grown = models.grow(models.SMOLLM2, "interleave: every 5")
    found = EVALUATION.run("run_lm_eval.py", models.SMOLLM2, grown)
    base, deeper = found[str(models.SMOLLM2)], found[str(grown)]
    apart = _apart(base["scores"], deeper["scores"])
    right = apart <= _CLOSE and base["acc"] == deeper["acc"]
    text = (
        f"{'equal' if right else 'different'}: accuracy {base['acc']:.2f} and {deeper['acc']:.2f}"
    )
    compared = "accuracy, log-likelihoods"
    ran = "SmolLM2 on a local task, every 5"
    yield Row(LM_EVAL, EVALUATION.version("lm_eval"), ran, compared, text, wrong=not right)


def _verdict(apart: float, *, right: bool) -> str:
    word = "equal" if right else "different"
    return f"{word}, at most {apart:.0e} apart" if apart else word


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(left - right) for left, right in zip(one, other, strict=True))
