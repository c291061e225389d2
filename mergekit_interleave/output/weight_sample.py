"""A digest that shows whether weights changed since `run` wrote them.

It covers the name, dtype, shape and evenly spaced blocks of every tensor, and all of a small one.
Training changes many values of a tensor, so it changes the digest. Unlike a digest of every byte,
this one costs no time on a large model, and unlike a time stamp it survives copies and downloads.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors
from mergekit_interleave.errors import CheckpointError

KEY = "weight_sample"
"""The key of interleave.json that contains the digest."""

CHANGED = "changed"
"""The key that tells what has changed since the model was made, if that was not verified."""

NEW_LAYERS, WEIGHTS = ("new layers", "weights")
"""Its values: new layers are not what the layout says, or some weights are not what `run` wrote."""

_BLOCK = 4096
_BLOCKS = 4


def digest(directory: Path) -> str:
    """Return the digest of the weights of a directory; the shards they are in do not matter.

    Raises:
        CheckpointError: There are no safetensors files, or a header or the index is malformed.
        OSError: A file cannot be read.
    """
    by_file: defaultdict[Path, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in iterate_tensors(directory):
        by_file[tensor.file][name] = tensor
    found: dict[str, bytes] = {}
    for file, tensors in by_file.items():
        with file.open("rb", buffering=0) as opened:
            found |= {name: _of_tensor(opened, tensor) for name, tensor in tensors.items()}
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(hashlib.sha256(name.encode()).digest() + found[name])
    return total.hexdigest()


def are_those_of(content: Mapping[str, Any], directory: Path) -> bool:
    """Return whether a directory has the weights that an interleave.json describes."""
    try:
        return content.get(KEY) == digest(directory)
    except CheckpointError:
        return False


def _of_tensor(opened: RawIOBase, tensor: Tensor) -> bytes:
    total = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    last = tensor.nbytes - _BLOCK
    starts = [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
    whole = last < _BLOCK * (_BLOCKS - 1)
    for at in (0,) if whole else starts:
        opened.seek(tensor.start + at)
        total.update(opened.read(tensor.nbytes if whole else _BLOCK) or b"")
    return total.digest()
