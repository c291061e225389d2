"""Time `run`, with its check of every byte, against `cp`, on a model of the size of a Mistral 7B.

The base has 14.5 GB in three shards, and grows to 18 GB: together more than the memory of most
machines, so that not everything stays in the page cache. That needs 35 GB of disk space. Where less
is free, nothing is measured.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import bench
import models

BASE = models.Size("mistral-7b", 32, 4096, 14_336, 8, shards=3, vocabulary=32_002, head=128)
NEEDED = 35 * 10**9
BEGIN, END = "<!-- measured large -->", "<!-- end large -->"

UNCHECKED = bench.Contender(
    "`run --engine stream --no-verify`", bench.own("--no-verify", synced=True)
)
CONTENDERS = (bench.COPY_SYNCED, bench.STREAM_SYNCED, UNCHECKED)


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="directory for the models")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command, an odd number")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / BASE.name
    free = shutil.disk_usage(folder).free + (bench.size_of(there) if there.exists() else 0)
    if free < NEEDED:
        print(f"not measured: {free / 1e9:.0f} GB of disk space are free, 35 GB are needed")
        return
    try:
        text = measure(folder, arguments.runs)
    finally:
        shutil.rmtree(there, ignore_errors=True)
    bench.publish(text, arguments.page, BEGIN, END)


def measure(folder: Path, runs: int) -> str:
    """Return the figures and the ratio of the times per byte of output."""
    base = models.build(BASE, folder / BASE.name)
    places = {"base": str(base), "out": str(folder / "out")}
    costs = bench.in_turn(CONTENDERS, places, runs)
    result = bench.grown(places)  # zeros are holes, which count as output like all other bytes
    copy, checked, unchecked = (costs[contender] for contender in CONTENDERS)
    nbytes = bench.size_of(base)
    ratio = (checked.wall / result) / (copy.wall / nbytes)
    where = bench.machine()
    return "\n\n".join(
        (
            f"Medians of {runs} runs, measured with `make bench-large`: {where}.",
            bench.table(costs),
            (
                f"{nbytes / 1e9:.1f} GB grow to {result / 1e9:.1f} GB. Per byte of output, `run` "
                f"with its check of every byte takes **{ratio:.2f}** times as long as a copy of "
                f"the base; the check takes {checked.wall - unchecked.wall:.1f} of its "
                f"{checked.wall:.1f} seconds."
            ),
        )
    )


if __name__ == "__main__":
    main()
