"""Open a GGUF model: one file, or the first of several splits.

It is a source of layers like `checkpoint.Checkpoint`, and has the same methods. The depth does not
count the blocks at the end that predict further tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.architectures.gguf import Architecture
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError
from mergekit_interleave.gguf import header
from mergekit_interleave.gguf.ggml_types import BY_NAME
from mergekit_interleave.gguf.header import GgufFile
from mergekit_interleave.gguf.values import Value

ARCHITECTURE = "general.architecture"
DEPTH = "block_count"

EXTRA = "nextn_predict_layers"
"""The number of blocks behind the layers, which predict further tokens."""

SPLIT, SPLITS, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
"""The keys of a file that is one of several: its number from 0, how many files there are, and how
many tensors they hold together."""

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)")

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)")


def split_name(stem: str, index: int, count: int) -> str:
    """Return the name of a split as llama.cpp spells it.

    Args:
        stem: The common part of the names.
        index: Its number, from 0.
        count: The number of splits.
    """
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def split_stem(name: str) -> str | None:
    """Return the common part of the names of splits, or None if a name is not that of a split."""
    found = _SPLIT_NAME.fullmatch(name)
    return None if found is None else found["stem"]


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model in GGUF files.

    Attributes:
        ref: The model as the user named it.
        files: Its files; the first holds the metadata.
    """

    ref: ModelRef
    files: tuple[GgufFile, ...]

    is_local = True
    has_weights = True

    @property
    def modules(self) -> Mapping[str, int | None]:
        """The modules of mergekit, which reads no GGUF files: none."""
        return {}

    @property
    def path(self) -> Path:
        """The file that was named."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The metadata of the model."""
        return self.files[0].metadata

    @cached_property
    def model_type(self) -> str:
        """The architecture that the metadata states, or an empty string."""
        value = self.metadata.get(ARCHITECTURE)
        content = None if value is None else value.decoded()
        return content if isinstance(content, str) else ""

    @cached_property
    def architecture(self) -> Architecture | None:
        """What is known of its architecture, or None if it is unknown."""
        return architectures.architecture_of(self.model_type)

    @property
    def family(self) -> Family | None:
        """The facts about its layers, or None if its architecture is unknown."""
        return None if self.architecture is None else self.architecture.family

    def require_family(self) -> Family:
        """Return the facts about its layers, which are few if its architecture is unknown.

        Raises:
            RefusedError: Its layers cannot be copied exactly.
        """
        architecture = self.architecture
        if architecture is None:
            return architectures.unknown_family(self.model_type)
        why = [architecture.refused]
        why += [name for key, name in architecture.refused_if.items() if self.is_set(key)]
        reason = next((architectures.reason(name) for name in why if name is not None), None)
        if reason is not None:
            raise RefusedError(f"{self.ref}: architecture {self.model_type} is refused: {reason}")
        return architecture.family

    def is_set(self, name: str) -> bool:
        """Whether a key of its architecture has a value other than zero."""
        value = self.metadata.get(self.key(name))
        return value is not None and bool(value.decoded())

    def key(self, name: str) -> str:
        """Return the whole name of a key of its architecture."""
        return f"{self.model_type}.{name}"

    def integer(self, name: str) -> int | None:
        """Return the count under a key of its architecture, or None if there is none.

        Raises:
            CheckpointError: The value is not a whole number, or is negative.
        """
        value = self.metadata.get(self.key(name))
        if value is None:
            return None
        if not value.is_integer or value.decoded() < 0:
            raise CheckpointError(f"{self.path}: {self.key(name)} is not a count")
        return int(value.decoded())

    @cached_property
    def blocks(self) -> int:
        """The number of blocks, which is the length of per-layer arrays.

        Raises:
            CheckpointError: The metadata states no valid number.
        """
        count = self.integer(DEPTH)
        name = self.key(DEPTH) if self.model_type else ARCHITECTURE
        if count is None or count < 1:
            raise CheckpointError(f"{self.path}: {name} states no layer count")
        if count > MAX_LAYERS:
            raise CheckpointError(f"{self.path}: {name} is {count} (limit {MAX_LAYERS})")
        return count

    @cached_property
    def depth(self) -> int:
        """Its number of layers, without the blocks that predict further tokens.

        Raises:
            CheckpointError: The metadata states no valid number.
        """
        extra = self.integer(EXTRA) or 0
        if not 0 <= extra < self.blocks:
            raise CheckpointError(
                f"{self.path}: {self.key(EXTRA)} is {extra}, but there are {self.blocks} blocks"
            )
        return self.blocks - extra

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, in the order of the files."""
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}

    @cached_property
    def _layers(self) -> Mapping[int | None, list[str]]:
        """The tensors of each layer; under None, those outside the layers."""
        layers: dict[int | None, list[str]] = {None: []}
        for name in self.tensors:
            layers.setdefault(self.layer_of(name), []).append(name)
        return layers

    @property
    def hub_origin(self) -> ModelPath | None:
        """The Hub id and commit that it was downloaded from, or None if its path has neither."""
        match = re.search(
            r"/models--([^/]+)/snapshots/([0-9a-f]{40})/", self.path.absolute().as_posix()
        )
        return ModelPath(match[1].replace("--", "/"), match[2]) if match else None

    def layer_of(self, name: str) -> int | None:
        """Return the index of a tensor's block, or None if it is outside the blocks."""
        found = _BLOCK.fullmatch(name)
        return None if found is None else int(found[1])

    def renamed(self, name: str, index: int) -> str:
        """Return the name of a block's tensor in another block."""
        found = _BLOCK.fullmatch(name)
        if found is None:
            raise ValueError(f"{name} is not a tensor of a block")
        return f"blk.{index}.{found[2]}"

    def layer_tensors(self, index: int) -> list[str]:
        """Return the names of the tensors of a layer.

        Raises:
            CheckpointError: The layer has no tensors.
        """
        if index not in self._layers:
            raise CheckpointError(
                f"{self.path}: there is no tensor of layer {index}, but {self.key(DEPTH)} is "
                f"{self.blocks}"
            )
        return self._layers[index]

    def check_depth(self) -> None:
        """Check that the stored blocks are those that the metadata states.

        Raises:
            CheckpointError: A block is missing, or there are extra blocks.
        """
        for index in range(self.blocks):
            self.layer_tensors(index)
        most = max(index for index in self._layers if index is not None)
        if most >= self.blocks:
            raise CheckpointError(
                f"{self.path}: there are tensors of layer {most}, but {self.key(DEPTH)} is "
                f"{self.blocks}"
            )

    def outside_layers(self) -> tuple[list[str], list[str]]:
        """Return the names of the tensors before the layers and of those after them."""
        outside = list(self._layers[None])
        parts = architectures.after_layers()
        after = [name for name in outside if name.startswith(parts)]
        before = [name for name in outside if not name.startswith(parts)]
        for index in range(self.depth, self.blocks):
            after += self.layer_tensors(index)
        return before, after

    def scaled(self, outside: Iterable[str]) -> Sequence[str]:  # noqa: ARG002 - see Checkpoint
        """Return no tensor: `scale` and `zero` apply only to layers."""
        return ()

    def zero_byte(self, name: str) -> int | None:
        """Return the byte that zeroes a tensor.

        Raises:
            RefusedError: It is not known that zero bytes mean zeros in its type.
        """
        kind = self.tensors[name].dtype
        if not BY_NAME[kind].zero:
            raise RefusedError(
                f"{self.ref}: {name} has the type {kind}, of which it is not known that zero bytes "
                "mean zeros"
            )
        return 0


