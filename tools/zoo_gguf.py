"""Grow a toy GGUF file of each type by `run`, and compare it with its base in llama.cpp.

Usage: zoo_gguf.py PAGE [TYPE]

Without TYPE, do so for every type that the converter of llama.cpp converts, and write the table
into PAGE. With TYPE, print the rows of that type and its variants, and write nothing.

An identity must give the same greedy tokens and exactly the same log-probabilities as its base.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from clients import gguf_bases
from clients import llama_cpp as client

import mergekit_interleave as api
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf import header
from mergekit_interleave.gguf.model import ARCHITECTURE
from mergekit_interleave.planning import llama_cpp as periods
from mergekit_interleave.verification import llama_cpp

EQUAL, LOADS, REFUSED, WRONG = "equal", "loads", "refused", "wrong"
"""The results: the outputs of the base; of a model that is no identity; `run` refuses; a fault."""

REPEAT = "repeat: [2, 5]"
_PROMPTS, _LENGTH, _COUNT = 2, 40, 12
_CHECKS = ("_check_depth", "_check_kinds", "_check_places")
"""The functions of `gguf_plan` that refuse layouts because of what llama.cpp derives from them."""


@dataclass(frozen=True)
class Outcome:
    """The result of growing a toy by a layout.

    Attributes:
        result: `equal`, `loads`, `refused` or `wrong`.
        reason: Why it is refused, or what is wrong.
        hint: The directive that is offered instead.
        needless: Whether the refused model would give the outputs of its base.
    """

    result: str
    reason: str = ""
    hint: str = ""
    needless: bool = False


@dataclass
class Row:
    """The results of one toy.

    Attributes:
        base: The toy.
        outcomes: The result of each layout.
        error: Why llama.cpp does not load the toy; empty if it does.
    """

    base: gguf_bases.Base
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    error: str = ""

    @cached_property
    def architecture(self) -> str:
        """The name of its architecture."""
        return str(self._header.metadata[ARCHITECTURE].decoded())

    @cached_property
    def types(self) -> list[str]:
        """The types of its tensors."""
        return sorted({tensor.dtype for tensor in self._header.tensors.values()})

    @cached_property
    def _header(self) -> header.GgufFile:
        return header.read(self.base.path)

    @property
    def identities(self) -> dict[str, Outcome]:
        """The outcomes of the layouts that add identities."""
        return {name: each for name, each in self.outcomes.items() if name != REPEAT}

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, by the layouts."""
        wrong = {name: each for name, each in self.outcomes.items() if each.result == WRONG}
        return {name: each.reason for name, each in wrong.items()}

    def __str__(self) -> str:
        """Return the row of the table."""
        equal = [_short(name) for name, each in self.identities.items() if each.result == EQUAL]
        faults = [f"**{_short(name)} is wrong: {fault}**" for name, fault in self.faults.items()]
        cells = [
            self.architecture,
            self.base.name,
            ", ".join(self.types),
            "; ".join([", ".join(equal) or "none", *faults]),
            _refusals(self.identities),
            self.outcomes[REPEAT].result,
        ]
        return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |"


_HEAD = """\
| architecture | type | tensors | equal to the base | refused | repeat |
| --- | --- | --- | --- | --- | --- |"""


def _short(directive: str) -> str:
    """Return a directive without words that most directives have."""
    return directive.replace("interleave: ", "").replace(", zero: auto", "")


