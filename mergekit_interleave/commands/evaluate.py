"""`evaluate`: compare a grown model with its base on tasks of lm-eval, item by item."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_interleave import _requirements
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._version import __version__
from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.checkpoint.meta_model import hide_bars, memory_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import _evaluated_models as evaluated
from mergekit_interleave.commands import _record_evaluation, inputs
from mergekit_interleave.commands._evaluated_models import Evaluated, How, StoredModel
from mergekit_interleave.commands._evaluation_run import Run
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.evaluation_report import EvaluationReport
from mergekit_interleave.commands.inputs import DirectiveLike, ModelLike, StrPath
from mergekit_interleave.commands.load import planned
from mergekit_interleave.commands.scan_job import check_place
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.engines.protocol import Bar, no_bar
from mergekit_interleave.errors import (
    DirectiveError,
    OutOfMemoryError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.evaluation import comparison, journal, processes
from mergekit_interleave.evaluation import tasks as lm_eval_tasks
from mergekit_interleave.evaluation.journal import Journal
from mergekit_interleave.evaluation.offline import suite
from mergekit_interleave.evaluation.processes import Processes
from mergekit_interleave.evaluation.quiet import quiet
from mergekit_interleave.evaluation.tasks import Tasks
from mergekit_interleave.gguf.header import is_gguf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_interleave.commands.inputs import Words

BATCH = 8
"""The number of sequences that are computed together by default."""

_PROBES = (
    "The year 2889: 10,000,000 souls.",
    "def f(x):\n\treturn x ** 2",
    "\u00a1S\u00ed! \u4f60\u597d \U0001f600",
)
"""Texts with words, numbers, code and other scripts, which tokenizers encode to compare them."""


def evaluate(  # noqa: PLR0913 - one parameter for each option
    wanted: DirectiveLike | None = None,
    *,
    tasks: str | Sequence[str],
    against: ModelLike | None = None,
    include_path: StrPath | Sequence[StrPath] = (),
    limit: float | str | None = None,
    num_fewshot: int | str | None = None,
    batch_size: int | str = BATCH,
    device: str | None = None,
    max_memory: int | str | None = None,
    fresh: bool = False,
    allow_non_identity: bool = False,
    trust_remote_code: bool = False,
    progress: Bar | None = None,
    **words: Unpack[Words],
) -> EvaluationReport:
    """Compare a grown model with its base on tasks of lm-eval, item by item.

    The results of a model's directory are recorded in its interleave.json, in its card if that is
    unedited, and in `.eval_results/` as the Hub reads them. For a directive, nothing is written.

    What each model scores on each task is kept in a cache, so that the same call goes on after an
    interrupt, and a base is measured once for all models that are compared with it.

    Args:
        wanted: The grown model: its directory, a Hub id or a GGUF file; or a directive, whose model
            is built in memory and shares the tensors of its base.
        tasks: The names of tasks, groups or tags of lm-eval, separated by commas. `offline` stands
            for tasks that come with this package.
        against: The base: a directory, a Hub id or a GGUF file. By default, the model that the
            directive grows, or that the directory records.
        include_path: Directories with tasks that are not part of lm-eval.
        limit: The number of items of each task, or the share of them if it is below 1.
        num_fewshot: The number of examples before each question, if the task leaves it open.
        batch_size: The number of sequences that are computed together.
        device: The device to compute on; by default, a GPU if there is one.
        max_memory: The maximum memory for weights, in bytes or as text such as `8GB`; the rest
            stays on disk.
        fresh: Measure everything again.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        trust_remote_code: Run code from the models. By default none is run.
        progress: As for `run`; it counts requests to the models.
        words: Keywords that take precedence over the directive; see `Words`. For a directory, only
            `dtype` has an effect.

    Raises:
        InterleaveError: A task or a model cannot be used, or the two cannot be compared.
    """
    _requirements.check_extra(lm_eval_tasks.WANTED)
    subject = _subject(wanted, against, words)
    request = _request(tasks, include_path, limit, num_fewshot, batch_size)
    most = inputs.parse_size(max_memory, "--max-memory")
    everyone = processes.started()
    place = everyone.device or device or _device()
    check_place(words.get("dtype") or "float32", place)
    how = How(words.get("dtype") or "auto", place, most)
    with (
        restored_settings(),
        collected_warnings() as warnings,
        _memory_errors(),
        scratch_directory() as scratch,
    ):
        hide_bars()
        models = Models(trust_remote_code=trust_remote_code, dequantize_into=scratch / "gguf")
        base, grown = _opened(
            subject, models, how, warnings.append, allow_non_identity=allow_non_identity
        )
        tokenizer = evaluated.check_tokenizers(base, grown, _PROBES)
        with quiet():
            ready = _loaded_tasks(request, scratch / "offline")
            warnings += [each for task in ready.loaded.values() for each in task.warnings]
            kept = _journal(request, how, everyone)
            run = Run(ready, tokenizer, request.batch_size, kept, everyone, fresh=fresh)
            found = run.scores_of((base, grown), progress or no_bar)
        rows = comparison.compared(found[0], found[1], ready.group_metrics)
    report = EvaluationReport(
        model=grown.name,
        against=base.name,
        dtype=" and ".join(dict.fromkeys((base.dtype, grown.dtype))),
        limit=request.limit,
        date=datetime.now(timezone.utc).date().isoformat(),
        tools=_tools(),
        comparisons=tuple(rows),
        is_first=everyone.is_first,
        warnings=tuple(dict.fromkeys(warnings)),
    )
    notes = _recorded(grown, report) if everyone.is_first else ()
    return dataclasses.replace(report, notes=(*run.notes, *notes))


@dataclass(frozen=True)
class _Request:
    """What the models are asked.

    Attributes:
        names: The names of the tasks.
        include_paths: Directories with tasks.
        limit: The number or share of items; None for all.
        num_fewshot: The number of examples before each question; None for that of each task.
        batch_size: The number of sequences that are computed together.
    """

    names: tuple[str, ...]
    include_paths: tuple[Path, ...]
    limit: float | None
    num_fewshot: int | None
    batch_size: int


def _request(
    tasks: str | Sequence[str],
    include_path: StrPath | Sequence[StrPath],
    limit: float | str | None,
    num_fewshot: int | str | None,
    batch_size: int | str,
) -> _Request:
    """Parse the options about tasks.

    Raises:
        DirectiveError: One of them is invalid.
    """
    given = [tasks] if isinstance(tasks, str) else tasks
    names = tuple(name.strip() for each in given for name in each.split(",") if name.strip())
    if not names:
        raise DirectiveError(
            "--tasks names no task", hint="use --tasks offline, or tasks of lm-eval"
        )
    paths = [include_path] if isinstance(include_path, str | os.PathLike) else include_path
    folders = tuple(map(Path, paths))
    for folder in folders:
        if not folder.is_dir():
            raise DirectiveError(f"--include-path: {folder} is not a directory")
    number = None if limit is None else inputs.parse_number(limit, "--limit", float)
    if number is not None and not (0 < number < 1 or (number >= 1 and number == int(number))):
        raise DirectiveError(f"--limit is {number:g}, not a whole number from 1 or a share below 1")
    return _Request(
        names,
        folders,
        number,
        None if num_fewshot is None else inputs.parse_count(num_fewshot, "--num-fewshot", least=0),
        inputs.parse_count(batch_size, "--batch-size"),
    )


def _device() -> str:
    import torch  # noqa: PLC0415 - takes seconds to import

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Report that memory is exhausted, with what helps here.

    Raises:
        OutOfMemoryError: It is exhausted.
    """
    try:
        with memory_errors():
            yield
    except OutOfMemoryError as error:
        error.hint = "use a smaller --batch-size or --max-memory"
        raise


