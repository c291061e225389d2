"""The model card, from a layout and what is known of its source: nothing is left to fill in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_interleave import __version__, draw, yamltext
from mergekit_interleave.amounts import amount
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout import Layout

FILE = "README.md"

BEGIN, END = "<!-- verified -->", "<!-- end -->"
"""What stands between them is written anew by each `verify`."""

_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Facts:
    """What the card says.

    Attributes:
        name: The title.
        layout: The layers.
        sources: What to call the source models, each once.
        names: What to call each of the layout's models, in their order.
        base_models: Their Hub ids, those that are known.
        base_card: The front matter of the base's own card.
        directive: The directive as YAML, without local paths.
        recipe: The mergekit YAML, likewise.
        depth: The base's number of layers.
        parameters: The new model's number of parameters, and the base's.
        identities: The indices of the new layers that pass their input on unchanged.
        identity: Whether the outputs are the base's own, conversion apart.
        conversion: From which dtypes to which the weights were converted, if they were.
        fingerprint: The layout's.
        beyond_mergekit: Why mergekit alone cannot make these weights, if it cannot.
        verified: What was compared, and what came of it, as interleave.json has it.
    """

    name: str
    layout: Layout
    sources: Sequence[str]
    names: Sequence[str]
    base_models: Sequence[str]
    base_card: Mapping[str, Any]
    directive: str
    recipe: str
    depth: int
    parameters: tuple[int, int]
    identities: Collection[int]
    identity: bool
    conversion: str | None
    fingerprint: str
    beyond_mergekit: str | None = None
    verified: Mapping[str, Any] = field(default_factory=dict)


def read_front_matter(directory: Path) -> Mapping[str, Any]:
    """The front matter of a directory's README.md; empty where there is none that can be read."""
    file = directory / FILE
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8") as opened:
            begin, _, rest = opened.read(_LONGEST).partition("---\n")
        front, end, _ = rest.partition("\n---")
        found = yamltext.read(front, str(file)) if end and not begin.strip() else None
    except (OSError, ValueError, InterleaveError):
        return {}
    return found if isinstance(found, dict) else {}


_LONGEST = 2**20
"""Characters of a card that are looked at: the Hub itself takes no longer front matter."""


def write(facts: Facts) -> str:
    """The card as Markdown with front matter."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - slow to import

    inherited = {key: facts.base_card[key] for key in _INHERITED if _is_said(facts.base_card, key)}
    data = ModelCardData(
        base_model=list(facts.base_models) or None,
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mergekit", "merge", "mergekit-interleave", _method(facts)[0]],
        **inherited,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(facts)}"


def _is_said(card: Mapping[str, Any], key: str) -> bool:
    """Whether a card says something, in a word or in a list of words."""
    said = card.get(key)
    words = said if isinstance(said, list) else [said]
    return bool(words) and all(isinstance(word, str) and word for word in words)


def _method(facts: Facts) -> tuple[str, str]:
    """The tag of what was done, and its name in words."""
    if len(facts.layout.models) > 1:
        return "frankenmerge", "a stack of layers from several models"
    layout = facts.layout
    if not layout.new_layers:
        shorter = len(layout) < facts.depth
        return ("pruning", "leaving layers out") if shorter else ("passthrough", "rearrangement")
    if all(layer.index in facts.identities for layer in layout.new_layers):
        return "block-expansion", "block expansion: the new layers start as identities"
    if any(layer.scales for layer in layout.layers):
        return "passthrough", "copying and scaling layers"
    return "depth-up-scaling", "depth up-scaling: the new layers are copies"


def _body(facts: Facts) -> str:
    layout, (new, old) = facts.layout, facts.parameters
    status = (
        "Untrained: it computes what its base computes, until the new layers are trained."
        if facts.identity
        else "Untrained: its outputs differ from its base's, and it needs training to heal."
    )
    if facts.conversion:
        status += f" Weights were converted: {facts.conversion}."
    trained = [str(layer.index) for layer in layout.new_layers]
    rows = [
        ("layers", f"{facts.depth} → {len(layout)}, {len(layout.new_layers)} of them new"),
        ("parameters", f"{old:,} → {new:,} ({(new - old) / old:+.1%})"),
        ("new layers", ", ".join(trained) or "none"),
        ("layout fingerprint", f"`{facts.fingerprint}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    layers = "\n".join(
        f"| {_range(run.start, run.stop)} | "
        f"{facts.names[layout.models.index(run.model)]} "
        f"{_range(run.source, run.source + run.stop - run.start)} | {run.role} |"
        for run in draw.runs(layout, facts.identities)
    )
    return f"""# {facts.name}

