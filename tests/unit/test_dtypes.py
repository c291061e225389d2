"""The table of dtypes, compared with torch and safetensors."""

from __future__ import annotations

import pytest

from mergekit_interleave import _dtypes


@pytest.mark.parametrize("stored", _dtypes.STORED)
def test_bits_and_names_equal_torch(stored: str) -> None:
    """The width and the name of a dtype are those of torch, if safetensors reads it."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import _TYPES

    dtype = _dtypes.STORED[stored]
    loaded = _TYPES.get(stored)
    if loaded is not None:
        assert loaded.itemsize * 8 == dtype.bits
    if dtype.name is not None:
        assert getattr(torch, dtype.name) == loaded


def test_the_floats_that_weights_are_converted_to() -> None:
    """Weights can be converted to four floats, whose short and long names are known."""
    assert [*_dtypes.NAMED] == ["float16", "bfloat16", "float32", "float64"]
    assert {*_dtypes.ALIASES.values()} <= _dtypes.NAMED.keys()
    assert _dtypes.name_of("BF16") == "bfloat16"
    assert _dtypes.name_of("I8") is None


def test_wider_floats() -> None:
    """A dtype fits into floats with more bits; neither 16-bit format contains the other."""
    assert {stored: _dtypes.wider(stored) for stored in ("BF16", "F16", "F32", "F64", "I8")} == {
        "BF16": ("F32", "F64"), "F16": ("F32", "F64"), "F32": ("F64",), "F64": (), "I8": ()
    }  # fmt: skip


@pytest.mark.parametrize("name", _dtypes.NAMED)
def test_bytes_of_a_number_equal_torch(name: str) -> None:
    """A number is encoded in little-endian order, as safetensors stores it."""
    torch = pytest.importorskip("torch")
    wanted = bytes(torch.tensor([1.5], dtype=getattr(torch, name)).view(torch.uint8).tolist())
    assert _dtypes.encode(_dtypes.NAMED[name].stored, 1.5) == wanted
