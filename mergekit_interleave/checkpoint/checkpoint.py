"""Read the config, tensors and files of a checkpoint: a directory or a Hub repository.

Only the headers of safetensors files are read, and no code of a checkpoint is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave import _out_files
from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import (
    adapter,
    hub,
    layer_names,
    pickle_weights,
    wrapped_names,
)
from mergekit_interleave.checkpoint.quantization import SIDECARS, Quantization, quantization_of
from mergekit_interleave.checkpoint.safetensors_header import (
    INDEX,
    WEIGHTS,
    has_weight_files,
    read_index,
    read_json,
    read_tensors,
)
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, is_directory_or_file
from mergekit_interleave.errors import CheckpointError, RefusedError

CONFIG = _out_files.CONFIG

MAX_CONFIG = 2**26
"""The maximum size in bytes of a config.json or another file with per-layer settings."""

WEIGHT_PATTERNS = _out_files.patterns(lambda row: row.weights)
"""Files that may hold weights. Only the files that the index names are read."""


@contextmanager
def config_errors(path: Path, name: str = CONFIG) -> Iterator[None]:
    """Report a malformed config.json as CheckpointError.

    Wrap only code that interprets the file: a bug in other code would be reported as a malformed
    file.

    Args:
        path: The directory that holds the file.
        name: The name of the file, if it is not config.json.

    Raises:
        CheckpointError: The file is malformed.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path / name}: malformed ({type(e).__name__}: {e!s:.200})") from e


