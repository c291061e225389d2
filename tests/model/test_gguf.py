"""GGUF files through the whole pipeline: written, verified, explained, replaced, killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf_files import TYPES, library, make_gguf
from harness import emulate_sharing

import mergekit_interleave as api
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines import stream
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    OutputError,
    RefusedError,
)
from mergekit_interleave.gguf import header, values
from mergekit_interleave.gguf.model import GgufModel, open_model
from mergekit_interleave.output import gguf_card, gguf_record, gguf_staging

DIRECTIVE = "interleave: every 2"

_KILLED = """
import os, signal, sys
from pathlib import Path
import mergekit_interleave as api
step, base, place, splits = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
counts = [0]
def counted(name):
    original = getattr(Path, name)
    def call(self, *arguments, **keywords):
        # Only what is done beside OUT or in the directories there.
        if place in self.parents and self.suffix in (".gguf", ".md", ".moved", ""):
            if counts[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            counts[0] += 1
        return original(self, *arguments, **keywords)
    setattr(Path, name, call)
for name in ("rename", "touch", "unlink", "rmdir"):
    counted(name)
size = {"out_shard_size": 30_000} if splits else {}
api.run("append: 1", place / "out.gguf", model=base, force=True, **size)
"""
"""A run that replaces a model, and kills itself at a step of the replacement."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 4 layers, which no test may change."""
    return make_gguf(tmp_path_factory.mktemp("toy") / "toy.gguf", kind="Q8_0")


def opened(path: Path) -> GgufModel:
    """Open a model."""
    return open_model(ModelRef(ModelPath(str(path))))


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return the type and the bytes of each tensor, as gguf-py reads them."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


class TestRun:
    """What `run` writes."""

    def test_every_byte(self, toy: Path, tmp_path: Path) -> None:
        """Copies equal their originals and zeroed tensors are zeros, as gguf-py reads them."""
        report = api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        base, grown = tensors(toy), tensors(tmp_path / "out.gguf")
        sources = [0, 1, 1, 2, 3, 3]
        assert len(grown) == 3 + 6 * 9
        for name, (kind, data) in grown.items():
            _, _, rest = name.partition(".")
            layer, _, part = rest.partition(".")
            source = f"blk.{sources[int(layer)]}.{part}" if name.startswith("blk.") else name
            zeroed = layer in ("2", "5") and part in ("attn_output.weight", "ffn_down.weight")
            assert kind == base[source][0]
            assert data == (bytes(len(data)) if zeroed else base[source][1]), name
        assert report.out == tmp_path / "out.gguf"
        assert report.as_dict()["engine"] == "stream"
        assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.md"]

    def test_its_record(self, toy: Path, tmp_path: Path) -> None:
        """The metadata records the layers, the directive and the verification."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        content = gguf_record.read(opened(tmp_path / "out.gguf"))
        assert content
        assert content["directive"] == {"model": "toy.gguf", "interleave": "every 2"}
        assert [entry["layer"] for entry in content["layers"]] == [0, 1, 1, 2, 3, 3]
        assert content["identities"] == [2, 5]
        assert content["equal"] is True
        assert content["verified"]["weights"]["exact"] is True
        assert content["verified"]["weights"]["against"] == ["toy.gguf"]
        assert str(toy.parent) not in Path(tmp_path / "out.gguf").read_bytes().decode("latin-1")

    def test_without_verification(self, toy: Path, tmp_path: Path) -> None:
        """Without verification, none is recorded."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, verify=False)
        content = gguf_record.read(opened(tmp_path / "out.gguf"))
        assert content
        assert "verified" not in content
        assert "not verified" in (tmp_path / "out.md").read_text()

    @pytest.mark.parametrize(
        "directive",
        ["repeat: [1, 3]", "append: 2", "drop: [1, 2]", "stack: [[0, 3], [1, 4]]",
         "windows: {size: 3, stride: 1}", "interleave: after [0, 2]",
         "repeat: {layers: [1, 3], times: 3, as: block}, zero: [attn_output, ffn_down]"],
    )  # fmt: skip
    def test_every_growth_line(self, directive: str, toy: Path, tmp_path: Path) -> None:
        """Each growth line is written, verified, explained and written again from that."""
        api.run(directive, tmp_path / "out.gguf", model=toy)
        assert api.verify(tmp_path / "out.gguf", against=toy).is_exact
        assert api.verify(tmp_path / "out.gguf").is_exact
        written = api.explain(tmp_path / "out.gguf").replace("toy.gguf", str(toy))
        api.run(written, tmp_path / "again.gguf")
        assert tensors(tmp_path / "again.gguf") == tensors(tmp_path / "out.gguf")

    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_scaled_floats(self, kind: str, tmp_path: Path) -> None:
        """Plain floats are scaled as torch scales them, rounded once."""
        import torch

        file = make_gguf(tmp_path / "base.gguf", kind=kind)
        api.run("repeat: [1, 2], scale: {attn_q: 1/3}", tmp_path / "out.gguf", model=file)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        base, grown = tensors(file), tensors(tmp_path / "out.gguf")

        def numbers(data: bytes) -> Any:
            return torch.frombuffer(bytearray(data), dtype=dtype)

        expected = numbers(base["blk.1.attn_q.weight"][1]) * (1 / 3)
        found = numbers(grown["blk.2.attn_q.weight"][1])
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert grown["blk.2.attn_k.weight"] == base["blk.1.attn_k.weight"]
        assert api.verify(tmp_path / "out.gguf", against=file).is_exact

    @pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
    def test_zeroing_in_every_type(self, kind: GGMLQuantizationType, tmp_path: Path) -> None:
        """A zeroed tensor of each type is decoded by gguf-py to exact zeros; others are not."""
        file = make_gguf(tmp_path / "base.gguf", kind=kind.name, hidden=256, layers=1)
        api.run("append: 1", tmp_path / "out.gguf", model=file)
        found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
        for name, zero in (("attn_output", True), ("ffn_down", True), ("attn_q", False)):
            tensor = found[f"blk.1.{name}.weight"]
            decoded = dequantize(tensor.data, tensor.tensor_type)
            assert decoded.shape == (256, 256)
            assert bool(np.any(decoded)) != zero

    def test_splits(self, toy: Path, tmp_path: Path) -> None:
        """Splits of the base are kept, a limit makes others, and llama.cpp's reader reads them."""
        make_gguf(tmp_path / "base.gguf", kind="Q8_0", split_tensors=15)
        first = tmp_path / "base-00001-of-00003.gguf"
        kept = api.run(DIRECTIVE, tmp_path / "kept.gguf", model=first)
        assert kept.out == tmp_path / "kept-00001-of-00003.gguf"
        cut = api.run(DIRECTIVE, tmp_path / "cut.gguf", model=first, out_shard_size=30_000)
        whole = api.run(DIRECTIVE, tmp_path / "whole.gguf", model=toy)
        bytes_of = {}
        for report in (kept, cut, whole):
            model = opened(report.out)
            assert api.verify(report.out, against=first if report is not whole else toy).is_exact
            found: dict[str, Any] = {}
            for file in model.files:
                assert library().gguf_init_from_file
                found |= tensors(file.path)
            bytes_of[report.out] = found
        assert len(opened(cut.out).files) > 3
        assert bytes_of[kept.out] == bytes_of[cut.out] == bytes_of[whole.out]

    def test_a_split_without_tensors_left(self, tmp_path: Path) -> None:
        """A split whose tensors are all dropped is left out."""
        make_gguf(tmp_path / "base.gguf", split_tensors=9)
        first = tmp_path / "base-00001-of-00005.gguf"
        report = api.run("drop: [1, 3]", tmp_path / "out.gguf", model=first)
        assert api.verify(report.out, against=first).is_exact
        assert len(opened(report.out).files) <= 4

    def test_shared_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where all sizes are multiples of the block size, everything but headers is shared."""
        file = make_gguf(tmp_path / "base.gguf", kind="F32", hidden=1024, layers=2)
        emulate_sharing(monkeypatch)
        report = api.run("repeat: [0, 2]", tmp_path / "out.gguf", model=file)
        traffic = report.outcome.traffic
        assert traffic.shared > 0.98 * (traffic.shared + traffic.written)
        assert api.verify(tmp_path / "out.gguf", against=file).is_exact

    def test_growing_again(self, toy: Path, tmp_path: Path) -> None:
        """A grown model can be grown; its record keeps the earlier growth."""
        api.run(DIRECTIVE, tmp_path / "one.gguf", model=toy)
        api.run("append: 1", tmp_path / "two.gguf", model=tmp_path / "one.gguf")
        content = gguf_record.read(opened(tmp_path / "two.gguf"))
        assert content
        assert len(content["growths"]) == 1
        assert api.verify(tmp_path / "two.gguf", against=tmp_path / "one.gguf").is_exact

    def test_several_models(self, toy: Path, tmp_path: Path) -> None:
        """Files of one architecture and quantization are stacked."""
        other = make_gguf(tmp_path / "other.gguf", kind="Q8_0", seed=5)
        directive = (
            f"layout: [{{model: {toy}, layers: [0, 3]}}, {{model: {other}, layers: [1, 4]}}]"
        )
        api.run(directive, tmp_path / "out.gguf")
        assert api.verify(tmp_path / "out.gguf", against=[toy, other]).is_exact
        assert not api.verify(tmp_path / "out.gguf", against=[other, toy]).is_exact
        with pytest.raises(RefusedError):
            api.verify(tmp_path / "out.gguf", against=toy)


class TestRefused:
    """What `run` refuses for GGUF files."""

    @pytest.mark.parametrize(
        "how",
        [{"engine": "mergekit"}, {"cuda": True}, {"legacy_config": True}, {"allow_pickle": True},
         {"mergekit": {"lazy_unpickle": True}}, {"trust_remote_code": True}],
        ids=str,
    )  # fmt: skip
    def test_options_without_effect(self, how: dict[str, Any], toy: Path, tmp_path: Path) -> None:
        """Options that would be ignored are refused."""
        with pytest.raises(RefusedError):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, **how)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("name", ["out", "out.bin", "out-00001-of-00002.gguf"])
    def test_names_of_out(self, name: str, toy: Path, tmp_path: Path) -> None:
        """OUT must be the name of a GGUF file, and not that of a split."""
        with pytest.raises(OutputError):
            api.run(DIRECTIVE, tmp_path / name, model=toy)
        assert not os.listdir(tmp_path)

    def test_a_directory_to_a_file(self, tiny: Path, tmp_path: Path) -> None:
        """A model directory is not written to a GGUF file."""
        with pytest.raises(RefusedError) as raised:
            api.run("append: 1", tmp_path / "out.gguf", model=tiny)
        assert "convert_hf_to_gguf" in (raised.value.hint or "")

    def test_other_commands(self, toy: Path) -> None:
        """Commands that need a model directory refuse a GGUF file."""
        with pytest.raises(RefusedError, match="GGUF"):
            api.gen(DIRECTIVE, model=toy)
        with pytest.raises(InterleaveError):
            api.load(DIRECTIVE, model=toy)
        with pytest.raises(InterleaveError):
            api.train(toy, trainer="peft")

    def test_a_full_disk(self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Too little room is refused before anything is written."""
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OutputError, match="space"):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        assert not os.listdir(tmp_path)

    def test_a_source_that_changes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A source that changes while it is copied is an error, and nothing is at OUT."""
        file = make_gguf(tmp_path / "base.gguf")
        write = stream.write_files

        def changed(*arguments: Any) -> Any:
            os.utime(file, (1, 1))
            return write(*arguments)

        monkeypatch.setattr(stream, "write_files", changed)
        with pytest.raises(CheckpointError, match="changed"):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=file)
        assert os.listdir(tmp_path) == ["base.gguf"]

    def test_a_wrong_copy(self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A byte that is not copied right is found, and nothing is at OUT."""
        from mergekit_interleave.engines.copy_range import Pair

        copy = Pair.copy

        def wrong(self: Pair, start: int, at: int, length: int, **how: Any) -> None:
            copy(self, start, at, length, **how)
            self.put(b"\xaa", at + length // 2)

        monkeypatch.setattr(Pair, "copy", wrong)
        with pytest.raises(OutputError, match="wrong"):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        assert not os.listdir(tmp_path)


class TestVerify:
    """What `verify` finds."""

    @pytest.fixture
    def grown(self, toy: Path, tmp_path: Path) -> Path:
        """Return a grown model that the test may change."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        return tmp_path / "out.gguf"

    @pytest.mark.parametrize(
        "name",
        ["blk.0.attn_q.weight", "blk.2.attn_k.weight", "blk.5.ffn_down.weight", "output.weight"],
    )
    def test_a_changed_byte(self, name: str, grown: Path, toy: Path) -> None:
        """One changed byte of any tensor is found and named."""
        tensor = opened(grown).tensors[name]
        with grown.open("r+b") as file:
            file.seek(tensor.start + 20)
            byte = file.read(1)[0]
            file.seek(tensor.start + 20)
            file.write(bytes([byte ^ 1]))
        report = api.verify(grown, against=toy)
        assert [difference.tensor for difference in report.differences] == [name]
        with pytest.raises(RefusedError):
            report.check()
        alone = {d.tensor for d in api.verify(grown).differences}
        expected = set() if name in ("output.weight", "blk.0.attn_q.weight") else {name}
        assert alone == expected

    def test_changed_metadata(self, grown: Path, toy: Path) -> None:
        """A changed key is found and named."""
        data = grown.read_bytes()
        assert data.count(b"<unk>") == 1
        grown.write_bytes(data.replace(b"<unk>", b"<UNK>"))
        report = api.verify(grown, against=toy)
        assert [str(d) for d in report.differences if "tokenizer.ggml.tokens" in str(d)]
        assert not report.is_exact
        assert report.as_dict()["exact"] is False

    def test_another_base(self, grown: Path, tmp_path: Path) -> None:
        """A base with other weights, or of another depth, is not the base."""
        other = make_gguf(tmp_path / "other.gguf", kind="Q8_0", seed=3)
        assert not api.verify(grown, against=other).is_exact
        deeper = make_gguf(tmp_path / "deeper.gguf", kind="Q8_0", layers=5)
        with pytest.raises(RefusedError, match="5 layers"):
            api.verify(grown, against=deeper)

    def test_a_directory_as_base(self, grown: Path, tiny: Path) -> None:
        """A directory is not compared with a GGUF file."""
        with pytest.raises(RefusedError, match="GGUF"):
            api.verify(grown, against=tiny)

    def test_a_model_without_a_record(self, toy: Path, tmp_path: Path) -> None:
        """A model that was not grown has no layers to check; a directive can state them."""
        with pytest.raises(CheckpointError):
            api.verify(toy)
        recipe = tmp_path / "recipe.yml"
        recipe.write_text("interleave: every 2")
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        assert api.verify(tmp_path / "out.gguf", against=toy, recipe=recipe).is_exact
        recipe.write_text("append: 2")
        assert not api.verify(tmp_path / "out.gguf", against=toy, recipe=recipe).is_exact
        with pytest.raises(DirectiveError):
            api.verify(tmp_path / "out.gguf", recipe=recipe)

    @pytest.mark.parametrize(
        "how", [{"trained": True}, {"max_memory": "1GB"}, {"allow_pickle": True}], ids=str
    )
    def test_options_without_effect(self, how: dict[str, Any], grown: Path, toy: Path) -> None:
        """Options that would be ignored are refused."""
        with pytest.raises((RefusedError, DirectiveError)):
            api.verify(grown, against=toy, **how)

    @pytest.mark.parametrize("text", ["5", '"x"', "[]", "{}", "null", "[5]", "-1", "{", "[[0]]"])
    def test_a_hostile_record(self, text: str, grown: Path, toy: Path) -> None:
        """Whatever JSON a key of the record holds, no command ends in another error than ours."""
        found, data = header.read(grown), grown.read_bytes()
        entries = [header.Entry(n, t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()]
        keys = [key for key in found.metadata if key.startswith("interleave.")]
        assert len(keys) > 10
        for key in keys:
            metadata = {**found.metadata, key: values.text(text)}
            grown.write_bytes(header.encode(metadata, entries, 3) + data[found.start :])
            for call in (
                lambda: api.verify(grown, against=toy),
                lambda: api.verify(grown),
                lambda: api.explain(grown),
                lambda: api.card(grown, force=True),
                lambda: api.plan("append: 1", model=grown),
            ):
                with suppress(InterleaveError):
                    call()

    @pytest.mark.parametrize("key", ["interleave.layers", "interleave.fingerprint"])
    def test_a_malformed_record(self, key: str, grown: Path) -> None:
        """A record that was changed is refused."""
        data = bytearray(grown.read_bytes())
        at = data.index(key.encode()) + len(key) + 4 + 8 + 3
        data[at] ^= 3
        grown.write_bytes(data)
        with pytest.raises(CheckpointError):
            api.verify(grown)
        with pytest.raises(CheckpointError):
            api.explain(grown)


class TestOut:
    """What is at OUT, and what is replaced."""

    def test_it_is_replaced_only_by_force(self, toy: Path, tmp_path: Path) -> None:
        """An existing model is replaced with `force`, whatever its splits were."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, out_shard_size=40_000)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(OutputError, match="exists"):
            api.run("append: 1", tmp_path / "out.gguf", model=toy)
        assert sorted(os.listdir(tmp_path)) == before
        api.run("append: 1", tmp_path / "out.gguf", model=toy, force=True)
        assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.md"]
        assert opened(tmp_path / "out.gguf").depth == 5

    def test_other_files_are_not_replaced(self, toy: Path, tmp_path: Path) -> None:
        """A file that no run wrote, or that was changed since, is not replaced."""
        shutil.copy(toy, tmp_path / "out.gguf")
        with pytest.raises(OutputError, match="wrote"):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, force=True)
        (tmp_path / "out.gguf").write_text("text")
        with pytest.raises(OutputError):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, force=True)
        (tmp_path / "out.gguf").unlink()
        (tmp_path / "out.md").write_text("my notes")
        with pytest.raises(OutputError, match=r"out\.md"):
            api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, force=True)
        assert (tmp_path / "out.md").read_text() == "my notes"

    @pytest.mark.parametrize("what", ["weights", "metadata"])
    def test_a_changed_model_is_not_replaced(self, what: str, toy: Path, tmp_path: Path) -> None:
        """A model whose weights or metadata were changed since is not replaced."""
        out = tmp_path / "out.gguf"
        api.run(DIRECTIVE, out, model=toy)
        data = bytearray(out.read_bytes())
        if what == "weights":
            model = opened(out)
            for name in model.layer_tensors(2):
                tensor = model.tensors[name]
                data[tensor.start : tensor.start + tensor.nbytes] = b"\x11" * tensor.nbytes
        else:
            at = data.index(b"<unk>")
            data[at : at + 5] = b"<UNK>"
        out.write_bytes(data)
        with pytest.raises(OutputError, match="changed"):
            api.run("append: 1", out, model=toy, force=True)
        assert out.read_bytes() == data

    def test_the_base_is_not_replaced(self, toy: Path, tmp_path: Path) -> None:
        """OUT must not be a source."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        with pytest.raises(OutputError, match="source"):
            api.run("append: 1", tmp_path / "out.gguf", model=tmp_path / "out.gguf", force=True)

    def test_an_interrupt(self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an interrupt nothing is left."""

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(stream, "write_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.run(DIRECTIVE, tmp_path / "deep" / "out.gguf", model=toy)
        assert not os.listdir(tmp_path)

    def test_a_failure_while_files_are_placed(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a file cannot be renamed, the old model is at OUT again, and nothing else."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, out_shard_size=40_000)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self.parent.name.endswith(".mk-interleave") and "-00002-of" in self.name:
                raise OSError(5, "broken")
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            with pytest.raises(OutputError):
                api.run(
                    "append: 1", tmp_path / "out.gguf", model=toy, force=True, out_shard_size=30_000
                )
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("splits", [True, False])
    def test_a_run_that_is_killed_at_any_rename(
        self, splits: bool, toy: Path, tmp_path: Path
    ) -> None:
        """Killed at any step of a replacement, a model is whole after the next run, old or new.

        That run is refused, so that what it leaves is what it restored.
        """
        size = {"out_shard_size": 20_000} if splits else {}
        api.run(DIRECTIVE, tmp_path / "base.gguf", model=toy, **size)
        old = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
        seen = set()
        for step in range(100):
            place = tmp_path / f"{step}"
            place.mkdir()
            for name, data in old.items():
                (place / name.replace("base", "out")).write_bytes(data)
            done = subprocess.run(
                [sys.executable, "-c", _KILLED, str(step), str(toy), str(place), str(int(splits))],
                check=False,
            )
            with pytest.raises(OutputError, match="exists"):
                # A limit that makes no file of the name that is there; the run is refused anyway.
                api.run(DIRECTIVE, place / "out.gguf", model=toy)
            (first,) = gguf_staging.firsts(place / "out.gguf")
            depth = opened(first).depth
            assert api.verify(first, against=toy).is_exact
            seen.add((done.returncode, depth))
            hidden = [name for name in os.listdir(place) if name.startswith(".")]
            if done.returncode == 0:
                assert not hidden
                break
            # What the refused run has not touched, the next one clears.
            api.run("append: 3", place / "out.gguf", model=toy, force=True)
            assert sorted(os.listdir(place)) == ["out.gguf", "out.md"]
        assert (-9, 6) in seen
        assert (0, 5) in seen

    def test_splits_without_a_first_one(self, toy: Path, tmp_path: Path) -> None:
        """What a killed run has placed without the first split is removed by the next run.

        Without the directory of a killed run beside them, they are somebody's own.
        """
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, out_shard_size=40_000)
        first, *others = sorted(tmp_path.glob("*.gguf"))
        first.unlink()
        (tmp_path / "out.md").unlink()
        for force in (False, True):
            with pytest.raises(OutputError, match="first split"):
                api.run("append: 1", tmp_path / "out.gguf", model=toy, force=force)
        assert sorted(tmp_path.iterdir()) == others
        (tmp_path / ".out.gguf.mk-interleave").mkdir()
        api.run("append: 1", tmp_path / "out.gguf", model=toy)
        assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.md"]

    def test_a_killed_run(self, tmp_path: Path) -> None:
        """After kill -9 at any time, OUT is whole or absent, and the next run succeeds."""
        file = make_gguf(tmp_path / "base.gguf", kind="F32", hidden=512, layers=8)
        code = (
            "import mergekit_interleave as api\n"
            f"api.run('repeat: [0, 8]', {str(tmp_path / 'out.gguf')!r}, model={str(file)!r}, "
            "out_shard_size=10_000_000)\n"
        )
        for attempt in range(6):
            process = subprocess.Popen([sys.executable, "-c", code])
            time.sleep(0.35 + 0.05 * attempt)
            process.send_signal(signal.SIGKILL)
            process.wait()
            for first in gguf_staging.firsts(tmp_path / "out.gguf"):
                assert api.verify(first, against=file).is_exact
                for split in tmp_path.glob("out*"):
                    split.unlink()
        report = api.run("repeat: [0, 8]", tmp_path / "out.gguf", model=file)
        assert api.verify(report.out, against=file).is_exact
        assert sorted(os.listdir(tmp_path)) == ["base.gguf", "out.gguf", "out.md"]


class TestCard:
    """The card beside a model."""

    def test_it_is_written_again(self, toy: Path, tmp_path: Path) -> None:
        """`card` writes it again, with Hub ids; an edited card needs `force`."""
        api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        page = tmp_path / "out.md"
        text = page.read_text()
        assert gguf_card.is_generated(page)
        assert "F16" in text  # what the metadata states, though it is a toy
        assert "`toy.gguf`" in text
        assert "license: mit" in text
        report = api.card(tmp_path / "out.gguf", repo="me/deeper", base_model="org/toy")
        assert report.files == ("out.md",)
        assert report.base_models == ("org/toy",)
        assert "base_model: org/toy" in page.read_text()
        assert "# deeper" in page.read_text()
        page.write_text(page.read_text().replace("deeper", "my model"))
        assert not gguf_card.is_generated(page)
        with pytest.raises(OutputError, match="edited"):
            api.card(tmp_path / "out.gguf")
        api.card(tmp_path / "out.gguf", force=True)
        assert page.read_text() == text

    def test_of_splits(self, toy: Path, tmp_path: Path) -> None:
        """The card of splits has the name without their numbers."""
        report = api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy, out_shard_size=40_000)
        (tmp_path / "out.md").unlink()
        api.card(report.out)
        assert report.out.name in (tmp_path / "out.md").read_text()

    def test_what_was_not_grown(self, toy: Path) -> None:
        """A model that was not grown has no card."""
        with pytest.raises(CheckpointError):
            api.card(toy)


class TestPlan:
    """What `plan` says."""

    def test_it_is_what_run_writes(self, toy: Path, tmp_path: Path) -> None:
        """The forecast is what `run` writes."""
        plan = api.plan(DIRECTIVE, model=toy)
        report = api.run(DIRECTIVE, tmp_path / "out.gguf", model=toy)
        assert plan.fingerprint == report.fingerprint
        assert plan.parameters
        assert plan.parameters.after == report.parameters
        assert plan.writing
        assert plan.writing.nbytes == report.written.nbytes
        assert plan.config
        assert plan.config["llama.block_count"] == (4, 6)
        assert "GGUF" in plan.writing.why
