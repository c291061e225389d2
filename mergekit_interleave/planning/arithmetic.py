"""Reproduce mergekit's arithmetic on weights, with torch.

mergekit converts its input to the dtype of its key `dtype`, multiplies, and converts the result to
that of `out_dtype`. Here these two are `through` and `dtype`. Each step rounds.
"""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave.planning.tensor_plan import TensorSpec


def scaled(numbers: Any, spec: TensorSpec) -> Any:
    """Scale and convert numbers of a tensor as mergekit does.

    A scale with a fixed number, which mergekit lacks, is computed in float64 and rounded once.

    Args:
        numbers: The numbers, in the dtype in which they are stored.
        spec: The planned tensor.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    through = torch_dtype(spec.through)
    result = numbers.to(through)
    if spec.fixed:
        distance = (result.to(torch.float64) - spec.fixed) * spec.scale
        result = (distance + spec.fixed).to(through)
    elif spec.scale not in (None, 1):
        result = result * spec.scale
    return result.to(torch_dtype(spec.dtype))


def compute(data: bytes, spec: TensorSpec) -> bytes:
    """Scale and convert stored numbers of a tensor; see `scaled`.

    Args:
        data: The numbers, as bytes.
        spec: The planned tensor.
    """
    import torch  # noqa: PLC0415

    numbers = torch.frombuffer(bytearray(data), dtype=torch_dtype(spec.tensor.dtype))
    return bytes(scaled(numbers, spec).view(torch.uint8).numpy())


def torch_dtype(stored: str) -> Any:
    """Return torch's dtype for a common float, which is spelled as in safetensors."""
    import torch  # noqa: PLC0415

    return getattr(torch, str(_dtypes.name_of(stored)))
