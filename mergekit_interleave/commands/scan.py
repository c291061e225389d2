"""`scan`: measure many layouts of one model on text and items, and say which of them help."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_interleave._files import replace_file
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint.meta_model import hide_bars, memory_errors
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.scan_job import (
    BATCH,
    GROUP,
    Job,
    check_place,
    digests,
    to_check,
)
from mergekit_interleave.commands.scan_plans import Planner, Work, accepted, prepared, with_model
from mergekit_interleave.commands.scan_sequences import read_content, scored_sequences
from mergekit_interleave.engines.protocol import Bar, no_bar
from mergekit_interleave.errors import DirectiveError, collected_warnings
from mergekit_interleave.scanning import (
    allocator,
    analysis,
    combinations,
    heat_map,
    paths,
    ray_actors,
    results,
    spaces,
    verdict,
)
from mergekit_interleave.scanning.batches import Batch, batches
from mergekit_interleave.scanning.combinations import COMBINED, Blocks
from mergekit_interleave.scanning.distribution import Here, Outcomes, Shard, Way
from mergekit_interleave.scanning.measure import to_compare
from mergekit_interleave.scanning.processes import Processes
from mergekit_interleave.scanning.ray_actors import RayActors
from mergekit_interleave.scanning.results import Results
from mergekit_interleave.scanning.sequences import ScoredTokens
from mergekit_interleave.scanning.spaces import Candidate
from mergekit_interleave.scanning.verdict import Measured

BEST, MAP = "best.yml", "scan.svg"

TOP = 5
"""How many layouts the report lists by default."""


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
        chosen = [row for row, each in enumerate(self.candidates) if each.space == COMBINED]
        return Measured(layouts, self.tokens, self.kinds, broken.tolist(), chosen)


def scan(  # noqa: PLR0913 - one parameter for each option
    candidates: StrPath | None = None,
    *,
    model: ModelLike | None = None,
    space: str | Sequence[str] = (),
    combine: int | str | None = None,
    text: StrPath | None = None,
    items: StrPath | None = None,
    tokens: int | str | None = None,
    out: StrPath | None = None,
    top: int | str = TOP,
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
        combine: The largest number of blocks that are combined. The space `blocks` is measured
            first; then, in each round, one more block is added to the best layouts of the round
            before.
        text: A file with text. If there are no items either, one that comes with this package is
            used.
        items: A file with one item per line, in JSON: `prompt`, `answer`, and perhaps `choices`.
        tokens: The maximum number of tokens of the text; by default 4096.
        out: The directory for the results. The same call resumes a scan that was stopped there.
        top: How many of the best layouts the report lists.
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
    content, shown = read_content(text, items, tokens), inputs.parse_count(top, "--top")
    chosen = inputs.parse_number(seed, "--seed", int)
    if chosen < 0:
        raise DirectiveError(f"--seed is {chosen}, not a whole number from 0 up")
    together = 1 if combine is None else inputs.parse_count(combine, "--combine", least=2)
    most = inputs.parse_size(max_memory, "--max-memory")
    way = _way(workers, ray, num_cpus, num_gpus)
    check_place(dtype, device if ray is None else None)
    with (
        restored_settings(),
        allocator.restored(),
        collected_warnings() as warnings,
        memory_errors(),
        scratch_directory() as scratch,
    ):
        # Other machines of a Ray cluster have no such directory.
        planner = Planner(model, trust_remote_code, scratch if ray is None else None)
        work = prepared(candidates, planner, space, warnings.append)
        if combine is not None:
            _check_combine(together, work)
        hide_bars()
        scored = scored_sequences(work.first, content, warnings.append)
        analysis.split(len(scored), chosen)  # refuses too few sequences before any work
        plans = work.plans
        models = {} if out is None and ray is None else digests(plans.values())
        settings = {"models": [*models.values()], "dtype": dtype, "seed": chosen}
        with _kept(out, work, scored, settings) as kept:
            parts = batches(scored, BATCH)
            job = Job(
                work.planner, next(iter(plans)), to_compare(plans), to_check(parts),
                dtype, device, None if ray is None else models, most,
            )  # fmt: skip
            with way.started(job) as score:
                rounds = _combined(kept, together, work.first.depth, chosen)
                for wanted in itertools.chain([work.candidates], rounds):
                    known = {each.directive for each in kept.candidates}
                    new = [each for each in wanted if each.directive not in known]
                    if found := accepted(work.planner.outcomes(new)):
                        kept.extend([*found])
                    if shards := _shards(kept, parts):
                        _measure(kept, score(shards), progress or no_bar, warnings.append)
            said = kept.note_report(shown, warnings)
    report = _report(kept, [each.kind for each in scored], chosen, shown, said)
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
    if np.isnan(kept.scores).any():
        total = len(kept.candidates)
        raise DirectiveError(
            f"{directory}: {total - kept.finished} of {total} layouts are not measured yet",
            hint="give the command that started the scan again, to resume it",
        )
    said = tuple(record.get("warnings", ()))
    return _report(kept, record["kinds"], record["seed"], record.get("top", TOP), said)


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


def _kept(
    out: StrPath | None, work: Work, scored: Sequence[ScoredTokens], settings: Mapping[str, Any]
) -> AbstractContextManager[Results]:
    lengths = [each.scored for each in scored]
    if out is None:
        return nullcontext(results.in_memory(work.candidates, lengths))
    tokens = json.dumps([(each.tokens, each.start) for each in scored])
    record = {
        "sequences": hashlib.sha256(tokens.encode()).hexdigest(),
        "kinds": [each.kind for each in scored],
        **settings,
    }
    return results.opened(Path(out), record, work.candidates, lengths)


def _check_combine(count: int, work: Work) -> None:
    """Check that blocks can be combined.

    Raises:
        DirectiveError: There are none, or fewer than are wanted.
    """
    if all(each.space != spaces.BLOCKS for each in work.candidates):
        raise DirectiveError(
            "--combine needs the layouts of the space blocks", hint="add --space blocks"
        )
    if count > work.first.depth:
        raise DirectiveError(
            f"--combine is {count}, but a model of {work.first.depth} layers has no more blocks"
            " that do not overlap",
            hint="use --combine 2" if work.first.depth > 1 else "leave --combine out",
        )


def _combined(kept: Results, count: int, depth: int, seed: int) -> Iterator[list[Candidate]]:
    """Yield combinations of 2 to `count` blocks, each time after those before it are measured."""
    known: dict[str, Blocks] = {
        each.directive: (each.cell,)
        for each in kept.candidates
        if each.space == spaces.BLOCKS and each.cell is not None
    }
    ranked = _ranked(kept, known, seed)
    blocks = [block for own in ranked for block in own]
    for _ in range(count - 1):
        found = combinations.extended(_ranked(kept, known, seed), blocks)
        known = {combinations.directive(each, depth): each for each in found}
        yield [Candidate(directive, COMBINED) for directive in known]


def _ranked(kept: Results, known: Mapping[str, Blocks], seed: int) -> list[Blocks]:
    """Return those of some layouts that have scores, best on the selection part first.

    Args:
        kept: The scores.
        known: The blocks of each layout, by its directive.
        seed: The seed of the split.
    """
    rows = analysis.ranking(kept.differences, seed=seed)
    directives = (kept.candidates[row].directive for row in rows)
    return [known[directive] for directive in directives if directive in known]


def _shards(kept: Results, parts: Sequence[Batch]) -> list[Shard]:
    """Return what is not measured yet; first the base, to which all else is compared."""
    groups = [(), *map(tuple, paths.groups(len(kept.candidates), GROUP))]
    shards = [
        Shard(
            tuple(1 + layout for layout in group) or (0,),
            tuple(kept.candidates[layout].directive for layout in group),
            batch,
        )
        for group in groups
        for batch in parts
    ]
    return [each for each in shards if not kept.is_measured(each.rows, each.batch.numbers)]


def _measure(kept: Results, measured: Outcomes, bar: Bar, warn: Callable[[str], object]) -> None:
    """Measure what is missing, and keep at once what each shard gives."""
    finished = kept.finished
    with bar(len(kept.candidates) - finished) as tick:
        for shard, found in measured:
            for warning in found.warnings:
                warn(warning)
            kept.note(shard.rows, shard.batch.numbers, found.scores)
            before, finished = finished, kept.finished
            tick(finished - before)


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


def _write(out: Path, report: ScanReport, depth: int, model: ModelLike | None) -> None:
    """Write the directive that helps, if one does, and a map of each space."""
    if report.best is None:
        (out / BEST).unlink(missing_ok=True)
    else:
        replace_file(out / BEST, with_model(report.best, model))
    best = report.analysis.best
    helps = None if best is None else report.candidates[best.layout]
    for space in dict.fromkeys(each.space for each in report.candidates if each.cell):
        cells = {
            each.cell: float(np.mean(report.differences[row]))
            for row, each in enumerate(report.candidates)
            if each.space == space and each.cell is not None
        }
        svg = heat_map.heat_map(
            cells,
            layers=depth,
            title=f"{space}: change of the log-likelihood",
            legend=["nats per sequence", report.verdict],
            axes=spaces.SPACES[space].axes,
            helps=helps.cell if helps is not None and helps.space == space else None,
        )
        name = MAP if space == report.candidates[0].space else f"scan-{space}.svg"
        replace_file(out / name, svg)
