"""Hold a value of GGUF metadata as its bytes, and decode or encode it.

Most values, such as the tokenizer, are copied unchanged, so they are decoded only if needed.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STRING, ARRAY, BOOL, UINT32 = 8, 9, 7, 4

FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip
"""The types of plain values: their numbers in a file, each with its format in `struct`."""

SIZES = {kind: struct.calcsize(f"<{code}") for kind, code in FORMATS.items()}
"""The numbers of bytes of plain values."""

_ARRAY_HEAD = 12
"""The number of bytes before the items of an array: their type and their number."""

INTEGERS = frozenset({0, 1, 2, 3, UINT32, 5, 10, 11})


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the metadata.

    Attributes:
        kind: The number of its type.
        data: Its bytes as in a file, without the type.
        items: For an array: the number of its items' type.
        count: For an array: the number of its items.
    """

    kind: int
    data: bytes
    items: int | None = None
    count: int = 0

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return self.kind == ARRAY

    @property
    def is_integer(self) -> bool:
        """Whether it is a single integer."""
        return self.kind in INTEGERS

    def decoded(self) -> Any:
        """Return the number, truth value, text or list.

        Bytes of a text that are not UTF-8 are replaced.
        """
        return _decode(self.kind, self.data, 0)[0]


def _decode(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    """Decode a value that starts at an offset; return it and the offset of its end."""
    if kind == STRING:
        end = _end(kind, data, at)
        return data[at + 8 : end].decode(errors="replace"), end
    if kind == ARRAY:
        items, count = struct.unpack_from("<IQ", data, at)
        at += _ARRAY_HEAD
        if items in FORMATS:
            end = at + count * SIZES[items]
            return [*struct.unpack_from(f"<{count}{FORMATS[items]}", data, at)], end
        found = []
        for _ in range(count):
            item, at = _decode(items, data, at)
            found.append(item)
        return found, at
    return struct.unpack_from(f"<{FORMATS[kind]}", data, at)[0], at + SIZES[kind]


def _end(kind: int, data: bytes, at: int) -> int:
    """Return the offset of the end of a value that starts at an offset."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return at + 8 + int(length)
    if kind == ARRAY:
        items, count = struct.unpack_from("<IQ", data, at)
        at += _ARRAY_HEAD
        for _ in range(count):
            at = _end(items, data, at)
        return at
    return at + SIZES[kind]


def text(content: str) -> Value:
    """Return a text as a value."""
    data = content.encode()
    return Value(STRING, struct.pack("<Q", len(data)) + data)


def number(kind: int, content: float) -> Value:
    """Return a number as a value of a type.

    Raises:
        struct.error: The number is out of range for the type.
    """
    return Value(kind, struct.pack(f"<{FORMATS[kind]}", content))


def unsigned(content: int) -> Value:
    """Return a number as an unsigned integer of 32 bits."""
    return number(UINT32, content)


def texts(content: Sequence[str]) -> Value:
    """Return a list of texts as an array."""
    return array(STRING, [text(each).data for each in content])


def parts(value: Value) -> list[bytes]:
    """Return the bytes of each item of an array.

    Args:
        value: The array.
    """
    if value.items is None:
        raise TypeError("only an array has items")
    found, at = [], _ARRAY_HEAD
    for _ in range(value.count):
        end = _end(value.items, value.data, at)
        found.append(value.data[at:end])
        at = end
    return found


def array(items: int, parts_of: Sequence[bytes]) -> Value:
    """Return an array.

    Args:
        items: The type of its items.
        parts_of: The bytes of each item.
    """
    head = struct.pack("<IQ", items, len(parts_of))
    return Value(ARRAY, b"".join([head, *parts_of]), items, len(parts_of))
