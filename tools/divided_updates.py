"""Divide what the layers of a model add to its residual stream, without a change of its weights.

This is the reference for damped layers: it knows nothing of the names of tensors. It runs a layer
twice. The first time, it finds the additions that lead from the input of the layer to its output;
the second time, each of these adds only a share of the other tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from mergekit_interleave.virtual.model import layers_of

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_OVERWRITING = {torch.Tensor.mul_, torch.Tensor.__imul__}

_Trail: TypeAlias = tuple[int, ...]
"""The numbers of the additions between the input of a layer and a tensor."""


class _Followed(TorchFunctionMode):  # type: ignore[misc] # it is untyped
    """Follow the residual stream from the input of a layer.

    Args:
        streams: The tensors that enter the layer.
        divided: The numbers of the additions whose other tensor is divided.
        times: The divisor.
    """

    def __init__(
        self, streams: Collection[torch.Tensor], divided: Collection[int] = (), times: int = 1
    ) -> None:
        super().__init__()
        self.divided, self.times = divided, times
        self.additions = 0
        # The tensors are kept, so that no other one takes their memory.
        self.trails: list[tuple[torch.Tensor, _Trail | None]] = [(s, ()) for s in streams]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs or len(args) != 2:  # noqa: PLR2004 - the operands
            return func(*args, **(kwargs or {}))
        trails = [self.trail(operand) for operand in args]
        if func in _PRODUCTS and isinstance(args[1], int | float) and trails[0] is not None:
            return self._follow(func(*args), trails[0])
        if func in _OVERWRITING:
            return self._follow(func(*args), None)
        if func not in _ADDITIONS or (trails[0] is None) == (trails[1] is None):
            return func(*args)
        (trail,) = (found for found in trails if found is not None)
        number, self.additions = self.additions, self.additions + 1
        if number in self.divided:
            place = trails.index(None)
            args = [arg / self.times if i == place else arg for i, arg in enumerate(args)]
        return self._follow(func(*args), (*trail, number))

    def trail(self, value: object) -> _Trail | None:
        """Return the additions that lead to a tensor, or None if it is not part of the stream."""
        if not isinstance(value, torch.Tensor):
            return None
        found = (
            trail
            for tensor, trail in reversed(self.trails)
            if tensor.data_ptr() == value.data_ptr() and tensor.numel() == value.numel()
        )
        return next(found, None)

    def _follow(self, result: Any, trail: _Trail | None) -> Any:
        self.trails.append((result, trail))
        return result


@contextmanager
def divided(model: Any, depth: int, indices: Collection[int], times: int) -> Iterator[list[int]]:
    """Let some layers of a model add only a share of their updates.

    Args:
        model: A model of transformers, which must not use a cache.
        depth: Its number of layers.
        indices: The layers.
        times: The divisor.

    Yields:
        A list that gets the number of divided additions of each call of one of the layers.
    """
    counts: list[int] = []

    def forward_of(layer: Any) -> Any:
        plain = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            streams = _streams(*args, *kwargs.values())
            with _Followed(streams) as first:
                result = plain(*args, **kwargs)
            trails = [first.trail(output) for output in _tensors(result)]
            numbers = {number for trail in trails for number in trail or ()}
            counts.append(len(numbers))
            with _Followed(streams, numbers, times):
                return plain(*args, **kwargs)

        return forward

    changed = [layers[i] for layers in layers_of(model, depth).values() for i in indices]
    try:
        for layer in changed:
            layer.forward = forward_of(layer)
        yield counts
    finally:
        for layer in changed:
            del layer.forward


def _tensors(result: Any) -> list[torch.Tensor]:
    outputs = [result] if isinstance(result, torch.Tensor) else [*result]
    return [output for output in outputs if isinstance(output, torch.Tensor)]


def _streams(*values: object) -> list[torch.Tensor]:
    """Return the hidden states among the arguments of a layer: the first, and those like it."""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return [tensor for tensor in tensors if tensor.shape == tensors[0].shape]
