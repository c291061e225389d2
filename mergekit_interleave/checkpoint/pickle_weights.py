"""Convert pickled weights to safetensors if the user allows it; no code in them is executed.

torch's `weights_only` loading builds only tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.safetensors_header import (
    INDEX,
    PICKLES,
    WEIGHTS,
    read_json,
    to_json,
)
from mergekit_interleave.errors import CheckpointError, OutputError

PICKLE, PICKLE_INDEX = PICKLES


def files_of(directory: Path) -> list[Path]:
    """List the files with pickled weights in a directory.

    Raises:
        CheckpointError: The index is malformed, or names a file that is not in the directory.
    """
    index = directory / PICKLE_INDEX
    if not index.is_file():
        return [directory / PICKLE] if (directory / PICKLE).is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.bin", name):
            raise CheckpointError(f"{index}: {name!r} is not a valid shard name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: no such file")
    return [directory / name for name in names]


def convert(directory: Path, into: Path) -> None:
    """Copy a checkpoint, with its pickled weights converted to safetensors.

    Args:
        directory: A checkpoint with pickled weights.
        into: The directory to create; it gets links to all other files.

    Raises:
        CheckpointError: A file contains anything other than tensors, or cannot be read.
        OutputError: The safetensors files cannot be written.
    """
    from safetensors.torch import save_file  # noqa: PLC0415 - imports torch

    shards = files_of(directory)
    into.mkdir(parents=True)
    for entry in directory.iterdir():
        if entry not in shards and entry.name != PICKLE_INDEX:
            (into / entry.name).symlink_to(entry.resolve(), entry.is_dir())
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = _load(shard)
        doubled = weight_map.keys() & tensors.keys()
        if doubled:
            raise CheckpointError(f"{shard}: {min(doubled)} is also in another file")
        try:
            save_file(tensors, into / name, {"format": "pt"})
        except Exception as error:
            raise OutputError(f"{shard} cannot be written as safetensors: {error}") from error
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (into / INDEX).write_text(to_json(index), encoding="utf-8")


def _load(shard: Path) -> dict[str, Any]:
    """Load the tensors of a file, none of which share memory."""
    import torch  # noqa: PLC0415 - takes seconds

    def load(*, mmap: bool) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old file formats
            return torch.load(shard, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        content = load(mmap=zipfile.is_zipfile(shard))  # old formats cannot be memory-mapped
    except Exception as error:  # malformed data can raise any exception in the unpickler
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise CheckpointError(
            f"{shard}: malformed, or contains more than tensors: {reason:.300}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise CheckpointError(f"{shard}: not a mapping from names to tensors")
    seen: set[int] = set()
    tensors = {}
    for name, tensor in content.items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors cannot store shared memory, so each name gets its own copy.
        tensors[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return tensors
