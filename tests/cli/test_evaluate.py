"""`mk-interleave evaluate`: its output, and the files that it writes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card_lint
import lm_eval.tasks
import pytest
import yaml
from eval_tasks import ITEMS, write_hub_task, write_tasks
from harness import Cli, make_llama, set_keys, train_new_layers
from huggingface_hub import parse_eval_result_entries

import mergekit_interleave as api
from mergekit_interleave.evaluation import journal
from mergekit_interleave.output import evaluation_text, hub_results

NEW = "repeat: [1, 3]"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with tasks, one of which names a data set of the Hub."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks") / "toy")
    write_hub_task(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 4 layers with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("evaluate") / "base", layers=4)


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    """Return the base with two layers repeated."""
    api.run(NEW, tmp_path / "grown", model=base)
    return tmp_path / "grown"


def recorded(directory: Path) -> dict[str, Any]:
    """Return what interleave.json records."""
    content: dict[str, Any] = json.loads((directory / "interleave.json").read_text())
    return content


def test_what_is_recorded(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """Results are in interleave.json, in the card's table and, if from the Hub, in its format."""
    words = ("--tasks", "toy_choice,acme_choice", "--include-path", local, "--against", base)
    result = mk("evaluate", grown, *words)
    assert result.status == 0, result.err
    assert "recorded in interleave.json, README.md, .eval_results/acme_choice.yaml" in result.err
    shown = json.loads(mk("evaluate", grown, *words, "--json").out)
    kept = recorded(grown)[evaluation_text.KEY]
    assert kept["results"] == shown["results"]
    assert kept["against"] == "base"
    card = (grown / "README.md").read_text()
    assert not [*card_lint.problems(card, grown)]
    assert "## Evaluation" in card
    for row in shown["results"]:
        line = next(line for line in card.splitlines() if f"| {row['task']} (version" in line
                    and f"| {row['metric']} |" in line)  # fmt: skip
        assert f"{row['base']:.4f} | {row['grown']:.4f} |" in line
        assert row["items"] == (6 if row["task"] == "acme_choice" else ITEMS)
    assert "lm_eval 0.4" in card
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((grown / ".eval_results/acme_choice.yaml").read_text())
    )
    row = next(row for row in shown["results"] if row["task"] == "acme_choice")
    assert (entry.dataset_id, entry.task_id) == ("acme/choice", "acme_choice")
    assert (entry.value, entry.date) == (row["grown"], row["date"])
    assert "acc, 0-shot, task version 3" in entry.notes


def test_commands_agree(mk: Cli, base: Path, grown: Path, local: Path, tmp_path: Path) -> None:
    """The other commands keep the files or replace them, and a grown copy has none of them."""
    words = ("--tasks", "acme_choice", "--include-path", local, "--against", base)
    assert mk("evaluate", grown, *words).status == 0
    card = (grown / "README.md").read_text()
    for command in (
        ("verify", grown),
        ("verify", grown, "--against", base),
        ("card", grown),
        ("fix-config", grown, "--model", base),
    ):
        result = mk(*command)
        assert result.status == 0, result.err
        assert "## Evaluation" in (grown / "README.md").read_text()
    assert (
        card.partition("## Evaluation")[2].partition("## Recipe")[0]
        in (grown / "README.md").read_text()
    )
    again = tmp_path / "again"
    api.run("interleave: every 3", again, model=grown)
    assert not (again / hub_results.FOLDER).exists()
    assert evaluation_text.KEY not in recorded(again)
    assert "## Evaluation" not in (again / "README.md").read_text()
    assert mk("run", NEW, grown, "--model", base, "--force").status == 0
    assert not (grown / hub_results.FOLDER).exists()
    assert evaluation_text.KEY not in recorded(grown)


