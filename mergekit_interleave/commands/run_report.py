"""Report on the model that `run` has written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._units import amount
from mergekit_interleave.engines.protocol import WriteResult
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.verification.tensors import Comparison

_WORTH_A_HINT = 10
"""The estimated seconds that a faster run must save to be suggested."""


@dataclass(frozen=True)
class RunReport:
    """The model that was written.

    Attributes:
        out: Its directory.
        layout: Its layers.
        written: The comparison of the written tensors with the sources.
        outcome: The engine that wrote the tensors, and how it wrote their bytes.
        parameters: The number of its parameters; None if one integer may contain several of them.
        name: The suggested name; None if no model card could be written.
        warnings: Warnings, one sentence each.
        notes: Notes, one sentence each.
    """

    out: Path
    layout: Layout
    written: Comparison
    outcome: WriteResult
    parameters: int | None
    name: str | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the layout, which does not depend on the names of its models."""
        return fingerprint(self.layout)

    @property
    def hint(self) -> str | None:
        """A suggestion for a faster run, if there is one."""
        if self.outcome.saving >= _WORTH_A_HINT:
            return "--engine stream writes the same tensors, faster and in constant memory"
        return None

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        traffic = self.outcome.traffic
        numbers = "" if self.parameters is None else f"{self.parameters:,} parameters, "
        size = "" if traffic.is_plain else f"{amount(self.written.nbytes)}: "
        new = f"{len(self.layout)} layers, {len(self.layout.new_layers)} of them new"
        lines = [
            f"{self.out}: {new}; {numbers}{size}{traffic}",
            f"layout fingerprint: {self.fingerprint}",
        ]
        return lines if self.name is None else [*lines, f"suggested name: {self.name}"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `run --json` prints it."""
        return {
            "out": str(self.out),
            "layers": len(self.layout),
            "new_layers": [layer.index for layer in self.layout.new_layers],
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "tensors": self.written.tensors,
            "bytes": self.written.nbytes,
            "compared": self.written.compared,
            "engine": self.outcome.engine,
            "traffic": dataclasses.asdict(self.outcome.traffic),
            "name": self.name,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }
