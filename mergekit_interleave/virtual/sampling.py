"""Let a model in memory continue prompts, and measure its perplexity on a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.errors import DirectiveError, RefusedError

_WINDOW = 1024
"""The maximum number of tokens per forward pass of a text."""

_MAX_LOSS = 700.0
"""The largest loss whose exponential does not overflow."""


@dataclass(frozen=True)
class Sampling:
    """How a model continues a prompt.

    Attributes:
        new_tokens: The maximum number of new tokens.
        temperature: The temperature; 0 takes the most likely token.
        seed: The seed of the random numbers, which are the same for each prompt and each model.
        chat: Whether each prompt is a message to which the chat template is applied.
    """

    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        prompt: The prompt.
        text: The new text.
        tokens: The number of new tokens.
        seconds: The seconds that they took.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text.

    Attributes:
        value: The perplexity.
        tokens: The number of predicted tokens.
    """

    value: float
    tokens: int


def check_predicts(model: Any) -> None:
    """Check that a model predicts the next token of a text.

    Raises:
        RefusedError: It does not.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise RefusedError(
            f"{type(model).__name__} does not predict the next token of a text, so it cannot be "
            "sampled"
        )


def encode(tokenizer: Any, prompt: str, how: Sampling) -> Any:
    """Return the tokens of a prompt, of shape (1, tokens).

    Raises:
        DirectiveError: It has no tokens, or there is no chat template.
    """
    if not how.chat:
        found = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        if not tokenizer.chat_template:
            raise DirectiveError("the tokenizer has no chat template", hint="leave --chat out")
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    if not found.shape[1]:
        raise DirectiveError(f"the prompt {prompt!r:.60} has no tokens")
    return found


def encode_text(tokenizer: Any, text: str, where: str) -> Any:
    """Return the tokens of a text, of shape (1, tokens).

    Raises:
        DirectiveError: It has fewer than two tokens, so that none can be predicted.
    """
    found = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    if found.shape[1] <= 1:
        raise DirectiveError(
            f"{where}: has {found.shape[1]} tokens, and perplexity needs at least two",
            hint="name a longer text",
        )
    return found


def continuation(model: Any, tokenizer: Any, prompt: str, how: Sampling) -> Continuation:
    """Let a model continue a prompt."""
    import torch  # noqa: PLC0415 - takes seconds to import

    tokens = encode(tokenizer, prompt, how).to(model.device)
    drawn = {"temperature": how.temperature} if how.temperature else _GREEDY
    torch.manual_seed(how.seed)
    start = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=how.new_tokens,
            do_sample=bool(how.temperature),
            pad_token_id=_padding(model, tokenizer),
            **drawn,
        )
    seconds = time.perf_counter() - start
    new = found[0, tokens.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Continuation(prompt, text, len(new), seconds)


_GREEDY = {"temperature": None, "top_p": None, "top_k": None}
"""Settings that a model's own generation config may have, and that greedy search does not use."""


def _padding(model: Any, tokenizer: Any) -> int:
    stated = (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id)
    known = next((each for each in stated if each is not None), 0)
    return int(known[0] if isinstance(known, Sequence) else known)


def perplexity(
    model: Any, tokens: Any, tick: Callable[[int], object] = lambda _: None
) -> Perplexity:
    """Measure the perplexity of a model on a text, in windows that follow one another.

    Each window starts with the last token of the one before it, so that every token except for the
    first is predicted once.

    Args:
        model: The model.
        tokens: The tokens of the text, of shape (1, tokens).
        tick: Called with the number of predicted tokens of each window.
    """
    import torch  # noqa: PLC0415

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WINDOW
    window = max(min(limit, _WINDOW), 2)
    total = tokens.shape[1]
    loss = 0.0
    for start in range(0, total - 1, window - 1):
        part = tokens[:, start : start + window].to(model.device)
        with torch.no_grad():
            logits = model(input_ids=part, use_cache=False).logits.float()
        loss += float(
            torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:], reduction="sum")
        )
        tick(part.shape[1] - 1)
    return Perplexity(math.exp(min(loss / (total - 1), _MAX_LOSS)), total - 1)
