"""`scan`: measure many layouts of one model on text and items, and say which of them help."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_interleave._files import read_text, replace_file
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import hide_bars, memory_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.load import built, planned
from mergekit_interleave.commands.sample import tokenizer_of
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import DTYPES, Directive
from mergekit_interleave.engines.protocol import Bar, no_bar
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    collected_warnings,
)
from mergekit_interleave.output import weight_sample
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import resolve
from mergekit_interleave.scanning import (
    analysis,
    heat_map,
    memory_limit,
    paths,
    ray_actors,
    results,
    sequences,
    spaces,
    verdict,
)
from mergekit_interleave.scanning.batches import Batch, batches
from mergekit_interleave.scanning.distribution import Here, Outcomes, Shard, Way
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.scanning.processes import Processes
from mergekit_interleave.scanning.ray_actors import RayActors
from mergekit_interleave.scanning.results import Results
from mergekit_interleave.scanning.sequences import ScoredTokens
from mergekit_interleave.scanning.spaces import Candidate
from mergekit_interleave.scanning.verdict import Measured
from mergekit_interleave.virtual import sampling, sources

BEST, MAP = "best.yml", "scan.svg"

GROUP = 64
"""The number of layouts that are measured together, whose states are in memory."""

BATCH = 1024
"""The number of tokens that are measured together."""


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    Attributes:
        candidates: The layouts that were measured.
        differences: Score minus base score, of shape (layouts, sequences), in nats.
        tokens: The number of scored tokens of each sequence.
        kinds: `text` or `item` for each sequence.
        analysis: What the differences say.
        warnings: Warnings, one sentence each.
    """

    candidates: tuple[Candidate, ...]
    differences: Any
    tokens: tuple[int, ...]
    kinds: tuple[str, ...]
    analysis: analysis.Analysis
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> str | None:
        """The directive that helps; None if nothing does."""
        found = self.analysis.best
        return None if found is None else self.candidates[found.layout].directive

    @property
    def verdict(self) -> str:
        """One line: which directive helps and by how much, or that nothing does."""
        return verdict.verdict(self.analysis, self._measured)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(verdict.report(self.analysis, self._measured))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `scan --json` prints it."""
        return {
            "verdict": self.verdict,
            "best": self.best,
            "chance": self.analysis.chance,
            "layouts": len(self.candidates),
            "sequences": len(self.tokens),
            "tokens": sum(self.tokens),
            "findings": [
                {
                    "directive": self.candidates[each.layout].directive,
                    "selected": each.selected,
                    "held_out": each.held_out,
                    "interval": list(each.interval),
                    "needed": each.needed,
                }
                for each in self.analysis.findings
            ],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def _measured(self) -> Measured:
        broken = np.flatnonzero(~np.isfinite(self.differences).all(axis=1))
        layouts = [each.directive for each in self.candidates]
        return Measured(layouts, self.tokens, self.kinds, broken.tolist())


def scan(  # noqa: PLR0913 - one parameter for each option
    candidates: StrPath | None = None,
    *,
    model: ModelLike | None = None,
    space: str | Sequence[str] = (),
    text: StrPath | None = None,
    items: StrPath | None = None,
    tokens: int | str = 4096,
    out: StrPath | None = None,
    top: int | str = 5,
    seed: int | str = 0,
    dtype: str = "float32",
    device: str | None = None,
    max_memory: int | str | None = None,
    workers: int | str | None = None,
    ray: str | None = None,
    num_cpus: float | str | None = None,
    num_gpus: float | str | None = None,
    trust_remote_code: bool = False,
    progress: Bar | None = None,
) -> ScanReport:
    """Measure many layouts of one model on text and items, and say which of them help.

    Args:
        candidates: A file with one directive per line, to measure instead of a space.
        model: The model: a directory or a Hub id. Directives may name it, too.
        space: The spaces to measure, such as `blocks`; see `spaces.SPACES`.
        text: A file with text. If there are no items either, a text of the package is used.
        items: A file with one item per line, in JSON: `prompt`, `answer`, and perhaps `choices`.
        tokens: The maximum number of tokens of the text.
        out: The directory for the results. The same call resumes a scan that was stopped there.
        top: How many of the best layouts are tested on the held-out part.
        seed: The seed of the split and of the random numbers of the analysis.
        dtype: The dtype to compute in.
        device: The device to compute on; by default, a GPU if there is one.
        max_memory: The maximum memory for weights and states, in bytes or as text such as `8GB`.
            If the weights need more, only the layer at work is in memory; the file must have the
            dtype to compute in. Each worker may use as much.
        workers: The number of processes that measure, each of which loads the model and has its
            part of the threads; by default 1. With `ray`, the number of actors; by default as many
            as there is room for. A script that gives it needs `if __name__ == "__main__":`.
        ray: The address of a Ray cluster that measures, as for `ray.init`; `local` starts one on
            this machine.
        num_cpus: The number of CPUs that each actor reserves and computes with; by default 1.
        num_gpus: The number of GPUs that each actor reserves; by default 0.
        trust_remote_code: Run code from the model. By default none is run.
        progress: As for `run`; it counts layouts.

    Raises:
        InterleaveError: There is nothing to measure, or it cannot be measured.
    """
    most_tokens, shown = inputs.parse_count(tokens, "--tokens"), inputs.parse_count(top, "--top")
    chosen = inputs.parse_number(seed, "--seed", int)
    if chosen < 0:
        raise DirectiveError(f"--seed is {chosen}, not a whole number from 0 up")
    most = inputs.parse_size(max_memory, "--max-memory")
    way = _way(workers, ray, num_cpus, num_gpus)
    check_place(dtype, device if ray is None else None)
    with restored_settings(), collected_warnings() as warnings, memory_errors():
        work = _prepared(candidates, model, space, trusted=trust_remote_code, warn=warnings.append)
        hide_bars()
        tokenizer = tokenizer_of(work.first)
        scored = scored_sequences(tokenizer, text, items, most_tokens, work.first)
        analysis.split(len(scored), chosen)  # refuses too few sequences before any work
        kept = _kept(out, work, scored, {"dtype": dtype, "seed": chosen, "top": shown})
        parts = batches(scored, BATCH)
        digest = None if ray is None else weight_sample.digest(work.first.path)
        job = Job(work.plans, dtype, device, to_check(parts), digest, most)
        if shards := _shards(kept, parts):
            _measure(kept, way.run(shards, job), progress or no_bar, warnings.append)
    report = _report(kept, [each.kind for each in scored], chosen, shown, warnings)
    if out is not None:
        _write(Path(out), report, work.first.depth, model)
    return report


def scanned(directory: StrPath) -> ScanReport:
    """Read what a scan found, without the model.

    Args:
        directory: The directory that `scan` wrote.

    Raises:
        CheckpointError: The directory holds no scan.
        DirectiveError: The scan was stopped before its end.
    """
    record, kept = results.read(Path(directory))
    missing = int(np.isnan(kept.scores).any(axis=1).sum())
    if missing:
        raise DirectiveError(
            f"{directory}: {missing} of {len(kept.scores)} layouts are not measured yet",
            hint="give the command that started the scan again, to resume it",
        )
    return _report(kept, record["kinds"], record["seed"], record["top"], ())


def to_check(parts: Sequence[Batch]) -> Batch:
    """Return sequences to compare the ways to compute scores on: a long and a short one."""
    return Batch((0, 1), (parts[0].sequences[0], parts[-1].sequences[-1]))


def check_place(dtype: str, device: str | None) -> None:
    """Check where to compute.

    Raises:
        DirectiveError: There is no such dtype or device.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    if dtype not in DTYPES:
        raise DirectiveError(f"--dtype: {dtype!r:.60} is no dtype", hint=f"use {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DirectiveError(
            f"--device: {device!r:.60} cannot be used here: {reason:.120}", hint="use --device cpu"
        ) from error


