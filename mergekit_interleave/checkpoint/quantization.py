"""Quantized checkpoints: which stored bytes mean zero, and where their config names layers."""

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
"""Files in which older quantizers keep what others keep in config.json."""


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: Its quant_method, None where it is not quantized.
        zero: Matches the names of tensors whose zeroing makes a projection zero.
        keep: Matches the names of tensors that must stay for that.
        codes: The byte that means zero, where it is not 0, by the end of the name of a tensor
            that then stands beside.
    """

    method: str | None = None
    zero: str = "$^"
    keep: str = "$^"
    codes: Mapping[str, int] | None = None

    def zero_byte(self, name: str, tensor: Tensor, names: Collection[str]) -> int | None:
        """The byte that fills a tensor of a projection to zero.

        Args:
            name: The tensor's name.
            tensor: It.
            names: The names of all tensors.

        Returns:
            None where it must stay as it is.

        Raises:
            RefusedError: What it means is not known.
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
        raise RefusedError(f"{name} is stored as {tensor.dtype}, whose zero is not known")


def quantization_of(config: Mapping[str, Any]) -> Quantization:
    """How a checkpoint with this config.json is quantized.

    Raises:
        RefusedError: By a method that is not known.
    """
    stated = config.get(KEY)
    if not isinstance(stated, Mapping):
        return Quantization()
    method = str(stated.get("quant_method"))
    rules = families.quantized(method)
    if rules is None:
        raise RefusedError(
            f"it is quantized by {method!r}, of which it is not known how it stores a zero",
            hint="take the checkpoint that is not quantized",
        )
    return Quantization(method, **rules)


def reindexed(value: Any, sources: Sequence[int], depth: int, stacks: Collection[str]) -> Any:
    """A quantizer's config with its names of modules re-indexed.

    Args:
        value: The config, or a part of it.
        sources: The source index of each layer of the result.
        depth: The source model's number of layers.
        stacks: What may stand before the index of a layer, the first words left out or not.

    Raises:
        RefusedError: A pattern names certain layers.
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
"""Matches what is a pattern of names rather than a name."""


def _names(name: str, sources: Sequence[int], depth: int, stacks: Collection[str]) -> list[str]:
    if _PATTERN.search(name):
        if re.search(r"\d", name):
            raise RefusedError(
                f"{KEY}: the pattern {name!r} may name certain layers, and cannot be re-indexed"
            )
        return [name]
    parsed = layer_names.parse(name)
    if parsed is None or not any(f".{stack}".endswith(f".{parsed.stack}") for stack in stacks):
        return [name]
    new = [index for index, source in enumerate(sources) if source == parsed.index]
    if parsed.index >= depth:  # a head that predicts several tokens moves on with the depth
        new = [parsed.index - depth + len(sources)]
    return [parsed.at(index) for index in new]
