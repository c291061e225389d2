"""Define the result of `gen` and `explain`: YAML text with its warnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Recipe(str):
    """A `str` that also holds the warnings about it.

    Attributes:
        warnings: Warnings, one sentence each.
    """

    __slots__ = ("warnings",)

    warnings: tuple[str, ...]

    def __new__(cls, text: str, warnings: Iterable[str] = ()) -> Self:
        """Create the text with its warnings."""
        recipe = super().__new__(cls, text)
        recipe.warnings = tuple(warnings)
        return recipe

    def as_dict(self) -> dict[str, object]:
        """Return the text and the warnings for JSON."""
        return {"text": str(self), "warnings": list(self.warnings)}
