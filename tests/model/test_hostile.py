"""A malicious checkpoint or directive is one error within seconds, and OUT is absent.

Both engines read through the same code, so the error must be the same.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, load_tensors, set_keys

HEADER = {"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
Spoil = Callable[[Path], None]


def header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Return a function that changes the header of the weights and keeps their data."""

    def spoil(base: Path) -> None:
        file = base / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def entry(**values: Any) -> Spoil:
    """Return a function that changes the header's entry of one tensor."""
    return header(lambda entries: entries["model.norm.weight"].update(values))


def raw(text: bytes, length: int | None = None) -> Spoil:
    """Return a function that replaces the weights by another header."""

    def spoil(base: Path) -> None:
        size = struct.pack("<Q", len(text) if length is None else length)
        (base / "model.safetensors").write_bytes(size + text + bytes(64))

    return spoil


def index(name: str) -> Spoil:
    """Return a function that writes an index that names a given file."""

    def spoil(base: Path) -> None:
        weights = base / "model.safetensors"
        tensors = load_tensors(base)
        weights.rename(base.parent / "x.safetensors")
        content = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (base / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def config(**values: Any) -> Spoil:
    """Return a function that changes config.json."""

    def spoil(base: Path) -> None:
        content = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**content, **values}))

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    """Return a function that replaces the content of a file."""

    def spoil(base: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (base / name).write_bytes(data)

    return spoil


def special(make: Callable[[Path], Any]) -> Spoil:
    """Return a function that replaces the weights by something that is not a regular file."""

    def spoil(base: Path) -> None:
        (base / "model.safetensors").unlink()
        make(base / "model.safetensors")

    return spoil


def fifo_behind_a_link(place: Path) -> None:
    """Make a link to a pipe; only links to regular files are allowed."""
    os.mkfifo(place.parent / "pipe")
    place.symlink_to(place.parent / "pipe")


def without_layer(base: Path) -> None:
    """Remove the tensors of one layer that config.json counts."""
    from safetensors.torch import save_file

    tensors = {n: t for n, t in load_tensors(base).items() if ".layers.5." not in n}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, Spoil] = {
    "a shard elsewhere": index("../x.safetensors"),
    "a shard at an absolute path": index("/etc/x.safetensors"),
    "a shard below": index("a/x.safetensors"),
    "a shard behind a backslash": index("..\\x.safetensors"),
    "a shard that is missing": index("none.safetensors"),
    "a header of 2^60 bytes": raw(b"{}", 2**60),
    "a header that is larger than the file": raw(b"{}", 200),
    "a header that is not JSON": raw(b"{" * 50),
    "a header in bad UTF-8": raw(b'{"\xff\xfe": 1}'),
    "a header that is nested deeply": raw(DEEP.encode()),
    "a name that occurs twice": raw(b'{"a": 1, "a": 1}'),
    "offsets that overlap": entry(data_offsets=[4, 132]),
    "offsets past the end": entry(data_offsets=[2**40, 2**40 + 128]),
    "negative offsets": entry(data_offsets=[-128, 0]),
    "a shape whose size overflows": entry(shape=[2**40, 2**40]),
    "a shape that is nested": entry(shape=[[32]]),
    "a dtype that is a list": entry(dtype=["F32"]),
    "a gap": header(lambda entries: entries.pop("model.norm.weight")),
    "an index in deep JSON": text("model.safetensors.index.json", DEEP),
    "an index in bad UTF-8": text("model.safetensors.index.json", b'{"weight_map": "\xff"}'),
    "a pipe": special(os.mkfifo),
    "a pipe behind a link": special(fifo_behind_a_link),
    "a device": special(lambda place: place.symlink_to("/dev/zero")),
    "a directory": special(Path.mkdir),
    "10^12 layers": config(num_hidden_layers=10**12),
    "more layers than tensors": config(num_hidden_layers=9),
    "fewer layers than tensors": config(num_hidden_layers=7),
    "a depth that is not a number": config(num_hidden_layers="many"),
    "a config in deep JSON": text("config.json", DEEP),
    "a config in bad UTF-8": text("config.json", b'{"model_type": "\xff"}'),
    "a config that is a list": text("config.json", "[]"),
    "a layer that is missing": without_layer,
    "a tokenizer config in deep JSON": text("tokenizer_config.json", DEEP),
}
"""The ways to spoil a checkpoint."""


