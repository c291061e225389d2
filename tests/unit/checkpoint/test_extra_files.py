"""The files of a base other than its weights and its config."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mergekit_interleave.checkpoint import extra_files
from mergekit_interleave.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, Warn


def opened(path: Path) -> Checkpoint:
    """Open the checkpoint of a directory."""
    return open_checkpoint(ModelRef(ModelPath(str(path))))


def carried(path: Path, warn: Warn = print) -> dict[str, bytes]:
    """Return the files that a copy of the model would contain."""
    base = opened(path)
    files = extra_files.collect(base, warn=warn)
    read = {name: extra_files.read(name, file, base, warn) for name, file in files}
    return {name: content for name, content in read.items() if content is not None}


class TestCollect:
    """Tests of which files are copied."""

    def test_small_files_but_no_weights_and_no_card(self, tmp_path: Path) -> None:
        """Tokenizer, template, license, code and module folders are copied; nothing else is."""
        wanted = [
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
            "LICENSE",
            "modeling_custom.py",
            "generation_config.json",
            ".gitattributes",
            "extra/templates/tool.jinja",
            "1_Pooling/config.json",
            "1_Pooling/README.md",
        ]
        left = [
            "config.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "model.gguf",
            "consolidated.00.pth",
            "params.json",
            "onnx/model.onnx",
            "original/params.json",
            ".git/HEAD",
            "interleave.yml",
            "trainer_state.json",
            ".cache/huggingface/x",
            "checkpoint/optimizer.pt",
            "checkpoint-500/config.json",
            "checkpoint-500/model.safetensors",
            "checkpoint-500/trainer_state.json",
            ".out.mk-interleave/tokenizer.json",
            ".out.replaced/tokenizer.json",
        ]
        for name in wanted + left:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "loop").symlink_to(tmp_path)
        assert sorted(carried(tmp_path)) == sorted(wanted)

    def test_links_to_files_are_followed(self, tmp_path: Path) -> None:
        """Links to files are followed, because the Hub cache consists of links."""
        (tmp_path / "blob").write_text("{}")
        model = tmp_path / "model"
        model.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (model / name).symlink_to("../blob")
        assert list(carried(model)) == ["tokenizer.json"]

    def test_a_file_that_is_too_large(self, tmp_path: Path) -> None:
        """A large file is not copied, and a warning names it."""
        (tmp_path / "config.json").write_text("{}")
        with (tmp_path / "data.zip").open("wb") as file:
            file.truncate(2**30)
        warnings: list[str] = []
        assert carried(tmp_path, warnings.append) == {}
        (warning,) = warnings
        assert "data.zip" in warning

    def test_names_can_be_left_out(self, tmp_path: Path) -> None:
        """The tokenizer's files can be excluded, for a model with another tokenizer."""
        for name in ("config.json", "tokenizer.json", "LICENSE"):
            (tmp_path / name).write_text("{}")
        base = opened(tmp_path)
        left = extra_files.collect(base, without=extra_files.TOKENIZER_FILES, warn=print)
        assert [name for name, _ in left] == ["LICENSE"]


class TestRead:
    """A copied file must not contain a path of this machine."""

    def test_the_path_that_a_tokenizer_was_loaded_from(self, tmp_path: Path) -> None:
        """A local path in tokenizer_config.json is removed, and a Hub id is kept."""
        (tmp_path / "config.json").write_text("{}")
        for name in ("/home/me/model", "org/name", ""):
            content = {"name_or_path": name, "unk_token": "é"}
            more = {"tokenizer_file": "/home/me/model/tokenizer.json"}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(content | more))
            kept = json.loads(carried(tmp_path)["tokenizer_config.json"])
            assert kept == (content if name != "/home/me/model" else {"unk_token": "é"})

    def test_a_config_that_names_its_model(self, tmp_path: Path) -> None:
        """A mergekit config that names the model's path is not copied, and a warning names it."""
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "cfg.yml").write_text(f"slices: [{tmp_path}]")
        warnings: list[str] = []
        assert carried(tmp_path, warnings.append) == {}
        (warning,) = warnings
        assert "cfg.yml" in warning

    def test_a_path_beside_the_base(self, tmp_path: Path) -> None:
        """A path that only begins like the base's path is kept, and code is always copied."""
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "NOTICE").write_text(f"see {tmp_path}2/x")
        (tmp_path / "modeling_x.py").write_text(f"# {tmp_path}")
        assert set(carried(tmp_path)) == {"NOTICE", "modeling_x.py"}

    def test_other_files_are_copied_to_the_byte(self, tmp_path: Path) -> None:
        """All other files are copied byte for byte."""
        (tmp_path / "config.json").write_text("{}")
        contents = {"a.json": b'{"x":1}', "b.json": b'{"name_or_path', "c": bytes(range(256))}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        assert carried(tmp_path) == contents

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        """If a file cannot be read, the error names that file."""
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"\bgone: No such file"):
            extra_files.read("gone", tmp_path / "gone", opened(tmp_path), print)
