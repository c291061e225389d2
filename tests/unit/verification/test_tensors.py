"""Tensors are compared with the expected ones, in blocks and in several threads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import write_header

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint.safetensors_header import read_tensors
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.layout.layout import Constant
from mergekit_interleave.planning.tensor_plan import Packing, TensorSpec
from mergekit_interleave.verification import stored_bytes as comparison
from mergekit_interleave.verification.tensors import Tolerance, compare

MODEL = ModelRef(ModelPath("m"))


def stored(folder: Path, data: bytes, shape: tuple[int, ...], dtype: str = "U8") -> Tensor:
    """Write a tensor `w` to its own file."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    write_header(folder / "model.safetensors", header, data)
    return read_tensors(folder)["w"]


def spec(tensor: Tensor, **how: object) -> TensorSpec:
    """Return the expected tensor, by default an unchanged source."""
    given = {
        "name": "w",
        "model": MODEL,
        "source": "w",
        "tensor": tensor,
        "scale": None,
        "dtype": tensor.dtype,
        "through": tensor.dtype,
        "shape": tensor.shape,
        "nbytes": tensor.nbytes,
    }
    return TensorSpec(**{**given, **how})  # type: ignore[arg-type]


def differences(found: Tensor, expected: TensorSpec) -> list[tuple[str | None, str]]:
    """Return the tensor and the first position of each difference."""
    return [
        (difference.tensor, difference.what[difference.what.find("[") :])
        for difference in compare([("w", found)], [expected]).differences
    ]


@pytest.mark.parametrize("at", [0, 1, 2**18 - 1, 2**18, 2**20, 5 * 2**20 - 1])
def test_the_first_difference_counts(at: int, tmp_path: Path) -> None:
    """The reported difference is the first, in any block and thread."""
    size = 5 * 2**20
    data = bytearray(size)
    source = stored(tmp_path / "a", bytes(data), (5, 2**20))
    for place in (at, size - 1):
        data[place] = 1
    found = stored(tmp_path / "b", bytes(data), (5, 2**20))
    row, column = divmod(at, 2**20)
    assert differences(found, spec(source)) == [("w", f"[{row}, {column}]")]


