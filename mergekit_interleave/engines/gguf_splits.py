"""Distribute tensors among the GGUF files of the result, and write their headers.

ggml accepts no gaps between the tensors, only their padding. So that copied tensors can share
blocks with the base, the header is padded by a key of its own. Where the sizes of all tensors are
multiples of the block size, as in most large models, all copies can share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_interleave._stored_tensor import Shard, padded
from mergekit_interleave.engines.out_file import OutFile, in_order
from mergekit_interleave.gguf import header, values
from mergekit_interleave.gguf.header import ALIGNMENT, Entry
from mergekit_interleave.gguf.model import SPLIT, SPLIT_TENSORS, SPLITS, GgufModel, split_name
from mergekit_interleave.gguf.values import Value
from mergekit_interleave.planning.gguf_metadata import PROVENANCE
from mergekit_interleave.planning.gguf_plan import GgufPlan
from mergekit_interleave.planning.tensor_plan import TensorSpec

FINGERPRINT = f"{PROVENANCE}fingerprint"
"""The key of the record that each split has, so that it is known which run wrote it."""

PADDING = f"{PROVENANCE}padding"
"""The key whose bytes move the data to an offset at which it can share blocks."""

_UINT8, _UINT16, _INT32 = 0, 2, 5


@dataclass(frozen=True)
class OutSplit(OutFile):
    """A GGUF file of the result.

    Attributes:
        metadata: The metadata of the file.
        version: The version of the format.
    """

    metadata: Mapping[str, Value]
    version: int

    @property
    def alignment(self) -> int:
        """The number of bytes at a multiple of which each tensor starts."""
        return header.alignment_of(self.metadata)

    def header(self) -> bytes:
        """Return the bytes before the data."""
        entries = (Entry(s.name, s.dtype, s.shape, s.nbytes) for s in self.specs)
        encoded = header.encode_entries(entries, self.alignment)
        plain = header.encode_with(self.metadata, encoded, len(self.specs), self.version)
        start = self.best_start(self.alignment)
        if start is None or len(plain) % self.block == start:
            return plain
        least = len(self._padded(encoded, 0))
        return self._padded(encoded, (start - least) % self.block)

    def _padded(self, encoded: bytes, padding: int) -> bytes:
        """Return the header with a key of some more bytes than the alignment needs."""
        metadata = {**self.metadata, PADDING: values.array(_UINT8, [b"\0"] * padding)}
        return header.encode_with(metadata, encoded, len(self.specs), self.version)


def splits_of(
    plan: GgufPlan, stem: str, provenance: Mapping[str, Value], limit: int | None, block: int
) -> list[OutSplit]:
    """Distribute the tensors of a plan among files: those of its base, or as few as a limit allows.

    Args:
        plan: The plan.
        stem: The name of the result, without a suffix.
        provenance: The keys of the first file that describe how the model was made.
        limit: The maximum bytes of data in one file, unless a single tensor is larger; None keeps
            the splits of the base.
        block: The block size of the filesystem, a multiple of 8.
    """
    models = list(dict.fromkeys([*plan.sources.values(), plan.base]))
    alignment = header.alignment_of(plan.metadata)
    version = max(file.version for model in models for file in model.files)
    groups = _groups(plan.specs, models, block, alignment, keep=limit is None)
    parts = [p for group in groups for p in _cut(group, limit, alignment)]
    if len(parts) == 1:
        whole = {**plan.metadata, **provenance}
        return [OutSplit(f"{stem}.gguf", parts[0], block, whole, version)]
    own = {key: plan.metadata[key] for key in (ALIGNMENT,) if key in plan.metadata}
    own |= {key: value for key, value in provenance.items() if key == FINGERPRINT}
    return [
        OutSplit(
            split_name(stem, index, len(parts)),
            part,
            block,
            {
                **({**plan.metadata, **provenance} if index == 0 else own),
                SPLIT: values.number(_UINT16, index),
                SPLITS: values.number(_UINT16, len(parts)),
                SPLIT_TENSORS: values.number(_INT32, len(plan.specs)),
            },
            version,
        )
        for index, part in enumerate(parts)
    ]


def _groups(
    specs: Sequence[TensorSpec],
    models: Sequence[GgufModel],
    block: int,
    alignment: int,
    *,
    keep: bool,
) -> list[list[TensorSpec]]:
    """Group tensors by the split that they come from, or put all into one group."""
    number = {file.shard: index for model in models for index, file in enumerate(model.files)}
    by_source: dict[Shard, list[TensorSpec]] = {}
    for spec in specs:
        by_source.setdefault(spec.tensor.shard, []).append(spec)
    groups: dict[int, list[TensorSpec]] = {}
    for shard in sorted(by_source, key=number.__getitem__):
        group = groups.setdefault(number[shard] if keep else 0, [])
        group += in_order(by_source[shard], block, alignment)
    return list(groups.values())


def _cut(
    specs: Sequence[TensorSpec], limit: int | None, alignment: int
) -> Iterator[list[TensorSpec]]:
    """Cut a sequence of tensors into parts, each of which fits in one file."""
    part: list[TensorSpec] = []
    size = 0
    for spec in specs:
        nbytes = padded(spec.nbytes, alignment)
        if part and limit is not None and size + nbytes > limit:
            yield part
            part, size = [], 0
        part.append(spec)
        size += nbytes
    yield part
