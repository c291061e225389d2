"""Compare the tensors of a model with the expected ones: names, shapes, dtypes and every byte."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification.stored_bytes import Difference, Pair, differences_of


@dataclass(frozen=True)
class Comparison:
    """The result of comparing tensors.

    Attributes:
        parameters: The number of parameters.
        nbytes: The size of all tensors.
        tensors: The number of tensors.
        compared: The size of the compared tensors, including shared blocks that were not read.
        unread: The number of tensors that were not compared, by reason.
        differences: The differences, in the order of the expected tensors.
    """

    parameters: int
    nbytes: int
    tensors: int
    compared: int
    unread: Mapping[str, int]
    differences: Sequence[Difference]


@dataclass(frozen=True)
class Tolerance:
    """The allowed differences from the expected tensors.

    Attributes:
        unread: Returns the reason why a tensor is not compared, or None if it is compared.
        any_dtype: Returns whether a tensor may have another dtype.
        any_rows: Returns whether a tensor may have another number of rows.
        may_lack: Returns whether a tensor of this name may be missing.
    """

    unread: Callable[[TensorSpec], str | None] = lambda _: None
    any_dtype: Callable[[TensorSpec], bool] = lambda _: False
    any_rows: Callable[[TensorSpec], bool] = lambda _: False
    may_lack: Callable[[str], bool] = lambda _: False


def compare(
    found: Iterable[tuple[str, Tensor]],
    specs: Sequence[TensorSpec],
    tolerance: Tolerance = Tolerance(),
    source_name: Callable[[ModelRef], str] = lambda _: "the base",
    equal: Collection[str] = (),
) -> Comparison:
    """Compare the tensors of a model with the expected ones.

    Args:
        found: The tensors, by name.
        specs: The expected tensors.
        tolerance: The allowed differences.
        source_name: Returns the name of a source model within a sentence.
        equal: The names of tensors whose bytes were compared while they were written.

    Raises:
        CheckpointError: A source cannot be read, or has changed.
    """
    expected = {spec.name: spec for spec in specs}
    pairs: list[Pair] = []
    unread: dict[str, int] = {}
    differences: list[Difference] = []
    tensors = parameters = nbytes = 0
    for name, tensor in found:
        tensors, parameters = tensors + 1, parameters + tensor.elements
        nbytes += tensor.nbytes
        spec = expected.pop(name, None)
        if spec is None:
            differences.append(Difference("is not part of the layout", name))
        elif not _is_alike(tensor, spec, tolerance):
            differences.append(
                Difference(
                    f"is {tensor.dtype} {list(tensor.shape)}, "
                    f"expected {spec.dtype} {list(spec.shape)}",
                    name,
                    spec.layer,
                )
            )
        elif (reason := tolerance.unread(spec)) is not None:
            unread[reason] = unread.get(reason, 0) + 1
        else:
            pairs.append(Pair(tensor, spec, source_name(spec.model)))
    differences += [
        Difference("is missing", name, spec.layer)
        for name, spec in expected.items()
        if not tolerance.may_lack(name)
    ]
    differences += differences_of(pair for pair in pairs if pair.spec.name not in equal)
    order = {spec.name: number for number, spec in enumerate(specs)}
    differences.sort(key=lambda difference: order.get(difference.tensor or "", len(order)))
    compared = sum(pair.found.nbytes for pair in pairs)
    return Comparison(parameters, nbytes, tensors, compared, unread, differences)


def _is_alike(tensor: Tensor, spec: TensorSpec, tolerance: Tolerance) -> bool:
    """Return whether a tensor has the expected shape and dtype."""
    skip = 1 if tolerance.any_rows(spec) else 0
    return tensor.shape[skip:] == spec.shape[skip:] and (
        tensor.dtype == spec.dtype or tolerance.any_dtype(spec)
    )
