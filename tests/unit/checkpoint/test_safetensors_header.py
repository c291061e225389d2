"""Reading safetensors: headers and index, and what is wrong with them."""

from __future__ import annotations

import copy
import json
import os
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

from mergekit_interleave.checkpoint.safetensors_header import check_unchanged, read_tensors
from mergekit_interleave.errors import CheckpointError


class TestTensors:
    """Headers and index."""

    @pytest.mark.parametrize("name", ["tiny", "sharded"])
    def test_headers_say_what_the_library_loads(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        """Names, shapes and sizes are those of the safetensors library."""
        path = request.getfixturevalue(name)
        loaded = load_tensors(path)
        tensors = read_tensors(path)
        assert tensors.keys() == loaded.keys()
        for key, tensor in tensors.items():
            assert tensor.shape == tuple(loaded[key].shape)
            assert tensor.elements == loaded[key].numel()
            assert tensor.nbytes == loaded[key].nbytes

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "cut short"),
            (b"version https://git-lfs.github.com/spec/v1\n", "cut short"),
            (struct.pack("<Q", 2**60) + b"{}", "cut short"),
            (struct.pack("<Q", 2) + b"{", "cut short"),
            (struct.pack("<Q", 2) + b"[]", "safetensors header"),
            (struct.pack("<Q", 4) + b"{{{{", "safetensors header"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes, reason: str) -> None:
        """Whatever it holds."""
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as error:
            read_tensors(tmp_path)
        assert "model.safetensors" in str(error.value)

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
        """Shapes and offsets must agree."""
        write_header(tmp_path / "model.safetensors", {"x": entry}, b"\0" * 8)
        with pytest.raises(CheckpointError, match="safetensors header"):
            read_tensors(tmp_path)

    def test_a_file_that_was_cut_short(self, own_tiny: Path) -> None:
        """Its header promises more data than there is."""
        file = own_tiny / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="ends before its last tensor"):
            read_tensors(own_tiny)

    def test_index_and_shards_must_agree(self, sharded: Path, tmp_path: Path) -> None:
        """A tensor that only one of them has is named."""
        for file in sharded.iterdir():
            (tmp_path / file.name).symlink_to(file)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.norm.weight"]
        index.unlink()
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"disagree about model\.norm\.weight"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x"]
    )
    def test_an_index_names_only_files_beside_it(self, tmp_path: Path, shard: str) -> None:
        """A path elsewhere is refused."""
        content = {"weight_map": {"x": shard}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="shard name"):
            read_tensors(tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        """By its path."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: No such file"):
            read_tensors(tmp_path)

    def test_two_sets_of_weights_are_ambiguous(self, own_tiny: Path) -> None:
        """Transformers reads the one, mergekit the other."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (own_tiny / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="holds both"):
            read_tensors(own_tiny)

    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        """Nor opened."""
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(CheckpointError, match="pickles are not loaded"):
            read_tensors(tmp_path)

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        """An error that says what was looked for."""
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
            read_tensors(tmp_path)


class TestHostile:
    """What no writer makes is one error, in no time, whatever it asks for."""

    def entry(self, start: int, stop: int, **how: object) -> dict[str, object]:
        """A tensor of bytes."""
        return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **how}

    def refused(self, folder: Path, header: object, data: bytes = b"") -> str:
        """What is said of a file."""
        write_header(folder / "model.safetensors", header, data)
        started = time.monotonic()
        with pytest.raises(CheckpointError) as error:
            read_tensors(folder)
        assert time.monotonic() - started < 10
        assert str(folder / "model.safetensors") in str(error.value)
        return str(error.value)

    def test_offsets(self, tmp_path: Path) -> None:
        """Tensors fill the data, one behind the other."""
        entry = self.entry
        for offsets, reason in (
            ([(0, 8), (4, 12)], "overlap"),
            ([(0, 8), (0, 8)], "overlap"),
            ([(0, 4), (8, 12)], "overlap"),
            ([(4, 12)], "overlap"),
            ([(0, 8)], "4 bytes"),
            ([(0, 13)], "ends before its last tensor"),
        ):
            header = {str(i): entry(*pair) for i, pair in enumerate(offsets)}
            assert reason in self.refused(tmp_path, header, bytes(12))

    def test_numbers(self, tmp_path: Path) -> None:
        """A shape whose size overflows, and what are no sizes."""
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

    def test_a_name_that_stands_there_twice(self, tmp_path: Path) -> None:
        """Readers would not agree which counts."""
        one = json.dumps(self.entry(0, 8))
        for text in (f'{{"x": {one}, "x": {one}}}', one[:-1].join(('{"x": ', ', "shape": [8]}}'))):
            assert "duplicate key" in self.refused(tmp_path, text.encode(), bytes(8))

    def test_text(self, tmp_path: Path) -> None:
        """Broken words, and deep nests."""
        for text in (b'{"\xff": 1}', b"[" * 10**6, b'{"x":' * 10**6, b"null", b"1e999", b'"x"'):
            assert "safetensors header" in self.refused(tmp_path, text)

    @pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
    def test_what_is_no_file(self, kind: str, own_tiny: Path) -> None:
        """Is not waited for."""
        (own_tiny / "model.safetensors").unlink()
        index = {"weight_map": {"x": "a.safetensors"}}
        (own_tiny / "model.safetensors.index.json").write_text(json.dumps(index))
        place = own_tiny / "a.safetensors"
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "directory":
            place.mkdir()
        else:
            socket.socket(socket.AF_UNIX).bind(os.path.relpath(place))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            read_tensors(own_tiny)


