"""Measure the Block Influence of the layers of a model (ShortGPT, arXiv 2403.03853).

The Block Influence of a layer is 1 minus the mean cosine of the states before and after it: 0 for a
layer that passes its input on unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.layer_major import LayerMajor, NotLayerMajorError


def block_influence(model: Any, depth: int, batches: Sequence[Batch]) -> list[float]:
    """Return the Block Influence of each layer, over all tokens of some sequences.

    The model's own forward pass runs once per batch, without its head. Sums are in float64.

    Args:
        model: The model, in evaluation mode.
        depth: Its number of layers.
        batches: The sequences.

    Raises:
        NotLayerMajorError: The layers are not one stack of which each is applied once, or their
            states are not one vector for each token.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    layers = LayerMajor(model, depth).layers
    states = [_States(layer) for layer in layers]
    with ExitStack() as hooks, torch.inference_mode():
        for layer, own in zip(layers, states, strict=True):
            for add, hook in (
                (layer.register_forward_pre_hook, own.before),
                (layer.register_forward_hook, own.after),
            ):
                hooks.callback(add(hook, with_kwargs=True).remove)
        for number, batch in enumerate(batches, 1):
            tokens = torch.tensor(batch.rows(), device=model.device)
            lengths = torch.tensor([len(each.tokens) for each in batch.sequences])
            real = (torch.arange(batch.width) < lengths[:, None]).to(tokens.device)
            for own in states:
                own.real = real
            model.base_model(input_ids=tokens, use_cache=False)
            wrong = next((i for i, own in enumerate(states) if own.calls != number), None)
            if wrong is not None:
                raise NotLayerMajorError(f"layer {wrong} is not applied once")
    count = sum(len(each.tokens) for batch in batches for each in batch.sequences)
    return [own.total / count for own in states]


class _States:
    """Sums 1 minus the cosine of the states before and after one layer."""

    def __init__(self, layer: Any) -> None:
        self._name = next(iter(inspect.signature(layer.forward).parameters), "")
        self._before: Any = None
        self.real: Any = None  # which positions of a batch are not padded
        self.total, self.calls = 0.0, 0

    def before(self, _: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep the state before the layer, which the layer may overwrite."""
        self._before = self._vectors(arguments[0] if arguments else keywords[self._name])

    def after(self, _: Any, __: Any, ___: Any, result: Any) -> None:
        """Compare it with the state after the layer."""
        one = self._before
        other = self._vectors(result[0] if isinstance(result, tuple | list) else result)
        # Of equal states, the product and the two squares are equal, so the cosine is exactly 1.
        squares = one.square().sum(1) * other.square().sum(1)
        cosines = (one * other).sum(1) / squares.sqrt().clamp_min(_TINY)
        self.total += float((1 - cosines).sum())
        self.calls += 1
        self._before = None

    def _vectors(self, state: Any) -> Any:
        """Return the states of all tokens that are not padded, of shape (tokens, width)."""
        if state.shape[:2] != self.real.shape:
            shape = tuple(state.shape)
            raise NotLayerMajorError(f"a state of the shape {shape} is not one vector a token")
        return state[self.real].double().flatten(1)


_TINY = 1e-300
"""The cosine of a state of zeros is 0."""
