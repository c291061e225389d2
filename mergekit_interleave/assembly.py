"""Which tensor of which source becomes which tensor of the new model: a layout, made concrete.

The engine is held to this list before it writes, and its output after it has written. As in
mergekit, what comes before the layers is the first slice's, what comes after them the last one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_interleave.architecture import Family
from mergekit_interleave.checkpoint import Checkpoint, Tensor
from mergekit_interleave.errors import OutputError, RefusedError
from mergekit_interleave.layout import Layout, Slice, scale_of
from mergekit_interleave.reference import ModelRef

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""mergekit's names of the dtypes that it can write, and safetensors' spelling of them."""

_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Part:
    """One tensor of the new model.

    Attributes:
        name: Its name there.
        model: The source model.
        source: Its name in the source.
        tensor: The stored tensor it is made of.
        scale: What it is multiplied by; None for a plain copy.
        dtype: The dtype it is to have, in safetensors' spelling.
        nbytes: The size it is to have.
    """

    name: str
    model: ModelRef
    source: str
    tensor: Tensor
    scale: float | None
    dtype: str
    nbytes: int


def assemble(
    layout: Layout, checkpoints: Mapping[ModelRef, Checkpoint], dtype: str | None = None
) -> tuple[Part, ...]:
    """List every tensor of the new model.

    Args:
        layout: The layers.
        checkpoints: Each of its models, all of one known family.
        dtype: mergekit's name of the dtype to convert to; None keeps each tensor's own.

    Raises:
        CheckpointError: A source has no tensors for one of the layers.
        RefusedError: A tensor that holds no plain floats would be converted.
    """

    def part(name: str, origin: Slice, source: str) -> Part:
        tensor = checkpoints[origin.model].tensors[source]
        stored, nbytes = _converted(tensor, source, dtype)
        scale = scale_of(source, origin.scales)
        if scale is not None and tensor.dtype not in _BYTES:
            raise RefusedError(
                f"{source} is stored as {tensor.dtype}, which cannot be scaled or zeroed yet"
            )
        return Part(name, origin.model, source, tensor, scale, stored, nbytes)

    return tuple(part(*names) for names in _names(layout, checkpoints))


def _names(
    layout: Layout, checkpoints: Mapping[ModelRef, Checkpoint]
) -> Iterator[tuple[str, Slice, str]]:
    """Each tensor's new name, the slice that it comes with, and its name in the source."""
    first, last = layout.slices[0], layout.slices[-1]
    for name in checkpoints[first.model].outside_layers()[0]:
        yield name, first, name
    output = 0
    for origin in layout.slices:
        checkpoint = checkpoints[origin.model]
        family = checkpoint.require_family()
        for index in range(origin.start, origin.stop):
            sources = checkpoint.layer_tensors(index)
            prefix, renamed = family.layer_prefix(index), family.layer_prefix(output)
            for source in sources:
                yield renamed + source.removeprefix(prefix), origin, source
            output += 1
    for name in checkpoints[last.model].outside_layers()[1]:
        yield name, last, name


def _converted(tensor: Tensor, name: str, dtype: str | None) -> tuple[str, int]:
    """The dtype that a tensor is to have, in safetensors' spelling, and its size in bytes."""
    if dtype is None:
        return tensor.dtype, tensor.nbytes
    if tensor.dtype not in _BYTES:
        raise RefusedError(
            f"dtype: {name} is stored as {tensor.dtype}, which {dtype} cannot stand for",
            hint="leave `dtype` out: every tensor then keeps its own",
        )
    return DTYPES[dtype], tensor.elements * _BYTES[DTYPES[dtype]]


def check_written(
    written: Mapping[str, Tensor],
    parts: Sequence[Part],
    family: Family,
    *,
    any_rows_outside: bool = False,
    any_dtype: bool = False,
) -> None:
    """Check names, shapes and dtypes of what an engine wrote, and that zeros are zeros.

    Args:
        written: The tensors of the result.
        parts: What they must be.
        family: The family of the models.
        any_rows_outside: Embeddings and head may have another number of rows.
        any_dtype: Tensors may have another dtype.

    Raises:
        OutputError: They are not what the layout calls for.
    """
    expected = {part.name: part for part in parts}
    for name in sorted(expected.keys() ^ written.keys()):
        what = "is missing" if name in expected else "is one too many"
        raise OutputError(f"the weights came out wrong: {name} {what}")
    for name, part in expected.items():
        tensor = written[name]
        skip = 1 if any_rows_outside and not name.startswith(family.layers) else 0
        if tensor.shape[skip:] != part.tensor.shape[skip:] or (
            tensor.dtype != part.dtype and not any_dtype
        ):
            raise OutputError(
                f"the weights came out wrong: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"not {part.dtype} {list(part.tensor.shape)}"
            )
        if part.scale == 0 and not _is_zero(tensor):
            raise OutputError(
                f"the weights came out wrong: {name} is not zero",
                hint=f"{part.source} holds an infinity or NaN, which times 0 is NaN",
            )


def _is_zero(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds nothing but zeros, negative ones included."""
    size = _BYTES.get(tensor.dtype, 1)
    left = tensor.nbytes
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left > 0:
            block = file.read(min(left, _BLOCK))
            if not block:
                return False
            left -= len(block)
            # Little-endian: the sign is in the last byte of each element.
            signs = block[size - 1 :: size]
            if signs.count(0) + signs.count(0x80) != len(signs):
                return False
            if block.count(0) != len(block) - signs.count(0x80):
                return False
    return True


_BLOCK = 2**20
