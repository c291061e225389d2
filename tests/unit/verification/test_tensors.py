"""Tensors against what they must be, in pieces and from several threads."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import write_header

from mergekit_interleave.checkpoint.safetensors_header import Tensor, read_tensors
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.layout.layout import Constant
from mergekit_interleave.planning.tensor_plan import Packing, TensorSpec
from mergekit_interleave.verification import tensors as comparison
from mergekit_interleave.verification.tensors import Tolerance, compare

MODEL = ModelRef(ModelPath("m"))


def stored(folder: Path, data: bytes, shape: tuple[int, ...], dtype: str = "U8") -> Tensor:
    """A tensor `w` in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    write_header(folder / "model.safetensors", header, data)
    return read_tensors(folder)["w"]


def spec(tensor: Tensor, **how: object) -> TensorSpec:
    """What a tensor becomes."""
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


def differences(found: Tensor, expected: TensorSpec) -> list[str]:
    """What is said of it."""
    return [str(difference) for difference in compare([("w", found)], [expected]).differences]


@pytest.mark.parametrize("at", [0, 1, 2**18 - 1, 2**18, 2**20, 5 * 2**20 - 1])
def test_the_first_difference_counts(at: int, tmp_path: Path) -> None:
    """Whichever thread finds it, in whichever block it lies."""
    size = 5 * 2**20
    data = bytearray(size)
    source = stored(tmp_path / "a", bytes(data), (5, 2**20))
    for place in (at, size - 1):
        data[place] = 1
    found = stored(tmp_path / "b", bytes(data), (5, 2**20))
    row, column = divmod(at, 2**20)
    assert differences(found, spec(source)) == [
        f"w differs from the base, first at [{row}, {column}]"
    ]


@pytest.mark.parametrize("span", [2**18, 2**20])
def test_the_first_of_many_jobs(span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is many jobs, of two threads."""
    monkeypatch.setattr(comparison, "_SPAN", span)
    source = stored(tmp_path / "a", bytes(2**22), (2**22,))
    for first in (3, 2**20 + 7, 2**22 - 1):
        data = bytearray(2**22)
        data[first:] = b"\x01" * (2**22 - first)
        found = stored(tmp_path / "b", bytes(data), (2**22,))
        assert differences(found, spec(source)) == [f"w differs from the base, first at [{first}]"]


def test_blocks_in_another_order(tmp_path: Path) -> None:
    """Each must stand in its place."""
    source = stored(tmp_path / "a", bytes(range(12)), (3, 4))
    packing = Packing(axis=0, blocks=3, order=(0, 1, 1, 2))
    wanted = spec(source, packing=packing, shape=(4, 4), nbytes=16)
    right = bytes([*range(8), *range(4, 12)])
    assert not differences(stored(tmp_path / "b", right, (4, 4)), wanted)
    wrong = bytes([*range(8), *range(8, 12), *range(4, 8)])
    said = differences(stored(tmp_path / "b", wrong, (4, 4)), wanted)
    assert said == ["w differs from the base, first at [2, 0]"]


def test_constants(tmp_path: Path) -> None:
    """Those rows that are filled, and those that are not."""
    source = stored(tmp_path / "a", bytes(range(16)), (2, 2), "F32")
    wanted = spec(source, constant=Constant(1.0, "w", after=1))
    one = b"\0\0\x80\x3f"
    assert not differences(stored(tmp_path / "b", bytes(range(8)) + one * 2, (2, 2), "F32"), wanted)
    for wrong, place in ((b"\x09" + bytes(range(1, 8)) + one * 2, "[0, 0]"),
                         (bytes(range(8)) + one + b"\0" * 4, "[1, 1]")):  # fmt: skip
        said = differences(stored(tmp_path / "b", wrong, (2, 2), "F32"), wanted)
        assert said == [f"w differs from w of the base, filled with 1, first at {place}"]


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
    """Of floats, negative ones, too."""
    width = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1}[dtype]
    tensor = stored(tmp_path / "b", data, (len(data) // width,), dtype)
    assert (not differences(tensor, spec(tensor, scale=0))) == is_zero


def test_zeros_of_a_quantized_format(tmp_path: Path) -> None:
    """May be another byte."""
    tensor = stored(tmp_path / "b", b"\x88" * 8, (8,))
    assert not differences(tensor, spec(tensor, scale=0, zero=0x88))
    assert differences(tensor, spec(tensor, scale=0, zero=0x77))
    assert differences(tensor, spec(tensor, scale=0))


def test_a_hole_is_zero(tmp_path: Path) -> None:
    """And what stands beside it is looked at, wherever it starts."""
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
        said = differences(tensor, spec(tensor, scale=0))
        assert said == [f"w is not zero, first at [{place // 4}]"]


def test_files_stay_open_while_they_are_needed(tmp_path: Path) -> None:
    """A descriptor that was closed may be another file's by now."""
    files = comparison.Files()
    shards = [stored(tmp_path / str(i), bytes(4), (4,)).shard for i in range(8)]
    for other in shards[1:]:
        ours = files.of(shards[0])
        theirs = files.of(other)
        assert not ours.closed
        assert not theirs.closed
    assert len(files.opened) < len(shards)


def test_a_file_that_changes(tmp_path: Path) -> None:
    """Is an error, whichever side it is on."""
    source = stored(tmp_path / "a", bytes(8), (8,))
    found = stored(tmp_path / "b", bytes(8), (8,))
    for changed in (source, found):
        before = changed.file.stat()
        with changed.file.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match="changed while it was read"):
            compare([("w", found)], [spec(source)])
        with changed.file.open("r+b") as file:
            file.truncate(before.st_size)
        import os

        os.utime(changed.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not differences(found, spec(source))


def test_what_is_not_read(tmp_path: Path) -> None:
    """Is counted by its reason; its name, dtype and shape are still looked at."""
    source = stored(tmp_path / "a", bytes(8), (8,))
    found = stored(tmp_path / "b", b"\1" * 8, (8,))
    result = compare([("w", found)], [spec(source)], Tolerance(unread=lambda _: "why"))
    assert (result.differences, result.unread, result.compared) == ([], {"why": 1}, 0)
    other = spec(source, shape=(4, 2))
    assert compare([("w", found)], [other], Tolerance(unread=lambda _: "why")).differences


def test_a_failure_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread does not read on to the end of a large model."""
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
    """Of whatever a tensor is made, and however it is cut."""
    import struct

    monkeypatch.setattr(comparison, "_BLOCK", block)
    monkeypatch.setattr(comparison, "_SPAN", span)
    numbers = [float(i % 37) - 17 for i in range(256)]
    # What stands before and behind it in the file must not matter.
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
        said = differences(found, wanted)
        if wrong is None:
            assert not said
        else:
            assert said[0].endswith(f"first at [{wrong // 16}, {wrong % 16}]"), said
