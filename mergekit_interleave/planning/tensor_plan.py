"""Map each tensor of the new model to its source tensor.

An engine's plan is checked against this list before the engine writes, and its output afterwards.
As in mergekit, the tensors before the layers come from the first slice, and those after the layers
from the last.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, TypeAlias

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Source
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, match_of, scale_of
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.layout import Constant, Layer, Layout, Slice, constant_of


class Dtypes(NamedTuple):
    """The dtypes that tensors are converted to, by mergekit's names; None keeps the dtype.

    Attributes:
        read: The dtype after reading, in which tensors are multiplied.
        written: The dtype before writing.
    """

    read: str | None = None
    written: str | None = None


KEPT = Dtypes()


@dataclass(frozen=True)
class Packing:
    """The order of blocks in a tensor that holds one block per layer.

    Attributes:
        axis: The axis along which the blocks are stored.
        blocks: The number of blocks in the source.
        order: The source blocks of the result, in order.
    """

    axis: int
    blocks: int
    order: tuple[int, ...]


class Mean(NamedTuple):
    """The second tensor of a mean.

    Attributes:
        source: Its name in the source model.
        tensor: The stored tensor.
    """

    source: str
    tensor: Tensor


class Operation(NamedTuple):
    """The arithmetic of a tensor, which treats each number alone.

    Attributes:
        stored: The dtype of the source, in safetensors' spelling.
        scale: The factor to multiply by; None for none.
        fixed: The number that the factor leaves unchanged.
        through: The dtype in which it is multiplied, in safetensors' spelling.
        written: The dtype of the result, in safetensors' spelling.
    """

    stored: str
    scale: float | None
    fixed: float
    through: str
    written: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the new model.

    Attributes:
        name: The name in the new model.
        model: The source model.
        source: The name in the source model.
        tensor: The stored source tensor.
        scale: The factor to multiply by; None for a plain copy.
        fixed: The number that the factor leaves unchanged.
        mean_with: Another tensor of the source model: the mean with it is scaled.
        dtype: The dtype in the new model, in safetensors' spelling.
        through: The dtype in which it is multiplied, in safetensors' spelling.
        shape: The shape in the new model.
        nbytes: The size in bytes in the new model.
        zero: The byte to fill it with if it is zeroed.
        constant: The constant to fill it with, if any.
        packing: The order of its blocks, if it has one block per layer.
        layer: The index of its layer in the new model; None outside the layers.
    """

    name: str
    model: ModelRef
    source: str
    tensor: Tensor
    scale: float | None
    dtype: str
    through: str
    shape: tuple[int, ...]
    nbytes: int
    zero: int = 0
    constant: Constant | None = None
    packing: Packing | None = None
    layer: int | None = None
    fixed: float = 0.0
    mean_with: Mean | None = None

    @property
    def is_computed(self) -> bool:
        """Whether it is averaged, scaled or converted, but not zeroed."""
        if self.scale == 0:
            return False
        is_new = self.mean_with is not None or len(self.dtypes) > 1
        return is_new or self.scale not in (None, 1)

    @property
    def operation(self) -> Operation:
        """Its arithmetic, apart from a mean."""
        return Operation(self.tensor.dtype, self.scale, self.fixed, self.through, self.dtype)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that its values are converted through, in order; each step may round."""
        steps = (self.tensor.dtype, self.through, self.dtype)
        return tuple(step for step, _ in groupby(steps))

    @property
    def is_whole(self) -> bool:
        """Whether it has all values of the source tensor in order, perhaps scaled or converted."""
        return self.scale != 0 and self.constant is None and self.packing is None

    @property
    def is_unchanged(self) -> bool:
        """Whether its bytes are those of the source tensor."""
        return self.is_whole and not self.is_computed

    def pieces(self) -> Iterator[Piece]:
        """Yield its bytes in order; only for tensors that need no arithmetic."""
        if self.constant is not None:
            yield from _filled(self.tensor, self.constant)
        elif self.scale == 0:
            yield Fill(bytes([self.zero]), self.nbytes)
        elif self.packing is not None:
            yield from _blocks(self.tensor, self.packing)
        else:
            yield ByteRange(self.tensor.start, self.nbytes)


class ByteRange(NamedTuple):
    """Bytes of the file that holds the source tensor."""

    start: int
    length: int


class Fill(NamedTuple):
    """Repeated bytes."""

    data: bytes
    times: int

    @property
    def length(self) -> int:
        """The total number of bytes."""
        return len(self.data) * self.times


Piece: TypeAlias = ByteRange | Fill


def _filled(tensor: Tensor, constant: Constant) -> Iterator[Piece]:
    value, zero = (_dtypes.encode(tensor.dtype, number) for number in (constant.value, 0.0))
    size = len(value)
    columns = math.prod(tensor.shape[1:])
    if constant.square is None:
        kept = (constant.after or 0) * columns
        yield ByteRange(tensor.start, kept * size)
        yield Fill(value, tensor.elements - kept)
        return
    rows = constant.square**2
    yield ByteRange(tensor.start, tensor.nbytes - rows * columns * size)
    for row in range(rows):
        on_diagonal = row % (constant.square + 1) == 0
        yield Fill(value if on_diagonal else zero, columns)


def _blocks(tensor: Tensor, packing: Packing) -> Iterator[ByteRange]:
    inner = tensor.nbytes // math.prod(tensor.shape[: packing.axis])
    width = inner // packing.blocks
    runs = _runs(packing.order)
    for outer in range(tensor.start, tensor.start + tensor.nbytes, inner):
        for first, count in runs:
            yield ByteRange(outer + first * width, count * width)


def _runs(order: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive blocks as (first, count)."""
    runs: list[tuple[int, int]] = []
    for block in order:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def assemble(
    layout: Layout,
    checkpoints: Mapping[ModelRef, Source],
    dtypes: Dtypes = KEPT,
    kv_sharing_layers: Collection[int] = (),
) -> tuple[TensorSpec, ...]:
    """List every tensor of the new model.

    Args:
        layout: The layers.
        checkpoints: The models of the layers.
        dtypes: The dtypes that tensors are converted to.
        kv_sharing_layers: The indices of the new layers that reuse a result of an earlier layer.

    Raises:
        CheckpointError: A source has no tensors for one of the layers.
        RefusedError: A tensor that does not hold plain floats would be converted, scaled or filled.
    """
    first, last = layout.slices[0], layout.slices[-1]
    before = checkpoints[first.model].outside_layers()[0]
    after = checkpoints[last.model].outside_layers()[1]
    if not checkpoints[first.model].require_family().mergekit_defined:
        _check_scaled_alike(checkpoints[first.model].scaled(after), first, last)
    return (
        *_outside(before, first, layout, checkpoints[first.model], dtypes),
        *(
            spec
            for layer in layout.layers
            for spec in _layer(layer, checkpoints[layer.model], dtypes, kv_sharing_layers)
        ),
        *_outside(after, last, layout, checkpoints[last.model], dtypes),
    )


