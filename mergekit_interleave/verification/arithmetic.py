"""Reproduce mergekit's arithmetic on weights; the only check that needs torch."""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes


def computed(data: bytes, stored: str, scale: float | None, through: str, dtype: str) -> bytes:
    """Scale and convert numbers as mergekit does.

    mergekit converts its input to `dtype`, multiplies, and converts the result to `out_dtype`.
    Each step rounds.

    Args:
        data: The numbers.
        stored: Their dtype. This and the dtypes below are spelled as in safetensors.
        scale: The factor to multiply them by; None for no multiplication.
        through: The dtype to multiply in.
        dtype: The dtype of the result.
    """
    import torch  # noqa: PLC0415 - seconds

    def named(spelling: str) -> Any:
        return getattr(torch, str(_dtypes.name_of(spelling)))

    numbers = torch.frombuffer(bytearray(data), dtype=named(stored)).to(named(through))
    if scale is not None:
        numbers = numbers * scale
    numbers = numbers.to(named(dtype))
    return bytes(numbers.view(torch.uint8).numpy())