@dataclass(frozen=True)
class Checkpoint:
    """A model directory.

    Attributes:
        ref: The model as the user named it.
        path: The directory.
        config: The content of its config.json.
        is_local: Whether the user named a directory, rather than a Hub id.
        trusted: Whether its custom code may be run.
        unpickled: The directory with its pickled weights converted to safetensors, if any.
    """

    ref: ModelRef
    path: Path
    config: Mapping[str, Any]
    is_local: bool
    trusted: bool = False
    unpickled: Path | None = None

    @property
    def store(self) -> Path:
        """The directory with its safetensors and all its other files."""
        return self.unpickled or self.path

    @property
    def model_type(self) -> str:
        """The model type that config.json states, or an empty string."""
        return str(self.config.get("model_type") or "")

    @property
    def family(self) -> families.Family | None:
        """The family of its model type, or None if the type is unknown."""
        return families.family_of_config(self.config)

    def require_family(self) -> families.Family:
        """Return the family of its model type, or an assumed family if the type is unknown.

        Raises:
            RefusedError: Its layers cannot be copied exactly, or cannot be located.
        """
        if self.family is None:
            if not self.has_weights:
                raise RefusedError(
                    f"{self.ref}: model type {self.model_type!r} is unknown, and the weights are "
                    "not available to find its layers",
                    hint="download the model and name its directory",
                )
            if len(self._stacks) != 1 or not self.model_type:
                raise RefusedError(
                    f"{self.ref}: model type {self.model_type!r} is unknown, and its tensor names "
                    "do not show which tensors are layers"
                )
            stack = next(iter(self._stacks))
            return families.unknown_family(self.model_type, self.layer_config, stack)
        reason = self.family.reason_to_refuse(self.layer_config)
        if reason is not None:
            raise RefusedError(f"{self.ref}: model type {self.model_type} is refused: {reason}")
        return self.family

    @cached_property
    def quantization(self) -> Quantization:
        """How it is quantized, as its files state and its tensors show.

        Raises:
            CheckpointError: Its weights cannot be read.
        """
        return self._quantization({name: tensor.dtype for name, tensor in self.tensors.items()})

    def zero_byte(self, name: str) -> int | None:
        """Return the byte that zeroes a tensor; see `Quantization.zero_byte`."""
        return self.quantization.zero_byte(name)

    @property
    def is_quantized(self) -> bool:
        """Whether a file states a quantization or, if the weights can be read, they show it."""
        with suppress(CheckpointError):  # `gen` needs no weights, and so accepts broken ones
            if self.has_weights:
                return self.quantization.is_quantized
        return self._quantization({}).is_quantized

    def _quantization(self, dtypes: Mapping[str, str]) -> Quantization:
        files = {name: self.path / name for name in SIDECARS}
        sidecars = {n: read_json(f, most=MAX_CONFIG) for n, f in files.items() if f.is_file()}
        return quantization_of((self.config, self.layer_config), sidecars, dtypes)

    @property
    def layer_config(self) -> Mapping[str, Any]:
        """The part of config.json that holds the layer settings."""
        return families.layer_config(self.config)

    @property
    def modules(self) -> Mapping[str, int | None]:
        """The number of layers of each of mergekit's modules; see `mergekit_yaml.to_document`.

        Empty if config.json lacks the layer count of a module.
        """
        modules = self.family.mergekit_modules if self.family else {}
        keys = {name: key for name, key in modules.items() if isinstance(key, str)}
        counts = {name: families.stated(self.config, key) for name, key in keys.items()}
        if None in counts.values():
            return {}
        return {name: counts.get(name, count) for name, count in modules.items()}

    @property
    def depth(self) -> int:
        """Its number of layers.

        Raises:
            CheckpointError: config.json states no valid number.
        """
        with config_errors(self.path):
            depth = families.depth_of(self.layer_config, self.family)
        if depth is None and self.has_weights and self.family is not None:
            # The model class has a default depth, and the stored layers must match it.
            depth = len({self.layer_of(name) for name in self.tensors} - {None}) or None
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            problem = (
                "states no layer count"
                if depth is None
                else f"the layer count is {depth!r}, not a positive whole number"
            )
            raise CheckpointError(
                f"{self.path / CONFIG}: {problem}", hint="state the number with --layers N"
            )
        if depth > MAX_LAYERS:
            raise CheckpointError(
                f"{self.path / CONFIG}: the layer count is {depth} (limit {MAX_LAYERS})"
            )
        return depth

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All stored tensors by name, in the order of the shards.

        Raises:
            CheckpointError: There are no safetensors files, or a header or the index is malformed.
            RefusedError: The names are those of a wrapped module.
        """
        tensors = read_tensors(self.store)
        wrapped_names.check(self.path, tensors)
        return tensors

    @property
    def has_weights(self) -> bool:
        """Whether its safetensors files are on disk, not only its config."""
        single, index = self.store / WEIGHTS, self.store / INDEX
        if single.is_file() or self.is_local:
            return single.is_file() or index.is_file()
        if not index.is_file():
            return False
        return all((self.store / shard).is_file() for shard in set(read_index(index).values()))

    @cached_property
    def _stacks(self) -> Mapping[str, int]:
        """The prefixes of layer names, each with an offset to add to the layer index.

        In a checkpoint of the bare model, without the head, the prefixes lack their first parts.
        """
        family = self.family
        if family is None:
            # For an unknown type, the first number in a name is taken as the layer index.
            indices = layer_names.by_stack(self.tensors)
            depth = families.depth_of(self.layer_config)
            whole = [stack for stack, found in indices.items() if len(found) == depth]
            return dict.fromkeys(whole if len(whole) == 1 else indices, 0)
        stacks: dict[str, int] = {family.layer_prefix: 0, **family.parallel_prefixes}
        shorter = [
            {prefix.split(".", words)[-1]: shift for prefix, shift in stacks.items()}
            for words in range(family.layer_prefix.count(".") + 1)
        ]
        others = [{prefix: 0} for prefix in families.composite_layer_prefixes()]
        return next(
            (known for known in (*others, *shorter) if self._has(next(iter(known)))), stacks
        )

    def _has(self, stack: str) -> bool:
        return any(name.startswith(stack + ".") for name in self.tensors)

    def scaled(self, outside: Iterable[str]) -> list[str]:
        """Return the tensors outside the layers that mergekit scales.

        mergekit scales neither extra heads after the layers nor a vision model next to the
        language model.
        """
        names = [name for name in outside if self.layer_of(name) is None]
        if self.family is None or not self.family.composite:
            return names
        model = next(iter(self._stacks)).rpartition(".")[0]
        return [name for name in names if name.startswith((f"{model}.", "lm_head."))]

    @property
    def stack_names(self) -> set[str]:
        """The prefixes that layer names of this model's modules may have."""
        known = {self.require_family().layer_prefix, *families.composite_layer_prefixes()}
        return known | set(self._stacks) if self.has_weights else known

    def layer_of(self, name: str) -> int | None:
        """Return the index of a tensor's layer, or None if it is outside the layers."""
        found = layer_names.parse(name, self._stacks)
        return None if found is None else found.index + self._stacks[found.stack]

    def renamed(self, name: str, index: int) -> str:
        """Return the name of a layer's tensor in another layer."""
        found = layer_names.parse(name, self._stacks)
        if found is None:
            raise ValueError(f"{name} is not a tensor of a layer")
        return found.at(index - self._stacks[found.stack])

    def names_a_layer(self, text: str) -> bool:
        """Whether a text contains the name of a layer or of a layer's tensor."""
        return layer_names.mentions_layer(text, self._stacks)

    @cached_property
    def _layers(self) -> Mapping[int | None, list[str]]:
        """The loaded tensors of each layer; under None, those outside the layers."""
        family = self.family
        layers: dict[int | None, list[str]] = {None: []}
        for name in self.tensors:
            if family is None or family.is_loaded(name):
                layers.setdefault(self.layer_of(name), []).append(name)
        return layers

    def outside_layers(self) -> tuple[list[str], list[str]]:
        """Return the names of the tensors before the layers and of those after them.

        Raises:
            RefusedError: The model type is refused, or it is unknown and its layers are not found.
        """
        family, depth = self.require_family(), self.depth
        outside = list(self._layers[None])
        for index, names in self._layers.items():
            if index is not None and index >= depth:
                outside += names
        first, last = self._named(family.before_layers), self._named(family.after_layers)
        # A vision model beside the language model runs before it.
        before = [n for n in outside if n in first or (family.composite and n not in last)]
        return before, [name for name in outside if name not in before]

    @property
    def vocabulary(self) -> int | None:
        """The number of rows of its stored embeddings, or None if their tensor is unknown."""
        embeddings = self._named(self.require_family().before_layers[:1])
        rows = {self.tensors[name].shape[0] for name in embeddings if name in self.tensors}
        return rows.pop() if len(rows) == 1 else None

    def _named(self, names: Iterable[str]) -> set[str]:
        """Return the stored tensors that a family names; parts before the names may differ."""
        within = self.require_family().layer_prefix.rpartition(".")[0]
        here = next(iter(self._stacks)).rpartition(".")[0]
        found = set()
        for name in names:
            if within and name.startswith(f"{within}."):
                inner = name.removeprefix(f"{within}.")
                found.add(f"{here}.{inner}" if here else inner)
            else:
                found.update(n for n in self.tensors if f".{n}".endswith(f".{name}"))
        return found

    def check_depth(self) -> None:
        """Check that the stored layers are those that config.json states.

        Raises:
            CheckpointError: A layer is missing, or there are extra layers.
        """
        stored = self._layers.keys() - {None}
        for index in range(min(self.depth, len(stored) + 1)):
            self.layer_tensors(index)
        beyond = [index for index in stored if index is not None and index >= self.depth]
        if beyond and not (self.family and self.family.has_mtp_layers):
            raise CheckpointError(
                f"{self.path}: the weights have a layer {min(beyond)}, but {CONFIG} states only "
                f"{self.depth} layers, 0 to {self.depth - 1}"
            )

    def layer_tensors(self, index: int) -> list[str]:
        """Return the names of the loaded tensors of a layer.

        Raises:
            CheckpointError: The layer has no tensors.
        """
        if index not in self._layers:
            others = [] if self._layers.keys() - {None} else [*layer_names.by_stack(self.tensors)]
            named = f" under the names of its type, only under {others[0]}" if others else ""
            raise CheckpointError(
                f"{self.path}: the weights have no layer {index}{named}, but {CONFIG} states "
                f"{self.depth} layers"
            )
        return self._layers[index]

    @property
    def pinned(self) -> ModelPath:
        """The Hub id with the commit of its config.json, because a branch may change."""
        return self.hub_origin or self.ref.model

    @property
    def hub_origin(self) -> ModelPath | None:
        """The Hub id and commit that it was downloaded from, or None if its path has neither."""
        match = re.search(
            r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", self.path.resolve().as_posix()
        )
        return ModelPath(match[1].replace("--", "/"), match[2]) if match else None


