"""Derive the data of a model card from interleave.json and config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._units import count
from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.checkpoint import hub
from mergekit_interleave.checkpoint.checkpoint import config_errors, open_checkpoint
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import ExplicitSlices, Growth
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.layout import describe, mergekit_yaml, roles
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import (
    card_metadata,
    evaluation_text,
    lineage,
    manifest,
    verification_text,
    weight_sample,
)
from mergekit_interleave.planning import legacy_config, llama_cpp, public_names, zeroing


@dataclass(frozen=True)
class CardSource:
    """The data of a source model.

    Attributes:
        name: Its public name.
        hub_id: Its Hub id, if known.
        lora: The Hub id of the LoRA merged into it, if known.
        commit: Its commit on the Hub, if known.
        depth: Its number of layers, if known.
        parameters: Its number of parameters, if known.
        license: The license stated on its card, if any.
    """

    name: str
    hub_id: str | None = None
    lora: str | None = None
    commit: str | None = None
    depth: int | None = None
    parameters: int | None = None
    license: str | None = None


@dataclass(frozen=True)
class CardGrowth:
    """An earlier growth in the lineage of a model.

    Attributes:
        result: The model that it made.
        sources: The models that it was made from.
        layers: The number of layers of the result.
        sentence: A description of the growth.
        afterwards: What has happened to its weights since, as the end of a sentence.
    """

    result: CardSource
    sources: Sequence[CardSource]
    layers: int
    sentence: str
    afterwards: str


EQUAL, SAME, CHANGED, CHANGES, UNKNOWN, TRAINED, UNVERIFIED, ALTERED, UNCOMPARED, WRONG = (
    "untrained, equal to its base",
    "untrained, the same outputs as its base where compared",
    "untrained, other outputs than its base",
    "untrained, changes its base",
    "untrained",
    "trained",
    "trained, not verified",
    "trained or changed, not verified",
    "not verified",
    "verification failed",
)
"""The values of `CardData.status`: how the model compares with its base."""


_AFTERWARDS = {status: f", then {status}" for status in (TRAINED, UNVERIFIED, ALTERED)}
"""The end of a sentence about a model, by its status, if its weights have changed."""


@dataclass(frozen=True)
class CardData:
    """The data of a model card.

    Attributes:
        directory: The name of its directory.
        layout: Its layers.
        growth: The growth line of its directive, if it has one.
        sources: Its source models, in the order of their first layers.
        identities: The indices of the new layers that pass their input on unchanged.
        status: How it compares with its base, one of the constants above.
        norms: Whether new layers are zeroed in their output norms, not in their projections.
        fingerprint: The fingerprint of its layout.
        task: Its task, and the class that loads it.
        inherited: The front matter taken from the cards of its sources.
        directive: Its directive as YAML, without local paths; None if that is the recipe itself.
        recipe: Its mergekit YAML, without local paths; None if unknown.
        layers_file: The name of the file that records its layers.
        tools: The versions of the tools that wrote it, if known.
        verified: A summary of what was verified.
        checks: What was verified, one sentence for each check.
        parameters: The number of its parameters and of its new layers' parameters, if known.
        nbytes: The size of its weights, if known.
        dtypes: The dtypes of its weights, as safetensors spells them.
        conversion: The conversion of its weights between dtypes, if there was one.
        beyond_mergekit: Why mergekit alone cannot make these weights, if it cannot.
        has_remote_code: Whether it needs `trust_remote_code`.
        is_quantized: Whether its weights are quantized, so that only a LoRA can be trained.
        family: The family of its language model, if known.
        trained_originals: Whether other tensors than those of new layers were trained.
        repo: The Hub id under which it is published, if known.
        lineage: The earlier growths of its sources, the oldest first.
        since: The names of its first bases, if its sources were grown themselves.
        new_since: The indices of the layers that its first bases do not have.
        unchanged: The names of the bases whose layers it still has after training, if that was
            verified.
        misread_by: What other programs read differently, one clause for each program.
        legacy: Whether its files are also written for transformers 4.
        compared_with: The source whose outputs were compared with its own, if there are several.
        forced: The settings in which its sources differ although they change what is computed, one
            clause each.
        config_base: The model that its config.json comes from, if that is not one of its sources.
        evaluated: The results of `evaluate`, if they are those of its weights.
    """

    directory: str
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
    layers_file: str
    tools: Mapping[str, str]
    verified: str
    checks: Sequence[str]
    parameters: tuple[int, int] | None = None
    nbytes: int | None = None
    dtypes: Sequence[str] = ()
    conversion: str | None = None
    beyond_mergekit: str | None = None
    has_remote_code: bool = False
    is_quantized: bool = False
    family: Family | None = None
    trained_originals: bool = False
    repo: str | None = None
    lineage: Sequence[CardGrowth] = ()
    since: Sequence[str] = ()
    new_since: Sequence[int] = ()
    unchanged: Sequence[str] = ()
    misread_by: Sequence[str] = ()
    legacy: bool = False
    compared_with: str | None = None
    forced: Sequence[str] = ()
    config_base: str | None = None
    evaluated: Mapping[str, Any] | None = None

    @property
    def to_train(self) -> Sequence[int]:
        """The layers that training is for: the new ones, or else those at the merge seams."""
        new = [layer.index for layer in self.layout.new_layers]
        return new or roles.seam_layers(self.layout, self.identities)

    @property
    def title(self) -> str:
        """The model's name."""
        return self.repo.rpartition("/")[2] if self.repo else self.directory

    @property
    def is_trained(self) -> bool:
        """Whether its weights have changed since it was made."""
        return self.status in _AFTERWARDS

    @property
    def afterwards(self) -> str:
        """What has happened to its weights since it was made, as the end of a sentence."""
        return _AFTERWARDS.get(self.status, "")

    @property
    def base_models(self) -> list[str]:
        """The known Hub ids of its sources, their LoRAs and their sources; first bases first."""
        sources = (*(s for growth in self.lineage for s in growth.sources), *self.sources)
        ids = (id_ for source in sources for id_ in (source.hub_id, source.lora) if id_)
        return list(dict.fromkeys(ids))

    @property
    def depth(self) -> int | None:
        """The number of layers of its only source; None if there are several or it is unknown."""
        return self.sources[0].depth if len(self.sources) == 1 else None

    @property
    def name(self) -> str:
        """A suggested name: base, size, depth and placement of the new layers."""
        size = [] if self.parameters is None else [count(self.parameters[0])]
        where = describe.placement(self.layout, self.identities)
        tail = "_".join(["", *size, f"{len(self.layout)}Layers-{where}"])
        names = self.since or [source.name for source in self.sources]
        bases = [re.sub(r"\+.*", "", name).rpartition("/")[2] for name in names]
        base = "-".join(bases) if len(bases) < _MANY else f"{bases[0]}-and-{len(bases) - 1}-more"
        base = re.sub(r"[^\w.-]+", "-", base, flags=re.ASCII)
        base = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", base)).strip("-.")
        return (base[: _LONGEST_NAME - len(tail)].rstrip("-.") or "model") + tail


