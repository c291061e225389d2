"""Render a model card and its picture from the data that interleave.json records."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergekit_interleave import _dtypes, _out_files
from mergekit_interleave._units import amount, count
from mergekit_interleave.layout import describe, roles
from mergekit_interleave.output import card_data, evaluation_text, manifest, svg
from mergekit_interleave.output import layer_map as layer_maps
from mergekit_interleave.output.card_data import CardData, CardSource
from mergekit_interleave.output.card_metadata import CARD, HUB
from mergekit_interleave.output.freeze_lines import freeze_lines

FILE = CARD
PICTURE = _out_files.PICTURE

_STATUS = {
    card_data.EQUAL: "{rounding}{until}",
    card_data.SAME: "A forward pass found no difference, but other inputs may show one.",
    card_data.CHANGED: "It needs training to recover.",
    card_data.CHANGES: "Weights of original layers are scaled, too: {scaled}. "
    "`mk-interleave verify --forward` compares its outputs with {bases}.",
    card_data.UNKNOWN: "It is not known whether its outputs equal {bases}; "
    "`mk-interleave verify --forward` compares them.",
    card_data.TRAINED: "All {original} are unchanged, bit for bit.",
    card_data.UNVERIFIED: "The new layers have changed. Whether the original layers have changed "
    "was not checked.",
    card_data.ALTERED: "Its weights are not those that the expansion has. Whether they "
    "differ from {bases} outside the new layers was not checked; `mk-interleave verify --trained` "
    "checks it.",
    card_data.UNCOMPARED: "Whether its weights are those of its layout was not checked; "
    "`mk-interleave verify --against BASE` checks it.",
    card_data.WRONG: "`mk-interleave verify` lists what differs.",
}
"""The words that follow each status in the status line."""


def picture(data: CardData) -> str:
    """Draw the layer map as an SVG file."""
    names = [source.name for source in data.sources]
    title = "Layers before training" if data.is_trained else None
    return svg.picture(data.layout, data.identities, names, title)


def render(data: CardData) -> str:
    """Write the card as Markdown with front matter."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - slow to import

    data = replace(
        data,
        directory=layer_maps.legible(data.directory),
        sources=_plain_names(data.sources),
        lineage=[
            replace(g, result=_plain_names([g.result])[0], sources=_plain_names(g.sources))
            for g in data.lineage
        ],
    )
    inherited = dict(data.inherited)
    front = ModelCardData(
        base_model=data.base_models or None,
        base_model_relation="finetune" if data.is_trained else "merge",
        library_name=inherited.pop("library_name", None) or "transformers",
        pipeline_tag=inherited.pop("pipeline_tag", None) or data.task.tag,
        tags=["mergekit", "merge", "mergekit-interleave", _tag(data)],
        **inherited,
    )
    return f"---\n{front.to_yaml()}\n---\n\n{_body(data)}\n"


def _plain_names(sources: Sequence[CardSource]) -> list[CardSource]:
    return [replace(source, name=_plain(source.name)) for source in sources]


def _plain(name: str) -> str:
    """Replace the characters that Markdown interprets."""
    return re.sub(r"[`<>|\[\]()*\\]", "_", layer_maps.legible(name))


def _tag(data: CardData) -> str:
    """Return the tag that is usual for this kind of model."""
    layout = data.layout
    if len(layout.models) > 1:
        return "frankenmerge"
    if not layout.new_layers:
        return "pruning" if data.depth and len(layout) < data.depth else "passthrough"
    if all(layer.index in data.identities for layer in layout.new_layers):
        return "block-expansion"
    return "depth-up-scaling"


def _status(data: CardData) -> str:
    words = (
        _STATUS[data.status]
        .format(
            bases=_bases(data),
            scaled=roles.ranges(data.layout.scaled_originals),
            rounding="Its outputs are equal up to rounding. " if data.conversion else "",
            until="Training its new layers changes its outputs." if data.layout.new_layers else "",
            original=f"layers of {' and '.join(map(_plain, data.unchanged))}"
            if data.lineage and data.unchanged
            else "original layers" + (" that were not trained" if data.trained_originals else ""),
        )
        .strip()
    )
    converted = f"Its weights were converted: {data.conversion}." if data.conversion else ""
    grown_again = data.lineage and not data.is_trained
    base = f"Its base is {_joined(data.sources)}." if grown_again else ""
    found = [f"**Status: {data.status}.**", base, words, *_of_stack(data), converted]
    return " ".join(filter(None, found))