def _way(
    workers: int | str | None,
    ray: str | None,
    num_cpus: float | str | None,
    num_gpus: float | str | None,
) -> Way:
    """Return the way to measure that the options choose.

    Raises:
        DirectiveError: A number is wrong, or needs --ray.
    """
    count = None if workers is None else inputs.parse_count(workers, "--workers")
    reserved: dict[str, float] = {}
    for name, given in {"num-cpus": num_cpus, "num-gpus": num_gpus}.items():
        if given is not None:
            number = reserved[name[4:]] = inputs.parse_number(given, f"--{name}", float)
            if not 0 <= number < math.inf:
                raise DirectiveError(f"--{name} is {number:g}, not a number from 0")
    if ray is not None:
        ray_actors.check()
        return RayActors(ray, count, **reserved)
    if reserved:
        raise DirectiveError(
            f"--num-{next(iter(reserved))} is for the actors of Ray",
            hint="leave it out, or give --ray, too",
        )
    return Here() if count in {None, 1} else Processes(count)


@dataclass(frozen=True)
class Planner:
    """How the layouts are planned.

    Attributes:
        model: The model, if the directives name none.
        trusted: Whether code from the model may run.
    """

    model: ModelLike | None
    trusted: bool

    def plan(self, text: inputs.Text, warn: Callable[[str], object]) -> ExpansionPlan:
        """Plan a layout.

        Raises:
            InterleaveError: It is refused.
        """
        wanted = _parsed(text, self.model)
        return planned(wanted, trust_remote_code=self.trusted, warn=warn)