def _refusals(outcomes: Mapping[str, Outcome]) -> str:
    """Return the layouts that are refused, and each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome.result == REFUSED:
            by_reason.setdefault(outcome.reason, []).append(_short(name))
    if list(map(len, by_reason.values())) == [len(outcomes)]:
        return f"all: {next(iter(by_reason))}"
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _short_reason(error: Exception, base: Path) -> str:
    """Return why a layout is refused, without paths and numbers of layers."""
    text = str(error).replace(f"{base}: ", "").replace(f"{base} ", "").partition("\n")[0]
    text = re.sub(r"^(llama\.cpp would compute something else|.* is refused): ", "", text)
    text = re.sub(r" in \d+ layers than in \d+", " at another depth", text)
    text = re.sub(r", which \S+ counts, .*", "", text)
    text = re.sub(r"( counts leading layers)?, and layer \d+ .*", r"\1", text)
    return text[:120]


class _Toy:
    """A toy that llama.cpp loads.

    Args:
        base: The toy.
        folder: A folder for the grown models.

    Raises:
        RefusedError: llama.cpp does not load it.
    """

    def __init__(self, base: gguf_bases.Base, folder: Path) -> None:
        self._base, self._out = base.path, folder / "grown.gguf"
        every = client.EVERY.get(base.name, 4)
        self._layouts = (
            f"interleave: every {every}",
            "interleave: every 3",
            "append: 1",
            "interleave: after [0]",
        )
        count = header.read(base.path).metadata["tokenizer.ggml.tokens"].count
        chance = Random(0)  # noqa: S311 - no secret
        self._prompts = [
            [chance.randrange(3, count) for _ in range(_LENGTH)] for _ in range(_PROMPTS)
        ]
        self._expected = self._outputs(base.path)

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        """Grow the toy by each layout, and by each one that is offered instead."""
        hints = []
        for directive in self._layouts:
            outcome = self._grown(directive)
            if outcome.result == REFUSED:
                outcome = replace(outcome, needless=self._is_needless(directive))
            hints += [outcome.hint] if outcome.hint else []
            yield directive, outcome
        for hint in dict.fromkeys(hints):
            outcome = self._grown(hint)
            if outcome.result == REFUSED:
                outcome = Outcome(WRONG, f"offered, and refused: {outcome.reason}")
            yield hint, outcome
        yield REPEAT, self._grown(REPEAT)

    def _grown(self, directive: str) -> Outcome:
        """Grow the toy, and compare its outputs with those of the toy if they must be equal."""
        is_identity = directive != REPEAT
        try:
            api.run(directive, self._out, model=str(self._base), force=True)
        except RefusedError as error:
            _, _, hint = (error.hint or "").partition(periods.KEEPS.format(""))
            return Outcome(REFUSED, _short_reason(error, self._base), hint)
        except Exception as error:  # noqa: BLE001 - the table shows it
            return Outcome(WRONG, f"run: {type(error).__name__}: {error}"[:200])
        try:
            fault = self._fault(is_identity=is_identity)
        except Exception as error:  # noqa: BLE001 - the table shows it
            fault = f"{type(error).__name__}: {error}".replace(str(self._out.parent), "")[:200]
        return Outcome(WRONG, fault) if fault else Outcome(EQUAL if is_identity else LOADS)

    def _fault(self, *, is_identity: bool) -> str:
        """Describe what is wrong with the grown model; empty if nothing is."""
        outputs = self._outputs(self._out)
        if is_identity and _tokens(outputs) != _tokens(self._expected):
            return "other greedy tokens"
        difference = llama_cpp.largest_difference(self._expected, outputs)
        if is_identity and difference:
            return f"log-probabilities differ by {difference:.0e}"
        report: Any = api.verify(self._out, against=str(self._base), forward=is_identity)
        if report.differences:
            return f"verify: {report.differences[0]}"
        return "" if report.is_exact else "`verify --forward` finds a difference"

    def _is_needless(self, directive: str) -> bool:
        """Whether a layout that is refused would give the outputs of the base."""
        with ExitStack() as stack:
            for check in _CHECKS:
                place = f"mergekit_interleave.planning.gguf_plan.{check}"
                stack.enter_context(mock.patch(place, return_value=None))
            return self._grown(directive).result == EQUAL

    def _outputs(self, file: Path) -> Sequence[llama_cpp.Steps]:
        context = _LENGTH + _COUNT + 8
        return llama_cpp.generate(file, self._prompts, context, count=_COUNT, threads=1)


def _tokens(outputs: Sequence[llama_cpp.Steps]) -> list[list[int]]:
    return [[step[0] for step in steps] for steps in outputs]


def examine(base: gguf_bases.Base) -> Row:
    """Grow a toy by each layout."""
    row = Row(base, error=base.error)
    if not row.error:
        with tempfile.TemporaryDirectory() as folder:
            try:
                toy = _Toy(base, Path(folder))
            except RefusedError as error:
                return Row(base, error=f"{_NOT_LOADED}{_last_part(str(error))}")
            row.outcomes.update(toy.outcomes())
    return row


_NOT_LOADED = "not loaded: "


def _last_part(log: str) -> str:
    """Return what a line of llama.cpp's log says, without what every such line says."""
    return log.rpartition("error loading model: ")[2].rpartition("cannot run it: ")[2]


