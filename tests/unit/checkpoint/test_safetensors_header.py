"""Headers and indexes of safetensors files are read, and invalid ones are refused."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from harness import Cli, fuzz, load_tensors, write_header
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave._stored_tensor import check_unchanged
from mergekit_interleave.checkpoint.safetensors_header import read_tensors
from mergekit_interleave.errors import CheckpointError


class TestTensors:
    """Tests of headers and indexes."""

    @pytest.mark.parametrize("name", ["tiny", "sharded"])
    def test_headers_equal_what_the_library_loads(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        """Names, shapes and sizes equal those of the safetensors library."""
        path = request.getfixturevalue(name)
        loaded = load_tensors(path)
        tensors = read_tensors(path)
        assert tensors.keys() == loaded.keys()
        for key, tensor in tensors.items():
            assert tensor.shape == tuple(loaded[key].shape)
            assert tensor.elements == loaded[key].numel()
            assert tensor.nbytes == loaded[key].nbytes

    @pytest.mark.parametrize(
        ("content", "whole"),
        [
            (b"", False),
            (b"version https://git-lfs.github.com/spec/v1\n", False),
            (struct.pack("<Q", 2**60) + b"{}", False),
            (struct.pack("<Q", 2) + b"{", False),
            (struct.pack("<Q", 2) + b"[]", True),
            (struct.pack("<Q", 4) + b"{{{{", True),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes, *, whole: bool) -> None:
        """The error for a broken file names it, and the hint for a short one names git lfs."""
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as error:
            read_tensors(tmp_path)
        assert ("header" in str(error.value)) == whole
        assert ("git lfs pull" in str(error.value.hint)) != whole

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
            [],
        ],
    )
    def test_a_broken_entry_is_an_error(self, tmp_path: Path, entry: object) -> None:
        """Shape and offsets of a tensor must agree."""
        write_header(tmp_path / "model.safetensors", {"x": entry}, b"\0" * 8)
        with pytest.raises(CheckpointError, match="safetensors header"):
            read_tensors(tmp_path)

    def test_a_file_that_was_cut_short(self, own_tiny: Path) -> None:
        """A file with less data than its header states is refused."""
        file = own_tiny / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*last tensor"):
            read_tensors(own_tiny)

    def test_index_and_shards_must_agree(self, sharded: Path, tmp_path: Path) -> None:
        """A tensor that is only in the index or only in a shard is named."""
        for file in sharded.iterdir():
            (tmp_path / file.name).symlink_to(file)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.norm.weight"]
        index.unlink()
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"index\.json: .*model\.norm\.weight"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x"]
    )
    def test_an_index_names_only_files_beside_it(self, tmp_path: Path, shard: str) -> None:
        """A shard outside of the model's directory is refused."""
        content = {"weight_map": {"x": shard}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=re.escape(repr(shard))):
            read_tensors(tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        """The error for a missing shard names it."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: No such file"):
            read_tensors(tmp_path)

    def test_two_sets_of_weights_are_ambiguous(self, own_tiny: Path) -> None:
        """A directory with both a single file and an index is refused as ambiguous."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (own_tiny / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*index\.json"):
            read_tensors(own_tiny)

    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        """A pickle is refused without being opened."""
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(CheckpointError, match="pickle"):
            read_tensors(tmp_path)

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        """Without weights, the error names the expected file."""
        with pytest.raises(CheckpointError, match=r"\bmodel\.safetensors\b.*index\.json"):
            read_tensors(tmp_path)


class TestHostile:
    """An invalid file gives one error in little time, whatever sizes it states."""

    def entry(self, start: int, stop: int, **how: object) -> dict[str, object]:
        """Return the header entry of a uint8 tensor."""
        return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **how}

    def refused(self, folder: Path, header: object, data: bytes = b"") -> str:
        """Return the error message for a file."""
        write_header(folder / "model.safetensors", header, data)
        started = time.monotonic()
        with pytest.raises(CheckpointError) as error:
            read_tensors(folder)
        assert time.monotonic() - started < 10
        assert str(folder / "model.safetensors") in str(error.value)
        return str(error.value)

    def test_offsets(self, tmp_path: Path) -> None:
        """Tensors must fill the data without gaps or overlaps."""
        entry = self.entry
        for offsets, reason in (
            ([(0, 8), (4, 12)], "overlap"),
            ([(0, 8), (0, 8)], "overlap"),
            ([(0, 4), (8, 12)], "overlap"),
            ([(4, 12)], "overlap"),
            ([(0, 8)], "4 bytes"),
            ([(0, 13)], "last tensor"),
        ):
            header = {str(i): entry(*pair) for i, pair in enumerate(offsets)}
            assert reason in self.refused(tmp_path, header, bytes(12))

    def test_numbers(self, tmp_path: Path) -> None:
        """Shapes that overflow or are not lists of sizes are refused."""
        for shape in (
            [2**40, 2**40],
            [2**63, 0],
            [True] * 8,
            [1.0],
            [1] * 65,
            [10**1000] * 20_000,
            {"0": 8},
            "8",
        ):
            header = {"x": self.entry(0, 8, shape=shape)}
            assert "safetensors header" in self.refused(tmp_path, header, bytes(8))

    def test_a_duplicate_name(self, tmp_path: Path) -> None:
        """A duplicate key is refused, because readers disagree about which one counts."""
        one = json.dumps(self.entry(0, 8))
        for text in (f'{{"x": {one}, "x": {one}}}', one[:-1].join(('{"x": ', ', "shape": [8]}}'))):
            message = self.refused(tmp_path, text.encode(), bytes(8))
            assert re.search("duplicate key '(x|shape)'", message)

    def test_text(self, tmp_path: Path) -> None:
        """Invalid UTF-8, deep nesting and values that are no object are refused."""
        for text in (b'{"\xff": 1}', b"[" * 10**6, b'{"x":' * 10**6, b"null", b"1e999", b'"x"'):
            assert "safetensors header" in self.refused(tmp_path, text)

    @pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
    def test_special_files(self, kind: str, own_tiny: Path) -> None:
        """A pipe, a directory or a socket is refused without waiting."""
        (own_tiny / "model.safetensors").unlink()
        index = {"weight_map": {"x": "a.safetensors"}}
        (own_tiny / "model.safetensors.index.json").write_text(json.dumps(index))
        shard = own_tiny / "a.safetensors"
        if kind == "pipe":
            os.mkfifo(shard)
        elif kind == "directory":
            shard.mkdir()
        else:
            socket.socket(socket.AF_UNIX).bind(os.path.relpath(shard))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            read_tensors(own_tiny)


