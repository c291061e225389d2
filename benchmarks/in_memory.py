"""Time `load` with a loaded base against loading the written model, and measure `sample`'s memory.

The bases are SmolLM2 and a Llama of 80 layers, which is a sparse file.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bench
import models
import torch
import transformers
from transformers import AutoModelForCausalLM

import mergekit_interleave as api

DEEP = models.Size("llama-80", 80, 1024, 3584, 8, shards=1, head=128)
LAYOUTS = ("repeat: [8, 14]", "interleave: every 4", "drop: [20, 25]", "repeat: 4:8", "append: 4")
BEGIN, END = "<!-- measured in memory -->", "<!-- end in memory -->"


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("smollm2", type=Path, help="the checkpoint of SmolLM2")
    parser.add_argument("folder", type=Path, help="directory for models")
    parser.add_argument("--runs", type=int, default=7, help="runs of each measurement, odd")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    small, written = arguments.smollm2, folder / "written"
    shutil.rmtree(written, ignore_errors=True)
    api.run(LAYOUTS[0], written, model=small, engine="stream")
    deep = models.build_sparse(DEEP, folder / DEEP.name)
    deeper = models.build_sparse(dataclasses.replace(DEEP, layers=86), folder / "deeper")
    try:
        rows = [
            loading("SmolLM2-135M, 30 layers", small, written, arguments.runs),
            loading("a Llama of 80 layers, 2.3 GB", deep, deeper, arguments.runs),
        ]
    finally:
        for place in (written, deep, deeper):
            shutil.rmtree(place)
    head = f"Medians of {arguments.runs} runs, measured with `make bench-memory`"
    columns = (
        f"`{LAYOUTS[0]}` of",
        "`load` with a loaded base",
        "`from_pretrained` of the written model",
        "ratio",
    )
    table = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |", *rows]
    parts = (f"{head}: {bench.machine()}.", "\n".join(table), memory(arguments.smollm2, folder))
    text = "\n\n".join(parts)
    bench.publish(text, arguments.page, BEGIN, END)


def loading(name: str, base: Path, written: Path, runs: int) -> str:
    """Return a row with the times of `load` and of loading the written model."""
    loaded = AutoModelForCausalLM.from_pretrained(base)
    shared = _median(lambda: api.load(LAYOUTS[0], base=loaded), runs)
    whole = _median(lambda: AutoModelForCausalLM.from_pretrained(written), runs)
    return f"| {name} | {shared:.2f} s | {whole:.2f} s | {shared / whole:.2f} |"


def _median(action: Callable[[], object], runs: int) -> float:
    """Return the median time of an action in seconds, without its first run."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory(base: Path, folder: Path) -> str:
    """Return a sentence about the peak memory of `sample` with one layout and with five."""
    words = ("--prompt", "The capital of France is", "--max-new-tokens", "8", "--model", str(base))
    command = (bench.beside("mk-interleave"), "sample")
    places = {"out": str(folder / "unused")}
    one, five = (
        bench.measure(bench.Contender("sample", (*command, *layouts, *words)), places).peak
        for layouts in (LAYOUTS[:1], LAYOUTS)
    )
    return (
        f"`sample` on SmolLM2 takes {one / 2**20:,.0f} MiB with one layout, and "
        f"**{five / one:.3f}** times as much with five."
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
