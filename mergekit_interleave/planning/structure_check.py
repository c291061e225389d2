"""Check that the class of the result loads every tensor of it, and lacks none.

transformers fills a parameter that no tensor fills with random numbers, and ignores a tensor that
no parameter needs. Either may come from the base, or from a layout for which the class builds a
layer differently from the layer's source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint import class_loading, layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.class_loading import Form, Loading
from mergekit_interleave.errors import CheckpointError, RefusedError, UnrepresentableError
from mergekit_interleave.planning.tensor_plan import TensorSpec


def check(
    path: Path, forms: Mapping[str, Form], sources: Sequence[Checkpoint], *, depth: int
) -> None:
    """Check the tensors of a result against its class.

    Args:
        path: A directory that holds the config.json of the result.
        forms: The form of each tensor of the result.
        sources: The source models, the model of the first layer first.
        depth: The number of layers of the result.

    Raises:
        CheckpointError: The class of a source does not load that source as it is stored.
        UnrepresentableError: The class would build the result differently.
        RefusedError: transformers cannot load one of the models.
    """
    check_loading(_load(path, forms, sources[0]), sources, depth=depth)


def check_loading(loading: Loading, sources: Sequence[Checkpoint], *, depth: int) -> None:
    """Check what the class of a result did with its tensors; see `check`."""
    problem = _problem(loading, sources[0].require_family(), depth)
    if problem is None:
        return
    for source in sources:
        found = problem_of(source.path, forms_of_tensors(source.tensors), source)
        if found is not None:
            raise CheckpointError(f"{source.ref}: {found.what}", hint=found.hint)
    raise UnrepresentableError(f"transformers would not load the result as planned: {problem.what}")


class Problem(NamedTuple):
    """The reason why a class does not load tensors as they are stored.

    Attributes:
        what: The reason, as a clause.
        hint: What would help, if that is known.
    """

    what: str
    hint: str | None = None


def problem_of(
    path: Path, forms: Mapping[str, Form], model: Checkpoint, *, depth: int | None = None
) -> Problem | None:
    """Return why a class does not load tensors as they are stored, or None if it does.

    Args:
        path: A directory that holds a config.json.
        forms: The form of each tensor.
        model: A model of the same type.
        depth: The number of layers, if it is not that of the model.

    Raises:
        RefusedError: transformers cannot load the model.
    """
    loading = _load(path, forms, model)
    return _problem(loading, model.require_family(), depth or model.depth)


def _load(path: Path, forms: Mapping[str, Form], model: Checkpoint) -> Loading:
    try:
        return class_loading.load(path, forms, trusted=model.trusted)
    except RefusedError as error:
        error.args = (f"{model.ref}: {error}",)
        raise


def _problem(loading: Loading, family: Family, depth: int) -> Problem | None:
    """Return why a class does not load tensors as they are stored, or None if it does."""
    if loading.missing:
        first, *more = loading.missing
        others = f" and {len(more)} more" if more else ""
        return Problem(
            f"no tensor is stored for {first}{others}, so {loading.class_name} would get random "
            "numbers there",
            _prefix_hint(loading),
        )
    for name, (stored, built) in loading.mismatched.items():
        return Problem(
            f"{name} is stored as {list(stored)}, but {loading.class_name} has {list(built)}"
        )
    unloaded = _unloaded_in_some_layers(loading, family, depth)
    if unloaded is not None:
        return Problem(f"{loading.class_name} has no {unloaded}, which is stored")
    return None


def forms_of(specs: Iterable[TensorSpec]) -> dict[str, Form]:
    """Return the forms of planned tensors, by name."""
    return {spec.name: Form(spec.dtype, spec.shape) for spec in specs}


def forms_of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """Return the forms of stored tensors, by name."""
    return {name: Form(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _unloaded_in_some_layers(loading: Loading, family: Family, depth: int) -> str | None:
    """Return a tensor that the class does not load, though it loads its like in other layers.

    What no layer loads, such as a buffer of an old version, is harmless.
    """
    layers: dict[tuple[str, str], set[int]] = {}
    for name in loading.unloaded:
        parsed = layer_names.parse(name)
        if parsed is not None and not (family.has_mtp_layers and parsed.index >= depth):
            layers.setdefault((parsed.stack, parsed.rest), set()).add(parsed.index)
    for (stack, rest), indices in layers.items():
        if any(f"{stack}.{index}.{rest}" in loading.loaded for index in range(depth)):
            return f"{stack}.{min(indices)}.{rest}"
    return None


def _prefix_hint(loading: Loading) -> str | None:
    """Return the prefix that keeps the class from finding its tensors, as a hint."""
    missing = set(loading.missing)
    for stored in loading.unloaded:
        for at in (match.end() for match in re.finditer(r"\.", stored)):
            if stored[at:] in missing:
                return f"store the tensors without the prefix {stored[:at]!r} of their names"
    return None