@dataclass(frozen=True)
class _Subject:
    """What is evaluated.

    Attributes:
        model: The directory, Hub id or GGUF file of the grown model; None for a directive.
        directive: The directive; None for a model.
        base: The base; None for the one that the model records, or that the directive grows.
    """

    model: str | None
    directive: Directive | None
    base: ModelRef | None


def _subject(wanted: DirectiveLike | None, against: ModelLike | None, words: Words) -> _Subject:
    """Parse what is evaluated.

    Raises:
        DirectiveError: It is neither a model nor a directive.
    """
    refs = inputs.parse_models(against, "--against")
    if len(refs) > 1:
        raise DirectiveError("--against names several models, and a model has one base")
    base = refs[0] if refs else None
    model = _model_in(wanted)
    if model is None:
        return _Subject(None, inputs.parse(inputs.read(wanted), words), base)
    if any(value is not None for name, value in words.items() if name != "dtype"):
        raise DirectiveError(
            f"{model} is a model, to which the flags of a directive do not apply",
            hint=f"to grow it in memory, leave it out, and give --model {model}",
        )
    return _Subject(model, None, base)


def _model_in(wanted: DirectiveLike | None) -> str | None:
    """Return the directory, Hub id or GGUF file that an argument names; None for a directive."""
    if not isinstance(wanted, str | os.PathLike):
        return None
    name = os.fspath(wanted)
    is_stored = Path(name).is_dir() or is_gguf(name)
    is_hub = "/" in name and is_hub_id(name.partition("@")[0]) and not Path(name).exists()
    return name if is_stored or is_hub else None


def _opened(
    subject: _Subject, models: Models, how: How, warn: Warn, *, allow_non_identity: bool
) -> tuple[Evaluated, Evaluated]:
    """Open the base and the grown model.

    Raises:
        InterleaveError: One of them cannot be opened, or `run` would refuse the directive.
    """
    if subject.directive is not None:
        plan = planned(subject.directive, models, allow_non_identity=allow_non_identity, warn=warn)
        return evaluated.of_directive(plan, subject.base, models, how, warn)
    return evaluated.of_model(str(subject.model), subject.base, models, how)


def _loaded_tasks(request: _Request, folder: Path) -> Tasks:
    """Load the tasks; write those that come with this package, if one of them is named."""
    paths = request.include_paths
    if any(map(suite.is_offline, request.names)):
        folder.mkdir()
        suite.write(folder)
        paths = (folder, *paths)
    return lm_eval_tasks.load(
        request.names, paths, limit=request.limit, num_fewshot=request.num_fewshot
    )


def _journal(request: _Request, how: How, everyone: Processes) -> Journal:
    tools = {name: version for name, version in _tools().items() if name != "mergekit-interleave"}
    settings = {
        "device": how.device.partition(":")[0],
        "batch_size": request.batch_size,
        "processes": everyone.count,
        "tools": tools,
    }
    return Journal(journal.directory(), settings)


def _tools() -> dict[str, str]:
    packages = ("lm_eval", "torch", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"mergekit-interleave": __version__, **versions}


def _recorded(grown: Evaluated, report: EvaluationReport) -> tuple[str, ...]:
    """Record the results of a model's directory; return notes."""
    if not isinstance(grown, StoredModel) or not grown.checkpoint.is_local:
        return ()
    if is_gguf(grown.checkpoint.ref.path):
        return ("the results of a GGUF file are not recorded; --json prints them",)
    return _record_evaluation.record(grown.checkpoint.path, report)
