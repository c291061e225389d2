"""interleave.json: what the new model is, layer for layer, for whoever holds it later."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave._version import __version__
from mergekit_interleave.checkpoint import hub
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG, Checkpoint
from mergekit_interleave.checkpoint.safetensors_header import read_json, to_json
from mergekit_interleave.directive.directive import MERGEKIT_KEYS, Directive, from_document
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelRef, is_directory_or_file
from mergekit_interleave.engines import registry
from mergekit_interleave.errors import CheckpointError, InterleaveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import card_metadata
from mergekit_interleave.output.verification_text import FORWARD
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.tensor_plan import TensorSpec

FILE = "interleave.json"
VERSION = 1


def fingerprint(layout: Layout) -> str:
    """A name for the layout that does not depend on what its models are called.

    Only models of the same fingerprint can be merged with each other layer by layer.
    """
    models = layout.models
    layers = [
        [
            models.index(layer.model),
            layer.source,
            [[s.filter, float(s.value)] for s in layer.scales],
            *[[c.filter, float(c.value), c.after, c.square] for c in layer.constants],
        ]
        for layer in layout.layers
    ]
    digest = hashlib.sha256(json.dumps(layers, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]


def describe(
    plan: ExpansionPlan, engine: str, beyond_mergekit: str | None, verified: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of interleave.json; which `files` stand in OUT is known only later.

    Args:
        plan: What was made.
        engine: What wrote the weights.
        beyond_mergekit: Why mergekit alone cannot, if it cannot.
        verified: What was compared, and what came of it.
    """
    models = plan.layout.models
    cards = {
        plan.public.title(source.ref): card_metadata.read(source.path)
        for source in {**plan.sources, plan.base.ref: plan.base}.values()
    }
    carried = [name for name, _ in plan.small_files]
    inherited = card_metadata.inherited(cards, plan.public.title(plan.base.ref), carried)
    return {
        "version": VERSION,
        "fingerprint": fingerprint(plan.layout),
        "directive": directive_of(plan),
        "models": [_source(model, plan, cards) for model in models],
        **facts(plan),
        "layers": layers(plan.layout, plan.specs),
        "inherited": inherited,
        "engine": engine,
        **({"beyond_mergekit": beyond_mergekit} if beyond_mergekit else {}),
        "tools": tools(engine),
        **({"verified": dict(verified)} if verified else {}),
    }


def facts(plan: ExpansionPlan) -> dict[str, Any]:
    """What interleave.json says of the model as a whole."""
    found = totals(plan.layout, plan.specs, packed=is_packed(plan.first))
    found["identities"] = sorted(plan.identities)
    found["equal"] = plan.is_identity
    return found | ({"converted": plan.conversion} if plan.conversion else {})


def totals(layout: Layout, specs: Sequence[TensorSpec], *, packed: bool) -> dict[str, Any]:
    """What interleave.json says of all the tensors together.

    Args:
        layout: The layers.
        specs: Their tensors.
        packed: Whether a stored number may be several, so that they cannot be counted.
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
    """Whether weights are stored as integers that may hold several numbers each."""
    return checkpoint.is_quantized and any(
        tensor.dtype[:1] in ("I", "U") for tensor in checkpoint.tensors.values()
    )


def layers(layout: Layout, specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """What interleave.json says of each layer.

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
            "scale": [{"filter": s.filter, "value": s.value} for s in layer.scales],
            **({"fill": [asdict(c) for c in layer.constants]} if layer.constants else {}),
        }
        for layer in layout.layers
    ]


def directive_of(plan: ExpansionPlan) -> dict[str, Any]:
    """The directive with its models under their public names; spelled slices are the recipe."""
    directive = plan.expansion.directive
    written = mergekit_yaml.to_document(
        plan.expansion.layout, plan.mergekit, plan.public, plan.expansion.modules
    )
    if isinstance(directive.growth, ExplicitSlices):
        return written
    return directive.to_document(plan.public) | {key: written[key] for key in plan.mergekit}


