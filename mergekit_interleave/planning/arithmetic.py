"""Reproduce mergekit's arithmetic on weights, with torch.

mergekit converts its input to the dtype of its key `dtype`, multiplies, and converts the result to
that of `out_dtype`. Here these two are `through` and `dtype`. Each step rounds.
"""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes


def scaled(numbers: Any, scale: float | None, through: str, dtype: str) -> Any:
    """Scale and convert a tensor as mergekit does.

    Args:
        numbers: The tensor, in the dtype in which it is stored.
        scale: The factor to multiply it by; None for no multiplication.
        through: The dtype in which it is multiplied, spelled as in safetensors.
        dtype: The dtype of the result, spelled as in safetensors.
    """
    result = numbers.to(torch_dtype(through))
    if scale is not None:
        result = result * scale
    return result.to(torch_dtype(dtype))


def compute(data: bytes, stored: str, scale: float | None, through: str, dtype: str) -> bytes:
    """Scale and convert stored numbers; see `scaled`.

    Args:
        data: The numbers, as bytes.
        stored: The dtype of the numbers, spelled as in safetensors.
        scale: See `scaled`.
        through: See `scaled`.
        dtype: See `scaled`.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    numbers = torch.frombuffer(bytearray(data), dtype=torch_dtype(stored))
    return bytes(scaled(numbers, scale, through, dtype).view(torch.uint8).numpy())


def torch_dtype(stored: str) -> Any:
    """Return torch's dtype for a common float, which is spelled as in safetensors."""
    import torch  # noqa: PLC0415

    return getattr(torch, str(_dtypes.name_of(stored)))
