"""Render the model card of a grown GGUF model, which lies beside it as `OUT.md`.

Its last line holds a digest of the rest. A card with another digest was edited or written by
another tool. `run` does not replace it, and `card` only with `--force`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave._units import amount, count
from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import parse_model
from mergekit_interleave.errors import OutputError
from mergekit_interleave.gguf.values import Value
from mergekit_interleave.layout import describe, roles
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import gguf_record, verification_text
from mergekit_interleave.output import layer_map as layer_maps
from mergekit_interleave.output.card_metadata import HUB, known_licenses

_MARK = re.compile(r"<!-- mergekit-interleave (?P<digest>[0-9a-f]{16}) -->\n\Z")


@dataclass(frozen=True)
class GgufCard:
    """The data of a card.

    Attributes:
        file: The name of the model's file, or of its first split.
        content: The record of the model; see `gguf_record`.
        metadata: The metadata of the model.
        stated_repo: The Hub id under which it will be published, if the user gives it now.
        base_model: The Hub id of its only source, if the user gives it.
    """

    file: str
    content: Mapping[str, Any]
    metadata: Mapping[str, Value]
    stated_repo: str | None = None
    base_model: str | None = None

    @property
    def repo(self) -> str | None:
        """The Hub id under which it will be published, if that is known."""
        return self.stated_repo or self.content.get(gguf_record.REPO)

    @property
    def layout(self) -> Layout:
        """The layers of the model."""
        return gguf_record.layout_of(self.content)

    @property
    def sources(self) -> Sequence[Mapping[str, Any]]:
        """The entries of its source models."""
        models: Sequence[Mapping[str, Any]] = self.content["models"]
        stated = {} if self.base_model is None else {"hub_id": self.base_model}
        return [{**entry, **stated} for entry in models]

    @property
    def quantization(self) -> str:
        """The name of its quantization, or that of its most frequent type of tensors."""
        value = self.metadata.get("general.file_type")
        named = None if value is None else architectures.file_type(value.decoded())
        return named or str(self.content["types"][0])


def path_of(out: Path) -> Path:
    """Return the path of the card of a model.

    Args:
        out: The path of the model, without the number of a split.
    """
    return out.with_suffix(".md")


def is_generated(card: Path) -> bool:
    """Whether a card is unchanged since it was generated."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    found = _MARK.search(text)
    return found is not None and found["digest"] == _digest(text[: found.start()])


def write(card: Path, data: GgufCard, *, force: bool = False) -> None:
    """Write a card.

    Args:
        card: Its path.
        data: Its data.
        force: Replace a card that was edited or that another tool wrote.

    Raises:
        OutputError: The card must not be replaced, or cannot be written.
    """
    if card.exists() and not force and not is_generated(card):
        raise OutputError(
            f"{card}: was edited, or written by another tool",
            hint="use --force to replace it",
        )
    replace_file(card, render(data))


def render(data: GgufCard) -> str:
    """Write a card as Markdown with front matter."""
    parts = [_front(data), "\n\n".join(_body(data)), ""]
    text = "\n".join(parts) + "\n"
    return f"{text}<!-- mergekit-interleave {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front(data: GgufCard) -> str:
    ids = [entry["hub_id"] for entry in data.sources if "hub_id" in entry]
    entries: dict[str, object] = {}
    if ids:
        entries |= {"base_model": ids if len(ids) > 1 else ids[0], "base_model_relation": "merge"}
    entries |= _license(data.metadata)
    languages = _decoded(data.metadata, "general.languages")
    if isinstance(languages, list) and languages:
        entries["language"] = languages
    entries |= {"pipeline_tag": "text-generation", "tags": ["gguf", "mergekit-interleave"]}
    return f"---\n{yaml_io.write(entries)}---\n"


def _license(metadata: Mapping[str, Value]) -> dict[str, object]:
    stated = _decoded(metadata, "general.license")
    if not isinstance(stated, str) or not stated:
        return {}
    if stated.lower() in known_licenses() - {"other"}:
        return {"license": stated.lower()}
    name = _decoded(metadata, "general.license.name")
    link = _decoded(metadata, "general.license.link")
    found = {"license": "other", "license_name": name or re.sub(r"[^\w.-]+", "-", stated).lower()}
    return {**found, "license_link": link} if link else found


def _decoded(metadata: Mapping[str, Value], key: str) -> Any:
    value = metadata.get(key)
    return None if value is None else value.decoded()


