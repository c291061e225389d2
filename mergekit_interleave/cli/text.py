"""Print results to standard output, and warnings, notes and hints to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping


def show(line: str) -> None:
    """Print a line of the result."""
    print(printable(line))  # noqa: T201


def show_json(report: Mapping[str, object]) -> None:
    """Print a report as JSON."""
    print(json.dumps(report, indent=2))  # noqa: T201


def write(text: str) -> None:
    """Write a text result unchanged."""
    sys.stdout.write(text)


def tell(kind: str, sentences: Iterable[str | None]) -> None:
    """Print `warning:`, `note:` or `hint:` lines to standard error."""
    for sentence in sentences:
        if sentence is not None:
            print(f"{kind}: {sentence}", file=sys.stderr)  # noqa: T201


def printable(line: str) -> str:
    """Escape characters that move the cursor or cannot be encoded; names may come from a file."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # it may be closed
    return shown.encode(encoding, "replace").decode(encoding)
