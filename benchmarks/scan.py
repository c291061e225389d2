"""Time a scan of SmolLM2 against bare matrix products, single models and layer-scan.

Matrix products and single models are timed between the parts of the scan, since the speed of a
machine changes within its quarter of an hour. Single models and layer-scan are timed on a sample of
the layouts. With a GPU, a model of 7 billion parameters is scanned, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import bench
import models
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_interleave as api
from mergekit_interleave.commands.scan_job import GROUP, Job, to_check
from mergekit_interleave.commands.scan_plans import Planner
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import allocator, paths, sequences, spaces
from mergekit_interleave.scanning.batches import Batch, batches
from mergekit_interleave.scanning.distribution import Here, Shard
from mergekit_interleave.scanning.measure import to_compare

BEGIN, END = "<!-- measured scan -->", "<!-- end scan -->"
TOKENS = 1016
"""The scored tokens: 8 windows of 128 tokens, which share one each."""

OPENCHAT = models.Size("openchat", 32, 4096, 14336, 8, shards=1, vocabulary=32_002, head=128)
LAYER_SCAN = ("layer-scan==0.2.2", "plotly", "narwhals")

SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(json.load(open(sys.argv[2])))
with torch.inference_mode():
    print(float(model(input_ids=tokens, labels=tokens).loss))
"""
"""Prints the loss of a model, whose directory is given, on the tokens in a file."""