@pytest.mark.parametrize("name", HOSTILE)
def test_checkpoints(name: str, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """Both engines report the same error, and leave no file."""
    HOSTILE[name](own_tiny)
    before = sorted(os.listdir(tmp_path))
    errors = set()
    for engine in ("mergekit", "stream"):
        started = time.monotonic()
        words = ("run", "interleave: every 4", tmp_path / "out", "--model", own_tiny)
        result = mk(*words, "--engine", engine)
        assert (result.status, result.err.count("error: ")) == (1, 1), result.err
        assert "unexpected" not in result.err
        assert len(result.err) < 1200
        assert time.monotonic() - started < 20
        errors.add(result.err)
    assert len(errors) == 1
    assert sorted(os.listdir(tmp_path)) == before


LETTERS = "abcdefghijklmnopqrstuvwx"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise(LETTERS)
)
CARDS = {
    "no front matter": "# Tiny",
    "unterminated front matter": "---\nlicense: mit\n",
    "not YAML": "---\n{[\n---\n",
    "a list": "---\n- 1\n---\n",
    "a bomb": f"---\n{BOMB}license: *x\n---\n",
    "an object": "---\nlicense: !!python/object/apply:os.mkdir [trap]\n---\n",
    "values of other types": "---\nlicense: {a: 1}\nlanguage: [1, [2]]\nlicense_name: 5\n---\n",
    "deep": f"---\nlicense: {'[' * 3000}{']' * 3000}\n---\n",
    "long": "---\nlicense: mit\n" + "x: y\n" * 10**6 + "---\n",
    "bytes": b"---\n\xff\xfe\n---\n",
}
"""The README.md files of a base."""


@pytest.mark.parametrize("name", CARDS)
def test_cards(
    name: str, mk: Cli, own_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that cannot be read is at most a warning, and nothing in it is executed."""
    monkeypatch.chdir(tmp_path)
    text("README.md", CARDS[name])(own_tiny)
    words = ("run", "append: 1", tmp_path / "out", "--model", own_tiny, "--engine", "stream")
    started = time.monotonic()
    result = mk(*words)
    assert result.status == 0
    unread = [
        line
        for line in result.err.splitlines()
        if line.startswith(f"warning: {own_tiny}/README.md: ")
    ]
    assert result.err.splitlines() == unread
    assert len(unread) == (name in ("not YAML", "a bomb", "an object", "deep", "bytes"))
    assert time.monotonic() - started < 10
    assert (tmp_path / "out/README.md").stat().st_size < 20_000
    assert "license: mit" not in (tmp_path / "out/README.md").read_text()
    assert sorted(os.listdir(tmp_path)) == ["out", "own"]


DIRECTIVES = [
    "interleave: !!python/object/apply:os.mkdir [trap]",
    "!!python/object/new:os.mkdir [trap]",
    f"append: {'[' * 5000}",
    "append: " + "9" * 5000,
    "repeat: {layers: [0, 8], times: 1000000000000}",
    "interleave: every 1\nmodel: &a [*a]",
    "interleave: every \ud800",
    "stack: [[0, 99999999999999999999]]",
]


@pytest.mark.parametrize("words", DIRECTIVES)
def test_directives(words: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A malicious directive is one error, and nothing in it is executed."""
    started = time.monotonic()
    result = mk("run", "-", "out", "--model", tiny, cwd=tmp_path, stdin=words)
    assert result.status in (1, 2)
    assert result.err.count("error: ") == 1
    assert "unexpected" not in result.err
    assert time.monotonic() - started < 5
    assert not os.listdir(tmp_path)


def test_links_are_followed_once(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """The targets of links are copied, not the links, because the Hub's cache has links."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(own_tiny.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    for engine in ("stream", "mergekit"):
        out = tmp_path / engine
        words = ("run", "append: 1", out, "--model", own_tiny, "--engine", engine)
        assert mk(*words).status == 0
        assert not [file for file in out.rglob("*") if file.is_symlink()]
        assert mk("verify", out, "--against", own_tiny).status == 0


@pytest.mark.parametrize("engine", ["stream", "mergekit"])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_kernels_from_elsewhere(
    key: str, engine: str, mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """A config key that makes transformers download and run code is kept, and not followed."""
    set_keys(own_tiny / "config.json", **{key: "somebody/kernel"})
    result = mk("run", "append: 1", tmp_path / "out", "--model", own_tiny, "--engine", engine)
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == "somebody/kernel"