def open_checkpoint(
    ref: ModelRef, *, cached_only: bool = False, cache_dir: str | None = None
) -> Checkpoint:
    """Open a model directory or a Hub repository. For a repository, only config.json is fetched.

    Args:
        ref: The model.
        cached_only: Do not access the network.
        cache_dir: A Hub cache to use instead of the default one.

    Raises:
        CheckpointError: There is no such model, or its config.json is missing or malformed.
    """
    if is_directory_or_file(ref.path):
        path = Path(ref.path)
        return Checkpoint(ref, path, _read_config(path), is_local=True)
    if not hub.is_hub_id(ref.path):
        raise CheckpointError(
            f"{ref.path}: no such directory in {Path.cwd()}", hint="a Hub id has the form org/name"
        )
    path = hub.fetch_config(ref.model, cached_only=cached_only, cache_dir=cache_dir)
    return Checkpoint(ref, path, _read_config(path), is_local=False)


def fetch_small_files(checkpoint: Checkpoint, **how: Any) -> None:
    """Fetch all files of a Hub repository except its weights.

    Args:
        checkpoint: The checkpoint; for a directory nothing is fetched.
        how: `cached_only` and `cache_dir`, as passed to `open_checkpoint`.

    Raises:
        CheckpointError: The files cannot be fetched.
    """
    if not checkpoint.is_local:
        hub.fetch_files(checkpoint.pinned, unwanted=WEIGHT_PATTERNS, **how)