def _parsed(text: inputs.Text, model: ModelLike | None) -> Directive:
    """Parse a directive; a model is given to it unless it stacks layers of models that it names."""
    found = inputs.parse(text, {})
    if model is None or (found.growth and found.growth.models):
        return found
    return inputs.parse(text, {"model": model})


class _Plans(Sequence[ExpansionPlan]):
    """The plans of layouts. Another process makes those that it needs again."""

    def __init__(
        self, planner: Planner, texts: Sequence[inputs.Text], made: Iterable[ExpansionPlan] = ()
    ) -> None:
        self._planner = planner
        self._texts = texts
        self._made = dict(enumerate(made))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, row: Any) -> Any:
        if row not in self._made:
            text = self._texts[row]  # raises IndexError, which ends an iteration
            self._made[row] = self._planner.plan(text, lambda _: None)
        return self._made[row]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plans, (self._planner, self._texts)


@dataclass(frozen=True)
class _Work:
    """The layouts to measure.

    Attributes:
        candidates: The layouts.
        plans: The plan of each.
    """

    candidates: tuple[Candidate, ...]
    plans: _Plans

    @property
    def first(self) -> Checkpoint:
        """The model that all of them start from."""
        found: Checkpoint = self.plans[0].first
        return found


def _prepared(
    file: StrPath | None,
    model: ModelLike | None,
    space: str | Sequence[str],
    *,
    trusted: bool,
    warn: Callable[[str], object],
) -> _Work:
    """Plan the layouts to measure.

    Raises:
        InterleaveError: There are none, or a layout of a file is refused.
    """
    names = [space] if isinstance(space, str) else list(space)
    if file is not None and names:
        raise DirectiveError(
            "a file of layouts cannot be combined with --space", hint="leave one of them out"
        )
    planner = Planner(model, trusted)
    if file is not None:
        listed = _listed(Path(file))
        texts = [inputs.Text(each.directive, where) for each, where in listed]
        plans = [planner.plan(text, warn) for text in texts]
        _check_same_model(plans)
        return _Work(tuple(each for each, _ in listed), _Plans(planner, texts, plans))
    depth = base_of(model, trusted=trusted).depth
    found: list[tuple[Candidate, inputs.Text, ExpansionPlan]] = []
    refused: list[InterleaveError] = []
    for each in spaces.candidates(names or [next(iter(spaces.SPACES))], depth):
        text = inputs.Text(each.directive, each.directive)
        try:
            found.append((each, text, planner.plan(text, lambda _: None)))
        except InterleaveError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    if refused:
        total = len(found) + len(refused)
        warn(f"{len(refused)} of {total} layouts are left out, because `run` refuses them, such as "
             f"one of which it says: {refused[0]}")  # fmt: skip
    candidates, texts, plans = map(list, zip(*found, strict=True))
    return _Work(tuple(candidates), _Plans(planner, texts, plans))


