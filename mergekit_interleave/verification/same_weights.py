"""Compare the tensors of two directories: names, shapes, dtypes and every byte."""

from __future__ import annotations

from pathlib import Path

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint.safetensors_header import read_tensors
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification.tensors import compare


def have_same_weights(directory: Path, other: Path) -> bool:
    """Return whether two directories store the same tensors.

    Raises:
        CheckpointError: The tensors of one cannot be read.
    """
    ref = ModelRef(ModelPath(str(other)))
    specs = [_unchanged(name, tensor, ref) for name, tensor in read_tensors(other).items()]
    return not compare(read_tensors(directory).items(), specs).differences


def _unchanged(name: str, tensor: Tensor, model: ModelRef) -> TensorSpec:
    return TensorSpec(
        name=name,
        model=model,
        source=name,
        tensor=tensor,
        scale=None,
        dtype=tensor.dtype,
        through=tensor.dtype,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
    )