@dataclasses.dataclass
class Case:
    """A model, the layouts of its space `blocks`, and what they are measured on.

    Attributes:
        place: The checkpoint.
        base: The loaded model.
        batch: The windows of the default text.
        folder: A directory for files.
        every: Every Nth layout is measured.
    """

    place: Path
    base: Any
    batch: Batch
    folder: Path
    every: int = 1

    @cached_property
    def plans(self) -> dict[str, ExpansionPlan]:
        """The plan of each layout, by its directive."""
        return self._planned(Planner(self.place, trusted=False))

    def _planned(self, planner: Planner) -> dict[str, ExpansionPlan]:
        depth = self.base.config.num_hidden_layers
        layouts = spaces.candidates(["blocks"], depth)[:: self.every]
        return {each.directive: planner.of(each.directive) for each in layouts}

    @property
    def groups(self) -> list[Sequence[int]]:
        """The parts of the scan, each the rows of its layouts."""
        return [*paths.groups(len(self.plans), GROUP)]

    @property
    def sample(self) -> list[str]:
        """One layout for each part; their mean number of layers is that of all."""
        order = sorted(self.plans, key=lambda each: len(self.plans[each].layout))
        count = len(self.groups)
        return [order[len(order) * (1 + 2 * at) // (2 * count)] for at in range(count)]

    @property
    def rows(self) -> Any:
        """The tokens of the windows, of shape (windows, tokens)."""
        return torch.tensor(self.batch.rows(), device=self.base.device)

    @property
    def tokens(self) -> int:
        """The number of tokens that each layout is given."""
        return self.batch.width * len(self.batch.sequences)

    def scan(
        self, batch: Batch | None = None, after: Callable[[int], object] | None = None
    ) -> float:
        """Return the seconds to plan, load and check, and to measure all layouts, as `scan` does.

        Args:
            batch: What is measured; by default the windows.
            after: Called with the number of each part when it is measured, and not timed.
        """
        start = time.perf_counter()
        planner = Planner(self.place, trusted=False)
        plans, batch = self._planned(planner), batch or self.batch
        layouts, dtype = [*plans], str(self.base.dtype).removeprefix("torch.")
        job = Job(planner, layouts[0], to_compare(plans), to_check([batch]), dtype, None, None)
        with allocator.restored(), Here().started(job) as score:
            [*score([Shard((0,), (), batch)])]
            seconds = time.perf_counter() - start
            for number, group in enumerate(self.groups):
                rows = tuple(1 + row for row in group)
                part = Shard(rows, tuple(layouts[row] for row in group), batch)
                seconds += _timed(partial(list, score([part])))
                if after is not None:
                    after(number)
        return seconds

    @property
    def evaluations(self) -> int:
        """How often a layer is applied, without the base."""
        found = [paths.path_of(plan.layout) for plan in self.plans.values()]
        return sum(
            paths.size(paths.tree({row: found[row] for row in group})) for group in self.groups
        )

    def products(self) -> float:
        """Return the seconds of the matrix products of the scan, at their fastest.

        These are those of its layers, and one head for each layout. On several processors, one
        process for each may be faster than several threads of one.
        """
        layers = self.evaluations + self.base.config.num_hidden_layers
        weights = [each for each in self.base.model.layers[0].parameters() if each.ndim > 1]
        head = self.base.get_output_embeddings().weight
        scored = sum(each.scored for each in self.batch.sequences)
        threads = torch.get_num_threads()
        found: list[float] = []
        for count in {1, threads}:
            torch.set_num_threads(count)
            one_layer = _median(partial(_multiply, weights, self.tokens))
            one_head = _median(partial(_multiply, [head], scored))
            total = one_layer * layers + one_head * (len(self.plans) + 1)
            found.append(total * count / threads)
        torch.set_num_threads(threads)
        return min(found)

    def loaded(self, directive: str) -> None:
        """Build a layout in memory, and compute its loss."""
        _loss(api.load(directive, model=self.place, base=self.base), self.rows)

    def written(self, directive: str, *, script: bool) -> None:
        """Write a layout with mergekit-yaml, load it, and compute its loss.

        Args:
            directive: The layout.
            script: Whether a process of its own loads it, as from the shell.
        """
        out, recipe = self.folder / "scan-out", self.folder / "scan.yml"
        recipe.write_text(api.gen(directive, model=self.place), encoding="utf-8")
        subprocess.run(
            [bench.beside("mergekit-yaml"), str(recipe), str(out)], check=True, capture_output=True
        )
        if script:
            tokens = self.folder / "tokens.json"
            tokens.write_text(json.dumps(self.batch.rows()), encoding="utf-8")
            command = [sys.executable, "-c", SCRIPT, str(out), str(tokens)]
            subprocess.run(command, check=True, capture_output=True)
        else:
            _loss(_loaded(out), self.rows)
        shutil.rmtree(out)


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("smollm2", type=Path, help="the checkpoint of SmolLM2")
    parser.add_argument("folder", type=Path, help="directory for models")
    parser.add_argument("--every", type=int, default=1, help="measure every Nth layout only")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    smollm2, folder = arguments.smollm2.resolve(), arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts = windows(smollm2, TOKENS)
    smollm2_case = Case(smollm2, _loaded(smollm2), texts, folder, arguments.every)
    parts = [f"Measured with `make bench-scan`: {bench.machine()}."]
    measures: list[Callable[[], str]] = [
        lambda: of_text(smollm2_case),
        lambda: on_gpu(texts, arguments.every, folder),
        lambda: growth(smollm2, folder),
    ]
    for measure in measures:
        parts.append(measure())
        print(parts[-1], flush=True)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        text = bench.spliced(page, BEGIN, END, "\n\n".join(parts))
        arguments.page.write_text(text, encoding="utf-8")


def of_text(case: Case) -> str:
    """Compare a scan of a text with all other ways, and one of single tokens with layer-scan."""
    count, times = len(case.plans), []

    def others(part: int) -> None:
        """Time the matrix products, and one layout as a single model, per layout."""
        directive = case.sample[part]
        times.append(
            (
                case.products() / count,
                _timed(partial(case.loaded, directive)),
                _timed(partial(case.written, directive, script=False)),
                _timed(partial(case.written, directive, script=True)),
            )
        )

    scan = case.scan(after=others)
    products, alone, written, with_script = (
        statistics.fmean(column) * count for column in zip(*times, strict=True)
    )
    few, theirs = case.scan(_last_tokens(case.batch)), _layer_scan(case) * count
    rows = [
        ("`scan --space blocks`", "all", scan, scan),
        ("the matrix products that it needs", "all", products, scan),
        ("`load` and the loss, for each layout", "all", alone, scan),
        ("mergekit-yaml, `from_pretrained`, the loss: one script for all", "all", written, scan),
        ("mergekit-yaml, `from_pretrained`, the loss: a script for each", "all", with_script, scan),
        ("`scan --space blocks` of items", "last of each", few, few),
        ("layer-scan 0.2.2", "last of each", theirs, few),
    ]
    head = f"{count} layouts of SmolLM2-135M, {len(case.batch.sequences)} windows of 128 tokens"
    return "\n".join(
        [
            f"| {head} | scored tokens | time | ratio |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {scored} | {seconds:,.0f} s | {seconds / to:.2f} |"
                for name, scored, seconds, to in rows
            ),
            "",
            (
                f"All were timed in one run, in one process with torch imported, but for the "
                f"scripts. {len(case.groups)} layouts were timed as single models, one after each "
                "part of the scan, and layer-scan on 21; both have the mean number of layers. In "
                "this process, freed memory is kept for all, as a scan keeps it. The last two rows "
                "are compared with each other."
            ),
        ]
    )


def on_gpu(batch: Batch, every: int, folder: Path) -> str:
    """Compare a scan of a model of 7 billion parameters with its matrix products, on a GPU."""
    if not torch.cuda.is_available():
        return "A model of 7 billion parameters on a GPU was not measured: there was no GPU."
    place = models.build(OPENCHAT, folder / OPENCHAT.name)
    base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, device_map="cuda")
    case = Case(place, base.eval(), batch, folder, every)
    case.scan()  # the first one compiles
    scan, products = case.scan(), case.products()
    return (
        f"{torch.cuda.get_device_name()}: a Llama of the size of OpenChat, 32 layers, random "
        f"weights, bfloat16, {len(case.plans)} layouts, {case.tokens:,} tokens: {scan:.1f} s, "
        f"**{scan / products:.2f}** times its matrix products."
    )


