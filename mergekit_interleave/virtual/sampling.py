"""Let a model in memory continue prompts, and measure its perplexity on a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values; a perplexity that is not a number is None."""
        return {"value": self.value if math.isfinite(self.value) else None, "tokens": self.tokens}


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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and every part back into its own mode at the end.

    Raises:
        DirectiveError: A token or a position has no embedding.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    except IndexError as error:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        raise DirectiveError(
            f"the model has no embedding for one of the tokens or positions; it has {limit} "
            "positions",
            hint="pass a shorter prompt, or less --max-new-tokens",
        ) from error
    finally:
        for module in training:
            module.training = True


def check_vocabulary(model: Any, tokens: Any) -> None:
    """Check that a model has an embedding for each token.

    Raises:
        DirectiveError: It does not, so the tokenizer belongs to another model.
    """
    rows = model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= rows:
        raise DirectiveError(
            f"the tokenizer gives token {int(tokens.max())}, but the model has only {rows} tokens",
            hint="put the model's own tokenizer into its directory",
        )


def tokens_of(number: int) -> str:
    """Return a number of tokens in words."""
    return f"{number:,} token{'' if number == 1 else 's'}"


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
            f"{where}: has {tokens_of(found.shape[1])}, and perplexity needs at least two",
            hint="name a longer text",
        )
    return found


def continuation(model: Any, tokenizer: Any, prompt: str, how: Sampling) -> Continuation:
    """Let a model continue a prompt."""
    import torch  # noqa: PLC0415 - takes seconds to import

    tokens = encode(tokenizer, prompt, how).to(model.device)
    check_vocabulary(model, tokens)
    torch.manual_seed(how.seed)
    start = time.perf_counter()
    with torch.no_grad(), _plain_generation(model, tokenizer, how):
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    seconds = time.perf_counter() - start
    new = found[0, tokens.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Continuation(prompt, text, len(new), seconds)


@contextmanager
def _plain_generation(model: Any, tokenizer: Any, how: Sampling) -> Iterator[None]:
    """Let a model draw from its own distribution, without settings such as a repetition penalty."""
    from transformers import GenerationConfig  # noqa: PLC0415 - takes seconds to import

    own = model.generation_config
    drawn = {"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
    model.generation_config = GenerationConfig(
        max_new_tokens=how.new_tokens,
        do_sample=bool(how.temperature),
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=_padding(model, tokenizer),
        **drawn,
    )
    try:
        yield
    finally:
        model.generation_config = own


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
    check_vocabulary(model, tokens)
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