def base_of(model: ModelLike | None, *, trusted: bool) -> Checkpoint:
    """Open the model that layouts start from, without a plan, since `run` may refuse some.

    Raises:
        InterleaveError: There is none, or it cannot be grown.
    """
    some = inputs.parse(inputs.Text("append: 1", "--model"), {"model": model})
    models = Models(trust_remote_code=trusted)
    expansion = resolve(some, models, strict=True, allow_non_identity=True)
    return models.open(expansion.base)


def _listed(file: Path) -> list[tuple[Candidate, str]]:
    """Return the layouts of a file, one directive per line, each with its place.

    Raises:
        DirectiveError: It cannot be read, or has none.
    """
    found = [
        (Candidate(line.text.strip(), spaces.FILE), line.where)
        for line in inputs.lines(read_text(file), str(file))
    ]
    if not found:
        raise DirectiveError(
            f"{file}: has no directives", hint="write one a line, such as `repeat: 8:14`"
        )
    return found


def _check_same_model(plans: Sequence[ExpansionPlan]) -> None:
    first = plans[0].first.ref
    for plan in plans:
        if plan.first.ref.identity != first.identity:
            raise DirectiveError(
                f"the layouts start from different models: {first} and {plan.first.ref}",
                hint="scan each model alone",
            )


def scored_sequences(
    tokenizer: Any, text: StrPath | None, items: StrPath | None, most: int, first: Checkpoint
) -> list[ScoredTokens]:
    """Return the sequences of the text and of the items."""
    positions = first.layer_config.get("max_position_embeddings")
    positions = positions if isinstance(positions, int) else None
    found: list[ScoredTokens] = []
    if text is not None or items is None:
        content, where = (
            sequences.default_text() if text is None else (read_text(Path(text)), str(text))
        )
        length = min(_WINDOW, positions or _WINDOW)
        found += sequences.of_text(tokenizer, content, where, most_tokens=most, length=length)
    if items is not None:
        found += sequences.of_items(tokenizer, Path(items), positions)
    return found


_WINDOW = 128
"""The number of tokens of a window of text."""


def _kept(
    out: StrPath | None, work: _Work, scored: Sequence[ScoredTokens], settings: Mapping[str, Any]
) -> Results:
    lengths = [each.scored for each in scored]
    if out is None:
        return results.in_memory(work.candidates, lengths)
    tokens = json.dumps([(each.tokens, each.start) for each in scored])
    record = {
        "model": weight_sample.digest(work.first.path),
        "sequences": hashlib.sha256(tokens.encode()).hexdigest(),
        "kinds": [each.kind for each in scored],
        **settings,
    }
    return results.opened(Path(out), record, work.candidates, lengths)


def _shards(kept: Results, parts: Sequence[Batch]) -> list[Shard]:
    """Return what is not measured yet; first the base, to which all else is compared."""
    groups = [(), *map(tuple, paths.groups(len(kept.candidates), GROUP))]
    shards = [Shard(group, batch) for group in groups for batch in parts]
    return [each for each in shards if not kept.is_measured(each.rows, each.batch.numbers)]


