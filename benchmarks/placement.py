"""Train the same number of new layers in several places, from several starts; compare the losses.

Every run trains only the new layers of SmolLM2, on the same number of tokens of one book, and
measures the loss on held-out chapters of the book and on a text of another domain. The learning
rate of each start is chosen first, on other pages of the book. A run is a process of its own, whose
result is kept in FOLDER, so the benchmark goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

import mergekit_interleave as api
from mergekit_interleave.directive.directive import parse
from mergekit_interleave.directive.growth import After
from mergekit_interleave.evaluation import paired
from mergekit_interleave.scanning import sequences

HERE = Path(__file__).parent
TEXT = HERE.parent / "examples" / "data" / "compleat-angler.txt"
HELD_OUT = "\nCHAP. XII.\n"
"""The held-out chapters of the book start here, as in `make demo-train`."""

DEPTH, NEW = 30, 6
LENGTH, BATCH, STEPS, WARMUP = 256, 2, 45, 6
PILOT_STEPS = 30
RATES = (2e-4, 6e-4, 2e-3, 6e-3)
"""The learning rates that are tried for each start."""
CHOOSING = 18
"""The windows at the end of the training text on which learning rates are compared."""
SEEDS = (0, 1, 2)
PILOT_SEED = 100

EVERY, TOP, APPENDED, LEAST = "every 5", "top half", "appended", "least important"
PLACEMENTS = (EVERY, TOP, APPENDED, LEAST)
ZEROED, AVERAGE, PLAIN, DAMPED = "zeroed copy", "zeroed average", "plain copy", "damped copy"
STARTS = (ZEROED, AVERAGE, PLAIN, DAMPED)

HELD, OTHER = "held_out", "other"

BEGIN, END = "<!-- measured placement -->", "<!-- end placement -->"
BEGIN_REPEATS, END_REPEATS = "<!-- measured repeats -->", "<!-- end repeats -->"


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        placement: Where the new layers are, one of `PLACEMENTS`.
        start: What their weights are at the start, one of `STARTS`.
        directive: The directive of the deeper model.
        rate: The largest learning rate.
        steps: The number of steps.
        seed: The seed of the order of the windows.
        chooses: Whether the run only serves to choose a learning rate.
    """

    placement: str
    start: str
    directive: str
    rate: float
    steps: int
    seed: int
    chooses: bool = False


def directive(placement: str, start: str, after: Sequence[int]) -> str | None:
    """Return the directive of a cell of the table, or None if there is no such model.

    Args:
        placement: Where the new layers are.
        start: What their weights are at the start.
        after: The layers that they follow.
    """
    if placement == APPENDED:
        return {
            ZEROED: f"append: {NEW}",
            PLAIN: f"append: {NEW}, zero: none",
            DAMPED: f"repeat: {{layers: [-1, end], times: {NEW + 1}, damped: true}}",
        }.get(start)  # behind the last layer there is none to average
    line = f"interleave: after {[*after]}"
    if start == DAMPED:
        return f"layout: [{', '.join(_damped_steps(after))}]"
    return line + {ZEROED: "", AVERAGE: ", from: neighbours", PLAIN: ", zero: none"}[start]


def _damped_steps(after: Sequence[int]) -> Iterator[str]:
    """Yield the steps of a layout in which some layers occur twice, each at half of its update."""
    stop = 0
    for layer in after:
        if layer > stop:
            yield f"[{stop}, {layer}]"
        halves = "{o_proj: 1/2, down_proj: 1/2}"
        yield f"{{layers: [{layer}, {layer + 1}], times: 2, scale: {halves}}}"
        stop = layer + 1
    if stop < DEPTH:
        yield f"[{stop}, {DEPTH}]"


@dataclass(frozen=True)
class Data:
    """The windows of tokens, each of shape (windows, LENGTH).

    Attributes:
        training: Most of the book.
        choosing: The pages after these, to choose learning rates.
        held_out: The last chapters.
        other: A text of another domain: a story of the year 2889, which `scan` measures by default.
    """

    training: Any
    choosing: Any
    held_out: Any
    other: Any


