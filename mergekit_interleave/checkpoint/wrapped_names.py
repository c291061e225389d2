"""Recognize the names of tensors of a wrapped module, and write a copy with the model's own names.

torch.compile, FSDP and others wrap a module and put a word into the names of its tensors. If the
wrapper is saved, transformers finds none of the names that it expects and fills the model with
random numbers. Such a checkpoint is refused. To write a copy with the right names, run
`python -m mergekit_interleave.checkpoint.wrapped_names DIR NEW`.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import pickle_weights
from mergekit_interleave.checkpoint.safetensors_header import (
    INDEX,
    WEIGHTS,
    read_index,
    read_json,
    read_tensors,
    to_json,
)
from mergekit_interleave.errors import CheckpointError, InterleaveError, RefusedError

_MODULE = "mergekit_interleave.checkpoint.wrapped_names"

_WORDS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""What a wrapper puts before the name of any module, and the wrapper."""

_METADATA = "__metadata__"

_FIRST = {"module": "DistributedDataParallel", **_WORDS}
"""What a wrapper puts before the name of the whole model."""


def check(path: Path, names: Iterable[str]) -> None:
    """Check that the tensors of a checkpoint do not have the names of a wrapped module.

    Args:
        path: The directory.
        names: The names of its tensors.

    Raises:
        RefusedError: They do.
    """
    for name in names:
        for i, word in enumerate(name.split(".")):
            wrapper = (_WORDS if i else _FIRST).get(word)
            if wrapper is not None:
                raise RefusedError(
                    f"{path}: its tensors have the names of a module wrapped by {wrapper}, such as "
                    f"{name}, so transformers would load random numbers in place of them",
                    hint="write a copy without the prefix, and grow that: "
                    f"python -m {_MODULE} {path} NEW",
                )


def without_wrappers(name: str) -> str:
    """Return the name that a tensor has in the model itself."""
    first, *others = name.split(".")
    kept = [] if first in _FIRST else [first]
    return ".".join([*kept, *(word for word in others if word not in _WORDS)])


def write_copy(source: Path, target: Path) -> int:
    """Write a copy of a checkpoint in which tensors have the names of the model itself.

    Args:
        source: The checkpoint, with safetensors or pickled weights.
        target: The directory to create.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: The weights cannot be read, or two tensors would have the same name.
        FileExistsError: The directory exists.
    """
    with scratch_directory() as folder:
        if not (source / WEIGHTS).is_file() and pickle_weights.files_of(source):
            pickle_weights.convert(source, folder / "converted")
            source = folder / "converted"
        names = list(read_tensors(source))
        if len({*map(without_wrappers, names)}) < len(names):
            raise CheckpointError(f"{source}: two tensors differ only in the prefix of a wrapper")
        target.mkdir(parents=True)
        try:
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=_is_weights)
            _write_weights(source, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    return len(names)


def _is_weights(folder: str, names: list[str]) -> list[str]:
    del folder
    return [name for name in names if name == INDEX or name.endswith(".safetensors")]


def _write_weights(source: Path, target: Path) -> None:
    shards = [WEIGHTS]
    if (source / INDEX).is_file():
        index = read_json(source / INDEX)
        weight_map = read_index(source / INDEX)
        index["weight_map"] = {without_wrappers(n): shard for n, shard in weight_map.items()}
        (target / INDEX).write_text(to_json(index), encoding="utf-8")
        shards = sorted(set(weight_map.values()))
    for shard in shards:
        with (source / shard).open("rb") as old, (target / shard).open("wb") as new:
            (length,) = struct.unpack("<Q", old.read(8))
            header = json.loads(old.read(length))
            renamed = {n if n == _METADATA else without_wrappers(n): t for n, t in header.items()}
            text = json.dumps(renamed, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # keeps the tensors aligned
            new.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(old, new, 2**24)


def main(words: list[str]) -> int:
    """Write a copy of a checkpoint, given its directory and a new one; return the exit status."""
    match words:
        case [source, target]:
            pass
        case _:
            sys.stderr.write(f"usage: python -m {_MODULE} DIR NEW\n")
            return 2
    try:
        count = write_copy(Path(source), Path(target))
    except (InterleaveError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{target}: {count} tensors\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