class TestFuzzed:
    """Whatever becomes of a file, it is read or it is refused."""

    HEADER: ClassVar[dict[str, Any]] = {
        "__metadata__": {"format": "pt"},
        "model.layers.0.w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "model.layers.1.w": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "model.norm": {"dtype": "U8", "shape": [0, 7], "data_offsets": [16, 16]},
    }

    def read(self, folder: Path) -> None:
        """Read a directory; nothing but a project's error may come of it."""
        with suppress(CheckpointError):
            for tensor in read_tensors(folder).values():
                assert tensor.start + tensor.nbytes <= tensor.file.stat().st_size

    @fuzz(1500)
    @given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4))
    def test_bytes(self, edits: list[tuple[int, bytes]]) -> None:
        """A few bytes are others, more or fewer."""
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
        """One value is another."""
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
        """It says anything."""
        with tempfile.TemporaryDirectory() as folder:
            write_header(Path(folder, "a.safetensors"), self.HEADER, bytes(16))
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
            self.read(Path(folder))


class TestMetadata:
    """What a header says besides its tensors."""

    def test_it_is_read(self, tmp_path: Path) -> None:
        """With the tensors, and is none of them."""
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = {"__metadata__": {"format": "pt", "made": "by hand"}, "x": entry}
        write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
        (tensor,) = read_tensors(tmp_path).values()
        assert tensor.shard.metadata == {"format": "pt", "made": "by hand"}

    def test_it_is_an_object(self, tmp_path: Path) -> None:
        """Or the header is broken."""
        write_header(tmp_path / "model.safetensors", {"__metadata__": "pt"})
        with pytest.raises(CheckpointError, match="safetensors header"):
            read_tensors(tmp_path)


class TestUnchanged:
    """A file is still what it was when its header was read."""

    def test_one_that_stays(self, tiny: Path) -> None:
        """Passes."""
        check_unchanged(read_tensors(tiny).values())

    @pytest.mark.parametrize("change", ["written", "replaced", "cut", "gone"])
    def test_one_that_does_not(self, change: str, own_tiny: Path) -> None:
        """Is named."""
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
    """What a header says of a layer besides its tensors is true of no new one: refused."""
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(load_tensors(own_tiny), own_tiny / "model.safetensors", {name: "{}"})
    for engine in ("mergekit", "stream"):
        words = ("run", "repeat: [1, 3]", tmp_path / "out", "--model", own_tiny)
        result = mk(*words, "--engine", engine)
        assert result.status == 1
        assert f"'{name}'" in result.err
