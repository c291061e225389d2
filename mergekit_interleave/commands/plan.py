"""`plan`: compute what `run` would write for a directive, without writing it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_interleave import _dtypes
from mergekit_interleave._units import amount, count, decimal
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import has_weight_files
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import DirectiveLike
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Stack
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.engines import registry, select, stream
from mergekit_interleave.engines.gguf_splits import splits_of
from mergekit_interleave.engines.out_file import OutFile
from mergekit_interleave.engines.protocol import Estimate, WriteOptions
from mergekit_interleave.engines.select import Choice
from mergekit_interleave.errors import (
    InterleaveError,
    OutputError,
    RefusedError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.layout import describe, mergekit_yaml, roles
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout, distances
from mergekit_interleave.output import layer_map as layer_maps
from mergekit_interleave.output import manifest, svg, upload_forecast
from mergekit_interleave.output.upload_forecast import Upload
from mergekit_interleave.planning import grown_config, zeroing
from mergekit_interleave.planning.client_warnings import client_warnings
from mergekit_interleave.planning.expansion_plan import (
    ExpansionPlan,
    Sources,
    open_sources,
    plan_expansion,
)
from mergekit_interleave.planning.gguf_plan import GgufPlan, plan_gguf
from mergekit_interleave.planning.resolve import Expansion, models_for, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_interleave.commands.inputs import Words


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters before and after growing.

    Attributes:
        before: In the base, which is the model of the first layer.
        after: In the result.
        new: In the new layers of the result.
        trainable: Those of the new layers that can be trained: all of them, or none if they are
            quantized, because only a LoRA of them can be trained.
    """

    before: int
    after: int
    new: int
    trainable: int


@dataclass(frozen=True)
class Writing:
    """The cost of writing the weights.

    Attributes:
        nbytes: The bytes of all tensors.
        engine: The engine that `run` uses without `--engine`.
        why: The reason for that choice.
        estimates: What each engine needs, by its name. An engine that cannot write the weights is
            missing, as is one whose needs are unknown until the weights are available.
        free: The free bytes on the disk.
        upload: What the Hub receives of the weights if it holds the base; None if that is unknown.
    """

    nbytes: int
    engine: str
    why: str
    estimates: Mapping[str, Estimate]
    free: int
    upload: Upload | None = None

    @property
    def least(self) -> int:
        """The fewest bytes that an engine must write."""
        return min((each.traffic.written for each in self.estimates.values()), default=self.nbytes)

    def as_dict(self) -> dict[str, object]:
        """Return the values as they appear in JSON."""
        estimates = {name: dataclasses.asdict(each) for name, each in self.estimates.items()}
        mergekit, stream = (estimates.get(name) for name in (registry.MERGEKIT, registry.STREAM))
        return {
            "nbytes": self.nbytes,
            "engine": self.engine,
            "why": self.why,
            "estimates": estimates,
            "memory": {name: each.memory for name, each in self.estimates.items()},
            # Release 0.1.0 had these two keys.
            "mergekit": mergekit and mergekit["traffic"]["written"],
            "stream": stream and stream["traffic"],
            "free": self.free,
            "upload": self.upload and dataclasses.asdict(self.upload),
        }


@dataclass(frozen=True)
class Plan:
    """The model that `run` would write for a directive. A notebook shows its layer map.

    Attributes:
        directive: The directive, with its model filled in.
        layout: The layers of the result.
        names: The public names of the models, in the order of their first layers.
        depths: The number of layers of each model; None if it is unknown.
        identities: The indices of the new layers that pass their input on unchanged.
        parameters: The numbers of parameters; None if they cannot be counted, as when one stored
            integer may contain several of them.
        writing: The cost of writing the weights; None if their sizes are unknown.
        config: The keys of config.json that change, each with its old and new value; None if there
            is no config.json to read.
        warnings: Warnings, one sentence each.
        counted: Whether the weights were read; if not, sizes are derived from config.json.
    """

    directive: Directive
    layout: Layout
    names: tuple[str, ...]
    depths: tuple[int | None, ...]
    identities: frozenset[int]
    parameters: Parameters | None
    writing: Writing | None
    config: Mapping[str, tuple[object, object]] | None
    warnings: tuple[str, ...]
    counted: bool

    @cached_property
    def sentence(self) -> str:
        """The result in one sentence."""
        sole = self.depths[0] if len(self.depths) == 1 else None
        return describe.sentence(self.layout, self.directive.growth, sole, self.identities)

    @property
    def distance(self) -> tuple[float, int] | None:
        """The distance from a copy to its original, in layers: the mean and the maximum."""
        found = distances(self.layout)
        return (sum(found) / len(found), max(found)) if found else None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the layout, which does not depend on the names of its models."""
        return fingerprint(self.layout)

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as lines of text, each with its name."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, as `plan --json` prints it."""
        return _as_dict(self)

    def strip(self, width: int, *, ascii_only: bool = False) -> list[layer_maps.Line]:
        """Draw the layer map for a terminal, as lines of text in the styles of `rich`.

        Args:
            width: The width of the terminal in characters.
            ascii_only: Use only ASCII characters.
        """
        return layer_maps.strip(
            self.layout,
            self.identities,
            names=self.names,
            width=max(width, layer_maps.NARROWEST),
            ascii_only=ascii_only,
        )

    def svg(self) -> str:
        """Draw the layer map as an SVG picture, as `plan --svg` writes it."""
        return svg.picture(self.layout, self.identities, self.names)

    def _repr_svg_(self) -> str:
        """Return the SVG picture, which a notebook shows."""
        return self.svg()

    def __str__(self) -> str:
        return "\n".join(f"{name:<11} {words}" for name, words in self.lines())