def fetch_weights(checkpoint: Checkpoint, *, pickled: bool = False, **how: Any) -> None:
    """Fetch the weights of a Hub repository: only the shards that its index names.

    Args:
        checkpoint: The checkpoint; for a directory nothing is fetched.
        pickled: Whether to fetch pickles if there are no safetensors.
        how: `cached_only` and `cache_dir`, as passed to `open_checkpoint`.

    Raises:
        CheckpointError: The weights cannot be fetched.
    """
    if checkpoint.is_local:
        return
    hub.fetch_files(checkpoint.pinned, wanted=[INDEX, WEIGHTS], **how)
    index = checkpoint.path / INDEX
    if index.is_file():
        shards = sorted(set(read_index(index).values()))
        hub.fetch_files(checkpoint.pinned, wanted=shards, **how)
    elif pickled and not checkpoint.has_weights:
        wanted = [pickle_weights.PICKLE_INDEX, "pytorch_model*.bin"]
        hub.fetch_files(checkpoint.pinned, wanted=wanted, **how)


def unpickled(checkpoint: Checkpoint, into: Path) -> Checkpoint:
    """Convert pickled weights to safetensors; return a checkpoint with safetensors unchanged.

    Args:
        checkpoint: The checkpoint.
        into: The directory to write to, which must not exist.

    Raises:
        CheckpointError: The pickles contain anything other than tensors, or cannot be read.
        OutputError: The safetensors cannot be written.
    """
    if checkpoint.has_weights or not pickle_weights.files_of(checkpoint.path):
        return checkpoint
    pickle_weights.convert(checkpoint.path, into)
    return replace(checkpoint, unpickled=into)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a model directory."""
    return os.path.isfile(path / CONFIG)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a directory", hint=f"name the model's directory: --model {path.parent}"
        )
    if adapter.is_adapter(path) and not has_weight_files(path):
        raise adapter.not_a_model(path)
    if not is_checkpoint(path):
        raise CheckpointError(f"{path}: not a checkpoint, because it has no {CONFIG}")
    return read_json(path / CONFIG, most=MAX_CONFIG)
