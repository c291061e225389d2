"""Reproduce mergekit's arithmetic on weights, with torch.

mergekit converts its input to the dtype of its key `dtype`, multiplies, and converts the result to
that of `out_dtype`. Here these two are `through` and `dtype`. Each step rounds.
"""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave.planning.tensor_plan import Operation


def scaled(numbers: Any, operation: Operation, others: Any = None) -> Any:
    """Average, scale and convert numbers of a tensor as mergekit does.

    A scale with a fixed number, which mergekit lacks, is computed in float64 and rounded once. A
    mean is that of mergekit's `linear`, which multiplies and adds in float32 (or float64).

    Args:
        numbers: The numbers, in the dtype in which they are stored.
        operation: The arithmetic of the tensor.
        others: The numbers that they are averaged with, if the tensor is a mean.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    through = torch_dtype(operation.through)
    result = numbers.to(through)
    if others is not None:
        wide = torch.float64 if through == torch.float64 else torch.float32
        weight = torch.tensor(
            _HALF * (1 if operation.scale is None else operation.scale), dtype=wide
        )
        total = torch.zeros_like(result, dtype=wide)
        for part in (result, others.to(through)):
            total.addcmul_(part, weight)
        result = total.to(through)
    elif operation.fixed:
        distance = (result.to(torch.float64) - operation.fixed) * operation.scale
        result = (distance + operation.fixed).to(through)
    elif operation.scale not in (None, 1):
        result = result * operation.scale
    return result.to(torch_dtype(operation.written))


def compute(data: bytes, operation: Operation, other: bytes | None = None) -> bytes:
    """Average, scale and convert stored numbers of a tensor; see `scaled`.

    Args:
        data: The numbers, as bytes.
        operation: The arithmetic of the tensor.
        other: The numbers that they are averaged with, if the tensor is a mean.
    """
    import torch  # noqa: PLC0415

    dtype = torch_dtype(operation.stored)
    numbers = torch.frombuffer(bytearray(data), dtype=dtype)
    others = None if other is None else torch.frombuffer(bytearray(other), dtype=dtype)
    return bytes(scaled(numbers, operation, others).view(torch.uint8).numpy())


_HALF = 0.5


def torch_dtype(stored: str) -> Any:
    """Return torch's dtype for a common float, which is spelled as in safetensors."""
    import torch  # noqa: PLC0415

    return getattr(torch, str(_dtypes.name_of(stored)))
