"""The keys `slices:`, `models:` and `modules:` of a mergekit config, which list every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mergekit_interleave.directive.growth.base import Growth
from mergekit_interleave.directive.model_ref import ModelRef, parse_model


@dataclass(frozen=True)
class ExplicitSlices(Growth):
    """The `slices:`, `models:` or `modules:` of a mergekit config, unchanged.

    `layout.mergekit_yaml` parses them.
    """

    document: Mapping[str, object]

    @property
    def needs_model(self) -> bool:
        """Always false: the config names its models."""
        return False

    @property
    def needs_depth(self) -> bool:
        """Always false: the config states its ranges."""
        return False

    @property
    def edits_itself(self) -> bool:
        """Always true: each slice states its own edits."""
        return True

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that the config names, in order."""
        found: dict[object, ModelRef] = {}
        for model in _models(self.document):
            found.setdefault(model.identity, model)
        return tuple(found.values())

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Raise an error, because `layout.mergekit_yaml` parses these slices."""
        del depth, model
        raise TypeError("`layout.mergekit_yaml` parses the slices of a mergekit config")

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the config unchanged."""
        del called
        return dict(self.document)


def _models(value: object) -> Iterator[ModelRef]:
    if isinstance(value, list):
        for entry in value:
            yield from _models(entry)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if key == "model":
                yield parse_model(entry, "model")
            elif key != "parameters":
                yield from _models(entry)
