"""Read and write the lineage in interleave.json: the earlier growths of a model's sources.

`growths` lists them, oldest first. Each is a part of the interleave.json of a model that was grown.
An entry of `models` names under `growth` the growth that the model is a result of, by its index in
that list. Models without it are first bases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_interleave.directive.directive import Directive, from_document
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.mergekit_keys import MERGEKIT_KEYS
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.layout import lineage, mergekit_yaml
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import weight_sample

KEY = "growths"
"""The key of interleave.json that lists the earlier growths."""

GROWTH = "growth"
"""The key of an entry of `models` that is the index of the growth that made the model."""

_MOST = 100
"""The maximum number of growths in a lineage."""

_KEPT = ("fingerprint", "directive", "models", "identities", "layers")
"""The keys of an interleave.json that a growth keeps."""

_EDITS = ("scale", "gain", "mean_with", "fill")
_KEPT_OF_LAYERS = ("model", "layer", *_EDITS)
"""The keys of an entry of `layers` that a growth keeps; the others follow from them."""

TRAINED = "trained"
"""The key of a growth that tells that its result was trained, if that was verified."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Generation:
    """A model, expressed in its sources, or in the sources of these.

    Attributes:
        layout: Its layers in terms of these models.
        sources: The entry of interleave.json for each model of the layout.
        growths: The growths between these models and the model, by their names in errors.
    """

    layout: Layout
    sources: Mapping[ModelRef, Entry]
    growths: Mapping[str, Entry]

    @property
    def names(self) -> list[str]:
        """The public names of the models, in the order of their first layers."""
        return [str(self.sources[model]["model"]) for model in self.layout.models]

    def named(self, name: str) -> list[ModelRef]:
        """Return the models that a name, a Hub id or a path means."""
        path = Path(name)
        wanted = path.resolve().name if path.exists() else last_part(name)
        known = {
            model: [*(str(entry[key]) for key in ("model", "hub_id") if key in entry), base]
            for model, entry in self.sources.items()
            for base in [str(parse_model(entry["model"], "models").model)]  # without its LoRA
        }
        exact = [model for model, names in known.items() if name in names]
        return exact or [m for m, names in known.items() if wanted in map(last_part, names)]


def last_part(name: str) -> str:
    """Return a model's name without owner and revision, which a local copy may lack."""
    return name.partition("@")[0].rstrip("/").rpartition("/")[2]


def directive_of(content: Entry) -> Directive:
    """Return the layers of an interleave.json, or of a growth in it, as a mergekit config.

    Raises:
        Exception: The content is malformed.
    """
    models = [entry["model"] for entry in content["models"]]
    keys = content["directive"].keys() & {*MERGEKIT_KEYS} - {"merge_method", "parameters"}
    document = {
        "slices": [{"sources": [_source_of(entry, models)]} for entry in content["layers"]],
        **{key: content["directive"][key] for key in MERGEKIT_KEYS if key in keys},
    }
    from_document(dict(content["directive"]))
    return from_document(document)


def _source_of(entry: Entry, models: Sequence[object]) -> dict[str, object]:
    """Return a layer as a mergekit source; its scales include those of top-level parameters."""
    written = {name: entry[name] for name in _EDITS if entry.get(name) not in (None, [])}
    source = {"model": models[entry["model"]], "layer_range": [entry["layer"], entry["layer"] + 1]}
    return {**source, "parameters": written} if written else source


def layout_of(content: Entry) -> Layout:
    """Return the layers of an interleave.json that was read without errors."""
    return _layout(content)[0]


def _layout(content: Entry) -> tuple[Layout, dict[ModelRef, Entry]]:
    """Return the layers, and the entry of each of their models.

    A model that was grown itself is called by its growth, because names may repeat in a lineage.
    """
    growth = directive_of(content).growth
    if not isinstance(growth, ExplicitSlices):
        raise TypeError("layers are always explicit slices")
    written = mergekit_yaml.from_document(growth.document, lambda _: None)
    refs = [_ref(entry) for entry in content["models"]]
    if len(written.models) != len(refs):
        raise ValueError(f"{len(refs)} models are listed, {len(written.models)} are used")
    known = dict(zip(written.models, refs, strict=True))
    layout = Layout(tuple(replace(part, model=known[part.model]) for part in written.slices))
    return layout, dict(zip(refs, content["models"], strict=True))


def _ref(entry: Entry) -> ModelRef:
    stated = parse_model(entry["model"], "models")
    if GROWTH in entry:
        return ModelRef(ModelPath(f"{KEY}[{entry[GROWTH]}]"), stated.lora)
    return stated


