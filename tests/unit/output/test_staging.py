"""OUT appears complete, through one rename, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from mergekit_interleave.errors import OutputError
from mergekit_interleave.output import card_files, weight_sample
from mergekit_interleave.output.staging import StagedResult, check_vacant, staged


def entries(path: Path) -> list[str]:
    """Return the sorted names in a directory."""
    return sorted(os.listdir(path))


class BoomError(Exception):
    """An error in the middle of a run."""


def fail(work: Path) -> None:
    """Write half a model and fail."""
    (work / "half").write_text("x")
    raise BoomError


def write_config(work: Path, text: str = "{}") -> None:
    """Write a complete model."""
    (work / "config.json").write_text(text)


def test_out_appears_when_all_is_written(tmp_path: Path) -> None:
    """OUT appears after the function has returned, and nothing else is left."""
    out = tmp_path / "out"

    def write(work: Path) -> str:
        (work / "config.json").write_text("{}")
        assert not out.exists()
        return "done"

    assert staged(out, write, replace=False) == StagedResult("done")
    assert entries(tmp_path) == ["out"]
    assert entries(out) == ["config.json"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """A failed run leaves no files and none of the directories that it created."""
    with pytest.raises(BoomError):
        staged(tmp_path / "a/b/out", fail, replace=False)
    assert entries(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    """The next run to the same OUT removes what a killed run left."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from mergekit_interleave.output.staging import staged\n"
        "def write(work):\n"
        "    (work / 'litter').mkdir(); os.kill(os.getpid(), 9)\n"
        "staged(Path(sys.argv[1]), write, replace=False)\n"
    )
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, str(out)], check=False)
    assert entries(tmp_path) == [".out.mk-interleave"]
    assert staged(out, entries, replace=False).value == []
    assert entries(tmp_path) == ["out"]


def test_two_runs_to_one_out(tmp_path: Path) -> None:
    """A second run to the same OUT is refused and does not disturb the first."""
    out = tmp_path / "out"

    def write(work: Path) -> None:
        write_config(work)
        with pytest.raises(OutputError, match="another run"):
            staged(out, write_config, replace=False)

    staged(out, write, replace=False)
    assert entries(out) == ["config.json"]


def test_out_is_never_overwritten_without_force(tmp_path: Path) -> None:
    """Without --force, nothing at OUT is replaced."""
    out = tmp_path / "out"
    out.mkdir()
    for attempt in (
        lambda: check_vacant(out, replace=False),
        lambda: staged(out, write_config, replace=False),
    ):
        with pytest.raises(OutputError, match=re.escape(f"{out}: ")) as error:
            attempt()
        assert "--force" in str(error.value.hint)
    assert entries(tmp_path) == ["out"]


