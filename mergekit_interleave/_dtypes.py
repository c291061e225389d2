"""The dtypes of tensors: their spellings, their widths, and what can be done with them."""

from __future__ import annotations

import struct
from typing import NamedTuple


class Dtype(NamedTuple):
    """A dtype.

    Attributes:
        stored: How safetensors spells it.
        bits: The bits of one element.
        name: How torch and mergekit spell it; None unless mergekit can write it.
        plain_zero: Whether zero bytes are the number zero, whatever scales are stored beside them.
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
"""All dtypes by safetensors' spelling."""

NAMED = {str(dtype.name): dtype for dtype in _FLOATS}
"""The dtypes that weights can be converted to, by torch's spelling."""

ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
"""What people write instead of torch's spelling."""


def name_of(stored: str) -> str | None:
    """Torch's spelling of a dtype that weights can be converted to; None of any other."""
    dtype = STORED.get(stored)
    return None if dtype is None else dtype.name


def is_float(stored: str) -> bool:
    """Whether weights can be converted to a dtype: it is one of the usual floats."""
    return name_of(stored) is not None


def has_plain_zero(stored: str) -> bool:
    """Whether zero bytes are the number zero, whatever scales are stored beside them."""
    dtype = STORED.get(stored)
    return dtype is not None and dtype.plain_zero


def is_half(stored: str) -> bool:
    """Whether a dtype is a float of 16 bits, which rounds most steps of training away."""
    return is_float(stored) and STORED[stored].bits == _HALF


_HALF = 16


def wider(stored: str) -> tuple[str, ...]:
    """The floats that hold every number of a float exactly."""
    if not is_float(stored):
        return ()
    return tuple(dtype.stored for dtype in _FLOATS if dtype.bits > STORED[stored].bits)


def encode(stored: str, number: float) -> bytes:
    """The bytes of a number in one of the floats.

    Raises:
        OverflowError: It is too large for the dtype.
        struct.error: It is too large for the dtype.
    """
    if stored == "BF16":
        return struct.pack("<f", number)[2:]  # the upper half, if the lower is zero
    return struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}[stored], number)
