"""Write and read the record of a grown GGUF model: the keys under `interleave.` in its metadata.

They hold what interleave.json holds beside a model directory. Each value is JSON, except the
fingerprint of the layout.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import IO, Any

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Shard, Tensor
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
from mergekit_interleave.output import lineage, manifest, verification_text
from mergekit_interleave.planning import arithmetic, public_names
from mergekit_interleave.planning.gguf_metadata import PROVENANCE, SPLIT_PREFIX
from mergekit_interleave.planning.gguf_plan import GgufPlan
from mergekit_interleave.planning.shortest import KnownModels
from mergekit_interleave.planning.tensor_plan import TensorSpec

VERSION = 1

FINGERPRINT = "fingerprint"

TABLE, SAMPLE, OTHERS = "tensor_table", "sample", "metadata"
"""The keys of digests: of the names, types and shapes of all tensors, of bytes of some of them, and
of all other keys. A program that has changed a file, such as llama-quantize, keeps the record."""

_SAMPLED, _BYTES = 256, 64
"""The number of tensors in the sample, and of bytes from the middle of each."""

REPO = public_names.REPO


def _is(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _all(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(_is(kind), value))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "version": lambda value: value == VERSION,
    FINGERPRINT: _is(str),
    "directive": _is(dict),
    "models": lambda value: _all(dict)(value) and all(map(_is_source, value)),
    "layers": _all(dict),
    "identities": _all(int),
    "equal": _is(bool),
    "bytes": _count,
    "types": lambda value: _all(str)(value) and bool(value),
    "parameters": lambda value: _count(value) and value > 0,
    "new_parameters": _count,
    "tools": _is(dict),
    TABLE: _is(str),
    SAMPLE: _is(str),
    OTHERS: _is(str),
}
"""The keys that every record has, each with a function that checks its value."""

_OPTIONAL: Mapping[str, Callable[[Any], bool]] = {
    "base": _count,
    lineage.KEY: _all(dict),
    "verified": _is(dict),
    REPO: _is(str),
}


def _is_source(entry: Mapping[str, Any]) -> bool:
    return (
        all(_count(entry.get(key)) for key in ("layers", "parameters"))
        and isinstance(entry.get("model"), str | dict)
        and isinstance(entry.get("hub_id", ""), str)
    )


def describe(
    plan: GgufPlan, verified: Mapping[str, Any], repo: str | None = None
) -> dict[str, Any]:
    """Return the record of a result.

    Args:
        plan: The plan of the result.
        verified: The outcome of each verification, by its kind.
        repo: The Hub id under which it will be published, if the user gives it.
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
        **({REPO: repo} if repo else {}),
        TABLE: table_of_specs(plan.specs),
        SAMPLE: _sample_of_specs(plan.specs),
        OTHERS: _digest_of(plan.metadata),
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
    checks = {**_CHECKS, **_OPTIONAL}
    try:
        for key in checks:
            value = model.metadata.get(f"{PROVENANCE}{key}")
            if value is not None:
                text = value.decoded() if value.kind == STRING else ""
                content[key] = text if key == FINGERPRINT else json.loads(text)
        if "layers" not in content:
            return None
        problem = _problem(content)
    except Exception as error:
        raise CheckpointError(
            f"{model.path}: the keys {PROVENANCE}* are malformed "
            f"({type(error).__name__}: {error!s:.200})"
        ) from error
    if problem is not None:
        raise CheckpointError(f"{model.path}: {PROVENANCE}{problem}")
    return content


def _problem(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a record, or None.

    Raises:
        Exception: It is malformed.
    """
    missing = _CHECKS.keys() - content.keys()
    if missing:
        return f"{min(missing)} is missing"
    for key, is_right in {**_CHECKS, **_OPTIONAL}.items():
        if key in content and not is_right(content[key]):
            return f"{key} is malformed"
    layout = lineage.layout_of(content)
    if content[FINGERPRINT] != fingerprint(layout):
        return f"{FINGERPRINT} does not match its layers"
    if content.get("base", 0) >= len(content["models"]):
        return "base names no model"
    if not {*content["identities"]} <= {layer.index for layer in layout.layers}:
        return "identities names no layer"
    verification_text.sentences(content.get("verified", {}))
    verification_text.short(content.get("verified", {}))
    return lineage.problem(content)


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


def is_as_written(model: GgufModel, content: Mapping[str, Any]) -> bool:
    """Whether a model is what a record was written for, as far as its digests tell."""
    return (
        has_recorded_tensors(model, content)
        and content[SAMPLE] == _sample_of(model.tensors)
        and has_recorded_metadata(model, content)
    )


def has_recorded_tensors(model: GgufModel, content: Mapping[str, Any]) -> bool:
    """Whether the names, types and shapes of the tensors are those of a record."""
    return bool(content[TABLE] == table_of(model.tensors))


def has_recorded_metadata(model: GgufModel, content: Mapping[str, Any]) -> bool:
    """Whether the metadata is that of a record."""
    return bool(content[OTHERS] == _digest_of(model.metadata))


def _digest_of(metadata: Mapping[str, Value]) -> str:
    """Return a digest of the metadata that is not of the record or of splits."""
    digest = hashlib.sha256()
    for key, value in sorted(metadata.items()):
        if not key.startswith((PROVENANCE, SPLIT_PREFIX)):
            digest.update(f"{key} {value.kind} {len(value.data)}\n".encode())
            digest.update(value.data)
    return digest.hexdigest()[:16]


def _sample_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of some bytes of stored tensors."""
    with closing(_Reader()) as reader:
        return _sampled({name: partial(reader.middle, t) for name, t in tensors.items()})


def _sample_of_specs(specs: Iterable[TensorSpec]) -> str:
    """Return a digest of the same bytes of planned tensors, from their sources."""
    with closing(_Reader()) as reader:
        return _sampled({spec.name: partial(reader.planned, spec) for spec in specs})


def _sampled(parts: Mapping[str, Callable[[], bytes]]) -> str:
    names = sorted(parts)
    digest = hashlib.sha256()
    for name in names[:: max(len(names) // _SAMPLED, 1)]:
        digest.update(parts[name]())
    return digest.hexdigest()[:16]


class _Reader:
    """Reads the middle of tensors."""

    def __init__(self) -> None:
        self._files: dict[Shard, IO[bytes]] = {}

    def middle(self, tensor: Tensor) -> bytes:
        """Return some bytes from the middle of a tensor."""
        if tensor.shard not in self._files:
            self._files[tensor.shard] = tensor.file.open("rb", buffering=0)
        file = self._files[tensor.shard]
        file.seek(tensor.start + tensor.nbytes // 2 // _BYTES * _BYTES)
        return file.read(min(_BYTES, tensor.nbytes - tensor.nbytes // 2 // _BYTES * _BYTES))

    def planned(self, spec: TensorSpec) -> bytes:
        """Return the same bytes of a tensor that is planned."""
        data = self.middle(spec.tensor)
        if spec.scale == 0:
            return bytes(len(data))
        if spec.constant is not None:
            value = _dtypes.encode(spec.dtype, spec.constant.value)
            return value * (len(data) // len(value))
        if spec.is_computed:
            mean = spec.mean_with
            other = None if mean is None else self.middle(mean.tensor)
            return arithmetic.compute(data, spec.operation, other)
        return data

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
