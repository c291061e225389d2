"""Print results to standard output, and warnings, notes and hints to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol


def show(line: str) -> None:
    """Print a line of the result."""
    print(printable(line))  # noqa: T201


def show_json(report: Mapping[str, object]) -> None:
    """Print a report as JSON."""
    print(json.dumps(report, indent=2))  # noqa: T201


class Report(Protocol):
    """The result of a command."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings, one sentence each."""

    def lines(self) -> Iterable[str]:
        """Return the report as lines of text."""

    def as_dict(self) -> Mapping[str, Any]:
        """Return the report as JSON values."""


def show_report(report: Report, notes: Iterable[str] = (), *, as_json: bool) -> None:
    """Print a report, its warnings and its notes; as JSON, the report contains both."""
    if as_json:
        show_json(report.as_dict())
        return
    tell("warning", report.warnings)
    for line in report.lines():
        show(line)
    sys.stdout.flush()
    tell("note", notes)


def write(text: str) -> None:
    """Print a text result unchanged."""
    sys.stdout.write(text)


def tell(kind: str, sentences: Iterable[str | None]) -> None:
    """Print `warning:`, `note:` or `hint:` lines to standard error.

    A standard error that is closed or full changes neither the result nor the exit code.
    """
    if sys.stderr is None:  # `print` would take standard output instead
        return
    try:
        for sentence in sentences:
            if sentence is not None:
                print(f"{kind}: {sentence}", file=sys.stderr)  # noqa: T201
    except OSError:
        with suppress(OSError):
            sys.stderr.close()  # otherwise Python writes again at exit, and exits with 120
        sys.stderr = None


def printable(line: str) -> str:
    """Escape characters that move the cursor or cannot be encoded; names may come from a file."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # standard output may be closed
    return shown.encode(encoding, "replace").decode(encoding)
