"""Commands in README and docs run as written and print what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import typer
import zoo
from harness import Cli, book, make_llama

from mergekit_interleave.cli.app import application

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/guide.md",
    "docs/training.md",
    "docs/directive.md",
    "docs/cli.md",
    "docs/gguf.md",
)
OTHERS = (
    "docs/architectures.md",
    "docs/clients.md",
    "docs/evaluate.md",
    "docs/performance.md",
    "docs/placement.md",
    "docs/scan.md",
    "CONTRIBUTING.md",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARKS = ("<!-- needs a network -->", "<!-- needs a GPU -->")
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Block:
    """A fenced block of commands.

    Attributes:
        kind: `console`, which includes output, or `sh`, which does not.
        text: The text of the block.
        marked: Whether a comment marks it as needing a network or a GPU.
    """

    kind: str
    text: str
    marked: bool

    @property
    def commands(self) -> list[tuple[str, str | None]]:
        """Return each command with its expected output, which is None for a `sh` block."""
        if self.kind == "sh":
            joined = self.text.replace("\\\n", " ")
            return [(line, None) for line in joined.splitlines() if line.strip()]
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def blocks(page: str) -> list[Block]:
    """Return all command blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(
        r"(?:^(<!--[^\n]*-->)\n)?^```(console|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return [Block(kind, body, mark in MARKS) for mark, kind, body in found]


def same(text: str) -> str:
    """Mask what differs between machines: free disk space and the build of torch."""
    text = re.sub(r"^(free disk +)[\d.]+ [kMGT]B", r"\1SOME", text, flags=re.MULTILINE)
    return re.sub(r"(torch [\d.]+)\+\w+", r"\1", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare what the pages assume: models, examples, and a Hub cache with `org/name`."""
    smollm2 = os.environ.get("MK_INTERLEAVE_SMOLLM2")
    if smollm2 is None:
        pytest.skip("MK_INTERLEAVE_SMOLLM2 names no checkpoint; `make test` builds one")
    path = tmp_path_factory.mktemp("pages")
    (path / "SmolLM2-135M-Instruct").symlink_to(smollm2)
    (path / GGUF).symlink_to(Path(smollm2).with_name(GGUF))
    (path / "examples").symlink_to(ROOT / "examples")
    zoo.quiet()
    zoo.save("qwen3", path / "qwen3")
    (path / "book.txt").write_text(book(4000), encoding="utf-8")
    repository = path / "hub" / "models--org--name"
    make_llama(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return path


@pytest.mark.smollm2
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_command_prints_what_its_page_shows(
    page: str, folder: Path, shell: Shell, mk: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of a page, run in order in one directory, prints what the page shows."""
    work = folder / page.replace("/", "-")
    work.mkdir()
    for entry in folder.iterdir():
        if entry.name in ("SmolLM2-135M-Instruct", GGUF, "examples", "qwen3", "book.txt"):
            (work / entry.name).symlink_to(entry)
    environment = {"HF_HUB_CACHE": str(folder / "hub"), "MK_INTERLEAVE_MODEL": "org/name"}
    monkeypatch.setenv("MK_INTERLEAVE_MODEL", "org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    for block in blocks(page):
        for command, expected in [] if block.marked else block.commands:
            if set(command) & set("|>&;$") or not command.startswith("mk-interleave "):
                done = shell(f"exec 2>&1; {command}", cwd=work, **environment)
                status, out = done.returncode, done.stdout
            else:  # in this process, which has imported the libraries already
                result = mk(*shlex.split(command, comments=True)[1:], cwd=work)
                status, out = result.status, result.out + result.err
            assert status == 0, (command, out)
            if expected is not None:
                assert same(out) == same(expected), command


def _in_prose(page: str) -> list[str]:
    """Return the commands that are named in the prose of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:mk-interleave|make) [^`]+)`", prose)
    return [" ".join(command.split()) for command in found]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS, "CHANGELOG.md"])
def test_commands_in_prose_exist(page: str) -> None:
    """Each command and each flag in the prose exists."""
    group: Any = typer.main.get_command(application())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in _in_prose(page):
        program, *words = shlex.split(command.partition("|")[0].replace("...", "").replace("'", ""))
        if program == "make":
            assert words[0] in targets, command
            continue
        named = next((word for word in words if word in group.commands), None)
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        context = group.make_context("mk-interleave", [], resilient_parsing=True)
        own = group if named is None else group.commands[named]
        known = {option for param in own.get_params(context) for option in param.opts}
        assert named is not None or flags, command
        assert flags <= known | {"--help"}, command


def test_every_block_has_a_checked_language() -> None:
    """Command blocks use the checked languages, and their marks are spelled correctly."""
    for page in (*PAGES, *OTHERS):
        text = (ROOT / page).read_text(encoding="utf-8")
        kinds = {*re.findall(r"^```(\w*)$", text, re.MULTILINE)} - {""}
        assert kinds <= {"console", "sh", "yaml", "python", "text", "json"}, page
        hidden = r"^(?:\$ )?mk-interleave (?!.*\[OPTIONS\])"
        for body in re.findall(
            r"^```(?:text|yaml|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        ):
            assert not re.search(hidden, body, re.MULTILINE), page
        assert {*re.findall(r"<!-- needs .*?-->", text)} <= {*MARKS}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS, "CHANGELOG.md"])
def test_links_have_a_target(page: str) -> None:
    """Each local link points to an existing file, and to a heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / Path(page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def test_python_in_the_pages_compiles() -> None:
    """Each Python block compiles."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for body in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            compile(body, page, "exec")
