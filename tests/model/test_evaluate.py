"""Evaluations on tasks of lm-eval: the same numbers as its own, for stored and virtual models."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_tasks import ITEMS, write_tasks
from harness import edit_json, make_llama
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import mergekit_interleave as api
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    OutOfMemoryError,
    RefusedError,
)
from mergekit_interleave.evaluation import journal, measure
from mergekit_interleave.output import evaluation_text

pytest.importorskip("lm_eval")

ALL = "toy_group,toy_answer,toy_text,toy_generated"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep scores in a directory of the test."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluations"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks") / "toy")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 4 layers with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("evaluate") / "base", layers=4)


@pytest.fixture(scope="module")
def grown(base: Path) -> Path:
    """Return the base with two layers repeated, so that its answers are others."""
    api.run("repeat: [1, 3]", base.parent / "grown", model=base)
    return base.parent / "grown"


def by_lm_eval(model: Path, local: Path, names: str) -> dict[str, Any]:
    """Return what lm-eval finds for a model when it does everything itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model)},
        tasks=names.split(","),
        task_manager=TaskManager(include_path=str(local), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )["results"]
    return found


def test_numbers_of_lm_eval(base: Path, grown: Path, local: Path) -> None:
    """Each score of each model is the one that lm-eval reports, of groups and filters, too."""
    report = api.evaluate(grown, against=base, tasks=ALL, include_path=local)
    rows = {(row.task, f"{row.metric},{row.filter}"): row for row in report.comparisons}
    expected = [by_lm_eval(model, local, ALL) for model in (base, grown)]
    keys = {
        (task, key)
        for task, metrics in expected[0].items()
        for key in metrics
        if "," in key and "stderr" not in key and not key.startswith("mcc,")
    }
    assert rows.keys() == keys
    assert [each for each in report.warnings if "mcc" in each and "toy_more" in each]
    for (task, key), row in rows.items():
        found = [results[task][key] for results in expected]
        assert [row.base, row.grown] == pytest.approx(found, rel=1e-12), (task, key)
    assert rows["toy_choice", "acc,none"].items == ITEMS
    assert any(row.differing for row in report.comparisons)
    assert rows["toy_choice", "acc,none"].part_of == "toy_group"


def test_a_directive(base: Path, grown: Path, local: Path) -> None:
    """The model of a directive has the scores of the written one, and leaves no file."""
    before = sorted(base.parent.rglob("*"))
    names = "toy_choice,toy_answer"
    written = api.evaluate(grown, against=base, tasks=names, include_path=local, fresh=True)
    after = sorted(base.parent.rglob("*"))
    assert after == before
    virtual = api.evaluate("repeat: [1, 3]", model=base, tasks=names, include_path=local)
    assert virtual.comparisons == written.comparisons
    assert sorted(base.parent.rglob("*")) == after


def test_identities(base: Path, local: Path) -> None:
    """With zeroed layers, every difference is exactly 0, and the report says so."""
    totals, ticks = [], []

    @contextmanager
    def bar(total: int) -> Iterator[Any]:
        totals.append(total)
        yield ticks.append

    report = api.evaluate(
        "interleave: every 2", model=base, tasks=ALL, include_path=local, progress=bar
    )
    assert sum(ticks) == totals[0]  # the progress counts every request once
    for row in report.comparisons:
        assert (row.difference, row.interval, row.differing) == (0, (0, 0), 0)
        assert row.verdict == evaluation_text.EQUAL
    assert "exactly 0" in report.verdict
    assert "exactly 0" in report.lines()[0]


