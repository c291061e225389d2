"""Messages about small mistakes on the command line, and what is printed with `--json`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import zoo
from harness import Cli, set_keys


@pytest.fixture
def out(mk: Cli, tiny: Path, tmp_path: Path) -> Path:
    """Expand the tiny model; a test may damage the result."""
    out = tmp_path / "out"
    assert mk("run", "append: 1", out, "--model", tiny, "--engine", "stream").status == 0
    return out


@pytest.mark.parametrize(("typed", "meant"), [("copie", "copies"), ("frist", "first")])
def test_apply_to_with_a_typo(typed: str, meant: str, mk: Cli, tiny: Path) -> None:
    """A misspelled value of `--apply-to` gives a hint with the nearest valid value."""
    result = mk("gen", "--every", "4", "--scale", "q_proj=0.5", "--apply-to", typed, cwd=tiny)
    assert result.status == 2
    assert re.search(r"^error: .*apply[-_]to", result.err), result.err
    assert f"hint: did you mean {meant}?" in result.err
    assert all(word in result.err for word in ("copies", "first", "last", "all"))


@pytest.mark.parametrize("words", [(), ("--model", "MODEL"), ("--model", "MODEL", "--every", "4")])
def test_gen_of_a_model_card(words: tuple[str, ...], mk: Cli, tiny: Path) -> None:
    """A text file that is no directive is named, and the flags are not blamed."""
    given = [tiny if word == "MODEL" else word for word in words]
    result = mk("gen", tiny / "README.md", *given)
    assert (result.status, result.err.count("error:")) == (2, 1)
    assert f"error: {tiny / 'README.md'}: " in result.err
    assert "flags" not in result.err
    assert "license" not in result.err


def test_gen_of_a_stream_with_flags(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Flags with several documents are refused, and the file is named."""
    stream = tmp_path / "stream.yml"
    stream.write_text(f"model: {tiny}\nappend: 1\n---\nmodel: {tiny}\nappend: 2\n")
    result = mk("gen", stream, "--every", "4")
    assert (result.status, str(stream) in result.err, "flags" in result.err) == (2, True, True)


