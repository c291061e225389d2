"""Write items of arithmetic and logic for `mk-interleave scan --items`, as JSON lines.

The questions are made by reasoning-gym, and solved again; see
`mergekit_interleave/evaluation/offline/reasoning.py`. `evaluate --tasks offline` makes others of
the same kinds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from mergekit_interleave.evaluation.offline.reasoning import make


def main(out: Path, count: int, seed: int) -> None:
    """Write the items, and print how many there are of each kind."""
    items, wrong = make(count, seed)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    out.write_text("".join(lines), encoding="utf-8")
    for name, number in Counter(item["kind"] for item in items).items():
        left_out = f", {wrong[name]} with a wrong answer left out" if wrong[name] else ""
        print(f"{name}: {number}{left_out}")
    print(f"{len(items)} items in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--count", type=int, default=1000, help="the number of items")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random numbers")
    arguments = parser.parse_args()
    main(arguments.out, arguments.count, arguments.seed)