def growth(smollm2: Path, folder: Path) -> str:
    """Measure how the time grows with the number of layers and of tokens."""
    rows = []
    for depth, tokens in ((8, TOKENS), (16, TOKENS), (16, 508), (16, 254)):
        place = folder / f"{depth}-layers"
        api.run(f"drop: {depth}:30", place, model=smollm2, engine="stream", force=True)
        case = Case(place, _loaded(place), windows(smollm2, tokens), folder)
        layouts, steps = len(case.plans), case.evaluations
        rows.append(f"| {depth} | {tokens:,} | {layouts} | {steps:,} | {case.scan():,.1f} s |")
        shutil.rmtree(place)
    what = "Each time includes planning, loading the model, and the check before a scan."
    head = "| layers | scored tokens | layouts | evaluations of a layer | time |"
    return "\n".join((what, "", head, "| --- | --- | --- | --- | --- |", *rows))


def windows(smollm2: Path, tokens: int) -> Batch:
    """Return windows of the default text, as one batch."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text, where = sequences.default_text()
    (batch,) = batches(sequences.of_text(tokenizer, text, where, most_tokens=tokens), 1024)
    return batch


def _last_tokens(batch: Batch) -> Batch:
    """Return the same sequences, of which only the last token is scored."""
    return Batch(
        batch.numbers,
        tuple(dataclasses.replace(each, start=len(each.tokens) - 1) for each in batch.sequences),
    )


def _loaded(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def _multiply(weights: Sequence[Any], rows: int) -> None:
    with torch.inference_mode():
        for weight in weights:
            torch.matmul(weight.new_empty(rows, weight.shape[1]), weight.t())


def _loss(model: Any, tokens: Any) -> float:
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


def _layer_scan(case: Case) -> float:
    """Return the seconds that layer-scan takes for a layout.

    Its texts are the windows, of which it scores the last token.
    """
    installed, out = case.folder / "layer-scan", case.folder / "layer-scan-out"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(installed), *LAYER_SCAN], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(case.place)
    samples = [
        {"prompt": tokenizer.decode(each.tokens), "correct_answer": 1}
        for each in case.batch.sequences
    ]
    probe = case.folder / "probe.json"
    probe.write_text(json.dumps({"name": "windows", "samples": samples}), encoding="utf-8")
    words = {
        "--model": case.place, "--probe": "custom", "--custom-probe": probe, "--output": out,
        "--dtype": "float32", "--min-block": 2, "--step": 5,
    }  # fmt: skip
    command = [sys.executable, "-c", "from layer_scan.cli import app; app()", "scan"]
    command += [str(word) for pair in words.items() for word in pair]
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return float(found["scan_time_seconds"]) / int(found["configs_scanned"])


def _median(action: Callable[[], object]) -> float:
    """Return the median seconds of an action, without its first run."""
    return statistics.median([*_times(action, 6)][1:])


def _times(action: Callable[[], object], count: int) -> Iterator[float]:
    for _ in range(count):
        yield _timed(action)


def _timed(action: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
