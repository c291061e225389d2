"""Write and read interleave.json, the record of a model's layers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_interleave import _out_files
from mergekit_interleave._files import replace_file
from mergekit_interleave._version import __version__
from mergekit_interleave.checkpoint import hub
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG, Checkpoint
from mergekit_interleave.checkpoint.safetensors_header import read_json, to_json
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelRef, is_directory_or_file
from mergekit_interleave.engines import registry
from mergekit_interleave.errors import CheckpointError, DirectiveError, InterleaveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import card_metadata, lineage, weight_sample
from mergekit_interleave.output.verification_text import FORWARD, LINEAGE
from mergekit_interleave.planning import public_names
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.shortest import KnownModels
from mergekit_interleave.planning.tensor_plan import TensorSpec

FILE = _out_files.MANIFEST
VERSION = 1

SAVED = "transformers"
"""The entry `engine` of a model that was built in memory and saved by transformers."""

REPO = public_names.REPO
LEGACY = "legacy_config"
"""The key that is true if config.json and the tokenizer are also written for transformers 4."""

FORCED = "forced"
"""The key that lists the settings in which stacked models differ, if the stack was forced."""

KEEPS_PERIOD = "llama_cpp_layout"
"""The key of the nearest directive that llama.cpp computes alike, if it misreads this layout."""


def describe(
    plan: ExpansionPlan,
    engine: str,
    beyond_mergekit: str | None,
    verified: Mapping[str, Any],
    warn: Callable[[str], object],
) -> dict[str, Any]:
    """Return the content of interleave.json, without the list of `files` in OUT.

    Args:
        plan: The plan of the model.
        engine: The engine that wrote the weights, or `SAVED`.
        beyond_mergekit: Why mergekit alone cannot write them, if it cannot.
        verified: The outcome of each verification, by its kind.
        warn: Called if the card of a source cannot be read.
    """
    models = plan.layout.models
    cards = {
        plan.public.title(source.ref): card_metadata.read(source.path, warn)
        for source in {**plan.sources, plan.base.ref: plan.base}.values()
    }
    carried = [name for name, _ in plan.small_files]
    inherited = card_metadata.inherited(cards, plan.public.title(plan.base.ref), carried)
    growths: list[dict[str, Any]] = []
    return {
        "version": VERSION,
        "fingerprint": fingerprint(plan.layout),
        "directive": directive_of(plan),
        "models": [_source(model, plan, cards, growths) for model in models],
        **({lineage.KEY: growths} if growths else {}),
        **facts(plan),
        "layers": layers(plan.layout, plan.specs),
        "inherited": inherited,
        **({LEGACY: True} if plan.legacy else {}),
        **({KEEPS_PERIOD: plan.keeps_period} if plan.keeps_period else {}),
        **({FORCED: list(plan.forced)} if plan.forced else {}),
        "engine": engine,
        **({"beyond_mergekit": beyond_mergekit} if beyond_mergekit else {}),
        "tools": tools(engine),
        **({"verified": dict(verified)} if verified else {}),
    }


def facts(plan: ExpansionPlan) -> dict[str, Any]:
    """Return the entries about the model as a whole."""
    found = totals(plan.layout, plan.specs, packed=is_packed(plan.first))
    found["identities"] = sorted(plan.identities)
    found["equal"] = plan.is_identity
    return found | ({"converted": plan.conversion} if plan.conversion else {})


def totals(layout: Layout, specs: Sequence[TensorSpec], *, packed: bool) -> dict[str, Any]:
    """Return the entries about all tensors together: size, dtypes and parameters.

    Args:
        layout: The layers.
        specs: Their tensors.
        packed: Whether a stored integer may contain several parameters, which are then not counted.
    """
    new = {layer.index for layer in layout.new_layers}
    stored: Counter[str] = Counter()
    for spec in specs:
        stored[spec.dtypes[-1]] += spec.nbytes
    found: dict[str, Any] = {
        "bytes": stored.total(),
        "dtypes": [dtype for dtype, _ in stored.most_common()],
    }
    if not packed:
        sizes = [(spec.layer in new, math.prod(spec.shape)) for spec in specs]
        found["parameters"] = sum(size for _, size in sizes)
        found["new_parameters"] = sum(size for is_new, size in sizes if is_new)
    return found


def is_packed(checkpoint: Checkpoint) -> bool:
    """Return whether a stored integer may contain several parameters."""
    return checkpoint.is_quantized and any(
        tensor.dtype[:1] in ("I", "U") for tensor in checkpoint.tensors.values()
    )


def layers(layout: Layout, specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Return the entries about each layer.

    Args:
        layout: The layers.
        specs: Their tensors.
    """
    models = layout.models
    zeroed: dict[int, list[str]] = {layer.index: [] for layer in layout.layers}
    filled: dict[int, dict[str, float]] = {layer.index: {} for layer in layout.layers}
    for spec in specs:
        if spec.layer is not None:
            tensor = re.split(rf"\.{spec.layer}\.", spec.name, maxsplit=1)[-1]
            if spec.constant is not None:
                filled[spec.layer][tensor] = spec.constant.value
            elif spec.scale == 0:
                zeroed[spec.layer].append(tensor)
    return [
        {
            "model": models.index(layer.model),
            "layer": layer.source,
            "new": layer.new,
            "zeroed": zeroed[layer.index],
            "set": filled[layer.index],
            "scale": [{"filter": s.filter, "value": s.value} for s in layer.scales if not s.fixed],
            **({"gain": gains} if (gains := [asdict(s) for s in layer.scales if s.fixed]) else {}),
            **({} if layer.mean_with is None else {"mean_with": layer.mean_with}),
            **({"fill": [asdict(c) for c in layer.constants]} if layer.constants else {}),
        }
        for layer in layout.layers
    ]


