"""Time a scan of SmolLM2 against bare matrix products, and against model by model.

All are timed in one process, in turn. Loading and scoring single models is timed on a sample.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_interleave as api
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands.load import built, planned
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import likelihood, paths, sequences, spaces
from mergekit_interleave.scanning.batches import Batch, batches
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.scanning.paths import Step

BEGIN, END = "<!-- measured scan -->", "<!-- end scan -->"
TOKENS, GROUP, SAMPLE = 1016, 64, 5
"""The scored tokens: 8 windows of 128 tokens, which share one each. The layouts at once. The models
that are timed one by one."""


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("smollm2", type=Path, help="the checkpoint of SmolLM2")
    parser.add_argument("folder", type=Path, help="directory for models")
    parser.add_argument("--every", type=int, default=1, help="measure every Nth layout only")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(arguments.smollm2, dtype=torch.float32).eval()
    text, where = sequences.default_text()
    tokenizer = AutoTokenizer.from_pretrained(arguments.smollm2)
    scored = sequences.of_text(tokenizer, text, where, most_tokens=TOKENS)
    (batch,) = batches(scored, 1024)
    layouts = spaces.candidates(["blocks"], 30)[:: arguments.every]
    plans = [_planned(each.directive, arguments.smollm2) for each in layouts]
    measure = Measure(base, plans, partial(_built, base))
    scan = _timed(lambda: _scan(measure, batch))
    products = _products(base, batch, plans)
    sample = plans[:: max(1, len(plans) // SAMPLE)][:SAMPLE]
    alone = _each(lambda plan: likelihood.scores(_built(base, plan), batch), sample)
    written = _each(partial(_written, batch, arguments), sample[:2])
    count = len(plans)
    rows = [
        ("`scan --space blocks`, both cores", scan),
        ("the matrix products that it needs", products),
        ("`load` and score of each layout", alone * count),
        ("mergekit-yaml, `from_pretrained` and score of each layout", written * count),
    ]
    table = [
        f"| {count} layouts of SmolLM2-135M, {batch.width * len(scored):,} tokens | time | ratio |",
        "| --- | --- | --- |",
        *(f"| {name} | {seconds:,.0f} s | {seconds / scan:.2f} |" for name, seconds in rows),
    ]
    head = (
        f"Measured with `make bench-scan`: {bench.machine()}. Single models were timed on a sample."
    )
    result = "\n\n".join((head, "\n".join(table)))
    print(result)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(bench.spliced(page, BEGIN, END, result), encoding="utf-8")


def _planned(directive: str, model: Path) -> ExpansionPlan:
    wanted = inputs.parse(inputs.Text(directive, directive), {"model": model})
    return planned(wanted, warn=print)


def _built(base: Any, plan: ExpansionPlan) -> Any:
    return built(plan, {plan.first.ref: base}, warn=print)


def _scan(measure: Measure, batch: Batch) -> None:
    measure.base_scores(batch)
    for rows in paths.groups(len(measure.plans), GROUP):
        measure.scores(list(rows), batch)


def _products(base: Any, batch: Batch, plans: Sequence[ExpansionPlan]) -> float:
    """Return the seconds of the matrix products of a scan: its layers and one head per layout."""
    rows = len(batch.sequences) * batch.width
    layers = sum(
        paths.size(paths.tree({row: paths.path_of(plans[row].layout) for row in group}))
        for group in paths.groups(len(plans), GROUP)
    )
    base_path = {0: tuple(Step(index) for index in range(30))}
    weights = [each for each in base.model.layers[0].parameters() if each.ndim > 1]
    head = base.get_output_embeddings().weight
    one_layer = _median(lambda: _multiply(weights, rows))
    one_head = _median(lambda: _multiply([head] * len(batch.sequences), batch.width))
    return one_layer * (layers + paths.size(paths.tree(base_path))) + one_head * (len(plans) + 1)


def _multiply(weights: Sequence[Any], rows: int) -> None:
    with torch.inference_mode():
        for weight in weights:
            torch.matmul(torch.empty(rows, weight.shape[1]), weight.t())


def _written(batch: Batch, arguments: argparse.Namespace, plan: ExpansionPlan) -> None:
    """Write a layout with mergekit-yaml, load it, and score it."""
    out, recipe = arguments.folder / "scan-out", arguments.folder / "scan.yml"
    recipe.write_text(api.gen(plan.expansion.directive), encoding="utf-8")
    command = [bench.beside("mergekit-yaml"), str(recipe), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    likelihood.scores(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), batch)
    shutil.rmtree(out)


def _each(action: Callable[[ExpansionPlan], object], plans: Sequence[ExpansionPlan]) -> float:
    """Return the mean seconds for a plan."""
    return statistics.fmean(_timed(partial(action, plan)) for plan in plans)


def _median(action: Callable[[], object]) -> float:
    """Return the median seconds of an action."""
    return statistics.median(_timed(action) for _ in range(9))


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
