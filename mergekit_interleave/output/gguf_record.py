"""Write and read the record of a grown GGUF model: the keys under `interleave.` in its metadata.

They hold what interleave.json holds beside a model directory. Each value is JSON, except the
fingerprint of the layout.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave._version import __version__
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.gguf import values
from mergekit_interleave.gguf.model import GgufModel
from mergekit_interleave.gguf.values import STRING, Value
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import lineage, manifest
from mergekit_interleave.planning.gguf_metadata import PROVENANCE
from mergekit_interleave.planning.gguf_plan import GgufPlan
from mergekit_interleave.planning.shortest import KnownModels
from mergekit_interleave.planning.tensor_plan import TensorSpec

VERSION = 1

FINGERPRINT = "fingerprint"

TABLE = "tensor_table"
"""The key of a digest of the names, types and shapes of all tensors. Another program that has
changed the tensors, such as llama-quantize, keeps the record."""

_KEYS = (
    "version", FINGERPRINT, "directive", "models", "base", "layers", "identities", "equal",
    lineage.KEY, "bytes", "types", "parameters", "new_parameters", "verified", "tools", TABLE,
)  # fmt: skip


def describe(plan: GgufPlan, verified: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a result.

    Args:
        plan: The plan of the result.
        verified: The outcome of each verification, by its kind.
    """
    models = list(plan.sources.values())
    growths: list[dict[str, Any]] = []
    stored: Counter[str] = Counter()
    for spec in plan.specs:
        stored[spec.dtype] += spec.nbytes
    sources = [_source(model, plan, growths) for model in models]
    return {
        "version": VERSION,
        FINGERPRINT: fingerprint(plan.layout),
        "directive": directive_of(plan),
        "models": sources,
        **({"base": models.index(plan.base)} if plan.base is not models[0] else {}),
        "layers": manifest.layers(plan.layout, plan.specs),
        "identities": sorted(plan.identities),
        "equal": plan.is_identity,
        **({lineage.KEY: growths} if growths else {}),
        "bytes": plan.nbytes,
        "types": [name for name, _ in stored.most_common()],
        "parameters": plan.parameters,
        "new_parameters": plan.new_parameters,
        **({"verified": dict(verified)} if verified else {}),
        "tools": {"mergekit-interleave": __version__},
        TABLE: table_of_specs(plan.specs),
    }


def _source(model: GgufModel, plan: GgufPlan, growths: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry about a source model, and add its lineage to `growths`."""
    entry: dict[str, Any] = {
        "model": _yaml(plan.title(model.ref)),
        "layers": model.depth,
        "parameters": sum(tensor.elements for tensor in model.tensors.values()),
    }
    origin = plan.origins.get(model.ref)
    if origin is not None:
        entry["hub_id"] = origin.path
        entry |= {"commit": origin.revision} if origin.revision else {}
    earlier = read(model)
    if earlier is not None:
        entry[lineage.GROWTH] = lineage.inherited(growths, earlier)
    return entry


def directive_of(plan: GgufPlan) -> dict[str, Any]:
    """Return the shortest directive with public model names; a mergekit config if there is none."""
    expansion, sources = plan.expansion, plan.sources

    def name(model: ModelRef) -> object:
        return _yaml(plan.title(model))

    known = KnownModels(sources.get, lambda model: sources[model].depth)
    shortest = known.shortest(expansion.layout, expansion.directive.growth)
    directive: Directive = expansion.directive if shortest is None else shortest
    if isinstance(directive.growth, ExplicitSlices):
        return mergekit_yaml.to_document(expansion.layout, {}, name, expansion.modules)
    return replace(directive, mergekit={}).to_document(name)


def _yaml(name: str) -> object:
    """Return the name of a file as the YAML of a model, which may need the form of a mapping."""
    return ModelRef(ModelPath(name)).to_yaml()


def to_metadata(content: Mapping[str, Any]) -> dict[str, Value]:
    """Return a record as metadata."""
    return {
        f"{PROVENANCE}{key}": values.text(
            value if key == FINGERPRINT else json.dumps(value, separators=(",", ":"))
        )
        for key, value in content.items()
    }


def read(model: GgufModel) -> dict[str, Any] | None:
    """Return the record of a model, or None if it has none.

    Raises:
        CheckpointError: The record is malformed.
    """
    content: dict[str, Any] = {}
    try:
        for key in _KEYS:
            value = model.metadata.get(f"{PROVENANCE}{key}")
            if value is not None:
                text = value.decoded() if value.kind == STRING else ""
                content[key] = text if key == FINGERPRINT else json.loads(text)
        if "layers" not in content:
            return None
        is_whole = content.get(FINGERPRINT) == fingerprint(lineage.layout_of(content))
        problem = lineage.problem(content)
    except Exception as error:
        raise CheckpointError(
            f"{model.path}: the keys {PROVENANCE}* are malformed "
            f"({type(error).__name__}: {error!s:.200})"
        ) from error
    if problem is None and not is_whole:
        problem = f"{FINGERPRINT} does not match its layers"
    if problem is not None:
        raise CheckpointError(f"{model.path}: {PROVENANCE}{problem}")
    return content


def layout_of(content: Mapping[str, Any]) -> Layout:
    """Return the layers of a record."""
    return lineage.layout_of(content)


def table_of_specs(specs: Iterable[TensorSpec]) -> str:
    """Return the digest of the names, types and shapes of planned tensors."""
    return _digest((spec.name, spec.dtype, spec.shape) for spec in specs)


def table_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the names, types and shapes of stored tensors."""
    return _digest((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def _digest(rows: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    digest = hashlib.sha256()
    for name, kind, shape in sorted(rows):
        digest.update(f"{name} {kind} {shape}\n".encode())
    return digest.hexdigest()[:16]
