"""The report of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.evaluation.comparison import Comparison
from mergekit_interleave.output import evaluation_text


@dataclass(frozen=True)
class EvaluationReport:
    """How a grown model compares with its base.

    Attributes:
        model: The name of the grown model.
        against: The name of the base.
        dtype: The dtype that both compute in; if they differ, first that of the base.
        limit: The number of items of each task, or the share if it is below 1; None for all.
        date: When the evaluation ended, in ISO 8601.
        tools: The versions of the tools.
        comparisons: The results, one for each metric of each task or group.
        is_first: Whether this process is the first of those that `accelerate launch` started,
            which prints and writes.
        warnings: Warnings, one sentence each.
        notes: What was done besides, one sentence each.
    """

    model: str
    against: str
    dtype: str
    limit: float | None
    date: str
    tools: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    is_first: bool = True
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The results as JSON values, as interleave.json stores them."""
        more = {"limit": self.limit, "date": self.date}
        return [each.as_dict() | more for each in self.comparisons]

    @property
    def verdict(self) -> str:
        """One line: which results differ beyond chance."""
        return evaluation_text.summary(self.rows)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        tools = ", ".join(f"{name} {version}" for name, version in self.tools.items())
        return [
            self.verdict,
            "",
            f"{self.model} against {self.against}, on the same items, in {self.dtype} ({tools}):",
            *evaluation_text.lines(self.rows),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `evaluate --json` prints it."""
        return {
            "verdict": self.verdict,
            "model": self.model,
            "against": self.against,
            "dtype": self.dtype,
            "tools": dict(self.tools),
            "results": self.rows,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())
