"""Distribute tensors among the safetensors files of the result, and write their headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_interleave._stored_tensor import Shard
from mergekit_interleave.checkpoint.safetensors_header import WEIGHTS
from mergekit_interleave.engines.out_file import OutFile, in_order
from mergekit_interleave.planning.tensor_plan import TensorSpec

_ALIGNMENT = 8
"""The alignment of data in safetensors; no element is wider."""

_HEADER = 99_000_000
"""The maximum size of a header without padding and metadata; readers accept 100 MB."""


@dataclass(frozen=True)
class OutShard(OutFile):
    """A safetensors file of the result; all its tensors are from one source file."""

    @property
    def source(self) -> Shard:
        """The source file of its tensors."""
        return self.specs[0].tensor.shard

    def header(self) -> bytes:
        """Return the bytes before the data: a length of 8 bytes, then the padded JSON."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **self.source.metadata}}
        offset = 0
        for spec in self.specs:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": (offset, offset + spec.nbytes),
            }
            offset += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        start = self.best_start(_ALIGNMENT)
        start, step = (0, _ALIGNMENT) if start is None else (start, self.block)
        text += b" " * ((start - 8 - len(text)) % step)
        return struct.pack("<Q", len(text)) + text


def shards_of(specs: Sequence[TensorSpec], limit: int, block: int) -> list[OutShard]:
    """Distribute the tensors of a model among files.

    Args:
        specs: Every tensor of the model; none needs arithmetic.
        limit: The maximum bytes of data in one shard, unless a single tensor is larger.
        block: The block size of the filesystem, a multiple of 8.
    """
    groups: dict[Shard, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.tensor.shard, []).append(spec)
    parts = [part for group in groups.values() for part in cut(in_order(group, block), limit)]
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [WEIGHTS]
    return [
        OutShard(name, _with_aligned_elements(part), block)
        for name, part in zip(names, parts, strict=True)
    ]


def cut(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Cut a sequence of tensors into parts, each of which fits in one shard.

    Args:
        specs: The tensors.
        limit: The maximum bytes of data in one shard, unless a single tensor is larger.
    """
    shard: list[TensorSpec] = []
    size = header = 0
    for spec in specs:
        # The maximum size of an entry: the escaped name, and numbers of up to 20 digits.
        entry = len(json.dumps(spec.name)) + 22 * len(spec.shape) + 100
        if shard and (size + spec.nbytes > limit or header + entry > _HEADER):
            yield shard
            shard, size, header = [], 0, 0
        shard.append(spec)
        size += spec.nbytes
        header += entry
    yield shard


def _with_aligned_elements(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Order the tensors so that each starts at a multiple of its element's size.

    The order changes only if narrow elements of an odd size precede wide ones.
    """
    offset = 0
    for spec in specs:
        if offset % max(spec.tensor.width, 1):
            return sorted(specs, key=lambda spec: spec.tensor.width, reverse=True)
        offset += spec.nbytes
    return specs
