"""Turn a text and a file of items into sequences: tokens of which a part is scored.

Special tokens are added, and an item is divided into prompt and answer, as in lm-eval 0.4.13
(`TemplateLM.loglikelihood` and `HFLM.tok_encode`), so that an item's score is the one that lm-eval
gives to the same pair of texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import read_text
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.virtual.sampling import tokens_of

# Passages of two books, by turns: Jules and Michel Verne, "In the Year 2889" (The Forum, New York,
# February 1889), its first third, and William Morris, "News from Nowhere" (London 1890), chapters 1
# and 2. The authors died in 1905, 1925 and 1896, so both books are in the public domain. Marks of
# italics are left out, and a paragraph is one line.
DEFAULT_TEXT = Path(__file__).parent / "default_text.txt"

_LEAST_TOKENS = 2
"""The first token of a text has nothing before it, so it is not scored."""


@dataclass(frozen=True)
class ScoredTokens:
    """A sequence.

    Attributes:
        tokens: The tokens that the model is given.
        start: The index of the first scored token, at least 1; those after it are scored, too.
        kind: `text` or `item`.
    """

    tokens: tuple[int, ...]
    start: int
    kind: str

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return len(self.tokens) - self.start


def default_text() -> tuple[str, str]:
    """Return the text that is measured if none is given, and its name in messages."""
    return read_text(DEFAULT_TEXT), "the default text"


def of_text(
    tokenizer: Any, text: str, where: str, *, most_tokens: int, length: int = 128
) -> list[ScoredTokens]:
    """Divide a text into windows, such that every token but the first is scored once.

    A window starts with the last token of the window before it.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The text.
        where: The name of the text in messages.
        most_tokens: The maximum number of scored tokens, at least 1; the rest is left out.
        length: The number of tokens in a window, at least 2; the last one may be shorter.

    Raises:
        DirectiveError: The text has fewer than two tokens.
    """
    tokens = _encode(tokenizer, text)[: most_tokens + 1]
    if len(tokens) < _LEAST_TOKENS:
        raise DirectiveError(f"{where}: has {tokens_of(len(tokens))}, not at least two")
    starts = range(0, len(tokens) - 1, length - 1)
    return [ScoredTokens(tuple(tokens[at : at + length]), 1, "text") for at in starts]


def of_items(
    tokenizer: Any, lines: str, where: str, most_positions: int | None = None
) -> list[ScoredTokens]:
    """Return the sequences of items, in which only the tokens of the answers are scored.

    A line is a JSON object: `{"prompt": ..., "answer": ...}`, or with `"choices": [...]`, where the
    answer is one of the choices or its index. Other keys have no effect. The answer follows the
    prompt with nothing in between.

    Args:
        tokenizer: A tokenizer of transformers.
        lines: The items, one per line; empty lines are left out.
        where: The name of the file in messages.
        most_positions: The number of positions of the model; None for any number.

    Raises:
        DirectiveError: There are no items, a line is not an item, an answer has no tokens, or an
            item is longer than the model's positions.
    """
    items: list[ScoredTokens] = []
    for number, line in enumerate(lines.split("\n"), 1):
        if line.strip():
            place = f"{where}, line {number}"
            items.append(_encoded(tokenizer, *_item(line, place), place))
            if most_positions is not None and len(items[-1].tokens) > most_positions:
                count = tokens_of(len(items[-1].tokens))
                raise DirectiveError(
                    f"{place}: has {count}, but the model has {most_positions:,} positions"
                )
    if not items:
        raise _invalid(where, "has no items")
    return items


def _item(line: str, where: str) -> tuple[str, str]:
    """Return the prompt and the answer of a line."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, "not JSON") from error
    if not isinstance(item, dict):
        raise _invalid(where, "not a JSON object")
    for key in ("prompt", "answer"):
        if key not in item:
            raise _invalid(where, f"has no `{key}`")
    prompt, answer = item["prompt"], item["answer"]
    if "choices" in item:
        answer = _chosen(item["choices"], answer, where)
    for key, value in (("prompt", prompt), ("answer", answer)):
        if not _is_text(value):
            raise _invalid(where, f"`{key}` is not text")
    return prompt, answer


def _chosen(choices: object, answer: object, where: str) -> object:
    """Return the choice that is the answer."""
    if not isinstance(choices, list) or not all(map(_is_text, choices)):
        raise _invalid(where, "`choices` is not a list of texts")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise _invalid(
                where, f"`answer` is {answer}, not the index of one of {len(choices)} choices"
            )
        return choices[answer]
    if answer not in choices:
        raise _invalid(where, "`answer` is not one of its `choices`")
    return answer


def _is_text(value: object) -> bool:
    """Whether a JSON value is a string of whole characters; JSON can write half of a pair."""
    if not isinstance(value, str):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _invalid(where: str, what: str) -> DirectiveError:
    return DirectiveError(
        f"{where}: {what}",
        hint='write one item a line, such as {"prompt": "2 + 2 = ", "answer": "4"}',
    )


def _encoded(tokenizer: Any, prompt: str, answer: str, where: str) -> ScoredTokens:
    """Encode prompt and answer together, and divide them behind the tokens of the prompt alone.

    Spaces at the end of the prompt go to the answer, because most tokenizers put a space into the
    token of the word that follows it. A prompt with no tokens is replaced by the prefix token.
    """
    if not answer:
        raise DirectiveError(f"{where}: `answer` is empty")
    context = prompt.rstrip()
    if context:
        before, whole = _encode(tokenizer, context), _encode(tokenizer, prompt + answer)
    else:
        before = []
        whole = list(tokenizer.encode(prompt + answer, add_special_tokens=False, verbose=False))
    after = whole[len(before) :]
    if not before:
        before = [_prefix(tokenizer, where)]
        if after[:1] == before:
            del after[0]
    if not after:
        raise DirectiveError(f"{where}: `answer` has no tokens of its own after this `prompt`")
    return ScoredTokens((*before, *after), len(before), "item")


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text; special ones are added unless it starts with the prefix."""
    first = _prefix_or_none(tokenizer)
    how: dict[str, bool] = {}
    if first is not None and text.startswith(tokenizer.decode(first)):
        how["add_special_tokens"] = False
    return list(tokenizer.encode(text, verbose=False, **how))


def _prefix(tokenizer: Any, where: str) -> int:
    """Return the token that comes before an answer without a prompt."""
    found = _prefix_or_none(tokenizer)
    if found is None:
        raise DirectiveError(
            f"{where}: `prompt` is empty, and the tokenizer has neither a BOS token nor an EOS "
            "token to put before the answer"
        )
    return found


def _prefix_or_none(tokenizer: Any) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    eos: int | None = tokenizer.eos_token_id
    return eos if bos is None else bos
