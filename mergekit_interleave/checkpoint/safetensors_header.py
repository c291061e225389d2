"""Read the headers and the index of safetensors files, never the data.

A file is 8 bytes of header length, the header as JSON, then the data of its tensors:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes, _out_files
from mergekit_interleave._stored_tensor import Shard, Stamp, Tensor
from mergekit_interleave.errors import CheckpointError

WEIGHTS = _out_files.WEIGHTS
INDEX = _out_files.INDEX

_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself

_MAX_JSON = 500_000_000
"""The maximum size in bytes of a JSON file; the index of a million tensors has 100 MB."""

_MAX_DIMENSIONS = 64  # the limit of torch


def next_data(descriptor: int, at: int) -> int:
    """Return the offset of the next data at or after `at`, skipping holes, or the file's end."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except AttributeError:  # not on every system
        return at
    except OSError as error:
        return os.fstat(descriptor).st_size if error.errno == errno.ENXIO else at


def read_json(path: Path, most: int = _MAX_JSON) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        most: The maximum size in bytes.

    Raises:
        CheckpointError: The file is missing, too large, or not a JSON object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > most:
            raise CheckpointError(f"{path}: file too large (limit {most} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON ({error})"
        raise CheckpointError(f"{path}: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """Format a JSON object for a file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a directory from the headers of its safetensors files.

    Raises:
        CheckpointError: There are no safetensors files, or a header or the index is malformed.
    """
    return dict(iterate_tensors(path))


PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files with pickled weights that transformers reads: the weights, or their index."""


def has_weight_files(path: Path) -> bool:
    """Whether a directory has weights that transformers reads, or an index of them."""
    return any((path / name).is_file() for name in (WEIGHTS, INDEX, *PICKLES))


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a directory, shard by shard.

    Raises:
        CheckpointError: There are no safetensors files, or a header or the index is malformed.
    """
    single, index = path / WEIGHTS, path / INDEX
    if index.is_file():
        yield from _iterate_indexed(path, index)
    elif single.is_file():
        yield from read_file(single).items()
    elif any((path / name).is_file() for name in PICKLES):
        raise CheckpointError(
            f"{path}: the weights are pickled, and pickles are not loaded by default",
            hint="pass --allow-pickle to read only the tensors in them",
        )
    else:
        raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX} exists")


def _iterate_indexed(path: Path, index: Path) -> Iterator[tuple[str, Tensor]]:
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    if (path / WEIGHTS).is_file() and shards != [WEIGHTS]:
        raise CheckpointError(
            f"{path}: holds both {WEIGHTS} and {INDEX}, which names other files",
            hint="remove the one that does not belong to the model",
        )
    strays: set[str] = set()
    for shard in shards:
        for name, tensor in read_file(path / shard).items():
            if weight_map.pop(name, None) == shard:
                yield name, tensor
            else:
                strays.add(name)
    strays |= weight_map.keys()
    if strays:
        raise CheckpointError(f"{index}: the index and the shards disagree about {min(strays)}")


def read_index(path: Path) -> dict[str, str]:
    """Read which tensors an index names, and the shard of each.

    Raises:
        CheckpointError: The index is malformed, or the name of a shard is invalid.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for shard in set(map(str, weight_map.values())):
        if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise CheckpointError(f"{path}: {shard!r} is not a valid shard name")
    for name, shard in weight_map.items():
        weight_map[name] = sys.intern(shard)  # many tensors share few names
    return weight_map


def read_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file."""
    try:
        # Non-blocking, because opening a pipe would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            size = status.st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short",
                    hint="if it is a Git LFS pointer, run `git lfs pull`" if size < 1024 else None,  # noqa: PLR2004 - pointers are tiny
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            metadata = dict(header.pop("__metadata__", None) or {})
            texts = {str(key): str(value) for key, value in metadata.items()}
            shard = Shard(path, texts, Stamp.of(status))
            tensors = {name: _tensor(entry, shard, 8 + length) for name, entry in header.items()}
            _check_layout(tensors, 8 + length, size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header ({error!r})") from error
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; duplicate keys are refused because readers treat them differently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r}")
    return content


def _tensor(entry: Mapping[str, Any], shard: Shard, data: int) -> Tensor:
    """Parse an entry of a header, for a file whose data starts at `data`."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    # Not isinstance, which would accept true and false.
    if len(shape) > _MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)
    ):
        raise ValueError(f"{str(entry)[:200]}")
    if data + stop > shard.stamp.size:
        raise CheckpointError(f"{shard.file}: cut short: it ends before its last tensor")
    known = _dtypes.STORED.get(dtype)
    if known and math.prod(shape) * known.bits != (stop - start) * 8:
        raise ValueError(f"{str(entry)[:200]}")
    dtype, shape, nbytes = _shared(str(dtype), shape, stop - start)
    return Tensor(dtype, shape, data + start, nbytes, shard)


def _check_layout(tensors: Mapping[str, Tensor], data: int, size: int) -> None:
    """Check that the tensors fill the data without gaps, as the format requires."""
    end = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise ValueError("the tensors overlap or leave gaps")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{size - end} bytes after the last tensor")


@lru_cache(maxsize=1024)
def _shared(dtype: str, shape: tuple[int, ...], nbytes: int) -> tuple[str, tuple[int, ...], int]:
    """Return a shared copy, because many tensors of a checkpoint have the same dtype and shape."""
    return dtype, shape, nbytes
