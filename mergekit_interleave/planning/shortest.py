"""Find the shortest directive that expands to a layout of known models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint.models import Source
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Growth
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import AUTO, NORMS
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout.infer import Known, directives_of
from mergekit_interleave.layout.layout import Edit, Layout
from mergekit_interleave.planning import edits, zeroing


@dataclass(frozen=True)
class KnownModels:
    """What is known of the models of a layout.

    Attributes:
        open: Opens a model, or returns None if that is not possible.
        depth: Returns the number of layers of a model, or None if it is unknown.
    """

    open: Callable[[ModelRef], Source | None]
    depth: Callable[[ModelRef], int | None]

    def shortest(self, layout: Layout, growth: Growth | None) -> Directive | None:
        """Return the shortest directive that expands to the slices of a layout.

        Args:
            layout: The layout.
            growth: The growth line that it comes from, if it is known.

        Returns:
            The directive, or None if only a mergekit config can express the layout.
        """
        if not self._modules_return(layout, growth):
            return None
        found = list(directives_of(layout, self._facts(layout)))
        return min(found, key=_length, default=None)

    def _modules_return(self, layout: Layout, growth: Growth | None) -> bool:
        """Return whether a directive would expand to `modules` if the config lists them."""
        document = growth.document if isinstance(growth, ExplicitSlices) else {}
        modules = document.get("modules")
        if not isinstance(modules, Mapping) or modules.keys() == {"default"}:
            return True  # mergekit-multi writes slices this way
        checkpoint = self.open(layout.models[0])
        return checkpoint is not None and bool(checkpoint.modules)

    def _facts(self, layout: Layout) -> Known:
        known = {}
        checkpoint = self.open(layout.models[0])
        if checkpoint is not None and checkpoint.family is not None:
            for word in (AUTO, NORMS):
                with suppress(InterleaveError):
                    edit = edits.edit_of(word, checkpoint, lambda _: None)
                    if edit is not None:
                        known[word] = edit
        return Known(
            depths={model: self.depth(model) for model in layout.models},
            closes=self._closes,
            edits=known,
            damping=partial(_damping, checkpoint),
            reaches_out=self._reaches_out,
        )

    def _closes(self, model: ModelRef, names: tuple[str, ...]) -> bool:
        checkpoint = self.open(model)
        family = families.assumed_family() if checkpoint is None else checkpoint.family
        return (
            family is not None
            and not family.identity_constants
            and {*names} == {*family.residual_writers}
        )

    def _reaches_out(self, layout: Layout) -> bool:
        try:
            for part, before in ((layout.slices[0], True), (layout.slices[-1], False)):
                outside = edits.outside(self.open(part.model), before=before)
                zeroing.check_outside(part.scales, outside)
        except InterleaveError:
            return True
        return False


def _damping(checkpoint: Source | None, times: int) -> Callable[[int], Edit] | None:
    with suppress(InterleaveError):
        return edits.damping_of(times, checkpoint, lambda _: None)
    return None


def _length(directive: Directive) -> int:
    return len(yaml_io.write_lines(directive.to_document()))
