"""Zero the tensors of quantized checkpoints, and re-index the layers that their config names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.safetensors_header import Tensor
from mergekit_interleave.errors import RefusedError

KEY = "quantization_config"

INDEXED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which older quantizers store the settings that others store in config.json."""


@dataclass(frozen=True)
class Quantization:
    """The quantization of a checkpoint.

    Attributes:
        method: The quant_method, or None if the checkpoint is not quantized.
        zero: A pattern for the names of the tensors to zero, which makes a projection zero.
        keep: A pattern for the names of the tensors that must then stay unchanged.
        codes: The bytes that mean zero if not 0. Each applies if a tensor exists whose name is that
            of the zeroed tensor plus the given suffix.
    """

    method: str | None = None
    zero: str = "$^"
    keep: str = "$^"
    codes: Mapping[str, int] | None = None

    def zero_byte(self, name: str, tensor: Tensor, names: Collection[str]) -> int | None:
        """Return the byte to fill a tensor with so that its projection is zero.

        Args:
            name: The name of the tensor.
            tensor: The tensor.
            names: The names of all tensors.

        Returns:
            The byte, or None if the tensor must stay unchanged.

        Raises:
            RefusedError: It is unknown how the tensor stores a zero.
        """
        if re.search(self.zero, name):
            if _dtypes.has_plain_zero(tensor.dtype):
                return 0
            codes = (self.codes or {}).items()
            return next((code for end, code in codes if name + end in names), 0)
        if re.search(self.keep, name):
            return None
        if _dtypes.has_plain_zero(tensor.dtype):
            return 0
        raise RefusedError(
            f"{name} is stored as {tensor.dtype}, and it is unknown how that encodes a zero"
        )


def quantization_of(config: Mapping[str, Any]) -> Quantization:
    """Return how a checkpoint with this config.json is quantized.

    Raises:
        RefusedError: The quantization method is unknown.
    """
    stated = config.get(KEY)
    if not isinstance(stated, Mapping):
        return Quantization()
    method = str(stated.get("quant_method"))
    rules = families.quantized(method)
    if rules is None:
        raise RefusedError(
            f"the model is quantized by {method!r}, and it is unknown how that stores a zero",
            hint="use the checkpoint that is not quantized",
        )
    return Quantization(method, **rules)


def reindexed(value: Any, sources: Sequence[int], depth: int, stacks: Collection[str]) -> Any:
    """Return a quantization config with the layer indices in its module names updated.

    Args:
        value: The config, or a part of it.
        sources: The source index of each layer of the result.
        depth: The number of layers of the source model.
        stacks: The possible prefixes of a layer index; the names may omit their first parts.

    Raises:
        RefusedError: A name is a pattern that may match only some layers.
    """
    if isinstance(value, Mapping):
        return {
            name: reindexed(entry, sources, depth, stacks)
            for key, entry in value.items()
            for name in _names(str(key), sources, depth, stacks)
        }
    if isinstance(value, list):
        entries: list[Any] = []
        for entry in value:
            if isinstance(entry, str):
                entries += _names(entry, sources, depth, stacks)
            else:
                entries.append(reindexed(entry, sources, depth, stacks))
        return entries
    return value


_PATTERN = re.compile(r"[*?\\\[\](){}|^$+]|^re:")
"""Matches a name that is a pattern."""


def _names(name: str, sources: Sequence[int], depth: int, stacks: Collection[str]) -> list[str]:
    if _PATTERN.search(name):
        if re.search(r"\d", name):
            raise RefusedError(
                f"{KEY}: the pattern {name!r} may match only some layers, and cannot be re-indexed"
            )
        return [name]
    parsed = layer_names.parse(name)
    if parsed is None or not any(f".{stack}".endswith(f".{parsed.stack}") for stack in stacks):
        return [name]
    new = [index for index, source in enumerate(sources) if source == parsed.index]
    if parsed.index >= depth:  # a multi-token prediction head follows the last layer
        new = [parsed.index - depth + len(sources)]
    return [parsed.at(index) for index in new]
