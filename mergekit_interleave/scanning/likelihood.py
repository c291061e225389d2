"""Score sequences by the log-likelihood that a model gives to their scored tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.sequences import ScoredTokens

_LOGITS, _LEAST = 2**28, 2**25
"""The bytes of logits that are computed at once, and the fewest if memory is limited. The weights
of the head are read once for each of these blocks."""

_NORMALIZED = 2**24
"""The bytes of logits that are normalized at once. A block of this size stays in the cache, and its
memory is used again."""

_KEEP = "logits_to_keep"

Forward = Callable[..., Any]
"""Returns the logits of some rows: `forward(rows, tokens, **options)`."""


def forward_of(model: Any) -> Forward:
    """Return the forward pass of a whole model."""

    def forward(_: slice, tokens: Any, **options: Any) -> Any:
        return model(input_ids=tokens, use_cache=False, **options).logits

    return forward


def room(most: int | None) -> int:
    """Return how many bytes of logits are computed at once.

    Args:
        most: The bytes for states and logits; None for any number.
    """
    return _LOGITS if most is None else min(_LOGITS, max(_LEAST, most // 4))


def scores(
    model: Any, batch: Batch, forward: Forward | None = None, most: int | None = None
) -> list[float]:
    """Return the score of each sequence of a batch: a sum of log-likelihoods in nats.

    Args:
        model: The model.
        batch: The sequences.
        forward: Computes the logits; by default, the model does.
        most: The bytes for states and logits; None for any number.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    forward = forward or forward_of(model)
    positions = max(1, room(most) // _position(model))
    at_once = max(1, positions // batch.width)
    with torch.inference_mode():
        tokens = torch.tensor(batch.rows(), device=model.device)
        found: list[float] = []
        for start in range(0, len(batch.sequences), at_once):
            rows = slice(start, start + at_once)
            found += _of_rows(model, batch.sequences[rows], tokens[rows], positions,
                              partial(forward, rows))  # fmt: skip
    return found


def _position(model: Any) -> int:
    """Return the bytes of the logits of one position, in float32."""
    return 4 * int(model.config.get_text_config().vocab_size)


def _of_rows(
    model: Any,
    sequences: Sequence[ScoredTokens],
    tokens: Any,
    positions: int,
    forward: Callable[..., Any],
) -> list[float]:
    """Return the score of some sequences, from logits of at most some positions at once."""
    import torch  # noqa: PLC0415

    first = min(each.start for each in sequences) - 1
    last = max(len(each.tokens) for each in sequences) - 1
    total = torch.zeros(len(sequences), dtype=torch.float64)
    at_once = max(1, positions // len(sequences)) if _keeps(model) else last - first
    for start in range(first, last, at_once):
        places = torch.arange(start, min(start + at_once, last), device=tokens.device)
        if _keeps(model):
            logits = forward(tokens, **{_KEEP: places})
        else:
            logits = forward(tokens)[:, first:last]
        found = _log_likelihoods(logits, tokens[:, places + 1])
        for row, each in enumerate(sequences):
            scored = (places >= each.start - 1) & (places < len(each.tokens) - 1)
            total[row] += found[row, scored].double().sum().cpu()
    return [*map(float, total)]


def _log_likelihoods(logits: Any, wanted: Any) -> Any:
    """Return the log-likelihood of tokens in float32, of the shape (rows, positions)."""
    import torch  # noqa: PLC0415

    flat, targets = logits.flatten(0, 1), wanted.flatten()
    at_once = max(1, _NORMALIZED // (4 * flat.shape[-1]))
    parts = [
        -torch.nn.functional.cross_entropy(own.float(), target, reduction="none")
        for own, target in zip(flat.split(at_once), targets.split(at_once), strict=True)
    ]
    return torch.cat(parts).view_as(wanted)


def _keeps(model: Any) -> bool:
    """Whether a model can compute the logits of some positions alone."""
    return _KEEP in inspect.signature(model.forward).parameters