def _layer(
    layer: Layer, checkpoint: Source, dtypes: Dtypes, kv_sharing_layers: Collection[int]
) -> Iterator[TensorSpec]:
    family = checkpoint.require_family()
    absent = family.never_copied if layer.is_copy else ()
    for rule in (family.indexer_sharing, family.kv_sharing):
        if layer.index in kv_sharing_layers and rule is not None:
            absent += rule.absent_tensors
    wide: Mapping[str, int] = {}
    if (
        layer.index in kv_sharing_layers
        and isinstance(checkpoint, Checkpoint)
        and family.kv_sharing
    ):
        wide = family.kv_sharing.widened(checkpoint.layer_config)
    if layer.mean_with is not None:
        _check_alike(layer, checkpoint, absent)
    for source in checkpoint.layer_tensors(layer.source):
        if not any(name in source for name in absent):
            spec = _spec(checkpoint, source, layer.scales, dtypes, layer)
            axis = next((axis for name, axis in wide.items() if name in source), None)
            # The second half repeats the first, because zeros would get no gradients.
            yield spec if axis is None else _packed(spec, Packing(axis, 1, (0, 0)))


def _check_alike(layer: Layer, checkpoint: Source, absent: Collection[str]) -> None:
    """Check that the two layers of a mean have the same tensors, except those that copies lack.

    Raises:
        RefusedError: They have not.
    """
    both = (layer.source, *(() if layer.mean_with is None else (layer.mean_with,)))
    (one, other) = (
        {layer_names.inside(name): name for name in checkpoint.layer_tensors(index)}
        for index in both
    )
    for inside in sorted(one.keys() ^ other.keys()):
        if not any(name in inside for name in absent):
            raise RefusedError(
                f"from: layer {both[0 if inside in one else 1]} has {inside}, but layer "
                f"{both[1 if inside in one else 0]} has not, so there is no mean",
                hint="put new layers only between layers of one kind: `interleave: after [...]`",
            )


def _check_scaled_alike(outside: Sequence[str], first: Slice, last: Slice) -> None:
    """Check that the first and last slice scale the tensors outside the layers alike.

    This matters only if it is unknown which of them are before the layers.
    """
    for name in outside:
        one, other = (scale_of(name, part.scales) for part in (first, last))
        if (1 if one is None else one) != (1 if other is None else other):
            raise RefusedError(
                f"a scale of the first or last slice also applies to {name}, which is outside the "
                "layers",
                hint="restrict the scale to tensors of the layers with `filter`",
            )


