"""Values of the metadata."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.gguf import header, values
from mergekit_interleave.gguf.values import ARRAY, FORMATS, Value

PLAIN: dict[int, Any] = {
    0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31), 6: 0.5, 7: True,
    10: 2**64 - 1, 11: -(2**63), 12: 1e300,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_every_plain_type(kind: int) -> None:
    """A number of each type is read back."""
    assert values.number(kind, PLAIN[kind]).decoded() == PLAIN[kind]
    assert PLAIN.keys() == FORMATS.keys()


@given(content=st.text())
def test_a_text(content: str) -> None:
    """A text is read back."""
    assert values.text(content).decoded() == content


@given(content=st.lists(st.text()), data=st.data())
def test_items_of_texts(content: list[str], data: st.DataObject) -> None:
    """Items of an array can be put into another order, to the byte."""
    value = values.texts(content)
    assert value.decoded() == content
    order = data.draw(st.lists(st.integers(0, len(content) - 1))) if content else []
    moved = values.array(values.STRING, [values.parts(value)[place] for place in order])
    assert moved == values.texts([content[place] for place in order])


@given(content=st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_items_of_numbers(content: list[int]) -> None:
    """An array of numbers is read back, and taken apart."""
    parts = [struct.pack("<i", number) for number in content]
    value = values.array(5, parts)
    assert value.decoded() == content
    assert values.parts(value) == parts


def test_arrays_of_arrays(tmp_path: Path) -> None:
    """An array of arrays is read, taken apart and written again."""
    inner = [values.texts(["a", "bc"]), values.array(0, [b"\1", b"\2"]), values.texts([])]
    value = values.array(ARRAY, [each.data for each in inner])
    assert value.decoded() == [["a", "bc"], [1, 2], []]
    assert values.parts(value) == [each.data for each in inner]
    file = tmp_path / "a.gguf"
    file.write_bytes(gguf_files.raw([gguf_files.pair(b"k", ARRAY, value.data)], []))
    assert header.read(file).metadata["k"] == value


def test_only_arrays_have_items() -> None:
    """A plain value cannot be taken apart."""
    with pytest.raises(TypeError):
        values.parts(Value(4, b"\0" * 4))