def _of_stack(data: CardData) -> Iterator[str]:
    """Yield what is true of stacks of several models only."""
    if data.compared_with:
        name = _plain(data.compared_with)
        yield f"Its outputs were compared with those of `{name}`, whose config.json it has."
    if data.forced:
        clauses = "; ".join(map(_plain, data.forced))
        yield f"The stack was forced, although settings that matter differ: {clauses}."


def _bases(data: CardData) -> str:
    return "its base's" if len(data.sources) == 1 else "its bases'"


def _body(data: CardData) -> str:
    checks = "\n".join(f"- {check}" for check in data.checks)
    install = "" if data.to_train else f"\n\n{_INSTALL}"
    parts = [
        f"# {data.title}",
        f"{_sentence(data)}\n\n{_status(data)}",
        _table(data),
        _layers(data),
        *([_lineage(data)] if data.lineage else []),
        f"## Usage\n\n{_python(data, 'auto')}{_clients(data)}",
        *([_training(data)] if data.to_train else []),
        f"## Verification\n\n{checks or 'Nothing yet: run `mk-interleave verify`.'}{install}",
        *([f"## Evaluation\n\n{evaluation_text.card(data.evaluated)}"] if data.evaluated else []),
        _recipe(data),
        _publishing(data),
        _references(data),
    ]
    return "\n\n".join(parts)


def _sentence(data: CardData) -> str:
    made_from = " and ".join(_link(source) for source in data.sources)
    what = describe.sentence(data.layout, data.growth, data.depth, data.identities)
    depths = f"{_before(data)} → {len(data.layout)} layers"
    sizes = [*([] if what.startswith(depths) else [depths]), *_growth(data)]
    grown = f" ({', '.join(sizes)})" if sizes else ""
    return f"Made from {made_from}{grown}: {what}{data.afterwards}."


def _lineage(data: CardData) -> str:
    """List all growths, the oldest first."""
    parts = ["## Lineage"]
    for number, growth in enumerate(data.lineage, 1):
        parts.append(
            f"{number}. {_joined(growth.sources)} → {_link(growth.result)} "
            f"({growth.layers} layers): {growth.sentence}{growth.afterwards}."
        )
    what = describe.sentence(data.layout, data.growth, data.depth, data.identities)
    parts.append(
        f"{len(data.lineage) + 1}. {_joined(data.sources)} → this model "
        f"({len(data.layout)} layers): {what}{data.afterwards}."
    )
    return "\n\n".join([parts[0], "\n".join(parts[1:])])


def _joined(sources: Sequence[CardSource]) -> str:
    return " + ".join(f"{_link(s)} ({'?' if s.depth is None else s.depth} layers)" for s in sources)


def _link(source: CardSource) -> str:
    return f"[{source.name}]({HUB}/{source.hub_id})" if source.hub_id else f"`{source.name}`"


def _before(data: CardData) -> str:
    return " + ".join("?" if s.depth is None else str(s.depth) for s in data.sources)


def _growth(data: CardData) -> list[str]:
    old = data.sources[0].parameters
    if data.parameters is None or len(data.sources) > 1 or not old:
        return []
    total = data.parameters[0]
    return [f"{count(old)} → {count(total)} parameters", f"{(total - old) / old:+.1%}"]


def _table(data: CardData) -> str:
    layout = data.layout
    new = [layer.index for layer in layout.new_layers]
    others = layer_maps.others(layout, data.identities)
    rows = [("layers", f"{_before(data)} → {len(layout)}, {len(new)} of them new{others}")]
    if new:
        rows.append(("new layers", ", ".join(map(str, new))))
    for role in (roles.SCALED, roles.MOVED):
        indices = roles.ranges(roles.with_role(layout, role, data.identities))
        rows += [(f"{role} layers", indices)] if indices else []
    if seams := layer_maps.seam_layers(layout, data.identities):
        rows.append(("merge seams", seams))
    if data.since:
        since = " and ".join(map(_plain, data.since))
        rows.append((f"new since {since}", ", ".join(map(str, data.new_since))))
    if data.parameters is not None:
        total, added = data.parameters
        before = [f"{s.parameters:,}" for s in data.sources if s.parameters]
        rows.append(("parameters", " → ".join([" + ".join(before), f"{total:,}"][not before :])))
        if new:
            rows.append(("new parameters", f"{added:,}, {added / total:.1%} of all"))
    if data.nbytes is not None:
        rows.append(("weights", f"{amount(data.nbytes)} of {', '.join(data.dtypes)}"))
    rows.append(("verified", data.verified))
    rows += [("license", text) for text in _licenses(data)]
    for source in data.sources:
        if source.commit:
            rows.append(("source", f"{_link(source)} at commit `{source.commit}`"))
    rows.append(("layout fingerprint", f"`{data.fingerprint}`"))
    rows.append(("suggested name", f"`{data.name}`"))
    cells = (f"| {key} | {value.replace('|', _BAR)} |" for key, value in rows)
    return "\n".join(["| | |", "| --- | --- |", *cells])


