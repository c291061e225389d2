"""Score sequences by the log-likelihood that a model gives to their scored tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from mergekit_interleave.scanning.batches import Batch

_LOGITS = 2**25
"""The bytes of logits that are computed at once. The allocator returns larger blocks to the system
each time, and clearing their pages takes longer than the arithmetic."""

_KEEP = "logits_to_keep"

Forward = Callable[..., Any]
"""Returns the logits of some rows: `forward(rows, tokens, **options)`."""


def forward_of(model: Any) -> Forward:
    """Return the forward pass of a whole model."""

    def forward(_: slice, tokens: Any, **options: Any) -> Any:
        return model(input_ids=tokens, use_cache=False, **options).logits

    return forward


def scores(model: Any, batch: Batch, forward: Forward | None = None) -> list[float]:
    """Return the score of each sequence of a batch: a sum of log-likelihoods in nats.

    Args:
        model: The model.
        batch: The sequences.
        forward: Computes the logits; by default, the model does.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    forward = forward or forward_of(model)
    with torch.inference_mode():
        tokens = torch.tensor(batch.rows(), device=model.device)
        return [
            score
            for rows in _rows(model, batch)
            for score in _of_rows(model, batch, rows, tokens[rows], forward)
        ]


def _rows(model: Any, batch: Batch) -> Iterator[slice]:
    """Yield the rows of a batch whose logits are computed at once."""
    at_once = max(1, _LOGITS // (batch.width * _position(model)))
    for start in range(0, len(batch.sequences), at_once):
        yield slice(start, start + at_once)


def _position(model: Any) -> int:
    """Return the bytes of the logits of one position, in float32."""
    return 4 * int(model.config.get_text_config().vocab_size)


def _of_rows(
    model: Any, batch: Batch, rows: slice, tokens: Any, forward: Forward
) -> Iterator[float]:
    import torch  # noqa: PLC0415

    own = batch.sequences[rows]
    first = min(each.start for each in own) - 1
    last = max(len(each.tokens) for each in own) - 1
    total = torch.zeros(len(own), dtype=torch.float64)
    at_once = max(1, _LOGITS // (len(own) * _position(model)))
    for start in range(first, last, at_once if _keeps(model) else last):
        places = torch.arange(start, min(start + at_once, last), device=tokens.device)
        if _keeps(model):
            logits = forward(rows, tokens, **{_KEEP: places})
        else:
            places = torch.arange(first, last, device=tokens.device)
            logits = forward(rows, tokens)[:, first:last]
        wanted = tokens[:, places + 1]
        found = -torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), reduction="none"
        ).view_as(wanted)
        for row, each in enumerate(own):
            scored = (places >= each.start - 1) & (places < len(each.tokens) - 1)
            total[row] += found[row, scored].double().sum().cpu()
    yield from total.tolist()


def _keeps(model: Any) -> bool:
    """Whether a model can compute the logits of some positions alone."""
    return _KEEP in inspect.signature(model.forward).parameters
