"""List every tensor of the new model with the source tensor that it is made of.

The engine is checked against this list before it writes, and its output afterwards. As in mergekit,
tensors before the layers come from the first slice's model, those after them from the last one's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, TypeAlias

from mergekit_interleave import _dtypes
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.quantization import quantization_of
from mergekit_interleave.checkpoint.safetensors_header import Tensor
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, scale_of
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.layout import Constant, Layer, Layout, Slice, constant_of


class Dtypes(NamedTuple):
    """What tensors are converted to, by mergekit's names; None keeps what they have.

    Attributes:
        read: Once they are read: what they are multiplied in.
        written: Before they are written.
    """

    read: str | None = None
    written: str | None = None


KEPT = Dtypes()


@dataclass(frozen=True)
class Packing:
    """A tensor that holds a block for each layer, its blocks taken in another order.

    Attributes:
        axis: Along which axis the blocks lie.
        blocks: How many there are in the source.
        order: Which of them the result has.
    """

    axis: int
    blocks: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the new model.

    Attributes:
        name: Its name there.
        model: The source model.
        source: Its name in the source.
        tensor: The stored tensor it is made of.
        scale: What it is multiplied by; None for a plain copy.
        dtype: The dtype it is to have, in safetensors' spelling.
        through: The dtype in which it is multiplied, likewise.
        shape: The shape it is to have.
        nbytes: The size it is to have.
        zero: The byte that means zero where it is zeroed.
        constant: What it is filled with.
        packing: How its blocks are arranged.
        layer: The index of its layer in the new model, None outside the layers.
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

    @property
    def is_computed(self) -> bool:
        """Whether it is scaled or converted, and not to zeros."""
        return self.scale not in (None, 0, 1) or (self.scale != 0 and len(self.dtypes) > 1)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that its numbers go through, each step of which rounds."""
        steps = (self.tensor.dtype, self.through, self.dtype)
        return tuple(step for step, _ in groupby(steps))

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor of the source as it stands there."""
        return self.scale != 0 and self.constant is None and self.packing is None

    def pieces(self) -> Iterator[Piece]:
        """What its bytes are, in order, where they need no arithmetic."""
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
    """The same bytes again and again."""

    data: bytes
    times: int

    @property
    def length(self) -> int:
        """How many bytes that makes."""
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
    """Neighbours that stay neighbours, as (first, count)."""
    runs: list[tuple[int, int]] = []
    for block in order:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def assemble(
    layout: Layout,
    checkpoints: Mapping[ModelRef, Checkpoint],
    dtypes: Dtypes = KEPT,
    kv_sharing_layers: Collection[int] = (),
) -> tuple[TensorSpec, ...]:
    """List every tensor of the new model.

    Args:
        layout: The layers.
        checkpoints: Each of its models, all of one known family.
        dtypes: What tensors are converted to.
        kv_sharing_layers: The indices of the new layers that use what their original computed.

    Raises:
        CheckpointError: A source has no tensors for one of the layers.
        RefusedError: A tensor that holds no plain floats would be converted, or filled.
    """
    first, last = layout.slices[0], layout.slices[-1]
    before = checkpoints[first.model].outside_layers()[0]
    after = checkpoints[last.model].outside_layers()[1]
    if not checkpoints[first.model].require_family().before_layers:
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
    layer: Layer, checkpoint: Checkpoint, dtypes: Dtypes, kv_sharing_layers: Collection[int]
) -> Iterator[TensorSpec]:
    family = checkpoint.require_family()
    lacking = family.never_copied if layer.new else ()
    for rule in (family.indexer_sharing, family.kv_sharing):
        if layer.index in kv_sharing_layers and rule is not None:
            lacking += rule.absent_tensors
    wide: Mapping[str, int] = {}
    if layer.index in kv_sharing_layers and family.kv_sharing is not None:
        wide = family.kv_sharing.widened(checkpoint.layer_config)
    for source in checkpoint.layer_tensors(layer.source):
        if not any(name in source for name in lacking):
            spec = _spec(checkpoint, source, layer.scales, dtypes, layer)
            axis = next((axis for name, axis in wide.items() if name in source), None)
            # The second half repeats the first: zeros there would never be trained.
            yield spec if axis is None else _packed(spec, Packing(axis, 1, (0, 0)))


def _check_scaled_alike(outside: Sequence[str], first: Slice, last: Slice) -> None:
    """Where it is not known which tensors come before the layers, all must be scaled alike."""
    for name in outside:
        one, other = (scale_of(name, spec.scales) for spec in (first, last))
        if (1 if one is None else one) != (1 if other is None else other):
            raise RefusedError(
                f"a scale of the first or last slice would reach {name}, which belongs to no layer",
                hint="name the tensors of the layers in `filter`",
            )


def _outside(
    names: Sequence[str], origin: Slice, layout: Layout, checkpoint: Checkpoint, dtypes: Dtypes
) -> Iterator[TensorSpec]:
    family, depth = checkpoint.require_family(), checkpoint.depth
    scaled = set(checkpoint.scaled(names))
    for source in names:
        index = checkpoint.layer_of(source)
        spec = _spec(checkpoint, source, origin.scales if source in scaled else (), dtypes)
        axis = next(
            (axis for name, axis in family.per_layer_blocks.items() if name in source), None
        )
        if index is not None:
            yield replace(spec, name=checkpoint.renamed(source, index + len(layout) - depth))
        elif axis is not None:
            yield _packed(spec, Packing(axis, depth, tuple(la.source for la in layout.layers)))
        else:
            yield spec


def _spec(
    checkpoint: Checkpoint,
    source: str,
    scales: Scales,
    dtypes: Dtypes,
    layer: Layer | None = None,
) -> TensorSpec:
    """A tensor of a source, as it is outside the layers or in one of them."""
    tensor = checkpoint.tensors[source]
    through, written = _converted(tensor, source, dtypes)
    scale = scale_of(source, scales)
    if scale not in (None, 0, 1) and not _dtypes.is_float(tensor.dtype):
        raise RefusedError(f"{source} is stored as {tensor.dtype}, which cannot be scaled")
    zero = 0
    if scale == 0:
        found = quantization_of(checkpoint.config).zero_byte(source, tensor, checkpoint.tensors)
        scale, zero = (None, 0) if found is None else (0, found)
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
    )


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
            raise RefusedError(f"fill: {constant.value:g} is no {tensor.dtype}") from error
        rows = tensor.shape[0] if tensor.shape else 1
        filled = rows - (constant.after or 0) if constant.square is None else constant.square**2
        if not 0 <= filled <= rows:
            raise RefusedError(f"fill: {source} has {rows} rows, and {filled} are to be filled")
    return constant


def _packed(spec: TensorSpec, packing: Packing) -> TensorSpec:
    if spec.shape[packing.axis] % packing.blocks:
        raise RefusedError(
            f"{spec.source} is {list(spec.shape)}, which holds no block for each of "
            f"{packing.blocks} layers"
        )
    shape = list(spec.shape)
    shape[packing.axis] = shape[packing.axis] // packing.blocks * len(packing.order)
    nbytes = spec.nbytes // packing.blocks * len(packing.order)
    return replace(spec, shape=tuple(shape), nbytes=nbytes, packing=packing)


def _converted(tensor: Tensor, name: str, dtypes: Dtypes) -> tuple[str, str]:
    """What a tensor is multiplied in, and what it is to be, in safetensors' spelling."""
    wanted = dtypes.written or dtypes.read
    if wanted is not None and not _dtypes.is_float(tensor.dtype):
        raise RefusedError(
            f"dtype: {name} is stored as {tensor.dtype}, which {wanted} cannot stand for",
            hint="leave `dtype` out: every tensor then keeps its own",
        )
    through = _dtypes.NAMED[dtypes.read].stored if dtypes.read else tensor.dtype
    return through, _dtypes.NAMED[dtypes.written].stored if dtypes.written else through