def test_results_of_several_calls(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """Results of the same weights stay, and are corrected together."""
    words = ("--include-path", local, "--against", base)
    for tasks in ("acme_choice", "toy_answer"):
        assert mk("evaluate", grown, "--tasks", tasks, "--limit", 4, *words).status == 0
    rows = recorded(grown)[evaluation_text.KEY]["results"]
    assert [row["task"] for row in rows] == ["acme_choice", "toy_answer", "toy_answer"]
    least = min(rows, key=lambda row: row["chance"])
    assert least["corrected"] == min(1, 3 * least["chance"])
    assert [row["items"] for row in rows] == [4, 4, 4]


def test_trained_weights(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """After training, the card and the Hub's files no longer state results of the old weights."""
    words = ("--include-path", local, "--against", base)
    assert mk("evaluate", grown, "--tasks", "acme_choice", *words).status == 0
    train_new_layers(grown)
    assert mk("card", grown).status == 0
    assert "## Evaluation" not in (grown / "README.md").read_text()
    assert not (grown / ".eval_results/acme_choice.yaml").exists()
    assert evaluation_text.KEY not in recorded(grown)
    assert mk("evaluate", grown, "--tasks", "toy_choice", *words).status == 0
    assert {row["task"] for row in recorded(grown)[evaluation_text.KEY]["results"]} == {
        "toy_choice"
    }


def test_an_edited_card(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """An edited card stays as it is, and a note says so."""
    card = grown / "README.md"
    card.write_text(f"{card.read_text()}\nMine.\n")
    before = card.read_text()
    words = ("--tasks", "toy_choice", "--include-path", local, "--against", base)
    result = mk("evaluate", grown, *words)
    assert result.status == 0
    assert "was edited" in result.err
    assert card.read_text() == before
    assert mk("card", grown, "--force").status == 0
    assert "## Evaluation" in card.read_text()


def test_models_without_a_record(mk: Cli, base: Path, local: Path, tmp_path: Path) -> None:
    """A model that no run wrote is evaluated, and a note says that nothing is recorded."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    before = sorted(other.iterdir())
    words = ("--tasks", "toy_choice", "--include-path", local)
    result = mk("evaluate", other, *words, "--against", base)
    assert result.status == 0, result.err
    assert "no result is recorded" in result.err
    assert sorted(other.iterdir()) == before
    refused = mk("evaluate", other, *words)
    assert refused.status == 2
    assert refused.err.splitlines()[-1].endswith("--against MODEL")


def test_the_recorded_base(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """The base that a model records is found by its name; without it, --against is asked for."""
    words = ("evaluate", grown, "--tasks", "toy_choice", "--include-path", local)
    assert mk(*words, cwd=base.parent).status == 0
    result = mk(*words, cwd=local)
    assert result.status == 2
    assert "base, is not here" in result.err


def test_bad_records(mk: Cli, base: Path, grown: Path, local: Path) -> None:
    """A malformed interleave.json is one error, and nothing is written."""
    set_keys(grown / "interleave.json", layers="none")
    card = (grown / "README.md").read_bytes()
    result = mk("evaluate", grown, "--tasks", "acme_choice", "--include-path", local,
                "--against", base)  # fmt: skip
    assert result.status == 1
    assert "interleave.json" in result.err
    assert (grown / "README.md").read_bytes() == card
    assert not (grown / hub_results.FOLDER).exists()


@pytest.fixture
def _some_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval know only some of its own tasks; it takes seconds to read all of them."""
    manager, own = lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent

    def some(include_path: list[str], *, include_defaults: bool = True) -> Any:
        known = [own / name for name in ("arc", "ifeval", "mmlu/default")]
        return manager(
            include_path=[*include_path, *(known if include_defaults else ())],
            include_defaults=False,
        )

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", some)


@pytest.mark.usefixtures("_some_tasks")
@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("arc_eezy", "arc_eezy", "arc_easy"),
        ("offlin", "offlin", "offline"),
        ("toy_choise", "toy_choise", "toy_choice"),
        ("nothing_is_like_this_at_all", "no task", "lm_eval ls tasks"),
        ("mmlux_*", "like 'mmlux_*'", "mmlu"),
        ("arc_easy", "allenai/ai2_arc", "--tasks offline"),
        ("ifeval", "langdetect", "pip install langdetect"),
    ],
)
def test_tasks_that_cannot_be_used(  # noqa: PLR0913, PLR0917 - what a row of the table has
    mk: Cli, base: Path, local: Path, name: str, said: str, hint: str
) -> None:
    """Unknown tasks, and those that need the Hub or a package, are one line and one hint each."""
    result = mk("evaluate", NEW, "--model", base, "--tasks", name, "--include-path", local)
    assert result.status == (1 if name in {"arc_easy", "ifeval"} else 2)
    error, remedy = result.err.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert remedy.startswith("hint: ")
    assert hint in remedy


@pytest.mark.parametrize("missing", ["lm_eval", "reasoning_gym"])
def test_missing_extras(mk: Cli, base: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed is one error with the line that installs it."""
    from importlib import metadata

    version = metadata.version

    def without(name: str) -> str:
        if name.replace("-", "_") == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    result = mk("evaluate", NEW, "--model", base, "--tasks", "offline", "--limit", 2)
    assert result.status == 1
    error, hint = result.err.splitlines()
    assert missing.replace("_", "-") in error.replace("_", "-")
    assert hint.startswith("hint: pip install '")
    assert mk("plan", NEW, "--model", base).status == 0


def test_flags_of_a_directive(mk: Cli, grown: Path, local: Path) -> None:
    """Growth flags are an error beside a model; as the hint says, they grow it in memory."""
    words = ("--every", 2, "--tasks", "toy_more", "--include-path", local)
    result = mk("evaluate", grown, *words)
    assert result.status == 2
    assert f"--model {grown}" in result.err
    assert mk("evaluate", "--model", grown, *words).status == 0


def test_no_tasks(mk: Cli, base: Path, tmp_path: Path) -> None:
    """No task is an error; as its hint says, `--tasks offline` needs no file, and leaves none."""
    pytest.importorskip("reasoning_gym")
    result = mk("evaluate", NEW, "--model", base, "--tasks", ",")
    assert result.status == 2
    assert "--tasks offline" in result.err
    result = mk("evaluate", NEW, "--model", base, "--tasks", "offline", "--limit", 2, cwd=tmp_path)
    assert result.status == 0, result.err
    for name in ("offline_text", "offline_arithmetic", "offline_logic"):
        assert name in result.out
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
def test_several_processes(base: Path, grown: Path, local: Path, shell: Callable[..., Any]) -> None:
    """Two processes of accelerate share the items, give the same numbers, and print once."""
    names = ("toy_group", "toy_text", "toy_generated")
    alone = api.evaluate(grown, against=base, tasks=names, include_path=local)
    launch = "accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
    done = shell(
        f"{launch} --dynamo_backend no -m mergekit_interleave evaluate {grown} --against {base} "
        f"--tasks {','.join(names)} --include-path {local} --json",
        PYTHONPATH=":".join(sys.path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert len(rows) == len(alone.comparisons)
    for row, one in zip(rows, alone.comparisons, strict=True):
        assert (row["task"], row["items"]) == (one.task, one.items)
        assert (row["base"], row["grown"]) == pytest.approx((one.base, one.grown))
    assert recorded(grown)[evaluation_text.KEY]["results"] == rows