def entries(content: Entry) -> list[Entry]:
    """Return the entries of all models in a lineage, the oldest growth first."""
    return [entry for part in (*content.get(KEY, ()), content) for entry in part["models"]]


def first_bases(content: Entry) -> list[str]:
    """Return the names of the models in a lineage that were not grown themselves."""
    names = (str(entry["model"]) for entry in entries(content) if GROWTH not in entry)
    return list(dict.fromkeys(names))


def has_lora(entry: Entry) -> bool:
    """Return whether a LoRA was merged into a model of an interleave.json first."""
    return parse_model(entry["model"], "models").lora is not None


def problem(content: Entry) -> str | None:
    """Return the first inconsistency in the growths of an interleave.json, or None.

    Raises:
        Exception: They are malformed.
    """
    return next(_problems(content), None)


def _problems(content: Entry) -> Iterator[str]:
    growths = content.get(KEY, [])
    if len(growths) > _MOST:
        yield f"{KEY}: has {len(growths)} entries (limit {_MOST})"
        return
    for number, growth in enumerate([*growths, content]):
        place = f"{KEY}[{number}]." if number < len(growths) else ""
        layout, sources = _layout(growth)
        if place and growth["fingerprint"] != fingerprint(layout):
            yield f"{place}fingerprint does not match its layers"
        for index, entry in enumerate(sources.values()):
            earlier = entry.get(GROWTH)
            where = f"{place}models[{index}]"
            if earlier is not None and not (isinstance(earlier, int) and 0 <= earlier < number):
                yield f"{where}.{GROWTH} names no earlier growth"
            elif earlier is not None and len(growths[earlier]["layers"]) != int(entry["layers"]):
                yield f"{where}.layers differs from the layers of {KEY}[{earlier}]"
        for layer in layout.layers:
            if layer.source >= int(sources[layer.model]["layers"]):
                yield f"{place}layers[{layer.index}].layer is not in its model"


def generations(content: Entry) -> Iterator[Generation]:
    """Yield a model in terms of its sources, then of their sources, back to the first bases.

    Args:
        content: The content of its interleave.json, which was read without errors.
    """
    growths = content.get(KEY, [])
    layout, sources = _layout(content)
    crossed: dict[str, Entry] = {"": content}
    yield Generation(layout, sources, dict(crossed))
    while any(GROWTH in entry for entry in sources.values()):
        grown: dict[ModelRef, Layout] = {}
        older: dict[ModelRef, Entry] = {}
        for model, entry in sources.items():
            if GROWTH in entry:
                number = entry[GROWTH]
                grown[model], found = _layout(growths[number])
                older |= found
                crossed[f"{KEY}[{number}]."] = growths[number]
            else:
                older[model] = entry
        layout = lineage.through(layout, grown)
        sources = {model: older[model] for model in layout.models}
        yield Generation(layout, sources, dict(crossed))


def since(content: Entry, name: str) -> Layout:
    """Return the layers, of which all are new that a model in the lineage does not have.

    Args:
        content: The content of interleave.json.
        name: The model: its name in interleave.json, a Hub id, or a path.

    Raises:
        DirectiveError: The lineage has no such model.
    """
    names: list[str] = []
    for generation in generations(content):
        models = generation.named(name)
        if models:
            parts = generation.layout.slices
            return Layout(tuple(replace(p, new=p.new or p.model not in models) for p in parts))
        names += generation.names
    known = [f"--since {each}" for each in dict.fromkeys(reversed(names))]
    raise DirectiveError(
        f"--since: {name!r} is not in the lineage of this model",
        hint=f"name a model of its lineage: {' or '.join(known)}",
    )


def inherited(growths: list[dict[str, Any]], content: Entry) -> int:
    """Add the lineage of a source model, and return the index of its own growth.

    Args:
        growths: The growths so far, to which those of the source are added.
        content: The content of the source's interleave.json.
    """
    own = {key: content[key] for key in _KEPT if key in content}
    own["layers"] = [
        {key: layer[key] for key in _KEPT_OF_LAYERS if layer.get(key) not in (None, [])}
        for layer in own["layers"]
    ]
    if TRAINED in content.get("verified", {}):
        own[TRAINED] = True
    elif weight_sample.CHANGED in content:
        own[weight_sample.CHANGED] = content[weight_sample.CHANGED]
    numbers: list[int] = []
    for growth in [*content.get(KEY, []), own]:
        models = [
            {**entry, GROWTH: numbers[entry[GROWTH]]} if GROWTH in entry else entry
            for entry in growth["models"]
        ]
        moved = {**growth, "models": models}
        if moved not in growths:
            growths.append(moved)
        numbers.append(growths.index(moved))
    return numbers[-1]
