"""Reproduce mergekit's arithmetic on weights. Only this check needs torch."""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes


def compute(data: bytes, stored: str, scale: float | None, through: str, dtype: str) -> bytes:
    """Scale and convert numbers as mergekit does.

    mergekit converts its input to the dtype of its key `dtype`, multiplies, and converts the result
    to that of `out_dtype`. Here these two are `through` and `dtype`. Each step rounds.

    Args:
        data: The numbers, as bytes.
        stored: The dtype of the numbers. All three dtypes are spelled as in safetensors.
        scale: The factor to multiply them by; None for no multiplication.
        through: The dtype in which they are multiplied.
        dtype: The dtype of the result.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    def torch_dtype(spelling: str) -> Any:
        return getattr(torch, str(_dtypes.name_of(spelling)))

    numbers = torch.frombuffer(bytearray(data), dtype=torch_dtype(stored)).to(torch_dtype(through))
    if scale is not None:
        numbers = numbers * scale
    numbers = numbers.to(torch_dtype(dtype))
    return bytes(numbers.view(torch.uint8).numpy())
