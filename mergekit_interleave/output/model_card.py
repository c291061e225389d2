"""The model card, from what interleave.json says of a model: nothing is left to fill in. Pure.

The last line of a card is a seal, by which a card that someone has edited is known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._units import amount, count
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.directive.growth import Growth
from mergekit_interleave.layout import describe
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import layer_map as layer_maps
from mergekit_interleave.output import svg, verification_text
from mergekit_interleave.output.card_metadata import CARD, HUB

FILE = CARD
PICTURE = "layers.svg"

BEGIN, END = "<!-- verified -->", "<!-- end -->"
"""What stands between them is written anew by each `verify`."""

_SEAL = "<!-- as mk-interleave wrote it: "


@dataclass(frozen=True)
class CardSource:
    """A model that layers were taken from.

    Attributes:
        name: What to call it.
        hub_id: Its Hub id, where that is known.
        lora: That of the LoRA that was merged into it, likewise.
        commit: The commit that it was taken from, where that is known.
        depth: Its number of layers, where that is known.
        parameters: How many numbers it holds, likewise.
        license: The license that its card states, if any.
    """

    name: str
    hub_id: str | None = None
    lora: str | None = None
    commit: str | None = None
    depth: int | None = None
    parameters: int | None = None
    license: str | None = None


EQUAL, CHANGED, UNKNOWN, TRAINED, TOUCHED, WRONG = (
    "untrained, and equal to its base",
    "untrained, and changed",
    "untrained",
    "trained",
    "trained since it was made",
    "not what its layout says",
)
"""What a model is like, beside its base."""

_STATUS = {
    EQUAL: "It computes what its base computes{rounding}{until}.",
    CHANGED: "Its outputs differ from {bases}, and it needs training to heal.",
    UNKNOWN: "Whether its outputs are {bases} is not known.",
    TRAINED: "Its new layers were trained; all others are {bases}, to the bit.",
    TOUCHED: "Its new layers are no longer what they were made as; whether all others are {bases} "
    "was not verified.",
    WRONG: "`mk-interleave verify` has found differences, see below.",
}


@dataclass(frozen=True)
class CardData:
    """What a card says.

    Attributes:
        title: What the model is called.
        layout: Its layers.
        growth: The growth line that says them, where one does.
        sources: The models they were taken from, in the order of their first layers.
        identities: The indices of the new layers that pass their input on unchanged.
        status: What it is like, one of the words above.
        norms: Whether new layers are closed by norms, not by their projections.
        fingerprint: The layout's.
        task: What it is for.
        inherited: The front matter that it has from its sources.
        directive: The directive as YAML, without local paths; None where there is none but the
            recipe.
        recipe: The mergekit YAML, likewise; None where it is not at hand.
        says: The file that says its layers.
        tools: The versions of what made it, where they are known.
        parameters: How many numbers it holds, and its new layers; None where that is not known.
        nbytes: Their bytes, likewise.
        dtypes: In which they are stored, in safetensors' spelling.
        conversion: From which dtypes to which the weights were converted, if they were.
        beyond_mergekit: Why mergekit alone cannot make these weights, if it cannot.
        has_remote_code: Whether it brings code of its own.
        verified: What was compared, and what came of it, as interleave.json has it.
    """

    title: str
    layout: Layout
    growth: Growth | None
    sources: Sequence[CardSource]
    identities: Collection[int]
    status: str
    norms: bool
    fingerprint: str
    task: Task
    inherited: Mapping[str, Any]
    directive: str | None
    recipe: str | None
    says: str
    tools: Mapping[str, str]
    parameters: tuple[int, int] | None = None
    nbytes: int | None = None
    dtypes: Sequence[str] = ()
    conversion: str | None = None
    beyond_mergekit: str | None = None
    has_remote_code: bool = False
    verified: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether its new layers are no longer what they were made as."""
        return self.status in (TRAINED, TOUCHED)

    @property
    def base_models(self) -> list[str]:
        """The Hub ids that are known of what it was made of, each once."""
        ids = (id_ for source in self.sources for id_ in (source.hub_id, source.lora) if id_)
        return list(dict.fromkeys(ids))

    @property
    def depth(self) -> int | None:
        """The number of layers of its one source, where there is one and it is known."""
        return self.sources[0].depth if len(self.sources) == 1 else None

    @property
    def name(self) -> str:
        """A name that tells size, depth and placement, as the field has it."""
        size = [] if self.parameters is None else [count(self.parameters[0])]
        where = describe.placement(self.layout, self.identities)
        tail = "_".join(["", *size, f"{len(self.layout)}Layers-{where}"])
        bases = [re.sub(r"\+.*", "", source.name).rpartition("/")[2] for source in self.sources]
        base = "-".join(bases) if len(bases) < _MANY else f"{bases[0]}-and-{len(bases) - 1}-more"
        base = re.sub(r"[^\w.-]+", "-", base, flags=re.ASCII)
        base = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", base)).strip("-.")
        return (base[: _LONGEST_NAME - len(tail)].rstrip("-.") or "model") + tail