class TestFuzzed:
    """Any file is either read or refused with CheckpointError."""

    HEADER: ClassVar[dict[str, Any]] = {
        "__metadata__": {"format": "pt"},
        "model.layers.0.w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "model.layers.1.w": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "model.norm": {"dtype": "U8", "shape": [0, 7], "data_offsets": [16, 16]},
    }

    def read(self, folder: Path) -> None:
        """Read a directory, which may raise CheckpointError and nothing else."""
        with suppress(CheckpointError):
            for tensor in read_tensors(folder).values():
                assert tensor.start + tensor.nbytes <= tensor.file.stat().st_size

    @fuzz(1500)
    @given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4))
    def test_bytes(self, edits: list[tuple[int, bytes]]) -> None:
        """Changed, added or removed bytes are read or refused."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.safetensors")
            write_header(file, self.HEADER, bytes(16))
            content = file.read_bytes()
            for at, new in edits:
                content = content[:at] + new + content[at + 1 :]
            file.write_bytes(content)
            self.read(Path(folder))

    @fuzz(1500)
    @given(
        name=st.sampled_from(sorted(HEADER)),
        key=st.sampled_from(["dtype", "shape", "data_offsets", "x"]),
        value=st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**70), 2**70)
            | st.floats()
            | st.text(max_size=3)
            | st.sampled_from(["BF16", "F4", "Z9"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=2), inner, max_size=2)
            ),
            max_leaves=5,
        ),
        whole=st.booleans(),
    )
    def test_entries(self, name: str, key: str, value: object, *, whole: bool) -> None:
        """A changed value in a header is read or refused."""
        header = copy.deepcopy(self.HEADER)
        if whole:
            header[name] = value
        else:
            header[name][key] = value
        with tempfile.TemporaryDirectory() as folder:
            write_header(Path(folder, "model.safetensors"), header, bytes(16))
            self.read(Path(folder))

    @fuzz(500)
    @given(
        index=st.dictionaries(
            st.sampled_from(["weight_map", "metadata", "x"]),
            st.none()
            | st.integers()
            | st.dictionaries(
                st.sampled_from(sorted(HEADER)),
                st.none()
                | st.integers()
                | st.sampled_from(
                    ["a.safetensors", "b.safetensors", "../a.safetensors", "", "\0.safetensors"]
                ),
            ),
        )
    )
    def test_index(self, index: dict[str, object]) -> None:
        """Any index is read or refused."""
        with tempfile.TemporaryDirectory() as folder:
            write_header(Path(folder, "a.safetensors"), self.HEADER, bytes(16))
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
            self.read(Path(folder))


class TestMetadata:
    """Tests of a header's metadata."""

    def test_it_is_read(self, tmp_path: Path) -> None:
        """Metadata is read, and is not a tensor."""
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = {"__metadata__": {"format": "pt", "made": "by hand"}, "x": entry}
        write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
        (tensor,) = read_tensors(tmp_path).values()
        assert tensor.shard.metadata == {"format": "pt", "made": "by hand"}

    def test_it_is_an_object(self, tmp_path: Path) -> None:
        """Metadata that is not an object makes the header invalid."""
        write_header(tmp_path / "model.safetensors", {"__metadata__": "pt"})
        with pytest.raises(CheckpointError, match="safetensors header"):
            read_tensors(tmp_path)


class TestUnchanged:
    """Tests of files that change after their header was read."""

    def test_an_unchanged_file(self, tiny: Path) -> None:
        """An unchanged file passes."""
        check_unchanged(read_tensors(tiny).values())

    @pytest.mark.parametrize("change", ["written", "replaced", "cut", "gone"])
    def test_a_changed_file(self, change: str, own_tiny: Path) -> None:
        """A changed file is named."""
        tensors = read_tensors(own_tiny)
        file = own_tiny / "model.safetensors"
        content, status = file.read_bytes(), file.stat()
        match change:
            case "written":
                file.write_bytes(content[:-1] + b"x")
            case "replaced":
                (own_tiny / "other").write_bytes(content)
                os.utime(own_tiny / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
                (own_tiny / "other").rename(file)
            case "cut":
                os.truncate(file, 1)
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            case "gone":
                file.unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (changed|No such file)"):
            check_unchanged(tensors.values())


def test_metadata_of_single_layers(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """Both engines refuse header metadata that names a layer, because new layers would lack it."""
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(load_tensors(own_tiny), own_tiny / "model.safetensors", {name: "{}"})
    for engine in ("mergekit", "stream"):
        words = ("run", "repeat: [1, 3]", tmp_path / "out", "--model", own_tiny)
        result = mk(*words, "--engine", engine)
        assert result.status == 1
        assert f"'{name}'" in result.err
