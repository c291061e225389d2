"""Say in words what the analysis of many layouts found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mergekit_interleave._statistics import LEVEL
from mergekit_interleave.scanning.analysis import LEAST, Analysis, Finding

TEXT, ITEM = "text", "item"
"""The kinds of sequences."""

_NOUNS = {TEXT: "window", ITEM: "item"}
_MOST_BROKEN = 5
_LARGEST_FACTOR = 1e6
"""The largest change of a likelihood that is worth a number."""


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        layouts: The directive of each layout, in the order of the differences.
        tokens: The number of scored tokens of each sequence.
        kinds: The kind of each sequence.
        broken: The indices of the layouts with scores that are not finite numbers.
        chosen: The indices of the layouts that were measured because others looked good on the
            selection part.
    """

    layouts: Sequence[str]
    tokens: Sequence[int]
    kinds: Sequence[str]
    broken: Sequence[int] = ()
    chosen: Sequence[int] = ()

    @property
    def noun(self) -> str:
        """The word for a sequence: window of a text, item, or sequence if there are both."""
        (kind, *others) = {*self.kinds} or {""}
        return "sequence" if others else _NOUNS.get(kind, "sequence")

    def name(self, finding: Finding) -> str:
        """Return the directive of a finding, in quotes."""
        return f"`{self.layouts[finding.layout]}`"


def verdict(analysis: Analysis, measured: Measured) -> str:
    """Say in one line which layout helps and by how much, or that nothing does."""
    best = analysis.best
    if best is None:
        promising = bool(analysis.findings) and analysis.findings[0].interval[0] > 0
        certain = " for certain" if promising else ""
        return f"Nothing helps{certain}: {_why_not(analysis, measured)}."
    number = _numbers(best)
    low, high = (number(end) for end in best.interval)
    nats = f"{number(best.held_out)} nats per {measured.noun}, 95 % interval {low} to {high}"
    return f"{measured.name(best)} helps: {_effect(best, analysis, measured)}; {nats}."


def report(analysis: Analysis, measured: Measured) -> Iterator[str]:
    """Yield the verdict and what it rests on, as lines of text."""
    yield verdict(analysis, measured)
    yield ""
    noun, parts = measured.noun, analysis.split
    yield (
        f"Measured: {_count(analysis.tried, 'layout')} on {_count(len(measured.tokens), noun)}"
        f"{' of text' if noun == _NOUNS[TEXT] else ''}, "
        f"{_count(sum(measured.tokens), 'scored token')}. {len(parts.selection):,} of them chose "
        f"the best layouts; the other {len(parts.held_out):,}, held out, test the first of them."
    )
    if analysis.findings:
        yield (
            f"Luck: if nothing helped, one of {_count(analysis.tried, 'layout')} would look as "
            f"good as the first below with a chance of about {_percent(analysis.chance)}."
        )
        if analysis.findings[0].layout in measured.chosen:
            yield (
                "The first combines blocks that looked good on the selection part, so this chance "
                f"is too low. Only the held-out {noun}s tell."
            )
        yield ""
        yield from _table(analysis.findings, measured)
        yield ""
        yield from _needed(analysis, noun)
    yield from _broken(measured)


def _why_not(analysis: Analysis, measured: Measured) -> str:
    tried = _count(analysis.tried, "layout")
    if not analysis.findings:
        return f"no score of {tried} is a finite number" if analysis.tried else "nothing was tried"
    first = analysis.findings[0]
    if first.selected == first.held_out == 0:
        return f"the best of {tried}, {measured.name(first)}, computes the same as the base"
    if first.selected <= 0:
        return f"the best of {tried}, {measured.name(first)}, is not better than the base"
    number = _numbers(first)
    low, high = (number(end) for end in first.interval)
    effect = "may not help held-out {}s"
    if first.interval[0] > 0:
        effect = "helps held-out {}s"
    elif first.interval[1] < 0:
        effect = "makes held-out {}s worse"
    reason = (
        f"{effect.format(measured.noun)} "
        f"({number(first.held_out)} nats each, 95 % interval {low} to {high})"
    )
    if analysis.chance >= LEVEL:
        but = ", but" if first.interval[0] > 0 else " and"
        reason += f"{but} may owe its place to luck (a chance of {_percent(analysis.chance)})"
    return f"the best of {tried}, {measured.name(first)}, {reason}"