{" and ".join(facts.sources)}, {facts.depth} → {len(layout)} layers, by {_method(facts)[1]}.
{status}

| | |
| --- | --- |
{table}

## Layers

```text
{draw.layer_map(layout, facts.identities)}
```

Brackets hold the new layers.

| layer | from | role |
| --- | --- | --- |
{layers}

## Verified

{BEGIN}
{verified(facts.verified)}
{END}

## Recipe

The directive:

```yaml
{facts.directive.rstrip()}
```

{_about_recipe(facts)}

```yaml
{facts.recipe.rstrip()}
```

A name without a slash stands for a local directory. Made with mergekit-interleave
{__version__}; `interleave.json` lists every layer.
"""


def verified(outcomes: Mapping[str, Any]) -> str:
    """What was verified, in words.

    Args:
        outcomes: As interleave.json has it.
    """
    lines = [
        f"- Weights: {_weights(outcomes[kind], trained=kind == 'trained')}"
        for kind in ("weights", "trained")
        if kind in outcomes
    ]
    if "forward" in outcomes:
        lines.append(f"- Forward pass: {forward(outcomes['forward'])}")
    return "\n".join(lines) or "Nothing: `mk-interleave verify` does it."


def _weights(found: Mapping[str, Any], *, trained: bool) -> str:
    if not found["exact"]:
        return f"**wrong** in {found['differences']} places. {_by(found)}"
    against = " and ".join(f"`{name}`" for name in found["against"])
    unread = sum(found.get("not_compared", {}).values())
    which = f"{found['tensors'] - unread:,} of {found['tensors']:,}" if unread else "all"
    what = "what the layout names" if not trained else "the base's own, layer for layer"
    words = f"{which} tensors, {amount(found['compared'])}, compared with {against}: "
    words += f"byte for byte {what}."
    for reason, count in found.get("not_compared", {}).items():
        words += f" Not compared: {count:,} ({reason})."
    return f"{words} {_by(found)}"


def forward(found: Mapping[str, Any]) -> str:
    """What came of a forward pass, in words."""
    text = f" and a text of {found['text_tokens']}" if found["text_tokens"] else ""
    if 0 < found["window"] < found["random_tokens"]:
        text = f" (more than the window of {found['window']}){text}"
    relative = found["largest_difference"] / (found["largest_logit"] or 1)
    words = (
        f"{found['dtype']} logits on {found['random_tokens']} random tokens{text} differ from the "
        f"base's by at most {found['largest_difference']:.3g} ({relative:.1g} of their size), with "
        "and without cache"
    )
    if "greedy_tokens" in found:
        same = "the same" if found["same_greedy_tokens"] else "other"
        words += f"; {same} {found['greedy_tokens']} greedy tokens"
    if "perplexity" in found:
        words += (
            f"; perplexity of the text {found['base_perplexity']:.4g} → {found['perplexity']:.4g}"
        )
    return f"{words} {_by(found)}"


def _by(found: Mapping[str, Any]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in found["tools"].items())
    return f"({tools})"


def reverified(text: str, outcomes: Mapping[str, Any]) -> str:
    """A card with what was verified written anew; one that has no place for it stays as it is."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{verified(outcomes)}\n{END}{after}" if begin and end else text


def _about_recipe(facts: Facts) -> str:
    mergekit = "[mergekit](https://github.com/arcee-ai/mergekit)"
    if facts.beyond_mergekit is None:
        return f"The {mergekit} configuration that gives these weights:"
    return (
        f"The same as a {mergekit} configuration, for `mk-interleave run`. mergekit alone does not "
        f"make these weights from it: {facts.beyond_mergekit}."
    )


def _range(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"