def test_one_model_in_memory(
    base: Path, grown: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two directories, one is in memory at a time; a directive adds no weights to its base."""
    alive: list[int] = []
    run = measure.run

    def counted(*args: Any) -> Any:
        gc.collect()
        models = [each for each in gc.get_objects() if isinstance(each, PreTrainedModel)]
        inner = {id(part) for model in models for part in model.modules()} - set(map(id, models))
        whole = [model for model in models if model.get_output_embeddings() is not None]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for model in whole
            if id(model) not in inner
            for tensor in model.parameters()
        }
        alive.append(sum(storages.values()))
        return run(*args)

    monkeypatch.setattr(measure, "run", counted)
    sizes = [
        sum(
            tensor.nbytes
            for file in path.glob("*.safetensors")
            for tensor in load_file(file).values()
        )
        for path in (base, grown)
    ]
    api.evaluate(grown, against=base, tasks="toy_more", include_path=local)
    assert alive == sizes
    alive.clear()
    api.evaluate("repeat: [0, 3]", model=base, tasks="toy_more", include_path=local)
    assert alive == [sizes[0]]


def test_resuming(
    base: Path, grown: Path, local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt loses no finished result, and leaves no half-written record."""
    record = (grown / "interleave.json").read_bytes(), (grown / "README.md").read_bytes()
    names = "toy_choice,toy_answer,toy_text"
    done: list[str] = []
    run = measure.run

    def interrupted(model: Any, task: Any, *rest: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(task.name)
        return run(model, task, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure, "run", interrupted)
        api.evaluate(grown, against=base, tasks=names, include_path=local)
    assert record == ((grown / "interleave.json").read_bytes(), (grown / "README.md").read_bytes())
    assert len([*cache.iterdir()]) == 4
    with _counted(monkeypatch) as again:
        resumed = api.evaluate(grown, against=base, tasks=names, include_path=local)
    assert again == done[1:3]
    assert "4 of 6" in resumed.notes[0]
    with _counted(monkeypatch) as again:
        whole = api.evaluate(grown, against=base, tasks=names, include_path=local, fresh=True)
    assert len(again) == 6
    assert whole.comparisons == resumed.comparisons


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of the tasks that are run."""
    names: list[str] = []
    run = measure.run

    def counted(model: Any, task: Any, *rest: Any) -> Any:
        names.append(task.name)
        return run(model, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "run", counted)
        yield names


def test_what_scores_depend_on(base: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, items, examples, dtypes and batch sizes are measured anew."""

    def measured(**options: Any) -> int:
        given = {"tasks": "toy_choice", "include_path": local, "model": base, **options}
        with _counted(monkeypatch) as names:
            api.evaluate("repeat: [1, 3]", **given)
        return len(names)

    assert measured() == 2
    assert measured() == 0
    assert measured(limit=4) == 2
    assert measured(num_fewshot=1) == 2
    assert measured(batch_size=1) == 2
    assert measured(dtype="bfloat16") == 2
    other = Path(shutil.copytree(base, local.parent / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert measured(model=other) == 2


def test_memory_limit(base: Path, grown: Path, local: Path) -> None:
    """With weights on disk, a stored model has the same scores; a directive needs all in memory."""
    names = {"tasks": "toy_text", "include_path": local}
    whole = api.evaluate(grown, against=base, **names)
    small = api.evaluate(grown, against=base, max_memory="60kB", fresh=True, **names)
    for one, other in zip(whole.comparisons, small.comparisons, strict=True):
        assert (one.base, one.grown) == pytest.approx((other.base, other.grown))
    with pytest.raises(RefusedError) as error:
        api.evaluate("repeat: [1, 3]", model=base, max_memory="60kB", **names)
    assert "run" in str(error.value.hint)


def test_another_vocabulary(base: Path, local: Path, tmp_path: Path) -> None:
    """A base with another vocabulary is refused."""
    other = make_llama(tmp_path / "other", layers=2, vocab_size=72)
    with pytest.raises(RefusedError, match="vocabulary"):
        api.evaluate(base, against=other, tasks="toy_choice", include_path=local)


def test_another_tokenizer(base: Path, local: Path, tmp_path: Path) -> None:
    """A base whose tokenizer reads other tokens is refused, and one without any."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    edit_json(other / "tokenizer.json", _swap_two_words)
    with pytest.raises(RefusedError, match="tokenizer"):
        api.evaluate(base, against=other, tasks="toy_choice", include_path=local)
    for file in other.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        api.evaluate(base, against=other, tasks="toy_choice", include_path=local)


def _swap_two_words(content: dict[str, Any]) -> None:
    words = content["model"]["vocab"]
    words["word7"], words["word8"] = words["word8"], words["word7"]


def test_scores_that_are_no_numbers(base: Path, local: Path, tmp_path: Path) -> None:
    """A model whose logits are not finite is one error that names task and metric."""
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match=r"toy_text: \w+ is not a finite number"):
        api.evaluate(broken, against=base, tasks="toy_text", include_path=local)


def test_out_of_memory(base: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhausted memory is one error that says what helps."""

    def exhausted(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(measure, "run", exhausted)
    with pytest.raises(OutOfMemoryError) as error:
        api.evaluate("repeat: [1, 3]", model=base, tasks="toy_choice", include_path=local)
    assert "--batch-size" in str(error.value.hint)


def test_no_results_of_items(base: Path, local: Path) -> None:
    """A metric of all items together is refused before a model is loaded, by its name."""
    with pytest.raises(RefusedError, match="toy_f1: f1"):
        api.evaluate("repeat: [1, 3]", model=base, tasks="toy_f1", include_path=local)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"limit": 0}, DirectiveError, "--limit"),
        ({"limit": "some"}, DirectiveError, "--limit"),
        ({"limit": 1.5}, DirectiveError, "--limit"),
        ({"limit": 1}, RefusedError, "toy_choice"),
        ({"num_fewshot": -1}, DirectiveError, "--num-fewshot"),
        ({"batch_size": 0}, DirectiveError, "--batch-size"),
        ({"device": "nonsense"}, DirectiveError, "--device"),
        ({"dtype": "float"}, DirectiveError, "dtype"),
        ({"max_memory": "much"}, DirectiveError, "--max-memory"),
        ({"include_path": "nowhere"}, DirectiveError, "--include-path"),
        ({"tasks": " , "}, DirectiveError, "--tasks"),
        ({"tasks": "toy_group,toy_choice"}, DirectiveError, "toy_choice"),
        ({"against": ["one", "two"]}, DirectiveError, "--against"),
        ({"against": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_bad_options(
    base: Path, local: Path, options: dict[str, Any], error: type[InterleaveError], named: str
) -> None:
    """An option that is wrong is one error that names it."""
    given = {"model": base, "tasks": "toy_choice", "include_path": local, **options}
    with pytest.raises(error, match=named):
        api.evaluate("repeat: [1, 3]", **given)


@pytest.mark.slow
@pytest.mark.skipif("MK_INTERLEAVE_SMOLLM2" not in os.environ, reason="needs SmolLM2")
def test_offline_tasks(tmp_path: Path) -> None:
    """SmolLM2 with zeroed layers equals its base; with a scrambled layer, 200 items find it."""
    pytest.importorskip("reasoning_gym")
    smollm2 = Path(os.environ["MK_INTERLEAVE_SMOLLM2"])
    names = {"tasks": "offline", "limit": 200}
    same = api.evaluate("interleave: every 5", model=smollm2, **names)
    assert {row.verdict for row in same.comparisons} == {evaluation_text.EQUAL}
    scrambled = Path(shutil.copytree(smollm2, tmp_path / "scrambled"))
    weights = load_file(scrambled / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in weights.items():
        if ".layers.15." in name and tensor.dim() > 1:
            weights[name] = tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    save_file(weights, scrambled / "model.safetensors", {"format": "pt"})
    found = api.evaluate(scrambled, against=smollm2, **names)
    verdicts = {(row.task, row.metric): row.verdict for row in found.comparisons}
    assert verdicts["offline_text", "bits_per_byte"] == evaluation_text.WORSE
    assert verdicts["offline_arithmetic", "perplexity"] == evaluation_text.WORSE
    assert verdicts["offline_arithmetic", "acc"] == evaluation_text.WORSE