_BAR = r"\|"
"""A vertical bar within a cell of a table."""


def _licenses(data: CardData) -> list[str]:
    """Return the license row of the table; empty if the front matter is sufficient."""
    stated = data.inherited.get("license")
    if stated and stated != "other":
        return []
    known = [s.license for s in data.sources if s.license]
    if not known:
        return ["unknown: the cards of its sources state none"]
    if len({*known}) == 1 and stated:
        name, link = (str(data.inherited.get(f"license_{key}")) for key in ("name", "link"))
        return [f"[{_plain(name)}](<{link}>)"]
    return ["; ".join(f"{_link(s)}: {_plain(s.license or 'none stated')}" for s in data.sources)]


def _layers(data: CardData) -> str:
    models = [f"{layer_maps.letter(i)} {source.name}" for i, source in enumerate(data.sources)]
    lines = [
        f"layers   {layer_maps.layer_map(data.layout, data.identities)}",
        f"sources  {layer_maps.sources(data.layout)}",
        *(f"model    {line}" for line in models if len(models) > 1),
    ]
    text = "\n".join(["```text", *lines, "```"])
    parts = ["## Layers", f"![layer map]({PICTURE})", text]
    if data.layout.new_layers:
        since = ", before training" if data.is_trained else ""
        parts.append(f"New layers are in brackets{since}.")
    return "\n\n".join(parts)


def _training(data: CardData) -> str:
    return _lora_training(data) if data.is_quantized else _full_training(data)


def _lora_training(data: CardData) -> str:
    """Describe how to train quantized weights, which have no gradient."""
    new = bool(data.layout.new_layers)
    which = "new layers" if new else "layers at the merge seams"
    option = "" if new else " --layers seams"
    command = f"mk-interleave train {shlex.quote(data.directory)} --for peft{option}"
    heading = f"## Train a LoRA of the {which}"
    text = (
        "The weights are quantized, so only a LoRA can be trained. This command prints the code "
        f"that adds one to the {which} and to nothing else; `mk-interleave train --help` lists the "
        "other trainers."
    )
    words = [heading, text, f"```sh\n{command}\n```", _of_lora(data)]
    return "\n\n".join(filter(None, words))


def _full_training(data: CardData) -> str:
    half = any(map(_dtypes.is_half, data.dtypes))
    new = bool(data.layout.new_layers)
    snippet = _python(
        data,
        "float32" if half else "auto",  # 16-bit weights are too coarse for most updates
        "from mergekit_interleave import freeze_original_layers\n",
        f"\nfreeze_original_layers(model{'' if new else _SEAMS})  "
        "# call it before creating an optimizer or a trainer",
    )
    which = "which layers are new" if new else "which layers are at both sides of a merge seam"
    option = "" if new else " --layers seams"
    freeze = (
        f"`freeze_original_layers` reads from `{data.layers_file}` {which}. It needs only PyTorch. "
        f"`mk-interleave train DIR --for TRAINER{option}` writes settings "
        "with which a trainer trains only these layers; `mk-interleave train --help` lists the "
        "trainers."
    )
    lines = freeze_lines(data.to_train, data.family)
    without = f"The same without this package:\n\n```python\n{lines}```" if lines else ""
    if len(data.since) == 1:
        since = _plain(data.since[0])
        freeze += f" With `--since {since}`, they train the layers of the earlier growths, too."
    against = " ".join(f"--against {shlex.quote(name)}" for name in _compared(data))
    recipe = f" --recipe DIR/{data.layers_file}"
    known = "" if data.layers_file == manifest.FILE else recipe
    afterwards = (
        f"After training, `mk-interleave card TRAINED{recipe}` writes the card of the trained "
        f"model, and `mk-interleave verify TRAINED {against} --trained{option}{known}` checks that "
        "nothing else has changed."
    )
    heading = "Train the new layers further" if data.is_trained else "Train only the new layers"
    if not new:
        heading = "Train the layers at the merge seams"
    words = [f"{freeze} {_INSTALL}", without, "" if data.is_trained else _of_lora(data), afterwards]
    return "\n\n".join([f"## {heading}", snippet, *filter(None, words)])


_SEAMS = ', layers="seams"'

_INSTALL = (
    "`mk-interleave` is part of the Python package mergekit-interleave: `pip install .` in a "
    "checkout of it."
)
"""Where the commands on the card come from."""


def _compared(data: CardData) -> list[str]:
    """Return the names of the models that `verify --against` takes, in its order."""
    names = [source.name for source in data.sources]
    return [*names, *([] if data.config_base is None else [data.config_base])]


