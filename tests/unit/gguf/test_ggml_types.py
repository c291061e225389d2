"""The types of tensors in GGUF files."""

from __future__ import annotations

import gguf_files
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, dequantize
from gguf.constants import GGMLQuantizationType

from mergekit_interleave.gguf.ggml_types import BY_NAME, BY_NUMBER


def test_they_are_those_of_llama_cpp() -> None:
    """Each number that llama.cpp knows has its name, and the size of its blocks."""
    own = gguf_files.library()
    import xllamacpp

    found = {}
    for number in range(xllamacpp.ggml_type.GGML_TYPE_COUNT.value):
        if own.ggml_type_size(number):
            name = own.ggml_type_name(number).decode().upper()
            found[number] = (name, own.ggml_blck_size(number), own.ggml_type_size(number))
    assert found == {row.number: (row.name, row.elements, row.nbytes) for row in BY_NUMBER.values()}


def test_they_are_those_of_gguf_py() -> None:
    """Each type of gguf-py is here, with its size; only that of Q8_1 is wrong there."""
    found = {kind.name: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    own = {name: (row.elements, row.nbytes) for name, row in BY_NAME.items() if name in found}
    assert {name for name in found if own[name] != found[name]} == {"Q8_1"}


@pytest.mark.parametrize("kind", gguf_files.TYPES, ids=lambda kind: kind.name)
def test_zero_bytes_are_zeros(kind: GGMLQuantizationType) -> None:
    """gguf-py decodes zero bytes of each type that it can decode to exact zeros."""
    row = BY_NAME[kind.name]
    assert row.zero
    decoded = dequantize(np.zeros((3, row.nbytes * 2), dtype=np.uint8), kind)
    assert decoded.shape == (3, row.elements * 2)
    assert not decoded.any()


def test_a_type_that_gguf_py_does_not_decode_is_not_known_to_be_zero() -> None:
    """Types of quantized numbers that were not decoded here are not zeroed."""
    decoded = {kind.name for kind in gguf_files.TYPES}
    assert len(decoded) == 26
    plain = {"I8", "I16", "I32", "I64", "F64"}
    assert {name for name, row in BY_NAME.items() if row.zero} == decoded | plain