_MANY = 3
"""The number of sources from which a suggested name lists only the first one."""

_LONGEST_NAME = 96
"""The Hub's limit on the length of a name."""


def card_data(
    directory: Path,
    name: str,
    content: Mapping[str, Any],
    layout: Layout,
) -> CardData:
    """Derive the data of a model card.

    Args:
        directory: The model.
        name: The name of its directory, when it is complete.
        content: The content of its interleave.json.
        layout: Its layers.

    Raises:
        CheckpointError: interleave.json is malformed.
    """
    checkpoint = open_checkpoint(ModelRef(ModelPath(str(directory))))
    config = checkpoint.config
    with config_errors(directory):
        task, family = tasks.task_of(config), families.family_of_config(config)
    edits = {layer.index: layer.edit for layer in layout.new_layers if layer.edit}
    norms = family is not None and any(
        zeroing.zeroes_output_norms(e, family) for e in edits.values()
    )
    yaml_file = directory / mergekit_yaml.FILE
    recipe = yaml_file.read_text(encoding="utf-8") if yaml_file.is_file() else None
    with config_errors(directory, manifest.FILE):
        directive = dict(content["directive"])
        growth = directives.from_document(directive).growth
        is_explicit = isinstance(growth, ExplicitSlices)
        verified = dict(content.get("verified", {}))
        total, new = _number(content.get("parameters")), _number(content.get("new_parameters"))
        return CardData(
            directory=name,
            layout=layout,
            growth=None if is_explicit else growth,
            sources=_sources(content["models"]),
            identities=edits.keys() & {int(index) for index in content.get("identities", ())},
            status=_status(content, layout, verified),
            norms=norms,
            fingerprint=fingerprint(layout),
            task=task,
            inherited=card_metadata.filtered(content.get("inherited", {})),
            directive=None if is_explicit else yaml_io.write(directive),
            recipe=content.get("recipe", recipe),
            layers_file=content.get("layers_file", manifest.FILE),
            tools={str(name): str(version) for name, version in content.get("tools", {}).items()},
            verified=verification_text.short(verified),
            checks=verification_text.sentences(verified),
            parameters=(total, new or 0) if total else None,
            nbytes=_number(content.get("bytes")),
            dtypes=[str(dtype) for dtype in content.get("dtypes", ())],
            conversion=content.get("converted"),
            beyond_mergekit=content.get("beyond_mergekit"),
            has_remote_code="auto_map" in config,
            is_quantized=checkpoint.is_quantized,
            family=family,
            trained_originals=verification_text.has_named(verified),
            repo=_repo(content),
            unchanged=[
                str(n) for n in verified.get(verification_text.TRAINED, {}).get("against", ())
            ],
            misread_by=_misread_by(directory, config, content),
            legacy=bool(content.get(manifest.LEGACY)),
            compared_with=verified.get(verification_text.FORWARD, {}).get("base"),
            forced=[str(clause) for clause in content.get(manifest.FORCED, ())],
            config_base=_config_base(content),
            evaluated=evaluation_text.of_weights(content, directory),
            **_lineage(content),
        )