def open_model(ref: ModelRef) -> GgufModel:
    """Open a GGUF model.

    Args:
        ref: The model; its path names a file.

    Raises:
        CheckpointError: A file cannot be read, is malformed, or does not belong to the others.
    """
    if ref.lora is not None:
        raise CheckpointError(
            f"{ref}: a LoRA cannot be merged into a GGUF file",
            hint="merge it first, with llama-export-lora of llama.cpp",
        )
    path = Path(ref.path)
    first = header.read(path)
    count = _split_number(first, SPLITS)
    if count is None or count < 2:  # noqa: PLR2004 - a single file
        return GgufModel(ref, (first,))
    found = _SPLIT_NAME.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} splits, but its name is not that of a split",
            hint=f"name it as llama.cpp does: {split_name('NAME', 0, count)}",
        )
    names = [split_name(found["stem"], index, count) for index in range(count)]
    if _split_number(first, SPLIT) != 0 or int(found["number"]) != 1:
        raise CheckpointError(f"{path}: is not the first split", hint=f"name {names[0]}")
    files = (first, *_others(path, names[1:], count))
    _check_tensors(path, files)
    return GgufModel(ref, files)


def _others(path: Path, names: Sequence[str], count: int) -> Iterator[GgufFile]:
    """Read the splits after the first one."""
    for index, name in enumerate(names, 1):
        file = header.read(path.with_name(name))
        stated = _split_number(file, SPLIT), _split_number(file, SPLITS)
        if stated != (index, count):
            raise CheckpointError(
                f"{file.path}: {SPLIT} and {SPLITS} are {stated[0]} and {stated[1]}, not {index} "
                f"and {count}"
            )
        yield file


def _split_number(file: GgufFile, key: str) -> int | None:
    value = file.metadata.get(key)
    return int(value.decoded()) if value is not None and value.is_integer else None


def _check_tensors(path: Path, files: Sequence[GgufFile]) -> None:
    names: set[str] = set()
    for file in files:
        doubled = names & file.tensors.keys()
        if doubled:
            raise CheckpointError(f"{file.path}: {min(doubled)} is also in another split")
        names |= file.tensors.keys()
    stated = _split_number(files[0], SPLIT_TENSORS)
    if stated not in (None, len(names)):
        raise CheckpointError(
            f"{path}: {SPLIT_TENSORS} is {stated}, but the splits hold {len(names)} tensors"
        )