def _measure(kept: Results, measured: Outcomes, bar: Bar, warn: Callable[[str], object]) -> None:
    """Measure what is missing, and keep at once what each shard gives."""
    finished = kept.finished
    with bar(len(kept.candidates) - finished) as tick, closing(measured):
        for shard, found in measured:
            for warning in found.warnings:
                warn(warning)
            kept.note(shard.rows, shard.batch.numbers, found.scores)
            before, finished = finished, kept.finished
            tick(finished - before)


@dataclass(frozen=True)
class Job:
    """What a worker needs to begin.

    Attributes:
        plans: The plan of each layout.
        dtype: The dtype to compute in.
        device: The device; None for a GPU if there is one.
        checked: Sequences to compare the ways to compute scores on.
        digest: The digest of the weights; None if it is not compared.
        most: The maximum bytes of weights and states; None for any number.
    """

    plans: Sequence[ExpansionPlan]
    dtype: str
    device: str | None
    checked: Batch
    digest: str | None
    most: int | None = None

    def start(self, warn: Callable[[str], object]) -> Measure:
        """Load the model, and find out how its layouts can be measured.

        Raises:
            InterleaveError: It cannot be loaded, or is another one on this machine.
        """
        hide_bars()
        first = self.plans[0].first
        if self.digest is not None and weight_sample.digest(first.path) != self.digest:
            raise CheckpointError(f"{first.ref}: the machine {platform.node()} has another model")
        device = self.device or _device()
        if self.most is not None:
            memory_limit.check(first, self.dtype, self.most)
        base = sources.load_source(first, self.dtype, device)
        sampling.check_predicts(base)
        base.eval()
        is_shared = not first.require_family().facts.changes_weights

        def build(plan: ExpansionPlan) -> Any:
            known = {plan.first.ref: base} if is_shared else {}
            return built(plan, known, dtype=self.dtype, device_map=device, warn=warn)

        measure = Measure(base, self.plans, build)
        if self.most is not None:
            measure = memory_limit.limited(measure, first, self.most)
        measure.check(self.checked)
        if measure.reason is not None:
            warn(f"each layout is built as a model of its own, which is slower: {measure.reason}")
        return measure


def _device() -> str:
    import torch  # noqa: PLC0415 - takes seconds to import

    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(
    kept: Results, kinds: Sequence[str], seed: int, top: int, warnings: Sequence[str]
) -> ScanReport:
    found = analysis.analyse(kept.differences, seed=seed, top=top)
    return ScanReport(
        tuple(kept.candidates),
        kept.differences,
        tuple(kept.tokens),
        tuple(kinds),
        found,
        tuple(dict.fromkeys(warnings)),
    )


def with_model(directive: str, model: ModelLike | None) -> str:
    """Return a directive as a file for `run`, with its model if that is known."""
    found = _parsed(inputs.Text(directive, directive), model)
    return yaml_io.write(found.to_document())


def _write(out: Path, report: ScanReport, depth: int, model: ModelLike | None) -> None:
    """Write the directive that helps, if one does, and a map of each space."""
    if report.best is None:
        (out / BEST).unlink(missing_ok=True)
    else:
        replace_file(out / BEST, with_model(report.best, model))
    for space in dict.fromkeys(each.space for each in report.candidates if each.cell):
        cells = {
            each.cell: float(np.mean(report.differences[row]))
            for row, each in enumerate(report.candidates)
            if each.space == space and each.cell is not None
        }
        axes = {"layers": heat_map.TIMES, "drops": heat_map.DROPS}.get(space, heat_map.BLOCKS)
        if space == "windows":
            continue
        svg = heat_map.heat_map(
            cells,
            layers=depth,
            title=f"{space}: change of the log-likelihood",
            legend=["nats per sequence", report.verdict],
            axes=axes,
        )
        name = MAP if space == report.candidates[0].space else f"scan-{space}.svg"
        replace_file(out / name, svg)
