"""Find out how a checkpoint is quantized, and how its projections store a zero.

Which tensors are quantized is seen from the tensors. The method is stated in config.json or in one
of the files that quantizers write beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave.architectures import family as families
from mergekit_interleave.errors import RefusedError

KEY = "quantization_config"

_MLX_KEY = "quantization"
"""The key under which MLX states its settings; it repeats them under `KEY`, without a method."""

SIDECARS: Mapping[str, str] = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""The files in which quantizers state their settings, each with the method if it states none."""

_EXPLICIT = re.compile(
    r"^(q?weight|input|output|activation|pre_quant|[qkv])_(global_)?"
    r"(scales?|zeros?|zero_point|shape|packed|g_idx)(_\w+)?$"
    r"|^(qweight|qzeros|g_idx|SCB|absmax|nested_absmax|quant_map|quant_state|weight_format"
    r"|qscale_\w+)$|_(blocks|scales)$"
)
"""Matches the last part of the name of a tensor that only quantized projections have."""

_COMPANION = re.compile(rf"{_EXPLICIT.pattern}|^(global_)?(scales?|zeros?)(_\w+)?$|^biases$")
"""Also matches names that other modules have too, such as a router with a scale. They belong to a
quantized projection if its weight is not a plain float."""

_ASYMMETRIC = re.compile(r"zero|biases")
"""Matches the part of a companion that shifts the number that a stored zero means."""


Modules = Mapping[str, Mapping[str, str]]
"""The dtypes of the tensors of each module, by the last part of their names."""


@dataclass(frozen=True)
class Quantization:
    """The quantization of a checkpoint.

    Attributes:
        method: The method that a file states, or None if none does.
        rule: How the method stores a zero; None if that is unknown.
        modules: The stored tensors.
    """

    method: str | None = None
    rule: families.QuantizationRule | None = None
    modules: Modules = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether a file states a method, or the tensors show that they are quantized."""
        return self.method is not None or any(
            _is_quantized(parts) and any(map(_COMPANION.search, parts))
            for parts in self.modules.values()
        )

    def zero_byte(self, name: str) -> int | None:
        """Return the byte to fill a tensor with so that its projection is zero.

        Args:
            name: The name of a stored tensor.

        Returns:
            The byte, or None if the tensor must stay unchanged, as a scale must: some kernels
            divide by it.

        Raises:
            RefusedError: It is unknown how the projection stores a zero.
        """
        module, _, part = name.rpartition(".")
        parts = self.modules[module]
        dtype = parts[part]
        if not _is_quantized(parts) and _dtypes.is_float(dtype):
            return 0
        if self.rule is None:
            return self._by_form(name, parts)
        if re.search(self.rule.get("zero", "$^"), name):
            coded = {} if _dtypes.has_plain_zero(dtype) else self.rule.get("codes", {})
            return next((code for end, code in coded.items() if self._stores(name + end)), 0)
        if re.search(self.rule.get("scale", "$^"), name):
            return None if _has_float_codes(parts) else 0
        if re.search(self.rule.get("keep", "$^"), name):
            return None
        if _dtypes.has_plain_zero(dtype):
            return 0
        raise self._unknown(name, dtype)

    def _stores(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part in self.modules.get(module, {})

    def _by_form(self, name: str, parts: Mapping[str, str]) -> int | None:
        """Return the byte for a projection whose method is unknown, if its dtypes show it.

        A float times a scale is zero if the float is; only a zero point would change that.
        """
        part, dtype = name.rpartition(".")[2], parts[name.rpartition(".")[2]]
        shifted = [other for other in parts if _ASYMMETRIC.search(other)]
        if self.method is None and not shifted and _has_float_codes(parts):
            if _COMPANION.search(part):
                return None
            if _dtypes.has_plain_zero(dtype):
                return 0
        raise self._unknown(name, dtype)

    def _unknown(self, name: str, dtype: str) -> RefusedError:
        method = "an unknown method" if self.method is None else repr(self.method)
        return RefusedError(
            f"{name} is stored as {dtype}, quantized by {method}, and it is unknown how that "
            "stores a zero",
            hint="use the checkpoint that is not quantized",
        )


def quantization_of(
    configs: Collection[Mapping[str, Any]],
    sidecars: Mapping[str, Mapping[str, Any]] = {},
    dtypes: Mapping[str, str] = {},
) -> Quantization:
    """Return how a checkpoint is quantized.

    Args:
        configs: Its config.json, and the nested config of its language model, if any.
        sidecars: The content of those of the `SIDECARS` that it has.
        dtypes: The dtype of each stored tensor by name, in safetensors' spelling.
    """
    method = _stated_method(configs, sidecars)
    rule = None if method is None else families.quantized(method)
    return Quantization(method, rule, _by_module(dtypes))


def _stated_method(
    configs: Collection[Mapping[str, Any]], sidecars: Mapping[str, Mapping[str, Any]]
) -> str | None:
    for config in configs:
        stated = config.get(KEY)
        if isinstance(stated, Mapping):
            method = stated.get("quant_method")
            if method is None and isinstance(config.get(_MLX_KEY), Mapping):
                method = _mlx(config[_MLX_KEY])
            return str(method or _producer(stated) or f"{KEY} without quant_method")
        if isinstance(config.get(_MLX_KEY), Mapping):
            return _mlx(config[_MLX_KEY])
    for name, usual in SIDECARS.items():
        if name in sidecars:
            stated = sidecars[name]
            return str(stated.get("quant_method") or _producer(stated) or usual)
    return None


def _mlx(stated: Mapping[str, Any]) -> str:
    """Return the method of MLX; its modes other than the usual one store small floats."""
    mode = stated.get("mode", "affine")
    return "mlx" if mode == "affine" else f"mlx-{mode}"


def _producer(stated: Mapping[str, Any]) -> object:
    """Return the tool that a config of ModelOpt names as its producer."""
    producer = stated.get("producer")
    return producer.get("name") if isinstance(producer, Mapping) else None


def quantized_modules(dtypes: Mapping[str, str]) -> frozenset[str]:
    """Return the modules whose tensors show that they are quantized.

    Args:
        dtypes: The dtype of each stored tensor by name, in safetensors' spelling.
    """
    return frozenset(name for name, parts in _by_module(dtypes).items() if _is_quantized(parts))


def _by_module(dtypes: Mapping[str, str]) -> Modules:
    modules: dict[str, dict[str, str]] = {}
    for name, dtype in dtypes.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = dtype
    return modules


def _is_quantized(parts: Mapping[str, str]) -> bool:
    """Whether the tensors of a module show that it is quantized.

    Args:
        parts: The dtype of each tensor, by its name in the module.
    """
    return any(map(_EXPLICIT.search, parts)) or any(
        not _dtypes.is_float(dtype) and dtype not in ("BOOL", "I64") for dtype in parts.values()
    )


def _has_float_codes(parts: Mapping[str, str]) -> bool:
    """Whether a module stores its weight as small floats, for which a zero byte means zero."""
    four_bits = any("global_scale" in part for part in parts)
    return four_bits or any(dtype in ("F8_E4M3", "F8_E5M2") for dtype in parts.values())