def _effect(best: Finding, analysis: Analysis, measured: Measured) -> str:
    """Say the effect on the held-out part in the usual measure of its kind.

    The perplexity of a text is exp(-log-likelihood / tokens). For items, it is the geometric mean
    of the likelihoods of the answers that changes.
    """
    held_out = analysis.split.held_out
    if measured.noun == _NOUNS[TEXT]:
        tokens = sum(measured.tokens[i] for i in held_out)
        factor = math.exp(-best.held_out * len(held_out) / tokens)
        return f"the perplexity of held-out text is {_percent(1 - factor)} lower"
    if measured.noun == _NOUNS[ITEM] and best.held_out < math.log(_LARGEST_FACTOR):
        factor = math.exp(best.held_out)
        more = f"{factor:.3g} times as" if factor >= 2 else f"{_percent(factor - 1)} more"  # noqa: PLR2004
        return f"right answers of held-out items are {more} likely (geometric mean)"
    return f"held-out {measured.noun}s are more likely"


def _table(findings: Sequence[Finding], measured: Measured) -> Iterator[str]:
    """Yield aligned rows; directives are last, since they may be long."""
    what = f"Mean change of the log-likelihood per {measured.noun}"
    yield f"{what}, in nats (+1: 2.7 times as likely):"
    number = _numbers(findings[0])
    rows = [("selection", "held out", "95 % interval")]
    for found in findings:
        low, high = (number(end) for end in found.interval)
        rows.append((number(found.selected), number(found.held_out), f"{low} to {high}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = ["layout", *(measured.layouts[found.layout] for found in findings)]
    for row, name in zip(rows, names, strict=True):
        yield "  ".join([*map(str.rjust, row, widths), name])


def _needed(analysis: Analysis, noun: str) -> Iterator[str]:
    """Say how many sequences show the first difference, and half of it, in 4 of 5 scans.

    The number grows with the inverse square of the difference.
    """
    first, parts = analysis.findings[0], analysis.split
    if first.needed is None:
        return
    share = (len(parts.selection) + len(parts.held_out)) / len(parts.held_out)
    found, half = (
        f"{_count(count, f'held-out {noun}')} ({max(math.ceil(count * share), LEAST):,} in all)"
        for count in (first.needed, 4 * first.needed)
    )
    yield (
        f"To see a difference of {_numbers(first)(abs(first.held_out)).removeprefix('+')}, up or "
        f"down, in 4 of 5 scans takes about {found}; half of that difference, about {half}."
    )


def _broken(measured: Measured) -> Iterator[str]:
    if not measured.broken:
        return
    names = [f"`{measured.layouts[i]}`" for i in measured.broken[:_MOST_BROKEN]]
    if more := len(measured.broken) - len(names):
        names.append(f"{more:,} more")
    count = _count(len(measured.broken), "layout")
    yield f"Broken: {count} with scores that are not finite numbers: {', '.join(names)}."


def _numbers(finding: Finding) -> Callable[[float], str]:
    """Return a format with as many decimals as the difference and its interval need."""
    sizes = [abs(value) for value in (finding.held_out, finding.interval[0]) if value]
    decimals = min(6, max(2, 1 - math.floor(math.log10(min(sizes, default=1)))))
    return lambda value: f"{round(value, decimals) + 0.0:+,.{decimals}f}"


def _percent(share: float) -> str:
    percent = 100 * share
    decimals = ".0f" if percent >= 99.95 else ".1f" if percent >= 1 else ".2g"  # noqa: PLR2004
    return f"{percent:{decimals}} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