def _source(
    model: ModelRef, plan: ExpansionPlan, cards: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
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
    return source | ({"commit": origin.revision} if origin else {})


def tools(engine: str) -> dict[str, str]:
    """The versions of what made the model; the stream engine is this project's own."""
    packages = registry.ENGINES[engine].packages
    versions = {name: metadata.version(name) for name in packages}
    return {"mergekit-interleave": __version__, **versions}


@dataclass(frozen=True)
class Manifest:
    """What an interleave.json says.

    Attributes:
        directive: The layers as a mergekit config, with mergekit's own keys.
        depths: How many layers each of its models has.
        content: All of it.
    """

    directive: Directive
    depths: Sequence[int]
    content: Mapping[str, Any]

    @property
    def models(self) -> list[str]:
        """What its models are called."""
        return [str(entry["model"]) for entry in self.content["models"]]

    @property
    def files(self) -> list[str]:
        """The files that the run has written, by their names below the directory."""
        files = self.content.get("files")
        return [str(name) for name in files] if isinstance(files, list) else []


def read(file: Path) -> Manifest:
    """Read an interleave.json.

    Raises:
        CheckpointError: It is missing, or is none.
    """
    return of_content(read_json(file, most=MAX_CONFIG), file)


def of_content(content: Mapping[str, Any], file: Path) -> Manifest:
    """What the content of an interleave.json says.

    Args:
        content: All of it.
        file: Where it stands, for errors.

    Raises:
        CheckpointError: It is none.
    """
    if not {"version", "layers"} <= content.keys():
        raise CheckpointError(f"{file}: not an interleave.json")
    if content["version"] != VERSION:
        raise CheckpointError(f"{file}: version {content['version']!r:.40} is not known")
    try:
        models = [entry["model"] for entry in content["models"]]
        depths = [int(entry["layers"]) for entry in content["models"]]
        keys = content["directive"].keys() & {*MERGEKIT_KEYS} - {"merge_method", "parameters"}
        document = {
            "slices": [{"sources": [_source_of(entry, models)]} for entry in content["layers"]],
            **{key: content["directive"][key] for key in MERGEKIT_KEYS if key in keys},
        }
        directive = from_document(document)
        _check_models(
            mergekit_yaml.from_document({"slices": document["slices"]}, lambda _: None), depths
        )
    except (
        ArithmeticError, AttributeError, InterleaveError, LookupError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{file}: not an interleave.json ({error!r:.200})") from error
    return Manifest(directive, depths, content)


def _check_models(layout: Layout, depths: Sequence[int]) -> None:
    if len(layout.models) != len(depths):
        raise ValueError(f"{len(depths)} models, and layers of {len(layout.models)}")


def _source_of(entry: Mapping[str, Any], models: Sequence[object]) -> dict[str, object]:
    """A layer as mergekit would say it; scales of top-level parameters are among its own."""
    written = {name: entry[name] for name in ("scale", "fill") if entry.get(name)}
    source = {"model": models[entry["model"]], "layer_range": [entry["layer"], entry["layer"] + 1]}
    return {**source, "parameters": written} if written else source


def record(directory: Path, kind: str, outcome: Mapping[str, Any]) -> dict[str, Any] | None:
    """Write into interleave.json what was verified.

    Args:
        directory: The model.
        kind: What was compared.
        outcome: What came of it.

    Returns:
        All that was verified so far, None where there is no interleave.json of its own: one that
        is a link belongs to the Hub's cache.

    Raises:
        OutputError: It cannot be written.
    """
    file = directory / FILE
    if file.is_symlink() or not file.is_file():
        return None
    content = read_json(file, most=MAX_CONFIG)
    before = content.get("verified", {})
    # What was verified of other bytes is not true of these.
    same = kind == FORWARD or (kind in before and outcome["exact"])
    verified = {**(before if same else {}), kind: dict(outcome)}
    replace_file(file, to_json({**content, "verified": verified}))
    return verified