def plan(
    directive: DirectiveLike | None = None,
    *,
    allow_non_identity: bool = False,
    trust_remote_code: bool = False,
    **words: Unpack[Words],
) -> Plan:
    """Compute what `run` would write for a directive. Nothing is written.

    Args:
        directive: Text, a path, an open file, a mapping, or a `Directive`.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        trust_remote_code: Run code from the models. By default none is run.
        words: Keywords that take precedence over the directive; see `Words`.

    Returns:
        The plan: layers, parameters, bytes, changes of config.json, and warnings.

    Raises:
        InterleaveError: `run` would refuse the directive or the model.
    """
    registry.requested(None)  # raises an error for an unknown engine in the environment
    wanted = inputs.parse(inputs.read(directive), words)
    models = Models(trust_remote_code=trust_remote_code)
    here = Path.cwd()
    with restored_settings(), collected_warnings() as warnings:
        found = _plan(wanted, models, here, warnings, allow_non_identity=allow_non_identity)
        if found.writing is not None and found.writing.free < found.writing.least:
            warnings.append("there is not enough free disk space here")
    return dataclasses.replace(found, warnings=tuple(dict.fromkeys(warnings)))


def _plan(
    directive: Directive,
    models: Models,
    here: Path,
    warnings: list[str],
    *,
    allow_non_identity: bool,
) -> Plan:
    models = models_for(directive, models)
    reads_config = not _needs_no_config(directive) or _is_readable(directive, models)
    expansion = resolve(
        directive, models, strict=reads_config, allow_non_identity=allow_non_identity
    )
    if expansion.is_gguf:
        gguf_plan = plan_gguf(expansion)
        warnings.extend(gguf_plan.warnings)
        return _of_gguf(gguf_plan, here, warnings.append)
    warnings.extend(expansion.warnings)
    if not reads_config:
        return _from_directive(expansion, models)
    sources = open_sources(expansion, models)
    found = _from_config(expansion, sources)
    warnings.extend(client_warnings(sources.grow(expansion), sources.base, expansion.directive))
    if all(checkpoint.has_weights for checkpoint in sources.models.values()):
        expansion_plan = plan_expansion(expansion, models, None)
        manifest.check_sources(expansion_plan)
        warnings.extend(expansion_plan.warnings)
        return _from_weights(found, expansion_plan, here, warnings.append)
    warnings.extend(
        f"{ref}: the weights are pickled, which `run` reads only with --allow-pickle"
        for ref, checkpoint in sources.models.items()
        if not checkpoint.has_weights and has_weight_files(checkpoint.path)
    )
    return _estimated(found, sources, here, warnings.append)


def _needs_no_config(directive: Directive) -> bool:
    growth = directive.growth
    return growth is not None and (directive.layers is not None or not growth.needs_depth)


def _is_readable(directive: Directive, models: Models) -> bool:
    named: Sequence[ModelRef] = () if directive.model is None else (directive.model,)
    if isinstance(directive.growth, Stack):
        named = (*named, *directive.growth.models)
    if isinstance(directive.growth, ExplicitSlices):
        written = mergekit_yaml.from_document(directive.growth.document, lambda _: directive.layers)
        named = (*named, *written.models)
    return all(models.open_source_if_possible(model) for model in named)


