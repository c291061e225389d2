"""Map the names of stored tensors to the names that a loaded model has for them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class MemoryNames(NamedTuple):
    """The tensors in memory that transformers makes from a stored tensor.

    Attributes:
        names: Their names in memory.
        is_converted: Whether transformers merges, splits or transposes; otherwise the one tensor in
            memory has the values and the shape of the stored one.
    """

    names: tuple[str, ...]
    is_converted: bool


def memory_names(model: Any, stored: Iterable[str]) -> dict[str, MemoryNames]:
    """Map the names of stored tensors; those that the model's class does not load are left out.

    Args:
        model: A loaded model.
        stored: The names of the tensors in its checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    targets = {
        pattern: converter.target_patterns
        for converter in converters
        for pattern in converter.source_patterns
    }
    state = model.state_dict()

    def found(name: str) -> MemoryNames | None:
        prefix = model.base_model_prefix
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # as transformers does
            renamed, pattern = name, None
        if pattern is None:
            return MemoryNames((renamed,), is_converted=False) if renamed in state else None
        first, *_ = targets[pattern]
        names = tuple(renamed.replace(first, target) for target in targets[pattern])
        present = tuple(name for name in names if name in state)
        return MemoryNames(present, is_converted=True) if present else None

    pairs = {name: found(name) for name in stored}
    return {name: names for name, names in pairs.items() if names is not None}


def reverted(model: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert tensors in memory to the form in which they are stored, as saving does.

    Args:
        model: The loaded model.
        tensors: Some tensors by their names in memory; all of those made from the same stored ones.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    found: Mapping[str, Any] = revert_weight_conversion(model, dict(tensors))
    return found
