"""Define the dtypes of tensors: their names, their widths and their conversions."""

from __future__ import annotations

import struct
from typing import NamedTuple


class Dtype(NamedTuple):
    """A dtype of tensors.

    Attributes:
        stored: Its name in safetensors.
        bits: The number of bits of one element.
        name: Its name in torch and mergekit; None if mergekit cannot write it.
        plain_zero: Whether zero bytes mean the number zero, regardless of separately stored scales.
    """

    stored: str
    bits: int
    name: str | None = None
    plain_zero: bool = False


_FLOATS = (
    Dtype("F16", 16, "float16", plain_zero=True),
    Dtype("BF16", 16, "bfloat16", plain_zero=True),
    Dtype("F32", 32, "float32", plain_zero=True),
    Dtype("F64", 64, "float64", plain_zero=True),
)

STORED = {
    dtype.stored: dtype
    for dtype in (
        *_FLOATS,
        Dtype("F4", 4),
        Dtype("F6_E2M3", 6),
        Dtype("F6_E3M2", 6),
        Dtype("F8_E4M3", 8, plain_zero=True),
        Dtype("F8_E5M2", 8, plain_zero=True),
        Dtype("F8_E8M0", 8),
        Dtype("F8_E4M3FNUZ", 8),
        Dtype("F8_E5M2FNUZ", 8),
        Dtype("BOOL", 8),
        Dtype("I8", 8),
        Dtype("U8", 8),
        Dtype("I16", 16),
        Dtype("U16", 16),
        Dtype("I32", 32),
        Dtype("U32", 32),
        Dtype("I64", 64),
        Dtype("U64", 64),
        Dtype("C64", 64),
    )
}
"""All dtypes, by their names in safetensors."""

NAMED = {str(dtype.name): dtype for dtype in _FLOATS}
"""The dtypes that weights can be converted to, by their names in torch."""

ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
"""Other common names for torch's dtypes."""


def name_of(stored: str) -> str | None:
    """Return torch's name of a dtype that weights can be converted to; None for any other dtype."""
    dtype = STORED.get(stored)
    return None if dtype is None else dtype.name


def is_float(stored: str) -> bool:
    """Return whether a dtype is a common float; weights can be converted only to such dtypes."""
    return name_of(stored) is not None


def has_plain_zero(stored: str) -> bool:
    """Return whether zero bytes mean the number zero, regardless of separately stored scales."""
    dtype = STORED.get(stored)
    return dtype is not None and dtype.plain_zero


def is_half(stored: str) -> bool:
    """Return whether a dtype is a 16-bit float, which is too coarse for most training updates."""
    return is_float(stored) and STORED[stored].bits == _HALF


_HALF = 16
"""The number of bits of a half-precision float."""


def wider(stored: str) -> tuple[str, ...]:
    """Return the floats that are wider than a float, and so represent all its numbers exactly."""
    if not is_float(stored):
        return ()
    return tuple(dtype.stored for dtype in _FLOATS if dtype.bits > STORED[stored].bits)


def encode(stored: str, number: float) -> bytes:
    """Return the bytes of a number in one of the float dtypes.

    Raises:
        OverflowError: The number is too large for the dtype.
        struct.error: The number is too large for the dtype.
    """
    if stored == "BF16":
        return struct.pack("<f", number)[2:]  # the upper half; exact if the lower half is zero
    return struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}[stored], number)