def directive_of(plan: ExpansionPlan) -> dict[str, Any]:
    """Return the shortest directive with public model names; the recipe if there is none.

    A model has one description, whichever directive or slices it was made from.
    """
    expansion, sources = plan.expansion, plan.sources
    known = KnownModels(sources.get, lambda model: sources[model].depth)
    shortest = known.shortest(expansion.layout, expansion.directive.growth)
    directive = expansion.directive if shortest is None else shortest
    written = mergekit_yaml.to_document(
        plan.expansion.layout, plan.mergekit, plan.public, plan.expansion.modules
    )
    if isinstance(directive.growth, ExplicitSlices):
        return written
    directive = replace(directive, mergekit=expansion.directive.mergekit)
    short = {str(plan.public(model)): key for key, model in directive.models.items()}
    keys = {
        key: short.get(value, value) if isinstance(value := written[key], str) else value
        for key in plan.mergekit
    }
    return directive.to_document(plan.public) | keys


def _source(
    model: ModelRef,
    plan: ExpansionPlan,
    cards: Mapping[str, Mapping[str, Any]],
    growths: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the entry about a source model, and add its lineage to `growths`."""
    checkpoint = plan.sources[model]
    source: dict[str, Any] = {"model": plan.public(model), "layers": checkpoint.depth}
    if not is_packed(checkpoint):
        source["parameters"] = sum(tensor.elements for tensor in checkpoint.tensors.values())
    stated = card_metadata.license_of(cards[plan.public.title(model)])
    source |= {"license": stated} if stated else {}
    known, lora = plan.public.origins.get(model), model.lora
    if known is not None:
        source["hub_id"] = known.path
        if lora is not None and not is_directory_or_file(lora.path) and hub.is_hub_id(lora.path):
            source["lora_hub_id"] = lora.path
    origin = checkpoint.hub_origin
    source |= {"commit": origin.revision} if origin else {}
    before = of_source(checkpoint)
    if before is not None:
        source[lineage.GROWTH] = lineage.inherited(growths, before)
    return source


def check_sources(plan: ExpansionPlan, base_model: str | None = None) -> list[str]:
    """Check that the source models are what their interleave.json describe, if they have one.

    Args:
        plan: The plan of the model.
        base_model: The Hub id that the user gives for the only source model.

    Returns:
        A warning if that may have been meant for the first base of the source; else nothing.

    Raises:
        CheckpointError: One of them is not.
        DirectiveError: The Hub id is that of an earlier base.
    """
    found = [of_source(checkpoint) for checkpoint in plan.sources.values()]
    if base_model is None or found[0] is None:
        return []
    hub_id = base_model.partition("@")[0]
    first = lineage.first_bases(found[0])
    if any(entry.get("hub_id") == hub_id for entry in lineage.entries(found[0])):
        raise DirectiveError(
            f"base_model: {hub_id} is an earlier base of {plan.first.path}, which it names here",
            hint="leave --base-model out, because the Hub id of the earlier base is known",
        )
    warning = f"--base-model names the source, {plan.first.path.name}, by {hub_id}; `card OUT "
    return [f"{warning}--base-model` names its first base, {' and '.join(first)}"]


def of_source(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return the interleave.json of a source model, or None if it has none.

    A file of this name that records no layers is some other file, which nothing depends on.

    Raises:
        CheckpointError: It is malformed, or does not describe the model.
    """
    file = checkpoint.path / FILE
    if not _is_record(file):
        return None
    try:
        return _describing(checkpoint, file)
    except CheckpointError as error:
        error.hint = f"to grow the model without its lineage, name a copy of it without {FILE}"
        raise


def _is_record(file: Path) -> bool:
    try:
        return file.is_file() and {"version", "layers"} <= read_json(file, most=MAX_CONFIG).keys()
    except CheckpointError:
        return False


def _describing(checkpoint: Checkpoint, file: Path) -> Mapping[str, Any]:
    content = read(file).content
    if content.get("fingerprint") != fingerprint(lineage.layout_of(content)):
        raise CheckpointError(f"{file}: fingerprint does not match its layers")
    if len(content["layers"]) != checkpoint.depth:
        raise CheckpointError(
            f"{file}: layers has {len(content['layers'])} entries, but config.json has "
            f"{checkpoint.depth} layers"
        )
    return content


def tools(engine: str) -> dict[str, str]:
    """Return the versions of the tools that write the model with an engine."""
    saving = ("torch", "transformers", "safetensors")
    packages = saving if engine == SAVED else registry.ENGINES[engine].packages
    versions = {name: metadata.version(name) for name in packages}
    return {"mergekit-interleave": __version__, **versions}


@dataclass(frozen=True)
class Manifest:
    """A parsed interleave.json.

    Attributes:
        directive: The layers as a mergekit config, with mergekit's own keys.
        depths: The number of layers of each source model.
        content: The whole content.
    """

    directive: Directive
    depths: Sequence[int]
    content: Mapping[str, Any]

    @property
    def models(self) -> list[str]:
        """The public names of the source models."""
        return [str(entry["model"]) for entry in self.content["models"]]

    @property
    def files(self) -> list[str]:
        """The files that the run wrote, relative to the directory."""
        files = self.content.get("files")
        return [str(name) for name in files] if isinstance(files, list) else []


def read(file: Path) -> Manifest:
    """Read an interleave.json.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    return of_content(read_json(file, most=MAX_CONFIG), file)


def of_content(content: Mapping[str, Any], file: Path) -> Manifest:
    """Parse the content of an interleave.json.

    Args:
        content: The whole content.
        file: The file, for errors.

    Raises:
        CheckpointError: It is malformed.
    """
    if not {"version", "layers"} <= content.keys():
        raise CheckpointError(f"{file}: not an interleave.json")
    if content["version"] != VERSION:
        raise CheckpointError(f"{file}: unknown version {content['version']!r:.40}")
    try:
        depths = [int(entry["layers"]) for entry in content["models"]]
        directive = lineage.directive_of(content)
        problem = lineage.problem(content)
    except (
        ArithmeticError, AttributeError, InterleaveError, LookupError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{file}: not an interleave.json ({error!r:.200})") from error
    if problem is not None:
        raise CheckpointError(f"{file}: {problem}")
    return Manifest(directive, depths, content)


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Write interleave.json, unless it is a link, perhaps into the Hub's cache.

    Raises:
        OutputError: It cannot be written.
    """
    file = directory / FILE
    if not file.is_symlink():
        replace_file(file, to_json(content))


def record_legacy(directory: Path) -> None:
    """Record in interleave.json, if there is one, that transformers 4 reads the model, too.

    Raises:
        OSError: It cannot be written.
    """
    file = directory / FILE
    if file.is_file():
        replace_file(file, to_json({**read_json(file, most=MAX_CONFIG), LEGACY: True}))


def record(directory: Path, kind: str, outcome: Mapping[str, Any]) -> dict[str, Any] | None:
    """Record the outcome of a verification in interleave.json.

    Args:
        directory: The model.
        kind: The kind of verification, such as `weights`.
        outcome: The outcome.

    Returns:
        The new content, or None if the file is missing or a link, perhaps into the Hub's cache.

    Raises:
        OutputError: It cannot be written.
    """
    file = directory / FILE
    if file.is_symlink() or not file.is_file():
        return None
    content = read_json(file, most=MAX_CONFIG)
    before = content.get("verified", {})
    # Earlier outcomes apply only to the same weights.
    is_own = weight_sample.are_those_of(content, directory)
    same = is_own and (
        kind == FORWARD or ((kind == LINEAGE or kind in before) and outcome["exact"])
    )
    content["verified"] = {**(before if same else {}), kind: dict(outcome)}
    if not is_own and outcome.get(
        "exact", True
    ):  # otherwise the weights are not those of this record
        content[weight_sample.KEY] = weight_sample.digest(directory)
    content.pop(weight_sample.CHANGED, None)
    write(directory, content)
    return content