def read(base: Path) -> Data:
    """Tokenize the texts; incomplete last windows are dropped."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    first, _, last = TEXT.read_text(encoding="utf-8").partition(HELD_OUT)
    texts = (first, last, sequences.default_text()[0])
    book, held_out, other = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts
    )
    book, held_out, other = (
        tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        for tokens in (book, held_out, other)
    )
    return Data(book[:-CHOOSING], book[-CHOOSING:], held_out, other)


def perform(base: Path, run: Run) -> dict[str, Any]:
    """Train a model; return the loss of each window before and after, seconds and peak bytes."""
    torch.manual_seed(run.seed)
    data = read(base)
    model = api.load(run.directive, model=base, dtype="float32")
    measured = {"choosing": data.choosing} if run.chooses else {
        HELD: data.held_out, OTHER: data.other
    }  # fmt: skip
    before = {name: _losses(model, rows) for name, rows in measured.items() if not run.seed}
    api.freeze_original_layers(model)
    started = time.monotonic()
    _train(model, data.training, run)
    seconds = time.monotonic() - started
    after = {name: _losses(model, rows) for name, rows in measured.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "after": after, "seconds": seconds, "peak": peak}


def _losses(model: Any, rows: Any) -> list[float]:
    """Return the mean loss per token of each window, in float32."""
    model.eval()
    with torch.no_grad():
        return [float(model(input_ids=row, labels=row).loss) for row in rows.split(1)]


def _train(model: Any, rows: Any, run: Run) -> None:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, run.steps)
    fast = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "bf16"))
    order = torch.randperm(len(rows))[: run.steps * BATCH].view(-1, BATCH)
    for places in order:
        batch = rows[places]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Journal:
    """The results of runs, in a file with one line for each.

    Attributes:
        base: The model.
        file: The file.
        jobs: The number of runs at once.
    """

    base: Path
    file: Path
    jobs: int

    @property
    def results(self) -> dict[Run, dict[str, Any]]:
        """The results by run."""
        lines = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        entries = map(json.loads, lines)
        return {Run(**entry["run"]): entry["result"] for entry in entries}

    def complete(self, runs: Iterable[Run]) -> dict[Run, dict[str, Any]]:
        """Perform the runs that have no result yet; return all results."""
        known = self.results
        missing = [run for run in runs if run not in known]
        with ThreadPoolExecutor(self.jobs) as pool:
            for number, (run, text) in enumerate(
                zip(missing, pool.map(self._apart, missing), strict=True), 1
            ):
                entry = {"run": asdict(run), "result": json.loads(text)}
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                print(f"{number} of {len(missing)}: {run}", file=sys.stderr, flush=True)
        return self.results

    def _apart(self, run: Run) -> str:
        """Perform a run in a process of its own, and return its result as JSON."""
        command = [sys.executable, __file__, str(self.base), "--run", json.dumps(asdict(run))]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return found.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Table:
    """The runs of the table.

    Attributes:
        journal: The results.
        least: The layers that the model needs least, in order.
    """

    journal: Journal
    least: Sequence[int]

    @property
    def cells(self) -> dict[tuple[str, str], str]:
        """The directive of each placement and start."""
        after = {
            EVERY: range(DEPTH // NEW - 1, DEPTH, DEPTH // NEW),
            TOP: [DEPTH // 2 + j * (DEPTH // 2) // NEW - 1 for j in range(1, NEW + 1)],
            APPENDED: (),
            LEAST: self.least,
        }
        found = {
            (place, start): directive(place, start, [*after[place]])
            for place in PLACEMENTS
            for start in STARTS
        }
        return {cell: text for cell, text in found.items() if text is not None}

    @cached_property
    def rates(self) -> Mapping[str, float]:
        """The learning rate of each start: that with the least loss after half of the steps."""
        pilots = [
            Run(EVERY, start, self.cells[EVERY, start], rate, PILOT_STEPS, PILOT_SEED, chooses=True)
            for start in STARTS
            for rate in RATES
        ]
        results = self.journal.complete(pilots)
        best: dict[str, Run] = {}
        for run in pilots:
            if run.start not in best or _mean(results, run) < _mean(results, best[run.start]):
                best[run.start] = run
        return {start: run.rate for start, run in best.items()}

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """Return the runs of all cells, those of one seed after another."""
        return [
            Run(*cell, text, self.rates[cell[1]], STEPS, seed)
            for seed in seeds
            for cell, text in self.cells.items()
        ]

    def text(self, seeds: Sequence[int]) -> str:
        """Perform the runs, and return the table."""
        runs = self.runs(seeds)
        results = self.journal.complete(runs)
        found = {
            cell: Outcome.of([results[r] for r in runs if (r.placement, r.start) == cell])
            for cell in self.cells
        }
        first = found[EVERY, ZEROED]
        others = [cell for cell in found if cell != (EVERY, ZEROED)]
        chances = paired.holm([found[cell].against(first, HELD).chance for cell in others])
        chance_of = dict(zip(others, chances, strict=True))
        rows = [(*cell, *each.cells(first, chance_of.get(cell))) for cell, each in found.items()]
        rates = ", ".join(f"{start} {rate:g}" for start, rate in self.rates.items())
        base = {name: statistics.mean(first.before[name]) for name in (HELD, OTHER)}
        about = (
            f"Measured by `make placement`: {bench.machine()}; {len(seeds)} seeds; {NEW} new "
            f"layers; {STEPS * BATCH * LENGTH:,} tokens for each run. Learning rates: {rates}. The "
            f"base has a loss of {base[HELD]:.3f} nats per token on the held-out chapters and of "
            f"{base[OTHER]:.3f} on the other text."
        )
        return "\n".join([about, "", *_table(HEAD, rows)])


@dataclass(frozen=True)
class Outcome:
    """What the runs of a cell measured, for each text.

    Attributes:
        before: The loss of each window before training.
        after: The loss of each window after training, for each seed.
        peak: The most bytes of memory of a run.
        seconds: The time of the fastest training, which other processes disturbed least.
    """

    before: Mapping[str, Sequence[float]]
    after: Mapping[str, Sequence[Sequence[float]]]
    peak: int
    seconds: float

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Outcome:
        """Join the results of several seeds, the first of which measured the start."""
        return cls(
            results[0]["before"],
            {name: [each["after"][name] for each in results] for name in (HELD, OTHER)},
            max(each["peak"] for each in results),
            min(each["seconds"] for each in results),
        )

    def against(self, other: Outcome, text: str) -> paired.Difference:
        """Compare the losses after training with those of other runs, window by window."""
        return _paired(self.after[text], other.after[text])

    def cells(self, first: Outcome, chance: float | None) -> Iterator[str]:
        """Yield the cells of the row.

        Args:
            first: The runs of the first row.
            chance: The corrected chance of the difference from these; None for themselves.
        """
        means = [statistics.mean(losses) for losses in self.after[HELD]]
        base = [first.before[OTHER]] * len(self.after[OTHER])
        yield f"{statistics.mean(self.before[HELD]):.3f}"
        yield f"{statistics.mean(means):.3f}"
        yield f"{max(means) - min(means):.3f}"
        yield "" if chance is None else _signed(self.against(first, HELD))
        yield "" if chance is None else f"{100 * chance:.1f} %"
        yield _signed(_paired(self.after[OTHER], base))
        yield f"{self.peak / 1e9:.1f} GB"
        yield f"{self.seconds:.0f} s"


HEAD = (
    "placement", "start", "loss at the start", "loss after training", "range of the seeds",
    "against the first row", "chance", "other text, against the base", "memory", "fastest training",
)  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _paired(
    found: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> paired.Difference:
    """Compare losses, of shape (seeds, windows); the seeds of a window count as one group."""
    base, grown = (np.array(losses, dtype=np.float64).ravel() for losses in (other, found))
    groups = np.tile(np.arange(len(found[0])), len(found))
    return paired.difference(paired.Pairs(base, grown, np.ones(len(groups)), groups))


def _signed(found: paired.Difference) -> str:
    low, high = found.interval
    return f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean(results: Mapping[Run, Any], run: Run) -> float:
    losses: list[float] = results[run]["after"]["choosing"]
    return statistics.mean(losses)


def least_important(base: Path, file: Path) -> list[int]:
    """Return the layers after which `scan --for training` puts new ones; kept in a file."""
    if not file.is_file():
        file.write_text(str(api.scan_for_training(model=base, add=NEW).directive), "utf-8")
    growth = parse(file.read_text("utf-8"), str(file)).growth
    if not isinstance(growth, After):
        raise TypeError("the scan proposes no layers")
    return [*growth.layers]


def repeats(base: Path, folder: Path) -> str:
    """Measure the model with each layer applied twice, plain and damped; return the table."""
    lines = [
        f"repeat: {{layers: [{i}, {i + 1}]{damped}}}"
        for i in range(DEPTH)
        for damped in ("", ", damped: true")
    ]
    file = folder / "repeats.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = api.scan(file, model=base, dtype="bfloat16", out=folder / "repeats")
    per_token = -report.differences / np.array(report.tokens)
    rows, better = [], 0
    for layer in range(DEPTH):
        plain, damped = per_token[2 * layer], per_token[2 * layer + 1]
        zeros = np.zeros_like(plain)
        between = _paired([damped], [plain])
        better += between.interval[1] < 0
        found = (_paired([plain], [zeros]), _paired([damped], [zeros]), between)
        rows.append((str(layer), *map(_percent, found)))
    about = (
        f"Measured by `make placement` on {sum(report.tokens):,} tokens of the text that `scan` "
        f"uses by default, in {len(report.tokens)} windows, in bfloat16. Damped is better for "
        f"{better} of {DEPTH} layers, judged by the 95 % interval of the last column, which is "
        "not corrected."
    )
    head = ("layer", "twice", "twice, damped", "damped against plain")
    return "\n".join([about, "", *_table(head, rows)])


def _percent(found: paired.Difference) -> str:
    """Return a change of the perplexity in percent, with its interval."""
    mean, low, high = (100 * math.expm1(value) for value in (found.mean, *found.interval))
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    """Perform the runs, print the tables, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="directory of SmolLM2")
    parser.add_argument("folder", type=Path, nargs="?", help="directory for the results")
    parser.add_argument("--page", type=Path, help="page to write the tables into")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="the number of runs at once")
    parser.add_argument("--run", help="perform only this run, and print its result")
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(perform(arguments.base, Run(**json.loads(arguments.run)))))
        return
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.base, folder / "placement.jsonl", arguments.jobs)
    table = Table(journal, least_important(arguments.base, folder / "least-important.yml"))
    bench.publish(table.text(range(arguments.seeds)), arguments.page, BEGIN, END)
    bench.publish(repeats(arguments.base, folder), arguments.page, BEGIN_REPEATS, END_REPEATS)


if __name__ == "__main__":
    main()