_MANY = 3
_LONGEST_NAME = 96
"""The Hub takes no longer name."""


def picture(facts: CardData) -> str:
    """The layer map as an SVG file."""
    names = [source.name for source in facts.sources]
    title = "As it was made, before it was trained" if facts.is_trained else None
    return svg.picture(facts.layout, facts.identities, names, title)


def write(facts: CardData) -> str:
    """The card as Markdown with front matter."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - slow to import

    sources = [replace(source, name=_plain(source.name)) for source in facts.sources]
    facts = replace(facts, title=layer_maps.legible(facts.title), sources=sources)
    inherited = dict(facts.inherited)
    data = ModelCardData(
        base_model=facts.base_models or None,
        base_model_relation="merge",
        library_name=inherited.pop("library_name", None) or "transformers",
        pipeline_tag=inherited.pop("pipeline_tag", None) or facts.task.tag,
        tags=["mergekit", "merge", "mergekit-interleave", _tag(facts)],
        **inherited,
    )
    return sealed(f"---\n{data.to_yaml()}\n---\n\n{_body(facts)}")


def _plain(name: str) -> str:
    """A name with nothing in it that Markdown takes for its own."""
    return re.sub(r"[`<>|\[\]()*\\]", "_", layer_maps.legible(name))


def sealed(text: str) -> str:
    """A card with its seal."""
    return f"{text}{_SEAL}{_digest(text)} -->\n"


def is_sealed(text: str) -> bool:
    """Whether nobody has edited a card since it was written."""
    text = text.replace("\r\n", "\n")
    before, seal, after = text.rpartition(_SEAL)
    return bool(seal) and after.strip() == f"{_digest(before)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reverified(text: str, verified: Mapping[str, Any]) -> str:
    """A card with what was verified written anew; one that has no place for it stays as it is."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_verified(verified)}\n{END}{after}" if begin and end else text


def _verified(verified: Mapping[str, Any]) -> str:
    lines = [f"- {sentence}" for sentence in verification_text.sentences(verified)]
    return "\n".join(lines) or "Nothing: `mk-interleave verify` does it."


def _tag(facts: CardData) -> str:
    """The field's word for what was done."""
    layout = facts.layout
    if len(layout.models) > 1:
        return "frankenmerge"
    if not layout.new_layers:
        return "pruning" if facts.depth and len(layout) < facts.depth else "passthrough"
    if all(layer.index in facts.identities for layer in layout.new_layers):
        return "block-expansion"
    return "depth-up-scaling"


def _status(facts: CardData) -> str:
    words = _STATUS[facts.status].format(
        bases=_bases(facts),
        rounding=" but for rounding" if facts.conversion else "",
        until=", until its new layers are trained" if facts.layout.new_layers else "",
    )
    converted = f" Its weights were converted: {facts.conversion}." if facts.conversion else ""
    return f"**Status: {facts.status}.** {words}{converted}"


def _bases(facts: CardData) -> str:
    return "its base's" if len(facts.sources) == 1 else "its bases'"


