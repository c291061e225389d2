"""Data about slices, used to describe or find a growth line; pure numbers.

Only `plan`, `explain` and the model card need it, so `gen` does not import it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_interleave.directive.growth.base import Ranges
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, Zero

ZEROED, SCALED = "zeroed", "scaled"


@dataclass(frozen=True)
class Summary:
    """What a growth line made of one model, in the numbers that its sentence needs.

    Attributes:
        depth: How many layers the source model has.
        new: How many layers are new.
        repeated: How many source layers have a new copy.
        slices: How many slices there are, consecutive ones joined.
        edit: The edit of the new layers: "", `zeroed`, `scaled`, or `some` of these.
        only_copies: Whether the original of each new layer is in the new model, too.
    """

    depth: int
    new: int
    repeated: int
    slices: int
    edit: str
    only_copies: bool

    @property
    def kind(self) -> str:
        """The field's term for the merge."""
        return "block expansion" if self.edit == ZEROED else "depth up-scaling"

    @property
    def edited(self) -> str:
        """`, zeroed`, or nothing."""
        return f", {self.edit}" if self.edit else ""

    @property
    def copies_edited(self) -> str:
        """`, the copies zeroed`; `, some zeroed` if not all are, or not all are copies."""
        if self.edit in (ZEROED, SCALED) and self.only_copies:
            return f", the copies {self.edit}"
        return f", some {self.edit.removeprefix('some ')}" if self.edit else ""

    @property
    def new_layers(self) -> str:
        """`8 new layers, zeroed`."""
        return f"{self.new} new layer{'s' if self.new > 1 else ''}{self.edited}"


@dataclass(frozen=True)
class EditedSlices:
    """Consecutive slices with the same edit.

    Attributes:
        zero: The tensors that are zeroed in them.
        scale: The factors of their tensors.
        slices: The source model, start and stop of each.
    """

    zero: Zero | None
    scale: Scales
    slices: tuple[tuple[ModelRef, int, int], ...]


@dataclass(frozen=True)
class Pattern:
    """The slices for which `explain` looks for a growth line.

    Attributes:
        depth: How many layers the (first) source model has.
        written: The range of each slice.
        joined: The same, with consecutive ranges joined.
        uncut: The same, with ranges joined if only a change of the edit separates them.
        edited: The slices with their models and edits.
    """

    depth: int
    written: Ranges
    joined: Ranges
    uncut: Ranges
    edited: tuple[EditedSlices, ...]

    @property
    def added(self) -> int:
        """How many layers more than the source model there are."""
        return sum(stop - start for start, stop in self.written) - self.depth