def _of_lora(data: CardData) -> str:
    """Describe what a LoRA of layers that start as identities requires."""
    if data.norms:
        return (
            "The norms after the new layers' projections are zero, so a LoRA alone gets no "
            "gradients. Train these norms in full as well; `mk-interleave train` writes such "
            "settings."
        )
    if any(layer.index in data.identities for layer in data.layout.new_layers):
        return (
            "The new layers start as identities. A LoRA must include their output projections, or "
            "it gets no gradients. DoRA, PiSSA, LoftQ, IA3 and OFT do not work on these layers, "
            "since they multiply or factorize the zeroed weights."
        )
    return ""


def _python(data: CardData, dtype: str, before: str = "", after: str = "") -> str:
    """Write the Python code that loads the model, with other code before and after it."""
    code = ", trust_remote_code=True" if data.has_remote_code else ""
    name = json.dumps(data.repo or data.title, ensure_ascii=False)
    arguments = f'{name}, dtype="{dtype}"{code}'
    return (
        f"```python\n{before}from transformers import {data.task.load}\n\n"
        f"model = {data.task.load}.from_pretrained({arguments}){after}\n```"
    )


def _clients(data: CardData) -> str:
    """Name the programs that read the model otherwise than transformers 5 does."""
    legacy = "\n\nIts files are also written for transformers 4." if data.legacy else ""
    if not data.misread_by:
        return legacy
    clauses = "\n".join(f"- {clause}." for clause in data.misread_by)
    return f"{legacy}\n\nNot every program reads it as transformers 5 does:\n\n{clauses}"


def _recipe(data: CardData) -> str:
    mergekit = "[mergekit](https://github.com/arcee-ai/mergekit)"
    parts = ["## Recipe"]
    if data.directive is not None:
        parts.append(
            "The mergekit-interleave directive of this model:\n\n"
            f"```yaml\n{data.directive.rstrip()}\n```"
        )
    if data.recipe is not None:
        weights = "the weights before training" if data.is_trained else "the same weights"
        parts.append(
            f"The {mergekit} configuration that produces {weights}:"
            if data.beyond_mergekit is None
            else f"The equivalent {mergekit} configuration, for `mk-interleave run`. mergekit "
            f"alone does not produce these weights from it: {data.beyond_mergekit}."
        )
        recipe = data.recipe.rstrip()
        lines = len(recipe.splitlines())
        parts.append(
            f"<details>\n<summary>{lines} line{'' if lines == 1 else 's'} of YAML</summary>\n\n"
            f"```yaml\n{recipe}\n```\n\n</details>"
        )
    local = [f"`{source.name}`" for source in data.sources if source.hub_id is None]
    closing = [f"Local source, perhaps not on the Hub: {', '.join(local)}."] if local else []
    if data.tools:
        tools = ", ".join(f"{name} {version}" for name, version in data.tools.items())
        closing.append(f"Made with {tools}.")
    return "\n\n".join([*parts, " ".join([*closing, f"`{data.layers_file}` lists every layer."])])


def _publishing(data: CardData) -> str:
    """Describe how to upload the model and how to convert it to GGUF."""
    place = shlex.quote(data.directory)
    upload = (
        "pip install -U huggingface_hub\n"
        "hf auth login\n"
        f"hf upload {data.repo or f'YOUR-NAME/{data.name}'} {place} ."
    )
    convert = (
        "git clone --depth 1 https://github.com/ggml-org/llama.cpp\n"
        "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt\n"
        f"python llama.cpp/convert_hf_to_gguf.py {place} --outfile {shlex.quote(data.title)}.gguf"
    )
    return (
        "## Upload and conversion\n\n"
        "Run these commands in the directory that contains the model's directory.\n\n"
        f"Upload to the Hub:\n\n```sh\n{upload}\n```\n\n"
        f"GGUF file for llama.cpp, if it knows the model type:\n\n```sh\n{convert}\n```"
    )


_PAPERS = {
    "block-expansion": ("LLaMA Pro: Progressive LLaMA with Block Expansion", "2401.02415"),
    "depth-up-scaling": (
        "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
        "2312.15166",
    ),
    "mergekit": ("Arcee's MergeKit: A Toolkit for Merging Large Language Models", "2403.13257"),
}


def _references(data: CardData) -> str:
    papers = [_PAPERS[key] for key in (_tag(data), "mergekit") if key in _PAPERS]
    lines = [f"- {title}, [arXiv:{id_}](https://arxiv.org/abs/{id_})" for title, id_ in papers]
    return "\n".join(["## References", "", *lines])