def _body(facts: CardData) -> str:
    parts = [
        f"# {facts.title}",
        f"{_sentence(facts)}\n\n{_status(facts)}",
        _table(facts),
        _layers(facts),
        _loading(facts),
        *([_training(facts)] if facts.layout.new_layers else []),
        f"## Verified\n\n{BEGIN}\n{_verified(facts.verified)}\n{END}",
        _recipe(facts),
        _references(facts),
    ]
    return "\n\n".join(parts) + "\n\n"


def _sentence(facts: CardData) -> str:
    said = " and ".join(_link(source) for source in facts.sources)
    what = describe.sentence(facts.layout, facts.growth, facts.depth, facts.identities)
    since = ", and trained since" if facts.is_trained else ""
    depths = f"{_before(facts)} → {len(facts.layout)} layers"
    sizes = [depths] if not what.startswith(depths) else []
    return f"{', '.join([said, *sizes, *_growth(facts)])}: {what}{since}."


def _link(source: CardSource) -> str:
    return f"[{source.name}]({HUB}/{source.hub_id})" if source.hub_id else f"`{source.name}`"


def _before(facts: CardData) -> str:
    return " + ".join("?" if s.depth is None else str(s.depth) for s in facts.sources)


def _growth(facts: CardData) -> list[str]:
    old = facts.sources[0].parameters
    if facts.parameters is None or len(facts.sources) > 1 or not old:
        return []
    total = facts.parameters[0]
    return [f"{count(old)} → {count(total)} parameters ({(total - old) / old:+.1%})"]


def _table(facts: CardData) -> str:
    layout = facts.layout
    new = [layer.index for layer in layout.new_layers]
    rows = [("layers", f"{_before(facts)} → {len(layout)}, {len(new)} of them new")]
    if new:
        rows.append(("new layers", ", ".join(map(str, new))))
    if facts.parameters is not None:
        total, own = facts.parameters
        before = [f"{s.parameters:,}" for s in facts.sources if s.parameters]
        rows.append(("parameters", " → ".join([" + ".join(before), f"{total:,}"][not before :])))
        if new:
            rows.append(("new parameters", f"{own:,}, {own / total:.1%} of all"))
    if facts.nbytes is not None:
        rows.append(("weights", f"{amount(facts.nbytes)} of {', '.join(facts.dtypes)}"))
    rows.append(("verified", verification_text.short(facts.verified)))
    rows += [("license", said) for said in _licenses(facts)]
    for source in facts.sources:
        if source.commit:
            rows.append(("taken from", f"{_link(source)} at commit `{source.commit}`"))
    fingerprint = f"`{facts.fingerprint}`: only models of the same one can be merged with this one"
    rows.append(("layout fingerprint", fingerprint))
    rows.append(("suggested name", f"`{facts.name}`"))
    cells = (f"| {key} | {value.replace('|', _BAR)} |" for key, value in rows)
    return "\n".join(["| | |", "| --- | --- |", *cells])


_BAR = r"\|"
"""A bar within a cell of a table."""


def _licenses(facts: CardData) -> list[str]:
    """Where one license speaks for all, the front matter has it, but for what it is called."""
    stated = facts.inherited.get("license")
    if stated and stated != "other":
        return []
    known = [s.license for s in facts.sources if s.license]
    if not known:
        return ["not known: its sources' cards state none"]
    if len({*known}) == 1 and stated:
        name, link = (str(facts.inherited.get(f"license_{key}")) for key in ("name", "link"))
        return [f"[{_plain(name)}](<{link}>)"]
    return ["; ".join(f"{_link(s)}: {s.license or 'none stated'}" for s in facts.sources)]


def _layers(facts: CardData) -> str:
    models = [f"{layer_maps.letter(i)} {source.name}" for i, source in enumerate(facts.sources)]
    lines = [
        f"layers   {layer_maps.layer_map(facts.layout, facts.identities)}",
        f"sources  {layer_maps.sources(facts.layout)}",
        *(f"model    {line}" for line in models if len(models) > 1),
    ]
    text = "\n".join(["```text", *lines, "```"])
    parts = ["## Layers", f"![layer map]({PICTURE})", text]
    if facts.layout.new_layers:
        since = ", as they were made" if facts.is_trained else ""
        parts.append(f"Brackets hold the new layers{since}.")
    return "\n\n".join(parts)