def _outside(
    names: Sequence[str], origin: Slice, layout: Layout, checkpoint: Source, dtypes: Dtypes
) -> Iterator[TensorSpec]:
    family, depth = checkpoint.require_family(), checkpoint.depth
    scaled = set(checkpoint.scaled(names))
    order = tuple(layer.source for layer in layout.layers)
    for source in names:
        index = checkpoint.layer_of(source)
        spec = _spec(checkpoint, source, origin.scales if source in scaled else (), dtypes)
        axis = next(
            (axis for name, axis in family.per_layer_blocks.items() if name in source), None
        )
        if index is not None:
            yield replace(spec, name=checkpoint.renamed(source, index + len(layout) - depth))
        elif axis is not None:
            if len(layout.models) > 1:
                raise RefusedError(
                    f"{source} holds a block for each layer, and cannot be made from several "
                    "models",
                    hint="take all layers from one model",
                )
            yield _packed(spec, Packing(axis, depth, order))
        else:
            yield spec


def _spec(
    checkpoint: Source,
    source: str,
    scales: Scales,
    dtypes: Dtypes,
    layer: Layer | None = None,
) -> TensorSpec:
    """Return the spec of a source tensor, in a layer or outside the layers."""
    tensor = checkpoint.tensors[source]
    through, written = _converted(tensor, source, dtypes)
    match = match_of(source, scales)
    scale = None if match is None else match.value
    if scale not in (None, 0, 1) and not _dtypes.is_float(tensor.dtype):
        raise RefusedError(f"{source} is stored as {tensor.dtype}, which cannot be scaled")
    zero = 0
    if scale == 0:
        byte = checkpoint.zero_byte(source)
        scale, zero = (None, 0) if byte is None else (0, byte)
    return TensorSpec(
        name=source if layer is None else checkpoint.renamed(source, layer.index),
        model=checkpoint.ref,
        source=source,
        tensor=tensor,
        scale=scale,
        dtype=written,
        through=through,
        shape=tensor.shape,
        nbytes=tensor.nbytes
        if written == tensor.dtype
        else tensor.elements * _dtypes.STORED[written].bits // 8,
        zero=zero,
        constant=None if layer is None else _constant(source, tensor, layer),
        layer=None if layer is None else layer.index,
        fixed=0.0 if match is None else match.fixed,
        mean_with=None if layer is None else _mean_with(checkpoint, source, layer),
    )


def _mean_with(checkpoint: Source, source: str, layer: Layer) -> Mean | None:
    """Return the tensor that a tensor of a layer is averaged with, if there is one."""
    if layer.mean_with is None:
        return None
    name, tensor = checkpoint.renamed(source, layer.mean_with), checkpoint.tensors[source]
    other = checkpoint.tensors.get(name)
    if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
        raise RefusedError(
            f"from: {source} has another shape or dtype in layer {layer.mean_with}, so there is no "
            "mean"
        )
    if not _dtypes.is_float(tensor.dtype):
        raise RefusedError(f"from: {source} is stored as {tensor.dtype}, which has no mean")
    return Mean(name, other)


def _constant(source: str, tensor: Tensor, layer: Layer) -> Constant | None:
    constant = constant_of(source, layer.constants)
    if constant is not None and not _dtypes.is_float(tensor.dtype):
        raise RefusedError(
            f"{source} is stored as {tensor.dtype}, which cannot be filled with {constant.value:g}"
        )
    if constant is not None:
        try:
            _dtypes.encode(tensor.dtype, constant.value)
        except (OverflowError, struct.error) as error:
            raise RefusedError(
                f"fill: {source}: {constant.value:g} is out of range for {tensor.dtype}"
            ) from error
        rows = tensor.shape[0] if tensor.shape else 1
        filled = rows - (constant.after or 0) if constant.square is None else constant.square**2
        if not 0 <= filled <= rows:
            raise RefusedError(f"fill: {source} has {rows} rows, but {filled} would be filled")
    return constant


def _packed(spec: TensorSpec, packing: Packing) -> TensorSpec:
    if spec.shape[packing.axis] % packing.blocks:
        raise RefusedError(
            f"{spec.source} has shape {list(spec.shape)}, which cannot be divided into a block for "
            f"each of {packing.blocks} layers"
        )
    shape = list(spec.shape)
    shape[packing.axis] = shape[packing.axis] // packing.blocks * len(packing.order)
    nbytes = spec.nbytes // packing.blocks * len(packing.order)
    return replace(spec, shape=tuple(shape), nbytes=nbytes, packing=packing)


def _converted(tensor: Tensor, name: str, dtypes: Dtypes) -> tuple[str, str]:
    """Return the dtypes in which a tensor is multiplied and written, in safetensors' spelling."""
    wanted = dtypes.written or dtypes.read
    if wanted is not None and not _dtypes.is_float(tensor.dtype):
        raise RefusedError(
            f"dtype: {name} is stored as {tensor.dtype}, which cannot be converted to {wanted}",
            hint="leave `dtype` out, so that every tensor keeps its dtype",
        )
    through = _dtypes.NAMED[dtypes.read].stored if dtypes.read else tensor.dtype
    return through, _dtypes.NAMED[dtypes.written].stored if dtypes.written else through