def _of_gguf(found: GgufPlan, here: Path, warn: Warn) -> Plan:
    """Plan the result of GGUF files, from their headers."""
    request = registry.requested(None)
    if request.name not in (registry.AUTO, registry.STREAM):
        title = registry.ENGINES[request.name].title
        raise RefusedError(f"{title} reads no GGUF files", hint=request.remedy)
    files = splits_of(found, "out", {}, None, stream.block_size(here))
    traffic = stream.forecast(files, here)
    estimate = Estimate(traffic, stream.memory_of_gguf(len(found.specs)))
    return Plan(
        directive=found.expansion.directive,
        layout=found.layout,
        names=tuple(found.title(model) for model in found.layout.models),
        depths=tuple(found.sources[model].depth for model in found.layout.models),
        identities=found.identities,
        parameters=Parameters(
            before=sum(tensor.elements for tensor in found.first.tensors.values()),
            after=found.parameters,
            new=found.new_parameters,
            trainable=0,
        ),
        writing=Writing(
            nbytes=found.nbytes,
            engine=registry.STREAM,
            why="because mergekit reads no GGUF files",
            estimates={registry.STREAM: estimate},
            free=shutil.disk_usage(here).free,
            upload=_upload(files, warn, multiplies=False),
        ),
        config=dict(found.changed_metadata()),
        warnings=found.warnings,
        counted=True,
    )


def _from_directive(expansion: Expansion, models: Models) -> Plan:
    """Plan from the directive alone, if the models cannot be read."""
    stated = expansion.directive.layers
    layout = mergekit_yaml.effective(expansion.layout, expansion.directive.mergekit)
    return Plan(
        directive=expansion.directive,
        layout=layout,
        names=tuple(str(model) for model in layout.models),
        depths=tuple(models.depth_if_known(model) or stated for model in layout.models),
        identities=zeroing.identities(layout, lambda _: families.assumed_family()),
        parameters=None,
        writing=None,
        config=None,
        warnings=(),
        counted=False,
    )


def _from_config(expansion: Expansion, sources: Sources) -> Plan:
    """Plan from config.json."""
    keys = expansion.directive.mergekit
    layout = mergekit_yaml.effective(expansion.layout, keys)
    grown = sources.grow(expansion)
    config = grown.config(sources.base.config, dtype=mergekit_yaml.dtype_of(keys))
    return Plan(
        directive=expansion.directive,
        layout=layout,
        names=tuple(sources.public.title(model) for model in layout.models),
        depths=tuple(sources.models[model].depth for model in layout.models),
        identities=zeroing.identities(layout, lambda model: sources.models[model].require_family()),
        parameters=None,
        writing=None,
        config=dict(grown_config.differences(sources.base.config, config)),
        warnings=(),
        counted=False,
    )


def _from_weights(found: Plan, expansion_plan: ExpansionPlan, here: Path, warn: Warn) -> Plan:
    """Add the sizes of the tensors to a plan."""
    request = registry.requested(None)
    choice = select.choose(expansion_plan, here, request)
    writing = _writing(choice, sum(spec.nbytes for spec in expansion_plan.specs), here)
    row = registry.ENGINES[choice.engine]
    files = row.load().files(expansion_plan, here, WriteOptions(request))
    upload = _upload(files, warn, multiplies=row.multiplies)
    return dataclasses.replace(
        found,
        identities=expansion_plan.identities,
        parameters=_counted(expansion_plan),
        writing=dataclasses.replace(writing, upload=upload),
        config=dict(grown_config.differences(expansion_plan.base.config, expansion_plan.config())),
        counted=True,
    )


def _upload(files: Sequence[OutFile], warn: Warn, *, multiplies: bool) -> Upload | None:
    """Forecast the upload of some files; that it cannot be forecast is a warning."""
    try:
        return upload_forecast.of_files(files, multiplies=multiplies)
    except OutputError as error:
        warn(str(error))
        return None


def _counted(expansion_plan: ExpansionPlan) -> Parameters | None:
    """Count the elements of the stored tensors, unless they are not the parameters."""
    first = expansion_plan.first
    if manifest.is_packed(first):
        return None
    layers = {layer.index for layer in expansion_plan.layout.new_layers}
    new = sum(math.prod(spec.shape) for spec in expansion_plan.specs if spec.layer in layers)
    return Parameters(
        before=sum(tensor.elements for tensor in first.tensors.values()),
        after=expansion_plan.parameters,
        new=new,
        trainable=0 if first.is_quantized else new,
    )


def _writing(choice: Choice, nbytes: int, here: Path) -> Writing:
    free = shutil.disk_usage(here).free
    return Writing(nbytes, choice.engine, choice.why, choice.estimates, free)


