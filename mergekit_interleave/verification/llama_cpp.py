"""Compare what a GGUF model and its base compute in llama.cpp: greedy text and log-probabilities.

The package xllamacpp contains llama.cpp. Each model runs in a process of its own, with the same
number of threads, so identities compute exactly what their base computes.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_interleave import _requirements
from mergekit_interleave._stored_tensor import padded
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf.model import GgufModel

WANTED = "xllamacpp>=2026.4"
"""The requirement of the extra `gguf`."""

_PROMPTS, _NEW_TOKENS, _TOP = 3, 16, 5

_REST = _NEW_TOKENS + 8
"""The number of tokens of a context behind the prompt."""

_TOKENS = 64
"""The number of random tokens of a prompt beyond the window."""

_MAX_TOKENS = 2**13
"""The maximum number of tokens of a prompt, except for those beyond the window."""

_BATCH = 64
"""The number of tokens of a prompt that are computed at once."""

_WINDOW = "attention.sliding_window"

Steps = Sequence[Sequence[Any]]
"""The tokens that were generated for a prompt, each with the top log-probabilities."""


@dataclass(frozen=True)
class Job:
    """What a process computes.

    Attributes:
        file: The model.
        prompts: Texts, or lists of tokens.
        context: The number of tokens of the context.
        count: The number of tokens to generate for each prompt.
        top: The number of log-probabilities to return for each token.
        threads: The number of threads.
        batch: The number of tokens of a prompt that are computed at once.
    """

    file: str
    prompts: Sequence[str | Sequence[int]]
    context: int
    count: int = _NEW_TOKENS
    top: int = _TOP
    threads: int = 1
    batch: int = 1


def measure(base: GgufModel, grown: GgufModel, *, identity: bool) -> dict[str, Any]:
    """Compare a model with its base, on random tokens, more than its window.

    Args:
        base: The base.
        grown: The model.
        identity: Whether the model must compute what its base computes.

    Returns:
        The outcome, as `verification_text.llama_cpp` describes it.

    Raises:
        RequirementError: xllamacpp is not installed.
        RefusedError: llama.cpp does not load one of the models.
    """
    _requirements.check_extra(WANTED)
    window = base.integer(_WINDOW) or 0
    # In the last layer llama.cpp computes only the tokens whose outputs are wanted. With a single
    # one in the last batch, that layer computes the same numbers where it is not the last, too.
    # Otherwise it would multiply another number of rows, and may sum floats in another order.
    length = padded(min(window, _MAX_TOKENS) + _TOKENS, _BATCH) + 1
    room = (base.integer("context_length") or length + _REST) - _REST
    length = min(length, max(room - 1, 0) // _BATCH * _BATCH + 1)
    prompts = _prompts(_vocabulary(base), length)
    one, other = (
        generate(model.path, prompts, length + _REST, batch=_BATCH) for model in (base, grown)
    )
    same = [[step[0] for step in steps] for steps in one] == [
        [step[0] for step in steps] for steps in other
    ]
    largest = largest_difference(one, other)
    found: dict[str, Any] = {"exact": same and not largest} if identity else {}
    return found | {
        "prompts": len(prompts),
        "prompt_tokens": length,
        "window": window,
        "greedy_tokens": _NEW_TOKENS,
        "same_greedy_tokens": same,
        "top": _TOP,
        "largest_difference": largest,
        "tools": {"xllamacpp": metadata.version("xllamacpp")},
    }


_LEAST_VOCABULARY = 2


def _vocabulary(model: GgufModel) -> int:
    """Return the number of tokens of a model.

    Raises:
        RefusedError: It is unknown.
    """
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if tokens is not None else model.integer("vocab_size")
    if not count or count < _LEAST_VOCABULARY:
        raise RefusedError(f"{model.path}: states no vocabulary, so llama.cpp cannot run it")
    return count


def _prompts(vocabulary: int, length: int) -> list[list[int]]:
    chance = random.Random(0)  # noqa: S311 - no secret
    least = min(vocabulary // 2, 256)  # the first tokens are often special
    return [[chance.randrange(least, vocabulary) for _ in range(length)] for _ in range(_PROMPTS)]


def generate(
    file: Path, prompts: Sequence[str | Sequence[int]], context: int, **how: int
) -> list[Steps]:
    """Generate greedily with llama.cpp.

    Args:
        file: The model.
        prompts: Texts, or lists of tokens.
        context: The number of tokens of the context.
        how: Other fields of the job.

    Raises:
        RefusedError: llama.cpp does not load or run the model.
    """
    # As many as there are cores without hyper-threading: its threads spin while they wait.
    threads = max((os.cpu_count() or 1) // 2, 1)
    job = Job(str(file), prompts, context, **{"threads": threads, **how})
    done = subprocess.run(  # noqa: S603 - this project's own module
        [sys.executable, "-I", str(_PROCESS)],  # no module of the current directory
        input=json.dumps({**asdict(job), "path": _path()}),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RefusedError(f"{file}: llama.cpp cannot run it: {_reason(done.stderr)}")
    found: list[Steps] = json.loads(lines[-1])
    return found


_PROCESS = Path(__file__).with_name("_llama_cpp_process.py")


def _path() -> list[str]:
    """Return the places of modules, without the current directory."""
    here = Path.cwd()
    return [place for place in sys.path if place and Path(place).absolute() != here]


def _reason(log: str) -> str:
    """Return the line of llama.cpp's log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
    return (named or lines or ["it ended without a message"])[0][:300]


def largest_difference(one: Sequence[Steps], other: Sequence[Steps]) -> float:
    """Return the largest difference of log-probabilities, up to where the texts part."""
    worst = 0.0
    for first, second in zip(one, other, strict=True):
        for (token, left), (token_2, right) in zip(first, second, strict=True):
            worst = max(worst, _difference(left, right))
            if token != token_2:
                break
    return worst


def _difference(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """Return the largest difference of the log-probabilities that both have, at least of one."""
    shared = [_distance(left[token], right[token]) for token in left.keys() & right.keys()]
    return max(shared) if shared else math.inf


def _distance(one: float | None, other: float | None) -> float:
    """Return the difference of two numbers; infinity if one of them is none."""
    if one is None or other is None or not math.isfinite(one) or not math.isfinite(other):
        return math.inf
    return abs(one - other)