def test_force_replaces_a_model(tmp_path: Path) -> None:
    """The old model stays until the new one is complete."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "mergekit_config.yml").write_text("merge_method: passthrough")

    def write(work: Path) -> None:
        write_config(work, "new")
        assert (out / "config.json").read_text() == "old"

    staged(out, write, replace=True)
    assert (out / "config.json").read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_force_keeps_the_old_model_when_the_new_one_fails(tmp_path: Path) -> None:
    """If the new run fails, the old model stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "mergekit_config.yml").write_text("merge_method: passthrough")
    with pytest.raises(BoomError):
        staged(out, fail, replace=True)
    assert (out / "config.json").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_force_never_replaces_other_files(tmp_path: Path) -> None:
    """--force replaces no directory with other files, no file and no link."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        check_vacant(tmp_path, replace=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        check_vacant(tmp_path, replace=True)
    (tmp_path / "interleave.json").write_text('{"files": ["config.json", "interleave.json"]}')
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        check_vacant(tmp_path, replace=True)
    with pytest.raises(OutputError, match=r"/thesis\.tex: .*directory"):
        check_vacant(tmp_path / "thesis.tex", replace=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"/link: .*link"):
        check_vacant(tmp_path / "link", replace=True)


def test_force_never_replaces_a_plain_model(tmp_path: Path) -> None:
    """--force replaces a model only if interleave.json or mergekit's config shows who wrote it."""
    out = tmp_path / "out"
    out.mkdir()
    check_vacant(out, replace=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (out / name).write_text("{}")
    for recipe in (None, "notes: mine"):
        if recipe is not None:
            (out / "mergekit_config.yml").write_text(recipe)
        with pytest.raises(OutputError, match="mergekit_config") as error:
            check_vacant(out, replace=True)
        with pytest.raises(OutputError) as error:
            check_vacant(out, replace=False)
        assert "--force" not in str(error.value.hint)
    (out / "mergekit_config.yml").write_text("slices: []\nmerge_method: passthrough\n")
    check_vacant(out, replace=True)
    (out / "interleave.json").write_text("{}")
    with pytest.raises(OutputError, match=r"interleave\.json"):
        check_vacant(out, replace=True)


def test_force_never_replaces_a_trained_model(tmp_path: Path) -> None:
    """--force keeps a model whose interleave.json records that it was trained."""
    out = tmp_path / "out"
    out.mkdir()
    content = {"files": ["interleave.json"], "verified": {"weights": {}}}
    (out / "interleave.json").write_text(json.dumps(content))
    check_vacant(out, replace=True)
    content["verified"] = {"trained": {}}
    (out / "interleave.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="trained"):
        check_vacant(out, replace=True)


def test_force_never_replaces_changed_weights(tmp_path: Path) -> None:
    """--force keeps weights that differ from the recorded digest, whatever their time stamps are.

    Without a digest, it keeps weights that are newer than interleave.json or mergekit's config.
    """
    import numpy as np

    out = tmp_path / "out"
    out.mkdir()
    weights, manifest = out / "model.safetensors", out / "interleave.json"
    save_file({"x": np.zeros(9)}, weights)
    content = {"files": [weights.name, manifest.name], "weight_sample": weight_sample.digest(out)}
    manifest.write_text(json.dumps(content))
    os.utime(weights, (2e9, 2e9))
    check_vacant(out, replace=True)
    save_file({"x": np.ones(9)}, weights)
    os.utime(weights, (1, 1))
    for text in (None, "no safetensors"):
        if text is not None:
            weights.write_text(text)
        with pytest.raises(OutputError, match=r"model\.safetensors"):
            check_vacant(out, replace=True)
    del content["weight_sample"]
    (out / "mergekit_config.yml").write_text("merge_method: passthrough")
    for record in (manifest, out / "mergekit_config.yml"):
        manifest.write_text(json.dumps({"files": [*content["files"], "mergekit_config.yml"]}))
        if record != manifest:
            manifest.unlink()
        os.utime(weights, (1, 1))
        check_vacant(out, replace=True)
        os.utime(weights, (2e9, 2e9))
        with pytest.raises(OutputError, match=r"model\.safetensors"):
            check_vacant(out, replace=True)


def test_force_never_replaces_an_edited_card(tmp_path: Path) -> None:
    """--force keeps a card or picture that is not as interleave.json records it."""
    out = tmp_path / "out"
    out.mkdir()
    texts = {"README.md": "card", "layers.svg": "<svg/>"}
    content = {"files": [*texts, "interleave.json"], "generated": card_files.digests(texts)}
    (out / "interleave.json").write_text(json.dumps(content))
    for name, text in texts.items():
        (out / name).write_text(text)
    check_vacant(out, replace=True)
    for name, text in texts.items():
        (out / name).write_text("mine")
        with pytest.raises(OutputError, match=name):
            check_vacant(out, replace=True)
        (out / name).write_text(text)


def test_force_looks_into_folders(tmp_path: Path) -> None:
    """--force replaces no model with a foreign file in one of its folders."""
    out = tmp_path / "out"
    (out / "code").mkdir(parents=True)
    (out / "interleave.json").write_text('{"files": ["code/a.py", "interleave.json"]}')
    (out / "code/a.py").write_text("")
    check_vacant(out, replace=True)
    (out / "code/mine.txt").write_text("")
    with pytest.raises(OutputError, match=r"code/mine\.txt"):
        check_vacant(out, replace=True)


def test_an_old_model_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    """If a run was killed between its two renames, the next run restores the old model."""
    aside = tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path}/out: ")):
        staged(tmp_path / "out", write_config, replace=False)
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """The error for a path that cannot be written names OUT."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path}/file/out: ") + ".*/file "):
        staged(tmp_path / "file/out", write_config, replace=False)
    with pytest.raises(OutputError, match="/proc/out: "):
        staged(Path("/proc/out"), write_config, replace=False)


def test_files_get_the_modes_of_the_umask(tmp_path: Path) -> None:
    """Files get the umask's modes; if safetensors sets these too, `settle` need not."""
    import numpy as np

    def write(work: Path) -> None:
        save_file({"x": np.zeros(1)}, work / "model.safetensors")
        assert (work / "model.safetensors").stat().st_mode & 0o777 == 0o600

    old = os.umask(0o022)
    try:
        staged(tmp_path / "out", write, replace=False)
    finally:
        os.umask(old)
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and directories are synced, then renamed, then the parent is synced."""
    out, events = tmp_path / "out", []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path))
        sync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(Path("renamed"))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)

    def write(work: Path) -> None:
        (work / "code").mkdir()
        (work / "code" / "model.py").write_text("x")
        write_config(work)

    staged(out, write, replace=False)
    staging = Path(".out.mk-interleave")
    assert set(events[:-2]) == {
        staging, staging / "code", staging / "code" / "model.py", staging / "config.json"
    }  # fmt: skip
    assert events[-3:] == [staging, Path("renamed"), Path()]


@pytest.mark.parametrize("what", ["directory", "empty directory", "file"])
@pytest.mark.parametrize("replace", [False, True])
def test_out_that_appears_meanwhile(what: str, tmp_path: Path, *, replace: bool) -> None:
    """Files that appear at OUT during the run stay, unless --force may replace them."""
    out = tmp_path / "out"
    may = replace and what == "empty directory"

    def write(work: Path) -> None:
        write_config(work)
        if what == "file":
            out.write_text("mine")
        else:
            out.mkdir()
            if what == "directory":
                (out / "mine").write_text("mine")

    with nullcontext() if may else pytest.raises(OutputError, match=r"/out: "):
        staged(out, write, replace=replace)
    assert entries(tmp_path) == ["out"]
    assert out.is_dir() == (what != "file")
    if not may:
        assert out.is_file() or entries(out) == (["mine"] if what == "directory" else [])


def test_a_second_interrupt_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second interrupt during cleanup does not stop it."""
    remove = shutil.rmtree

    def interrupted(folder: Path, **how: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove(folder, ignore_errors=how["ignore_errors"])

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(BoomError):
        staged(tmp_path / "out", fail, replace=False)
    assert entries(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_hint_names_force_only_if_it_helps(tmp_path: Path) -> None:
    """The hint names --force only if it would help."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError) as error:
        check_vacant(out, replace=False)
    assert "--force" in str(error.value.hint)
    (out / "thesis.txt").write_text("x")
    with pytest.raises(OutputError) as error:
        check_vacant(out, replace=False)
    assert "--force" not in str(error.value.hint)
