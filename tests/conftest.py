"""Tiny checkpoints, made by transformers and pushed through the real pipeline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from mergekit_interleave import cli

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Mark a test that tries so many examples; `make faults` tries more."""

    def marked(test: Any) -> Any:
        times = int(os.environ.get("MK_INTERLEAVE_FUZZ", "1"))
        return pytest.mark.fuzz(settings(max_examples=examples * times)(test))

    return marked


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network must fail


STREAM_HINT = "hint: --engine stream writes the same tensors, faster and in constant memory\n"
"""The last line of a run that mergekit did and the stream engine could have done."""


@dataclass(frozen=True)
class Result:
    """What a command said."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def mk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in this process; a directory and text for standard input are options."""

    def run(*args: object, cwd: Path | None = None, stdin: str = "") -> Result:
        import io

        with monkeypatch.context() as patch:
            if cwd is not None:
                patch.chdir(cwd)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with pytest.raises(SystemExit) as exit_info:
                cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    monkeypatch.delenv("MK_INTERLEAVE_MODEL", raising=False)
    return run


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A shell in which this environment's commands are on the path."""

    def run(
        command: str, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=cwd,
            env={**os.environ, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def make_llama(path: Path, *, layers: int = 8, shard_size: str = "1GB", **config: Any) -> Path:
    """A Llama with random weights, biases and gains, its tokenizer and a card."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **config,
    }
    model_class, config_class = LlamaForCausalLM, LlamaConfig
    if settings.pop("mistral", False):
        from transformers import MistralConfig, MistralForCausalLM

        model_class, config_class = MistralForCausalLM, MistralConfig
    disable_progress_bar()
    torch.manual_seed(sum(path.name.encode()))
    model = model_class(config_class(num_hidden_layers=layers, **settings)).to(
        settings.get("dtype", torch.float32)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.2, 0.5)  # gains and biases away from ones and zeros
    model.save_pretrained(path, max_shard_size=shard_size)
    _tokenizer().save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Tiny\n")
    (path / "LICENSE").write_text("MIT")
    return path


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-layer Llama in one shard; read it, do not change it."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny` that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "own"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of 4 layers in several bfloat16 shards, embeddings tied."""
    import torch

    path = tmp_path_factory.mktemp("models") / "sharded"
    return make_llama(
        path,
        layers=4,
        shard_size="40KB",
        mistral=True,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def emulate_sharing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let any filesystem share blocks, by copying them; returns the lengths as they come.

    As strict as a real one: whole blocks, inside the source.
    """
    from mergekit_interleave.engines import moving

    lengths: list[int] = []

    def ioctl(target: int, request: int, what: bytes) -> int:
        assert request == moving.FICLONERANGE
        source, start, length, at = struct.unpack("@qQQQ", what)
        if start % 4096 or length % 4096 or at % 4096 or not length:
            raise OSError(errno.EINVAL, "not whole blocks")
        data = os.pread(source, length, start)
        if len(data) < length:
            raise OSError(errno.EINVAL, "beyond the end")
        os.pwrite(target, data, at)
        lengths.append(length)
        return 0

    monkeypatch.setattr(moving.fcntl, "ioctl", ioctl)
    return lengths


def load_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a directory, by the safetensors library."""
    from safetensors.torch import load_file

    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, dtypes and values are the same; a negative zero is a zero."""
    import torch

    ours, theirs = load_tensors(one), load_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
