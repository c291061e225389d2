"""Describe verification outcomes for the card and for a terminal.

An outcome is a mapping, as interleave.json stores it. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_interleave._units import amount

WEIGHTS, TRAINED, LINEAGE, FORWARD = ("weights", "trained", "lineage", "forward")
"""The kinds of verification.

`LINEAGE` is a comparison with an earlier base, of a model that was not trained since its last
growth.
"""

_OF_WEIGHTS = (WEIGHTS, TRAINED, LINEAGE)

NAMED = "tensors that were named as trained"
"""The reason why tensors of other layers than the new ones are not compared."""

MOST_DIFFERENT = 1e-5
"""The largest difference of logits, relative to the largest logit, between models that compute the
same; both are in float32."""

OTHER_FILES = "other files"
"""Files whose differences are counted together, such as the tokenizer."""


def has_named(outcomes: Mapping[str, Any]) -> bool:
    """Return whether tensors were not compared because they were named as trained."""
    return NAMED in outcomes.get(TRAINED, {}).get("not_compared", {})


def computes_the_same(outcomes: Mapping[str, Any]) -> bool | None:
    """Return whether a forward pass found the same outputs as the base's; None if none was run."""
    found = outcomes.get(FORWARD)
    if found is None:
        return None
    size = found["largest_logit"] or 1
    same_tokens: bool = found.get("same_greedy_tokens", True)
    return same_tokens and found["largest_difference"] / size <= MOST_DIFFERENT


def sentences(outcomes: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each outcome."""
    found: list[str] = []
    for kind in _OF_WEIGHTS:
        if kind in outcomes:
            found += _parts(outcomes[kind], trained=kind != WEIGHTS)
    if FORWARD in outcomes:
        found.append(f"Forward pass: {forward(outcomes[FORWARD])}")
    return found


def short(outcomes: Mapping[str, Any]) -> str:
    """Return a summary of all outcomes."""
    found = []
    of_weights = [outcomes[kind] for kind in _OF_WEIGHTS if kind in outcomes]
    for outcome in of_weights:
        several = len(of_weights) > 1
        found.append(
            _short(outcome, named=several) if outcome["exact"] else _short_failure(outcome)
        )
    if FORWARD in outcomes:
        found.append(f"logits {_relation(outcomes[FORWARD])}")
    return "; ".join(found) or "nothing yet"


def _relation(found: Mapping[str, Any]) -> str:
    """Return how logits compare with those of the base."""
    difference, base = found["largest_difference"], found.get("base")
    if not difference:
        return f"equal those of {base}" if base else "equal"
    return f"differ{f' from those of {base}' if base else ''} by at most {difference:.3g}"


def _short(found: Mapping[str, Any], *, named: bool) -> str:
    """Summarize an outcome without differences; name the bases if several were compared."""
    sources = f"those of {' and '.join(found['against'])}" if named else "their sources"
    compared = _compared(found)
    if compared == "no":
        return "no tensors compared"
    return f"{compared} tensors equal to {sources}, {_precision(found)}"


def _parts(found: Mapping[str, Any], *, trained: bool) -> Iterator[str]:
    """Yield one sentence about the weights, and one about each other part that differs."""
    failed = _failed_parts(found)
    if WEIGHTS in failed:
        yield f"Weights: {_failed(failed[WEIGHTS])}. Checked with {_tools(found)}."
    elif "tensors" in found:
        yield f"Weights: {_weights(found, trained=trained)}"
    for part, count in failed.items():
        if part != WEIGHTS:
            yield f"{_title(part)}: {_failed(count)}. Checked with {_tools(found)}."


def _short_failure(found: Mapping[str, Any]) -> str:
    parts = [*_failed_parts(found)]
    where = "" if parts == [WEIGHTS] else f" ({', '.join(parts)})"
    return f"{_failed(found['differences'])}{where}"


def _failed_parts(found: Mapping[str, Any]) -> Mapping[str, int]:
    """Count the differences in each part; earlier releases recorded only their sum."""
    return {} if found["exact"] else found.get("failed", {WEIGHTS: found["differences"]})


def _title(part: str) -> str:
    return part.capitalize() if part == OTHER_FILES else f"`{part}`"


def _weights(found: Mapping[str, Any], *, trained: bool) -> str:
    against = " and ".join(f"`{name}`" for name in found["against"])
    what = "as in the base" if trained else "as the layout requires"
    compared = _compared(found)
    words = f"{compared} tensors ({amount(found['compared'])}) compared with {against}"
    words += "." if compared == "no" else f": {_precision(found)} {what}."
    for reason, count in found.get("not_compared", {}).items():
        words += f" Not compared: {count:,} ({reason})."
    return f"{words} Checked with {_tools(found)}."


def _compared(found: Mapping[str, Any]) -> str:
    unread = sum(found.get("not_compared", {}).values())
    compared = found["tensors"] - unread
    return "all" if not unread else f"{compared:,} of {found['tensors']:,}" if compared else "no"


def _precision(found: Mapping[str, Any]) -> str:
    wider = found.get("wider", 0)
    counts = {"stored in a wider dtype": wider, "recomputed": found.get("computed", 0)}
    some = ", ".join(f"{count:,} of them {what}" for what, count in counts.items() if count)
    return f"{'number for number' if wider else 'byte for byte'}{some and f' ({some})'}"


def _failed(differences: int) -> str:
    return f"**failed** with {differences} difference{'' if differences == 1 else 's'}"


def forward(found: Mapping[str, Any]) -> str:
    """Describe the outcome of a forward pass."""
    text = f" and on a text of {found['text_tokens']} tokens" if found["text_tokens"] else ""
    if 0 < found["window"] < found["random_tokens"]:
        text = f" (more than the window of {found['window']}){text}"
    base = (
        f"those of {found['base']}, whose config.json it has" if "base" in found else "the base's"
    )
    words = f"{found['dtype']} logits on {found['random_tokens']} random tokens{text} "
    if found["largest_difference"]:
        relative = found["largest_difference"] / (found["largest_logit"] or 1)
        words += (
            f"differ from {base} by at most {found['largest_difference']:.3g} "
            f"({relative:.1g} of their size)"
        )
    else:
        words += f"equal {base}"
    words += ", with and without cache"
    if "greedy_tokens" in found:
        same = "the same" if found["same_greedy_tokens"] else "different"
        words += f"; {same} {found['greedy_tokens']} greedy tokens"
    if "perplexity" in found:
        words += (
            f"; perplexity of the text {found['base_perplexity']:.4g} → {found['perplexity']:.4g}"
        )
    return f"{words} ({_tools(found)})"


def llama_cpp(found: Mapping[str, Any]) -> str:
    """Describe the outcome of a forward pass in llama.cpp."""
    words = f"{found['prompts']} prompts of {found['prompt_tokens']} tokens"
    if found["window"]:
        more = "more" if found["prompt_tokens"] > found["window"] else "not more"
        words += f" ({more} than the window of {found['window']})"
    same = "the same" if found["same_greedy_tokens"] else "different"
    words += f"; {same} {found['greedy_tokens']} greedy tokens each; "
    difference = found["largest_difference"]
    words += (
        f"top {found['top']} log-probabilities differ by at most {difference:.3g}"
        if difference
        else f"the same top {found['top']} log-probabilities"
    )
    return f"{words} ({_tools(found)})"


def _tools(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found["tools"].items())
