"""Headers of GGUF files: what gguf-py writes, and what no reader may accept."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_files
import pytest
from gguf import GGUFReader
from gguf_files import entry, make_gguf, pair, raw, text
from harness import fuzz
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.gguf import header
from mergekit_interleave.gguf.header import Entry

ARCHITECTURE = pair(b"general.architecture", 8, text(b"llama"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that gguf-py wrote."""
    return make_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", kind="Q8_0")


def test_what_gguf_py_writes(toy: Path) -> None:
    """The tensors are those that gguf-py reads: names, types, shapes, places and bytes."""
    found, reader = header.read(toy), GGUFReader(toy)
    data = toy.read_bytes()
    assert list(found.metadata) == [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(found.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        own = found.tensors[tensor.name]
        assert own.dtype == tensor.tensor_type.name
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        assert (own.start, own.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert data[own.start : own.start + own.nbytes] == tensor.data.tobytes()


def test_it_is_written_as_it_was(toy: Path) -> None:
    """A header is encoded to the bytes that gguf-py wrote."""
    found = header.read(toy)
    entries = [Entry(name, t.dtype, t.shape, t.nbytes) for name, t in found.tensors.items()]
    written = header.encode(found.metadata, entries, found.version)
    assert written == toy.read_bytes()[: found.start]


def test_another_alignment(tmp_path: Path) -> None:
    """The alignment that a file states is kept."""
    file = make_gguf(tmp_path / "a.gguf", alignment=4096)
    found = header.read(file)
    assert found.alignment == 4096
    assert all(tensor.start % 4096 == 0 for tensor in found.tensors.values())


def test_version_2(tmp_path: Path) -> None:
    """Version 2, which has the same layout, is read."""
    file = tmp_path / "a.gguf"
    file.write_bytes(raw([ARCHITECTURE], [entry(b"t", (8,))], b"\0" * 32, version=2))
    assert header.read(file).version == 2
    assert gguf_files.ggml_reads(file)


WRONG = {
    "empty": b"",
    "no magic": b"GGUX" + bytes(60),
    "only magic": b"GGUF",
    "version 0": raw([], [], version=0),
    "version 1": raw([], [], version=1),
    "version 4": raw([], [], version=4),
    "big-endian": raw([], [], version=3 << 24),
    "too many keys": raw([ARCHITECTURE], [], counts=(0, 2)),
    "count of keys overflows": raw([ARCHITECTURE], [], counts=(0, 2**64 - 1)),
    "too many tensors": raw([], [entry(b"t", (8,))], counts=(9, 0)),
    "count of tensors overflows": raw([], [], counts=(2**63, 0)),
    "key past the end": raw([struct.pack("<Q", 2**40) + b"k"], []),
    "empty key": raw([pair(b"", 4, b"\0" * 4)], []),
    "doubled key": raw([ARCHITECTURE, ARCHITECTURE], []),
    "key is no text": raw([pair(b"\xff\xfe", 4, b"\0" * 4)], []),
    "unknown type of a value": raw([pair(b"k", 13, b"\0" * 8)], []),
    "text past the end": raw([pair(b"k", 8, struct.pack("<Q", 2**63))], []),
    "array past the end": raw([pair(b"k", 9, struct.pack("<IQ", 4, 2**62))], []),
    "texts past the end": raw([pair(b"k", 9, struct.pack("<IQ", 8, 2**60))], []),
    "arrays past the end": raw([pair(b"k", 9, struct.pack("<IQ", 9, 2**60))], []),
    "unknown type of items": raw([pair(b"k", 9, struct.pack("<IQ", 99, 1) + b"\0" * 8)], []),
    "nested too deeply": raw([pair(b"k", 9, struct.pack("<IQ", 9, 1) * 20)], []),
    "alignment of 0": raw([pair(b"general.alignment", 4, b"\0" * 4)], []),
    "alignment of 24": raw([pair(b"general.alignment", 4, struct.pack("<I", 24))], []),
    "alignment is a text": raw([pair(b"general.alignment", 8, text(b"32"))], []),
    "unknown type of a tensor": raw([], [entry(b"t", (8,), kind=99)], b"\0" * 32),
    "removed type of a tensor": raw([], [entry(b"t", (32,), kind=4)], b"\0" * 32),
    "five dimensions": raw([], [entry(b"t", (1, 1, 1, 1, 1))], b"\0" * 32),
    "dimensions overflow": raw([], [entry(b"t", (2**40, 2**40))], b"\0" * 32),
    "half a block": raw([], [entry(b"t", (48,), kind=8)], b"\0" * 64),
    "wrong offset": raw([], [entry(b"t", (8,), offset=32)], b"\0" * 64),
    "overlapping": raw([], [entry(b"t", (8,)), entry(b"u", (8,))], b"\0" * 64),
    "doubled tensor": raw([], [entry(b"t", (8,)), entry(b"t", (8,), offset=32)], b"\0" * 64),
    "empty name": raw([], [entry(b"", (8,))], b"\0" * 32),
    "long name": raw([], [entry(b"t" * 64, (8,))], b"\0" * 32),
    "data cut short": raw([], [entry(b"t", (64,))], b"\0" * 32),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file(name: str, tmp_path: Path) -> None:
    """A wrong file is refused with one sentence that names it."""
    file = tmp_path / "wrong.gguf"
    file.write_bytes(WRONG[name])
    with pytest.raises(CheckpointError) as raised:
        header.read(file)
    assert str(file) in str(raised.value)
    # ggml does not look at the data here, and accepts any bytes as a name, or none.
    accepted = ("data cut short", "key is no text", "empty name")
    assert name in accepted or not gguf_files.ggml_reads(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A directory, a missing file and a pipe are refused."""
    import os

    os.mkfifo(tmp_path / "pipe.gguf")
    for name in (".", "none.gguf", "pipe.gguf"):
        with pytest.raises(CheckpointError):
            header.read(tmp_path / name)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    """A pointer of Git LFS has a hint."""
    file = tmp_path / "a.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError) as raised:
        header.read(file)
    assert "git lfs" in (raised.value.hint or "")


def test_which_files_are_gguf(toy: Path, tmp_path: Path) -> None:
    """A file is known by its suffix or its first bytes; a directory is none."""
    other = tmp_path / "model"
    other.write_bytes(toy.read_bytes()[:100])
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text").write_text("interleave: every 4")
    assert header.is_gguf(str(toy))
    assert header.is_gguf(str(other))
    assert header.is_gguf(str(tmp_path / "missing.gguf"))
    assert not header.is_gguf(str(tmp_path / "folder.gguf"))
    assert not header.is_gguf(str(tmp_path / "text"))
    assert not header.is_gguf("org/name")


@fuzz(300)
@given(
    place=st.integers(0, 2**20),
    data=st.binary(min_size=1, max_size=9),
    cut=st.one_of(st.none(), st.integers(0, 2**20)),
)
def test_random_damage(toy: Path, place: int, data: bytes, cut: int | None) -> None:
    """A damaged file is refused, or is one that llama.cpp's reader accepts, too."""
    whole = bytearray(toy.read_bytes())
    start = header.read(toy).start
    place %= start
    whole[place : place + len(data)] = data
    file = toy.with_name("damaged.gguf")
    file.write_bytes(whole if cut is None else whole[: cut % len(whole)])
    try:
        header.read(file)
    except CheckpointError:
        return
    assert gguf_files.ggml_reads(file)