def _config_base(content: Mapping[str, Any]) -> str | None:
    base = content["directive"].get("base_model")
    is_source = any(base == entry["model"] for entry in content["models"])
    return None if base is None or is_source else str(parse_model(base, "base_model"))


def _repo(content: Mapping[str, Any]) -> str | None:
    repo = content.get(manifest.REPO)
    return repo if isinstance(repo, str) and hub.is_hub_id(repo) else None


def _lineage(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `CardData` about earlier growths."""
    growths: Sequence[Mapping[str, Any]] = content.get(lineage.KEY, ())
    if not growths:
        return {}
    results = {
        entry[lineage.GROWTH]: (source, lineage.has_lora(entry))
        for growth in (*growths, content)
        for entry, source in zip(growth["models"], _sources(growth["models"]), strict=True)
        if lineage.GROWTH in entry
    }
    *_, oldest = lineage.generations(content)
    return {
        "lineage": [_growth(growth, results[i]) for i, growth in enumerate(growths)],
        "since": [source.name for source in _sources(list(oldest.sources.values()))],
        "new_since": [layer.index for layer in oldest.layout.new_layers],
    }


def _growth(growth: Mapping[str, Any], made: tuple[CardSource, bool]) -> CardGrowth:
    """Return a growth and its result, into which perhaps a LoRA was merged."""
    result, has_lora = made
    layout = lineage.layout_of(growth)
    line = directives.from_document(dict(growth["directive"])).growth
    sources = _sources(growth["models"])
    depth = sources[0].depth if len(sources) == 1 else None
    identities = {int(index) for index in growth.get("identities", ())}
    return CardGrowth(
        result=result,
        sources=sources,
        layers=len(layout),
        sentence=describe.sentence(
            layout, None if isinstance(line, ExplicitSlices) else line, depth, identities
        ),
        afterwards=_AFTERWARDS.get(_changed(growth, growth) or "", "")
        + (", then a LoRA merged" if has_lora else ""),
    )


def _misread_by(
    directory: Path, config: Mapping[str, Any], content: Mapping[str, Any]
) -> list[str]:
    """Return what transformers 4 and llama.cpp read differently, one clause for each of them."""
    found = llama_cpp.misread(config)
    works = content.get(manifest.KEEPS_PERIOD)
    keeps = f"; {llama_cpp.KEEPS.format(f'`{works}`')}" if works else ""
    clauses = [
        legacy_config.warning(config, legacy_config.tokenizer_of(directory)),
        found and f"{found}{keeps}",
    ]
    return [clause for clause in clauses if clause]


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _changed(content: Mapping[str, Any], verified: Mapping[str, Any]) -> str | None:
    """Return the status of a model whose weights have changed since it was made, or None."""
    if verification_text.TRAINED in verified:
        return TRAINED
    changed = content.get(weight_sample.CHANGED)
    return UNVERIFIED if changed == weight_sample.NEW_LAYERS else ALTERED if changed else None


def _status(content: Mapping[str, Any], layout: Layout, verified: Mapping[str, Any]) -> str:
    """Return how the model compares with its base, as far as that is proved or measured."""
    if any(outcome.get("exact") is False for outcome in verified.values()):
        return WRONG
    if changed := _changed(content, verified):
        return changed
    if verification_text.WEIGHTS not in verified:
        return UNCOMPARED
    kept = [layer.source for layer in layout.layers if layer.is_plain and not layer.new]
    if content.get("equal") is True and kept == [*range(len(kept))] and len(layout.models) == 1:
        return EQUAL
    same = verification_text.computes_the_same(verified)
    if same is None:
        return CHANGES if layout.scaled_originals else UNKNOWN
    return SAME if same else CHANGED


def _sources(entries: Sequence[Mapping[str, Any]]) -> list[CardSource]:
    models = [parse_model(entry["model"], "models") for entry in entries]
    revisions = {(model.model.path, model.model.revision) for model in models}
    paths = Counter(path for path, _ in revisions)
    return [
        _source(entry, public_names.titled(model, revision=paths[model.model.path] > 1))
        for entry, model in zip(entries, models, strict=True)
    ]


def _source(entry: Mapping[str, Any], name: str) -> CardSource:
    ids = [entry.get(key) for key in ("hub_id", "lora_hub_id")]
    base, lora = (id_ if isinstance(id_, str) and hub.is_hub_id(id_) else None for id_ in ids)
    return CardSource(
        name=name,
        hub_id=base,
        lora=lora,
        commit=entry.get("commit"),
        depth=_number(entry.get("layers")),
        parameters=_number(entry.get("parameters")),
        license=entry.get("license"),
    )