def main() -> int:
    """Check one type or all; return 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="the file for the table")
    parser.add_argument("type", nargs="?", default="", help="check only this type")
    arguments = parser.parse_args()
    names = gguf_bases.names()
    chosen = [n for n in names if arguments.type in ("", n, n.partition(":")[0])]
    if not chosen:
        close = ", ".join(difflib.get_close_matches(arguments.type, names))
        print(f"there is no type {arguments.type!r}; similar names: {close or 'none'}")
        return 1
    print(_HEAD)
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(examine, gguf_bases.bases(chosen)):
            print(f"| {row.base.name} | {row.error} |" if row.error else row, flush=True)
            rows.append(row)
    if not arguments.type:
        write(arguments.page, rows)
    return 1 if any(row.faults for row in rows) else 0


_START, _END = "<!-- zoo-gguf -->", "<!-- /zoo-gguf -->"


def write(page: Path, rows: Sequence[Row]) -> None:
    """Replace the part of a page between the markers, or write the page."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# GGUF\n\n{_START}\n{_END}\n"
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        raise SystemExit(f"{page}: has no lines {_START} and {_END}")
    content = "\n".join(_lines(rows))
    page.write_text(f"{before}{start}\n{content}\n{end}{after}", encoding="utf-8")


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table, and those below it."""
    compared = sorted(
        (row for row in rows if not row.error), key=lambda row: (row.architecture, row.base.name)
    )
    yield from (_HEAD, *map(str, compared), "", *_counts(compared), *_not_compared(rows))


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the numbers of toys and results."""
    identities = [each for row in rows for each in row.identities.values()]
    repeats = [row.outcomes[REPEAT] for row in rows]
    needless: dict[str, list[str]] = {}
    for row in rows:
        for name, each in row.identities.items():
            if each.needless and row.architecture not in needless.setdefault(_short(name), []):
                needless[_short(name)].append(row.architecture)
    yield f"- {len(rows)} toys of {len({row.architecture for row in rows})} architectures."
    yield (
        f"- Identities: {_number(identities, EQUAL)} equal their base, "
        f"{_number(identities, REFUSED)} are refused, {_number(identities, WRONG)} are wrong."
    )
    yield (
        f"- Of `{REPEAT}`, {_number(repeats, LOADS)} load, {_number(repeats, REFUSED)} are "
        f"refused, {_number(repeats, WRONG)} are wrong."
    )
    if needless:
        text = "; ".join(f"`{name}` of {', '.join(found)}" for name, found in needless.items())
        yield f"- Refused, although the toy would equal its base: {text}."


def _number(outcomes: Iterable[Outcome], result: str) -> int:
    return sum(outcome.result == result for outcome in outcomes)


def _not_compared(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the types that are not compared, by what does not work."""
    found: dict[str, list[str]] = {title: [] for title in _TITLES.values()}
    for row in rows:
        start = next((start for start in _TITLES if row.error.startswith(start)), "")
        if row.error:
            detail = " ".join(row.error.removeprefix(start).replace("|", "/").split())[:70]
            found[_TITLES[start]].append(f"{row.base.name} ({detail})" if detail else row.base.name)
    yield from (f"- {title}: {', '.join(items)}." for title, items in found.items() if items)


_TITLES = {
    gguf_bases.NOT_BUILT: "transformers builds no toy",
    "not converted: SystemExit: 1": "The converter does not have the type",
    "not converted: ": "The converter fails",
    _NOT_LOADED: "llama.cpp does not load the toy",
    "": "The converter aborts",
}
"""What the lines below the table say about errors that start with certain words."""


if __name__ == "__main__":
    sys.exit(main())
