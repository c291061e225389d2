"""What mergekit computes of a weight: the one thing that takes torch to check."""

from __future__ import annotations

from typing import Any

from mergekit_interleave import _dtypes


def computed(data: bytes, stored: str, scale: float | None, through: str, dtype: str) -> bytes:
    """Scale and convert some numbers, as mergekit does.

    It converts what it has read to `dtype`, multiplies, and converts what it writes to
    `out_dtype`; each step rounds.

    Args:
        data: The numbers.
        stored: Their dtype, in safetensors' spelling, as those below.
        scale: What to multiply them by, if by anything.
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