def _body(data: GgufCard) -> Iterator[str]:
    content, layout = data.content, data.layout
    title = data.repo.rpartition("/")[2] if data.repo else Path(data.file).stem
    yield f"# {_plain(title)}"
    yield f"{_sentence(data)} {_status(content, data.layout)}"
    yield _table(data)
    identities = content["identities"]
    lines = [
        f"layers   {layer_maps.layer_map(layout, identities)}",
        f"sources  {layer_maps.sources(layout)}",
    ]
    if len(data.sources) > 1:
        lines += [
            f"model    {layer_maps.letter(index)} {_name(entry)}"
            for index, entry in enumerate(data.sources)
        ]
    yield "## Layers"
    yield "\n".join(["```text", *lines, "```"])
    if layout.new_layers:
        yield "New layers are in brackets."
    yield "## Usage"
    yield f"```sh\nllama-cli -m {shlex.quote(data.file)}\n```"
    yield "## Verification"
    checks = verification_text.sentences(content.get("verified", {}))
    yield "\n".join(f"- {check}" for check in checks) or "Nothing yet."
    against = " ".join(f"--against {shlex.quote(_name(entry))}" for entry in data.sources)
    yield (
        "These commands compare every tensor and every key of the metadata with the base, and what "
        "both compute in llama.cpp:\n\n"
        f"```sh\nmk-interleave verify {shlex.quote(data.file)} {against}\n"
        f"mk-interleave verify {shlex.quote(data.file)} {against} --forward\n```"
    )
    yield "## Recipe"
    yield (
        "The mergekit-interleave directive of this model:\n\n"
        f"```yaml\n{yaml_io.write(content['directive']).rstrip()}\n```"
    )
    tools = ", ".join(f"{name} {version}" for name, version in content["tools"].items())
    yield f"Made with {tools}. The keys `interleave.*` of the file's metadata list every layer."


def _sentence(data: GgufCard) -> str:
    content, layout = data.content, data.layout
    growth = directives.from_document(dict(content["directive"])).growth
    sources = data.sources
    depth = int(sources[0]["layers"]) if len(sources) == 1 else None
    what = describe.sentence(
        layout,
        None if isinstance(growth, ExplicitSlices) else growth,
        depth,
        content["identities"],
    )
    bases = " and ".join(map(_link, sources))
    return f"A {data.quantization} GGUF model, made from {bases} without requantization: {what}."


def _status(content: Mapping[str, Any], layout: Layout) -> str:
    if not content.get("verified"):
        return "**Status: not verified.**"
    if content["equal"]:
        return (
            "**Status: untrained, equal to its base.** Its new layers pass their input on "
            "unchanged."
        )
    if layout.scaled_originals:
        scaled = roles.ranges(layout.scaled_originals)
        return (
            "**Status: untrained, changes its base.** Weights of original layers are scaled, too: "
            f"{scaled}."
        )
    return "**Status: untrained, other outputs than its base.**"


def _table(data: GgufCard) -> str:
    content, layout = data.content, data.layout
    before = " + ".join(str(entry["layers"]) for entry in data.sources)
    new = [layer.index for layer in layout.new_layers]
    others = layer_maps.others(layout, content["identities"])
    total, added = content["parameters"], content["new_parameters"]
    old = " + ".join(f"{entry['parameters']:,}" for entry in data.sources)
    rows = [("base file", ", ".join(f"`{_name(entry)}`" for entry in data.sources))]
    rows += [("quantization", f"{data.quantization} (tensors of {', '.join(content['types'])})")]
    rows += [("layers", f"{before} → {len(layout)}, {len(new)} of them new{others}")]
    if new:
        rows += [("new layers", ", ".join(map(str, new)))]
    rows += [("parameters", f"{old} → {total:,} ({count(total)})")]
    if new:
        rows += [("new parameters", f"{added:,}, {added / total:.1%} of all")]
    rows += [("weights", amount(content["bytes"]))]
    rows += [("verified", verification_text.short(content.get("verified", {})))]
    rows += [("layout fingerprint", f"`{content['fingerprint']}`")]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {text} |" for key, text in rows)])


def _name(entry: Mapping[str, Any]) -> str:
    return _plain(parse_model(entry["model"], "models").path)


def _link(entry: Mapping[str, Any]) -> str:
    hub_id = entry.get("hub_id")
    return f"[{_name(entry)}]({HUB}/{hub_id})" if hub_id else f"`{_name(entry)}`"


def _plain(name: str) -> str:
    """Replace the characters that Markdown interprets."""
    return re.sub(r"[`<>|\[\]()*\\]", "_", layer_maps.legible(name))
