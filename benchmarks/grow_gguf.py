"""Measure time, memory and disk space of growing a GGUF file; print the ratios of one run.

The model has the sizes of a Llama of 7 billion parameters in Q4_K, random bytes and four splits.
Shared blocks are measured on an XFS image, which only root may mount.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import CP, Contender, Cost, beside, in_turn, machine, publish, table, xfs

from mergekit_interleave._stored_tensor import padded
from mergekit_interleave.gguf import header, values
from mergekit_interleave.gguf.ggml_types import BY_NAME
from mergekit_interleave.gguf.header import Entry
from mergekit_interleave.gguf.model import SPLIT, SPLIT_TENSORS, SPLITS, split_name
from mergekit_interleave.gguf.values import Value

BEGIN, END = "<!-- measured gguf -->", "<!-- end gguf -->"

DIRECTIVE = "interleave: every 4"
_HIDDEN, _INNER, _LAYERS, _VOCABULARY, _SPLITS = 4096, 11008, 32, 32000, 4

RUN = (beside("mk-interleave"), "run", DIRECTIVE, "{out}/grown.gguf", "--model", "{first}")


def _entry(name: str, kind: str, *shape: int) -> Entry:
    row = BY_NAME[kind]
    return Entry(f"{name}.weight", kind, shape, math.prod(shape) // row.elements * row.nbytes)


def _layer(index: int) -> Iterator[Entry]:
    block = f"blk.{index}"
    for name in ("attn_norm", "ffn_norm"):
        yield _entry(f"{block}.{name}", "F32", _HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield _entry(f"{block}.{name}", "Q4_K", _HIDDEN, _HIDDEN)
    for name in ("ffn_gate", "ffn_up"):
        yield _entry(f"{block}.{name}", "Q4_K", _INNER, _HIDDEN)
    yield _entry(f"{block}.ffn_down", "Q6_K", _HIDDEN, _INNER)


def _metadata(layers: int) -> dict[str, Value]:
    numbers = {
        "block_count": layers, "context_length": 4096, "embedding_length": _HIDDEN,
        "feed_forward_length": _INNER, "attention.head_count": 32, "vocab_size": _VOCABULARY,
    }  # fmt: skip
    tokens = [f"token{number}" for number in range(_VOCABULARY)]
    return {
        "general.architecture": values.text("llama"),
        **{f"llama.{key}": values.unsigned(number) for key, number in numbers.items()},
        "general.file_type": values.unsigned(15),
        "tokenizer.ggml.model": values.text("llama"),
        "tokenizer.ggml.tokens": values.texts(tokens),
    }


def build(folder: Path) -> Path:
    """Write the model into a directory, and return its first split."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[Entry]] = [[] for _ in range(_SPLITS)]
    groups[0].append(_entry("token_embd", "Q4_K", _VOCABULARY, _HIDDEN))
    for index in range(_LAYERS):
        groups[index * _SPLITS // _LAYERS] += _layer(index)
    groups[-1].append(_entry("output_norm", "F32", _HIDDEN))
    groups[-1].append(_entry("output", "Q6_K", _VOCABULARY, _HIDDEN))
    total = sum(map(len, groups))
    for number, group in enumerate(groups):
        metadata = {
            **(_metadata(_LAYERS) if number == 0 else {}),
            SPLIT: values.number(2, number),
            SPLITS: values.number(2, _SPLITS),
            SPLIT_TENSORS: values.number(5, total),
        }
        with (folder / split_name("base", number, _SPLITS)).open("wb") as file:
            file.write(header.encode(metadata, group, 3))
            # In small pieces: a child process counts the memory of this one as its own.
            rest = sum(padded(entry.nbytes, 32) for entry in group)
            while rest:
                rest -= file.write(os.urandom(min(rest, 2**20)))
    return folder / split_name("base", 0, _SPLITS)


def many(folder: Path, layers: int, each: int) -> Path:
    """Write a model of many small tensors, and return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry("token_embd", "F32", 8, 8)]
    for index in range(layers):
        names = ("attn_output", "ffn_down", *(f"extra_{number}" for number in range(each - 2)))
        entries += [_entry(f"blk.{index}.{name}", "F32", 8) for name in names]
    file = folder / "many.gguf"
    head = header.encode(_metadata(layers), entries, 3)
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + sum(padded(entry.nbytes, 32) for entry in entries))
    return file


def size_of(folder: Path) -> int:
    """Return the bytes of the GGUF files in a directory."""
    return sum(file.stat().st_size for file in folder.glob("*.gguf"))


def grown_size(base: Path) -> int:
    """Return the bytes of the result."""
    command = [beside("mk-interleave"), "plan", DIRECTIVE, "--model", str(base), "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return int(found["writing"]["nbytes"])


def compare(folder: Path, runs: int) -> str:
    """Compare `run` with a copy."""
    print("GGUF:", file=sys.stderr)
    first = build(folder / "gguf")
    places = {"base": str(first.parent), "first": str(first), "out": str(folder / "out")}
    copy = Contender("`cp -r --reflink=never` of the base, `sync -f`", CP, synced=True)
    run = Contender("`run`", RUN)
    quick = Contender("`run --no-verify`", (*RUN, "--no-verify"))
    plan = Contender("`plan`", (beside("mk-interleave"), "plan", DIRECTIVE, "--model", "{first}"))
    costs = in_turn((run, quick, copy, plan), places, runs)
    base, result = size_of(first.parent), grown_size(first)
    per_byte = (costs[run].wall / result) / (costs[copy].wall / base)
    return "\n\n".join(
        (
            (
                f"### {base / 1e9:.1f} GB of Q4_K and Q6_K in {_SPLITS} splits, {_LAYERS} layers; "
                f"{result / 1e9:.1f} GB after expansion; {runs} runs"
            ),
            table(costs),
            (
                f"`run` takes **{per_byte:.2f}** times as long per byte of output as a copy, with "
                f"{costs[run].peak / 1e6:.0f} MB of memory."
            ),
        )
    )


def shared(folder: Path, runs: int) -> str:
    """Measure what shared blocks save on XFS."""
    title = "### The same file on XFS, where blocks can be shared"
    with xfs(folder, 16 * 2**30) as mount:
        if mount is None:
            return f"{title}\n\nNot measured: only root can mount an image, with `mkfs.xfs`."
        first = build(mount / "gguf")
        places = {"base": str(first.parent), "first": str(first), "out": str(mount / "out")}
        run = Contender("`run`", RUN)
        others = [
            Contender("`run --no-reflink`", (*RUN, "--no-reflink")),
            Contender("`cp -r --reflink=never` of the base, `sync -f`", CP, synced=True),
        ]
        costs = in_turn((run, *others), places, runs, shares=True)
        result = grown_size(first)
    return "\n\n".join(
        (
            title,
            table(costs),
            f"`run` needs new disk space for {costs[run].disk / result:.3%} of the output.",
        )
    )


def tensors(folder: Path, runs: int) -> str:
    """Measure the time and memory of many tensors."""
    count = 100_000
    file = many(folder / "many", 100, count // 100)
    places = {"first": str(file), "out": str(folder / "out"), "base": str(folder)}
    plan = Contender("`plan`", (beside("mk-interleave"), "plan", DIRECTIVE, "--model", "{first}"))
    costs: dict[Contender, Cost] = in_turn((plan, Contender("`run`", RUN)), places, runs)
    return f"### A GGUF file of {count:,} tensors\n\n{table(costs)}"


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="directory for models and results")
    parser.add_argument("--runs", type=int, default=5, help="runs of each command, an odd number")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        (
            f"Medians measured with `make bench-gguf`: {machine()}; all input files are in the "
            "page cache."
        ),
        compare(folder, arguments.runs),
        shared(folder, arguments.runs),
        tensors(folder, arguments.runs),
    ]
    text = "\n\n".join(parts)
    publish(text, arguments.page, BEGIN, END)


if __name__ == "__main__":
    main()
