"""Report on the files that `card` has written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CardReport:
    """The files that `card` wrote.

    Attributes:
        files: The names of the files.
        name: The suggested name of the model.
        base_models: The Hub ids of its bases.
        warnings: Warnings, one sentence each.
        notes: Notes, one sentence each.
    """

    files: tuple[str, ...]
    name: str
    base_models: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [*(f"{name}: written" for name in self.files), f"suggested name: {self.name}"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `card --json` prints it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