def _loading(facts: CardData) -> str:
    return f"## Load it\n\n{_python(facts, 'auto')}"


def _training(facts: CardData) -> str:
    coarse = any(map(_dtypes.is_half, facts.dtypes))
    snippet = _python(
        facts,
        "float32" if coarse else "auto",  # 16 bits round most steps of training away
        "from mergekit_interleave import freeze_original_layers\n",
        "\nfreeze_original_layers(model)  # before an optimizer or a trainer is made",
    )
    which = (
        f"Which layers are new stands in `{facts.says}`, where that function reads it. "
        "`mk-interleave train DIR --for axolotl` (or transformers, trl, peft, llamafactory, "
        "ms-swift, unsloth) writes the settings by which a trainer trains them and no others."
    )
    afterwards = (
        "Afterwards `mk-interleave verify TRAINED --against BASE --trained --recipe "
        f"DIR/{facts.says}` shows that nothing else has changed."
    )
    heading = "Train the new layers further" if facts.is_trained else "Train the new layers alone"
    words = [which, "" if facts.is_trained else _of_lora(facts), afterwards]
    return "\n\n".join([f"## {heading}", snippet, *filter(None, words)])


def _of_lora(facts: CardData) -> str:
    """What a LoRA of layers that start as identities must have."""
    if facts.norms:
        return (
            "The norms behind the new layers' projections let nothing pass: beside a LoRA they "
            "must be trained in full, as `mk-interleave train` has it, or it gets no gradients."
        )
    if any(layer.index in facts.identities for layer in facts.layout.new_layers):
        return (
            "The new layers start as identities, so a LoRA must include their output projections, "
            "or it gets no gradients. DoRA, and what multiplies or factors their zeros (PiSSA, "
            "LoftQ, IA3, OFT), do not work on them."
        )
    return ""


def _python(facts: CardData, dtype: str, before: str = "", after: str = "") -> str:
    code = ", trust_remote_code=True" if facts.has_remote_code else ""
    arguments = f'{json.dumps(facts.title, ensure_ascii=False)}, dtype="{dtype}"{code}'
    return (
        f"```python\n{before}from transformers import {facts.task.load}\n\n"
        f"model = {facts.task.load}.from_pretrained({arguments}){after}\n```"
    )


def _recipe(facts: CardData) -> str:
    mergekit = "[mergekit](https://github.com/arcee-ai/mergekit)"
    parts = ["## Recipe"]
    if facts.directive is not None:
        parts.append(f"The directive:\n\n```yaml\n{facts.directive.rstrip()}\n```")
    if facts.recipe is not None:
        parts.append(
            f"The {mergekit} configuration that {_gives(facts)}:"
            if facts.beyond_mergekit is None
            else f"The same as a {mergekit} configuration, for `mk-interleave run`. mergekit alone "
            f"does not make these weights from it: {facts.beyond_mergekit}."
        )
        parts.append(f"```yaml\n{facts.recipe.rstrip()}\n```")
    local = [f"`{source.name}`" for source in facts.sources if source.hub_id is None]
    ends = [f"On its maker's disk, perhaps not on the Hub: {', '.join(local)}."] if local else []
    if facts.tools:
        tools = ", ".join(f"{name} {version}" for name, version in facts.tools.items())
        ends.append(f"Made with {tools}.")
    return "\n\n".join([*parts, " ".join([*ends, f"`{facts.says}` lists every layer."])])


def _gives(facts: CardData) -> str:
    return "gave the weights that were trained" if facts.is_trained else "gives these weights"


_PAPERS = {
    "block-expansion": ("LLaMA Pro: Progressive LLaMA with Block Expansion", "2401.02415"),
    "depth-up-scaling": (
        "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
        "2312.15166",
    ),
    "mergekit": ("Arcee's MergeKit: A Toolkit for Merging Large Language Models", "2403.13257"),
}


def _references(facts: CardData) -> str:
    papers = [_PAPERS[key] for key in (_tag(facts), "mergekit") if key in _PAPERS]
    lines = [f"- {title}, [arXiv:{id_}](https://arxiv.org/abs/{id_})" for title, id_ in papers]
    return "\n".join(["## References", "", *lines])