def test_an_unknown_device(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A wrong `--device` is named, with valid values in the hint, and nothing is written."""
    result = mk("run", "append: 1", tmp_path / "out", "--model", tiny, "--device", "gpu7")
    assert (result.status, result.err.count("error:")) == (2, 1)
    assert "--device" in result.err
    assert "--mergekit" not in result.err
    assert "cuda" in result.err
    assert os.listdir(tmp_path) == []


def test_out_beside_the_source(mk: Cli, own_tiny: Path) -> None:
    """A directory whose name only starts like the source's is accepted."""
    out = own_tiny.with_name(f"{own_tiny.name}-deeper")
    assert mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream").status == 0


class TestJson:
    """With `--json`, the report contains warnings and notes, and standard error is empty."""

    @pytest.mark.parametrize("words", [("train", "--for", "peft"), ("card",)])
    def test_notes_are_printed_once(self, words: tuple[str, ...], mk: Cli, out: Path) -> None:
        """A note is in the JSON or on standard error, never in both."""
        command, *options = words
        as_text = mk(command, out, *options)
        assert as_text.err.count("note: ") == 1
        as_json = mk(command, out, *options, "--json")
        (note,) = json.loads(as_json.out)["notes"]
        assert f"note: {note}\n" == as_text.err
        assert as_json.err == ""

    def test_warnings_are_printed_once(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A warning of `run --json` is in the JSON only."""
        recipe = mk("gen", "--append", "1", "--model", tiny).out
        (tmp_path / "recipe.yml").write_text(f"{recipe}\nunused_key: 1\n")
        words = ("run", tmp_path / "recipe.yml")
        as_text = mk(*words, tmp_path / "a", "--engine", "stream")
        assert "warning: unused_key" in as_text.err
        as_json = mk(*words, tmp_path / "b", "--engine", "stream", "--json")
        assert "unused_key" in json.loads(as_json.out)["warnings"][0]
        assert as_json.err == ""


class TestFailedPart:
    """After a failed `verify`, the card states which part of the model failed."""

    def checks(self, out: Path) -> str:
        """The section of the card about verification."""
        text = (out / "README.md").read_text()
        return text.partition("## Verification\n")[2].partition("\n## ")[0]

    def test_config(self, mk: Cli, tiny: Path, out: Path) -> None:
        """A fault only in config.json is not a fault of the weights."""
        set_keys(out / "config.json", num_hidden_layers=8)
        assert mk("verify", out, "--against", tiny).status == 1
        failed = [line for line in self.checks(out).splitlines() if "**failed**" in line]
        assert [line.startswith("- `config.json`: ") for line in failed] == [True]
        assert "- Weights: all tensors" in self.checks(out)
        verified = json.loads((out / "interleave.json").read_text())["verified"]["weights"]
        assert (verified["exact"], verified["failed"]) == (False, {"config.json": 1})
        assert "verification failed" in (out / "README.md").read_text()

    def test_weights_and_other_files(self, mk: Cli, tiny: Path, out: Path) -> None:
        """Each failed part has a line of its own, with its number of differences."""
        (out / "tokenizer.json").write_text("{}")
        (out / "tokenizer_config.json").write_text("{}")
        weights = (out / "model.safetensors").read_bytes()
        (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        assert mk("verify", out, "--against", tiny).status == 1
        assert "- Weights: **failed** with 1 " in self.checks(out)
        assert "- Other files: **failed** with 2 " in self.checks(out)


def test_max_memory_without_forward(mk: Cli, tiny: Path) -> None:
    """`--max-memory` is refused without `--forward`, which alone uses it."""
    result = mk("verify", tiny, "--max-memory", "5GB")
    assert result.status == 2
    assert "--max-memory" in result.err
    assert "hint: pass --forward" in result.err


def test_a_growth_flag_as_a_key(mk: Cli) -> None:
    """A growth flag that is no key gives a hint with the key."""
    result = mk("gen", "every: 5", "--model", "org/name", "--layers", "8")
    assert result.status == 2
    assert "`interleave: every N`" in result.err


@pytest.mark.parametrize("words", [("verify", "a", "b"), ("card", "a", "b"), ("schema", "x")])
def test_an_extra_argument_without_a_directive(mk: Cli, words: tuple[str, ...]) -> None:
    """A command that takes no directive gives no hint about quoting one."""
    result = mk(*words)
    assert result.status == 2
    assert result.err.splitlines()[-1] == f"hint: mk-interleave {words[0]} --help"


class TestFirstErrors:
    """The first error of a new user names the mistake."""

    @pytest.mark.parametrize("command", ["gen", "plan", "run"])
    def test_no_colon(self, command: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A directive without a colon is neither a file nor OUT."""
        result = mk(command, "interleave every 4", "--model", tiny, cwd=tmp_path)
        assert result.status == 2
        error, hint = result.err.splitlines()
        assert "'interleave every 4'" in error
        assert "'interleave: every 4'" in hint
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("interleave:every-4", "interleave: every 4"),
            ("append=2", "append: 2"),
            ("repeat:x", "interleave: every 4"),
            ("interleave:8-layers", "interleave: 8 layers"),
        ],
    )
    def test_the_hinted_directive_is_valid(
        self, text: str, right: str, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """The hint names a directive that works."""
        result = mk("plan", text, "--model", tiny, cwd=tmp_path)
        assert result.status == 2
        assert result.err.splitlines()[-1].endswith(f"'{right}'")
        assert mk("plan", right, "--model", tiny, cwd=tmp_path).status == 0

    def test_the_grandparent_of_a_type_with_lists(self, mk: Cli, tmp_path: Path) -> None:
        """The base of the base is named as such; its shorter lists of layers are not blamed."""
        base, one, two = (tmp_path / name for name in ("base", "one", "two"))
        zoo.save("qwen2", base)
        for source, target in ((base, one), (one, two)):
            words = ("run", "append: 1", target, "--model", source, "--engine", "stream")
            assert mk(*words).status == 0
        result = mk("verify", two, "--against", base)
        assert result.status == 1
        error, hint = result.err.splitlines()
        assert error.startswith(f"error: {two}: {base} ")
        assert "--trained" in hint
        assert mk("verify", two, "--against", base, "--trained").status == 0

    @pytest.mark.parametrize("config", [False, True])
    @pytest.mark.parametrize("weights", ["adapter_model.bin", "adapter_model.safetensors"])
    def test_an_adapter_as_the_model(
        self, weights: str, mk: Cli, tiny: Path, tmp_path: Path, *, config: bool
    ) -> None:
        """A PEFT adapter is called one, and the hint merges it into its base."""
        lora = tmp_path / "lora"
        lora.mkdir()
        (lora / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(tiny), "peft_type": "LORA"})
        )
        (lora / weights).write_text("x")
        if config:
            (lora / "config.json").write_bytes((tiny / "config.json").read_bytes())
        for words in (("plan", "append: 1"), ("run", "append: 1", tmp_path / "out")):
            result = mk(*words, "--model", lora)
            assert result.status == 1
            error, hint = result.err.splitlines()
            assert error.startswith(f"error: {lora}: ")
            assert "PEFT" in error
            assert f"--model {tiny}+{lora}" in hint

    @pytest.mark.parametrize("lora", ["missing", "org/missing", "tiny"])
    def test_a_lora_that_does_not_exist(
        self, lora: str, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """`plan` and `run` refuse a LoRA that does not exist or is no adapter."""
        (tmp_path / "tiny").symlink_to(tiny)
        words = ("--model", f"{tiny}+{lora}")
        for command in (("plan", "append: 1"), ("run", "append: 1", "out")):
            result = mk(*command, *words, cwd=tmp_path)
            assert result.status == 1
            assert result.err.startswith(f"error: {lora}: ")

    def test_a_layout_that_names_its_models(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The hint for a superfluous `--model` names the flag."""
        words = (f"layout: [{{model: {tiny}, layers: [[0, 8], [4, 8]]}}]", "--model", tiny)
        result = mk("run", words[0], tmp_path / "out", *words[1:])
        assert (result.status, "--model" in result.err.splitlines()[-1]) == (2, True)
        assert mk("plan", words[0]).status == 0