def _estimated(found: Plan, sources: Sources, here: Path, warn: Warn) -> Plan:
    """Add sizes to a plan, estimated from the parameters of the class that config.json names."""
    shapes = {}
    try:
        for model, checkpoint in sources.models.items():
            shapes[model] = meta_model.parameters(checkpoint)
    except InterleaveError as error:
        warn(f"the parameters cannot be counted: {error}")
        return found
    layout, first = found.layout, sources.models[found.layout.models[0]]
    outside, layers = shapes[layout.models[0]]
    new = sum(shapes[layer.model][1][layer.source] for layer in layout.new_layers)
    parameters = Parameters(
        before=outside + sum(layers),
        after=outside + sum(shapes[layer.model][1][layer.source] for layer in layout.layers),
        new=new,
        trainable=0 if first.is_quantized else new,
    )
    wanted = mergekit_yaml.dtype_of(found.directive.mergekit)
    dtype = _dtypes.NAMED.get(wanted or grown_config.stated_dtype(first.config) or "")
    if dtype is None or first.is_quantized:
        return dataclasses.replace(found, parameters=parameters)
    nbytes = parameters.after * dtype.bits // 8
    choice = select.choose_by_config(first, nbytes, registry.requested(None))
    writing = _writing(choice, nbytes, here)
    return dataclasses.replace(found, parameters=parameters, writing=writing)


def _lines(found: Plan) -> Iterator[tuple[str, str]]:
    layout = found.layout
    new = len(layout.new_layers)
    yield "what", found.sentence
    before = " + ".join("?" if depth is None else str(depth) for depth in found.depths)
    others = layer_maps.others(layout, found.identities)
    yield "layers", f"{before} → {len(layout)}, {new} of them new{others}"
    for name, depth in zip(found.names, found.depths, strict=True):
        if len(found.names) > 1:
            yield "model", f"{name}, {'?' if depth is None else depth} layers"
    yield "map", layer_maps.layer_map(layout, found.identities)
    yield "sources", layer_maps.sources(layout)
    if found.distance is not None:
        mean, most = found.distance
        layers = "1 layer" if mean == 1 else f"{decimal(mean)} layers"
        yield "distance", f"{layers} on average from a copy to its original, {most} at most"
    seams = layer_maps.seam_layers(layout, found.identities)
    if seams:
        yield "seams", seams
    yield from _sizes(found)
    for key, (old, value) in (found.config or {}).items():
        yield "config", f"{key}: {_short(old)} → {_short(value)}"
    if not found.config:
        yield "config", "not known" if found.config is None else "unchanged"
    yield "fingerprint", fingerprint(layout)
    for warning in found.warnings:
        yield "warning", warning


def _sizes(found: Plan) -> Iterator[tuple[str, str]]:
    if found.parameters is not None:
        numbers = found.parameters
        source = "" if found.counted else ", by config.json"
        yield (
            "parameters",
            f"{numbers.before:,} → {numbers.after:,} ({count(numbers.after)}{source})",
        )
        if numbers.trainable:
            share = numbers.trainable / numbers.after
            yield "trainable", f"{numbers.trainable:,} in the new layers, {share:.1%} of all"
    writing = found.writing
    if writing is None:
        yield "bytes", "unknown until the weights are available"
        return
    about = "" if found.counted else "about "
    yield "bytes", f"{about}{amount(writing.nbytes)}"
    yield "engine", f"{writing.engine}, {writing.why}"
    for name, needs in writing.estimates.items():
        yield name, f"{about}{needs.traffic}"
    if writing.estimates:
        memory = [f"{amount(each.memory)} by {name}" for name, each in writing.estimates.items()]
        yield "memory", f"about {', '.join(memory)}"
    if writing.upload is not None:
        yield "upload", f"{writing.upload}, if the Hub holds the base"
    yield "free disk", amount(writing.free)


def _short(value: object) -> str:
    """Return a value of config.json as text; a long list, such as one per layer, is abridged."""
    text = json.dumps(value)
    if isinstance(value, list) and len(text) > _LONGEST:
        return f"{len(value)} entries"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


_LONGEST = 60


def _as_dict(found: Plan) -> dict[str, Any]:
    layout, writing = found.layout, found.writing
    models, distance = layout.models, found.distance
    return {
        "what": found.sentence,
        "fingerprint": fingerprint(layout),
        "models": [
            {"model": name, "layers": depth}
            for name, depth in zip(found.names, found.depths, strict=True)
        ],
        "layers": [
            {
                "model": models.index(layer.model),
                "layer": layer.source,
                "role": role,
            }
            for layer, role in zip(
                layout.layers, roles.roles(layout, found.identities), strict=True
            )
        ],
        "new_layers": [layer.index for layer in layout.new_layers],
        "seams": [[*seam] for seam in roles.seams(layout, found.identities)],
        "distance": distance and {"mean": distance[0], "largest": distance[1]},
        "parameters": found.parameters
        and {
            **dataclasses.asdict(found.parameters),
            "counted_from": "weights" if found.counted else "config.json",
        },
        "writing": writing and writing.as_dict(),
        "config": found.config
        and {key: {"from": old, "to": new} for key, (old, new) in found.config.items()},
        "warnings": list(found.warnings),
    }
