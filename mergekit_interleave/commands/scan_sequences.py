"""Read what layouts are measured on: a text and items, which become sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave._files import read_text
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.commands.sample import tokenizer_of
from mergekit_interleave.errors import DirectiveError, Warn
from mergekit_interleave.scanning import sequences
from mergekit_interleave.scanning.sequences import ScoredTokens

_WINDOW, _TOKENS = 128, 4096
"""The number of tokens of a window of text, and the largest number of tokens of a text."""


@dataclass(frozen=True)
class Content:
    """What layouts are measured on.

    Attributes:
        text: A text; None for none.
        items: Items, one per line; None for none.
        most_tokens: The maximum number of tokens of the text.
    """

    text: inputs.Text | None
    items: inputs.Text | None
    most_tokens: int


def read_content(text: StrPath | None, items: StrPath | None, tokens: int | str | None) -> Content:
    """Read a text and items, or the text of this package if there are none.

    Raises:
        DirectiveError: A file cannot be read, or `tokens` is no number or has no effect.
    """
    if tokens is not None and items is not None and text is None:
        raise DirectiveError(
            "--tokens bounds a text, and has no effect on --items", hint="leave --tokens out"
        )
    most = _TOKENS if tokens is None else inputs.parse_count(tokens, "--tokens")
    is_default = text is None and items is None
    return Content(
        inputs.Text(*sequences.default_text()) if is_default else _read(text), _read(items), most
    )


def _read(file: StrPath | None) -> inputs.Text | None:
    return None if file is None else inputs.Text(read_text(Path(file)), str(file))


def scored_sequences(first: Checkpoint, content: Content, warn: Warn) -> list[ScoredTokens]:
    """Return the sequences of the text and of the items, each once.

    Equal ones on both sides of the split would confirm each other.
    """
    with meta_model.transformers_errors("read the config", first.ref):
        config = meta_model.config_of(first.path, trusted=first.trusted).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    tokenizer = tokenizer_of(first)
    found: list[ScoredTokens] = []
    if text := content.text:
        length = min(_WINDOW, positions or _WINDOW)
        found += sequences.of_text(
            tokenizer, text.text, text.where, most_tokens=content.most_tokens, length=length
        )
    if items := content.items:
        found += sequences.of_items(tokenizer, items.text, items.where, positions)
    different = [*{(each.tokens, each.start): each for each in found}.values()]
    if equal := len(found) - len(different):
        warn(f"{equal:,} of {len(found):,} windows and items are equal to others, and left out")
    return different
