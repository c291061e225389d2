"""Facts about slices, used to describe or find a growth line. Pure.

Only `plan`, `explain` and the model card need them, so `gen` does not import this module.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_interleave.directive.growth.base import Ranges
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, Zero

ZEROED, SCALED = "zeroed", "scaled"


@dataclass(frozen=True)
class Summary:
    """The numbers that the sentence about a growth line needs.

    Attributes:
        depth: The number of layers of the source model.
        new: The number of new layers.
        repeated: The number of source layers that have a new copy.
        slices: The number of slices, after consecutive ones are joined.
        edit: The edit of the new layers: "", `zeroed` or `scaled`; with `some` before it, the edit
            of other layers.
        only_copies: Whether each new layer is a copy of a layer that occurs elsewhere.
        averaged: Whether new layers are the means of two layers.
    """

    depth: int
    new: int
    repeated: int
    slices: int
    edit: str
    only_copies: bool
    averaged: bool = False

    @property
    def kind(self) -> str:
        """The common term for this kind of merge."""
        return "block expansion" if self.edit == ZEROED else "depth up-scaling"

    @property
    def edited(self) -> str:
        """The edit after a comma, such as `, zeroed`; empty if there is none."""
        return f", {self.edit}" if self.edit else ""

    @property
    def copies_edited(self) -> str:
        """`, the copies zeroed`, or `, some zeroed` if not all are zeroed or not all are copies."""
        if self.edit in (ZEROED, SCALED) and self.only_copies:
            return f", the copies {self.edit}"
        return f", some {self.edit.removeprefix('some ')}" if self.edit else ""

    @property
    def new_layers(self) -> str:
        """The number of new layers and their edit, such as `8 new layers, zeroed`."""
        mean = " of averaged neighbours" if self.averaged else ""
        return f"{self.new} new layer{'s' if self.new > 1 else ''}{mean}{self.edited}"


@dataclass(frozen=True)
class EditedSlices:
    """Consecutive slices with the same edit.

    Attributes:
        zero: The tensors to zero, if the edit can be written as `zero` and `scale`; else None.
        scale: The factors of the tensors.
        slices: The source model, start and stop of each slice.
    """

    zero: Zero | None
    scale: Scales
    slices: tuple[tuple[ModelRef, int, int], ...]


@dataclass(frozen=True)
class Pattern:
    """The slices that `explain` tries to express as a growth line.

    Attributes:
        depth: The number of layers of the first source model.
        written: The range of each slice.
        joined: These ranges with consecutive ones joined.
        uncut: These ranges with consecutive ones joined if they have different edits.
        edited: The slices with their models and edits.
    """

    depth: int
    written: Ranges
    joined: Ranges
    uncut: Ranges
    edited: tuple[EditedSlices, ...]

    @property
    def added(self) -> int:
        """The number of layers beyond the depth of the source model."""
        return sum(stop - start for start, stop in self.written) - self.depth
