"""Compute the value of a planned tensor from the source tensor in memory.

A plain copy is the source tensor itself, and all zeros of one shape share their memory.
"""

from __future__ import annotations

from typing import Any

from mergekit_interleave.layout.layout import Constant
from mergekit_interleave.planning import arithmetic
from mergekit_interleave.planning.tensor_plan import Packing, TensorSpec


class Zeros:
    """Zeros for tensors of any shape. Those of a matrix take the memory of one number.

    Kernels for more axes accept only tensors whose numbers lie side by side.
    """

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def like(self, tensor: Any, **place: Any) -> Any:
        """Return zeros of the shape, dtype and device of a tensor.

        Args:
            tensor: The tensor.
            place: Another dtype or device.
        """
        shape = tensor.shape if tensor.ndim > _MATRIX else ()
        key = shape, place.get("dtype", tensor.dtype), place.get("device", tensor.device)
        if key not in self._found:
            self._found[key] = tensor.new_zeros(shape, **place)
        return self._found[key].expand(tensor.shape)


_MATRIX = 2


def value(spec: TensorSpec, source: Any, zeros: Zeros, other: Any = None) -> Any:
    """Return the value of a tensor.

    Args:
        spec: The planned tensor.
        source: The source tensor, in the dtype in which the source model was loaded.
        zeros: The zeros to use.
        other: The tensor that the source is averaged with, if the tensor is a mean.

    Returns:
        A tensor of the same dtype; `source` itself if the values are the same.
    """
    if spec.constant is not None:
        return _filled(source, spec.constant)
    if spec.packing is not None:
        source = _reordered(source, spec.packing)
    if spec.scale == 0:
        return zeros.like(source)
    return _computed(spec, source, other)


def _computed(spec: TensorSpec, source: Any, other: Any) -> Any:
    """Average, scale and convert as the engines do, with the rounding of each dtype."""
    if not spec.is_computed:
        return source
    steps = [arithmetic.torch_dtype(dtype) for dtype in (spec.through, spec.dtype)]
    if other is None and spec.scale in (None, 1) and _are_exact(source.dtype, steps):
        return source
    stored = arithmetic.torch_dtype(spec.tensor.dtype)
    others = None if other is None else other.to(stored)
    return arithmetic.scaled(source.to(stored), spec.operation, others).to(source.dtype)


def _are_exact(dtype: Any, steps: list[Any]) -> bool:
    """Whether each of the dtypes represents all values of a dtype."""
    import torch  # noqa: PLC0415 - takes seconds to import

    return all(torch.promote_types(dtype, step) == step for step in steps)


def _filled(source: Any, constant: Constant) -> Any:
    import torch  # noqa: PLC0415

    result = source.clone(memory_format=torch.contiguous_format)
    if constant.square is None:
        result[constant.after or 0 :] = constant.value
        return result
    rows = constant.square**2
    part = result[len(result) - rows :]
    part.zero_()
    part[:: constant.square + 1] = constant.value
    return result


def _reordered(source: Any, packing: Packing) -> Any:
    import torch  # noqa: PLC0415

    blocks = source.unflatten(packing.axis, (packing.blocks, -1))
    order = torch.tensor(packing.order, device=source.device)
    return blocks.index_select(packing.axis, order).flatten(packing.axis, packing.axis + 1)