@pytest.mark.parametrize("span", [2**18, 2**20])
def test_the_first_of_many_jobs(span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first difference of a tensor that is compared in many jobs is reported."""
    monkeypatch.setattr(comparison, "_SPAN", span)
    source = stored(tmp_path / "a", bytes(2**22), (2**22,))
    for first in (3, 2**20 + 7, 2**22 - 1):
        data = bytearray(2**22)
        data[first:] = b"\x01" * (2**22 - first)
        found = stored(tmp_path / "b", bytes(data), (2**22,))
        assert differences(found, spec(source)) == [("w", f"[{first}]")]


def test_blocks_in_another_order(tmp_path: Path) -> None:
    """A packed tensor must have its blocks in the expected order."""
    source = stored(tmp_path / "a", bytes(range(12)), (3, 4))
    packing = Packing(axis=0, blocks=3, order=(0, 1, 1, 2))
    wanted = spec(source, packing=packing, shape=(4, 4), nbytes=16)
    right = bytes([*range(8), *range(4, 12)])
    assert not differences(stored(tmp_path / "b", right, (4, 4)), wanted)
    wrong = bytes([*range(8), *range(8, 12), *range(4, 8)])
    assert differences(stored(tmp_path / "b", wrong, (4, 4)), wanted) == [("w", "[2, 0]")]


def test_constants(tmp_path: Path) -> None:
    """The rows that are filled and those that are not must both be right."""
    source = stored(tmp_path / "a", bytes(range(16)), (2, 2), "F32")
    wanted = spec(source, constant=Constant(1.0, "w", after=1))
    one = b"\0\0\x80\x3f"
    assert not differences(stored(tmp_path / "b", bytes(range(8)) + one * 2, (2, 2), "F32"), wanted)
    for wrong, place in ((b"\x09" + bytes(range(1, 8)) + one * 2, "[0, 0]"),
                         (bytes(range(8)) + one + b"\0" * 4, "[1, 1]")):  # fmt: skip
        found = differences(stored(tmp_path / "b", wrong, (2, 2), "F32"), wanted)
        assert found == [("w", place)]


@pytest.mark.parametrize(
    ("dtype", "data", "is_zero"),
    [
        ("F16", b"\0\0\0\x80", True),
        ("F16", b"\0\0\x80\0", False),
        ("BF16", b"\0\x80\0\x80", True),
        ("F32", b"\0\0\0\x80", True),
        ("F32", b"\0\0\x80\0", False),
        ("F64", b"\0\0\0\0\0\0\0\x80", True),
        ("F64", b"\0\0\0\x80\0\0\0\0", False),
        ("I8", b"\0\x80", False),
        ("F32", b"\0\0\0\xc0", False),
    ],
)
def test_zeros(dtype: str, data: bytes, is_zero: bool, tmp_path: Path) -> None:
    """A negative zero counts as zero in floats only."""
    width = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1}[dtype]
    tensor = stored(tmp_path / "b", data, (len(data) // width,), dtype)
    assert (not differences(tensor, spec(tensor, scale=0))) == is_zero


def test_zeros_of_a_quantized_format(tmp_path: Path) -> None:
    """The zero of a quantized format may be another byte."""
    tensor = stored(tmp_path / "b", b"\x88" * 8, (8,))
    assert not differences(tensor, spec(tensor, scale=0, zero=0x88))
    assert differences(tensor, spec(tensor, scale=0, zero=0x77))
    assert differences(tensor, spec(tensor, scale=0))


def test_a_hole_is_zero(tmp_path: Path) -> None:
    """A hole counts as zeros, and data next to it is compared."""
    size = 2**22
    tensor = stored(tmp_path / "b", bytes(size), (size // 4,), "F32")
    offset = tensor.start
    for place in (0, 4097, 2**20 + 3, size - 1):
        with tensor.file.open("r+b") as file:
            file.truncate(offset)
            file.truncate(offset + size)
            file.seek(offset + place)
            file.write(b"\x01")
        tensor = read_tensors(tmp_path / "b")["w"]
        assert differences(tensor, spec(tensor, scale=0)) == [("w", f"[{place // 4}]")]


def test_files_stay_open_while_they_are_needed(tmp_path: Path) -> None:
    """The two files of a comparison stay open, because a closed descriptor may be reused."""
    files = comparison.Files()
    shards = [stored(tmp_path / str(i), bytes(4), (4,)).shard for i in range(8)]
    for other in shards[1:]:
        first, second = files.of(shards[0]), files.of(other)
        assert not first.closed
        assert not second.closed
    assert len(files.opened) < len(shards)


def test_a_file_that_changes(tmp_path: Path) -> None:
    """A file that changes during the comparison is an error on either side."""
    source = stored(tmp_path / "a", bytes(8), (8,))
    found = stored(tmp_path / "b", bytes(8), (8,))
    for changed in (source, found):
        before = changed.file.stat()
        with changed.file.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match=re.escape(f"{changed.file}: changed")):
            compare([("w", found)], [spec(source)])
        with changed.file.open("r+b") as file:
            file.truncate(before.st_size)
        import os

        os.utime(changed.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not differences(found, spec(source))


def test_unread_tensors(tmp_path: Path) -> None:
    """An unread tensor is counted by reason, and its name, dtype and shape are compared."""
    source = stored(tmp_path / "a", bytes(8), (8,))
    found = stored(tmp_path / "b", b"\1" * 8, (8,))
    result = compare([("w", found)], [spec(source)], Tolerance(unread=lambda _: "why"))
    assert (result.differences, result.unread, result.compared) == ([], {"why": 1}, 0)
    other = spec(source, shape=(4, 2))
    assert compare([("w", found)], [other], Tolerance(unread=lambda _: "why")).differences


def test_a_failure_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in one thread stops the others."""
    pairs = []
    for number in range(200):
        tensor = stored(tmp_path / str(number), bytes(4), (4,))
        pairs.append((f"w{number}", tensor, spec(tensor, name=f"w{number}")))
    read, count = comparison.Files.read, []

    def failing(files: comparison.Files, *where: object) -> bytes:
        count.append(where)
        if len(count) == 4:
            raise KeyboardInterrupt
        return read(files, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison.Files, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        compare([(name, tensor) for name, tensor, _ in pairs], [p for *_, p in pairs])
    assert len(count) < 100


KINDS = {
    "copied": {},
    "zero": {"scale": 0},
    "scaled": {"scale": 0.5},
    "converted": {"dtype": "F64", "nbytes": 2048},
    "rounded": {"through": "BF16"},
    "filled": {"constant": Constant(1.5, "w", after=5)},
    "packed": {"packing": Packing(0, 16, tuple(reversed(range(16))))},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "span"), [(16, 64), (64, 64), (64, 2**20), (2**18, 2**26)])
def test_every_byte_counts(
    kind: str, block: int, span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong number at any position is found, for each kind of tensor and block size."""
    import struct

    monkeypatch.setattr(comparison, "_BLOCK", block)
    monkeypatch.setattr(comparison, "_SPAN", span)
    numbers = [float(i % 37) - 17 for i in range(256)]
    source = stored(tmp_path / "a", struct.pack("<256f", *numbers), (16, 16), "F32")
    right = {
        "zero": [0.0] * 256,
        "scaled": [n * 0.5 for n in numbers],
        "filled": [*numbers[:80], *[1.5] * 176],
        "packed": [n for row in reversed(range(16)) for n in numbers[row * 16 : row * 16 + 16]],
    }.get(kind, numbers)
    wanted, letter = spec(source, **KINDS[kind]), "d" if kind == "converted" else "f"
    for wrong in (None, 0, 3, 5, 16, 77, 79, 80, 81, 128, 200, 255):
        written = list(right)
        if wrong is not None:
            written[wrong] += 1
        data = struct.pack(f"<256{letter}", *written)
        found = stored(tmp_path / "b", data, (16, 16), wanted.dtype)
        expected = [] if wrong is None else [("w", f"[{wrong // 16}, {wrong % 16}]")]
        assert differences(found, wanted) == expected
