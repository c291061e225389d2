"""Which tensor of which source becomes which tensor of the new model: a layout, made concrete.

The engine is held to this list before it writes, and its output after it has written. As in
mergekit, what comes before the layers is the first slice's, what comes after them the last one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit_interleave.checkpoint import Checkpoint, Tensor
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout import Layout, Slice, scale_of
from mergekit_interleave.reference import ModelRef

EMBEDDINGS = "model.embed_tokens.weight"

# mergekit's name of a dtype, its name in a safetensors header, the bytes of one element.
_FLOATS = {
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}


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
        return Part(name, origin.model, source, tensor, scale, stored, nbytes)

    return tuple(part(*names) for names in _names(layout, checkpoints))


def _names(
    layout: Layout, checkpoints: Mapping[ModelRef, Checkpoint]
) -> Iterator[tuple[str, Slice, str]]:
    """Each tensor's new name, the slice that it comes with, and its name in the source."""
    first, last = layout.slices[0], layout.slices[-1]
    for name in _outside_layers(checkpoints[first.model], before=True):
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
    for name in _outside_layers(checkpoints[last.model], before=False):
        yield name, last, name


def _outside_layers(checkpoint: Checkpoint, *, before: bool) -> list[str]:
    """The tensors that belong to no layer and stand before, or after, the layers."""
    family = checkpoint.require_family()
    return [
        name
        for name in checkpoint.tensors
        if not name.startswith(family.layers + ".")
        and family.is_loaded(name)
        and (name == EMBEDDINGS) == before
    ]


def _converted(tensor: Tensor, name: str, dtype: str | None) -> tuple[str, int]:
    """The dtype that a tensor is to have, in safetensors' spelling, and its size in bytes."""
    if dtype is None:
        return tensor.dtype, tensor.nbytes
    if tensor.dtype not in {stored for stored, _ in _FLOATS.values()}:
        raise RefusedError(
            f"dtype: {name} is stored as {tensor.dtype}, which {dtype} cannot stand for",
            hint="leave `dtype` out: every tensor then keeps its own",
        )
    stored, size = _FLOATS[dtype.removeprefix("torch.")]
    return stored, tensor.elements * size
