"""Count the exact answers of a model and of layouts of it, and what luck does with a few questions.

An answer counts if every token of it is the most likely one after those before it, and the token
after it does not go on with a word or a number. That is what greedy decoding writes. Then a few of
the questions are drawn many times: how often does the best of these layouts have twice as many
right answers as the model itself, although it has not on all questions?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_interleave as api
from mergekit_interleave.commands import inputs
from mergekit_interleave.scanning import sequences
from mergekit_interleave.scanning.batches import batches

DRAWS = 10_000
MOST_TOKENS = 1024
"""The tokens that the model computes at once."""


def exact(model: Any, tokenizer: Any, items: Sequence[sequences.ScoredTokens]) -> Any:
    """Return whether each answer is given exactly, as an array of booleans."""
    found = np.zeros(len(items), dtype=bool)
    for batch in batches(items, MOST_TOKENS):
        with torch.inference_mode():
            best = model(torch.tensor(batch.rows())).logits.argmax(-1).tolist()
        for number, item, likely in zip(batch.numbers, batch.sequences, best, strict=True):
            given = likely[item.start - 1 : len(item.tokens)]
            answer = [*item.tokens[item.start :]]
            rest = tokenizer.decode(given).removeprefix(tokenizer.decode(answer))
            found[number] = given[:-1] == answer and not rest[:1].isalnum()
    return found


def luck(base: Any, layouts: Any, questions: int, seed: int = 0) -> float:
    """Return how often the best layout has at least two right answers, twice as many as the base.

    Args:
        base: Whether the base answers each item exactly, of shape (items).
        layouts: The same of each layout, of shape (layouts, items).
        questions: The number of items in each draw.
        seed: The seed of the random numbers.
    """
    random = np.random.default_rng(seed)
    doubled = 0
    for _ in range(DRAWS):
        drawn = random.choice(len(base), questions, replace=False)
        most = layouts[:, drawn].sum(axis=1).max()
        doubled += most >= 2 * max(1, base[drawn].sum())
    return doubled / DRAWS


def main(model: Path, items: Path, layouts: Path, questions: int = 17) -> None:
    """Count, and print a line for the model, for each layout, and for the draws."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    scored = sequences.of_items(tokenizer, items.read_text("utf-8"), str(items))
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    right, found = exact(base, tokenizer, scored), []
    print(f"{right.sum():5} of {len(scored)}: the model itself", flush=True)
    for line in inputs.lines(layouts.read_text("utf-8"), str(layouts)):
        directive = line.text.strip()
        grown = api.load(directive, model=model, base=base)
        found.append(exact(grown, tokenizer, scored))
        gained, lost = (found[-1] & ~right).sum(), (right & ~found[-1]).sum()
        print(f"{found[-1].sum():5}, {gained} gained, {lost} lost: {directive}", flush=True)
    share = luck(right, np.array(found), questions)
    print(
        f"In {share:.0%} of {DRAWS:,} draws of {questions} questions, the best of these "
        f"{len(found)} layouts has twice as many right answers as the model, at least two."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="the checkpoint")
    parser.add_argument("items", metavar="ITEMS", type=Path, help="items, as for `scan --items`")
    parser.add_argument("layouts", metavar="LAYOUTS", type=Path, help="as for `scan FILE`")
    parser.add_argument("--questions", type=int, default=17, help="the questions in a draw")
    arguments = parser.parse_args()
    main(arguments.model, arguments.items, arguments.layouts, arguments.questions)
